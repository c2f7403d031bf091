"""What a training script hands over: its arguments, and the facts that "auto" stands for."""

from __future__ import annotations

import argparse
import math
import numbers
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

import torch
from torch import nn

from zeroshard.config import Facts, Given
from zeroshard.engine.precision import DTYPES, DtypeName

__all__ = ["add_config_arguments", "collect_facts"]

_NAMES: Mapping[torch.dtype, DtypeName] = {dtype: name for name, dtype in DTYPES.items()}
_OF_A_GROUP = ("lr", "betas", "eps", "weight_decay")


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--deepspeed`` and ``--deepspeed_config`` to a script's parser, and return it."""
    group = parser.add_argument_group("zeroshard")
    group.add_argument(
        "--deepspeed", action="store_true", help="accepted for scripts written for DeepSpeed"
    )
    group.add_argument("--deepspeed_config", metavar="PATH", help="configuration file (JSON)")
    # Names from before DeepSpeed was called that.
    group.add_argument("--deepscale", action="store_true", help=argparse.SUPPRESS)
    group.add_argument("--deepscale_config", metavar="PATH", help=argparse.SUPPRESS)
    return parser


def collect_facts(
    args: object,
    model: nn.Module,
    model_parameters: object = None,
    *,
    optimizer: object = None,
    lr_scheduler: object = None,
) -> Facts:
    """Collect what a configuration may leave to the caller of ``initialize`` by "auto".

    Nothing here is refused: what has an unexpected type counts as not given. An iterator of
    parameters is left alone, as it can be read only once.

    Args:
        args: the script's arguments, with the names that Hugging Face's ``TrainingArguments`` use.
        model: the model, for the dtype of its parameters and the hidden size of its ``config``.
        model_parameters: parameters or param groups.
        optimizer: an optimizer or a callable that makes one, instead of the file's.
        lr_scheduler: a schedule or a callable that makes one, instead of the file's.
    """
    given: dict[tuple[str, ...], Given] = {
        ("optimizer", "params", name): Given(value, source)
        for name, value, source in _optimizer_arguments(args)
    }
    given.update({path: Given(value, f"args.{source}") for path, value, source in _arguments(args)})
    named = "model_parameters"
    if isinstance(optimizer, torch.optim.Optimizer):
        named, model_parameters = "the optimizer's param_groups", optimizer.param_groups
    for name, value in _common(model_parameters).items():
        given["optimizer", "params", name] = Given(value, named)
    passed = {"optimizer": optimizer, "scheduler": lr_scheduler}
    return Facts(
        dtype=_dtype(model),
        hidden_size=_hidden_size(model),
        given=given,
        replaced=frozenset(block for block, value in passed.items() if value is not None),
    )


def _dtype(model: nn.Module) -> DtypeName | None:
    dtypes = {param.dtype for param in model.parameters() if param.is_floating_point()}
    return _NAMES.get(dtypes.pop()) if len(dtypes) == 1 else None


def _hidden_size(model: nn.Module) -> int | None:
    """Find the hidden size where Hugging Face's models state it."""
    config = _read(model, "config")
    for part in (config, _read(config, "text_config")):
        sizes = _read(part, "hidden_sizes")
        several = list(sizes) if isinstance(sizes, (list, tuple)) else []
        size = _read(part, "hidden_size")
        if _is_count(size):
            return int(size)
        if several and all(_is_count(item) for item in several):
            return int(max(several))
    return None


def _common(groups: object) -> dict[str, Any]:
    """Find the settings that all param groups agree on."""
    if not isinstance(groups, (list, tuple)) or not groups:
        return {}
    if not all(isinstance(group, dict) for group in groups):
        return {}
    first = groups[0]
    return {
        name: first[name]
        for name in _OF_A_GROUP
        if _fits(name, first.get(name)) and all(g.get(name) == first[name] for g in groups)
    }


def _fits(name: str, value: object) -> bool:
    if name != "betas":
        return _is_number(value)
    return (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and all(_is_number(item) for item in value)
    )


def _optimizer_arguments(args: object) -> Iterator[tuple[str, Any, str]]:
    """Yield the optimizer's parameters that arguments give, each with its source."""
    names = {"lr": "learning_rate", "eps": "adam_epsilon", "weight_decay": "weight_decay"}
    for name, source in names.items():
        value = _read(args, source)
        if _is_number(value):
            yield name, value, f"args.{source}"
    betas = [_read(args, "adam_beta1"), _read(args, "adam_beta2")]
    if _fits("betas", betas):
        yield "betas", betas, "args.adam_beta1 and args.adam_beta2"


def _arguments(args: object) -> Iterator[tuple[tuple[str, ...], Any, str]]:
    """Yield the other keys that arguments give, each with the name of the argument."""
    counts = {
        "per_device_train_batch_size": ("train_micro_batch_size_per_gpu",),
        "gradient_accumulation_steps": ("gradient_accumulation_steps",),
        "max_steps": ("scheduler", "params", "total_num_steps"),
    }
    for source, path in counts.items():
        value = _read(args, source)
        if _is_count(value):
            yield path, value, source
    for name in ("fp16", "bf16"):
        value = _read(args, name)
        if isinstance(value, bool):
            yield (name, "enabled"), value, name
    norm = _read(args, "max_grad_norm")
    if _is_number(norm):
        yield ("gradient_clipping",), norm, "max_grad_norm"
    yield from _warmup(args)


def _warmup(args: object) -> Iterator[tuple[tuple[str, ...], Any, str]]:
    """Yield the steps of the warm-up, which may be given as a part of all steps."""
    path = ("scheduler", "params", "warmup_num_steps")
    steps, ratio, total = (
        _read(args, name) for name in ("warmup_steps", "warmup_ratio", "max_steps")
    )
    if _is_count(steps):
        yield path, int(steps), "warmup_steps"
        return
    # Newer arguments hold a ratio in warmup_steps.
    for name, part in (("warmup_steps", steps), ("warmup_ratio", ratio)):
        if _is_number(part) and 0 < part < 1:
            if _is_count(total):
                yield path, math.ceil(part * total), f"{name} x args.max_steps"
            return
    if _is_number(steps) and steps == 0:
        yield path, 0, "warmup_steps"


def _read(holder: object, name: str) -> Any:
    """Read a key or an attribute of something unknown; what cannot be read is not there."""
    try:
        value: Any = (
            holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)
        )
        if isinstance(value, numbers.Number):  # those of numpy are numbers, but not Python's
            return getattr(value, "item", lambda: value)()
        return value
    except Exception:  # properties of foreign objects may raise anything
        return None


def _is_number(value: object) -> TypeGuard[int | float]:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and -sys.float_info.max <= value <= sys.float_info.max
    )


def _is_count(value: object) -> TypeGuard[int | float]:
    return _is_number(value) and value >= 1 and value == int(value)
