"""When full parameters and full gradients exist: the only place that knows the ZeRO stages.

A stage is a row of a table, a value handed to the one core. Nothing else in the package asks for
its number. The formulas are those of Rajbhandari et al., "ZeRO: Memory Optimizations Toward
Training Trillion Parameter Models" (2020), section 5, with the bytes per element left open.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

__all__ = ["STAGES", "Lifetime", "Offload", "StateBytes", "lifetime", "state_bytes"]


@dataclass(frozen=True, slots=True)
class Lifetime:
    """When a unit's parameters and gradients exist in full, and whether its shards are cut at all.

    ``sharded`` is false where the shard axis has size one and all ranks are replicas.
    """

    free_params: Literal["never", "after_use"]
    reduce_grads: Literal["at_boundary", "every_backward"]
    sharded: bool = True

    @property
    def params_stay(self) -> bool:
        """Whether full parameters stay on the device from one use to the next."""
        return self.free_params == "never"

    @property
    def grads_stay(self) -> bool:
        """Whether full gradients stay on the device from one micro-step to the next."""
        return self.reduce_grads == "at_boundary"

    def with_params_that_stay(self) -> Lifetime:
        """The lifetime of units that stay full beside others that are freed."""
        return replace(self, free_params="never")


STAGES = {
    0: Lifetime("never", "at_boundary", sharded=False),
    1: Lifetime("never", "at_boundary"),
    2: Lifetime("never", "every_backward"),
    3: Lifetime("after_use", "every_backward"),
}


Offload = Literal["parameters", "state"]
"""What may be kept off the device: shards of parameters, or master weights and optimizer state."""


def lifetime(stage: int, world: int, offloads: Collection[Offload] = ()) -> Lifetime:
    """The lifetime of a stage's units over ``world`` ranks.

    On one rank a shard is as large as its unit, so freeing the unit and keeping the shard would
    cost memory as well as time: nothing is sharded, whatever the stage. It is otherwise for what
    leaves the device. A shard on the host costs the device nothing once the unit is freed. And
    where state is there, gradients are what the device holds most of, so they are reduced as soon
    as they are complete: no unit keeps memory for full ones.

    Args:
        stage: 0 to 3.
        world: the number of ranks.
        offloads: what is kept off the device.
    """
    row = STAGES[stage]
    if world > 1 or "parameters" in offloads:
        return row
    return row.with_params_that_stay() if "state" in offloads else STAGES[0]


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes of model state that one rank holds."""

    parameters: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        """Sum of the three."""
        return self.parameters + self.gradients + self.optimizer


def state_bytes(
    stage: int,
    numel: int,
    world: int,
    parameter_bytes: float = 4,
    gradient_bytes: float = 4,
    optimizer_bytes: float = 8,
) -> StateBytes:
    """Bytes per rank by the ZeRO formulas, for ``numel`` parameters over ``world`` ranks.

    Args:
        stage: 0 to 3.
        numel: trainable parameters of the whole model.
        world: number of ranks.
        parameter_bytes: bytes of one parameter in the compute dtype.
        gradient_bytes: bytes of one gradient element.
        optimizer_bytes: bytes of optimizer state for one parameter, master weights included where
            they are kept beside the parameter.
    """
    life = STAGES[stage]
    cut = world if life.sharded else 1
    return StateBytes(
        parameters=numel * parameter_bytes / (1 if life.params_stay else cut),
        gradients=numel * gradient_bytes / (1 if life.grads_stay else cut),
        optimizer=numel * optimizer_bytes / cut,
    )
