"""How the ranks' full gradients become each rank's shard of their mean.

A reducer is a value that a unit is given, as its transport is. The collective is one; the other, in
`reductions.py`, reads the gradients where they are in the memory of other ranks.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from zeroshard.core.collectives import Averaging, Ticket, reduce_mean
from zeroshard.core.flat import FlatBuffer
from zeroshard.core.mesh import Mesh

__all__ = ["CollectiveReduction", "Reducer"]


class Reducer(Protocol):
    """A way to average a unit's full gradient over all ranks, which all ranks begin in one order.

    See [Note: streams] in `collectives.py`.
    """

    def room(self) -> FlatBuffer | None:
        """Where the full gradient that is reduced next is written; None for a unit's own buffer.

        The current stream waits until it may be written. `start` follows on all ranks.
        """
        ...

    def start(self, out: Tensor, wire: Tensor) -> Ticket:
        """Start writing this rank's shard of the mean into ``out``; ``wire`` is the full gradient.

        The content of ``wire`` is undefined afterwards, and ``out`` may be a part of it where it is
        the unit's own.
        """
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it holds on this rank, for all units that share it."""
        ...

    @property
    def in_turn(self) -> bool:
        """Whether gradients wait where they arrived, and are written when it is the unit's turn."""
        ...


class CollectiveReduction:
    """All ranks send each other their parts."""

    nbytes, in_turn = 0, False

    def __init__(self, mesh: Mesh, how: Averaging) -> None:
        self._mesh, self._how = mesh, how

    def room(self) -> None:
        """A unit's own buffer."""

    def start(self, out: Tensor, wire: Tensor) -> Ticket:
        """Start a reduce-scatter, or what takes its place."""
        return reduce_mean(out, wire, self._mesh, self._how)
