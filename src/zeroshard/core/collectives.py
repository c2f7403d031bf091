"""The only file that calls torch.distributed collectives.

[Note: streams]
A buffer is allocated and freed on the compute stream only. A collective is started from the compute
stream: it runs on its process group's own stream, after everything the compute stream was given so
far, and the compute stream goes on at once. Waiting on the returned ticket makes the compute stream
(for gloo: the host) wait for the collective. So every use of a buffer by another stream lies
between two events on the compute stream; no ``record_stream`` is needed and no block of memory can
be handed out while a collective still touches it. Gathers and reductions have process groups, and
therefore streams, of their own and overlap each other and the computation.

Gradients may be copied into the buffer that is reduced on a stream beside the computation's, from
which the reduction is started. What is copied stays alive until the reduction is waited for. The
norms of what a reduction brings are computed on a stream of their own and lie in memory of that
stream. The next use of it begins after what the compute stream was given by then, the reading of
the norms included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from zeroshard.core.attendance import roll_call
from zeroshard.core.mesh import Axis, Mesh
from zeroshard.core.ticket import DONE, Ticket
from zeroshard.errors import DistributedError, Error, compose

__all__ = [
    "DONE",
    "MEAN",
    "Answered",
    "Averaging",
    "Exchange",
    "Ticket",
    "all_gather",
    "all_reduce_",
    "broadcast_",
    "broadcast_bytes",
    "gather_bytes",
    "mean_",
    "meet",
    "reduce_mean",
    "scatter_",
]

# torch 2.13 renamed the two and warns about the old names; older versions know only those.
_gather_op: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_op: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Then:
    """A collective that something else must follow once it is waited for."""

    def __init__(self, first: Ticket, follow: Callable[[], object]) -> None:
        self._first, self._follow = first, follow

    def wait(self) -> None:
        self._first.wait()
        self._follow()


class Answered:
    """Around a collective or a wait for one: if it fails, say what this rank wanted.

    Raises:
        DistributedError: the others ended, went elsewhere, or took longer than the timeout.
    """

    __slots__ = ("_rank", "_wanted")

    def __init__(self, rank: int, wanted: str) -> None:
        self._rank, self._wanted = rank, wanted

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, Error):
            others = roll_call(self._wanted)
            raise DistributedError(
                compose(
                    f"rank {self._rank} wants {self._wanted}, and others did not answer: {error}"
                    + (f"\n{others}." if others else ""),
                    hint="look at the first error of the other ranks; a rank that left its "
                    "training loop, or waits in a collective of its own, answers no more.",
                )
            ) from error


def all_gather(full: Tensor, shard: Tensor, axis: Axis) -> Ticket:
    """Start filling ``full`` with all ranks' shards; ``shard`` may be this rank's part of it."""
    if axis.gather is None:
        if shard.data_ptr() != full.data_ptr():
            full.copy_(shard)
        return DONE
    return _gather_op(full, shard, group=axis.gather, async_op=True)


@dataclass(frozen=True, slots=True)
class Averaging:
    """How a mean over the ranks is made, which decides how it rounds and where it may overflow.

    ``before`` multiplies what goes on the wire and ``after`` the sum that comes back; their product
    is 1 / ranks. Where both are None the backend averages. ``scatter`` is false to let every rank
    receive the whole mean, of which it keeps its part.
    """

    before: float | None = None
    after: float | None = None
    scatter: bool = True


MEAN = Averaging()
"""The backend's own mean."""


def reduce_mean(out: Tensor, full: Tensor, mesh: Mesh, how: Averaging = MEAN) -> Ticket:
    """Start averaging ``full`` over all ranks, keeping this rank's shard of the result in ``out``.

    ``out`` may be this rank's part of ``full``. The content of ``full`` is undefined afterwards.
    """
    if how.before is not None:
        full.mul_(how.before)
    op = dist.ReduceOp.AVG if how.before is None and how.after is None else dist.ReduceOp.SUM
    ticket = DONE
    if mesh.shard.reduce is None:
        if out.data_ptr() != full.data_ptr():
            out.copy_(full)
    elif how.scatter:
        ticket = _scatter_op(out, full, op=op, group=mesh.shard.reduce, async_op=True)
    else:
        ticket = _Then(_all_reduce(full, mesh.shard, op), lambda: _keep_part(out, full, mesh.shard))
    if mesh.replicate.reduce is not None:
        if ticket is DONE:
            ticket = _all_reduce(out, mesh.replicate, op)
        else:
            ticket = _Then(ticket, lambda: _all_reduce(out, mesh.replicate, op).wait())
    after = how.after
    return ticket if after is None else _Then(ticket, lambda: out.mul_(after))


def meet(flag: Tensor, axis: Axis) -> Ticket:
    """Start waiting for all ranks of an axis of several, over the group of reductions.

    ``flag`` is a zero, and stays one.
    """
    return _all_reduce(flag, axis, dist.ReduceOp.SUM)


