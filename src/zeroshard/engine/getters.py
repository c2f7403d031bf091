"""What a training loop asks an engine, by DeepSpeed's names. Answers only: nothing changes here."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from zeroshard.checkpoint.manifest import Writer
from zeroshard.config import Batch, Config
from zeroshard.core.mesh import Mesh
from zeroshard.engine.optimizer import ZeroOptimizer
from zeroshard.optim.sharded import ShardedOptimizer

__all__ = ["Getters"]


def _configured(*keys: str) -> Callable[[Any], Any]:
    """A method that answers with the configuration's value under ``keys``."""

    def answer(engine: Getters) -> Any:
        return reduce(getattr, keys, engine.configuration)

    answer.__name__ = keys[-1]
    answer.__doc__ = f"What is configured as ``{'.'.join(keys)}``."
    return answer


def _zero(key: str) -> Callable[[Any], Any]:
    return _configured("zero_optimization", key)


class Getters(nn.Module):
    """The part of the engine that answers questions; the engine sets what they are answered by."""

    mesh: Mesh
    batch: Batch
    configuration: Config
    mp_world_size = 1
    loaded_checkpoint_dp_world_size: int | None = None
    _sharded: ShardedOptimizer | None
    _optimizer: ZeroOptimizer | None
    _shown_optimizer: Any

    @property
    def config(self) -> dict[str, Any]:
        """The configuration as a dict with DeepSpeed's keys, defaults and batch included."""
        return self.configuration.model_dump() | {
            "train_batch_size": self.batch.train,
            "train_micro_batch_size_per_gpu": self.batch.micro,
            "gradient_accumulation_steps": self.batch.accumulation,
        }

    @property
    def dp_world_size(self) -> int:
        """Number of ranks that train on different samples: all of them."""
        return self.mesh.world

    # Batches

    def train_batch_size(self) -> int:
        """Samples per optimizer step over all ranks."""
        return self.batch.train

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples per micro-step on one rank."""
        return self.batch.micro

    def gradient_accumulation_steps(self) -> int:
        """Micro-steps per optimizer step."""
        return self.batch.accumulation

    def get_batch_info(self) -> tuple[int, int, int]:
        """The three numbers above, in this order."""
        return self.batch.train, self.batch.micro, self.batch.accumulation

    # Optimizer

    @property
    def optimizer(self) -> Any:
        """What ``initialize`` returned as the optimizer; it steps slices of the parameters.

        Set to something else, that is what programs find here; the engine steps its own.
        """
        return self._shown_optimizer

    @optimizer.setter
    def optimizer(self, shown: Any) -> None:
        self._shown_optimizer = shown

    @property
    def basic_optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer inside, which was given to ``initialize`` or built there.

        Nothing waits for it. State that is kept off the device is all there once
        ``engine.optimizer.state`` was asked for.
        """
        return self._sharded.inner if self._sharded else None

    @property
    def loss_scale(self) -> float:
        """The factor on the loss; 1 unless training in fp16."""
        return self._sharded.scaler.scale if self._sharded and self._sharded.scaler else 1.0

    def get_global_grad_norm(self) -> Tensor | None:
        """L2 norm of the last step's averaged gradients before clipping; None before the first."""
        return self._sharded.norm if self._sharded else None

    def get_lr(self) -> list[float]:
        """Learning rate of every param group."""
        return self._of_groups("lr")

    def get_mom(self) -> list[Any]:
        """Momentum of every param group, or its betas where it has those."""
        groups = self._optimizer.param_groups if self._optimizer else []
        return [group.get("momentum", group.get("betas", 0.0)) for group in groups]

    def get_type(self) -> list[Any]:
        """What every param group has under ``"type"``; 0.0 where that is nothing."""
        return self._of_groups("type")

    def _of_groups(self, key: str) -> list[Any]:
        groups = self._optimizer.param_groups if self._optimizer else []
        return [group.get(key, 0.0) for group in groups]

    # Configuration

    def zero_optimization(self) -> bool:
        """Whether anything is configured to be sharded."""
        return self.zero_optimization_stage() > 0

    def zero_optimization_stage(self) -> int:
        """The configured stage, 0 to 3."""
        return self.configuration.zero_optimization.stage

    def writer(self) -> Writer:
        """What a checkpoint says of the run that writes it."""
        half = "bf16" if self.bfloat16_enabled() else "fp16" if self.fp16_enabled() else None
        return Writer(
            world=self.mesh.world,
            stage=self.zero_optimization_stage(),
            precision=half or "fp32",
        )

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        """Whether ``save_16bit_model`` may gather parameters that are freed after use."""
        return self.configuration.zero_optimization.stage3_gather_16bit_weights_on_model_save

    def may_save_weights(self) -> bool:
        """Whether ``save_16bit_model`` writes anything."""
        return self.zero_optimization_stage() < 3 or self.zero_gather_16bit_weights_on_model_save()

    def bfloat16_enabled(self) -> bool:
        """Whether the model computes in bf16."""
        return self.configuration.bf16.enabled

    def fp16_enabled(self) -> bool:
        """Whether the model computes in fp16."""
        return self.configuration.fp16.enabled

    def gradient_clipping(self) -> float:
        """The largest norm of gradients; 0 does not clip."""
        return self.configuration.gradient_clipping

    def dynamic_loss_scale(self) -> bool:
        """Whether the loss scale is found by trial."""
        return self.fp16_enabled() and self.configuration.fp16.loss_scale == 0

    def steps_per_print(self) -> int | None:
        """Optimizer steps between progress lines; None prints none."""
        return self.configuration.steps_per_print

    def optimizer_name(self) -> str | None:
        """The name of the optimizer that the configuration describes."""
        block = self.configuration.optimizer
        return block.type if block else None

    def optimizer_params(self) -> dict[str, Any] | None:
        """The arguments of the optimizer that the configuration describes."""
        block = self.configuration.optimizer
        return dict(block.params) if block else None

    def scheduler_name(self) -> str | None:
        """The name of the schedule that the configuration describes."""
        block = self.configuration.scheduler
        return block.type if block else None

    def scheduler_params(self) -> dict[str, Any] | None:
        """The arguments of the schedule that the configuration describes."""
        block = self.configuration.scheduler
        return dict(block.params) if block else None

    def zero_optimization_partition_gradients(self) -> bool:
        """Whether gradients are sharded."""
        return self.zero_optimization_stage() >= 2

    def zero_optimization_partition_weights(self) -> bool:
        """Whether parameters are sharded."""
        return self.zero_optimization_stage() >= 3

    def postscale_gradients(self) -> bool:
        """Whether gradients are divided by the number of ranks after they are summed."""
        return not self.configuration.prescale_gradients

    communication_data_type = property(_configured("communication_data_type"))
    dataloader_drop_last = _configured("dataloader_drop_last")
    fp16_auto_cast = _configured("fp16", "auto_cast")
    gradient_predivide_factor = _configured("gradient_predivide_factor")
    zero_allgather_bucket_size = _zero("allgather_bucket_size")
    zero_allow_untested_optimizer = _configured("zero_allow_untested_optimizer")
    zero_contiguous_gradients = _zero("contiguous_gradients")
    zero_max_live_parameters = _zero("stage3_max_live_parameters")
    zero_max_reuse_distance = _zero("stage3_max_reuse_distance")
    zero_overlap_comm = _zero("overlap_comm")
    zero_param_persistence_threshold = _zero("stage3_param_persistence_threshold")
    zero_prefetch_bucket_size = _zero("stage3_prefetch_bucket_size")
    zero_reduce_bucket_size = _zero("reduce_bucket_size")
    zero_reduce_scatter = _zero("reduce_scatter")
    zero_sub_group_size = _zero("sub_group_size")
