"""Which units are pulled, from what a few gathers of either kind have cost."""

from __future__ import annotations

import time
import weakref
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch

from forked import run_ranks
from zeroshard.core import trial
from zeroshard.core.collectives import DONE
from zeroshard.core.mesh import Mesh, build_mesh
from zeroshard.core.pulled import HostCopies, Slab, UnavailableError, map_slab
from zeroshard.core.trial import Cost, Costs, Issue, least_bytes, tried

MIB = 1 << 20


def choose(sizes: list[int], pulls: dict[int, Cost]) -> tuple[int | None, list[int]]:
    """What is chosen where a collective costs 10 and 1, and the sizes that were tried for it."""
    asked: list[int] = []

    def pull(size: int) -> Cost:
        asked.append(size)
        return pulls.get(size, Cost(9.0, 0.5))

    return tried(sizes, lambda size: Cost(10.0, 1.0), pull), asked


def test_a_pull_must_cost_less_time_of_its_own_and_no_more_of_the_computation() -> None:
    assert Cost(1.0, 1.0).is_below(Cost(2.0, 1.0))
    assert not Cost(1.0, 1.1).is_below(Cost(2.0, 1.0))
    assert not Cost(2.0, 0.0).is_below(Cost(2.0, 1.0))


def test_units_are_pulled_from_the_least_size_on_that_still_won() -> None:
    sizes = [8 * MIB, 2 * MIB, 4 * MIB, 8 * MIB, 4 * MIB]
    assert choose(sizes, {}) == (0, [8 * MIB, 4 * MIB, 2 * MIB])
    assert choose(sizes, {2 * MIB: Cost(11.0, 0.0)})[0] == 4 * MIB
    least, asked = choose(sizes, {8 * MIB: Cost(9.0, 2.0)})
    assert (least, asked) == (None, [8 * MIB])


def test_of_many_sizes_four_are_tried_and_those_that_are_too_small_follow_the_rest() -> None:
    sizes = [MIB * number for number in range(1, 31)]
    least, asked = choose([*sizes, 100], {})
    assert least == 0
    assert len(asked) == 4 and asked[0] == 30 * MIB and asked[-1] == MIB


@pytest.mark.parametrize("sizes", [[], [MIB - 1, 5]])
def test_tiny_units_are_not_tried_and_not_pulled(sizes: list[int]) -> None:
    assert choose(sizes, {}) == (None, [])


def test_all_ranks_see_the_costs_of_the_slowest_and_choose_alike() -> None:
    """The time that a matrix product takes alone differs among them, too."""

    def work(rank: int, world: int) -> tuple[list[Cost], int | None]:
        def elapsed(issue: Issue | None, count: int, products: int) -> tuple[float, float]:
            gather_s = 0.0 if issue is None else (2 + rank) * 1e-4
            lost_s = 0.0 if issue is None else (world - rank) * 1e-5
            return count * gather_s, products * (2 + rank % 2) * 1e-4 + count * lost_s

        costs = Costs(elapsed, build_mesh(world, torch.device("cpu")))
        seen: list[Cost] = []

        def cost(size: int) -> Cost:
            seen.append(costs.of(lambda: DONE))
            return seen[-1]

        return seen, tried([4 * MIB, 2 * MIB], lambda size: Cost(1.0, 2.5e-5), cost)

    first, *others = run_ranks(work, 3)
    assert first[0][0].gather_s == pytest.approx(4e-4)
    # Rank 1 has the slowest products, whose own loss is 2e-5.
    assert first[0][0].lost_s == pytest.approx(2e-5)
    assert first[1] == 0 and len(first[0]) == 2
    assert others == [first, first]


class Clock:
    """Stands in for an event of a GPU's."""

    def __init__(self, **_: object) -> None:
        self.time_s = 0.0

    def record(self) -> None:
        self.time_s = time.perf_counter()

    def elapsed_time(self, end: Clock) -> float:
        return (end.time_s - self.time_s) * 1e3


GPU: dict[str, Any] = {
    "Event": Clock,
    "Stream": mock.MagicMock(),
    "stream": lambda stream: nullcontext(),
    "current_stream": lambda device: None,
    "synchronize": lambda device: None,
    "empty_cache": lambda: None,
    "_sleep": lambda cycles: None,
}


@pytest.mark.parametrize("fails", [False, True])
def test_a_trial_ends_on_all_ranks_alike_and_leaves_no_memory_behind(fails: bool) -> None:
    """Where one of them cannot read the others' memory nobody waits for it."""

    def work(rank: int, world: int) -> tuple[int | None, str, bool]:
        slabs: list[weakref.ref[Slab]] = []

        def watched(nbytes: int, mesh: Mesh) -> Slab:
            slab = map_slab(nbytes, mesh)
            slabs.append(weakref.ref(slab))
            return slab

        def refuse(*_: object, **__: object) -> None:
            raise RuntimeError("refused")

        copy = refuse if fails and rank == 1 else HostCopies.__call__
        least, error = None, ""
        with (
            mock.patch.multiple(torch.cuda, **GPU),
            mock.patch.multiple(trial, _SIDE=16, _LEAST_BYTES=1, _TRIAL_S=1e-4, map_slab=watched),
            mock.patch.object(HostCopies, "__call__", copy),
        ):
            try:
                least = least_bytes([4096, 1 << 16], build_mesh(world, torch.device("cpu")))
            except UnavailableError as reason:
                error = str(reason)
        return least, error, slabs[0]() is None

    first, *others = run_ranks(work, 2)
    assert others == [first]
    least, error, is_gone = first
    assert is_gone
    assert error == ("rank 1: refused" if fails else "")
    assert least in ({None} if fails else {None, 0, 1 << 16})
