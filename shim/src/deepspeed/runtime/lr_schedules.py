"""``deepspeed.runtime.lr_schedules``: schedules of the learning rate."""

from deepspeed._names import names
from zeroshard.optim.schedules import (
    VALID_LR_SCHEDULES,
    LRRangeTest,
    OneCycle,
    WarmupCosineLR,
    WarmupDecayLR,
    WarmupLR,
)

__all__ = [
    "LR_RANGE_TEST",
    "ONE_CYCLE",
    "VALID_LR_SCHEDULES",
    "WARMUP_COSINE_LR",
    "WARMUP_DECAY_LR",
    "WARMUP_LR",
    "LRRangeTest",
    "OneCycle",
    "WarmupCosineLR",
    "WarmupDecayLR",
    "WarmupLR",
]

LR_RANGE_TEST = LRRangeTest.__name__
ONE_CYCLE = OneCycle.__name__
WARMUP_COSINE_LR = WarmupCosineLR.__name__
WARMUP_DECAY_LR = WarmupDecayLR.__name__
WARMUP_LR = WarmupLR.__name__

__getattr__, __dir__ = names(
    __name__,
    instead={
        "add_tuning_arguments": "declare the arguments in your parser, and put the schedule into "
        'the "scheduler" block of the configuration'
    },
)
