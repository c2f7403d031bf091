"""DeepSpeed's calls. They configure the process, so there is one state here that changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from zeroshard.checkpointing.inputs import Keeper
from zeroshard.checkpointing.rng import MODEL_PARALLEL, RngTracker, device_generator
from zeroshard.checkpointing.segment import Segment, is_inside
from zeroshard.checkpointing.settings import Settings, model_parallel_axis, read_block
from zeroshard.config import Config
from zeroshard.core import world
from zeroshard.logs import show_messages

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

Result = TypeVar("Result")
Value = TypeVar("Value")

# The number that Megatron adds to a seed for streams that differ between model-parallel ranks.
_SEED_OFFSET = 2718


class _Process:
    """What was configured for this process; settings are replaced as a whole."""

    def __init__(self) -> None:
        self.is_configured = False
        self.tracker = RngTracker()
        self.use(Settings())

    def use(self, settings: Settings) -> None:
        """Let the functions called from now on follow these settings."""
        settings.check()
        self.settings = settings
        self.keeper = Keeper(settings) if settings.copies else None


_process = _Process()


def configure(
    mpu_: object | None = None,
    deepspeed_config: Config | str | Path | Mapping[str, object] | None = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Say how checkpointed functions keep their inputs; replaces what an earlier call said.

    Arguments that are not None go before the configuration's block ``activation_checkpointing``.

    Args:
        mpu_: an object that names the model-parallel group, or None where there is none.
        deepspeed_config: a configuration in any form that ``initialize`` takes.
        partition_activations: keep a part of each input on each model-parallel rank.
        contiguous_checkpointing: lay copies of inputs side by side in one buffer.
        num_checkpoints: checkpointed functions in one forward, the places in that buffer.
        checkpoint_in_cpu: keep inputs in host memory.
        synchronize: wait for the device where a checkpointed function begins and ends.
        profile: has no effect; the functions have names in the traces of torch.profiler.

    Raises:
        ConfigError: ``deepspeed_config`` is no valid configuration.
        UsageError: ``mpu_`` does not name a group, or ``num_checkpoints`` is no number.
    """
    show_messages(world.rank_so_far)
    block = read_block(deepspeed_config)
    _process.use(
        Settings(
            model_parallel=model_parallel_axis(mpu_),
            partition=_choose(partition_activations, block.partition_activations),
            on_host=_choose(checkpoint_in_cpu, block.cpu_checkpointing),
            contiguous=_choose(contiguous_checkpointing, block.contiguous_memory_optimization),
            num_checkpoints=_choose(num_checkpoints, block.number_checkpoints),
            synchronize=_choose(synchronize, block.synchronize_checkpoint_boundary),
            profile=_choose(profile, block.profile),
        )
    )
    _process.is_configured = True
    _process.settings.warn()


def _choose(argument: Value | None, configured: Value) -> Value:
    return configured if argument is None else argument


def is_configured() -> bool:
    """Whether `configure` has been called."""
    return _process.is_configured


def reset() -> None:
    """Give back the buffers that were made for inputs; the settings stay."""
    _process.use(_process.settings)


def set_num_layers(num_layers: int) -> None:
    """Set the number of checkpointed functions in one forward."""
    _process.use(replace(_process.settings, num_checkpoints=num_layers))


def partition_activations_in_checkpoint(partition_activation: bool) -> None:
    """Switch the division of inputs over model-parallel ranks on or off."""
    _process.use(replace(_process.settings, partition=partition_activation))
    _process.settings.warn()


def checkpoint(function: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Result:
    """Call a function whose intermediate results are computed again in backward, not kept.

    Gradients are those of a plain call, bit for bit, also with dropout and under autocast. The
    function may take and return anything. Tensors in lists, tuples and dicts are kept as
    configured; those inside other objects stay where they are.
    """
    return _checkpoint(function, args, kwargs)


def non_reentrant_checkpoint(
    function: Callable[..., Result], /, *args: Any, **kwargs: Any
) -> Result:
    """The same as `checkpoint`, which never uses reentrant autograd."""
    return _checkpoint(function, args, kwargs)


def _run(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    settings, keeper = _process.settings, _process.keeper
    segment = Segment(
        function, args, kwargs, tracker=_process.tracker, synchronize=settings.synchronize
    )
    # Inside another checkpointed function nothing is kept, inputs included.
    with nullcontext() if keeper is None or is_inside() else keeper.hooks():
        return torch_checkpoint(
            segment, *segment.take_tensors(), use_reentrant=False, preserve_rng_state=False
        )


# torch.compile compiles what a checkpointed function calls, not the bookkeeping around it.
_checkpoint: Any = torch.compiler.disable(_run)


def get_cuda_rng_tracker() -> RngTracker:
    """The named streams of random numbers of this process."""
    return _process.tracker


def model_parallel_cuda_manual_seed(seed: int) -> None:
    """Seed the device's generator, equally on all ranks of a model-parallel group.

    The stream "model-parallel-rng" of the tracker starts from another seed on each of them.
    """
    device_generator().manual_seed(seed)
    _process.tracker.reset()
    _process.tracker.add(MODEL_PARALLEL, _model_parallel_seed(seed))


def model_parallel_reconfigure_tp_seed(seed: int) -> None:
    """Seed the stream "model-parallel-rng" anew, and nothing else."""
    with _process.tracker.fork():
        device_generator().manual_seed(_model_parallel_seed(seed))


def _model_parallel_seed(seed: int) -> int:
    return seed + _SEED_OFFSET + _process.settings.model_parallel.rank
