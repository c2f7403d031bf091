"""Blocks that keep their activations, as many as a budget allows; the others run again in backward.

What runs again is the ``forward`` of a block, inside its hooks: in backward the block's parameters
are there before it runs again, and whether it does changes nothing about gathers. The first pass
checkpoints every block and counts what each would have kept (`Seen`); so does every later call that
is much larger than those counted. From then on the last blocks of a pass keep theirs, up to the
bytes that the `Space` allows. See `zeroshard.engine.budget` for the arithmetic.

No two ranks need to decide alike, as a block computes the same numbers either way.
"""

# Torch has no public name for the hooks on saved tensors that are active.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from zeroshard.core.hooks import in_backward
from zeroshard.core.slots import slot_of
from zeroshard.core.wrap import find_blocks
from zeroshard.engine.budget import (
    Overhead,
    Plan,
    Seen,
    Shape,
    bound,
    choose,
    factor,
    overhead,
    scaled,
    shape_of,
    tensors_in,
)
from zeroshard.engine.meter import Meter

__all__ = ["CAN_COUNT", "ActivationPlan", "Activations", "Fixed", "Measured", "Space", "forget", "layers_of"]

_log = logging.getLogger(__name__)

GIB = 2**30

Forward = Callable[..., Any]

# Steps after which the peak is read, once memory that only the first step takes is there; and again
# after a pass that is much larger than those before.
_READINGS = 4
_READINGS_OF_A_LARGER_PASS = 2
_LONGEST_PASS = 10_000
# Passes in which somebody else checkpoints the blocks before that is taken to be meant.
_FOREIGN_PASSES = 2

_autograd: Any = vars(torch._C)["_autograd"]
_top_hooks: Any = getattr(_autograd, "_top_saved_tensors_default_hooks", None)  # from 2.8

CAN_COUNT = _top_hooks is not None
"""Whether this torch lets a checkpoint be counted; without that every block is checkpointed."""


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


class Space(Protocol):
    """Says how many bytes blocks may keep."""

    @property
    def is_settled(self) -> bool:
        """Whether the answer will stay what it is as long as batches do."""
        ...

    def begin(self) -> None:
        """A pass begins."""
        ...

    def room(self, shape: Shape, given: int) -> int:
        """Bytes that the blocks of a pass may keep.

        Args:
            shape: of the first call of a block.
            given: bytes of the blocks' inputs, which are kept in any case.
        """
        ...

    def end(self, shape: Shape, kept: int) -> None:
        """A pass has ended in which blocks kept so many bytes."""
        ...

    def end_step(self) -> bool:
        """An optimizer step has ended; say whether the device ran short of memory in it."""
        ...

    def describe(self) -> str:
        """What a log line adds to the numbers of blocks."""
        ...


class Fixed:
    """A number of bytes for all that blocks hold from forward to backward."""

    is_settled = True

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes

    def begin(self) -> None:
        """Nothing is measured."""

    def room(self, shape: Shape, given: int) -> int:
        """What is left of the number beside the inputs."""
        return self._nbytes - given

    def end(self, shape: Shape, kept: int) -> None:
        """Nothing is measured."""

    def end_step(self) -> bool:
        """Nothing is measured."""
        return False

    def describe(self) -> str:
        """The number."""
        return f"budget {self._nbytes / GIB:.1f} GiB"


