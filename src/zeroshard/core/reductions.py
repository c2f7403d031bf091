"""Reductions that read the gradients out of the other ranks' memory, and add them up in fp32.

[Note: turns]
All ranks reduce the same units in one agreed order: reduction n is their n-th *turn*. The memory of
each rank that others read is a ring of two slots, and turn n has slot n % 2. In it each rank

    writes its full gradient into its slot,
    meets the others, which have then done the same,
    reads its own range of every rank's slot, and writes the mean.

There is one meeting in a turn, and it serves two. A rank comes to the next one only after it has
read what it wants of this turn. So whoever is past meeting n + 1 knows that the slot of turn n is
read by nobody any more, and may fill it for turn n + 2.

On GPUs meetings and reads run on a stream beside the computation, in order, and the host waits for
nothing. On CPUs the meeting is under way while the computation goes on, and reads are made when the
mean is wanted, or before the next turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from zeroshard.core.collectives import DONE, Ticket, meet
from zeroshard.core.flat import FlatBuffer
from zeroshard.core.layout import Layout
from zeroshard.core.mesh import Aside, Axis, Mesh
from zeroshard.core.pulled import Copier, Slab, aligned, map_slab, on_all
from zeroshard.core.reducer import CollectiveReduction
from zeroshard.core.rows import Mean, mean_of
from zeroshard.core.unit import Unit
from zeroshard.core.world import patience

__all__ = [
    "DIRECT",
    "PulledReduction",
    "Ring",
    "map_slots",
    "reduce_by_pulls",
    "withdraw_reductions",
]

DIRECT: Final = False
"""Whether rows are added up where they are, without a copy to this rank; on two GPUs as fast."""

_SLOTS = 2
_DIRECT_PROGRAMS = 32
"""Blocks of threads that read other GPUs' memory: they wait for it most of the time."""


class _Turns(Protocol):
    """In which order slots are written and read. See [Note: turns]."""

    def free(self) -> None:
        """Let the current stream go on when nobody reads the slot of the next turn any more."""
        ...

    def read(self, read: Callable[[], object]) -> Ticket:
        """Start reading when all ranks have written what they were given so far."""
        ...


class _Read:
    """Reads by the host, once the others have come."""

    def __init__(self, met: Ticket, read: Callable[[], object]) -> None:
        self._to_do: tuple[Ticket, Callable[[], object]] | None = met, read

    def wait(self) -> None:
        if self._to_do is not None:
            met, read = self._to_do
            met.wait()
            read()
            self._to_do = None  # nor hold on to what was read


class _HostTurns:
    """Turns of CPU ranks."""

    def __init__(self, axis: Axis) -> None:
        self._axis, self._last = axis, DONE
        self._flag = torch.zeros(1, dtype=torch.int32, device="cpu")

    def free(self) -> None:
        self._last.wait()

    def read(self, read: Callable[[], object]) -> Ticket:
        self._last = _Read(meet(self._flag, self._axis), read)
        return self._last


class _DeviceTurns:
    """Turns of GPUs, on a stream beside the computation."""

    def __init__(self, device: torch.device, handle: Any, timeout: timedelta) -> None:
        self._handle, self._beside, self._met = handle, Aside(device, priority=-1), DONE
        # A rank that is waited for in vain must end the kernel that waits: it would run for ever.
        self._timeout_ms = int(timeout.total_seconds() * 1000)

    def free(self) -> None:
        self._met.wait()

    def read(self, read: Callable[[], object]) -> Ticket:
        with self._beside.entered():
            self._handle.barrier(0, self._timeout_ms)
            self._met = self._beside.end()
            read()
        return self._beside.end()


