"""Activation checkpointing with DeepSpeed's calls.

Recomputation is torch's own (``torch.utils.checkpoint``, non-reentrant), which the hooks of all
stages live with. What is added is where inputs wait for it (whole, in parts over model-parallel
ranks, in host memory, in one buffer), named streams of random numbers, and DeepSpeed's names.

`configure` sets up the whole process, because that is what scripts written for DeepSpeed call: the
functions that a model checkpoints do not know which engine they will run in.
"""

from __future__ import annotations

from zeroshard.checkpointing.process import (
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
from zeroshard.checkpointing.rng import RngTracker

__all__ = [
    "RngTracker",
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
