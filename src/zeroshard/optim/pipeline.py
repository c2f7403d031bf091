"""State that is kept off the device, on its way through it during a step.

[Note: state on its way]
A step goes through the state in one order, a *load* at a time. Each load is copied into a buffer on
the device, stepped there by the very kernels that step state which stays, and copied back. The
three run on streams of their own, so while one load is stepped the ones before it leave and the
ones after it arrive, and the bus works in both directions at once:

    incoming    load 3   load 4   load 5
    stepping             load 3   load 4   load 5
    outgoing                      load 3   load 4   load 5

There are few buffers, used in turn: reading into one waits for the writing out of it. Reading ahead
begins in backward, bit by bit as far as the buffers go; nothing but the update itself needs the
norm of all gradients, so the time until that is known goes into reading. The computation waits for
no more than the units it uses next, so the end of a step runs under the next forward. What a load
is kept in may be read again as soon as it was written out, in the order of the streams; the host,
which looks at it between two steps, waits (`settle`).

How many there are decides how long a step takes. Nothing can leave before the norm is known, so the
update of the last unit, for which the next forward waits, comes as much earlier as there is room
for what is stepped and has not left. Hence buffers stay from one step to the next, but for those of
an optimizer that steps several loads at once: they may be as large as all of the state.

Buffers are allocated and freed on the compute stream: what was there before is over when the first
load arrives, and the computation has waited for the last one to leave before they are freed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from zeroshard.core.depot import Depot
from zeroshard.core.files import FileDepot
from zeroshard.core.mesh import Mesh
from zeroshard.core.ticket import DONE, Ticket
from zeroshard.errors import OffloadError
from zeroshard.optim.carriers import Bus, Carrier, Disk, Load, Slot

__all__ = ["Pipeline"]

_FEWEST = 4  # buffers: one arrives, one is stepped, one leaves, and one to spare
_SHARE_OF_FREE = 8  # a part of what is free on the device


@dataclass(frozen=True, slots=True)
class _Stepped:
    """The end of a unit's step; one of its own also where there is nothing to wait for."""

    ticket: Ticket

    def wait(self) -> None:
        self.ticket.wait()