class Measured:
    """What a device has left, by what its allocator says after each of the first steps.

    A step takes what stays between steps, what blocks keep, and an overhead, which is measured. One
    measured with fewer kept blocks is not too small for more of them: so the number of blocks grows
    towards the limit from below.

    In the first steps all ranks take the least room of all.
    """

    def __init__(self, meter: Meter, agree: Callable[[int], int]) -> None:
        self._meter, self._agree = meter, agree
        self._known: list[Overhead] = []
        self._passes: dict[Shape, int] = {}  # of this step, with the least bytes that blocks kept
        self._readings_due = self._agreements_due = _READINGS
        self._has_begun = self._has_stepped = False
        self._limit, self._ceiling = 0, 0
        meter.restart()
        memory = meter.read()
        self._stays, self._shortages = memory.allocated, memory.shortages
        self._peak = 0

    @property
    def is_settled(self) -> bool:
        """Whether no reading is due."""
        return not self._readings_due

    def begin(self) -> None:
        """A pass begins; what ran short before the first one of a step is not its doing."""
        if not self._has_begun:
            self._has_begun = True
            self._shortages = self._meter.read().shortages

    def room(self, shape: Shape, given: int) -> int:
        """What is left beside everything else; nothing for a pass much larger than those known."""
        if not self._has_stepped:
            return 0
        known = overhead(shape, self._known)
        if known is None:
            self._readings_due = max(self._readings_due, _READINGS_OF_A_LARGER_PASS)
            return 0
        return min(self._limit - self._stays - known, self._ceiling)

    def end(self, shape: Shape, kept: int) -> None:
        """Take note of what a pass kept: its part of the step's peak, at most."""
        self._passes[shape] = min(kept, self._passes.get(shape, kept))

    def end_step(self) -> bool:
        """Read the peak if that is due, agree on the room if that is; a collective then."""
        memory = self._meter.read()
        is_short = self._has_begun and memory.shortages > self._shortages
        if self._readings_due and self._passes:
            for shape, kept in self._passes.items():
                self._learn(Overhead(shape, max(memory.peak - self._stays - kept, 0)))
            self._limit, self._peak = self._meter.limit(), memory.peak
            self._readings_due -= 1
            self._meter.restart()
        self._stays, self._has_stepped = memory.allocated, True
        if self._agreements_due:
            self._agreements_due -= 1
            rooms = [
                self._limit - self._stays - known
                for shape in self._passes
                if (known := overhead(shape, self._known)) is not None
            ]
            self._ceiling = self._agree(max(min(rooms, default=0), 0))
        self._passes.clear()
        self._has_begun = False
        return is_short

    def _learn(self, new: Overhead) -> None:
        """Replace what is known of such passes, and of smaller ones that took more."""

        def is_worse(old: Overhead) -> bool:
            by = factor(old.shape, new.shape)
            return by is not None and by <= 1 and old.nbytes >= new.nbytes

        kept = [old for old in self._known if old.shape != new.shape and not is_worse(old)]
        self._known = [*kept, new]

    def describe(self) -> str:
        """The peak that was read last, and the limit."""
        return f"peak {self._peak / GIB:.1f} of {self._limit / GIB:.1f} GiB"


class _Counting:
    """Counts the bytes that autograd saves inside a checkpoint, each piece of memory once.

    Args:
        module: what runs; its parameters and buffers are there anyway.
        inputs: tensors that are there anyway, too.
    """

    def __init__(self, module: nn.Module, inputs: Iterable[Tensor]) -> None:
        self.nbytes = 0
        params = list(module.parameters())
        slots = [slot_of(param) for param in params]
        self._units = {slot.unit for slot in slots if slot is not None}
        there = (each for each in chain(inputs, params, module.buffers()) if _is_plain(each))
        # Weak references, so that what a checkpoint frees meanwhile is not mistaken for others.
        self._known = {StorageWeakRef(each.untyped_storage()) for each in there}
        pack, unpack = _active_hooks() or (_same, _same)

        def count(tensor: Tensor) -> Any:
            self._add(tensor)
            return pack(tensor)

        self._hooks = saved_tensors_hooks(count, unpack)

    def _add(self, tensor: Tensor) -> None:
        if not _is_plain(tensor):
            self.nbytes += tensor.nbytes
            return
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference in self._known:
            return
        self._known.add(reference)
        # Modules inside may have gathered units of their own.
        if not any(unit.is_full and unit.address == storage.data_ptr() for unit in self._units):
            self.nbytes += storage.nbytes()

    def __enter__(self) -> _Counting:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)


def _is_plain(tensor: Tensor) -> bool:
    """Whether it has memory of one piece."""
    return tensor.layout == torch.strided


def _same(value: Any) -> Any:
    return value


def _active_hooks() -> tuple[Forward, Forward] | None:
    """The hooks that see what autograd saves now, if there are any and torch tells."""
    return None if _top_hooks is None else _top_hooks(False)


def _is_inside_checkpoint() -> bool:
    """Whether somebody checkpoints what runs now, as far as torch tells."""
    hooks = _active_hooks()
    return hooks is not None and hooks[0].__module__ == checkpoint.__module__


