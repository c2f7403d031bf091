"""Optimizers by the names used in configurations, and which of them may step slices."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import nn

from zeroshard.errors import ConfigError, compose
from zeroshard.optim import packages
from zeroshard.optim.elementwise import Lion, UncorrectedAdam
from zeroshard.optim.lamb import Lamb
from zeroshard.optim.muon import Muon, muon_groups
from zeroshard.optim.named import NAMED
from zeroshard.optim.options import Recipe, recipe, suggestion

__all__ = ["ELEMENTWISE", "make_optimizer"]

_log = logging.getLogger(__name__)

# Optimizers whose update of an element depends on that element alone: they may step any part of a
# parameter. The others look at whole matrices or at all parameters at once.
ELEMENTWISE: frozenset[type[torch.optim.Optimizer]] = frozenset(
    {
        torch.optim.ASGD,
        torch.optim.Adadelta,
        torch.optim.Adagrad,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.Adamax,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.RMSprop,
        torch.optim.Rprop,
        torch.optim.SGD,
        Lion,
        UncorrectedAdam,
        *NAMED,
    }
)
_FUSED = {torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad}
_OWN = (Lamb, Lion, Muon)
# DeepSpeed has one class for each device; here one serves all.
_SAME = {
    "cpuadagrad": "adagrad",
    "cpuadam": "adam",
    "cpulion": "lion",
    "deepspeedcpuadagrad": "adagrad",
    "deepspeedcpuadam": "adam",
    "deepspeedcpulion": "lion",
    "fusedadam": "adam",
    "fusedlamb": "lamb",
    "fusedlion": "lion",
    "muonwithauxadam": "muon",
}
_COMPRESSED = {"onebitadam": "Adam", "onebitlamb": "Lamb", "zerooneadam": "Adam"}


def make_optimizer(
    name: str,
    params: Iterable[Any],
    options: Mapping[str, Any],
    model: nn.Module | None = None,
) -> torch.optim.Optimizer:
    """Build an optimizer by its configuration name.

    ``"Adam"`` decays weights the decoupled way, as AdamW does, unless ``adam_w_mode`` is false:
    that is what the name means in DeepSpeed's configurations. ``"AdamW"`` always does.

    Args:
        name: a class of torch.optim, Lion, Lamb or Muon, an 8-bit optimizer of an installed
            package, or a name of DeepSpeed's for one of these; in any case.
        params: parameters or param groups.
        options: the optimizer's arguments.
        model: tells Muon which matrices are embeddings.

    Raises:
        ConfigError: the name or an option is unknown, or an option has no usable value.
    """
    options = dict(options)
    kind = _SAME.get(name.lower(), name.lower())
    found = _adam(kind, options) if kind in {"adam", "adamw"} else _find(name, kind)
    _drop_kernel_choices(kind, options)
    if found.make in _FUSED and "fused" not in options and "foreach" not in options:
        options["fused"] = True
    found.check_values("optimizer.params", options)
    given = muon_groups(params, model) if found.make is Muon else params
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return found("optimizer.params", options, given)


def _known() -> dict[str, type[torch.optim.Optimizer]]:
    """Every optimizer that needs no further package, by its name in lower case."""
    base = torch.optim.Optimizer
    of_torch = {
        name.lower(): value
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, base) and value is not base
    }
    return of_torch | {own.__name__.lower(): own for own in _OWN}


def _find(name: str, kind: str) -> Recipe:
    known = _known()
    if kind in known:
        return recipe(known[kind], not_set={"params"})
    if kind in packages.MUP:
        return packages.find_mup(packages.MUP[kind])
    if kind in _COMPRESSED:
        raise ConfigError(
            compose(
                f'optimizer.type "{name}" compresses gradients to one bit, which is not built.',
                hint=f'use "{_COMPRESSED[kind]}".',
            )
        )
    if packages.is_quantized(kind):
        return packages.find_quantized(name)
    names = sorted({cls.__name__ for cls in known.values()})
    raise ConfigError(
        compose(
            f'optimizer.type "{name}" is not one that can be chosen by name.'
            + suggestion(name, [*names, *packages.MUP.values()]),
            hint=f"use one of {', '.join(names)}, or pass an optimizer object to initialize().",
        )
    )


def _adam(kind: str, options: dict[str, Any]) -> Recipe:
    """Choose the class that DeepSpeed's switches mean; they are taken out of the options."""
    decoupled = _pop_flag(options, "adam_w_mode", default=True)
    corrected = _pop_flag(options, "bias_correction", default=True)
    _pop_flag(options, "torch_adam", default=True)
    if kind == "adamw" and not decoupled:
        decoupled = True
        _log.warning(
            'optimizer.params.adam_w_mode false has no effect on "AdamW", as in DeepSpeed; for '
            'decay that is added to the gradients use "Adam"'
        )
    options.setdefault("weight_decay", 0.0)
    if corrected:
        cls = torch.optim.AdamW if decoupled else torch.optim.Adam
        return recipe(cls, not_set={"params"})
    make = update_wrapper(
        partial(UncorrectedAdam, decoupled=decoupled), UncorrectedAdam, updated=()
    )
    return recipe(make, not_set={"params", "decoupled"}, signature=UncorrectedAdam)


def _drop_kernel_choices(kind: str, options: dict[str, Any]) -> None:
    """Take out of the options what chooses between kernels of one result."""
    if kind in {"adam", "adamw", "adagrad", "lion"} and not _pop_flag(
        options, "fp32_optimizer_states", default=True
    ):
        _log.warning("optimizer.params.fp32_optimizer_states is ignored: state is always fp32")
    if kind == "muon":
        options.pop("ns_method", None)  # two ways to compute the same iteration
        if _pop_flag(options, "per_head_muon", default=False):
            raise ConfigError(
                compose(
                    "optimizer.params.per_head_muon true is not built: Muon steps whole matrices.",
                    hint="remove the key.",
                )
            )


def _pop_flag(options: dict[str, Any], key: str, *, default: bool) -> bool:
    value = options.pop(key, default)
    if not isinstance(value, bool):
        raise ConfigError(
            compose(
                f"optimizer.params.{key} must be true or false, but is {value!r}.",
                hint="correct the value, or remove the key for the default.",
            )
        )
    return value
