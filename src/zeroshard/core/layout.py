"""How a unit is cut into shards: pure integer arithmetic, no tensor and no process group.

A unit's parameters lie one after another in a flat buffer. The buffer is padded so that it divides
evenly over the shard axis; rank ``r`` owns the ``r``-th of ``world`` equal ranges. The cut ignores
parameter borders, so a parameter may be owned by several ranks and a rank may own none of it.
Every parameter starts at a multiple of ``align`` elements because matrix kernels are slower on
operands that are not aligned to 16 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["Layout", "Range"]


class Range(NamedTuple):
    """A half-open range of elements."""

    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements in the range."""
        return self.stop - self.start

    def slice(self) -> slice:
        """The same range as a Python slice."""
        return slice(self.start, self.stop)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Layout:
    """Where each parameter of a unit lies in the flat buffer, and which part each rank owns.

    Args:
        numels: elements of each parameter, in order.
        world: size of the shard axis.
        align: every parameter and every shard starts at a multiple of this many elements.
    """

    numels: tuple[int, ...]
    world: int
    align: int = 1
    offsets: tuple[int, ...] = field(init=False)
    shard_numel: int = field(init=False)

    def __post_init__(self) -> None:
        assert self.world >= 1 and self.align >= 1, "a layout needs a positive world and alignment"
        offsets: list[int] = []
        end = 0
        for numel in self.numels:
            start = _round_up(end, self.align)
            offsets.append(start)
            end = start + numel
        # Never zero, so that a unit of zero-sized parameters still has a buffer to communicate.
        shard = max(_round_up(-(-end // self.world), self.align), self.align)
        object.__setattr__(self, "offsets", tuple(offsets))
        object.__setattr__(self, "shard_numel", shard)

    @property
    def full_numel(self) -> int:
        """Elements of the whole flat buffer, padding included."""
        return self.shard_numel * self.world

    def full(self, index: int) -> Range:
        """The range of parameter ``index`` in the flat buffer."""
        start = self.offsets[index]
        return Range(start, start + self.numels[index])

    def shard(self, rank: int) -> Range:
        """The range of the flat buffer that ``rank`` owns."""
        return Range(rank * self.shard_numel, (rank + 1) * self.shard_numel)

    def owned(self, index: int, rank: int) -> Range:
        """The part of parameter ``index`` that ``rank`` owns, in the parameter's own elements."""
        return self.within(index, self.shard(rank))

    def within(self, index: int, part: Range) -> Range:
        """What of parameter ``index`` lies in a part of the flat buffer, in its own elements."""
        full = self.full(index)
        start = min(max(part.start - full.start, 0), full.numel)
        stop = min(max(part.stop - full.start, 0), full.numel)
        return Range(start, stop)

    def slice_of(self, index: int, rank: int) -> Range:
        """The part of parameter ``index`` that ``rank`` owns, in elements of the rank's shard."""
        owned = self.owned(index, rank)
        start = self.full(index).start + owned.start - self.shard(rank).start
        start = min(max(start, 0), self.shard_numel)
        return Range(start, start + owned.numel)

    def cuts(self, rank: int) -> tuple[list[int], list[int]]:
        """How to split a rank's shard in one go: sizes that cover it, and which belongs to whom.

        Returns:
            The sizes, padding included, and for each parameter the position of its slice in them.
        """
        sizes: list[int] = []
        at: list[int] = []
        end = 0
        for index in range(len(self.numels)):
            start, stop = self.slice_of(index, rank)
            if start > end:
                sizes.append(start - end)
            at.append(len(sizes))
            sizes.append(stop - start)
            end = max(end, stop)
        return [*sizes, self.shard_numel - end], at

    def gaps(self) -> Sequence[Range]:
        """The ranges of the flat buffer that belong to no parameter."""
        ranges: list[Range] = []
        end = 0
        for index in range(len(self.numels)):
            full = self.full(index)
            if full.start > end:
                ranges.append(Range(end, full.start))
            end = full.stop
        if end < self.full_numel:
            ranges.append(Range(end, self.full_numel))
        return ranges
