"""What the graph holds of a checkpointed function's inputs until the function runs again.

Without settings that is the inputs themselves, which torch saves. Otherwise torch asks the hooks of
this module to pack each of them: a rank keeps its part only, or a copy on the host, or both.

Only results of other functions are packed. An input without a gradient (a mask, positions) and a
leaf are held by the caller anyway, so a copy of them would add memory, not save any.
"""

# Whether a tensor was edited has no public name.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from zeroshard.checkpointing.host import Group, Host
from zeroshard.checkpointing.memory import Shape, Slots, edited_error
from zeroshard.checkpointing.settings import Settings
from zeroshard.core.collectives import all_gather
from zeroshard.core.mesh import Axis

__all__ = ["Keeper"]


class _Kept(Protocol):
    """A tensor put away."""

    def take(self) -> Tensor:
        """The tensor with the content that it had then."""
        ...


class _Here:
    """A tensor that stays as it is."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor, tensor._version

    def take(self) -> Tensor:
        if self._tensor._version != self._version:
            raise edited_error()
        return self._tensor


class _Copy:
    """A tensor that nobody else has."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def take(self) -> Tensor:
        return self._tensor


class _Part:
    """This rank's part of a flat tensor that all ranks of an axis have."""

    def __init__(self, kept: _Kept, numel: int, axis: Axis) -> None:
        self._kept, self._numel, self._axis = kept, numel, axis

    def take(self) -> Tensor:
        """Gather the parts. A collective."""
        part = self._kept.take()
        full = part.new_empty(part.numel() * self._axis.size)
        all_gather(full, part, self._axis).wait()
        return full[: self._numel]


def _cut(flat: Tensor, into: Tensor, axis: Axis) -> None:
    """Copy this rank's part of a flat tensor, with zeros behind the last."""
    part = flat[axis.rank * into.numel() :][: into.numel()]
    into[: part.numel()].copy_(part)
    into[part.numel() :].zero_()


class _Packed:
    """An activation put away as flat memory."""

    def __init__(self, kept: _Kept, shape: Shape) -> None:
        self._kept, self._shape = kept, shape

    def take(self) -> Tensor:
        return self._shape.unflatten(self._kept.take())


class Keeper:
    """Puts the inputs of checkpointed functions away as the settings say."""

    def __init__(self, settings: Settings) -> None:
        self._axis = settings.parts
        places = settings.num_slots
        self._host = Host(Slots(places, on_host=True)) if settings.on_host else None
        # A part that goes on to the host is on the device for a moment only.
        self._parts = Slots(0 if settings.on_host else places, on_host=False)

    def hooks(self) -> saved_tensors_hooks:
        """The hooks under which one call of a function saves its inputs."""
        group = None if self._host is None else self._host.begin()
        return saved_tensors_hooks(partial(self._pack, group), _unpack)

    def _pack(self, group: Group | None, tensor: Tensor) -> _Kept:
        is_divided = 1 < self._axis.size <= tensor.numel()
        if not _is_activation(tensor) or not (is_divided or group):
            return _Here(tensor)
        flat, shape = Shape.flatten(tensor.detach())
        numel = flat.numel()
        if is_divided:
            part = self._parts.empty(-(-numel // self._axis.size), like=flat)
            _cut(flat, part, self._axis)
            flat = part
        # Without a group it has been divided, so it is a copy.
        kept: _Kept = group.put(flat) if group else _Copy(flat)
        return _Packed(_Part(kept, numel, self._axis) if is_divided else kept, shape)


def _is_activation(tensor: Tensor) -> bool:
    return (
        type(tensor) is Tensor
        and tensor.requires_grad
        and not tensor.is_leaf
        and tensor.layout == torch.strided
        and tensor.numel() > 0
    )


@torch.no_grad()
def _unpack(kept: _Kept) -> Tensor:
    return kept.take()
