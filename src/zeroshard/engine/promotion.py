"""Optimizer state that comes back to the device, once steps have shown what is free there.

What a step takes is known after one. So training begins with all state off the device, and what no
step has needed by the end of the first whole one that was measured is given to the units that
forward uses first. That is decided once, by all ranks together.
"""

from __future__ import annotations

import logging

from zeroshard.core.collectives import Answered, Exchange
from zeroshard.core.mesh import Mesh
from zeroshard.engine.budget import in_words
from zeroshard.engine.fitting import Spare, promote
from zeroshard.engine.meter import Meter
from zeroshard.optim.sharded import ShardedOptimizer

__all__ = ["Promotion"]

_log = logging.getLogger(__name__)


class Promotion:
    """Brings the state of as many units back as there is room for.

    Args:
        sharded: steps the units.
        meter: measures the memory of this rank's device.
        mesh: the ranks.
    """

    def __init__(self, sharded: ShardedOptimizer, meter: Meter, mesh: Mesh) -> None:
        self._sharded, self._meter, self._mesh = sharded, meter, mesh
        self._is_measuring = self._is_over = False
        self.num_units = 0  # whose state has come back

    def end_step(self) -> None:
        """An optimizer step has ended; a collective when it is decided what comes back.

        The first step takes memory once that no other takes, so a peak begins after it. A step that
        was skipped may not have made all of the state.

        Raises:
            torch.OutOfMemoryError: somebody else has taken the memory meanwhile.
        """
        if self._is_over or self._sharded.overflow:
            return
        if not self._is_measuring:
            self._is_measuring = True
            self._meter.restart()
            return
        self._is_over = True
        self._bring_back()

    def _bring_back(self) -> None:
        far = self._sharded.far_bytes
        spare = max(self._meter.limit() - self._meter.read().peak, 0)
        rows = self._exchange([spare, self._sharded.buffer_bytes, *far.values()])
        free, buffers, *sizes = (
            min(row) if at < 2 else max(row) for at, row in enumerate(zip(*rows, strict=True))
        )
        units, numbers = list(far), promote(sizes, Spare(free, buffers))
        self.num_units = len(numbers)
        if numbers:
            self._sharded.bring_back([units[number] for number in numbers])
        back, total = sum(sizes[number] for number in numbers), sum(sizes)
        _log.info(
            "each rank: %s of %s of optimizer state came back to the device (%d of %d units), "
            "where steps had left %s.",
            in_words(back),
            in_words(total),
            len(numbers),
            len(units),
            in_words(free),
        )

    def _exchange(self, mine: list[int]) -> list[list[int]]:
        with Answered(self._mesh.rank, "to know how much state can come back to the devices"):
            return Exchange(self._mesh, len(mine))(mine)
