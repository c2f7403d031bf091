"""Replicate axis x shard axis: which ranks hold different shards and which hold copies.

Rank ``r`` sits at row ``r // shard`` and column ``r % shard``. Gathers and reductions of a row have
process groups of their own, because two collectives of one group run in order: with a single group
a gather could never overlap a reduction, and a collective of the user's on the default group could
slip between two of ours in another order on another rank.
"""

from __future__ import annotations

import atexit
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from zeroshard.core.ticket import DONE, Mark, Ticket
from zeroshard.errors import UsageError

__all__ = ["Aside", "Axis", "Mesh", "Parcels", "build_mesh", "default_mesh"]


@dataclass(frozen=True, slots=True)
class Axis:
    """One direction of the mesh as this rank sees it; groups are None where the axis has size 1."""

    size: int
    rank: int
    gather: dist.ProcessGroup | None = None
    reduce: dist.ProcessGroup | None = None

    @property
    def others(self) -> list[int]:
        """The other ranks, beginning with the next one: not all of them with the same."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]


class Aside:
    """A stream beside the computation's; without a GPU, the computation itself."""

    def __init__(self, device: torch.device, priority: int = 0) -> None:
        self._device = device if device.type == "cuda" else None
        self._priority = priority

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device, priority=self._priority)

    @property
    def exists(self) -> bool:
        """Whether work inside runs beside the computation."""
        return self._device is not None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Work inside starts after what the computation was given so far, which goes on at once."""
        if self._device is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    @contextmanager
    def after(self, *tickets: Ticket) -> Iterator[None]:
        """Work inside starts after these, whatever else the computation was given."""
        if self._device is None:
            for ticket in tickets:
                ticket.wait()
            yield
            return
        with torch.cuda.stream(self._stream):
            for ticket in tickets:
                ticket.wait()
            yield

    def outlive(self, tensor: Tensor) -> None:
        """Keep the memory of a tensor until what was started inside is over."""
        if self._device is not None:
            tensor.record_stream(self._stream)

    def end(self) -> Mark:
        """The end of what was started inside so far."""
        return DONE if self._device is None else self._stream.record_event()

    def finish(self) -> None:
        """Let the host wait for all that was started inside."""
        if self._device is not None and "_stream" in vars(self):
            self._stream.synchronize()

    def join(self) -> None:
        """Let the computation wait for all that was started inside."""
        if self._device is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


class Parcels:
    """Tensors on their way out, kept until copied: no more than a few, so that memory is bounded.

    The copy of one overlaps with what the computation makes of the next.
    """

    def __init__(self, most: int = 2) -> None:
        self._most = most
        self._sent: deque[tuple[Tensor, Ticket]] = deque()

    def send(self, tensor: Tensor, ticket: Ticket) -> None:
        """Keep a tensor until its ticket has been waited for."""
        self._sent.append((tensor, ticket))
        while len(self._sent) > self._most:
            self._take_back()

    def settle(self) -> None:
        """Let the computation wait for all of them."""
        while self._sent:
            self._take_back()

    def _take_back(self) -> None:
        _, ticket = self._sent[0]
        ticket.wait()
        self._sent.popleft()  # and with it the memory, which the computation may use again


class Mesh:
    """The ranks that share one model, and the process groups between them."""

    def __init__(
        self, shard: Axis, replicate: Axis, control: dist.ProcessGroup | None, device: torch.device
    ) -> None:
        self.shard, self.replicate, self.control, self.device = shard, replicate, control, device
        self.world = shard.size * replicate.size
        self.copying, self.measuring = Aside(device), Aside(device)
        # State that is kept off the device: on its way in, stepped, and on its way out.
        self.incoming, self.outgoing = Aside(device), Aside(device)
        self.stepping = Aside(device, priority=-1)  # the next forward waits for it
        self.reading, self.writing = Aside(device), Aside(device)  # shards off the device
        self.parcels = Parcels()
        self.rank = replicate.rank * shard.size + shard.rank
        self.is_destroyed = False

    def now(self) -> Ticket:
        """What the current stream was given so far."""
        if self.device.type != "cuda":
            return DONE
        return torch.cuda.current_stream(self.device).record_event()

    def destroy(self) -> None:
        """Give the process groups back; nothing may use the mesh afterwards."""
        self.is_destroyed = True
        groups = [g for axis in (self.shard, self.replicate) for g in (axis.gather, axis.reduce)]
        self.shard = Axis(self.shard.size, self.shard.rank)
        self.replicate = Axis(self.replicate.size, self.replicate.rank)
        _destroy(groups)
        self.destroy_control()

    def destroy_control(self) -> None:
        """Give back only the group over which hosts talk."""
        groups, self.control = [self.control], None
        _destroy(groups)


def _destroy(groups: list[dist.ProcessGroup | None]) -> None:
    """Destroy groups and drop the caller's references: a group's threads end with its last one."""
    while groups:
        group = groups.pop()
        if group is not None and dist.is_initialized():
            dist.destroy_process_group(group)


def _destroy_at_exit(reference: weakref.ref[Mesh]) -> None:
    """End gloo's threads before the interpreter ends: one that outlives it aborts the process."""
    mesh = reference()
    if mesh is None:
        return
    if mesh.device.type == "cpu":
        mesh.destroy()
    else:
        mesh.destroy_control()  # the device's groups may wait for ranks that failed