class BlockForward:
    """The forward of one block; copies and pickles of the block have the plain one."""

    def __init__(self, block: nn.Module, name: str, owner: Activations) -> None:
        self.block, self.name, self._owner = block, name, owner
        self.plain: Forward = block.forward
        self._replaced: Forward | None = vars(block).get("forward")
        self._is_removed = False
        functools.update_wrapper(self, self.plain, updated=())

    def install(self) -> None:
        """Let the block use it."""
        vars(self.block)["forward"] = self

    def remove(self) -> None:
        """Give the block the forward that it had; where that is not possible, act like it."""
        self._is_removed = True
        if vars(self.block).get("forward") is not self:
            return  # somebody has wrapped it
        if self._replaced is None:
            del vars(self.block)["forward"]
        else:
            vars(self.block)["forward"] = self._replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block, so that it keeps its activations or runs again in backward."""
        trains = self.block.training and torch.is_grad_enabled()
        if not trains or self._is_removed or torch.compiler.is_compiling():
            return self.plain(*args, **kwargs)
        return self._owner.call(self, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _same, (self.plain,)


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
        self._switches = _Switch.find(model)
        self._now: _Pass | None = None
        self._past: _Pass | None = None  # the last one whose backward came
        self._most: int | None = None  # bytes, after the device ran out of memory
        self._is_foreign, self._num_foreign = False, 0
        self._has_reported = False

    def install(self) -> None:
        """Take the place of the blocks' forwards, and of checkpointing by the layers themselves."""
        self._forwards = [BlockForward(block, name, self) for block, name in self._blocks.items()]
        for forward in self._forwards:
            forward.install()
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
        block, shape = forward.block, shape_of((*args, *kwargs.values()))
        now = self._pass_of(shape)
        number = len(now.calls)
        if number < _LONGEST_PASS:
            now.calls.append(_Call(block, shape))
        size = self._sizes[block].bound(shape)
        if size is None:
            return self._count(forward, shape, args, kwargs)
        is_chosen = number >= now.plan.first_kept and now.plan.num_calls
        if is_chosen and now.kept_bytes + size.saved <= now.room:
            now.kept_bytes += size.saved
            now.num_kept += 1
            return forward.plain(*args, **kwargs)
        return _checkpointed(forward.plain, args, kwargs)

    def _leaves_alone(self, forward: BlockForward) -> bool:
        """Whether somebody else checkpoints a block; it is not checkpointed once more then."""
        if self._num_foreign >= _FOREIGN_PASSES:
            return True
        if not in_backward() and not _is_inside_checkpoint():
            return False
        if not self._is_foreign:
            self._is_foreign = True
            self._num_foreign += 1
            if self._num_foreign == _FOREIGN_PASSES:
                _log.warning(
                    "zeroshard.activation_budget has no effect: the model itself checkpoints %s, "
                    "by torch.utils.checkpoint or zeroshard.checkpointing around it. Take that "
                    "out of the model to have the budget decide.",
                    forward.name,
                )
        # What runs again must save what it saved at first: on an older torch, a checkpoint's input.
        return _top_hooks is not None

    def _pass_of(self, shape: Shape) -> _Pass:
        """The pass under way, or a new one whose first call is this large."""
        now, number = self._now, self._num_backwards()
        if now is not None and now.number == number:
            return now
        self._close()
        for switch in self._switches:
            switch.take_over()
        if not self._is_foreign:
            self._num_foreign = 0
        self._is_foreign = False
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
        if self._most is not None:
            room = min(room, self._most)
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
        if _top_hooks is None:
            return _checkpointed(forward.plain, args, kwargs)
        module, inputs = forward.block, [*tensors_in(args), *tensors_in(kwargs.values())]
        has_run = False

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal has_run
            if has_run:
                return forward.plain(*args, **kwargs)
            has_run = True
            counting = _Counting(module, inputs)
            given = _nbytes(each for each in inputs if each.requires_grad)
            inputs.clear()
            with counting:
                result = forward.plain(*args, **kwargs)
            self._sizes[module].learn(Seen(shape, counting.nbytes, given))
            return result

        return _checkpointed(run, args, kwargs)

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

    def reset(self) -> None:
        """Forget the pass under way, whose backward does not come."""
        self._now = None

    def _keep_less(self, by: _Pass | None, why: str) -> None:
        if by is None or not (kept := max(by.kept_bytes, by.plan.kept_bytes)):
            return
        self._most = kept // 2
        _log.warning(
            "activation budget: the device %s while %d blocks kept %.2f GiB of activations; from "
            "now on they keep at most half of that.",
            why,
            by.plan.num_calls - by.plan.first_kept,
            kept / GIB,
        )

    def _report(self) -> None:
        past = self._past
        if past is None or not past.plan.num_calls:
            return
        self._has_reported = True
        sizes = [self._sizes[each.block].bound(each.shape) for each in past.calls]
        largest = max((size.saved for size in sizes if size is not None), default=0)
        _log.info(
            "activation budget: %d of %d blocks keep their activations, %.3g GiB each; %s",
            past.num_kept,
            len(past.calls),
            largest / GIB,
            self._space.describe(),
        )


