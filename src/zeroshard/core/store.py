"""Where a shard lives between uses.

A placement is a store: the unit lets it feed the shard to a gather and hands it the stepped master
weights afterwards, and does not know where the bytes are. Which store a unit gets is decided by the
place that its builder is given: the device, host memory, or files (`staging.py`).

[Note: shards off the device]
A shard in host memory is copied into its range of the full buffer on a stream beside the
computation's, and the gather starts from that stream, behind the copy. So a gather that is issued
ahead hides the copy as it hides the collective, the computation goes on meanwhile, and the shard
takes no memory on the device beside the full parameters that it becomes a part of. The way out is a
copy on another stream. Either begins after the other's last copy of the same shard; the host waits
for both before it touches the memory itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from torch import Tensor

from zeroshard.core.depot import Depot
from zeroshard.core.mesh import Mesh
from zeroshard.core.ticket import DONE, Mark, Ticket
from zeroshard.errors import OffloadError

__all__ = [
    "ON_DEVICE",
    "DeviceStore",
    "HostStore",
    "OnDevice",
    "OnHost",
    "Place",
    "Reader",
    "Store",
]


class Reader(Protocol):
    """Reads shards ahead of their gathers."""

    def expect(self, coming: Iterable[Store]) -> None:
        """Read what is to come, nearest first, as far as there is room."""
        ...


class Store(Protocol):
    """A home for one shard in the compute dtype."""

    @property
    def nbytes(self) -> int:
        """Bytes the store keeps on the device."""
        ...

    @property
    def tensors(self) -> Sequence[Tensor]:
        """What it keeps on the device."""
        ...

    @property
    def reader(self) -> Reader | None:
        """What brings it nearer ahead of its use; None where it is near enough."""
        ...

    @property
    def is_at_hand(self) -> bool:
        """Whether :meth:`feed` makes the host wait for nothing."""
        ...

    @property
    def failure(self) -> OffloadError | None:
        """Why a gather brought nothing: whoever wants to read what was gathered raises it."""
        ...

    @property
    def home(self) -> Tensor:
        """The shard where it is kept, for the host to read; edits are told to :meth:`write`.

        Raises:
            OffloadError: what was written last did not arrive.
        """
        ...

    def feed(self, into: Tensor, gather: Callable[[Tensor], Ticket]) -> Ticket:
        """Start a gather with the shard as a tensor on the device, as soon as it is there.

        Where it cannot be read the gather starts all the same, since other ranks are in it, and
        :attr:`failure` says why.

        Args:
            into: memory on the device that the shard may be brought to, its part of what is
                gathered; the computation may not touch it before the end.
            gather: starts it, on the stream that is current then.

        Returns:
            The end of the gather.
        """
        ...

    def write(self, shard: Tensor) -> Ticket:
        """Start to replace the content, casting from the dtype of ``shard``.

        Returns:
            The end of the use of ``shard``, which may not be changed or freed before. What is read
            afterwards is the new content in any case.

        Raises:
            OffloadError: it cannot be written.
        """
        ...


class DeviceStore:
    """A shard in device memory, possibly a part of a larger tensor."""

    reader = failure = None
    is_at_hand = True

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def nbytes(self) -> int:
        """Bytes the store keeps on the device."""
        return self.tensor.nbytes

    @property
    def tensors(self) -> Sequence[Tensor]:
        """What it keeps on the device."""
        return (self.tensor,)

    @property
    def home(self) -> Tensor:
        """The stored tensor."""
        return self.tensor

    def feed(self, into: Tensor, gather: Callable[[Tensor], Ticket]) -> Ticket:
        """Start a gather with the stored tensor itself; nothing is copied."""
        return gather(self.tensor)

    def write(self, shard: Tensor) -> Ticket:
        """Copy ``shard`` in, unless it is the very memory of the store."""
        if shard.data_ptr() != self.tensor.data_ptr():
            self.tensor.copy_(shard)
        return DONE


@dataclass(slots=True)
class _Copies:
    """The ends of the last copies in and out of a shard's memory."""

    read: Mark = DONE
    written: Mark = DONE

    def synchronize(self) -> None:
        """Make the host wait for them."""
        self.read.synchronize()
        self.written.synchronize()


class HostStore:
    """A shard in host memory, out of a depot. See [Note: shards off the device]."""

    nbytes = 0
    tensors = ()
    reader = failure = None
    is_at_hand = True

    def __init__(self, home: Tensor, depot: Depot, mesh: Mesh) -> None:
        self._home, self._copies = home, _Copies()
        self._reading, self._writing = mesh.reading, mesh.writing
        # Whoever owns a unit, an engine or parameters that wait for one, owns its memory.
        weakref.finalize(self, _give_back, depot, home, self._copies).atexit = False

    @property
    def home(self) -> Tensor:
        """The shard in host memory, which no copy uses now."""
        self._copies.synchronize()
        return self._home

    def feed(self, into: Tensor, gather: Callable[[Tensor], Ticket]) -> Ticket:
        """Copy the shard to the device beside the computation, and start a gather behind it."""
        with self._reading.entered():
            self._copies.written.wait()
            into.copy_(self._home, non_blocking=True)
            end = self._copies.read = self._reading.end()
            gathering = gather(into)
        return end if gathering is DONE else gathering

    def write(self, shard: Tensor) -> Ticket:
        """Copy ``shard`` to the host beside the computation, or at once if it is there."""
        if shard.data_ptr() == self._home.data_ptr():
            return DONE
        if shard.device == self._home.device:
            self.home.copy_(shard)
            return DONE
        with self._writing.entered():
            self._copies.read.wait()
            self._home.copy_(shard.to(self._home.dtype), non_blocking=True)
            end = self._copies.written = self._writing.end()
        return end


def _give_back(depot: Depot, home: Tensor, copies: _Copies) -> None:
    copies.synchronize()
    depot.give_back(home)


class Place(Protocol):
    """Where shards are kept of units that are freed after use."""

    @property
    def is_near(self) -> bool:
        """Whether that is the device."""
        ...

    def store(self, shard: Tensor, mesh: Mesh) -> Store:
        """A store with the content of ``shard``, which is on the device and may be kept.

        Raises:
            OffloadError: there is no room for it.
        """
        ...


class OnDevice:
    """The device itself."""

    is_near = True

    def store(self, shard: Tensor, mesh: Mesh) -> DeviceStore:
        """The tensor itself is kept."""
        return DeviceStore(shard)


ON_DEVICE: Final[Place] = OnDevice()


class OnHost:
    """Host memory, out of a depot."""

    is_near = False

    def __init__(self, depot: Depot) -> None:
        self._depot = depot

    def store(self, shard: Tensor, mesh: Mesh) -> HostStore:
        """A copy in the depot, which gets the memory back with the end of the store."""
        home = self._depot.take(shard.numel(), shard.dtype)
        home.copy_(shard)
        return HostStore(home, self._depot, mesh)
