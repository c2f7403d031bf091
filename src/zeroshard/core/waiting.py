"""Parameters in shards that wait for an engine, and how all ranks read them meanwhile.

[Note: reading what waits]
Between construction and ``initialize``, libraries initialise, tie, compare and resize models with
code that knows nothing of shards. All ranks run it, or rank 0 alone inside ``gathered(...,
modifier_rank=0)`` while the others wait at the end of that block. So a read of a parameter that
waits gathers its unit, which stays full until nobody uses it; then it keeps the values of rank 0,
or of the block's modifier. An edit cannot be missed, and about one unit is full besides the blocks.
With gradients off, as initialisation is written, shapes are those of the values. With gradients on,
shapes are empty, and reads of parameters are refused: somebody runs a model that has no engine.
Reads of data, of which state dicts are made, are answered all the same. Pickles and deep copies, of
parameters and of data, are refused always.

A gather that not every rank takes part in would never end. So ranks show each other what they are
about to do, and do it if all want the same. Those that wait at the end of a block help the rank
whose edits it keeps. Anything else is an error on every rank, which names what each one wanted.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from typing import Any, Final
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zeroshard.core import tree
from zeroshard.core.building import share_values
from zeroshard.core.collectives import Answered, all_gather, all_reduce_, broadcast_
from zeroshard.core.freed import FreedData, FreedParameter, freed_read, shows_shape, stand_in
from zeroshard.core.mesh import Mesh
from zeroshard.core.slots import full_shape, is_waiting, keep_until_engine, slot_of
from zeroshard.core.unit import Unit
from zeroshard.errors import UsageError, compose

__all__ = ["Waiting", "settle", "waiting_of"]

# Equal on all ranks, which make units and enter blocks in the same order.
_NUMBERS: Final = itertools.count(1)


class _Step(IntEnum):
    """What a rank may be about to do."""

    READ = 1
    COMPARE = 2
    ENTER = 3
    LEAVE = 4
    INITIALIZE = 5


@dataclass(frozen=True, slots=True)
class _Intent:
    step: _Step
    subject: int


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """A unit that is full because it was read, and the rank whose values it will keep."""

    unit: Unit
    hold: ExitStack
    num_users: int
    modifier: int

    @property
    def is_aliased(self) -> bool:
        """Whether somebody has views of the memory, and may edit the parameters through them."""
        return self.unit.num_users > self.num_users


@dataclass(slots=True)
class _Block:
    """A ``gathered`` block that keeps edits, with the units that its modifier alone has read."""

    number: int
    modifier: int
    reads: list[_Read] = field(default_factory=list[_Read])


class Waiting:
    """Parameters of one construction that wait for an engine. See [Note: reading what waits]."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._units: MutableMapping[int, Unit] = WeakValueDictionary()
        self._reads: list[_Read] = []
        self._blocks: list[_Block] = []  # innermost last
        self._has_failed = False

    def add(self, unit: Unit) -> None:
        """Take a unit in, on every rank."""
        unit.mesh, unit.number = self._mesh, next(_NUMBERS)
        self._units[unit.number] = unit
        keep_until_engine(unit, self)

    # Reading

    def read(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Call a function of freed parameters; a collective where it needs their values."""
        if shows_shape(func):
            return func(*tree.replace(args, stand_in), **tree.replace(kwargs, stand_in))
        given = tree.find((args, kwargs)).tensors
        params = [_parameter(each) for each in given]
        units = [slot.unit for param in params if (slot := slot_of(param)) is not None]
        if not all(unit.keeper is self for unit in units):
            raise freed_read(next(param for param in params if slot_of(param) is not None))
        if func is torch.equal and len(params) == 2:
            return self._are_equal(*params)
        # Data takes no gradients anyway; who reads a state dict does not run the model.
        if torch.is_grad_enabled() and any(isinstance(each, FreedParameter) for each in given):
            raise freed_read(next(param for param in params if slot_of(param) is not None))
        for unit in dict.fromkeys(units):
            if not unit.is_held:
                self._open(unit)
        has_none = func is Tensor.copy_ and len(args) > 1 and args[1] is None
        if has_none and not self._is_kept(units[0]):
            return args[0]  # models compute some initial values on rank 0 alone
        return _call_with_views(func, args, kwargs)

    def _is_kept(self, unit: Unit) -> bool:
        """Whether edits of this rank last."""
        return unit.modifier_rank in (None, self._mesh.rank)

    def _open(self, unit: Unit) -> None:
        block = self._blocks[-1] if self._blocks else None
        alone = self._meet(_Intent(_Step.READ, unit.number), block)
        if alone is None:
            self.close()
            self._reads.append(self._gather(unit, 0 if block is None else block.modifier))
        elif block is not None:
            block.reads.append(self._gather(unit, block.modifier))

    def _gather(self, unit: Unit, modifier: int) -> _Read:
        unit.gather()
        unit.await_views()
        hold = ExitStack()
        hold.enter_context(unit.held())
        unit.modifier_rank = modifier
        return _Read(unit, hold, unit.num_users, modifier)

    def _are_equal(self, one: Tensor, other: Tensor) -> bool:
        """Whether two parameters have the same values, of which no rank sees more than a part."""
        if one is other or full_shape(one) != full_shape(other):
            return one is other
        self._meet(_Intent(_Step.COMPARE, _checksum(self._number(one), self._number(other))))
        self.close(everything=True)
        mine = [share_values(param, self._mesh) for param in (one, other)]
        return self._all(torch.equal(*mine))

    def _number(self, param: Tensor) -> int:
        slot = slot_of(param)
        return 0 if slot is None else slot.unit.number

    # Blocks

    def enter(self, units: Iterable[Unit]) -> None:
        """Agree to gather some units. A collective."""
        numbers = [unit.number for unit in units]
        self._meet(_Intent(_Step.ENTER, _checksum(*numbers)))
        self.close()

    @property
    def is_inside_block(self) -> bool:
        """Whether this rank is in a block that keeps edits."""
        return bool(self._blocks)

    @contextmanager
    def kept(self, modifier: int) -> Iterator[None]:
        """A block that keeps the edits of a rank. A collective at its end.

        There the other ranks help this one to read, until it comes to its end as well.
        """
        block = _Block(next(_NUMBERS), modifier)
        self._blocks.append(block)
        try:
            yield
        finally:
            try:
                self._help(block)
            finally:
                self._blocks.remove(block)
                self._finish(block.reads)

    def _help(self, block: _Block) -> None:
        while not self._has_failed:
            asked = self._meet(_Intent(_Step.LEAVE, block.number), block)
            if asked is None:
                return
            block.reads.append(self._gather(self._units[asked.subject], block.modifier))

    # Agreeing

    def _meet(self, mine: _Intent, block: _Block | None = None) -> _Intent | None:
        """Show what this rank is about to do.

        Returns:
            None if all ranks are about to do the same; else what the modifier of the block is about
            to read, while all others are at the end of the block.

        Raises:
            UsageError: on every rank, if ranks are about to do different things.
        """
        mesh = self._mesh
        out = torch.tensor([mine.step, mine.subject], dtype=torch.int64, device=mesh.device)
        everyone = out.new_empty(mesh.shard.size * 2)
        with Answered(mesh.rank, f"to {self._text(mine)}"):
            all_gather(everyone, out, mesh.shard).wait()
        intents = [_Intent(_Step(step), subject) for step, subject in everyone.view(-1, 2).tolist()]
        if all(each == mine for each in intents):
            return None
        if block is not None:
            leaving = _Intent(_Step.LEAVE, block.number)
            others = [each for rank, each in enumerate(intents) if rank != block.modifier]
            asked = intents[block.modifier]
            if asked.step is _Step.READ and all(each == leaving for each in others):
                return asked
        self._has_failed = True
        wants = "; ".join(f"rank {rank}: {self._text(each)}" for rank, each in enumerate(intents))
        raise UsageError(
            compose(
                "ranks are about to do different things with parameters that live in shards on "
                f"all of them: {wants}.",
                hint="let every rank read parameters, in the same order, or gather what one rank "
                "alone reads: wrap it on every rank in `with zeroshard.gathered(...):`.",
            )
        )

    def _text(self, intent: _Intent) -> str:
        if intent.step is _Step.READ:
            unit = self._units.get(intent.subject)
            return f"read {unit.name}" if unit is not None else "read a parameter"
        return {
            _Step.COMPARE: "compare two parameters",
            _Step.ENTER: "enter gathered(...)",
            _Step.LEAVE: "leave gathered(...)",
            _Step.INITIALIZE: "call initialize()",
        }[intent.step]

    def _all(self, mine: bool) -> bool:
        mesh = self._mesh
        flag = torch.tensor([mine], dtype=torch.int32, device=mesh.device)
        return bool(all_reduce_(flag, mesh.shard, dist.ReduceOp.MIN).item())

    # Closing

    def settle(self) -> None:
        """Free everything, for an engine that takes over. A collective."""
        self._meet(_Intent(_Step.INITIALIZE, 0))
        self.close(everything=True)

    def close(self, *, everything: bool = False) -> None:
        """Free what was read and is not in use. A collective."""
        idle = list(self._reads)
        if idle and not everything:
            mesh = self._mesh
            flags = torch.tensor([not each.is_aliased for each in idle], dtype=torch.int32)
            flags = all_reduce_(flags.to(mesh.device), mesh.shard, dist.ReduceOp.MIN).tolist()
            idle = [each for each, is_idle in zip(idle, flags, strict=True) if is_idle]
        self._reads = [each for each in self._reads if each not in idle]
        self._finish(idle)

    @torch.no_grad()
    def _finish(self, reads: Iterable[_Read]) -> None:
        for each in reads:
            unit = each.unit
            unit.modifier_rank = None
            if not self._has_failed:
                with Answered(unit.mesh.rank, f"to share the edits of {unit.name}"):
                    unit.adopt(partial(broadcast_, mesh=unit.mesh, src=each.modifier))
            each.hold.close()
            unit.free()


def _parameter(tensor: Tensor) -> Tensor:
    return tensor.parameter if isinstance(tensor, FreedData) else tensor


def _call_with_views(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Call a function with the full values in place of freed parameters.

    The parameters themselves stay empty: code that has found one of two empty must not find the
    other full.
    """
    given: dict[Tensor, Tensor] = {}

    def view(tensor: Tensor) -> Tensor:
        param = _parameter(tensor)
        slot = slot_of(param)
        if slot is None or not isinstance(param, FreedParameter):
            return tensor
        values = slot.unit.await_views()[slot.index].detach()
        given[values] = tensor
        return values

    result = func(*tree.replace(args, view), **tree.replace(kwargs, view))
    return given.get(result, result) if isinstance(result, Tensor) else result


def _checksum(*numbers: int) -> int:
    return zlib.crc32(repr(numbers).encode())


def waiting_of(units: Iterable[Unit]) -> list[Waiting]:
    """Those that keep some of the units."""
    keepers = dict.fromkeys(unit.keeper for unit in units)
    return [keeper for keeper in keepers if isinstance(keeper, Waiting)]


def settle(model: nn.Module) -> None:
    """Free what was read of a model's parameters that wait. A collective."""
    slots = (slot_of(param) for param in model.parameters() if is_waiting(param))
    for each in waiting_of(slot.unit for slot in slots if slot is not None):
        each.settle()
