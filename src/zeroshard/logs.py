"""Where messages go in a program that set up no logging of its own.

Without handlers, Python's logging drops progress lines and prints each warning once per rank. So
this package brings a handler for its own logger, which gives way as soon as the program has one.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

__all__ = ["show_messages"]

_LOGGER = logging.getLogger("zeroshard")


class _Fallback(logging.Handler):
    """Writes to stderr: on rank 0 everything, on other ranks errors only."""

    def __init__(self, rank: Callable[[], int]) -> None:
        super().__init__()
        self._rank = rank

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers:
            return  # the program's own logging shows it
        if record.levelno < logging.ERROR and self._rank() != 0:
            return
        print(self.format(record), file=sys.stderr, flush=True)

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        return f"zeroshard: {level}{super().format(record)}"


def show_messages(rank: Callable[[], int]) -> None:
    """Show progress lines and warnings once, on rank 0, unless the program shows them itself.

    Args:
        rank: says which rank this is, when a message is written.
    """
    if any(isinstance(handler, _Fallback) for handler in _LOGGER.handlers):
        return
    _LOGGER.addHandler(_Fallback(rank))
    if _LOGGER.level == logging.NOTSET:
        _LOGGER.setLevel(logging.INFO)
