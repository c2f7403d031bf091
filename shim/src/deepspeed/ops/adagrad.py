"""``deepspeed.ops.adagrad``: Adagrad of torch, by DeepSpeed's arguments."""

from deepspeed._names import names
from zeroshard.optim.named import DeepSpeedCPUAdagrad

__all__ = ["DeepSpeedCPUAdagrad"]

__getattr__, __dir__ = names(__name__)
