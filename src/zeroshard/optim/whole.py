"""What an optimizer may know of whole parameters while it holds one slice of each.

[Note: whole parameters]
An element-wise optimizer steps slices without knowing it. One that needs more is a
:class:`WholeOptimizer`: it asks its ``whole`` for it. Until an engine takes the optimizer that is
:data:`ALONE`, for which parameters are whole already; the engine puts a :class:`Sharded` in its
place. The optimizer is then given the slices of all trained parameters, empty ones included, so
that every rank asks the same questions in the same order: the answers are collectives.
"""

# Torch's list operations have no public name.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from zeroshard.core.collectives import Answered, Ticket, all_gather, all_reduce_
from zeroshard.core.mesh import Mesh
from zeroshard.core.unit import Unit

__all__ = ["ALONE", "Alone", "Assembled", "Sharded", "Whole", "WholeOptimizer"]


@dataclass(frozen=True, slots=True)
class Assembled:
    """A whole tensor of which this rank held a part."""

    index: int
    """Position of the part among those that were given."""
    tensor: Tensor
    """The whole, in the shape of the parameter."""
    own: slice
    """Where the part lies in it, in elements."""

    def part_of(self, result: Tensor, like: Tensor) -> Tensor:
        """Cut from a tensor as large as the whole what lies where this rank's part does."""
        return result.reshape(-1)[self.own].view_as(like)


class Whole(Protocol):
    """Answers about whole parameters; each question is a collective."""

    def norms(self, parts: list[Tensor]) -> Tensor:
        """L2 norms of the tensors that ranks hold ``parts`` of, in fp64."""
        ...

    def assemble(self, slices: list[Tensor], parts: list[Tensor]) -> Iterator[Assembled]:
        """Whole tensors, one after another, of those that this rank holds a part of.

        ``parts`` are shaped like ``slices`` and of one dtype. The iterator must be exhausted.
        """
        ...


def _squares(parts: list[Tensor]) -> Tensor:
    # In fp64, so that it makes no difference to an fp32 result how parameters are cut.
    return torch.stack(torch._foreach_norm(parts, 2, dtype=torch.float64)).square()


class Alone:
    """Parameters that are whole already, as in plain torch."""

    def norms(self, parts: list[Tensor]) -> Tensor:
        """L2 norms of ``parts``, in fp64."""
        return _squares(parts).sqrt()

    def assemble(self, slices: list[Tensor], parts: list[Tensor]) -> Iterator[Assembled]:
        """Give ``parts`` themselves."""
        for index, part in enumerate(parts):
            if part.numel():
                yield Assembled(index, part, slice(None))


ALONE = Alone()


class WholeOptimizer(torch.optim.Optimizer):
    """An optimizer that needs to know more than slices. See [Note: whole parameters]."""

    whole: Whole = ALONE


@dataclass(frozen=True, slots=True)
class _Gather:
    """A unit's parts on the way to all ranks."""

    unit: Unit
    indices: Sequence[int]
    full: Tensor
    ticket: Ticket


class Sharded:
    """Slices of units that are cut into shards: asks the ranks of the shard axis.

    A rank owns one range of each unit, so the tensors that overlap it are few: all but those at its
    two ends are its own. :meth:`assemble` therefore gathers a unit once and lets each rank work on
    what overlaps its range. Tensors across a border are worked on twice; in exchange results need
    no second collective.
    """

    def __init__(self, units: Sequence[Unit], mesh: Mesh) -> None:
        self._mesh = mesh
        self._places: dict[Tensor, tuple[Unit, int]] = {
            piece: (unit, index) for unit in units for index, piece in enumerate(unit.slices)
        }

    def norms(self, parts: list[Tensor]) -> Tensor:
        """L2 norms of the tensors that ranks hold ``parts`` of, in fp64, by one all-reduce."""
        squares = _squares(parts)
        with Answered(self._mesh.rank, "norms of whole parameters for its step"):
            all_reduce_(squares, self._mesh.shard)
        return squares.sqrt()

    def assemble(self, slices: list[Tensor], parts: list[Tensor]) -> Iterator[Assembled]:
        """Whole tensors that overlap this rank's ranges, by one gather for each unit concerned.

        The next unit is on its way while one is worked on.
        """
        concerned: dict[Unit, list[int]] = {}
        for index, piece in enumerate(slices):
            concerned.setdefault(self._places[piece][0], []).append(index)
        under_way: _Gather | None = None
        for unit, indices in concerned.items():
            following = self._start(unit, indices, slices, parts)
            if under_way is not None:
                yield from self._finish(under_way, slices)
            under_way = following
        if under_way is not None:
            yield from self._finish(under_way, slices)

    def _start(
        self,
        unit: Unit,
        indices: Sequence[int],
        slices: list[Tensor],
        parts: list[Tensor],
    ) -> _Gather:
        layout, rank = unit.layout, self._mesh.shard.rank
        full = parts[indices[0]].new_empty(layout.full_numel)
        mine = full[layout.shard(rank).slice()].zero_()
        for index in indices:
            at = layout.slice_of(self._places[slices[index]][1], rank)
            mine[at.slice()] = parts[index].reshape(-1)
        with Answered(self._mesh.rank, f"whole parameters of {unit.name} for its step"):
            return _Gather(unit, indices, full, all_gather(full, mine, self._mesh.shard))

    def _finish(self, gather: _Gather, slices: list[Tensor]) -> Iterator[Assembled]:
        unit = gather.unit
        with Answered(self._mesh.rank, f"whole parameters of {unit.name} for its step"):
            gather.ticket.wait()
        for index in gather.indices:
            position = self._places[slices[index]][1]
            own = unit.layout.owned(position, self._mesh.shard.rank)
            if own.numel:
                whole = gather.full[unit.layout.full(position).slice()]
                yield Assembled(index, whole.view(unit.shapes[position]), own.slice())
