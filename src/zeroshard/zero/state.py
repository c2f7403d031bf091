"""Master weights, optimizer state and gradients of single parameters, by DeepSpeed's calls.

Those named ``full`` speak of whole parameters. They are collectives: every rank calls them, in the
same order, and gets the same answer. Setters take the value of rank 0. Those named ``local`` speak
of this rank's slice, a flat tensor that is empty where the rank owns nothing of the parameter; only
the setter of weights among them is a collective.

All give None, or do nothing, for parameters that no engine trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zeroshard.core.access import assemble, rewrite, stacked
from zeroshard.core.agreed import agreed
from zeroshard.core.collectives import broadcast_, mean_
from zeroshard.core.slots import Slot, slot_of
from zeroshard.engine.engine import Engine
from zeroshard.errors import UsageError, compose

__all__ = [
    "safe_get_full_fp32_param",
    "safe_get_full_grad",
    "safe_get_full_optimizer_state",
    "safe_get_local_fp32_param",
    "safe_get_local_grad",
    "safe_get_local_optimizer_state",
    "safe_set_full_fp32_param",
    "safe_set_full_grad",
    "safe_set_full_optimizer_state",
    "safe_set_local_fp32_param",
    "safe_set_local_grad",
    "safe_set_local_optimizer_state",
    "safe_update_full_grad_vectorized",
]


@dataclass(frozen=True, slots=True)
class _Place:
    """A trained parameter: its slot and its engine."""

    slot: Slot
    engine: Engine

    @property
    def name(self) -> str:
        return self.slot.unit.members[self.slot.index].name

    @property
    def device(self) -> torch.device:
        """Where this rank computes, and where it is given tensors; state may be elsewhere."""
        return self.slot.unit.mesh.device

    @property
    def slice(self) -> Tensor:
        """This rank's slice of the master weights, as it is after ``unit.at_home``."""
        return self.slot.unit.slices[self.slot.index].detach()

    @property
    def weights(self) -> Tensor:
        """This rank's slice of the master weights as it is now, to be read."""
        self.slot.unit.at_home()
        return self.slice

    @property
    def state(self) -> MutableMapping[str, Any] | None:
        """The optimizer's state for the slice as it is now, to be read; None if there is none."""
        self.slot.unit.at_home()
        optimizer = self.engine.basic_optimizer
        assert optimizer is not None, "trained parameters have an optimizer"
        return optimizer.state.get(self.slot.unit.slices[self.slot.index]) or None

    @property
    def edited_state(self) -> MutableMapping[str, Any] | None:
        """The same, to be edited."""
        self.slot.unit.at_home(edits=True)
        return self.state

    @property
    def gradient(self) -> Tensor | None:
        """This rank's slice of the averaged gradient, still multiplied by ``divisor``."""
        unit = self.slot.unit
        unit.settle()
        if unit.grad_shard is None:
            return None
        return unit.grad_shard[unit.layout.slice_of(self.slot.index, unit.mesh.shard.rank).slice()]

    @property
    def divisor(self) -> float:
        """What the optimizer's step divides gradients by before it clips them."""
        return self.engine.gradient_accumulation_steps() * self.engine.loss_scale

    def scaled_down(self, gradient: Tensor) -> Tensor:
        """The gradient in the dtype and of the size that the optimizer will see."""
        return gradient.to(self.slice.dtype, copy=True).mul_(1.0 / self.divisor)

    def mine_of(self, full: Tensor) -> Tensor:
        """This rank's slice of a parameter-shaped tensor."""
        unit = self.slot.unit
        owned = unit.layout.owned(self.slot.index, unit.mesh.shard.rank)
        return full.reshape(-1)[owned.slice()]

    def taken(self, value: Tensor) -> Tensor:
        """The full value that every rank sets: that of rank 0, as it lies on the device."""
        unit, shape = self.slot.unit, self.slot.unit.shapes[self.slot.index]
        value = _checked(value, shape, f"the shape of {self.name}")
        value = value.to(unit.mesh.device, self.slice.dtype, copy=True).contiguous()
        return broadcast_(value, unit.mesh)


