"""``deepspeed.runtime.base_optimizer``: the class of what ``initialize`` returns as optimizer."""

from deepspeed._names import names
from zeroshard.optim.sharded import ShardedOptimizer

__all__ = ["DeepSpeedOptimizer", "ZeROOptimizer"]

DeepSpeedOptimizer = ZeROOptimizer = ShardedOptimizer

__getattr__, __dir__ = names(__name__)