class Pipeline:
    """The buffers of one optimizer. See [Note: state on its way].

    Args:
        mesh: the device, and the streams beside the computation.
        num_buffers: how many; None makes as many as an eighth of what is free on the device holds,
            when the first load is sent for, and at least four.
    """

    def __init__(self, mesh: Mesh, num_buffers: int | None = None) -> None:
        self._mesh, self._wanted = mesh, num_buffers
        self._room_bytes: int | None = None
        self._carriers: dict[Depot, Carrier] = {}
        self._loads: tuple[Load, ...] = ()
        self._due: deque[Load] = deque()  # not sent for yet
        self._coming: deque[Slot] = deque()  # sent for, oldest first
        self._idle: deque[Slot] = deque()
        self.is_under_way = self._must_release = False

    def start(self, loads: Sequence[Load], at_once: int = 1) -> None:
        """Be ready for a step that goes through these loads in order; nothing if that is so.

        Args:
            loads: all that the step needs; those of near depots are passed over.
            at_once: how many loads are stepped together.
        """
        if self.is_under_way and tuple(loads) == self._loads:
            return
        self.forget()
        self._due.clear()
        far = [load for load in loads if not load.depot.is_near]
        if not far:
            return
        self._loads, self._due = tuple(loads), deque(far)
        with self._mesh.incoming.after(self._mesh.outgoing.end()):
            pass  # what the last step brought back may be read again
        self._make_slots(max(load.nbytes for load in far), at_once)
        self.is_under_way = True

    def read_ahead(self, share: float) -> None:
        """Send for a share of what the buffers hold, once the computation has come to where it is.

        The bus has more to carry in backward, such as shards of parameters, which would wait behind
        a long row of loads: the host that sends for them is far ahead of the device.
        """
        number = len(self._idle) + len(self._coming)
        self._send_for(self._mesh.now(), math.ceil(share * number))

    def _make_slots(self, nbytes: int, at_once: int) -> None:
        """Buffers on the device, if those there are do not do."""
        self._must_release = at_once > 1
        if self._room_bytes is None:
            self._room_bytes = _free_bytes(self._mesh.device) // _SHARE_OF_FREE
        most = self._wanted or max(at_once + _FEWEST - 1, self._room_bytes // nbytes)
        number = min(max(most, at_once), len(self._due))
        if len(self._idle) == number and self._idle[0].buffer.numel() == nbytes:
            return
        self.release()
        now = self._mesh.now()
        for at in range(number):
            buffer = torch.empty(nbytes, dtype=torch.uint8, device=self._mesh.device)
            self._idle.append(Slot(buffer, at, now))

    def _send_for(self, after: Ticket = DONE, most: int | None = None) -> None:
        number = len(self._idle) if most is None else most
        while self._due and self._idle and number:
            number -= 1
            slot = self._idle.popleft()
            slot.gate = after
            load = slot.load = self._due.popleft()
            slot.views = load.lay(slot.buffer)
            self._carrier(load).fetch(slot)
            self._coming.append(slot)

    def _carrier(self, load: Load) -> Carrier:
        depot = load.depot
        carrier = self._carriers.get(depot)
        if carrier is None:
            is_file = isinstance(depot, FileDepot)
            carrier = Disk(self._mesh, depot) if is_file else Bus(self._mesh)
            self._carriers[depot] = carrier
        return carrier

    @contextmanager
    def visiting(self, load: Load) -> Iterator[Sequence[Tensor]]:
        """The tensors of a load where kernels of the current stream can work on them.

        What is there at the end is what is kept; after an exception it is what was there before.
        Loads are visited in the order of `start`.
        """
        if load.depot.is_near:
            yield load.homes
            return
        self._send_for()  # what had come was forgotten, if somebody edited state inside the step
        slot = self._coming.popleft()
        assert slot.load is load, "loads are stepped in the order in which they were sent for"
        carrier = self._carrier(load)
        try:
            carrier.receive(slot)
            yield slot.views
            carrier.send(slot, self._mesh.now())
        except BaseException:
            slot.left = self._mesh.now()
            raise
        finally:
            self._idle.append(slot)
        self._send_for()

    def ticket(self) -> Ticket:
        """The end of what the current stream was given so far."""
        return _Stepped(self._mesh.now())

    def end(self) -> None:
        """A step has gone through all loads."""
        assert not self._due and not self._coming, "a step ends when all loads were stepped"
        self.is_under_way = False
        if self._must_release:
            self.release()

    def forget(self) -> None:
        """Drop what was read ahead; inside a step, what is still to be visited is read anew."""
        for slot in reversed(self._coming):
            assert slot.load is not None, "a slot on its way has a load"
            with suppress(OffloadError):  # who visits it hears of it
                self._carrier(slot.load).receive(slot)
            slot.left = self._mesh.now()
            self._due.appendleft(slot.load)
        self._idle.extend(self._coming)
        self._coming.clear()
        self.is_under_way = False

    def settle(self) -> None:
        """Let the host wait until all state is where it is kept."""
        for carrier in self._carriers.values():
            carrier.settle()

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers on the device, between two steps."""
        return sum(slot.buffer.nbytes for slot in self._idle)

    def close(self) -> None:
        """End what is under way, and hold on to no memory until the next `start`."""
        self.forget()
        self._due.clear()
        self.release()
        self._loads = ()
        carriers, self._carriers = self._carriers, {}
        for carrier in carriers.values():
            carrier.close()

    def release(self) -> None:
        """Give the buffers back, once the computation has waited for what leaves them.

        Nothing if a step is under way.
        """
        if self._coming or self.is_under_way:
            return
        for slot in self._idle:
            slot.left.wait()
        self._idle.clear()


def _free_bytes(device: torch.device) -> int:
    """Bytes on a device that nobody uses."""
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
