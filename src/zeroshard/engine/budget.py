"""How many blocks keep their activations: arithmetic, apart from what is measured and done.

A block that keeps its activations is not computed again in backward. What it would hold was counted
in calls that did not keep it, so the sizes here are those of earlier calls, scaled to the next one.

Bytes of a call are taken to grow linearly with the number of samples and at most quadratically with
the length of one, as those of attention do that writes its scores to memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from zeroshard.core import tree

__all__ = [
    "GIB",
    "Overhead",
    "Plan",
    "Seen",
    "Shape",
    "bound",
    "choose",
    "factor",
    "in_words",
    "overhead",
    "scaled",
    "shape_of",
    "tensors_in",
]

GIB = 2**30
_MIB = 2**20

Shape = tuple[tuple[int, int], ...]
"""Of each tensor with numbers in it among the arguments: its elements, and those of one sample."""

# What is known of a call says nothing about one that is larger by more than this.
_REACH = 1.25


@dataclass(frozen=True, slots=True)
class Seen:
    """What one call of a block was counted to hold from forward to backward, in bytes.

    ``saved`` is what it computed itself, ``given`` its inputs that take a gradient; a call that is
    computed again holds these alone.
    """

    shape: Shape
    saved: int
    given: int


@dataclass(frozen=True, slots=True)
class Overhead:
    """The most bytes that a step took beside what stays between steps and what blocks kept."""

    shape: Shape
    nbytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Which calls of blocks keep their activations: those from number ``first_kept`` on."""

    first_kept: int
    num_calls: int
    kept_bytes: int


def shape_of(values: Iterable[object]) -> Shape:
    """The sizes of arguments that decide how much a block computes."""
    shape: list[tuple[int, int]] = []
    for tensor in tensors_in(values):
        sizes = tensor.shape
        if len(sizes) > 1 and tensor.is_floating_point():
            numel = sizes.numel()
            shape.append((numel, numel // (sizes[0] or 1)))
    return tuple(shape)


def tensors_in(values: Iterable[object]) -> list[Tensor]:
    """The tensors among arguments, and inside containers among them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif value is not None and not isinstance(value, (bool, int, float, str)):
            found += tree.find(value).tensors
    return found


def factor(shape: Shape, seen: Shape) -> float | None:
    """By what the bytes of a call are multiplied to bound those of another one.

    Args:
        shape: of the call that is asked about.
        seen: of the call whose bytes are known.

    Returns:
        A number; None if the calls cannot be compared or the other one is much larger.
    """
    if len(shape) != len(seen):
        return None
    amount = length = 0.0
    for (numel, sample), (seen_numel, seen_sample) in zip(shape, seen, strict=True):
        amount = max(amount, _ratio(numel, seen_numel))
        length = max(length, _ratio(sample, seen_sample))
    if not shape:
        amount = 1.0
    return None if max(amount, length) > _REACH else amount * max(1.0, length)


def _ratio(part: int, whole: int) -> float:
    if whole:
        return part / whole
    return math.inf if part else 0.0


def scaled(shape: Shape, before: Shape, now: Shape) -> Shape:
    """What a later call of a pass is expected to get, where the first one changes like this."""
    if not before or not now:
        return shape
    (numel, sample), (new_numel, new_sample) = before[0], now[0]
    return tuple(
        (-(-each * new_numel // max(numel, 1)), -(-length * new_sample // max(sample, 1)))
        for each, length in shape
    )


def bound(shape: Shape, seen: Iterable[Seen]) -> Seen | None:
    """The least bound that earlier calls give on what a call of this shape holds, if any does."""
    best: Seen | None = None
    for each in seen:
        by = factor(shape, each.shape)
        if by is None:
            continue
        saved = math.ceil(each.saved * by)
        if best is None or saved < best.saved:
            best = Seen(shape, saved, math.ceil(each.given * by))
    return best


def overhead(shape: Shape, known: Iterable[Overhead]) -> int | None:
    """The least bound that earlier steps give on the overhead of one with such a pass, if any does.

    A smaller pass is taken to have all of it: part of it does not depend on the batch.
    """
    bounds = [
        math.ceil(each.nbytes * max(1.0, by))
        for each in known
        if (by := factor(shape, each.shape)) is not None
    ]
    return min(bounds, default=None)


def choose(sizes: Sequence[int | None], room: int) -> Plan:
    """Keep the activations of the last calls, as many as there is room for.

    What the last calls keep is released first in backward: by the time the others are computed
    again, with one block's activations beside what is kept, the kept ones are gone.

    Args:
        sizes: bytes that each call of a pass would keep, in the order of calls; None if unknown.
        room: bytes that all of them together may keep.
    """
    first, kept = len(sizes), 0
    while first:
        size = sizes[first - 1]
        if size is None or kept + size > room:
            break
        first, kept = first - 1, kept + size
    return Plan(first, len(sizes), kept)


def in_words(nbytes: int) -> str:
    """A number of bytes for people."""
    unit, name = (GIB, "GiB") if nbytes >= GIB // 10 else (_MIB, "MiB")
    return f"{nbytes / unit:.1f} {name}"
