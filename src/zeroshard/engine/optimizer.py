"""The optimizer that initialize() returns: the user's own, whose step is the whole sharded step."""

# Torch's attributes are properties here, for they are those of another optimizer.
# pyright: reportIncompatibleVariableOverride=false

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from zeroshard.errors import UsageError, compose
from zeroshard.optim.sharded import ShardedOptimizer

__all__ = ["ZeroOptimizer"]


class ZeroOptimizer(torch.optim.Optimizer):
    """A torch optimizer as loops, schedules and wrappers of libraries see it.

    Groups, hyper-parameters and state are those of ``optimizer``, the one that the caller gave or
    the configuration named; what it has beside them is found here, too. Its parameters are this
    rank's slices of the master weights. Only ``step`` and ``zero_grad`` are the engine's.

    Where state is kept off the device, it is on its way there for some time after a step. Whoever
    asks for it here, as by ``state`` or ``fp32_partitioned_groups_flat``, waits until it is all
    there, and may edit it until the next backward. Nothing else waits: what loops read in every
    step, such as ``param_groups`` and ``optimizer``, is not state.
    """

    def __init__(
        self,
        sharded: ShardedOptimizer,
        step: Callable[[], object],
        zero_grad: Callable[[bool], object],
    ) -> None:
        # Torch's own constructor would make groups and state anew; here they are another's.
        self._sharded, self._step, self._zero_grad = sharded, step, zero_grad
        self.optimizer = sharded.inner
        self.parameter_offload: Any = None  # where DeepSpeed has the hooks of stage 3; for a shim

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # while it is unpickled, or copied
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"

    # What belongs to the optimizer inside

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the optimizer itself: what is set in them holds from the next step on.

        To ask for them waits for nothing, so the values of slices off the device may be on the way.
        """
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """State by slice, on this rank; where it is off the device, it is there."""
        self._sharded.recall()
        return self.optimizer.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self._sharded.recall()
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """Hyper-parameters of groups that do not set them."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def state_dict(self) -> dict[str, Any]:
        """The state of this rank's slices, in torch's form; for the same ranks and no others.

        Its tensors are those that the optimizer goes on with, as torch's are.
        """
        self._sharded.recall()
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave on this rank."""
        self._sharded.load_state_dict(state_dict)

    def register_step_pre_hook(self, hook: Any) -> Any:
        """Call ``hook`` before each update of the slices."""
        return self.optimizer.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> Any:
        """Call ``hook`` after each update of the slices."""
        return self.optimizer.register_step_post_hook(hook)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the parameters that train are sharded once, when the engine is made.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            compose(
                "add_param_group() was called on an optimizer that steps shards: parameters "
                "cannot join it any more.",
                hint="give all groups to initialize(), with requires_grad; a learning rate of 0 "
                "keeps a group as it is until it is raised.",
            )
        )

    # What belongs to the engine

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """End the accumulation: reduce, unscale, clip, update and publish. A collective.

        ``engine.step()`` does the same at the end of an accumulation, and the schedule with it.

        Args:
            closure: computes the loss and its gradients; called once, before the step.

        Returns:
            What the closure returned.

        Raises:
            UsageError: no backward came before it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients accumulated since the last step."""
        self._zero_grad(set_to_none)

    # Loss scaling, by DeepSpeed's names

    @property
    def _step_supports_amp_scaling(self) -> NoReturn:  # what torch's GradScaler asks for first
        raise UsageError(
            compose(
                "GradScaler.step() was called on an optimizer that steps shards: gradients are in "
                "the engine, where the scaler does not find them, so they would stay scaled.",
                hint='leave GradScaler out and set "fp16": {"enabled": true}: the engine scales '
                "the loss itself.",
            )
        )

    @property
    def overflow(self) -> bool:
        """Whether the last step was skipped because gradients overflowed."""
        return self._sharded.overflow

    @property
    def loss_scale(self) -> float:
        """The factor on the loss; 1 unless training in fp16."""
        return self._sharded.scaler.scale if self._sharded.scaler else 1.0

    @property
    def cur_scale(self) -> float:
        """An older name of ``loss_scale``."""
        return self.loss_scale

    @property
    def dynamic_loss_scale(self) -> bool:
        """Whether the loss scale is found by trial."""
        return self._sharded.scaler is not None and self._sharded.scaler.policy.dynamic

    # Where the values are

    @property
    def fp32_partitioned_groups_flat(self) -> list[list[Tensor]]:
        """This rank's master weights, one list of slices per param group."""
        self._sharded.recall()
        return [list(group["params"]) for group in self.param_groups]

    @property
    def single_partition_of_fp32_groups(self) -> list[Tensor]:
        """This rank's slices of the master weights, those of all param groups."""
        return [piece for group in self.fp32_partitioned_groups_flat for piece in group]
