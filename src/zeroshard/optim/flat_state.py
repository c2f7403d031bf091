"""The optimizer's state of a unit as flat tensors, in the unit's depot.

[Note: flat state]
Gradient and master weights of a unit are flat tensors, and here an optimizer's averages are, too.
What ``optimizer.state`` holds for a slice are views of them, under torch's own names. So whoever
reads or edits state by parameter finds it where torch has it, and whatever steps a unit or moves
its state does so with a few large tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zeroshard.core.depot import Depot
from zeroshard.core.unit import Unit

__all__ = ["FlatState"]


class FlatState:
    """The flat tensors of one unit's state, by the names that the optimizer gives their parts."""

    def __init__(self, unit: Unit) -> None:
        self._unit = unit
        self.is_fresh = True  # nobody has seen it, so all of it is zero
        self._flats: dict[tuple[str, torch.dtype], Tensor] = {}

    def flat(self, name: str, dtype: torch.dtype) -> Tensor:
        """The flat tensor of a name and dtype, zeros when it is first asked for."""
        flat = self._flats.get((name, dtype))
        if flat is None:
            numel = self._unit.layout.shard_numel
            flat = self._flats[name, dtype] = self._unit.state.take(numel, dtype)
        return flat

    def part(self, name: str, dtype: torch.dtype, index: int) -> Tensor:
        """What of it belongs to a slice; it keeps no more than the memory: it may be exchanged."""
        shape = self._unit.slices[index].shape
        return self._unit.part_of(self.flat(name, dtype), index).view(shape).data

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(flat.nbytes for flat in self._flats.values())

    def follow(self, before: Depot) -> None:
        """Move them from the depot that the unit has left to the one it has now."""
        for key, flat in list(self._flats.items()):
            moved = self._unit.state.take(flat.numel(), flat.dtype)
            self._flats[key] = moved.copy_(flat)
            before.give_back(flat)

    def give_back(self) -> None:
        """End the use of all of them."""
        for flat in self._flats.values():
            self._unit.state.give_back(flat)
        self._flats.clear()
        self.is_fresh = True
