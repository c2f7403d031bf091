"""Shards tile the flat buffer, slices tile the parameters: integer properties of the cut."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from zeroshard.core.layout import Layout, Range

NUMELS = st.one_of(st.sampled_from((0, 1, 2, 7, 16, 31, 97)), st.integers(0, 300))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    return Layout(
        numels=tuple(draw(st.lists(NUMELS, max_size=7))),
        world=draw(st.integers(1, 9)),
        align=draw(st.sampled_from((1, 2, 4, 8))),
    )


def elements(*ranges: Range) -> list[int]:
    return [element for part in ranges for element in range(part.start, part.stop)]


@given(layouts())
@example(Layout((), 3, 4))
@example(Layout((0, 0), 2, 4))
def test_shards_tile_the_buffer_in_equal_parts(layout: Layout) -> None:
    shards = [layout.shard(rank) for rank in range(layout.world)]
    assert elements(*shards) == list(range(layout.full_numel))
    assert {shard.numel for shard in shards} == {layout.shard_numel}


@given(layouts())
def test_slices_of_all_ranks_tile_each_parameter_in_order(layout: Layout) -> None:
    for index, numel in enumerate(layout.numels):
        owned = [layout.owned(index, rank) for rank in range(layout.world)]
        assert elements(*owned) == list(range(numel))


@given(layouts())
def test_a_slice_and_what_it_is_a_slice_of_name_the_same_elements_of_the_buffer(
    layout: Layout,
) -> None:
    for rank in range(layout.world):
        shard = layout.shard(rank)
        for index in range(len(layout.numels)):
            full, owned = layout.full(index), layout.owned(index, rank)
            mine = layout.slice_of(index, rank)
            assert 0 <= mine.start <= mine.stop <= layout.shard_numel
            assert [shard.start + at for at in elements(mine)] == [
                full.start + at for at in elements(owned)
            ]


@given(layouts())
def test_parameters_lie_in_order_and_overlap_neither_each_other_nor_the_end(
    layout: Layout,
) -> None:
    ranges = [layout.full(index) for index in range(len(layout.numels))]
    assert [part.numel for part in ranges] == list(layout.numels)
    ends = [0, *(part.stop for part in ranges)]
    starts = [*(part.start for part in ranges), layout.full_numel]
    assert all(end <= start for end, start in zip(ends, starts, strict=True))


@given(layouts())
def test_gaps_are_exactly_what_belongs_to_no_parameter(layout: Layout) -> None:
    used = set(elements(*(layout.full(index) for index in range(len(layout.numels)))))
    gaps = elements(*layout.gaps())
    assert gaps == [at for at in range(layout.full_numel) if at not in used]
    assert all(gap.numel > 0 for gap in layout.gaps())


@given(layouts())
@example(Layout((3, 0, 5), 2, 4))
@example(Layout((0,), 1, 1))
def test_the_cuts_of_a_shard_cover_it_and_agree_with_the_slices(layout: Layout) -> None:
    for rank in range(layout.world):
        sizes, at = layout.cuts(rank)
        assert sum(sizes) == layout.shard_numel
        assert all(size >= 0 for size in sizes)
        assert len(at) == len(layout.numels)
        for index in range(len(layout.numels)):
            start = sum(sizes[: at[index]])
            mine = layout.slice_of(index, rank)
            assert sizes[at[index]] == mine.numel
            assert not mine.numel or start == mine.start


@given(layouts())
def test_parameters_and_shards_start_at_aligned_places(layout: Layout) -> None:
    starts = [*layout.offsets, *(layout.shard(rank).start for rank in range(layout.world))]
    assert all(start % layout.align == 0 for start in starts)
    assert layout.shard_numel % layout.align == 0


@given(layouts())
def test_no_more_is_padded_than_the_alignment_asks_for(layout: Layout) -> None:
    ends = [0, *(layout.full(index).stop for index in range(len(layout.numels)))]
    for end, start in zip(ends, layout.offsets, strict=False):
        assert start - end < layout.align
    smaller = layout.shard_numel - layout.align
    assert smaller == 0 or smaller * layout.world < ends[-1]


def test_a_scalar_belongs_to_one_rank() -> None:
    layout = Layout((1,), 4)
    assert [layout.owned(0, rank).numel for rank in range(4)] == [1, 0, 0, 0]
    assert layout.full_numel == 4


def test_a_prime_size_leaves_the_last_rank_less() -> None:
    layout = Layout((97,), 4)
    assert [layout.owned(0, rank).numel for rank in range(4)] == [25, 25, 25, 22]


def test_a_parameter_larger_than_a_shard_is_owned_by_several_ranks() -> None:
    layout = Layout((2, 10, 2), 4, align=1)
    assert [layout.owned(1, rank) for rank in range(4)] == [
        Range(0, 2),
        Range(2, 6),
        Range(6, 10),
        Range(10, 10),
    ]


def test_parameters_without_elements_still_get_a_buffer_to_communicate() -> None:
    layout = Layout((0, 0), 3, align=4)
    assert (layout.shard_numel, layout.full_numel) == (4, 12)
    assert layout.gaps() == [Range(0, 12)]


@pytest.mark.parametrize(("world", "align"), [(0, 1), (1, 0)])
def test_a_layout_needs_a_positive_world_and_alignment(world: int, align: int) -> None:
    with pytest.raises(AssertionError, match="positive world and alignment"):
        Layout((1,), world, align)
