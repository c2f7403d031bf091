"""A good configuration to start from, with a comment on every choice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

__all__ = ["Choice", "render"]

_SHARDED = (
    "Nothing is sharded: every rank holds everything.",
    "Every rank holds its part of the optimizer state, and all of the rest.",
    "Every rank holds its part of the optimizer state and of the gradients.",
    "Every rank holds its part of the optimizer state, the gradients and the parameters.",
)
_LAST_STAGE = len(_SHARDED) - 1


@dataclass(frozen=True, slots=True)
class Choice:
    """What the configuration is for."""

    stage: Literal[0, 1, 2, 3] = 2
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where optimizer state, and at stage 3 parameters, are moved to."""

    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    nvme_path: str = "/local_nvme"
    """The folder for "nvme"."""


@dataclass(frozen=True, slots=True)
class _Line:
    comment: str
    key: str
    value: object


def render(choice: Choice, *, comments: bool = True) -> str:
    """Write the JSON of a configuration.

    Args:
        choice: what it is for.
        comments: whether to explain the values; tools that read strict JSON want none.
    """
    return "\n".join(_block(list(_top(choice)), comments, indent=2)) + "\n"


def _top(choice: Choice) -> Iterator[_Line]:
    yield _Line(
        "Samples one rank takes at a time: as many as fit into memory.",
        "train_micro_batch_size_per_gpu",
        1,
    )
    yield _Line("Micro-batches per optimizer step.", "gradient_accumulation_steps", 1)
    yield _Line("Largest norm of the gradients; 0 does not clip.", "gradient_clipping", 1.0)
    yield _Line("Optimizer steps between progress lines.", "steps_per_print", 10)
    if choice.precision != "fp32":
        yield _Line(*_precision(choice.precision))
    yield _Line(
        "Leave this block out if the script passes an optimizer of its own.",
        "optimizer",
        {
            "type": "AdamW",
            "params": {"lr": 1e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
        },
    )
    yield _Line("", "zero_optimization", list(_zero(choice)))


def _precision(name: str) -> tuple[str, str, object]:
    if name == "bf16":
        return (
            "Computes in bf16, with master weights in fp32. Needs no loss scale.",
            "bf16",
            {"enabled": True},
        )
    return (
        "Computes in fp16, with master weights in fp32 and a dynamic loss scale.",
        "fp16",
        {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000},
    )


def _zero(choice: Choice) -> Iterator[_Line]:
    yield _Line(_SHARDED[choice.stage], "stage", choice.stage)
    if choice.stage:
        yield _Line("Communicates while it computes.", "overlap_comm", True)
    if choice.stage == _LAST_STAGE:
        yield _Line(
            "Lets engine.save_16bit_model put the whole model together.",
            "stage3_gather_16bit_weights_on_model_save",
            True,
        )
    if choice.offload == "none":
        return
    place: dict[str, object] = {"device": choice.offload, "pin_memory": True}
    if choice.offload == "nvme":
        place["nvme_path"] = choice.nvme_path
    yield _Line("Moves optimizer state and master weights.", "offload_optimizer", place)
    if choice.stage == _LAST_STAGE:
        yield _Line("Moves the shards of the parameters.", "offload_param", place)


def _block(lines: list[_Line], comments: bool, indent: int) -> Iterator[str]:
    blank = " " * indent
    yield "{"
    for number, line in enumerate(lines, 1):
        if comments and line.comment:
            yield f"{blank}// {line.comment}"
        comma = "," if number < len(lines) else ""
        yield f"{blank}{json.dumps(line.key)}: {_value(line.value, comments, indent)}{comma}"
    yield " " * (indent - 2) + "}"


def _value(value: object, comments: bool, indent: int) -> str:
    if isinstance(value, list) and value and isinstance(value[0], _Line):
        return "\n".join(_block(value, comments, indent + 2))
    return json.dumps(value)
