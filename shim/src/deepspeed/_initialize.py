"""``deepspeed.initialize``, which says once what it is that runs under this name."""

from __future__ import annotations

from functools import wraps
from typing import Any, cast

import deepspeed
import zeroshard
from deepspeed import _attributes
from deepspeed._local_rank import HostRank
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.utils.logging import logger
from zeroshard.engine import build

__all__ = ["initialize"]


_attributes.install()


@wraps(build.initialize)
def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """Call :func:`zeroshard.initialize`."""
    engine, optimizer, loader, scheduler = build.initialize(*args, **kwargs)
    if engine.device.type == "cpu":
        engine.local_rank = cast("int", HostRank(engine.local_rank))
    if engine.zero_optimization_stage() == 3:
        hooks = DeepSpeedZeRoOffload(engine.runtime)
        if optimizer is None:  # then programs look for the hooks in its place
            engine.optimizer = optimizer = hooks
        else:
            optimizer.parameter_offload = hooks
    # Programs look for these words to know that DeepSpeed has taken over.
    logger.info(
        "DeepSpeed info: version=%s, run by zeroshard %s",
        deepspeed.__version__,
        zeroshard.__version__,
    )
    return engine, optimizer, loader, scheduler
