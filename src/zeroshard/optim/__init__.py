"""Optimizers and learning rate schedules, over slices or whole parameters."""

from zeroshard.optim.elementwise import Lion, UncorrectedAdam
from zeroshard.optim.groups import momentum_of
from zeroshard.optim.lamb import Lamb
from zeroshard.optim.muon import Muon, muon_groups
from zeroshard.optim.schedules import (
    VALID_LR_SCHEDULES,
    LRRangeTest,
    OneCycle,
    WarmupCosineLR,
    WarmupDecayLR,
    WarmupLR,
)

__all__ = [
    "VALID_LR_SCHEDULES",
    "LRRangeTest",
    "Lamb",
    "Lion",
    "Muon",
    "OneCycle",
    "UncorrectedAdam",
    "WarmupCosineLR",
    "WarmupDecayLR",
    "WarmupLR",
    "momentum_of",
    "muon_groups",
]
