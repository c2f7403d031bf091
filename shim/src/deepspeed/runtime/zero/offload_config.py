"""``deepspeed.runtime.zero.offload_config``: what of the model state is moved, and where to."""

from __future__ import annotations

from enum import Enum

from deepspeed._names import names
from zeroshard.zero import OffloadStateTypeEnum

__all__ = ["OffloadDeviceEnum", "OffloadStateTypeEnum"]


class OffloadDeviceEnum(str, Enum):
    """Places for model state."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


__getattr__, __dir__ = names(__name__)
