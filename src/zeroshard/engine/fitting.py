"""What stays on the device and what leaves it: arithmetic, apart from what is measured and done.

Sizes are bytes on one rank, the same on every rank. A *run* is the parameters of one unit, in the
order in which they lie there, and runs are in the order in which forward uses them. What stays is
what is needed first: its gradients are the last to arrive in backward, and its new weights the
first to be read, so of all state it has the least time to come and go.

A unit is uniform in where its state is. So at most one of the runs is cut in two, between two
parameters, which makes two units of it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from zeroshard.engine.budget import in_words
from zeroshard.errors import ConfigError, compose

__all__ = [
    "Demand",
    "Spare",
    "Stay",
    "keep_by_budget",
    "keep_by_ratio",
    "keep_first",
    "promote",
    "spend",
]


def keep_by_ratio(runs: Sequence[Sequence[int]], ratio: float) -> list[int]:
    """How many parameters of each run keep their state, from the first one on.

    Args:
        runs: bytes of state of each parameter.
        ratio: the part of all bytes that leaves, from 0 to 1. It is met within half of the state of
            the parameter at which the line is drawn.
    """
    sizes = [size for run in runs for size in run]
    ends = [0, *accumulate(sizes)]
    wanted = (1 - ratio) * ends[-1]
    above = min(bisect_left(ends, wanted), len(sizes))
    below = max(above - 1, 0)
    left = below if wanted - ends[below] < ends[above] - wanted else above
    kept: list[int] = []
    for run in runs:
        kept.append(min(left, len(run)))
        left -= kept[-1]
    return kept


def keep_by_budget(runs: Sequence[Sequence[int]], room: int) -> list[int]:
    """How many parameters of each run keep their state in so many bytes, from the first one on.

    The first run that does not fit is cut; of those after it, the ones that fit as a whole stay.
    More room never keeps fewer bytes.
    """
    kept: list[int] = []
    is_cut = False
    for run in runs:
        ends = list(accumulate(run))
        count = len(run)
        if ends and ends[-1] > room:
            count = 0 if is_cut else sum(end <= room for end in ends)
            is_cut = True
        room -= ends[count - 1] if count else 0
        kept.append(count)
    return kept


def keep_first(sizes: Sequence[int], room: int) -> list[bool]:
    """Which of several things stay, the first ones that fit, and of those after them what fits."""
    return [bool(count) for count in keep_by_budget([[size] for size in sizes], room)]


@dataclass(frozen=True, slots=True)
class Demand:
    """What training takes on one device between two steps."""

    state: Sequence[Sequence[int]]
    """Bytes of master weights and averages of each parameter, by runs."""

    shards: Sequence[int] = ()
    """Bytes of the shards of parameters that may leave, too, by units."""

    parameters: int = 0
    """Bytes of parameters that cannot leave: full ones, and shards that are to stay."""

    gradients: int = 0
    buffers: int = 0
    """Bytes of the buffers through which state passes, if any of it leaves."""


@dataclass(frozen=True, slots=True)
class Stay:
    """What stays on the device."""

    state: Sequence[int]
    """How many parameters of each run keep their state, from the first one on."""

    shards: Sequence[bool]
    """Which units keep their shards."""


def spend(demand: Demand, budget: int) -> Stay:
    """What stays on the device within a budget: optimizer state leaves first, shards only after it.

    Raises:
        ConfigError: what cannot leave takes more than the budget.
    """
    state = sum(size for run in demand.state for size in run)
    shards = sum(demand.shards)
    everything = [len(run) for run in demand.state]
    room = budget - demand.parameters - demand.gradients
    if state + shards <= room:
        return Stay(everything, [True] * len(demand.shards))
    room -= demand.buffers
    if shards <= room:
        return Stay(keep_by_budget(demand.state, room - shards), [True] * len(demand.shards))
    if room >= 0:
        return Stay([0] * len(everything), keep_first(demand.shards, room))
    kinds = {
        "parameters": demand.parameters,
        "gradients": demand.gradients,
        "buffers for what leaves": demand.buffers,
    }
    listed = ", ".join(f"{kind} {in_words(size)}" for kind, size in kinds.items() if size)
    raise ConfigError(
        compose(
            f"zeroshard.gpu_budget is {in_words(budget)}, but what has to be on the device takes "
            f"{in_words(budget - room)}: {listed}.",
            hint="raise the budget, train on more GPUs, which makes smaller shards, or at stage 3 "
            'let shards of parameters leave, too: "offload_param": {"device": "cpu"}.',
        )
    )


@dataclass(frozen=True, slots=True)
class Spare:
    """What is free on the device while state passes through it."""

    free: int
    """Bytes that no step so far has needed, on any rank."""

    buffers: int
    """Bytes of the buffers, which nobody needs once all of the state is back."""


def promote(sizes: Sequence[int], spare: Spare) -> list[int]:
    """Which units get their state back on the device, once it is known how much is free there.

    Args:
        sizes: bytes of the state of each unit that is off the device, in the order of use.
        spare: what there is for it.

    Returns:
        Numbers of units, in order.
    """
    if sum(sizes) <= spare.free + spare.buffers:
        return list(range(len(sizes)))
    stays = keep_first(sizes, spare.free)
    return [number for number, stay in enumerate(stays) if stay]
