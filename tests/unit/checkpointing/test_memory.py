"""Tensors as flat memory, and places in one buffer."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zeroshard.checkpointing.memory import Shape, Slots


@st.composite
def views(draw: st.DrawFn) -> Tensor:
    """Tensors with permuted dims, dims of size 1 and 0, gaps, offsets and repeated elements."""
    sizes = draw(st.lists(st.integers(0, 4), min_size=0, max_size=4))
    tensor = torch.arange(float(torch.Size(sizes).numel())).view(sizes)
    tensor = tensor.permute(draw(st.permutations(range(len(sizes)))))
    for dim in range(tensor.dim()):
        start, step = draw(st.integers(0, 1)), draw(st.integers(1, 2))
        index = [slice(None)] * dim + [slice(start, None, step)]
        if draw(st.booleans()):
            tensor = tensor[tuple(index)]
    return tensor.expand(draw(st.integers(1, 2)), *tensor.shape)


@given(views())
def test_flat_memory_becomes_the_same_tensor_again(tensor: Tensor) -> None:
    flat, shape = Shape.flatten(tensor)
    assert flat.shape == (tensor.numel(),) and flat.is_contiguous()
    again = shape.unflatten(flat.clone())
    assert torch.equal(again, tensor)
    # Kernels may differ by layout, so a layout without gaps is kept.
    if torch.empty_like(tensor).stride() == tensor.stride():
        assert again.stride() == tensor.stride()
        assert flat.data_ptr() == tensor.data_ptr()


def addresses(slots: Slots, count: int, like: Tensor) -> tuple[list[int], list[Tensor]]:
    copies = [slots.empty(like.numel(), like) for _ in range(count)]
    return [copy.data_ptr() for copy in copies], copies


def test_copies_lie_side_by_side_as_long_as_there_are_places() -> None:
    like = torch.empty(8)
    found, _copies = addresses(Slots(3, on_host=False), 5, like)
    assert max(found[:3]) - min(found[:3]) == 2 * like.nbytes
    assert len({copy.untyped_storage().data_ptr() for copy in _copies}) == 3
    assert len(set(found)) == 5


def test_a_place_is_free_again_when_its_copy_is_gone() -> None:
    like, slots = torch.empty(8), Slots(3, on_host=False)
    first, copies = addresses(slots, 3, like)
    del copies
    second, kept = addresses(slots, 2, like)
    assert set(second) < set(first)
    third, _ = addresses(slots, 1, like)
    assert set(third) == set(first) - {copy.data_ptr() for copy in kept}


def test_sizes_and_dtypes_have_buffers_of_their_own() -> None:
    slots = Slots(2, on_host=False)
    kinds = [torch.empty(8), torch.empty(9), torch.empty(8, dtype=torch.bfloat16)]
    copies = [slots.empty(like.numel(), like) for like in kinds * 2]
    assert [copy.dtype for copy in copies] == [like.dtype for like in kinds * 2]
    assert [copy.numel() for copy in copies] == [8, 9, 8] * 2
    assert len({copy.untyped_storage().data_ptr() for copy in copies}) == 3


@pytest.mark.parametrize("places", [0, 4])
def test_the_buffer_of_a_size_that_is_no_longer_used_is_given_back(places: int) -> None:
    slots = Slots(places, on_host=True)
    for numel in range(100, 120):
        copy = slots.empty(numel, torch.empty(0))
        storage = copy.untyped_storage()
        del copy
    gc.collect()
    assert storage.nbytes() == max(places, 1) * 4 * 119
    assert len(slots._free) == 1


def test_a_copy_that_is_alive_keeps_its_content_when_other_sizes_come() -> None:
    slots = Slots(2, on_host=False)
    copy = slots.empty(8, torch.empty(0)).fill_(1)
    others = [slots.empty(numel, torch.empty(0)).fill_(2) for numel in (4, 8, 8, 16)]
    assert copy.eq(1).all() and all(other.eq(2).all() for other in others)
