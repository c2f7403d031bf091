"""What stays on the device: how much of it, in which order, and never more than there is room."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeroshard.engine.fitting import (
    Demand,
    Spare,
    Stay,
    keep_by_budget,
    keep_by_ratio,
    keep_first,
    promote,
    spend,
)
from zeroshard.errors import ConfigError

SIZES = st.integers(0, 50)
RUNS = st.lists(st.lists(SIZES, max_size=5), max_size=6)
RATIOS = st.floats(0, 1)
ROOMS = st.integers(0, 400)


def total(runs: list[list[int]]) -> int:
    return sum(map(sum, runs))


def stays(runs: list[list[int]], kept: list[int]) -> int:
    """Bytes of what is kept; the first ones of each run are."""
    assert len(kept) == len(runs)
    assert all(0 <= count <= len(run) for count, run in zip(kept, runs, strict=True))
    return sum(sum(run[:count]) for run, count in zip(runs, kept, strict=True))


def is_cut(run: list[int], count: int) -> bool:
    return 0 < count < len(run)


@given(RUNS, RATIOS)
def test_a_ratio_is_met_within_half_of_the_largest_parameter(
    runs: list[list[int]], ratio: float
) -> None:
    leaves = total(runs) - stays(runs, keep_by_ratio(runs, ratio))
    largest = max((size for run in runs for size in run), default=0)
    assert abs(leaves - ratio * total(runs)) <= largest / 2 + 1e-9


@given(RUNS)
def test_a_ratio_of_one_moves_everything_and_of_zero_nothing(runs: list[list[int]]) -> None:
    assert stays(runs, keep_by_ratio(runs, 1)) == 0
    assert stays(runs, keep_by_ratio(runs, 0)) == total(runs)


@given(RUNS, RATIOS, RATIOS)
def test_a_larger_ratio_never_keeps_more(runs: list[list[int]], one: float, two: float) -> None:
    less, more = sorted((one, two))
    assert stays(runs, keep_by_ratio(runs, less)) >= stays(runs, keep_by_ratio(runs, more))


@given(RUNS, RATIOS)
def test_by_a_ratio_the_first_ones_stay_and_one_run_is_cut(
    runs: list[list[int]], ratio: float
) -> None:
    kept = keep_by_ratio(runs, ratio)
    flags = [at < count for run, count in zip(runs, kept, strict=True) for at in range(len(run))]
    assert flags == sorted(flags, reverse=True)
    assert sum(map(is_cut, runs, kept)) <= 1


def test_a_ratio_is_exact_where_parameters_are_of_one_size() -> None:
    runs = [[10] * 4, [10] * 4, [10] * 2]
    assert keep_by_ratio(runs, 0.5) == [4, 1, 0]
    assert keep_by_ratio(runs, 0.3) == [4, 3, 0]
    assert keep_by_ratio(runs, 0.24) == [4, 4, 0]
    assert keep_by_ratio(runs, 0.06) == [4, 4, 1]


@given(RUNS, ROOMS)
def test_a_budget_is_never_exceeded_and_one_run_is_cut(runs: list[list[int]], room: int) -> None:
    kept = keep_by_budget(runs, room)
    assert stays(runs, kept) <= room
    assert sum(map(is_cut, runs, kept)) <= 1


@given(RUNS, ROOMS)
def test_a_budget_for_everything_keeps_everything(runs: list[list[int]], more: int) -> None:
    assert keep_by_budget(runs, total(runs) + more) == [len(run) for run in runs]


@given(RUNS, ROOMS, ROOMS)
def test_more_room_never_keeps_fewer_bytes(runs: list[list[int]], one: int, two: int) -> None:
    less, more = sorted((one, two))
    assert stays(runs, keep_by_budget(runs, less)) <= stays(runs, keep_by_budget(runs, more))


@given(RUNS, ROOMS)
def test_what_leaves_would_not_have_fitted_beside_what_is_before_it(
    runs: list[list[int]], room: int
) -> None:
    before = 0
    for run, count in zip(runs, keep_by_budget(runs, room), strict=True):
        before += sum(run[:count])
        if count < len(run):
            assert before + sum(run[count:]) > room


def test_after_the_run_that_is_cut_whole_ones_that_fit_stay() -> None:
    assert keep_by_budget([[4, 4], [10, 10], [30], [3, 3], [9]], 25) == [2, 1, 0, 2, 0]
    assert keep_first([5, 9, 2, 1], 8) == [True, False, True, True]


DEMAND = Demand(state=[[40, 40], [40]], shards=[10, 10], parameters=5, gradients=20, buffers=12)


@pytest.mark.parametrize(
    ("budget", "state", "shards"),
    [
        (165, [2, 1], [True, True]),  # all of it, and no buffers
        (164, [2, 0], [True, True]),
        (97, [1, 0], [True, True]),
        (96, [0, 0], [True, True]),
        (57, [0, 0], [True, True]),
        (56, [0, 0], [True, False]),
        (37, [0, 0], [False, False]),
    ],
)
def test_state_leaves_before_shards_do(budget: int, state: list[int], shards: list[bool]) -> None:
    assert spend(DEMAND, budget) == Stay(state, shards)


def test_a_budget_too_small_for_what_has_to_stay_is_refused_with_the_bytes_of_each_kind() -> None:
    gib = 2**30
    demand = Demand(state=[[gib]], parameters=6 * gib, gradients=3 * gib, buffers=gib // 2)
    with pytest.raises(ConfigError) as caught:
        spend(demand, 9 * gib)
    text = str(caught.value)
    assert "gpu_budget is 9.0 GiB, but what has to be on the device takes 9.5 GiB" in text
    assert "parameters 6.0 GiB, gradients 3.0 GiB, buffers for what leaves 0.5 GiB." in text
    assert "hint: raise the budget" in text
    assert spend(demand, 10 * gib) == Stay([1], [])


@given(st.lists(SIZES, max_size=8), ROOMS, SIZES)
def test_what_comes_back_is_in_order_and_fits_beside_the_buffers_that_are_still_used(
    sizes: list[int], free: int, buffers: int
) -> None:
    numbers = promote(sizes, Spare(free, buffers))
    assert numbers == sorted(set(numbers))
    is_everything = sum(sizes) <= free + buffers
    assert (numbers == list(range(len(sizes)))) == is_everything
    if not is_everything:
        assert sum(sizes[number] for number in numbers) <= free