class Ring:
    """The slots of all ranks, and how they are read: by copies to this rank, or where they are.

    Args:
        slab: what `map_slots` has mapped.
        mesh: the ranks.
        copy: what copies the others' rows into memory of this rank, where they are added up then;
            None to add them up where they are.
        num_programs: blocks of threads that add rows up where they are, on a GPU.
    """

    def __init__(
        self,
        slab: Slab,
        mesh: Mesh,
        copy: Copier | None = None,
        *,
        num_programs: int = _DIRECT_PROGRAMS,
    ) -> None:
        self._slab, self._axis, self._copy = slab, mesh.shard, copy
        self._num_programs = num_programs
        self._slot_nbytes = slab.rows[0].nbytes // _SLOTS
        self._staging: list[Tensor] = []
        if copy is not None:
            nbytes = aligned(-(-self._slot_nbytes // mesh.shard.size))
            size = (mesh.shard.size - 1) * nbytes
            flat = torch.empty(size, dtype=torch.uint8, device=mesh.device)
            self._staging = list(flat.split(nbytes))
        self._turns: _Turns = (
            _DeviceTurns(mesh.device, slab.handle, patience())
            if mesh.device.type == "cuda"
            else _HostTurns(mesh.shard)
        )
        self._number = 0  # of the turn that comes next

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's memory."""
        return self._slab.rows[0].nbytes + sum(row.nbytes for row in self._staging)

    @property
    def slot(self) -> int:
        """The slot of the turn that comes next."""
        return self._number % _SLOTS

    def free(self) -> None:
        """Let the current stream go on when no rank reads that slot any more."""
        self._turns.free()

    def take(self, read: Callable[[], object]) -> Ticket:
        """Take a turn: read when all ranks have written into its slot."""
        self._number += 1
        return self._turns.read(read)

    def own(self, slot: int, numel: int, dtype: torch.dtype) -> Tensor:
        """A full buffer in this rank's slot."""
        return self._part(self._axis.rank, slot, 0, numel * dtype.itemsize).view(dtype)

    def reader(self, slot: int, numel: int, dtype: torch.dtype) -> Mean:
        """What writes the mean of this rank's range of all ranks' full buffers.

        Args:
            slot: where those are.
            numel: elements of the range.
            dtype: of the full buffers.
        """
        axis, nbytes = self._axis, numel * dtype.itemsize
        parts = [self._part(rank, slot, axis.rank * nbytes, nbytes) for rank in range(axis.size)]
        sources = [part.view(dtype) for part in parts]
        copy = self._copy
        if copy is None:
            return mean_of(sources, self._num_programs)
        rows = list(sources)
        for rank, landed in zip(axis.others, self._staging, strict=True):
            rows[rank] = landed[:nbytes].view(dtype)
        mean = mean_of(rows)
        copies = [(rows[rank], sources[rank]) for rank in axis.others]

        def read(out: Tensor) -> None:
            copy(copies).wait()
            mean(out)

        return read

    def _part(self, rank: int, slot: int, start: int, nbytes: int) -> Tensor:
        assert start + nbytes <= self._slot_nbytes, f"{start + nbytes} bytes do not fit in a slot"
        start += slot * self._slot_nbytes
        return self._slab.rows[rank][start : start + nbytes]


@dataclass(frozen=True, slots=True)
class _Place:
    """A unit's full gradient in a slot."""

    buffer: FlatBuffer
    mean: Mean


class PulledReduction:
    """A unit's turns in a ring."""

    in_turn = True

    def __init__(
        self, ring: Ring, layout: Layout, shapes: Sequence[torch.Size], dtype: torch.dtype
    ) -> None:
        self._ring = ring
        self._places = [
            _Place(
                FlatBuffer(ring.own(slot, layout.full_numel, dtype), layout, shapes),
                ring.reader(slot, layout.shard_numel, dtype),
            )
            for slot in range(_SLOTS)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of the ring on this rank."""
        return self._ring.nbytes

    def room(self) -> FlatBuffer:
        """The unit's place in the slot of the next turn."""
        self._ring.free()
        return self._places[self._ring.slot].buffer

    def start(self, out: Tensor, wire: Tensor) -> Ticket:
        """Take the next turn, for which the full gradient is in its place."""
        mean = self._places[self._ring.slot].mean
        return self._ring.take(lambda: mean(out))


def map_slots(nbytes: int, mesh: Mesh) -> Slab:
    """Memory of all ranks for a ring whose slots hold so many bytes. A collective.

    Raises:
        UnavailableError: on every rank.
    """
    return map_slab(_SLOTS * aligned(nbytes), mesh)


def reduce_by_pulls(units: Sequence[Unit], mesh: Mesh, *, direct: bool = DIRECT) -> None:
    """Let gradients of units be averaged by reads of other ranks' memory. A collective.

    For units whose gradients are reduced in every backward, the same on all ranks.

    Args:
        units: the units.
        mesh: the ranks, of which all are on the shard axis.
        direct: add rows up where they are, without a copy.

    Raises:
        UnavailableError: on every rank, with nothing changed.
    """
    assert mesh.replicate.size == 1, "replicas hold no memory that is mapped here"
    most = max(unit.layout.full_numel * unit.gradient_dtype.itemsize for unit in units)
    slab = map_slots(most, mesh)
    with on_all(mesh):  # there may be no room for rows that are copied
        ring = Ring(slab, mesh, None if direct else slab.copy)
        reducers = [
            PulledReduction(ring, unit.layout, unit.shapes, unit.gradient_dtype) for unit in units
        ]
    for unit, reducer in zip(units, reducers, strict=True):
        assert not unit.lifetime.grads_stay, f"{unit.name} keeps its full gradient"
        unit.reducer = reducer


def withdraw_reductions(units: Sequence[Unit]) -> list[Unit]:
    """Let gradients be averaged by collectives, and give the ring up. Local, between two passes.

    Returns:
        The units that had been reduced by pulls.
    """
    pulled = [unit for unit in units if unit.reducer.in_turn]
    for unit in pulled:
        unit.settle()
        unit.reducer = CollectiveReduction(unit.mesh, unit.precision.averaging)
    return pulled
