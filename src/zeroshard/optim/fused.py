"""Adam and AdamW over the whole shard of each unit, in place of one slice per parameter.

The averages are flat tensors, see [Note: flat state] in `flat_state.py`, and the counts of steps of
all slices are views of one tensor. So torch's own step works on the same memory, and either may
make the next step. A slice whose state was replaced, as by a checkpoint, has the new values copied
in before a step.

Slices that lie side by side and are in one param group are stepped as one, with the padding between
them, which is zero and stays it.
"""

# Hooks of optimizers and versions of tensors have no public name.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from zeroshard.core.unit import Unit
from zeroshard.core.with_triton import if_it_runs
from zeroshard.optim import adam
from zeroshard.optim.adam import Rule, Shards, Update
from zeroshard.optim.carriers import Load
from zeroshard.optim.flat_state import FlatState

__all__ = ["FusedAdam", "Part", "Pass", "is_adam", "is_watched", "triton_update"]

_log = logging.getLogger(__name__)
_AVERAGE, _SQUARE, _STEP = "exp_avg", "exp_avg_sq", "step"
_KINDS = (torch.optim.Adam, torch.optim.AdamW)
_OTHER_FORMULAS = ("amsgrad", "maximize", "differentiable", "capturable")
_MOST_RUNS_PER_UNIT = 16


@dataclass(frozen=True, slots=True)
class _Run:
    """Slices side by side that are in one param group, in elements of the shard."""

    group: int
    start: int
    stop: int


def _cut(flat: Tensor, start: int, stop: int) -> Tensor:
    return flat if stop - start == flat.numel() else flat[start:stop]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the state of one slice belongs: its part of the flat tensors, as addresses."""

    index: int
    piece: nn.Parameter
    step: Tensor
    addresses: tuple[int, int, int]

    def is_home(self, state: Mapping[str, Any]) -> bool:
        """Whether the state of the slice is there."""
        try:
            found = (
                state[_AVERAGE].data_ptr(),
                state[_SQUARE].data_ptr(),
                state[_STEP].data_ptr(),
            )
        except (KeyError, AttributeError):  # there is none yet, or it is a number
            return False
        return found == self.addresses


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A range of a unit's shard, with its master weights and averages: what is stepped at once."""

    start: int
    stop: int
    load: Load


@dataclass(frozen=True, slots=True)
class Pass:
    """A range of a unit's shard whose tensors are stepped by one rule."""

    start: int
    stop: int
    shards: Shards
    rule: Rule


class _Home:
    """The flat state of a unit."""

    def __init__(self, unit: Unit, state: FlatState, steps: Tensor) -> None:
        assert unit.master is not None, f"{unit.name} is frozen and has no state"
        self._unit, self._state, self._dtype = unit, state, unit.master.dtype
        self.average, self.square = (state.flat(name, self._dtype) for name in (_AVERAGE, _SQUARE))
        self.places: list[_Place] = []
        for index, piece in enumerate(unit.slices):
            if piece.numel():
                step = steps[len(self.places)]
                average, square = (view.data_ptr() for view in self.views(index))
                place = _Place(index, piece, step, (average, square, step.data_ptr()))
                self.places.append(place)

    def views(self, index: int) -> tuple[Tensor, Tensor]:
        """The averages of one slice."""
        average, square = (
            self._state.part(name, self._dtype, index) for name in (_AVERAGE, _SQUARE)
        )
        return average, square

    def parts(self, most_numel: int) -> list[Part]:
        """The ranges that are stepped one after another; a single one where nothing is moved."""
        unit, master = self._unit, self._unit.master
        assert master is not None, f"{unit.name} is frozen and has no state"
        numel = master.numel()
        most = max(numel, 1) if unit.state.is_near else most_numel
        flats = (master, self.average, self.square)
        parts: list[Part] = []
        for start in range(0, numel, most):
            stop = min(start + most, numel)
            load = Load(unit.state, tuple(_cut(flat, start, stop) for flat in flats))
            parts.append(Part(start, stop, load))
        return parts

    def take_in(self, place: _Place, state: dict[str, Any]) -> str | None:
        """Copy the state of a slice in, and let the optimizer find it here; or say what it is."""
        views = self.views(place.index)
        given = state.get(_AVERAGE), state.get(_SQUARE)
        self._unit.at_home(edits=True)
        if not state:
            for own in () if self._state.is_fresh else views:
                own.zero_()
            place.step.zero_()
        elif _STEP not in state or not all(
            isinstance(value, Tensor) and value.shape == own.shape and value.dtype == own.dtype
            for value, own in zip(given, views, strict=True)
        ):
            return "its state is not that of plain Adam in the dtype of the master weights"
        else:
            for value, own in zip(given, views, strict=True):
                assert isinstance(value, Tensor), "looked at above"
                if value.data_ptr() != own.data_ptr():
                    own.copy_(value)
            place.step.copy_(torch.as_tensor(state[_STEP]))
        state |= {_AVERAGE: views[0], _SQUARE: views[1], _STEP: place.step}
        return None


