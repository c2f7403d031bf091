"""``deepspeed.runtime.activation_checkpointing.checkpointing``: that of ``deepspeed``."""

from deepspeed._names import names
from deepspeed.checkpointing import *  # noqa: F403

__getattr__, __dir__ = names(__name__)
