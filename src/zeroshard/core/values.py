"""Where the values of a unit come from when it is built, brought to the part that a rank wants.

Full parameters of rank 0 are dealt out, and shards of other units are passed round, a piece at a
time: what is under way is bounded, whatever the size of a unit, and no rank needs a second copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from zeroshard.core.collectives import Answered, all_gather, scatter_
from zeroshard.core.layout import Layout, Range
from zeroshard.core.mesh import Mesh

__all__ = ["deal", "pass_round", "put"]

# Of all ranks together. A backend may hold several times as much: gloo copies what it gathers.
_PIECE_BYTES = 8 * 2**20


def _pieces(mesh: Mesh, layout: Layout, dtype: torch.dtype) -> Iterator[Range]:
    """Ranges that cover a shard, such that those of all ranks are one piece."""
    most = max(1, _PIECE_BYTES // (mesh.shard.size * dtype.itemsize))
    for start in range(0, layout.shard_numel, most):
        yield Range(start, min(start + most, layout.shard_numel))


def _part(layout: Layout, rank: int, piece: Range) -> Range:
    """The part of the flat buffer that a piece of a rank's shard is."""
    start = layout.shard(rank).start
    return Range(start + piece.start, start + piece.stop)


def put(into: Tensor, part: Range, layout: Layout, index: int, values: Tensor, at: int) -> None:
    """Copy what belongs there of some values of a parameter into a part of its flat buffer.

    Args:
        into: the part.
        part: which part it is.
        layout: of the flat buffer.
        index: the parameter.
        values: a flat tensor.
        at: where the values begin, in elements of the parameter.
    """
    wanted = layout.within(index, part)
    start, stop = max(wanted.start, at), min(wanted.stop, at + values.numel())
    if start < stop:
        offset = layout.full(index).start - part.start
        into[start + offset : stop + offset].copy_(values[start - at : stop - at])


def deal(params: Sequence[Tensor | None], layout: Layout, out: Tensor, mesh: Mesh) -> None:
    """Fill ``out`` with this rank's shard of rank 0's parameters, zeros for None. A collective."""
    flats = [None if param is None else param.reshape(-1) for param in params]
    outbox: Tensor | None = None
    for piece in _pieces(mesh, layout, out.dtype):
        rows = None
        if mesh.rank == 0:
            # One memory for all pieces: a backend may hold on to what it has sent for a while.
            outbox = out.new_empty(mesh.shard.size, piece.numel) if outbox is None else outbox
            rows = outbox[:, : piece.numel].zero_()
            for rank, row in enumerate(rows):
                for index, flat in enumerate(flats):
                    if flat is not None:
                        put(row, _part(layout, rank, piece), layout, index, flat, 0)
        with Answered(mesh.rank, "its part of rank 0's parameters"):
            scatter_(out[piece.slice()], rows, mesh)


def pass_round(shard: Tensor, layout: Layout, mesh: Mesh) -> Iterator[tuple[Range, Tensor]]:
    """Yield all parts of a flat buffer with their values, on every rank. A collective.

    The shard may be in host memory; parts of other ranks are on the device.
    """
    size = mesh.shard.size
    if size == 1:
        yield layout.shard(0), shard
        return
    for piece in _pieces(mesh, layout, shard.dtype):
        mine = shard[piece.slice()].to(mesh.device)
        rows = mine.new_empty(size * piece.numel)
        with Answered(mesh.rank, "the other ranks' parts of a parameter"):
            all_gather(rows, mine, mesh.shard).wait()
        for rank, row in enumerate(rows.view(size, -1)):
            yield _part(layout, rank, piece), row
