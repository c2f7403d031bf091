"""Blocks that keep their activations, as many as a budget allows; the others run again in backward.

What runs again is the ``forward`` of a block, inside its hooks: in backward the block's parameters
are there before it runs again, and whether it does changes nothing about gathers. The first pass
checkpoints every block and counts what each would have kept (`Seen`); so does every later call that
is much larger than those counted. From then on the last blocks of a pass keep theirs, up to the
bytes that the `Space` allows. See `zeroshard.engine.budget` for the arithmetic.

No two ranks need to decide alike, as a block computes the same numbers either way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from zeroshard.core.hooks import in_backward
from zeroshard.core.wrap import find_blocks
from zeroshard.engine.budget import (
    Plan,
    Seen,
    Shape,
    bound,
    choose,
    in_words,
    scaled,
    shape_of,
    tensors_in,
)
from zeroshard.engine.recompute import (
    CAN_COUNT,
    Buffers,
    Counting,
    checkpointed,
    is_inside_checkpoint,
    nbytes_of,
)
from zeroshard.engine.space import Space
from zeroshard.engine.standin import StandIn
from zeroshard.engine.switches import Switch, is_layer

__all__ = ["ActivationPlan", "Activations", "forget", "layers_of"]

_log = logging.getLogger(__name__)

Forward = Callable[..., Any]

_LONGEST_PASS = 10_000
# Passes in which somebody else checkpoints the blocks before that is taken to be meant.
_FOREIGN_PASSES = 2


@dataclass(frozen=True, slots=True)
class ActivationPlan:
    """How many of the blocks of the last pass kept their activations, on this rank.

    ``num_blocks`` counts calls: a block that runs twice in a pass is two. ``most_bytes`` is what
    blocks may keep in a pass like that one.
    """

    num_blocks: int
    num_kept: int
    kept_bytes: int
    most_bytes: int


class BlockForward(StandIn):
    """The forward of one block."""

    def __init__(self, block: nn.Module, name: str, owner: Activations) -> None:
        super().__init__(block, "forward", block.forward)
        self.name, self.owner = name, owner
        self._is_removed = False

    def remove(self) -> None:
        """Give the block the forward that it had; where that is not possible, act like it."""
        self._is_removed = True
        super().remove()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block, so that it keeps its activations or runs again in backward."""
        trains = self.module.training and torch.is_grad_enabled()
        if not trains or self._is_removed or torch.compiler.is_compiling():
            return self.plain(*args, **kwargs)
        return self.owner.call(self, args, kwargs)


