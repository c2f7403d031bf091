"""Optimizers by the names used in configurations."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from zeroshard.errors import ConfigError, compose

__all__ = ["ELEMENTWISE", "make_optimizer"]

# Optimizers whose update of an element depends on that element alone: they may step any part of a
# parameter. The others look at whole matrices or at all parameters at once.
ELEMENTWISE = frozenset(
    getattr(torch.optim, name)
    for name in (
        "ASGD",
        "Adadelta",
        "Adagrad",
        "Adam",
        "AdamW",
        "Adamax",
        "NAdam",
        "RAdam",
        "RMSprop",
        "Rprop",
        "SGD",
    )
)
_FUSED = {torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad}
# Choices of kernel in DeepSpeed's files; here torch has one for every device.
_KERNEL_KEYS = ("torch_adam", "fp32_optimizer_states", "adam_w_mode", "bias_correction")


def make_optimizer(
    name: str, params: Iterable[Any], options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Build an optimizer by its configuration name.

    ``"Adam"`` decays weights the decoupled way, as AdamW does, unless ``adam_w_mode`` is false:
    that is what the name means in DeepSpeed's configurations.

    Raises:
        ConfigError: the name or an option is unknown.
    """
    options = dict(options)
    kind = name.lower()
    decoupled = bool(options.pop("adam_w_mode", True))
    if options.pop("bias_correction", True) is False:
        raise ConfigError("optimizer.params.bias_correction: false is not supported.")
    for key in _KERNEL_KEYS:
        options.pop(key, None)
    known = {cls.__name__.lower(): cls for cls in ELEMENTWISE}
    if kind == "adam" and decoupled:
        kind = "adamw"
        options.setdefault("weight_decay", 0.0)
    if kind == "adamw":
        options.setdefault("weight_decay", 0.0)
    if kind not in known:
        raise ConfigError(
            compose(
                f'optimizer.type "{name}" is not known.',
                hint=f"use one of {', '.join(sorted(c.__name__ for c in ELEMENTWISE))}, or pass an "
                "optimizer object to initialize().",
            )
        )
    cls = known[kind]
    accepted = set(inspect.signature(cls.__init__).parameters) - {"self", "params"}
    unknown = sorted(set(options) - accepted)
    if unknown:
        raise ConfigError(
            compose(
                f"optimizer.params: {cls.__name__} does not take {', '.join(unknown)}.",
                hint=f"it takes {', '.join(sorted(accepted))}.",
            )
        )
    if "betas" in options:
        options["betas"] = tuple(options["betas"])
    if cls in _FUSED and "fused" not in options and "foreach" not in options:
        options["fused"] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return cls(params, **options)
