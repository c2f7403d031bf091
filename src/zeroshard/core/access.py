"""Reading and editing parameters, which ranks hold in parts, outside of forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zeroshard.core.agreed import agreed
from zeroshard.core.collectives import Answered, all_gather, broadcast_
from zeroshard.core.hook import Hook
from zeroshard.core.slots import Slot, slot_of
from zeroshard.core.transport import rewriting
from zeroshard.core.unit import Unit
from zeroshard.core.waiting import waiting_of
from zeroshard.errors import OffloadError, UsageError, compose

__all__ = [
    "Gatherable",
    "assemble",
    "companions_on_host",
    "gathered",
    "guard_state_dict",
    "parameters_in",
    "reshow",
    "rewrite",
    "stacked",
]


Gatherable: TypeAlias = nn.Module | Tensor | Iterable[Any] | None
"""A module, a parameter, None, or an iterable of these, however nested."""


def parameters_in(params: Gatherable) -> list[Tensor]:
    """The parameters and other tensors of a module, or of nested iterables of modules and tensors.

    Raises:
        UsageError: something else is among them.
    """
    if params is None:
        return []
    if isinstance(params, Tensor):
        return [params]
    if isinstance(params, nn.Module):
        return list(params.parameters())
    if isinstance(params, Mapping):
        params = params.values()
    if isinstance(params, (str, bytes)) or not isinstance(params, Iterable):
        raise UsageError(
            compose(
                f"parameters to gather were given as a {type(params).__name__}.",
                hint="pass a module, a parameter, or an iterable of them.",
            )
        )
    return [tensor for each in params for tensor in parameters_in(each)]


def _units(params: Gatherable) -> list[Unit]:
    """The units of the given parameters, in the order of their first parameter's name."""
    units: dict[int, Unit] = {}
    for param in parameters_in(params):
        slot = slot_of(param)
        if slot is not None:
            units[id(slot.unit)] = slot.unit
    return sorted(units.values(), key=lambda unit: unit.members[0].name)


@contextmanager
def gathered(params: Gatherable, modifier_rank: int | None = None) -> Iterator[None]:
    """Parameters are full inside; a collective that every rank enters.

    Whole units are gathered, so the neighbours of a parameter become readable with it. Parameters
    that no engine manages are left alone.

    It may be nested. What an outer one holds is full on every rank, so for that an inner one does
    nothing at entry, and any subset of the ranks may enter it. The outermost one that names a
    ``modifier_rank`` keeps the edits, when it is left:

    ==============  ==============  ========================================================
    outer           inner           edits made in the inner one
    ==============  ==============  ========================================================
    none            none            an error, as there is nobody to keep them
    none            a rank          kept when the inner one is left; every rank enters it
    a rank          none, or equal  kept when the outer one is left
    a rank          another rank    an error at entry, as the outer one would overwrite them
    ==============  ==============  ========================================================

    In a forward, the units belong to the running module from then on, and are full in its backward.

    An exception inside changes nothing about that, so ranks that raise and ranks that do not stay
    in step.

    Args:
        params: a module, a parameter, or an iterable of these, however nested. None, tensors and
            parameters that no engine manages may be among them.
        modifier_rank: the rank whose edits are kept, in the weights that gathers read and in the
            master weights.

    Raises:
        UsageError: there is no such rank, an enclosing one names another, or, at the end, a
            parameter was edited and no rank was named. Edits through ``param.data`` are not seen.
    """
    units = _units(params)
    _agree(units, modifier_rank)
    for unit in units:
        _check_access(unit, modifier_rank)
    were_readable = [unit.is_readable for unit in units]
    were_full = _make_full(units)
    lost: list[str] = []
    with ExitStack() as afterwards:  # the last entry comes first
        for unit, was_full, was_readable in zip(units, were_full, were_readable, strict=True):
            if not was_full:
                afterwards.callback(unit.free)
            elif unit.keeper is not None and not was_readable:
                afterwards.callback(unit.hide)
            if not unit.is_held:
                afterwards.callback(lambda unit=unit: lost.extend(unit.edited))
        for unit in units:
            afterwards.enter_context(unit.held())
        if modifier_rank is not None:
            kept = [unit for unit in units if unit.modifier_rank is None]
            afterwards.callback(_adopt, kept, modifier_rank)
            for unit in kept:
                unit.modifier_rank = modifier_rank
            for waiting in waiting_of(kept):
                afterwards.enter_context(waiting.kept(modifier_rank))
        yield
    if lost:
        raise UsageError(
            compose(
                f"{lost[0]} was edited inside gathered(...) that names no modifier_rank: no other "
                "rank knows of the edit, nor do the master weights, and it would be lost.",
                hint="pass modifier_rank=RANK on every rank; the edits of that rank are kept.",
            )
        )


