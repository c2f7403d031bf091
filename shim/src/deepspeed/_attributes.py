"""What libraries ask a parameter that lives in shards, and a module that reads others' parameters.

DeepSpeed plants these attributes on parameters and modules. Here they are looked up in zeroshard's
registries, when they are asked for: there is nothing that a copy or a pickle of a parameter could
carry along, nothing that a subclass such as bitsandbytes' quantised weights could lose, and nothing
to keep true. They are found on parameters of a model at stage 3 and on no others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from zeroshard.core.external import declared
from zeroshard.core.leaves import is_marked
from zeroshard.core.slots import Slot, is_waiting, slot_of
from zeroshard.core.unit import Unit

__all__ = ["ZeroParamStatus", "install"]


class ZeroParamStatus(Enum):
    """Whether the data of a parameter is here in full, elsewhere, or on its way."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


class _Attribute:
    """An attribute of some instances of a class, which do not hold it; they may hold another."""

    def __init__(self, name: str, find: Callable[[Any], Any]) -> None:
        self._name, self._find = name, find

    def __get__(self, instance: object, owner: type) -> Any:
        if instance is None:
            return self
        try:
            return self._find(instance)
        except LookupError:
            raise AttributeError(
                f"{owner.__name__!r} object has no attribute {self._name!r}",
                name=self._name,
                obj=instance,
            ) from None


# Parameters


def _slot(param: nn.Parameter) -> Slot:
    """The place of a parameter of stage 3; one rank has nothing to shard, but is at it, too."""
    slot = slot_of(param)
    if slot is None:
        raise LookupError
    engine = slot.unit.engine() if slot.unit.engine else None
    if engine is None:  # a model may be used on when nobody holds its engine any more
        is_third = is_waiting(param) or not slot.unit.lifetime.params_stay
    else:
        is_third = engine.zero_optimization_stage() == 3
    if not is_third:
        raise LookupError
    return slot


def _shape(param: nn.Parameter) -> torch.Size:
    slot = _slot(param)
    return slot.unit.shapes[slot.index]


def _status(param: nn.Parameter) -> ZeroParamStatus:
    unit = _slot(param).unit
    if unit.is_readable:
        return ZeroParamStatus.AVAILABLE
    return ZeroParamStatus.INFLIGHT if unit.is_full else ZeroParamStatus.NOT_AVAILABLE


def _mine(param: nn.Parameter) -> Tensor:
    slot = _slot(param)
    return slot.unit.stored(slot.index).reshape(-1)


def _users(param: nn.Parameter) -> set[int]:
    _slot(param)
    return set()  # use is counted by unit, and nothing has to be forgotten by hand


@dataclass(frozen=True, slots=True)
class _Gathering:
    """Parameters on their way."""

    units: tuple[Unit, ...]

    def wait(self) -> None:
        """Make them readable."""
        for unit in self.units:
            unit.wait()


def _units(param: nn.Parameter, others: Iterable[nn.Parameter] | None) -> tuple[Unit, ...]:
    params = [param] if others is None else others
    return tuple(dict.fromkeys(_slot(each).unit for each in params))


def _all_gather(param: nn.Parameter) -> Callable[..., _Gathering | None]:
    _slot(param)

    def all_gather(
        param_list: Iterable[nn.Parameter] | None = None, async_op: bool = False, hierarchy: int = 0
    ) -> _Gathering | None:
        """Make parameters full until ``partition``, or until a module has used them."""
        gathering = _Gathering(_units(param, param_list))
        for unit in gathering.units:
            if not (unit.lifetime.params_stay or unit.is_held):
                unit.gather()
        if async_op:
            return gathering
        gathering.wait()
        return None

    return all_gather


def _partition(param: nn.Parameter) -> Callable[..., None]:
    _slot(param)

    def partition(
        param_list: Iterable[nn.Parameter] | None = None,
        hierarchy: int = 0,
        has_been_updated: bool = False,
    ) -> None:
        """Free full parameters; where they were updated, each rank keeps its part of its own."""
        for unit in _units(param, param_list):
            if has_been_updated:
                with torch.no_grad():
                    unit.adopt(lambda full: full)
            unit.free()

    return partition


_OF_PARAMETERS: dict[str, Callable[[nn.Parameter], Any]] = {
    "all_gather": _all_gather,
    "ds_active_sub_modules": _users,
    "ds_id": lambda param: id(param) if _slot(param) else None,
    "ds_numel": lambda param: _shape(param).numel(),
    "ds_persist": lambda param: _slot(param).unit.lifetime.params_stay,
    "ds_shape": _shape,
    "ds_status": _status,
    "ds_tensor": _mine,
    "partition": _partition,
    "partition_numel": lambda param: _mine(param).numel,
}


# Modules


def _external(module: nn.Module) -> Callable[[], Iterator[tuple[str, Tensor]]]:
    def ds_external_parameters() -> Iterator[tuple[str, Tensor]]:
        """Parameters that this very module was declared to read elsewhere, by name."""
        for reader, param in declared(module):
            if reader is module:
                slot = slot_of(param)
                yield (
                    (str(id(param)) if slot is None else slot.unit.members[slot.index].name),
                    param,
                )

    return ds_external_parameters


# Every module answers: the compiler reads all that dir() lists of one.
_OF_MODULES: dict[str, Callable[[nn.Module], Any]] = {
    "_z3_leaf": is_marked,
    "ds_external_parameters": _external,
}


def install() -> None:
    """Let parameters and modules be asked; again does nothing new."""
    for kind, table in ((nn.Parameter, _OF_PARAMETERS), (nn.Module, _OF_MODULES)):
        for name, find in table.items():
            setattr(kind, name, _Attribute(name, find))
