"""How full parameters are made of the ranks' shards.

A transport is a value that a unit is given, as its store is. The collective is one; the other,
in `pulled.py`, reads the shards where they are in the memory of other ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from torch import Tensor

from zeroshard.core.collectives import Ticket, all_gather
from zeroshard.core.mesh import Axis
from zeroshard.errors import DistributedError

__all__ = ["COLLECTIVE", "Collective", "Shared", "Transport", "rewriting"]


class Shared(Protocol):
    """Memory of this rank in which other ranks read its shards, whenever they like."""

    def fence(self) -> None:
        """Go on when all ranks have come here, after what they read and wrote. A collective.

        On GPUs it is the compute stream that waits, not the host.
        """
        ...


class Transport(Protocol):
    """A way to fill a unit's full buffer."""

    @property
    def memory(self) -> Shared | None:
        """Where other ranks read the shard; None if they are sent it.

        A rank gathers alone if it reads, and together with all others if they send.
        """
        ...

    def gather(self, full: Tensor, shard: Tensor, axis: Axis) -> Ticket:
        """Start filling ``full`` with the shards of all ranks of an axis; ``shard`` is this one's.

        See [Note: streams] in `collectives.py`.
        """
        ...


class Collective:
    """All ranks of the axis gather together, in one order."""

    @property
    def memory(self) -> None:
        """Shards are sent."""
        return None

    def gather(self, full: Tensor, shard: Tensor, axis: Axis) -> Ticket:
        """Start an all-gather."""
        return all_gather(full, shard, axis)


COLLECTIVE: Final[Transport] = Collective()


@contextmanager
def rewriting(transports: Iterable[Transport]) -> Iterator[None]:
    """Shards are changed inside, on all ranks. A collective where other ranks read them.

    Nothing is changed before every rank has read what it wants of the old values, and nothing is
    read before every rank has changed its own.
    """
    memories = dict.fromkeys(each.memory for each in transports if each.memory is not None)
    for memory in memories:
        memory.fence()
    try:
        yield
    except DistributedError:  # nobody is there to go on
        memories.clear()
        raise
    finally:  # a rank that raises lets the others go on
        for memory in memories:
            memory.fence()
