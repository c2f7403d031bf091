"""How state that is kept off the device gets there and back: over the bus, or from files.

See [Note: state on its way] in `pipeline.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from zeroshard.core.depot import Depot
from zeroshard.core.files import FileDepot
from zeroshard.core.mesh import Mesh
from zeroshard.core.slab import HostDepot
from zeroshard.core.ticket import DONE, Mark, Ticket

__all__ = ["Bus", "Carrier", "Disk", "Load", "Slot"]

_ALIGN_BYTES = 4096  # files are read in such blocks


@dataclass(frozen=True, slots=True, eq=False)
class Load:
    """Tensors of a depot that are stepped at once."""

    depot: Depot
    homes: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of a buffer that has room for it."""
        return sum(_rounded(home.nbytes) for home in self.homes)

    def lay(self, buffer: Tensor) -> list[Tensor]:
        """Views of a buffer that are like the tensors."""
        views: list[Tensor] = []
        start = 0
        for home in self.homes:
            views.append(buffer[start : start + home.nbytes].view(home.dtype).view(home.shape))
            start += _rounded(home.nbytes)
        return views


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _ALIGN_BYTES) * _ALIGN_BYTES


class Slot:
    """A buffer on the device and the load that is in it or on its way."""

    def __init__(self, buffer: Tensor, number: int, free: Ticket) -> None:
        self.buffer, self.number = buffer, number
        self.load: Load | None = None
        self.views: list[Tensor] = []
        self.arrived: Ticket = DONE
        self.left = free  # after which the buffer may be filled again ...
        self.gate: Ticket = DONE  # ... and this


class Carrier(Protocol):
    """Brings loads of one depot into buffers and back."""

    def fetch(self, slot: Slot) -> None:
        """Start bringing the load of a slot."""
        ...

    def receive(self, slot: Slot) -> None:
        """Let the current stream wait until the load is there."""
        ...

    def send(self, slot: Slot, stepped: Ticket) -> None:
        """Start bringing the load of a slot back, once it is stepped."""
        ...

    def settle(self) -> None:
        """Let the host wait until everything is back.

        Raises:
            OffloadError: something did not arrive.
        """
        ...

    def close(self) -> None:
        """Hold on to nothing."""
        ...


