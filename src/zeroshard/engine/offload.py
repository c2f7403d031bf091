"""Model state that makes room on the device for a while, and comes back as it was.

Memory is moved storage by storage: the bytes go to the host, the storage is resized to nothing, and
coming back it is resized and filled again. So everything that shares memory (a shard that is a part
of the full parameters, master weights that are the shard, slices) shares it afterwards, too, and
whatever state one of them is, the others go with it.
"""

# The identity of a storage has no public name.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, UntypedStorage

from zeroshard.core.pulled import UnavailableError, share, withdraw
from zeroshard.core.reductions import reduce_by_pulls, withdraw_reductions
from zeroshard.core.unit import Unit
from zeroshard.errors import UsageError, compose

__all__ = ["OffloadStateTypeEnum", "Offloaded", "offload", "states_named"]

_log = logging.getLogger(__name__)


class OffloadStateTypeEnum(str, Enum):
    """Kinds of state, by DeepSpeed's names."""

    optim_states = "optim_states"
    """What the optimizer keeps beside the weights, such as moments."""

    hp_params = "hp_params"
    """Master weights."""

    lp_params = "lp_params"
    """Parameters in the dtype computed in: full ones that stay, and shards."""

    lp_grads = "lp_grads"
    """Averaged gradients of the step under way."""

    contiguous_grad_buffer = "contiguous_grad_buffer"
    """Full gradients of the step under way."""


_Kind = OffloadStateTypeEnum


def states_named(include: Iterable[object] | None) -> frozenset[OffloadStateTypeEnum]:
    """The kinds of state that a caller names by member or by string; all if there is no list.

    Raises:
        UsageError: a name is unknown.
    """
    if include is None:
        return frozenset(OffloadStateTypeEnum)
    named: set[OffloadStateTypeEnum] = set()
    for each in [include] if isinstance(include, str) else include:
        name = each.value if isinstance(each, Enum) else each
        try:
            named.add(OffloadStateTypeEnum(name))
        except ValueError:
            known = ", ".join(kind.value for kind in OffloadStateTypeEnum)
            raise UsageError(
                compose(f"offload_states() knows no state {each!r}.", hint=f"it knows {known}.")
            ) from None
    return frozenset(named)


@dataclass(frozen=True, slots=True)
class _Moved:
    """The bytes of a storage, on the host."""

    storage: UntypedStorage
    host: Tensor

    def back(self, non_blocking: bool) -> None:
        self.storage.resize_(self.host.numel())
        _bytes(self.storage).copy_(self.host, non_blocking=non_blocking)


@dataclass(frozen=True, slots=True)
class _MovedState:
    """A tensor of the optimizer's; nothing shares its memory, so it can be read on the host."""

    tensor: Tensor
    device: torch.device

    def back(self, non_blocking: bool) -> None:
        self.tensor.data = self.tensor.data.to(self.device, non_blocking=non_blocking)


def _bytes(storage: UntypedStorage) -> Tensor:
    """A tensor over a whole storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class _Mover:
    """Moves storages to the host, each once."""

    def __init__(self, pin: bool, non_blocking: bool) -> None:
        self._pin, self._non_blocking = pin, non_blocking
        self.moved: dict[int, _Moved] = {}

    def copy(self, tensor: Tensor) -> Tensor:
        """Copy the storage of a tensor; give the same tensor within the copy."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.moved:
            source = _bytes(storage)
            pin = self._pin and source.is_cuda
            host = torch.empty(source.numel(), dtype=torch.uint8, device="cpu", pin_memory=pin)
            host.copy_(source, non_blocking=self._non_blocking)
            self.moved[storage._cdata] = _Moved(storage, host)
        host = self.moved[storage._cdata].host
        start = tensor.storage_offset() * tensor.element_size()
        return host[start : start + tensor.nbytes].view(tensor.dtype)

    def moves(self, tensor: Tensor) -> bool:
        """Whether the storage of a tensor is among those copied."""
        return tensor.untyped_storage()._cdata in self.moved

    def give_up(self) -> None:
        """Give the memory on the device back."""
        for moved in self.moved.values():
            moved.storage.resize_(0)