def _all_reduce(tensor: Tensor, axis: Axis, op: Any) -> Ticket:
    work = dist.all_reduce(tensor, op=op, group=axis.reduce, async_op=True)
    assert work is not None, "an asynchronous all-reduce returns its work"
    return work


def _keep_part(out: Tensor, full: Tensor, axis: Axis) -> None:
    mine = full.view(axis.size, -1)[axis.rank]
    if out.data_ptr() != mine.data_ptr():
        out.copy_(mine)


def all_reduce_(tensor: Tensor, axis: Axis, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Reduce ``tensor`` in place over an axis, in order with the computation."""
    if axis.reduce is not None:
        dist.all_reduce(tensor, op=op, group=axis.reduce)
    return tensor


def mean_(tensor: Tensor, mesh: Mesh) -> Tensor:
    """Average ``tensor`` in place over all ranks, in order with the computation."""
    for axis in (mesh.shard, mesh.replicate):
        all_reduce_(tensor, axis, dist.ReduceOp.AVG)
    return tensor


def broadcast_(tensor: Tensor, mesh: Mesh, src: int = 0) -> Tensor:
    """Overwrite ``tensor`` with the one of rank ``src``, on all ranks."""
    if not tensor.is_contiguous():
        # A backend overwrites as much memory as a dense tensor has, whoever that belongs to.
        once = tensor[tuple(slice(1) if stride == 0 else slice(None) for stride in tensor.stride())]
        once.copy_(broadcast_(once.contiguous(), mesh, src))
        return tensor
    row, column = divmod(src, mesh.shard.size)
    if mesh.shard.gather is not None:
        dist.broadcast(tensor, group_src=column, group=mesh.shard.gather)
    if mesh.replicate.gather is not None:
        dist.broadcast(tensor, group_src=row, group=mesh.replicate.gather)
    return tensor


def scatter_(out: Tensor, rows: Tensor | None, mesh: Mesh) -> Tensor:
    """Overwrite ``out`` with this rank's row of a tensor that rank 0 has, and no other rank."""
    parts = None if rows is None else list(rows)
    if mesh.shard.gather is None:
        if parts is not None:
            out.copy_(parts[0])
    elif mesh.replicate.rank == 0:
        dist.scatter(out, parts, group_src=0, group=mesh.shard.gather)
    if mesh.replicate.gather is not None:
        dist.broadcast(out, group_src=0, group=mesh.replicate.gather)
    return out


class Exchange:
    """Shows a list of integers, of a length common to all ranks, to every rank; on the host.

    Its tensors live as long as it does: a tensor whose last owner is a thread of gloo's cannot be
    freed while the interpreter shuts down, and aborts the process.
    """

    def __init__(self, mesh: Mesh, length: int) -> None:
        self._mesh = mesh
        self._mine = torch.zeros(length, dtype=torch.int64, device="cpu")
        self._all = torch.zeros(mesh.world * length, dtype=torch.int64, device="cpu")

    def __call__(self, numbers: list[int]) -> list[list[int]]:
        """Give every rank's list, in the order of ranks."""
        if self._mesh.world == 1:
            return [numbers]
        self._mine.copy_(torch.tensor(numbers, device="cpu"))
        _gather_op(self._all, self._mine, group=self._mesh.control)
        return self._all.view(self._mesh.world, -1).tolist()


def broadcast_bytes(data: bytes, mesh: Mesh, src: int = 0) -> bytes:
    """Give every rank the bytes that rank ``src`` has; on the host."""
    if mesh.world == 1:
        return data
    length = torch.tensor([len(data)], dtype=torch.int64, device="cpu")
    dist.broadcast(length, group_src=src, group=mesh.control)
    content = torch.empty(int(length), dtype=torch.uint8, device="cpu")
    if mesh.rank == src and data:
        content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if content.numel():
        dist.broadcast(content, group_src=src, group=mesh.control)
    return content.numpy().tobytes()


def gather_bytes(data: bytes, mesh: Mesh) -> list[bytes]:
    """Give rank 0 the bytes that each rank has, and the others nothing; on the host."""
    lengths = [length for (length,) in Exchange(mesh, 1)([len(data)])]
    longest = max(1, *lengths)
    mine = torch.zeros(longest, dtype=torch.uint8, device="cpu")
    mine[: len(data)] = torch.frombuffer(bytearray(data or b" "), dtype=torch.uint8)[: len(data)]
    rows = [torch.empty_like(mine) for _ in lengths] if mesh.rank == 0 else None
    dist.gather(mine, rows, group_dst=0, group=mesh.control)
    if rows is None:
        return []
    return [row[:n].numpy().tobytes() for row, n in zip(rows, lengths, strict=True)]
