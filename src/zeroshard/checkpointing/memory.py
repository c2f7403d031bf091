"""Tensors as flat memory, and one buffer for many copies of equal size."""

# Whether a tensor was edited has no public name.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from zeroshard.errors import UsageError, compose

__all__ = ["Shape", "Slots", "edited_error"]

_Kind: TypeAlias = tuple[int, torch.dtype, torch.device]


@dataclass(frozen=True, slots=True)
class Shape:
    """How the elements of flat memory form a tensor."""

    size: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def flatten(cls, tensor: Tensor) -> tuple[Tensor, Shape]:
        """The elements in the order of memory, as a view unless there are gaps between them."""
        if torch.empty_like(tensor, device="meta").stride() != tensor.stride():
            tensor = tensor.clone()
        return tensor.as_strided((tensor.numel(),), (1,)), cls(tensor.size(), tensor.stride())

    def unflatten(self, flat: Tensor) -> Tensor:
        """The tensor again, as a view."""
        return flat.as_strided(self.size, self.stride)


def edited_error() -> UsageError:
    """Make the error of an input that is no longer what the function was called with."""
    return UsageError(
        compose(
            "an input of a checkpointed function was edited in place after the call had begun, so "
            "the function cannot run again on what it was given.",
            hint="clone the tensor before it is edited, or leave that function unchecked.",
        )
    )


class Slots:
    """Memory for copies of flat tensors, from one buffer for each size as long as it has places.

    A copy's place is free again when the tensor that was handed out for it is gone. With more
    copies alive than places, or no places at all, each of the others has memory of its own.
    """

    def __init__(self, places: int, *, on_host: bool) -> None:
        self._places, self._on_host = places, on_host
        self._free: dict[_Kind, list[Tensor]] = {}

    def empty(self, numel: int, like: Tensor) -> Tensor:
        """Flat memory for a copy; ``like`` has its dtype and the device it comes from."""
        kind = (numel, like.dtype, like.device)
        if kind not in self._free:
            self._drop_unused()
            places = self._allocate(self._places, kind) if self._places else ()
            self._free[kind] = list(places)
        free = self._free[kind]
        if not free:
            return self._allocate(1, kind)[0]
        place = free.pop()
        copy = place.view(-1)
        weakref.finalize(copy, free.append, place).atexit = False
        return copy

    def _drop_unused(self) -> None:
        """Forget sizes that nothing has any more, as after a change of the sequence length."""
        self._free = {kind: free for kind, free in self._free.items() if len(free) < self._places}

    def _allocate(self, places: int, kind: _Kind) -> Tensor:
        numel, dtype, device = kind
        return torch.empty(
            (places, numel),
            dtype=dtype,
            device="cpu" if self._on_host else device,
            pin_memory=self._on_host and device.type == "cuda",
        )