def _place(param: Tensor) -> _Place | None:
    slot = slot_of(param)
    if slot is None or not slot.unit.is_trained or slot.unit.engine is None:
        return None
    engine: Engine | None = slot.unit.engine()
    if engine is None:
        return None
    engine.check_present(f"access to the state of {slot.unit.members[slot.index].name}")
    return _Place(slot, engine)


def _bring_home(place: _Place) -> None:
    """Wait until what is kept of a parameter can be read; a collective where it is off the device.

    Raises:
        OffloadError: on every rank, if one of them cannot read it.
    """
    unit = place.slot.unit
    with nullcontext() if unit.state.is_near else agreed(unit.mesh, f"read {place.name}"):
        unit.at_home()


def _checked(value: Tensor, shape: torch.Size, whose: str) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != shape:
        given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise UsageError(
            compose(
                f"a value of {given} was to be set where {tuple(shape)} is {whose}.",
                hint="pass a tensor of that shape, on every rank.",
            )
        )
    return value.detach()


# Master weights


def safe_get_full_fp32_param(param: Tensor) -> Tensor | None:
    """A copy of a parameter's master weights in full; a collective."""
    if (place := _place(param)) is None:
        return None
    _bring_home(place)
    return assemble(place.weights, place.slot)


def safe_set_full_fp32_param(param: Tensor, value: Tensor) -> None:
    """Replace a parameter's master weights, and the weights that forward sees; a collective.

    Raises:
        UsageError: the value has another shape.
    """
    if (place := _place(param)) is not None:
        _set_weights(place, place.mine_of(place.taken(value)))


def safe_get_local_fp32_param(param: Tensor) -> Tensor | None:
    """A copy of this rank's slice of a parameter's master weights."""
    place = _place(param)
    return None if place is None else place.weights.reshape(-1).to(place.device, copy=True)


def safe_set_local_fp32_param(param: Tensor, value: Tensor) -> None:
    """Replace each rank's slice of a parameter's master weights; a collective.

    It is one because the weights that forward sees follow at once.

    Raises:
        UsageError: the value is not as long as the slice.
    """
    if (place := _place(param)) is not None:
        _set_weights(place, _checked(value, place.slice.reshape(-1).shape, "this rank's slice"))


def _set_weights(place: _Place, mine: Tensor) -> None:
    _bring_home(place)
    rewrite(place.slot.unit, lambda: place.slice.copy_(mine.view(place.slice.shape)))


# Optimizer state

_NO_PART, _NO_STATE, _NO_KEY, _SHAPELESS, _SCALAR = range(5)
_DTYPES = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
_FIRST_DTYPE = _SCALAR + 1


def _kind(place: _Place, key: str) -> int:
    """What this rank knows about an entry of the state, as a number that ranks can exchange."""
    if place.slice.numel() == 0 and place.slot.unit.mesh.shard.size > 1:
        return _NO_PART
    state = place.state
    if state is None:
        return _NO_STATE
    if key not in state:
        return _NO_KEY
    value = state[key]
    if isinstance(value, Tensor) and value.shape == place.slice.shape and value.dtype in _DTYPES:
        return _FIRST_DTYPE + _DTYPES.index(value.dtype)
    is_number = isinstance(value, (int, float)) or (isinstance(value, Tensor) and not value.dim())
    return _SCALAR if is_number else _SHAPELESS


@dataclass(frozen=True, slots=True)
class _Entry:
    """What the ranks agree an entry of the state is, and the first rank that has some of it."""

    kind: int
    rank: int


def _agreed(place: _Place, key: str) -> _Entry:
    _bring_home(place)
    kinds = stacked(torch.tensor([_kind(place, key)]), place.slot.unit).flatten().tolist()
    rank = next((rank for rank, kind in enumerate(kinds) if kind != _NO_PART), 0)
    if kinds[rank] == _NO_KEY:
        raise _no_such_key(place, key)
    if kinds[rank] == _SHAPELESS and len(kinds) > 1:
        raise UsageError(
            compose(
                f"{key} in the optimizer state of {place.name} does not consist of one number for "
                "each element, so ranks have no slices of it.",
                hint="look into engine.optimizer.state.",
            )
        )
    return _Entry(kinds[rank], rank)


