"""Master weights and state of one unit that are kept off the device, for any torch optimizer.

An optimizer steps tensors where it finds them. So around its step the slices and their state are
those in the pipeline's buffers, and afterwards they are those of the depot again, to which the
buffers are copied back. What an optimizer makes in its first step is taken in then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zeroshard.core.unit import Unit
from zeroshard.optim.carriers import Load
from zeroshard.optim.flat_state import FlatState
from zeroshard.optim.pipeline import Pipeline

__all__ = ["FarState"]

_SMALL = 16  # a part of the master weights that is not worth much


@dataclass(frozen=True, slots=True)
class _Kept:
    """One tensor of a slice's state: where it is kept, and which tensor of the load has it.

    ``index`` is the slice of which the load's tensor has a part; None if it has this tensor alone.
    """

    piece: nn.Parameter
    name: str
    home: Tensor
    at: int
    index: int | None


class FarState:
    """What an optimizer has of one unit whose state depot is off the device."""

    def __init__(self, unit: Unit, flat: FlatState, inner: torch.optim.Optimizer) -> None:
        assert unit.master is not None, f"{unit.name} is frozen and has no state"
        self._unit, self._flat, self._inner = unit, flat, inner
        self._kept: list[_Kept] = []
        self._alone: list[Tensor] = []  # taken from the depot for what is no part of a flat tensor
        self.load = Load(unit.state, (unit.master,))

    def take_in(self) -> None:
        """Move state that somebody has put beside what is kept, such as a first step, to it."""
        if self._is_known():
            return
        if self._kept:  # what was in these homes may be on its way there, or read ahead
            self._unit.at_home(edits=True)
        assert self._unit.master is not None, "looked at before"
        homes: list[Tensor] = [self._unit.master]
        kept: list[_Kept] = []
        old, self._alone = self._alone, []
        flats: dict[tuple[str, torch.dtype], int] = {}
        are_flat = self._common()
        for index, piece in enumerate(self._unit.slices):
            state: dict[str, Any] = self._inner.state.get(piece, {})
            for name, value in state.items():
                if not _travels(value, piece):
                    continue
                key = (name, value.dtype)
                if value.shape == piece.shape and key in are_flat:
                    if key not in flats:
                        flats[key] = len(homes)
                        homes.append(self._flat.flat(*key))
                    home, at, part = self._flat.part(*key, index), flats[key], index
                else:
                    home = self._unit.state.take(value.numel(), value.dtype).view(value.shape)
                    self._alone.append(home)
                    at, part = len(homes), None
                    homes.append(home)
                if value.data_ptr() != home.data_ptr() or value.device != home.device:
                    home.copy_(value)
                    state[name] = home
                kept.append(_Kept(piece, name, home, at, part))
        for tensor in old:
            self._unit.state.give_back(tensor)
        self._flat.is_fresh = False
        self._kept, self.load = kept, Load(self._unit.state, tuple(homes))

    def _common(self) -> set[tuple[str, torch.dtype]]:
        """Names and dtypes of what nearly all of the shard has, so that a flat tensor is full."""
        numels: dict[tuple[str, torch.dtype], int] = {}
        for piece in self._unit.slices:
            for name, value in self._inner.state.get(piece, {}).items():
                if _travels(value, piece) and value.shape == piece.shape:
                    key = (name, value.dtype)
                    numels[key] = numels.get(key, 0) + value.numel()
        least = sum(piece.numel() for piece in self._unit.slices) * (1 - 1 / _SMALL)
        return {key for key, numel in numels.items() if numel >= least}

    def _is_known(self) -> bool:
        """Whether all state is where it is kept."""
        found = [
            (piece, name, value)
            for piece in self._unit.slices
            for name, value in self._inner.state.get(piece, {}).items()
            if _travels(value, piece)
        ]
        return len(found) == len(self._kept) and all(
            piece is kept.piece and name == kept.name and value.data_ptr() == kept.home.data_ptr()
            for (piece, name, value), kept in zip(found, self._kept, strict=True)
        )

    @contextmanager
    def visiting(self, pipeline: Pipeline) -> Iterator[None]:
        """Let slices and state be on the device inside, where the optimizer steps them."""
        unit = self._unit
        with pipeline.visiting(self.load) as tensors:
            unit.show_slices(tensors[0])
            shown = self._show(tensors)
            try:
                yield
                out = unit.shard_to_write()
                assert out is not None, "master weights off the device are not the shard on it"
                out.copy_(tensors[0])
            finally:
                self._hide(shown)
                assert unit.master is not None, "looked at before"
                unit.show_slices(unit.master)

    def _show(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        shown: list[Tensor] = []
        for kept in self._kept:
            tensor = tensors[kept.at]
            if kept.index is not None:
                tensor = self._unit.part_of(tensor, kept.index).view(kept.home.shape)
            self._inner.state[kept.piece][kept.name] = tensor
            shown.append(tensor)
        return shown

    def _hide(self, shown: Sequence[Tensor]) -> None:
        for kept, tensor in zip(self._kept, shown, strict=True):
            state = self._inner.state[kept.piece]
            if (value := state.get(kept.name)) is not None:
                if value is not tensor:  # not edited in place but made anew
                    tensor.copy_(value)
                state[kept.name] = kept.home

    @property
    def staying(self) -> list[Tensor]:
        """State that stays on the device, in tensors with dimensions."""
        return [
            value
            for piece in self._unit.slices
            for value in self._inner.state.get(piece, {}).values()
            if isinstance(value, Tensor) and value.dim() and not _travels(value, piece)
        ]

    def give_back(self) -> None:
        """End the use of the depot's memory."""
        for tensor in self._alone:
            self._unit.state.give_back(tensor)
        self._alone.clear()
        self._flat.give_back()


def _travels(value: object, piece: Tensor) -> bool:
    """Whether a piece of state is moved: plain tensors are; counts, tables and the like stay.

    So do tensors of classes of their own, of which nobody else knows what they consist of.
    """
    if type(value) is not Tensor or not value.dim():
        return False
    return value.shape == piece.shape or value.nbytes * _SMALL > piece.nbytes