class Bus:
    """To and from host memory, by copies on two streams."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def fetch(self, slot: Slot) -> None:
        """Copy it on a stream of its own, once the buffer may be filled."""
        assert slot.load is not None, "a slot without a load is not filled"
        with self._mesh.incoming.after(slot.left, slot.gate):
            for view, home in zip(slot.views, slot.load.homes, strict=True):
                view.copy_(home, non_blocking=True)
        slot.arrived = self._mesh.incoming.end()
        self._mesh.incoming.give_way(self._mesh.relay)

    def receive(self, slot: Slot) -> None:
        """Let the current stream wait for the copy."""
        slot.arrived.wait()

    def send(self, slot: Slot, stepped: Ticket) -> None:
        """Copy it back on another stream."""
        assert slot.load is not None, "a slot without a load is not emptied"
        with self._mesh.outgoing.after(stepped):
            for view, home in zip(slot.views, slot.load.homes, strict=True):
                home.copy_(view, non_blocking=True)
        slot.left = self._mesh.outgoing.end()
        self._mesh.outgoing.give_way(self._mesh.relay)

    def settle(self) -> None:
        """Let the host wait for all copies to the host."""
        self._mesh.outgoing.finish()

    def close(self) -> None:
        """There is nothing to let go of."""


@dataclass(slots=True, eq=False)
class _Beside:
    """Host memory beside a buffer, and who uses it."""

    memory: Tensor
    job: Future[None] | None = None
    """The last read or write."""

    copied: Mark = DONE
    """The last copy between it and the device."""

    def end(self) -> None:
        """Wait until nothing uses it."""
        if self.job is not None:
            self.job.result()
        self.copied.synchronize()


class Disk:
    """To and from files, through host memory beside each buffer.

    A thread reads, another one writes, and each goes through its loads in order; how many blocks of
    a load are under way at once is the depot's business. Only who wants a load waits for it.
    """

    def __init__(self, mesh: Mesh, depot: FileDepot) -> None:
        self._mesh, self._depot = mesh, depot
        self._host = HostDepot(
            mesh.device, pin=depot.pin, name="buffers of optimizer state in files"
        )
        self._beside: dict[int, _Beside] = {}
        self._writes: dict[Load, Future[None]] = {}
        self._reader, self._writer = (
            ThreadPoolExecutor(1, thread_name_prefix=f"zeroshard-state-{way}")
            for way in ("in", "out")
        )

    def fetch(self, slot: Slot) -> None:
        """Read it into host memory, once what was there before is in its file."""
        assert slot.load is not None, "a slot without a load is not filled"
        load, beside = slot.load, self._beside_of(slot)
        before = [job for job in (beside.job, self._writes.get(load)) if job is not None]
        beside.job = self._reader.submit(self._read, load, beside, before)

    def _read(self, load: Load, beside: _Beside, before: Sequence[Future[None]]) -> None:
        for job in before:
            job.result()
        beside.copied.synchronize()
        views = load.lay(beside.memory)
        _wait(self._depot.read(home, view) for home, view in zip(load.homes, views, strict=True))

    def receive(self, slot: Slot) -> None:
        """Wait for the read, and let the current stream wait for the copy to the device."""
        assert slot.load is not None, "a slot without a load is not filled"
        beside = self._beside_of(slot)
        assert beside.job is not None, "what is received was sent for"
        beside.job.result()
        with self._mesh.incoming.after(slot.left):
            for view, here in zip(slot.views, slot.load.lay(beside.memory), strict=True):
                view.copy_(here, non_blocking=True)
        slot.arrived = beside.copied = self._mesh.incoming.end()
        slot.arrived.wait()

    def send(self, slot: Slot, stepped: Ticket) -> None:
        """Copy it to host memory, from where it is written."""
        assert slot.load is not None, "a slot without a load is not emptied"
        load, beside = slot.load, self._beside_of(slot)
        with self._mesh.outgoing.after(stepped):
            for view, here in zip(slot.views, load.lay(beside.memory), strict=True):
                here.copy_(view, non_blocking=True)
        slot.left = beside.copied = self._mesh.outgoing.end()
        job = self._writer.submit(self._write, load, beside.memory, beside.copied)
        beside.job = self._writes[load] = job

    def _write(self, load: Load, memory: Tensor, copied: Mark) -> None:
        copied.synchronize()
        views = load.lay(memory)
        _wait(self._depot.write(home, view) for home, view in zip(load.homes, views, strict=True))

    def _beside_of(self, slot: Slot) -> _Beside:
        beside = self._beside.get(slot.number)
        if beside is None or beside.memory.numel() < slot.buffer.numel():
            if beside is not None:
                beside.end()
                self._host.give_back(beside.memory)
            memory = self._host.take(slot.buffer.numel(), torch.uint8)
            self._host.seal()
            beside = self._beside[slot.number] = _Beside(memory)
        return beside

    def settle(self) -> None:
        """Let the host wait until everything is in the files, which are whole."""
        self._mesh.outgoing.finish()
        writes, self._writes = self._writes, {}
        for write in writes.values():
            write.result()
        self._depot.check()  # the host is about to touch it

    def close(self) -> None:
        """End the threads, and give host memory back."""
        self._reader.shutdown()
        self._writer.shutdown()
        for beside in self._beside.values():
            beside.copied.synchronize()
        self._beside.clear()
        self._writes.clear()
        self._host.close()


def _wait(jobs: Iterable[Future[None]]) -> None:
    for job in list(jobs):
        job.result()
