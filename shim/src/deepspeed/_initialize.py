"""``deepspeed.initialize``, which says once what it is that runs under this name."""

from __future__ import annotations

from functools import wraps
from typing import Any

import zeroshard
from zeroshard.engine import build

import deepspeed
from deepspeed._local_rank import HostRank
from deepspeed.utils.logging import logger

__all__ = ["initialize"]


@wraps(build.initialize)
def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """Call :func:`zeroshard.initialize`."""
    made = build.initialize(*args, **kwargs)
    engine = made[0]
    if engine.device.type == "cpu":
        engine.local_rank = HostRank(engine.local_rank)
    # Programs look for these words to know that DeepSpeed has taken over.
    logger.info(
        "DeepSpeed info: version=%s, run by zeroshard %s",
        deepspeed.__version__,
        zeroshard.__version__,
    )
    return made
