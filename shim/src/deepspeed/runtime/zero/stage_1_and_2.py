"""``deepspeed.runtime.zero.stage_1_and_2``: the class of the returned optimizer."""

from deepspeed._names import names
from zeroshard.engine.optimizer import ZeroOptimizer as DeepSpeedZeroOptimizer

__all__ = ["DeepSpeedZeroOptimizer"]

__getattr__, __dir__ = names(__name__)
