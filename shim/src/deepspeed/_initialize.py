"""``deepspeed.initialize``, which says once what it is that runs under this name."""

from __future__ import annotations

from functools import wraps
from typing import Any

import deepspeed
import zeroshard
from deepspeed import _attributes
from deepspeed._local_rank import HostRank
from deepspeed.utils.logging import logger
from zeroshard.engine import build

__all__ = ["initialize"]


_attributes.install()


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
