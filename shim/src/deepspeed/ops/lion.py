"""``deepspeed.ops.lion``: zeroshard's Lion, by DeepSpeed's arguments."""

from deepspeed._names import names
from zeroshard.optim.named import DeepSpeedCPULion, FusedLion

__all__ = ["DeepSpeedCPULion", "FusedLion"]

__getattr__, __dir__ = names(__name__)
