"""``deepspeed.ops.adam``: Adam and AdamW of torch, by DeepSpeed's arguments."""

from deepspeed._names import names
from zeroshard.optim.named import DeepSpeedCPUAdam, FusedAdam

__all__ = ["DeepSpeedCPUAdam", "FusedAdam"]

__getattr__, __dir__ = names(
    __name__, instead={"ZenFlowCPUAdam": "use DeepSpeedCPUAdam; there is no ZenFlow"}
)
