"""``deepspeed.checkpointing``: activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deepspeed._names import names
from zeroshard.checkpointing import RngTracker as CudaRNGStatesTracker
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
    "CheckpointFunction",
    "CudaRNGStatesTracker",
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


class CheckpointFunction:
    """What ``checkpoint`` calls in DeepSpeed, for programs that call it themselves."""

    @staticmethod
    def apply(run_function: Callable[..., Any], all_outputs: list[Any], *args: Any) -> Any:
        """Call ``checkpoint``, and append what it returns to ``all_outputs``, too."""
        outputs = checkpoint(run_function, *args)
        all_outputs += outputs if isinstance(outputs, (tuple, list)) else [outputs]
        return outputs


__getattr__, __dir__ = names(__name__)
