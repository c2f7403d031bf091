"""Values reach the ranks they belong to, whatever the pieces in which they travel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from forked import run_ranks
from zeroshard.core import values
from zeroshard.core.layout import Layout, Range
from zeroshard.core.mesh import default_mesh

CPU = torch.device("cpu")
SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=5)


def flat_of(params: list[Tensor], layout: Layout) -> Tensor:
    flat = torch.zeros(layout.full_numel)
    for index, param in enumerate(params):
        flat[layout.full(index).slice()] = param.reshape(-1)
    return flat


@given(SIZES, st.integers(1, 4), st.integers(1, 4), st.data())
def test_a_part_of_a_flat_buffer_is_put_together_from_any_pieces(
    sizes: list[int], world: int, align: int, data: st.DataObject
) -> None:
    layout = Layout(tuple(sizes), world, align)
    params = [torch.arange(1.0, size + 1) + 100 * i for i, size in enumerate(sizes)]
    bounds = st.integers(0, layout.full_numel)
    start, stop = sorted((data.draw(bounds), data.draw(bounds)))
    part = torch.zeros(stop - start)
    for index, param in enumerate(params):
        cut = data.draw(st.integers(0, param.numel()))
        for at, piece in ((0, param[:cut]), (cut, param[cut:])):
            values.put(part, Range(start, stop), layout, index, piece, at)
    assert torch.equal(part, flat_of(params, layout)[start:stop])


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("piece_bytes", [1, 64, 1 << 20])
def test_every_rank_is_dealt_its_shard_and_can_see_all_of_them(
    monkeypatch: pytest.MonkeyPatch, world: int, piece_bytes: int
) -> None:
    monkeypatch.setattr(values, "_PIECE_BYTES", piece_bytes)

    def work(rank: int, world: int) -> None:
        mesh = default_mesh(CPU)
        params = [torch.arange(6.0).view(2, 3).t() + 1, torch.tensor(7.0), torch.arange(11.0)]
        layout = Layout((6, 1, 11), world, align=4)
        want = flat_of(params, layout)
        shard = want.new_empty(layout.shard_numel)
        given = params if rank == 0 else [torch.zeros_like(param) for param in params]
        values.deal(given, layout, shard, mesh)
        assert torch.equal(shard, want[layout.shard(rank).slice()])
        seen = torch.zeros_like(want)
        for part, row in values.pass_round(shard, layout, mesh):
            seen[part.slice()] += row
        assert torch.equal(seen, want)

    run_ranks(work, world)