class FusedAdam:
    """Makes the steps of an optimizer that is plain Adam, on the flat state of each unit.

    Each step asks :meth:`prepare` first, as the user may have changed what the optimizer is. Why a
    step cannot be made here is logged at ``log_level``.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        states: Mapping[Unit, FlatState],
        device: torch.device,
        triton_update: Update | None,
        *,
        most_numel: int,
        log_level: int = logging.INFO,
    ) -> None:
        self._log_level, self._most_numel = log_level, most_numel
        self._inner, self._units, self._device = inner, list(states), device
        self._triton = triton_update
        self._groups: list[list[int]] = []  # ids of the slices of each group, as they were
        self._runs: dict[Unit, list[_Run]] = {}
        self._states = states
        self._homes: dict[Unit, _Home] = {}
        self._parts: dict[Unit, list[Part]] = {}
        self._steps: Tensor | None = None
        self._steps_version = -1
        self._count: int | None = None  # of steps made; None where slices do not agree
        self._is_open = False  # whether a step is to be confirmed
        self._rules: list[Rule] = []
        self._reason: str | None = None

    def prepare(self) -> bool:
        """Decide whether the next step can be made here, and bring the state into its place."""
        reason = self._obstacle()
        if reason is not None and reason != self._reason:
            kind = type(self._inner).__name__
            _log.log(self._log_level, "torch's own kernels step %s: %s", kind, reason)
        self._reason = reason
        return reason is None

    def reserve(self) -> None:
        """Take the memory of state that is kept off the device, before the first step."""
        for unit, state in self._states.items():
            if unit.master is not None and not unit.state.is_near:
                for name in (_AVERAGE, _SQUARE):
                    state.flat(name, unit.master.dtype)

    def parts(self, unit: Unit) -> Sequence[Part]:
        """What is stepped one after another; the same objects as long as state is where it is."""
        parts = self._parts.get(unit)
        if parts is None:
            parts = self._parts[unit] = self._homes[unit].parts(self._most_numel)
        return parts

    @property
    def may_step(self) -> bool:
        """Whether nothing spoke against the last step, if there was one."""
        return self._reason is None

    @property
    def is_laid_out(self) -> bool:
        """Whether the state of all units has its place, so that it may be read ahead."""
        return len(self._homes) == len(self._units)

    def update(
        self,
        unit: Unit,
        part: Part,
        tensors: Sequence[Tensor],
        out: Tensor | None,
        scale: tuple[Tensor, Tensor | None],
    ) -> None:
        """Step a part of a unit.

        Args:
            unit: whose gradient it is.
            part: a part of it.
            tensors: the part's master weights and averages, on the device.
            out: what the whole unit's `Unit.shard_to_write` gave.
            scale: what multiplies the gradient, and what is 1 to step nothing, else 0, or None:
                scalars in fp32 on the device.
        """
        assert unit.grad_shard is not None, f"{unit.name}: no gradient"
        update = adam.update_ if self._triton is None else self._triton
        for each in self.passes(unit, part, tensors, unit.grad_shard, out):
            update(each.shards, each.rule, *scale)

    def passes(
        self, unit: Unit, part: Part, tensors: Sequence[Tensor], grad: Tensor, out: Tensor | None
    ) -> Iterator[Pass]:
        """What is done to step a part of a unit, wherever its tensors are.

        Args:
            unit: whose runs of parameters they are.
            part: a part of it.
            tensors: the part's master weights and averages.
            grad: the gradient of the whole unit.
            out: where the unit's stepped weights go in the compute dtype, as a whole.
        """
        master, average, square = tensors
        for run in self._runs[unit]:
            start, stop = max(run.start, part.start), min(run.stop, part.stop)
            if start >= stop:
                continue
            first, last = start - part.start, stop - part.start
            shards = Shards(
                _cut(grad, start, stop),
                _cut(master, first, last),
                _cut(average, first, last),
                _cut(square, first, last),
                None if out is None else _cut(out, start, stop),
            )
            yield Pass(start, stop, shards, self._rules[run.group])

    def advance(self, found_inf: Tensor | None) -> None:
        """Count a step; with a flag, `confirm` says later whether it was made."""
        assert self._steps is not None and self._count is not None, "a step was prepared"
        if found_inf is None:
            self._steps.add_(1)
            self._count += 1
        else:
            # Counts on the host make it wait; by now the whole step is queued.
            self._steps.add_(1 - found_inf.to(self._steps.device))
            self._is_open = True
        self._steps_version = self._steps._version

    def confirm(self, is_made: bool) -> None:
        """Learn whether the last step was made, if it is open."""
        if self._is_open and self._count is not None:
            self._count += is_made
        self._is_open = False

    def let_go(self) -> None:
        """Hold on to no state of the device: its memory is to be moved, or no longer wanted."""
        self._homes.clear()
        self._parts.clear()
        for unit, state in self._states.items():
            if unit.state.is_near:
                state.give_back()

    # What must be so

    def _obstacle(self) -> str | None:
        """What speaks against a step here, if anything."""
        reason = self._foreign() or self._lay_out()
        if reason is None:
            # Torch's fused kernels want the counts on the device. Its others take them from
            # anywhere; to count a step on the host that may be skipped is to wait for the device.
            on_device = self._triton is not None or self._inner.param_groups[0].get("fused")
            reason = self._bring_home(self._device if on_device else torch.device("cpu"))
        if reason is None and self._count is None:
            reason = "its parameters have made different numbers of steps"
        if reason is None:
            assert self._count is not None
            kind, groups = type(self._inner), self._inner.param_groups
            self._rules = [_rule(group, kind, self._count + 1) for group in groups]
        return reason

    def _foreign(self) -> str | None:
        """What the optimizer is beside plain Adam with known numbers."""
        if not is_adam(self._inner):
            return "it is not torch's Adam or AdamW"
        groups = self._inner.param_groups
        numbers = [number for group in groups for number in (group["lr"], *group["betas"])]
        reasons = {
            "hooks or a wrapper of its step may want each slice's gradient": is_watched(
                self._inner
            ),
            f"one of {', '.join(_OTHER_FORMULAS)} is set": any(
                group.get(key) for group in groups for key in _OTHER_FORMULAS
            ),
            "its learning rate or a beta is on the device": any(
                isinstance(number, Tensor) and number.device.type != "cpu" for number in numbers
            ),
            "some of its master weights are not in fp32": any(
                unit.master is None or unit.master.dtype != torch.float32 for unit in self._units
            ),
            "some of its param groups are fused and others are not": (
                len({bool(group.get("fused")) for group in groups}) > 1
            ),
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    # Where the slices are

    def _lay_out(self) -> str | None:
        """Divide the shards into runs of one param group."""
        groups = [[id(piece) for piece in group["params"]] for group in self._inner.param_groups]
        if groups != self._groups:
            number_of = {piece: number for number, own in enumerate(groups) for piece in own}
            slices = {id(piece) for unit in self._units for piece in unit.slices if piece.numel()}
            if slices != number_of.keys():
                return "its param groups hold other tensors than the slices of the units"
            self._runs = {unit: list(_runs(unit, number_of)) for unit in self._units}
            self._groups = groups
        if sum(map(len, self._runs.values())) > _MOST_RUNS_PER_UNIT * len(self._units):
            return "parameters of different groups alternate too often"
        return None

    # Where the state is

    def _bring_home(self, device: torch.device) -> str | None:
        """Let the state of all slices be views of flat tensors, with the values it has."""
        numel = sum(map(len, self._groups))
        is_fit = self._steps is not None and self._steps.device.type == device.type
        if self._steps is None or not is_fit or self._steps.numel() != numel:
            self._steps = torch.zeros(numel, dtype=torch.float32, device=device)
            self._homes.clear()
            self._parts.clear()
        at = 0
        is_new = False
        for unit in self._units:
            if (home := self._homes.get(unit)) is None:
                home = self._homes[unit] = _Home(unit, self._states[unit], self._steps[at:])
            for place in home.places:
                state = self._inner.state[place.piece]
                if not place.is_home(state):
                    is_new = True
                    if (reason := home.take_in(place, state)) is not None:
                        return reason
            self._states[unit].is_fresh = False
            at += len(home.places)
        if is_new or self._steps._version != self._steps_version:
            # The only reading of the device: after somebody else has set or counted the steps.
            counts = {0.0} if numel == 0 else set(self._steps.tolist())
            self._count = int(counts.pop()) if len(counts) == 1 else None
            self._steps_version = self._steps._version
        return None


def is_adam(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer is torch's Adam or AdamW, and no class derived from them."""
    return type(optimizer) in _KINDS


