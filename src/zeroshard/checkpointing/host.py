"""Inputs that wait in host memory.

A copy to the host starts when a function is called, and runs beside it on a stream of its own. When
the next function is called the device's memory is given up, so at any time the newest input is on
the device, where backward wants it first. In backward the input that is needed next comes back
while the function after it runs again.

Memory follows [Note: streams] in core/collectives.py: the compute stream alone allocates and frees,
and it waits for the last transfer of a buffer before the buffer goes. Host memory needs no such
care: torch's allocator of pinned memory waits for transfers itself, and the transfers of a device
run one after the other on one stream.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zeroshard.checkpointing.memory import Slots, edited_error
from zeroshard.core.collectives import DONE, Ticket

__all__ = ["Group", "Host"]


class _Arrival:
    """A transfer under way, for which the compute stream can wait."""

    def __init__(self, device: torch.device, event: Any) -> None:
        self._device, self._event = device, event

    def wait(self) -> None:
        torch.get_device_module(self._device).current_stream(self._device).wait_event(self._event)


class _Link:
    """The stream on which one device exchanges data with the host; on the CPU, no stream at all."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._module = device, torch.get_device_module(device)
        self._stream: Any = (
            torch.cuda.Stream(device) if device.type == "cuda" else torch.cpu.Stream()
        )

    def copy(self, into: Tensor, source: Tensor) -> Ticket:
        """Start a copy that comes after everything the compute stream was given so far."""
        self._stream.wait_stream(self._module.current_stream(self._device))
        with self._module.stream(self._stream):
            into.copy_(source, non_blocking=True)
        return _Arrival(self._device, self._stream.record_event())


class _Moved:
    """A flat tensor on the host, and on the device while it leaves and while it is wanted."""

    def __init__(self, tensor: Tensor, host: Tensor, link: _Link) -> None:
        self._transfer: Ticket = DONE
        self._here: Tensor | None = tensor
        self._host, self._link, self._device = host, link, tensor.device
        # A tensor that came back has no other owner who could edit it.
        self._version: int | None = tensor._version
        self._is_edited = False
        self._transfer = link.copy(host, tensor)

    def __del__(self) -> None:
        # A graph that is dropped may take it along on its way.
        self._transfer.wait()

    def leave(self) -> None:
        """Give up the device's memory."""
        if self._here is not None:
            self._transfer.wait()
            self._transfer = DONE
            self._is_edited |= self._version not in {None, self._here._version}
            self._here = None

    def come(self) -> None:
        """Start to bring it back."""
        if self._here is None:
            self._here, self._version = torch.empty_like(self._host, device=self._device), None
            self._transfer = self._link.copy(self._here, self._host)

    def take(self) -> Tensor:
        """The tensor on the device, which belongs to the caller from now on."""
        self.come()
        tensor = self._here
        assert tensor is not None, "come() leaves the tensor on the device"
        self.leave()
        if self._is_edited:
            raise edited_error()
        return tensor


class _Waiting:
    """One of a group's tensors, as the graph holds it."""

    def __init__(self, moved: _Moved, group: Group) -> None:
        self._moved, self._group = moved, group

    def take(self) -> Tensor:
        """The tensor on the device, which belongs to the caller from now on."""
        tensor = self._moved.take()
        self._group.was_taken(self._moved)
        return tensor


class Group:
    """What one call of a checkpointed function has on the host."""

    def __init__(self, host: Host, before: Callable[[], Group | None]) -> None:
        self._host, self._before = host, before
        self._moved: list[_Moved] = []

    def put(self, tensor: Tensor) -> _Waiting:
        """Send a flat tensor on its way."""
        moved = self._host.move(tensor)
        self._moved.append(moved)
        return _Waiting(moved, self)

    def leave(self) -> None:
        """Give up the device's memory."""
        for moved in self._moved:
            moved.leave()

    def come(self) -> None:
        """Start to bring everything back."""
        for moved in self._moved:
            moved.come()

    def was_taken(self, moved: _Moved) -> None:
        """After the last of them, which are taken in order, go for those of the call before."""
        if moved is self._moved[-1]:
            self._host.look_ahead(self._before)


def _nothing() -> None:
    return


class Host:
    """Moves the inputs of checkpointed functions to host memory and back.

    The graphs own the groups; here they are only pointed at.
    """

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._links: dict[torch.device, _Link] = {}
        self._newest: Callable[[], Group | None] = _nothing
        self._ahead: Callable[[], Group | None] = _nothing

    def begin(self) -> Group:
        """A group for the call that begins; the one before gives up its device memory."""
        self.look_ahead(_nothing)
        if newest := self._newest():
            newest.leave()
        group = Group(self, before=self._newest)
        self._newest = weakref.ref(group)
        return group

    def move(self, tensor: Tensor) -> _Moved:
        """Start to copy a flat tensor to the host."""
        link = self._links.get(tensor.device)
        if link is None:
            link = self._links[tensor.device] = _Link(tensor.device)
        return _Moved(tensor, self._slots.empty(tensor.numel(), like=tensor), link)

    def look_ahead(self, find: Callable[[], Group | None]) -> None:
        """Bring a group back before it is asked for; at most one is on the device that early."""
        if ahead := self._ahead():
            ahead.leave()
        self._ahead = find
        if group := find():
            group.come()
