"""How many bytes blocks may keep for backward: a number, or what a device has left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from zeroshard.engine.budget import Overhead, Shape, factor, in_words, overhead
from zeroshard.engine.meter import Meter

__all__ = ["Fixed", "Measured", "Space"]

# Steps after which the peak is read, once memory that only the first step takes is there; and again
# after a pass that is much larger than those before.
_READINGS = 4
_READINGS_OF_A_LARGER_PASS = 2


class Space(Protocol):
    """Says how many bytes blocks may keep."""

    @property
    def is_settled(self) -> bool:
        """Whether the answer will stay what it is as long as batches do."""
        ...

    def begin(self) -> None:
        """A pass begins."""
        ...

    def room(self, shape: Shape, given: int) -> int:
        """Bytes that the blocks of a pass may keep.

        Args:
            shape: of the first call of a block.
            given: bytes of the blocks' inputs, which are kept in any case.
        """
        ...

    def end(self, shape: Shape, kept: int) -> None:
        """A pass has ended in which blocks kept so many bytes."""
        ...

    def fail(self) -> None:
        """The device ran out of memory in a pass, and blocks keep less for it already."""
        ...

    def end_step(self) -> bool:
        """An optimizer step has ended; say whether the device ran short of memory in it."""
        ...

    def describe(self) -> str:
        """What a log line adds to the numbers of blocks."""
        ...


class Fixed:
    """A number of bytes for all that blocks hold from forward to backward."""

    is_settled = True

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes

    def begin(self) -> None:
        """Nothing is measured."""

    def room(self, shape: Shape, given: int) -> int:
        """What is left of the number beside the inputs."""
        return self._nbytes - given

    def end(self, shape: Shape, kept: int) -> None:
        """Nothing is measured."""

    def fail(self) -> None:
        """Nothing is measured."""

    def end_step(self) -> bool:
        """Nothing is measured."""
        return False

    def describe(self) -> str:
        """The number."""
        return f"budget {in_words(self._nbytes)}"


class Measured:
    """What a device has left, by what its allocator says after each of the first steps.

    A step takes what stays between steps, what blocks keep, and an overhead, which is measured. One
    measured with fewer kept blocks is not too small for more of them: so the number of blocks grows
    towards the limit from below.

    In the first steps all ranks take the least room of all.
    """

    def __init__(self, meter: Meter, agree: Callable[[int], int]) -> None:
        self._meter, self._agree = meter, agree
        self._known: list[Overhead] = []
        self._passes: dict[Shape, int] = {}  # of this step, with the least bytes that blocks kept
        self._readings_due = self._agreements_due = _READINGS
        self._has_begun = self._has_stepped = False
        self._limit, self._ceiling = 0, 0
        meter.restart()
        memory = meter.read()
        self._stays, self._shortages = memory.allocated, memory.shortages
        self._peak = 0

    @property
    def is_settled(self) -> bool:
        """Whether no reading is due."""
        return not self._readings_due

    def begin(self) -> None:
        """A pass begins; what ran short before the first one of a step is not its doing."""
        if not self._has_begun:
            self._has_begun = True
            self._shortages = self._meter.read().shortages

    def room(self, shape: Shape, given: int) -> int:
        """What is left beside everything else; nothing for a pass much larger than those known."""
        if not self._has_stepped:
            return 0
        known = overhead(shape, self._known)
        if known is None:
            if not self._readings_due:
                # The peak so far is that of passes before this one, which had other sizes.
                self._meter.restart()
                self._passes.clear()
            self._readings_due = max(self._readings_due, _READINGS_OF_A_LARGER_PASS)
            return 0
        return min(self._limit - self._stays - known, self._ceiling)

    def end(self, shape: Shape, kept: int) -> None:
        """Take note of what a pass kept: its part of the step's peak, at most."""
        self._passes[shape] = min(kept, self._passes.get(shape, kept))

    def fail(self) -> None:
        """What the allocator counts of it is not to be answered once more."""
        self._shortages = self._meter.read().shortages

    def end_step(self) -> bool:
        """Read the peak if that is due, agree on the room if that is; a collective then."""
        memory = self._meter.read()
        # While the number of blocks grows, memory that is cached in pieces of other sizes has to be
        # given back once; that says nothing about how much fits.
        is_steady = self._has_begun and not self._readings_due
        is_short = is_steady and memory.shortages > self._shortages
        if self._readings_due and self._passes:
            for shape, kept in self._passes.items():
                self._learn(Overhead(shape, max(memory.peak - self._stays - kept, 0)))
            self._limit, self._peak = self._meter.limit(), memory.peak
            self._readings_due -= 1
            self._meter.restart()
        self._stays, self._has_stepped = memory.allocated, True
        if self._agreements_due:
            rooms = [
                max(self._limit - self._stays - known, 0)
                for shape in self._passes
                if (known := overhead(shape, self._known)) is not None
            ]
            agreed = self._agree(min(rooms, default=-1))
            if agreed >= 0:  # else some rank has not trained any block so far
                self._ceiling = agreed
                self._agreements_due -= 1
        self._passes.clear()
        self._has_begun = False
        return is_short

    def _learn(self, new: Overhead) -> None:
        """Replace what is known of such passes, and of smaller ones that took more."""

        def is_worse(old: Overhead) -> bool:
            by = factor(old.shape, new.shape)
            return by is not None and by <= 1 and old.nbytes >= new.nbytes

        kept = [old for old in self._known if old.shape != new.shape and not is_worse(old)]
        self._known = [*kept, new]

    def describe(self) -> str:
        """The peak that was read last, and the limit."""
        return f"peak {in_words(self._peak)} of {in_words(self._limit)}"
