"""From a parameter, whoever holds it, to its place in a unit; and who owns a unit that waits."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from zeroshard.core.unit import Keeper, Unit

__all__ = [
    "Slot",
    "disown",
    "enrol",
    "full_nbytes",
    "full_shape",
    "is_waiting",
    "keep_until_engine",
    "slot_of",
    "strike",
]


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a parameter lives: its unit and its place there."""

    unit: Unit
    index: int


# The one registry: from a parameter, whoever holds it, to its place. It owns neither of the two.
_SLOTS: MutableMapping[Tensor, tuple[weakref.ref[Unit], int]] = WeakIdKeyDictionary()


def slot_of(param: Tensor) -> Slot | None:
    """The parameter's place, or None if no engine manages it."""
    entry = _SLOTS.get(param)
    unit = entry[0]() if entry else None
    return None if entry is None or unit is None else Slot(unit, entry[1])


def enrol(unit: Unit) -> None:
    """Let the parameters of a unit be found."""
    for index, member in enumerate(unit.members):
        _SLOTS[member.param] = (weakref.ref(unit), index)


def strike(unit: Unit) -> None:
    """Let the parameters of a unit be ordinary ones from now on."""
    for member in unit.members:
        _SLOTS.pop(member.param, None)
        disown(member.param)


# The attribute by which a parameter keeps its unit until an engine takes the parameter over.
_OWNER = "_zeroshard_owner"


class _Owner:
    """Owns a unit that no engine owns yet; a pickled parameter leaves it behind."""

    __slots__ = ("unit",)

    def __init__(self, unit: Unit) -> None:
        self.unit = unit

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def keep_until_engine(unit: Unit, keeper: Keeper) -> None:
    """Let the parameters own their unit: there is data as long as there is a parameter of it."""
    owner = _Owner(unit)
    unit.keeper = keeper
    for member in unit.members:
        setattr(member.param, _OWNER, owner)


def disown(param: Tensor) -> None:
    """Let a parameter keep its unit no more."""
    if hasattr(param, _OWNER):
        delattr(param, _OWNER)


def is_waiting(param: Tensor) -> bool:
    """Whether a parameter lives in shards but no engine manages it yet."""
    return vars(param).get(_OWNER) is not None


def full_shape(param: Tensor) -> torch.Size:
    """The shape of a parameter, whether it is full or freed."""
    slot = slot_of(param)
    return param.shape if slot is None else slot.unit.shapes[slot.index]


def full_nbytes(param: Tensor) -> int:
    """Bytes of a parameter when it is full."""
    return full_shape(param).numel() * param.dtype.itemsize