@dataclass(frozen=True, slots=True)
class Offloaded:
    """State that is on the host now."""

    units: Sequence[Unit]
    moved: Sequence[_Moved | _MovedState]
    shared: Sequence[Unit]
    """Units whose shards other ranks read before, for which they had to be withdrawn."""
    pulled: Sequence[Unit]
    """Units whose gradients other ranks read before."""

    def reload(self, non_blocking: bool = False) -> None:
        """Bring everything back, to memory of this rank alone."""
        for each in self.moved:
            each.back(non_blocking)
        for unit in self.units:
            if unit.is_parked:
                unit.unpark()
            if unit.master is not None:
                unit.show_slices(unit.master)

    def share(self) -> None:
        """After :meth:`reload`, let other ranks read as before. A collective."""
        try:
            if self.shared:
                share(self.shared, self.shared[0].mesh)
        except UnavailableError as reason:
            _log.warning("parameters are gathered by collectives from now on: %s", reason)
        try:
            if self.pulled:
                reduce_by_pulls(self.pulled, self.pulled[0].mesh)
        except UnavailableError as reason:
            _log.warning("gradients are averaged by collectives from now on: %s", reason)


def offload(
    units: Sequence[Unit],
    optimizer: torch.optim.Optimizer | None,
    kinds: frozenset[OffloadStateTypeEnum],
    *,
    pin: bool = True,
    non_blocking: bool = False,
) -> Offloaded:
    """Move kinds of state to the host; for the time between two passes.

    State that is kept off the device already stays where it is.

    Raises:
        UsageError: parameters are gathered by somebody.
    """
    for unit in units:
        if unit.is_held:
            raise UsageError(
                compose(
                    f"offload_states() was called while {unit.name} is gathered.",
                    hint="leave the gathered(...) block first.",
                )
            )
    # Memory that other ranks have mapped is not given back by this one.
    shared = withdraw(units) if kinds & {_Kind.lp_params, _Kind.hp_params} else []
    pulled = withdraw_reductions(units) if _Kind.contiguous_grad_buffer in kinds else []
    mover = _Mover(pin, non_blocking)
    for unit in units:
        _copy_unit(unit, kinds, mover)
    mover.give_up()
    moved: list[_Moved | _MovedState] = list(mover.moved.values())
    if optimizer is not None and _Kind.optim_states in kinds:
        moved += _move_state(optimizer, units, pin, non_blocking)
    if moved and units[0].mesh.device.type == "cuda":
        torch.cuda.empty_cache()
    return Offloaded(units, moved, shared, pulled)


def _copy_unit(unit: Unit, kinds: frozenset[OffloadStateTypeEnum], mover: _Mover) -> None:
    held = unit.holdings
    wanted: list[Tensor | None] = []
    if _Kind.lp_params in kinds:
        wanted += held.parameters
    if _Kind.hp_params in kinds and unit.state.is_near:
        wanted.append(held.master)
    if _Kind.lp_grads in kinds:
        wanted.append(held.grad_shard)
    if _Kind.contiguous_grad_buffer in kinds:
        wanted.append(held.full_gradient)
    for tensor in wanted:
        if tensor is not None:
            mover.copy(tensor)
    if any(mover.moves(tensor) for tensor in held.parameters):
        unit.park()
    if held.master is not None and mover.moves(held.master):
        unit.show_slices(mover.copy(held.master))


def _move_state(
    optimizer: torch.optim.Optimizer, units: Sequence[Unit], pin: bool, non_blocking: bool
) -> list[_MovedState]:
    moved: list[_MovedState] = []
    for unit in units:
        if not unit.state.is_near:
            continue  # it is off the device already, in memory of its depot
        for piece in unit.slices:
            for value in optimizer.state.get(piece, {}).values():
                if not isinstance(value, Tensor) or not value.dim():
                    continue
                moved.append(_MovedState(value, value.device))
                host = torch.empty_like(value, device="cpu", pin_memory=pin and value.is_cuda)
                value.data = host.copy_(value, non_blocking=non_blocking)
    return moved
