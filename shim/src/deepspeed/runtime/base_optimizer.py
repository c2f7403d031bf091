"""``deepspeed.runtime.base_optimizer``: the class of the returned optimizer."""

from deepspeed._names import names
from zeroshard.engine.optimizer import ZeroOptimizer

__all__ = ["DeepSpeedOptimizer", "ZeROOptimizer"]

DeepSpeedOptimizer = ZeROOptimizer = ZeroOptimizer

__getattr__, __dir__ = names(__name__)
