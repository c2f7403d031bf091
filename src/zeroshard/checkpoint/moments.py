"""State of the optimizer for a parameter: what is cut like the parameter, and what is not.

[Note: kinds of state]
For each slice an optimizer keeps values under keys. They are one of three kinds:

    slices    a number for each element, such as Adam's averages: cut anew like the parameter
    numbers   a value for the whole parameter, such as a count of steps: the same for every slice
    blocks    anything else, such as the scales of quantised state or averages over the rows of a
              matrix: its meaning depends on where the slice begins and ends, so it fits that slice
              and no other
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zeroshard.checkpoint.encoding import Decoder, Encoder
from zeroshard.checkpoint.training import Place
from zeroshard.errors import CheckpointError, UsageError, compose
from zeroshard.optim.whole import WholeOptimizer

__all__ = ["Moments", "check_kind", "describe", "group_of", "moments_of", "scalar_keys"]

_HOST_OR_DEVICE = "on_device"


@dataclass(slots=True)
class Moments:
    """An optimizer's state for a slice, by its kind. See [Note: kinds of state]."""

    slices: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    blocks: dict[str, Any] = field(default_factory=dict)


def scalar_keys(optimizer: torch.optim.Optimizer) -> set[str]:
    """The keys that are a value for a whole parameter, whatever its shape.

    It cannot be told from a parameter without dimensions, so one with dimensions decides.
    """
    keys = {"step"}
    for param, state in optimizer.state.items():
        if isinstance(param, Tensor) and param.dim():
            keys |= {k for k, v in state.items() if isinstance(v, Tensor) and not v.dim()}
    return keys


def moments_of(state: Mapping[str, Any], place: Place, scalars: set[str], to: Encoder) -> Moments:
    """Sort the state of a slice; what is no tensor of it is encoded."""
    piece, found = place.slice, Moments()
    for key, value in state.items():
        if not isinstance(value, Tensor):
            kind = found.numbers if isinstance(value, (int, float, str, type(None))) else None
            (found.blocks if kind is None else kind)[key] = to.encode(value)
        elif type(value) is Tensor and key not in scalars and value.shape == piece.shape:
            found.slices[key] = value
        elif not value.dim():
            on_device = value.device.type != "cpu"
            found.numbers[key] = {"value": to.encode(value), _HOST_OR_DEVICE: on_device}
        else:
            found.blocks[key] = {"value": to.encode(value)}
    if to.objects:
        what = ", ".join(sorted({type(each).__name__ for each in to.objects.values()}))
        raise UsageError(
            compose(
                f"the optimizer keeps {what} for {place.name}, which is no plain tensor and cannot "
                "be saved.",
                hint="use an optimizer whose state is tensors and numbers; "
                "engine.save_16bit_model(folder) saves the weights alone.",
            )
        )
    return found


def decoded(spec: Any, decoder: Decoder, device: torch.device) -> Any:
    """A number or block as the optimizer keeps it, if it has it on its device."""
    if not isinstance(spec, dict) or "value" not in spec:
        return decoder.decode(spec)
    value = decoder.decode(spec["value"])
    return value.to(device) if spec.get(_HOST_OR_DEVICE, True) else value


def group_of(optimizer: torch.optim.Optimizer) -> dict[int, int]:
    """The param group of each slice, by the slice's id."""
    return {
        id(param): number
        for number, group in enumerate(optimizer.param_groups)
        for param in group["params"]
    }


def describe(optimizer: torch.optim.Optimizer, encoder: Encoder) -> dict[str, Any]:
    """The class of an optimizer, and the hyper-parameters of its groups."""
    groups = [
        {key: encoder.encode(value) for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    return {"lineage": _lineage(type(optimizer)), "groups": groups}


def _lineage(kind: type) -> list[str]:
    """The names of a class and of those it is made from, without what all optimizers share."""
    return [
        f"{each.__module__.partition('.')[0]}.{each.__name__}"
        for each in kind.__mro__
        if issubclass(each, torch.optim.Optimizer)
        and not each.__name__.startswith("Optimizer")
        and each is not WholeOptimizer
    ]


def check_kind(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], where: object) -> None:
    """Refuse state of another kind of optimizer, or of other groups.

    Raises:
        CheckpointError: it is.
    """
    own, theirs = _lineage(type(optimizer)), saved["lineage"]
    hint = "pass load_optimizer_states=False to load the weights and start the optimizer anew."
    if not set(own) & set(theirs):
        raise CheckpointError(
            compose(
                f"{where} holds state of {theirs[0]}, and the optimizer is {own[0]}.", hint=hint
            )
        )
    if len(saved["groups"]) != len(optimizer.param_groups):
        raise CheckpointError(
            compose(
                f"{where} was written with {len(saved['groups'])} param groups, and the optimizer "
                f"has {len(optimizer.param_groups)}.",
                hint=hint,
            )
        )
