"""``deepspeed.runtime.sequence_parallel``."""

from deepspeed._names import names

__getattr__, __dir__ = names(
    __name__, {"ulysses_sp": "deepspeed.runtime.sequence_parallel.ulysses_sp"}
)