def _new_group(ranks: list[int], **options: Any) -> dist.ProcessGroup | None:
    """A group of its own for these ranks; None on the others. All ranks call it."""
    group = dist.new_group(ranks, **options)
    return group if isinstance(group, dist.ProcessGroup) else None


def _axis(grid: list[list[int]], rank: int, timeout: timedelta | None) -> Axis:
    """Make the groups of every row of ``grid``; all ranks call this with the same grid."""
    mine = next(row for row in grid if rank in row)
    if len(mine) == 1:
        return Axis(size=1, rank=0)
    groups = [[_new_group(row, timeout=timeout) for row in grid] for _ in ("gather", "reduce")]
    gather, reduce = (next(group for group in row if group is not None) for row in groups)
    return Axis(len(mine), mine.index(rank), gather, reduce)


def build_mesh(shard_size: int, device: torch.device, timeout: timedelta | None = None) -> Mesh:
    """Arrange all ranks of the default process group with ``shard_size`` ranks to a shard axis.

    Raises:
        UsageError: torch.distributed is not initialised, or the sizes do not divide.
    """
    if not dist.is_initialized():
        raise UsageError("torch.distributed is not initialised; call zeroshard.init_distributed().")
    world, rank = dist.get_world_size(), dist.get_rank()
    if shard_size < 1 or world % shard_size:
        raise UsageError(f"a shard axis of {shard_size} ranks does not divide {world} ranks.")
    rows = [list(range(start, start + shard_size)) for start in range(0, world, shard_size)]
    columns = [list(range(column, world, shard_size)) for column in range(shard_size)]
    control = _new_group(list(range(world)), backend="gloo", timeout=timeout)
    assert control is not None, "every rank is in the control group"
    mesh = Mesh(_axis(rows, rank, timeout), _axis(columns, rank, timeout), control, device)
    atexit.register(_destroy_at_exit, weakref.ref(mesh))
    return mesh


def default_mesh(device: torch.device) -> Mesh:
    """All ranks as one shard axis over the default process group, which is not ours to destroy.

    For work before there is an engine: any number of such meshes costs nothing.
    """
    if not dist.is_initialized():
        raise UsageError("torch.distributed is not initialised; call zeroshard.init_distributed().")
    world, group = dist.get_world_size(), dist.group.WORLD
    if world == 1:
        return Mesh(Axis(1, 0), Axis(1, 0), None, device)
    return Mesh(Axis(world, dist.get_rank(), group, group), Axis(1, 0), None, device)