class _Sizes:
    """What a block was counted to hold, by the shapes of its inputs."""

    def __init__(self) -> None:
        self._seen: list[Seen] = []
        self._bounds: dict[Shape, Seen | None] = {}

    def bound(self, shape: Shape) -> Seen | None:
        """What a call holds at most; None if no call was counted that tells."""
        if shape not in self._bounds:
            if len(self._bounds) >= _LONGEST_PASS:
                self._bounds.clear()
            self._bounds[shape] = bound(shape, self._seen)
        return self._bounds[shape]

    def learn(self, seen: Seen) -> None:
        """Add a call that was counted."""
        self._seen.append(seen)
        self._bounds.clear()


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of a block."""

    block: nn.Module
    shape: Shape


@dataclass(slots=True)
class _Pass:
    """What has happened in forward since the last backward ended."""

    shape: Shape  # of the first call
    room: int
    plan: Plan
    number: int  # backwards that had ended when it began
    calls: list[_Call] = field(default_factory=list[_Call])
    kept_bytes: int = 0
    num_kept: int = 0


class Activations:
    """Decides for each call of a block whether it keeps its activations.

    Args:
        model: the model.
        blocks: what may be checkpointed, with names; none lies in another one.
        space: how many bytes they may keep.
        num_backwards: how many backwards have ended so far.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Mapping[nn.Module, str],
        space: Space,
        num_backwards: Callable[[], int],
    ) -> None:
        self._space, self._num_backwards = space, num_backwards
        self._blocks = blocks
        self._sizes = {block: _Sizes() for block in blocks}
        self._forwards: list[BlockForward] = []
        self._switches = Switch.find(model)
        self._now: _Pass | None = None
        self._past: _Pass | None = None  # the last one whose backward came
        self._most: int | None = None  # bytes, after the device ran out of memory
        self._foreign_in, self._num_foreign = -1, 0  # passes in which others checkpoint
        self._once: set[nn.Module] = set()  # blocks that must not run again
        self._told: set[str] = set()
        self._has_reported = False

    def install(self) -> None:
        """Take the place of the blocks' forwards, and of checkpointing by the layers themselves."""
        self._forwards = [BlockForward(block, name, self) for block, name in self._blocks.items()]
        for forward in self._forwards:
            forward.install()
        self._take_over()

    def _take_over(self) -> None:
        for switch in self._switches:
            switch.take_over()

    def remove(self) -> None:
        """Give everything back."""
        self.reset()
        for forward in self._forwards:
            forward.remove()
        self._forwards = []
        for switch in self._switches:
            switch.give_back()

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """The blocks have their own forwards inside, so that what replaces them comes under this.

        A block runs again by the forward that it has when this ends.
        """
        is_installed = bool(self._forwards)
        self.remove()
        try:
            yield
        finally:
            if is_installed:
                self.install()

    @property
    def plan(self) -> ActivationPlan | None:
        """What the last pass did; None before one."""
        past = self._past
        if past is None:
            return None
        return ActivationPlan(len(past.calls), past.num_kept, past.kept_bytes, past.room)

    # Forward

    def call(self, forward: BlockForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a block in training."""
        if self._leaves_alone(forward):
            return forward.plain(*args, **kwargs)
        block, shape = forward.module, shape_of((*args, *kwargs.values()))
        now = self._pass_of(shape)
        number = len(now.calls)
        if number < _LONGEST_PASS:
            now.calls.append(_Call(block, shape))
        size = self._sizes[block].bound(shape)
        if size is None:
            return self._count(forward, shape, args, kwargs)
        is_chosen = number >= now.plan.first_kept and now.plan.num_calls > 0
        fits = is_chosen and now.kept_bytes + size.saved <= now.room
        if fits or block in self._once:
            now.kept_bytes += size.saved
            now.num_kept += 1
            return forward.plain(*args, **kwargs)
        return checkpointed(forward.plain, args, kwargs)

    def _leaves_alone(self, forward: BlockForward) -> bool:
        """Whether somebody else checkpoints a block; it is not checkpointed once more then."""
        if self._num_foreign >= _FOREIGN_PASSES:
            return True
        if not in_backward() and not is_inside_checkpoint():
            return False
        number = self._num_backwards()
        if number != self._foreign_in:
            self._num_foreign = self._num_foreign + 1 if number == self._foreign_in + 1 else 1
            self._foreign_in = number
            self._take_over()  # it may have been switched on meanwhile
            if self._num_foreign == _FOREIGN_PASSES:
                _log.warning(
                    "zeroshard.activation_budget has no effect: the model itself checkpoints %s, "
                    "by torch.utils.checkpoint or zeroshard.checkpointing around it. Take that "
                    "out of the model to have the budget decide.",
                    forward.name,
                )
        # What runs again must save what it saved at first: on an older torch, a checkpoint's input.
        return CAN_COUNT

    def _pass_of(self, shape: Shape) -> _Pass:
        """The pass under way, or a new one whose first call is this large."""
        now, number = self._now, self._num_backwards()
        if now is not None and now.number == number:
            return now
        self._close()
        self._take_over()
        self._space.begin()
        self._now = self._begin(shape, number)
        return self._now

    def _begin(self, shape: Shape, number: int) -> _Pass:
        """Plan a pass by the calls of the last one."""
        calls = [] if self._past is None else self._past.calls
        if calls and calls[0].shape != shape:
            calls = [_Call(each.block, scaled(each.shape, calls[0].shape, shape)) for each in calls]
        sizes = [self._sizes[each.block].bound(each.shape) for each in calls]
        room = self._space.room(shape, sum(size.given for size in sizes if size is not None))
        room = max(room if self._most is None else min(room, self._most), 0)
        plan = choose([None if size is None else size.saved for size in sizes], room)
        return _Pass(shape, room, plan, number)

    def _close(self) -> None:
        """End the pass that was under way."""
        if self._now is not None:
            self._past, self._now = self._now, None
            self._space.end(self._past.shape, self._past.kept_bytes)

    def _count(
        self, forward: BlockForward, shape: Shape, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Checkpoint a call, and count what it would have kept."""
        if not CAN_COUNT:
            return checkpointed(forward.plain, args, kwargs)
        block, inputs = forward.module, [*tensors_in(args), *tensors_in(kwargs.values())]
        given = nbytes_of(each for each in inputs if each.requires_grad)
        counting = Counting(block, inputs)
        buffers = Buffers(block)
        inputs.clear()

        def run(*args: Any, **kwargs: Any) -> Any:
            if counting.is_over:
                with buffers.as_before():
                    return forward.plain(*args, **kwargs)
            with counting:
                result = forward.plain(*args, **kwargs)
            self._sizes[block].learn(Seen(shape, counting.nbytes, given))
            if buffers.are_edited():
                self._leave_once(forward)
            return result

        return checkpointed(run, args, kwargs)

    def _leave_once(self, forward: BlockForward) -> None:
        """Let a block keep its activations that must not run twice."""
        self._once.add(forward.module)
        kind = type(forward.module).__name__
        if kind not in self._told:
            self._told.add(kind)
            _log.warning(
                "activation budget: %s (%s) edits buffers of its own in forward, as batch "
                "normalisation does, and would do it twice if it ran again; so blocks of this kind "
                "keep their activations, whatever the budget is.",
                forward.name,
                kind,
            )

    # Between passes

    def end_step(self) -> None:
        """An optimizer step has ended on all ranks."""
        self._close()
        if self._space.end_step():
            self._keep_less(self._past, "ran short of memory")
        if self._space.is_settled and not self._has_reported:
            self._report()

    def fail(self, error: BaseException) -> None:
        """Keep less from now on if the device ran out of memory in this pass."""
        if isinstance(error, torch.OutOfMemoryError):
            self._keep_less(self._now, "ran out of memory")
            self._space.fail()

    def reset(self) -> None:
        """Forget the pass under way, whose backward does not come."""
        self._now = None

    def _keep_less(self, by: _Pass | None, why: str) -> None:
        if by is None or not (kept := max(by.kept_bytes, by.plan.kept_bytes)):
            return
        self._most = kept // 2
        _log.warning(
            "activation budget: the device %s while %d blocks kept %s of activations; from now on "
            "they keep at most half of that.",
            why,
            by.plan.num_calls - by.plan.first_kept,
            in_words(kept),
        )

    def _report(self) -> None:
        past = self._past
        if past is None or not past.plan.num_calls:
            return
        self._has_reported = True
        sizes = [self._sizes[each.block].bound(each.shape) for each in past.calls]
        largest = max((size.saved for size in sizes if size is not None), default=0)
        _log.info(
            "activation budget: %d of %d blocks keep their activations, %s each; %s",
            past.num_kept,
            len(past.calls),
            in_words(largest),
            self._space.describe(),
        )


def layers_of(model: nn.Module, units: Sequence[str]) -> dict[nn.Module, str]:
    """The blocks of a model that may be checkpointed, with their names; none is inside another.

    Layers of transformers are blocks; beside them, and in other models, those that repeat.

    Args:
        model: the model.
        units: names of what repeats, if it is to be found by name.
    """
    found = dict.fromkeys(each for each in model.modules() if is_layer(each))
    around = {each for each in model.modules() if any(inner in found for inner in each.modules())}
    found |= dict.fromkeys(each for each in find_blocks(model, units) if each not in around)
    inside = {inner for each in found for inner in each.modules() if inner is not each}
    return {
        module: name
        for name, module in model.named_modules()
        if module in found and module not in inside and module is not model
    }


def forget(model: nn.Module) -> None:
    """Take back what an engine that is gone has done to a model for its budget."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, BlockForward) and forward.is_installed_in(module):
            forward.owner.remove()
