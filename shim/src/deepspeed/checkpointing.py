"""``deepspeed.checkpointing``: activation checkpointing."""

from deepspeed._names import names
from zeroshard.checkpointing import (
    checkpoint,
    configure,
    get_cuda_rng_tracker,
    is_configured,
    model_parallel_cuda_manual_seed,
    model_parallel_reconfigure_tp_seed,
    non_reentrant_checkpoint,
    partition_activations_in_checkpoint,
    reset,
    set_num_layers,
)

__all__ = [
    "checkpoint",
    "configure",
    "get_cuda_rng_tracker",
    "is_configured",
    "model_parallel_cuda_manual_seed",
    "model_parallel_reconfigure_tp_seed",
    "non_reentrant_checkpoint",
    "partition_activations_in_checkpoint",
    "reset",
    "set_num_layers",
]

__getattr__, __dir__ = names(
    __name__,
    instead={
        "CheckpointFunction": "call deepspeed.checkpointing.checkpoint(function, *args)",
        "CudaRNGStatesTracker": "deepspeed.checkpointing.get_cuda_rng_tracker() returns the one "
        "there is",
    },
)
