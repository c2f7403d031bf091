"""``deepspeed.checkpoint``: what is written to files."""

from deepspeed._names import names

__getattr__, __dir__ = names(
    __name__,
    {"utils": "deepspeed.checkpoint.utils"},
    {
        "DeepSpeedCheckpoint": "engine.load_checkpoint reads checkpoints of any number of ranks",
        "ds_to_universal": "checkpoints need no conversion for another number of ranks",
    },
)
