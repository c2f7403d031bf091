"""Which saved parameter is which parameter of the model, by all names that tied ones have."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zeroshard.checkpoint.manifest import Manifest
from zeroshard.checkpoint.tensors import dtype_named
from zeroshard.checkpoint.training import Place, Training, places
from zeroshard.errors import CheckpointError, compose

__all__ = ["Match", "match"]

_log = logging.getLogger(__name__)
_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Match:
    """What is read into the model: parameters with their saved names, and buffers likewise."""

    parameters: Sequence[tuple[Place, str]]
    buffers: Mapping[str, Tensor]


def match(training: Training, manifest: Manifest, where: object, *, strict: bool) -> Match:
    """Find what was saved of each parameter and buffer of the model.

    Raises:
        CheckpointError: the model is another one; with ``strict`` also if names are missing or
            unknown.
    """
    names_of: dict[int, list[str]] = {}
    for name, param in training.model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(param), []).append(name)
    found: list[tuple[Place, str]] = []
    wrong: list[str] = []
    missing: list[str] = []
    for place in places(training):
        aliases = [place.name, *names_of.get(id(place.param), ())]
        saved = _saved_names(aliases, manifest)
        if not saved:
            if not (manifest.without_frozen and not place.param.requires_grad):
                missing.append(place.name)
            continue
        if len(saved) > 1:
            wrong.append(f"{' and '.join(saved)} are one parameter here, and were {len(saved)}")
        wrong += _misfits(place, saved[0], manifest)
        found.append((place, saved[0]))
    state = training.model.state_dict(keep_vars=True)
    buffers = {name: each for name, each in training.model.named_buffers() if name in state}
    own = {name: each for name, each in buffers.items() if name in manifest.buffers}
    missing += [name for name in buffers if name not in own]
    known = {name for _, name in found} | own.keys() | state.keys()
    unknown = [n for n in (*manifest.parameters, *manifest.buffers) if n not in known]
    _refuse(wrong, where, "does not fit the model", type(training.model).__name__)
    lines = [f"{name} is not in it" for name in missing]
    lines += [f"{name} is not in the model" for name in unknown]
    if strict:
        _refuse(lines, where, "does not fit the model", type(training.model).__name__)
    elif lines:
        _log.warning("%s: %s; that is left as it is.", where, _listed(lines))
    return Match(found, own)


def _saved_names(aliases: Iterable[str], manifest: Manifest) -> list[str]:
    names = (manifest.names.get(alias, alias) for alias in aliases)
    return [name for name in dict.fromkeys(names) if name in manifest.parameters]


def _misfits(place: Place, name: str, manifest: Manifest) -> list[str]:
    entry, shape = manifest.parameters[name], tuple(place.unit.shapes[place.index])
    if entry.shape != shape:
        return [f"{name} was {entry.shape}, and is {shape}"]
    saved, own = dtype_named(entry.dtype), place.param.dtype
    are_numbers = saved.is_floating_point and own.is_floating_point and not entry.is_opaque
    if saved != own and not are_numbers:
        return [f"{name} was {saved}, and is {own}"]
    return []


def _refuse(lines: Sequence[str], where: object, fact: str, model: str) -> None:
    if lines:
        raise CheckpointError(
            compose(
                f"{where} {fact}, a {model}: {_listed(lines)}.",
                hint="load it into the model that was saved; load_module_strict=False accepts "
                "names that are missing or unknown.",
            )
        )


def _listed(lines: Sequence[str]) -> str:
    more = len(lines) - _SHOWN
    return "; ".join(lines[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def check_extras(state: Mapping[str, Any], saved: Mapping[str, Any], where: object) -> None:
    """Refuse weights that were quantised with other statistics than the model has.

    Raises:
        CheckpointError: an entry of the state dict beside parameters and buffers differs.
    """
    differ = [
        name
        for name, value in saved.items()
        if isinstance(value, Tensor)
        and isinstance(own := state.get(name), Tensor)
        and not (own.shape == value.shape and torch.equal(own.detach().cpu(), value))
    ]
    if differ:
        raise CheckpointError(
            compose(
                f"{where} holds weights that belong to other statistics than those of the model: "
                f"{_listed(differ)}.",
                hint="load the base model from where it was loaded when the checkpoint was saved.",
            )
        )
