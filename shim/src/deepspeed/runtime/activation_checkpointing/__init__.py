"""``deepspeed.runtime.activation_checkpointing``."""

from deepspeed._names import names

__getattr__, __dir__ = names(__name__, {"checkpointing": "deepspeed.checkpointing"})