def _no_such_key(place: _Place, key: str) -> UsageError:
    assert place.engine.basic_optimizer is not None, "trained parameters have an optimizer"
    states = place.engine.basic_optimizer.state.values()
    keys = sorted({str(each) for state in states for each in state})
    return UsageError(
        compose(
            f"the optimizer keeps no {key!r} for {place.name}.",
            hint=f"it keeps {', '.join(keys)}." if keys else "see the error of rank 0.",
        )
    )


def safe_get_full_optimizer_state(param: Tensor, optim_state_key: str) -> Tensor | None:
    """A copy of an entry of a parameter's optimizer state in full; a collective.

    None before the first step. A number, such as a count of steps, is given as a tensor.

    Raises:
        UsageError: the optimizer keeps no such entry.
    """
    place = _place(param)
    if place is None:
        return None
    entry = _agreed(place, optim_state_key)
    if entry.kind in {_NO_PART, _NO_STATE}:
        return None
    value = (place.state or {}).get(optim_state_key)
    if entry.kind == _SHAPELESS:
        is_tensor = isinstance(value, Tensor)
        return value.to(place.device, copy=True) if is_tensor else torch.as_tensor(value)
    if entry.kind == _SCALAR:
        number = torch.as_tensor(0.0 if value is None else value).double()
        return stacked(number, place.slot.unit)[entry.rank].float()
    dtype = _DTYPES[entry.kind - _FIRST_DTYPE]
    piece = torch.empty(0, dtype=dtype) if value is None else value
    return assemble(piece, place.slot)


def safe_set_full_optimizer_state(param: Tensor, value: Tensor, optim_state_key: str) -> None:
    """Replace an entry of a parameter's optimizer state; a collective.

    Raises:
        UsageError: the optimizer keeps no such entry (yet), or the value has another shape.
    """
    place = _place(param)
    if place is None:
        return
    entry = _agreed(place, optim_state_key)
    if entry.kind in {_NO_PART, _NO_STATE}:
        raise _no_state(place)
    state = place.edited_state
    if entry.kind >= _FIRST_DTYPE:
        mine = place.mine_of(place.taken(value))
        if state is not None:
            state[optim_state_key].copy_(mine.view(place.slice.shape))
        return
    number = torch.as_tensor(value).double().to(place.slot.unit.mesh.device)
    broadcast_(number, place.slot.unit.mesh)
    if state is not None:
        state[optim_state_key] = _replaced(state[optim_state_key], number, place)


def _no_state(place: _Place) -> UsageError:
    return UsageError(
        compose(
            f"the optimizer has no state for {place.name} yet.",
            hint="set it after the first engine.step(), which makes it.",
        )
    )


def _replaced(old: Any, value: Tensor, place: _Place) -> Any:
    """A new value of an entry that is no slice, in the type that the optimizer keeps."""
    if isinstance(old, Tensor):
        return _checked(value, old.shape, f"the shape kept for {place.name}").to(old, copy=True)
    return type(old)(torch.as_tensor(value).item())


def safe_get_local_optimizer_state(param: Tensor, optim_state_key: str) -> Tensor | None:
    """A copy of this rank's slice of an entry of a parameter's optimizer state.

    None before the first step.

    Raises:
        UsageError: the optimizer keeps no such entry.
    """
    place = _place(param)
    if place is None:
        return None
    kind = _kind(place, optim_state_key)
    if kind == _NO_KEY:
        raise _no_such_key(place, optim_state_key)
    if kind == _NO_PART:
        return place.slice.to(place.device, copy=True)
    value = (place.state or {}).get(optim_state_key)
    if value is None:
        return None
    flat = torch.as_tensor(value).detach().reshape(-1)
    return flat.clone() if kind == _SCALAR else flat.to(place.device, copy=True)


