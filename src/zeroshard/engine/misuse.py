"""Mistakes of a training loop that nothing else would notice."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from zeroshard.core.slots import slot_of
from zeroshard.errors import UsageError, compose

__all__ = ["ScheduleWatch", "check_members", "refuse_foreign_steps"]


def refuse_foreign_steps() -> RemovableHandle:
    """Refuse the step of any optimizer that holds parameters of an engine.

    The engine's own holds slices. Another one has no gradients to step with, and what it changed
    would not reach the master weights.
    """
    return register_optimizer_step_pre_hook(_refuse_foreign)


def _refuse_foreign(optimizer: Any, *_: object) -> None:
    for group in optimizer.param_groups:
        slot = slot_of(group["params"][0]) if group["params"] else None
        if slot is not None and slot.unit.engine is not None and slot.unit.engine() is not None:
            raise UsageError(
                compose(
                    f"{type(optimizer).__name__}.step() would do nothing: "
                    f"{slot.unit.members[slot.index].name} belongs to an engine, which keeps the "
                    "gradients, and initialize() was not given this optimizer.",
                    hint="pass it as initialize(optimizer=...), or name one in the configuration, "
                    "and call engine.step() instead.",
                )
            )


def check_members(model: nn.Module) -> None:
    """Refuse to train a model that has other parameters than when its engine was made.

    Raises:
        UsageError: one was added, or put in the place of another.
    """
    for name, param in model.named_parameters():
        if param.requires_grad and slot_of(param) is None:
            raise UsageError(
                compose(
                    f"{name} was added to the model after initialize(), and would not be trained.",
                    hint="replace layers, resize embeddings and add adapters before initialize().",
                )
            )


class ScheduleWatch:
    """Notices that somebody else steps the schedule that the engine steps."""

    def __init__(self) -> None:
        self._count: int | None = None
        self._num_moves = 0  # in a row: once, it may have been loaded from a checkpoint

    def check(self, schedule: Any) -> None:
        """Compare with where ``note`` left it.

        Raises:
            UsageError: it has moved on, for the second time in a row.
        """
        count = getattr(schedule, "last_epoch", None)
        moved = count is not None and self._count is not None and count > self._count
        self._num_moves = self._num_moves + 1 if moved else 0
        if self._num_moves > 1:
            raise UsageError(
                compose(
                    "the learning rate schedule was stepped between two optimizer steps; "
                    "engine.step() steps it already.",
                    hint="leave scheduler.step() out of the loop; or do not pass the schedule to "
                    "initialize(), and step it yourself.",
                )
            )

    def note(self, schedule: Any) -> None:
        """Remember where the engine's own step left it."""
        self._count = getattr(schedule, "last_epoch", None)
