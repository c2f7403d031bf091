"""``deepspeed.ops.lamb``: zeroshard's LAMB."""

from deepspeed._names import names
from zeroshard.optim import Lamb as FusedLamb

__all__ = ["FusedLamb"]

__getattr__, __dir__ = names(__name__)
