"""What leaves the device and where it goes, planned by sizes alone before anything is moved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from zeroshard.config import Config
from zeroshard.core.layout import Layout
from zeroshard.core.lifetime import Lifetime
from zeroshard.core.slots import full_nbytes, full_shape
from zeroshard.core.unit import Member, Precision
from zeroshard.core.wrap import Group, cut
from zeroshard.engine.budget import GIB, in_words
from zeroshard.engine.fitting import (
    Demand,
    Stay,
    keep_by_ratio,
    keep_first,
    spend,
)
from zeroshard.optim.sizes import bytes_of_averages

__all__ = [
    "Home",
    "Placed",
    "Size",
    "Sizes",
    "Wishes",
    "averages",
    "buffer_bytes",
    "describe",
    "file_bytes",
    "host_bytes",
    "plan",
    "update_bytes",
    "wishes",
]

Home = Literal["none", "cpu", "nvme"]
"""Where something is kept, in the configuration's words; "none" is the device."""

_ALIGN_BYTES = 16  # as units are laid out
_NUM_BUFFERS = 4  # the fewest that a step makes
_AVERAGES_BYTES = 8.0  # of an optimizer that is not known, as of Adam


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a configuration says about leaving the device."""

    state: Home = "none"
    """Where optimizer state and master weights go, if they leave."""

    shards: Home = "none"
    """Where shards of parameters go, if they leave."""

    ratio: float = 1.0
    """The part of the state that leaves, where there is no budget."""

    budget: int | Literal["auto"] | None = None
    """Bytes that may stay on the device; "auto" begins with nothing that could leave."""

    most_shards: int = 0
    """Elements of shards that stay in host memory where shards go to files."""

    num_buffers: int | None = None
    """Through which state passes; None leaves it to the step."""


def wishes(settings: Config, *, trains: bool) -> Wishes:
    """Read a configuration; where nothing is trained, there is no state to move."""
    zero, extension = settings.zero_optimization, settings.zeroshard
    budget = extension.gpu_budget
    state: Home = zero.offload_optimizer.device
    if state == "none" and budget is not None:
        state = "cpu"
    # State that stays saves more time than a buffer of its size, so a budget goes to state.
    few = None if budget is None else _NUM_BUFFERS
    return Wishes(
        state=state if trains else "none",
        shards=zero.offload_param.device,
        ratio=zero.offload_optimizer.ratio,
        budget=int(budget * GIB) if isinstance(budget, float) else budget,
        most_shards=zero.offload_param.max_in_cpu or 0,
        num_buffers=zero.offload_optimizer.buffer_count or few,
    )


def averages(optimizer: torch.optim.Optimizer | None) -> dict[nn.Parameter, float]:
    """Bytes of state for each element of the parameters that an optimizer steps in fp32."""
    if optimizer is None:
        return {}
    found: dict[nn.Parameter, float] = {}
    for group in optimizer.param_groups:
        nbytes = bytes_of_averages(optimizer, group, torch.float32.itemsize)
        found |= dict.fromkeys(group["params"], _AVERAGES_BYTES if nbytes is None else nbytes)
    return found


@dataclass(frozen=True, slots=True)
class Size:
    """What one unit takes on one rank."""

    numel: int
    """Elements of the shard."""

    parameters: int
    """Bytes of parameters in the dtype computed in, between two steps."""

    gradients: int
    """Bytes of gradients when a step begins."""

    near: tuple[int, ...]
    """Bytes of the state of each parameter where it is on the device; those of master weights count
    only where they are kept beside the shard. Rounded up."""

    far: tuple[int, ...]
    """Bytes of the same where it is elsewhere."""

    can_free: bool
    """Whether the parameters are freed after use, so that the shard may leave."""

    is_master: bool
    """Whether the shard itself is stepped as long as both are on the device."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Works out what units take.

    Args:
        life: when parameters and gradients of units exist that are not persistent.
        precision: the dtypes of all units.
        num_shards: ranks that units are divided over.
        averages: bytes of the optimizer's state for each element of a parameter.
        has_one_addend: whether a gradient is that of one micro-step on one rank, which keeps the
            dtype that it came in, unless it stays in full.
    """

    life: Lifetime
    precision: Precision
    num_shards: int
    averages: Mapping[nn.Parameter, float]
    has_one_addend: bool = False

    def of(self, group: Group) -> Size:
        """The size of the unit that a group is built into."""
        kind = group.kind
        own = torch.uint8 if kind.as_bytes else group.members[0].param.dtype
        compute = kind.compute if own.is_floating_point and kind.compute else own
        wide = torch.float64 if own == torch.float64 else self.precision.master
        align = max(1, _ALIGN_BYTES // compute.itemsize)
        numels = [_nbytes(m) if kind.as_bytes else _numel(m) for m in group.members]
        layout = Layout(tuple(numels), self.num_shards, align)
        stays = self.life.params_stay or kind.persistent
        numel = layout.full_numel if stays else layout.shard_numel
        gradients = 0
        near: list[int] = []
        far: list[int] = []
        if kind.trained:
            held = self.precision.accumulate.itemsize, self.precision.reduce.itemsize
            is_narrow = self.has_one_addend and not self.life.grads_stay
            summed = min(*held, compute.itemsize) if is_narrow else max(held)
            gradients = summed * (layout.full_numel if self.life.grads_stay else layout.shard_numel)
            beside = 0 if compute == wide else wide.itemsize
            for position, member in enumerate(group.members):
                # As if each one began a shard of its own, and the first one took all the padding.
                part = -(-_round_up(numels[position], align) // self.num_shards)
                part += 0 if position else align
                average = self.averages.get(member.param, _AVERAGES_BYTES)
                near.append(math.ceil(part * (beside + average)))
                far.append(math.ceil(part * (wide.itemsize + average)))
        return Size(
            numel=layout.shard_numel,
            parameters=numel * compute.itemsize,
            gradients=gradients,
            near=tuple(near),
            far=tuple(far),
            can_free=not stays,
            is_master=kind.trained and compute == wide,
        )


def _numel(member: Member) -> int:
    return full_shape(member.param).numel()


def _nbytes(member: Member) -> int:
    return full_nbytes(member.param) + sum(each.get().nbytes for each in member.companions)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True, slots=True)
class Placed:
    """A unit to be built, and where what belongs to it is kept."""

    group: Group
    size: Size
    state: Home = "none"
    shard: Home = "none"


def plan(
    groups: Sequence[Group],
    size_of: Callable[[Group], Size],
    wished: Wishes,
    buffers: Callable[[Sequence[Size]], int] = lambda sizes: 0,
) -> list[Placed]:
    """Say for each unit what stays on the device; at most one group is cut into two units for it.

    Args:
        groups: the parameters of each unit, in the order of use.
        size_of: what a group takes as a unit.
        wished: what the configuration says.
        buffers: bytes of the buffers on the device through which the state of units passes.

    Raises:
        ConfigError: what cannot leave takes more than the budget.
    """
    sizes = [size_of(group) for group in groups]
    stay = _stay(sizes, wished, buffers)
    placed: list[Placed] = []
    for group, size, kept, keeps_shard in zip(groups, sizes, stay.state, stay.shards, strict=True):
        parts = [(group, size)]
        if 0 < kept < len(size.near):
            parts = [(half, size_of(half)) for half in cut(group, kept)]
        for number, (part, part_size) in enumerate(parts):
            is_kept = kept == len(size.near) or (kept > 0 and not number)
            state: Home = "none" if is_kept else wished.state
            # A shard that is the master weights is where they are.
            is_bound = keeps_shard or (part_size.is_master and state == "none")
            placed.append(Placed(part, part_size, state, "none" if is_bound else wished.shards))
    return _keep_in_memory(placed, wished.most_shards) if wished.shards == "nvme" else placed


def _stay(sizes: Sequence[Size], wished: Wishes, buffers: Callable[[Sequence[Size]], int]) -> Stay:
    """What stays on the device, by numbers of parameters and by units."""
    can_leave = [size.can_free and wished.shards != "none" for size in sizes]
    if isinstance(wished.budget, int):
        leaving = [size for size, can in zip(sizes, can_leave, strict=True) if can]
        stay = spend(
            Demand(
                state=[size.near for size in sizes],
                shards=[size.parameters for size in leaving],
                parameters=sum(
                    size.parameters for size, can in zip(sizes, can_leave, strict=True) if not can
                ),
                gradients=sum(size.gradients for size in sizes),
                buffers=buffers(sizes),
            ),
            wished.budget,
        )
        shards = iter(stay.shards)
        return Stay(stay.state, [next(shards) if can else True for can in can_leave])
    ratio = 0.0 if wished.state == "none" else 1.0 if wished.budget else wished.ratio
    return Stay(keep_by_ratio([size.far for size in sizes], ratio), [not can for can in can_leave])


def _keep_in_memory(placed: Sequence[Placed], most_numel: int) -> list[Placed]:
    """Let the first shards that leave go to host memory, up to a number of elements."""
    numels = [each.size.numel for each in placed if each.shard == "nvme"]
    kept = iter(keep_first(numels, most_numel))
    return [
        replace(each, shard="cpu") if each.shard == "nvme" and next(kept) else each
        for each in placed
    ]


def host_bytes(placed: Iterable[Placed]) -> int:
    """Bytes that a plan keeps in memory of the host."""
    return _bytes_at("cpu", placed)


def update_bytes(placed: Iterable[Placed], precision: Precision, *, sums: bool) -> int:
    """Bytes of host memory for gradients, if state is stepped there.

    Args:
        placed: the plan.
        precision: the dtypes of all units.
        sums: whether gradients are sums over several micro-steps.
    """
    reduced = min(precision.reduce.itemsize, precision.accumulate.itemsize)
    wide = precision.accumulate.itemsize if sums else reduced
    return wide * sum(each.size.numel for each in placed if each.state == "cpu")


def file_bytes(placed: Sequence[Placed]) -> tuple[int, int]:
    """Bytes of optimizer state, and of shards, that a plan keeps in files."""
    state = sum(sum(each.size.far) for each in placed if each.state == "nvme")
    return state, sum(each.size.parameters for each in placed if each.shard == "nvme")


def _bytes_at(home: Home, placed: Iterable[Placed]) -> int:
    return sum(
        (sum(each.size.far) if each.state == home else 0)
        + (each.size.parameters if each.shard == home else 0)
        for each in placed
    )


def describe(placed: Sequence[Placed], *, pins_state: bool, pins_shards: bool) -> str:
    """Say where a rank's optimizer state and, where some of them leave, its shards are."""
    state: dict[str, int] = {}
    shards: dict[str, int] = {}
    for each in placed:
        at = _in_words(each.state, pins_state)
        nbytes = sum(each.size.near if each.state == "none" else each.size.far)
        state[at] = state.get(at, 0) + nbytes
        at = _in_words(each.shard, pins_shards)
        shards[at] = shards.get(at, 0) + each.size.parameters
    parts = [f"master weights and optimizer state: {_list(state)}"]
    if any(each.shard != "none" for each in placed):
        parts.append(f"shards of parameters: {_list(shards)}")
    return "; ".join(parts)


def buffer_bytes(
    wished: Wishes,
    most_numel: int | None,
    sizes: Sequence[Size],
) -> int:
    """Bytes of the buffers on the device through which state passes in a step.

    Args:
        wished: what the configuration says.
        most_numel: elements that come to the device at once; None for those of a whole unit.
        sizes: of the units.
    """
    largest = num_loads = 0
    for size in sizes:
        if size.far and size.numel:
            share = min(1.0, (most_numel or size.numel) / size.numel)
            largest = max(largest, math.ceil(sum(size.far) * share))
            num_loads += math.ceil(1 / share)
    return min(wished.num_buffers or _NUM_BUFFERS, num_loads) * largest


def _in_words(home: Home, pins: bool) -> str:
    match home:
        case "none":
            return "on the device"
        case "cpu":
            return "in page-locked host memory" if pins else "in host memory"
        case "nvme":
            return "in files"


def _list(places: Mapping[str, int]) -> str:
    found = {at: nbytes for at, nbytes in places.items() if nbytes}
    if len(found) == 1:
        ((at, nbytes),) = found.items()
        return f"all {in_words(nbytes)} {at}"
    return ", ".join(f"{in_words(nbytes)} {at}" for at, nbytes in found.items()) or "none"