def _checkpointed(forward: Forward, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run a function so that it runs again in backward, on the same random numbers."""
    if any(isinstance(value, Tensor) for value in args):
        function = functools.partial(forward, **kwargs)
        return checkpoint(function, *args, use_reentrant=False)
    # Torch looks for devices, and for edits in place, in what is passed by position.
    names = tuple(kwargs)

    def by_position(*values: Any) -> Any:
        return forward(*values[: len(args)], **dict(zip(names, values[len(args) :], strict=True)))

    return checkpoint(by_position, *args, *kwargs.values(), use_reentrant=False)


def _nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory of some tensors, each piece once."""
    storages = [each.untyped_storage() for each in tensors if _is_plain(each)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _straight(function: Forward, *args: Any, **kwargs: Any) -> Any:
    """Run what a model would checkpoint by itself."""
    return function(*args, **kwargs)


_FLAG, _FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"
_ABSENT = object()


def _is_layer(module: nn.Module) -> bool:
    """Whether it is a layer of transformers that can checkpoint itself."""
    return any(kind.__name__ == "GradientCheckpointingLayer" for kind in type(module).__mro__)


class _Switch:
    """Checkpointing by a module itself, as in transformers and diffusers, while it has no effect.

    A layer acts as if it checkpointed, so that it drops caches of keys and values, which must not
    be filled twice, whether it runs again or not.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._wanted: dict[str, Any] = {_FUNCTION: _straight}
        if _is_layer(module):
            self._wanted[_FLAG] = True
        self._former: dict[str, Any] = {}

    @classmethod
    def find(cls, model: nn.Module) -> list[_Switch]:
        """Those of a model."""
        return [
            cls(module)
            for module in model.modules()
            if _is_layer(module) or hasattr(module, _FUNCTION)
        ]

    def take_over(self) -> None:
        """Take the effect away, also if it was switched on or off meanwhile."""
        own = vars(self._module)
        for name, value in self._wanted.items():
            if own.get(name) is not value:
                self._former[name] = own.get(name, _ABSENT)
                own[name] = value

    def give_back(self) -> None:
        """Let it have the effect again that it was to have."""
        own = vars(self._module)
        for name, value in self._former.items():
            if own.get(name) is not self._wanted[name]:
                continue
            if value is _ABSENT:
                del own[name]
            else:
                own[name] = value
        self._former.clear()


def layers_of(model: nn.Module, units: Sequence[str]) -> dict[nn.Module, str]:
    """The blocks of a model that may be checkpointed, with their names; none is inside another.

    Layers of transformers are blocks; beside them, and in other models, those that repeat.

    Args:
        model: the model.
        units: names of what repeats, if it is to be found by name.
    """
    found = dict.fromkeys(each for each in model.modules() if _is_layer(each))
    around = {each for each in model.modules() if any(inner in found for inner in each.modules())}
    found |= dict.fromkeys(each for each in find_blocks(model, units) if each not in around)
    inside = {inner for each in found for inner in each.modules() if inner is not each}
    return {
        module: name
        for name, module in model.named_modules()
        if module in found and module not in inside and module is not model
    }


def forget(model: nn.Module) -> None:
    """Remove what an engine that is gone has put in place of forwards."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, BlockForward) and forward.block is module:
            forward.remove()
