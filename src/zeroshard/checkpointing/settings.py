"""What `configure` settles: arguments over the configuration's block over defaults."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zeroshard.config import ActivationCheckpointing, Config, peek
from zeroshard.core.mesh import Axis
from zeroshard.errors import UsageError, compose

__all__ = ["Settings", "model_parallel_axis", "read_block"]

_log = logging.getLogger("zeroshard")

# Megatron's names, DeepSpeed's pipeline grid, and Megatron's older names.
_FAMILIES = ("tensor_model_parallel", "slice_parallel", "model_parallel")
_ALONE = Axis(size=1, rank=0)


@dataclass(frozen=True, slots=True)
class Settings:
    """How the inputs of checkpointed functions are kept until backward."""

    model_parallel: Axis = _ALONE
    partition: bool = False
    """Whether each model-parallel rank keeps its part of an input only."""
    on_host: bool = False
    """Whether inputs wait in host memory."""
    contiguous: bool = False
    """Whether copies of inputs lie in one buffer."""
    num_checkpoints: int | None = None
    """Checkpointed functions in one forward: the places in that buffer."""
    synchronize: bool = False
    """Whether the host waits for the device where a function begins and ends."""
    profile: bool = False
    """Whether times were asked for, which torch.profiler has."""

    @property
    def parts(self) -> Axis:
        """The ranks over which an input is divided."""
        return self.model_parallel if self.partition else _ALONE

    @property
    def copies(self) -> bool:
        """Whether what is kept is a copy, not the input itself."""
        return self.on_host or self.parts.size > 1

    @property
    def num_slots(self) -> int:
        """Places for copies in one buffer."""
        return self.num_checkpoints or 0 if self.contiguous else 0

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            UsageError: the number of checkpoints is not one.
        """
        number = self.num_checkpoints
        if number is not None and (type(number) is not int or number < 1):
            raise UsageError(f"num_checkpoints must be a whole number from 1, not {number!r}.")

    def warn(self) -> None:
        """Say which settings have no effect, and why."""
        if self.partition and self.parts.size == 1:
            _log.warning(
                "partition_activations has no effect: inputs are divided over the ranks of a "
                "model-parallel group, and there is none (pass mpu_ to configure)."
            )
        if self.contiguous and not self.copies:
            _log.warning(
                "contiguous_memory_optimization has no effect: without cpu_checkpointing or a "
                "model-parallel group to divide them over, inputs are kept where they are, and "
                "there are no copies to lay side by side."
            )
        elif self.contiguous and self.num_checkpoints is None:
            _log.warning(
                "contiguous_memory_optimization has no effect: nothing says how many places its "
                'buffer has. Set "number_checkpoints", or pass num_checkpoints to configure(); it '
                "is the number of layers if each layer is checkpointed."
            )
        if self.profile:
            _log.warning(
                "profile has no effect: torch.profiler shows checkpointed functions as "
                '"zeroshard::checkpoint" and "zeroshard::recompute".'
            )


def model_parallel_axis(mpu: object | None) -> Axis:
    """This rank's place in the model-parallel group that an ``mpu`` object describes.

    Raises:
        UsageError: the object does not have the methods of any kind of ``mpu``.
    """
    if mpu is None:
        return _ALONE
    for family in _FAMILIES:
        methods: list[Any] = [
            getattr(mpu, f"get_{family}_{what}", None) for what in ("world_size", "rank", "group")
        ]
        if all(callable(method) for method in methods):
            size, rank, group = (method() for method in methods)
            return Axis(size, rank, group, group) if size > 1 else _ALONE
    raise UsageError(
        compose(
            f"configure(): mpu_, a {type(mpu).__name__}, does not say which ranks share a model.",
            hint="give it get_model_parallel_world_size(), get_model_parallel_rank() and "
            "get_model_parallel_group(), or the same with tensor_model_parallel; or pass None.",
        )
    )


def read_block(
    config: Config | str | Path | Mapping[str, object] | None,
) -> ActivationCheckpointing:
    """The block ``activation_checkpointing`` of a configuration in any of its forms."""
    if config is None:
        return ActivationCheckpointing()
    loaded = config if isinstance(config, Config) else peek(config)
    return loaded.activation_checkpointing