def is_watched(optimizer: torch.optim.Optimizer) -> bool:
    """Whether somebody else wants to see each step of an optimizer and its gradients."""
    hooks: Iterator[Callable[..., Any]] = chain(
        optimizer._optimizer_step_pre_hooks.values(),
        optimizer._optimizer_step_post_hooks.values(),
        _global_optimizer_pre_hooks.values(),
        _global_optimizer_post_hooks.values(),
    )
    if not all(_is_ours(hook) for hook in hooks):
        return True
    # Learning rate schedules wrap the step to know that it was called, and want no more.
    wrapper = vars(optimizer).get("step")
    return wrapper is not None and not (
        hasattr(wrapper, "_wrapped_by_lr_sched")
        and getattr(wrapper, "__wrapped__", None) is type(optimizer).step
    )


def _is_ours(hook: Callable[..., Any]) -> bool:
    return str(getattr(hook, "__module__", "")).partition(".")[0] == "zeroshard"


def _rule(group: Mapping[str, Any], kind: type, step: int) -> Rule:
    beta1, beta2 = group["betas"]
    return Rule(
        lr=float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group["eps"]),
        decay=float(group["weight_decay"]),
        decoupled=bool(group.get("decoupled_weight_decay", kind is torch.optim.AdamW)),
        step=step,
    )


def _runs(unit: Unit, number_of: Mapping[int, int]) -> Iterator[_Run]:
    """The longest runs of a unit's slices that are in one group."""
    run: _Run | None = None
    for index, piece in enumerate(unit.slices):
        if not piece.numel():
            continue
        start, stop = unit.layout.slice_of(index, unit.mesh.shard.rank)
        group = number_of[id(piece)]
        if run is not None and run.group == group:
            run = _Run(group, run.start, stop)
            continue
        if run is not None:
            yield run
        run = _Run(group, start, stop)
    if run is not None:
        yield run


@functools.cache
def triton_update(device: torch.device) -> Update | None:
    """The Triton kernel, once it has run on this device; None where it cannot."""

    def load() -> Update:
        from zeroshard.optim import kernels  # noqa: PLC0415 - needs Triton

        one = torch.ones(1, device=device)
        shards = Shards(one, one.clone(), one.clone(), one.clone(), one.bfloat16())
        kernels.update_(shards, Rule(0.1, 0.9, 0.99, 1e-8, 0.0, True, 1), one[0], None)
        return kernels.update_

    return if_it_runs(device, load, "torch's kernels step the optimizer")
