"""``deepspeed.runtime.dataloader``: loaders."""

from deepspeed._names import names
from zeroshard.engine.data import RepeatingLoader
from zeroshard.engine.data import ShardedLoader as DeepSpeedDataLoader

__all__ = ["DeepSpeedDataLoader", "RepeatingLoader"]

__getattr__, __dir__ = names(__name__)