def safe_set_local_optimizer_state(param: Tensor, value: Tensor, optim_state_key: str) -> None:
    """Replace this rank's slice of an entry of a parameter's optimizer state.

    Raises:
        UsageError: the optimizer keeps no such entry (yet), or the value is not as long.
    """
    place = _place(param)
    if place is None:
        return
    kind = _kind(place, optim_state_key)
    if kind == _NO_KEY:
        raise _no_such_key(place, optim_state_key)
    if kind == _NO_STATE:
        raise _no_state(place)
    mine = place.slice.reshape(-1)
    state = place.edited_state
    if kind >= _FIRST_DTYPE or state is None:
        mine = _checked(value, mine.shape, "this rank's slice")
        if state is not None:
            state[optim_state_key].copy_(mine.view(place.slice.shape))
    else:
        state[optim_state_key] = _replaced(state[optim_state_key], value, place)


# Gradients


def safe_get_full_grad(param: Tensor) -> Tensor | None:
    """A copy of a parameter's gradient in full, as the optimizer will see it; a collective.

    Averaged over ranks, divided by the number of micro-steps and by the loss scale, not clipped.
    Between the micro-steps of an accumulation it is what they have contributed so far, averaged
    over ranks for this call where the engine itself does that at the boundary only. None while
    there is no gradient: before the first backward, and after a step.
    """
    place = _place(param)
    if place is None:
        return None
    reduced, own = place.gradient, _average_of_unreduced(place)
    if reduced is None:
        return None if own is None else place.scaled_down(own)
    # Ranks that set their slices have widened them already.
    wide = torch.promote_types(reduced.dtype, place.slot.unit.precision.accumulate)
    full = assemble(reduced.to(wide), place.slot)
    return place.scaled_down(full if own is None else full.add_(own))


def _average_of_unreduced(place: _Place) -> Tensor | None:
    """The average of what ranks have accumulated on their own, if one of them has anything."""
    unit, index = place.slot.unit, place.slot.index
    if not unit.lifetime.grads_stay:
        return None
    mine = unit.unreduced(index)
    numel = unit.layout.numels[index]
    flat = torch.zeros(numel + 1, dtype=unit.gradient_dtype, device=unit.mesh.device)
    if mine is not None:
        flat[:numel].copy_(mine.reshape(-1))
        flat[numel] = 1
    mean_(flat, unit.mesh)
    return flat[:numel].view(unit.shapes[index]) if flat[numel] > 0 else None


def safe_set_full_grad(param: Tensor, value: Tensor) -> None:
    """Replace a parameter's gradient by one that the next step uses; a collective.

    Raises:
        UsageError: there is no averaged gradient to replace, or the value has another shape.
    """
    place = _place(param)
    if place is not None:
        _set_gradient(place, lambda: place.mine_of(place.taken(value)))


def safe_get_local_grad(param: Tensor) -> Tensor | None:
    """A copy of this rank's slice of a parameter's averaged gradient; None while there is none."""
    place = _place(param)
    if place is None or (gradient := place.gradient) is None:
        return None
    return place.scaled_down(gradient)


def safe_set_local_grad(param: Tensor, value: Tensor) -> None:
    """Replace this rank's slice of a parameter's averaged gradient.

    Raises:
        UsageError: there is no averaged gradient to replace, or the value is not as long.
    """
    place = _place(param)
    if place is not None:
        shape = place.slice.reshape(-1).shape
        _set_gradient(place, lambda: _checked(value, shape, "this rank's slice"))


def _set_gradient(place: _Place, mine: Callable[[], Tensor]) -> None:
    place.slot.unit.settle()
    place.slot.unit.widen_gradient()
    gradient = place.gradient
    if gradient is None:
        raise UsageError(
            compose(
                f"{place.name} has no gradient, averaged over ranks, that could be replaced.",
                hint="set it between the backward of an accumulation boundary and engine.step().",
            )
        )
    gradient.copy_(mine().to(gradient.device, torch.float64) * place.divisor)
    own = place.slot.unit.unreduced(place.slot.index)
    if own is not None:
        own.zero_()


def safe_update_full_grad_vectorized(
    param_list: Iterable[Tensor], update_func: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Replace gradients by ``update_func(gradient, parameter)``, one by one; a collective.

    Parameters without a gradient are left out.

    Raises:
        UsageError: a result has another shape than its parameter.
    """
    for param in param_list:
        gradient = safe_get_full_grad(param)
        if gradient is not None:
            safe_set_full_grad(param, update_func(gradient, param))
