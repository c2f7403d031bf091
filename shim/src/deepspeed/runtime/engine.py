"""``deepspeed.runtime.engine``: the engine."""

from deepspeed._names import names
from zeroshard.engine.engine import Engine as DeepSpeedEngine

__all__ = ["DeepSpeedEngine"]

__getattr__, __dir__ = names(__name__)
