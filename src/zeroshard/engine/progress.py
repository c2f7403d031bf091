"""Lines in the log while something takes long, and none if it does not."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

__all__ = ["Progress"]

_log = logging.getLogger(__name__)

_EVERY_S = 5.0


class Progress:
    """How much of some units is done, told every few seconds."""

    def __init__(
        self,
        done: str,
        count: int,
        nbytes: int,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin.

        Args:
            done: the participle of what is done with them, such as "sharded".
            count: units in all.
            nbytes: their bytes in all.
            now: seconds on a clock.
        """
        self._done, self._now = done, now
        self._count, self._nbytes = count, nbytes
        self._units = self._bytes = 0
        self._told_at = now()

    def tell(self, nbytes: int) -> None:
        """One more unit, of so many bytes, is done."""
        self._units += 1
        self._bytes += nbytes
        if self._now() - self._told_at >= _EVERY_S:
            self._told_at = self._now()
            _log.info(
                "%s %d of %d units, %.1f of %.1f GB.",
                self._done,
                self._units,
                self._count,
                self._bytes / 1e9,
                self._nbytes / 1e9,
            )
