"""Reading and editing full parameters outside of forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zeroshard.core.collectives import broadcast_
from zeroshard.core.unit import Unit, slot_of
from zeroshard.errors import UsageError, compose

__all__ = ["gathered", "guard_state_dict"]


def _units(params: nn.Module | Tensor | Iterable[Tensor]) -> list[Unit]:
    """The units of the given parameters, in the order of their first parameter's name."""
    if isinstance(params, nn.Module):
        params = params.parameters()
    elif isinstance(params, Tensor):
        params = [params]
    units: dict[int, Unit] = {}
    for param in params:
        slot = slot_of(param)
        if slot is not None:
            units[id(slot.unit)] = slot.unit
    return sorted(units.values(), key=lambda unit: unit.members[0].name)


@contextmanager
def gathered(
    params: nn.Module | Tensor | Iterable[Tensor], modifier_rank: int | None = None
) -> Iterator[None]:
    """Parameters are full inside; a collective that every rank enters.

    Whole units are gathered, so the neighbours of a parameter become readable with it. Parameters
    that no engine manages are left alone.

    Args:
        params: a module, a parameter, or several parameters.
        modifier_rank: the rank whose edits are kept, in the weights that gathers read and in the
            master weights. Without it edits are lost where parameters are freed, and must not be
            made where they stay.
    """
    units = _units(params)
    for unit in units:
        if unit.mesh.is_destroyed and not unit.lifetime.params_stay:
            raise UsageError(
                compose(
                    f"{unit.name} cannot be gathered: its engine was destroyed, and other ranks "
                    "hold the rest of it.",
                    hint="gather what is wanted before engine.destroy().",
                )
            )
    were_full = [unit.is_full for unit in units]
    for unit in units:
        # Also where it is full here: between forward and backward other ranks may have freed it.
        if not unit.lifetime.params_stay:
            unit.gather()
        unit.wait()
    with ExitStack() as afterwards:  # the last entry comes first
        for unit, was_full in zip(units, were_full, strict=True):
            if not was_full:
                afterwards.callback(unit.free)
        for unit in units:
            afterwards.enter_context(unit.held())
        if modifier_rank is not None:
            afterwards.callback(_adopt, units, modifier_rank)
        yield


@torch.no_grad()
def _adopt(units: Iterable[Unit], src: int) -> None:
    """Keep the edits of rank ``src`` on all ranks."""
    for unit in units:
        unit.adopt(partial(broadcast_, mesh=unit.mesh, src=src))


def guard_state_dict(model: nn.Module, on_load: Callable[[Unit], object]) -> list[RemovableHandle]:
    """Refuse to save or load a state dict of freed parameters, which would be empty tensors.

    ``on_load`` is told each unit whose full parameters are overwritten.
    """

    def before_save(module: nn.Module, *_: object) -> None:
        _refuse_freed(module, "state_dict()", "with zeroshard.gathered(model):")

    def before_load(
        module: nn.Module, state: object, prefix: object, metadata: dict[str, Any], *_: object
    ) -> None:
        if metadata.get("assign_to_params_buffers"):
            raise UsageError("load_state_dict(assign=True) would replace parameters of the engine.")
        hint = "with zeroshard.gathered(model, modifier_rank=0):"
        _refuse_freed(module, "load_state_dict()", hint)
        for unit in _units(list(module.parameters(recurse=False))):
            on_load(unit)

    handles: list[RemovableHandle] = []
    for module in model.modules():
        handles.append(module.register_state_dict_pre_hook(before_save))
        handles.append(module.register_load_state_dict_pre_hook(before_load))
    return handles


def _refuse_freed(module: nn.Module, call: str, hint: str) -> None:
    for name, param in module.named_parameters(recurse=False):
        slot = slot_of(param)
        if slot is not None and not slot.unit.is_full:
            raise UsageError(
                compose(
                    f"{call} of {type(module).__name__} needs full parameters, but the unit of its "
                    f"{name} is freed: its data lives in {slot.unit.mesh.shard.size} shards.",
                    hint=f"every rank enters `{hint}` and calls it inside.",
                )
            )