def _agree(units: Sequence[Unit], modifier_rank: int | None) -> None:
    """Let the ranks agree to gather those that wait for an engine, where any is to be gathered."""
    for waiting in waiting_of(units):
        kept = [unit for unit in units if unit.keeper is waiting]
        is_outermost = bool(modifier_rank) and not waiting.is_inside_block
        if is_outermost or not all(unit.is_held for unit in kept):
            waiting.enter(kept)


def _check_access(unit: Unit, modifier_rank: int | None) -> None:
    unit.check_present()
    if unit.mesh.is_destroyed and not unit.lifetime.params_stay:
        raise UsageError(
            compose(
                f"{unit.name} cannot be gathered: its engine was destroyed, and other ranks "
                "hold the rest of it.",
                hint="gather what is wanted before engine.destroy().",
            )
        )
    if modifier_rank is None:
        return
    if not isinstance(modifier_rank, int) or not 0 <= modifier_rank < unit.mesh.world:
        raise UsageError(
            compose(
                f"modifier_rank is {modifier_rank!r}, but the ranks that hold {unit.name} are "
                f"0 to {unit.mesh.world - 1}.",
                hint="name one of these ranks, the same on all of them.",
            )
        )
    if unit.modifier_rank not in {None, modifier_rank}:
        raise UsageError(
            compose(
                f"{unit.name} is gathered with modifier_rank={modifier_rank} inside of another "
                f"that names rank {unit.modifier_rank}, whose weights would replace the edits.",
                hint="name the same rank in both, or leave the outer one first.",
            )
        )


def _make_full(units: Sequence[Unit]) -> list[bool]:
    """Gather units, and say which were full before. A collective.

    Raises:
        OffloadError: on every rank, if one of them cannot read its shard. None is full then that
            was not before.
    """
    were_full: list[bool] = []
    failures: list[OffloadError] = []
    for unit in units:
        is_used = unit.use_here is not None and not unit.is_held and unit.use_here()
        were_full.append(unit.is_full)
        # Also where it is full here: between forward and backward other ranks may have freed it.
        if not (unit.lifetime.params_stay or unit.is_held or is_used):
            unit.gather()
        try:
            unit.wait()
        except OffloadError as error:  # the other ranks go on to the next unit
            failures.append(error)
    in_files = [unit for unit in units if unit.store.reader is not None]
    try:
        _raise_together(failures, in_files, "read its shards")
    except OffloadError:
        for unit, was_full in zip(units, were_full, strict=True):
            if not was_full:
                unit.free()
        raise
    return were_full


def _raise_together(
    failures: Sequence[OffloadError], could_fail: Sequence[Unit], what: str
) -> None:
    """Raise on all ranks what has failed on one. A collective if there are units that could."""
    meshes = [unit.mesh for unit in could_fail if unit.mesh.control is not None]
    with agreed(meshes[0], what) if meshes else nullcontext():
        if failures:
            raise failures[0]


@torch.no_grad()
def _adopt(units: Iterable[Unit], src: int) -> None:
    """Keep the edits of rank ``src`` on all ranks."""
    units = list(units)
    for unit in units:
        unit.modifier_rank = None
    errors: list[UsageError] = []
    failures: list[OffloadError] = []
    with rewriting(unit.transport for unit in units):
        for unit in units:
            with Answered(unit.mesh.rank, f"to share the edits of {unit.name}"):
                try:
                    unit.adopt(partial(broadcast_, mesh=unit.mesh, src=src))
                except UsageError as error:  # the other ranks go on to the next unit
                    errors.append(error)
                except OffloadError as error:
                    failures.append(error)
    far = [unit for unit in units if not unit.state.is_near or unit.store.reader is not None]
    _raise_together(failures, far, "keep the edits")
    if errors:
        raise errors[0]


