"""How many blocks keep their activations: arithmetic."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zeroshard.engine.budget import (
    Overhead,
    Seen,
    Shape,
    bound,
    choose,
    factor,
    overhead,
    scaled,
    shape_of,
)

SIZES = st.lists(st.none() | st.integers(0, 1000), max_size=12)
LENGTHS = st.tuples(st.integers(1, 64), st.integers(1, 512))


def hidden(samples: int, length: int) -> Shape:
    return ((samples * length * 8, length * 8),)


def attention_bytes(samples: int, length: int) -> int:
    """A block that writes its attention scores to memory."""
    return samples * (100 * length + 3 * length * length)


@given(SIZES, st.integers(-10, 5000))
def test_kept_calls_are_the_last_ones_and_never_take_more_than_the_room(
    sizes: list[int | None], room: int
) -> None:
    plan = choose(sizes, room)
    assert 0 <= plan.first_kept <= plan.num_calls == len(sizes)
    kept = sizes[plan.first_kept :]
    assert None not in kept
    assert plan.kept_bytes == sum(size for size in kept if size is not None) <= max(room, 0)


@given(SIZES, st.integers(0, 5000), st.integers(0, 500))
def test_more_room_never_keeps_fewer_calls_and_no_room_is_left_for_one_more(
    sizes: list[int | None], room: int, more: int
) -> None:
    plan = choose(sizes, room)
    assert choose(sizes, room + more).first_kept <= plan.first_kept
    if plan.first_kept:
        next_size = sizes[plan.first_kept - 1]
        assert next_size is None or plan.kept_bytes + next_size > room


@given(LENGTHS, LENGTHS)
def test_what_is_known_of_one_call_bounds_another_unless_that_is_much_larger(
    known: tuple[int, int], asked: tuple[int, int]
) -> None:
    seen = Seen(hidden(*known), attention_bytes(*known), 0)
    found = bound(hidden(*asked), [seen])
    (samples, length), (new_samples, new_length) = known, asked
    is_reached = new_length <= 1.25 * length and new_samples * new_length <= 1.25 * samples * length
    assert (found is not None) == is_reached
    assert found is None or found.saved >= attention_bytes(*asked)


def test_the_tightest_of_several_bounds_is_taken() -> None:
    seen = [Seen(hidden(8, 64), 8000, 80), Seen(hidden(4, 64), 3000, 30)]
    assert bound(hidden(4, 64), seen) == Seen(hidden(4, 64), 3000, 30)
    assert bound(hidden(2, 64), seen) == Seen(hidden(2, 64), 1500, 15)
    assert bound(hidden(8, 64), seen) == Seen(hidden(8, 64), 8000, 80)
    assert bound(hidden(16, 64), seen) is None


def test_calls_with_other_arguments_cannot_be_compared() -> None:
    assert factor(((8, 4), (8, 4)), ((8, 4),)) is None
    assert factor((), ()) == 1
    assert factor(((0, 0),), ((0, 0),)) == 0
    assert factor(((1, 1),), ((0, 0),)) is None


def test_a_second_input_counts_as_much_as_the_first() -> None:
    seen = ((80, 40), (1000, 500))
    assert factor(((80, 40), (500, 250)), seen) == 1
    assert factor(((800, 400), (1000, 500)), seen) is None


def test_overheads_hold_for_smaller_passes_undiminished() -> None:
    known = [Overhead(hidden(8, 64), 1000), Overhead(hidden(4, 64), 700)]
    assert overhead(hidden(1, 64), known) == 700
    assert overhead(hidden(8, 64), known) == 1000
    assert overhead(hidden(9, 64), known) == 1125
    assert overhead(hidden(32, 64), known) is None


def test_later_calls_are_expected_to_grow_like_the_first() -> None:
    before, now = hidden(4, 10), hidden(2, 30)
    assert scaled(hidden(4, 10), before, now) == now
    assert scaled(hidden(4, 20), before, now) == hidden(2, 60)
    assert scaled((), before, now) == ()


def test_the_shape_of_a_call_is_that_of_numbers_in_tensors_wherever_they_are() -> None:
    h, mask, scale = torch.zeros(2, 3, 4), torch.zeros(2, 1, 3, 3), torch.zeros(())
    ids, vector = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(5)
    values = [h, ids, None, 3, "x", {"mask": mask, "deep": [(scale, vector)]}]
    assert shape_of(values) == ((24, 12), (18, 9))
    assert shape_of([SimpleNamespace(hidden=h)]) == ()


@pytest.mark.parametrize("room", [0, 99, 100, 250, 10_000])
def test_blocks_of_one_size_keep_as_many_as_fit(room: int) -> None:
    assert choose([100] * 8, room).first_kept == 8 - min(room // 100, 8)
