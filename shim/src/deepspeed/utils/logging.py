"""``deepspeed.utils.logging``: zeroshard's logger, under whose name all its messages come."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from deepspeed._names import names
from zeroshard.core.world import rank_so_far

__all__ = ["log_dist", "logger"]

logger = logging.getLogger("zeroshard")


def log_dist(message: str, ranks: Iterable[int] | None = None, level: int = logging.INFO) -> None:
    """Log a message on some ranks; on all of them where none is named or -1 is."""
    wanted = [*(ranks or [-1])]
    if -1 in wanted or rank_so_far() in wanted:
        logger.log(level, "[rank %d] %s", rank_so_far(), message)


__getattr__, __dir__ = names(
    __name__,
    instead={
        "print_json_dist": "log_dist(json.dumps(message), ranks=[0]) logs it",
        "warning_once": "logger.warning logs it",
    },
)
