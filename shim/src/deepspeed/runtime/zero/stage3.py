"""``deepspeed.runtime.zero.stage3``: the class of the returned optimizer."""

from deepspeed._names import names
from zeroshard.engine.optimizer import ZeroOptimizer as DeepSpeedZeroOptimizer_Stage3

__all__ = ["DeepSpeedZeroOptimizer_Stage3"]

__getattr__, __dir__ = names(__name__)