def assemble(piece: Tensor, slot: Slot) -> Tensor:
    """A parameter-shaped tensor from every rank's slice of it; a collective over the shard axis.

    Args:
        piece: this rank's slice, of one dtype on all ranks, and empty where it owns nothing.
        slot: the parameter's place.
    """
    unit, index = slot.unit, slot.index
    owned = [unit.layout.owned(index, rank) for rank in range(unit.mesh.shard.size)]
    longest = max(1, *(part.numel for part in owned))
    mine = torch.zeros(longest, dtype=piece.dtype, device=unit.mesh.device)
    mine[: piece.numel()].copy_(piece.reshape(-1))
    pieces = stacked(mine, unit)
    flat = torch.cat([row[: part.numel] for row, part in zip(pieces, owned, strict=True)])
    return flat.view(unit.shapes[index])


def stacked(mine: Tensor, unit: Unit) -> Tensor:
    """The tensors that the ranks of the shard axis give, of one shape, one after another."""
    axis = unit.mesh.shard
    mine = mine.to(unit.mesh.device).contiguous()
    rows = mine.new_empty((axis.size, *mine.shape))
    with Answered(unit.mesh.rank, f"to read the state of {unit.name}"):
        all_gather(rows.view(-1), mine.view(-1), axis).wait()
    return rows


def companions_on_host(units: Iterable[Unit], *, wanted: bool) -> dict[Tensor, Tensor]:
    """Copies of all companions, by what is shown in their place while they are freed.

    A collective, also for ranks by which they are not ``wanted``: those get none.
    """
    copies: dict[Tensor, Tensor] = {}
    for unit in units:
        if unit.companions:
            with gathered([member.param for member in unit.members]):
                if wanted:
                    copies |= {shown: full.to("cpu", copy=True) for shown, full in unit.companions}
    return copies


def rewrite(unit: Unit, edit: Callable[[], object]) -> None:
    """Edit master weights and show them to whoever reads parameters from now on; a collective."""
    unit.at_home(edits=True)
    with torch.no_grad(), rewriting([unit.transport]):
        edit()
        unit.write_master()
    reshow(unit)


def reshow(unit: Unit) -> None:
    """Let full parameters be what their shards are now; a collective."""
    was_full = unit.is_full
    if unit.gathers_alone and not was_full:
        return
    with torch.no_grad():
        unit.gather()  # also where it is not full here: between two passes it may be on other ranks
        unit.wait()
        if not was_full:
            unit.free()


def guard_state_dict(model: nn.Module, on_load: Callable[[Unit], object]) -> list[RemovableHandle]:
    """Refuse to load a state dict into freed parameters.

    One that is made of freed parameters shows names, and its values refuse to be read. ``on_load``
    is told each unit whose full parameters are overwritten.
    """

    def before_load(
        module: nn.Module, state: object, prefix: object, metadata: dict[str, Any], *_: object
    ) -> None:
        if metadata.get("assign_to_params_buffers"):
            raise UsageError("load_state_dict(assign=True) would replace parameters of the engine.")
        _refuse_freed(module)
        for unit in _units(list(module.parameters(recurse=False))):
            on_load(unit)

    return [
        module.register_load_state_dict_pre_hook(Hook(before_load)) for module in model.modules()
    ]


def _refuse_freed(module: nn.Module) -> None:
    for name, param in module.named_parameters(recurse=False):
        slot = slot_of(param)
        if slot is not None and not slot.unit.is_full:
            raise UsageError(
                compose(
                    f"load_state_dict() of {type(module).__name__} needs full parameters, but the "
                    f"unit of its {name} is freed: its data lives in {slot.unit.mesh.shard.size} "
                    "shards.",
                    hint="every rank enters `with zeroshard.gathered(model, modifier_rank=0):` and "
                    "calls it inside.",
                )
            )
