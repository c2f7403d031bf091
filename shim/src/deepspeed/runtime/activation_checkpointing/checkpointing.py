"""``deepspeed.runtime.activation_checkpointing.checkpointing``: ``deepspeed.checkpointing``."""

from deepspeed import checkpointing
from deepspeed._names import names

__getattr__, __dir__ = names(
    __name__, {name: f"deepspeed.checkpointing:{name}" for name in checkpointing.__all__}
)
