"""Optimizers and learning rate schedules by the names used in configurations."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import torch

from zeroshard.errors import ConfigError, compose

__all__ = ["ELEMENTWISE", "make_optimizer", "make_schedule"]

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


_FLAGS = frozenset(
    {"adam_w_mode", "amsgrad", "bias_correction", "capturable", "centered", "differentiable"}
    | {"foreach", "fp32_optimizer_states", "fused", "maximize", "nesterov", "torch_adam"}
)
_PAIRS = frozenset({"betas", "etas", "step_sizes"})
# What DeepSpeed's files name and torch does not have.
_SCHEDULES_TO_COME = frozenset(
    {"LRRangeTest", "OneCycle", "WarmupCosineLR", "WarmupDecayLR", "WarmupLR"}
)


def make_optimizer(
    name: str, params: Iterable[Any], options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Build an optimizer by its configuration name.

    ``"Adam"`` decays weights the decoupled way, as AdamW does, unless ``adam_w_mode`` is false:
    that is what the name means in DeepSpeed's configurations.

    Raises:
        ConfigError: the name or an option is unknown, or an option has no usable value.
    """
    options = dict(options)
    _check_values(options)
    kind = name.lower()
    decoupled = bool(options.pop("adam_w_mode", True))
    if options.pop("bias_correction", True) is False:
        raise ConfigError(
            compose(
                "optimizer.params.bias_correction cannot be false: torch's Adam always corrects.",
                hint="remove the key, or pass an optimizer of your own to initialize().",
            )
        )
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
                f'optimizer.type "{name}" is not one that can be chosen by name.',
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
        return _call("optimizer.params", cls, params, **options)


def _check_values(options: Mapping[str, Any]) -> None:
    """Refuse what torch would take for something else, or complain about without its name."""
    for key, value in options.items():
        if key in _FLAGS:
            fits, wanted = value is None or isinstance(value, bool), "true or false"
        elif key in _PAIRS:
            is_pair = isinstance(value, (list, tuple)) and len(value) == 2
            fits, wanted = is_pair and all(_is_number(item) for item in value), "two numbers"
        else:
            fits, wanted = _is_number(value), "a number"
        if not fits:
            raise ConfigError(
                compose(
                    f"optimizer.params.{key} must be {wanted}, but is {value!r}.",
                    hint="correct the value, or remove the key for the optimizer's default.",
                )
            )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _call(block: str, make: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Make something from a block of the configuration, naming the block if that fails."""
    try:
        return make(*args, **options)
    except (TypeError, ValueError) as error:
        name = getattr(make, "__name__", str(make))
        raise ConfigError(
            compose(
                f"{block} do not fit {name}: {error}",
                hint=f"see the arguments of {getattr(make, '__module__', '')}.{name}.",
            )
        ) from error


def make_schedule(
    name: str, optimizer: torch.optim.Optimizer, options: Mapping[str, Any]
) -> torch.optim.lr_scheduler.LRScheduler:
    """Build a learning rate schedule by its configuration name.

    Raises:
        ConfigError: the name is unknown, or the options do not fit.
    """
    base = torch.optim.lr_scheduler.LRScheduler
    known = {
        found: value
        for found, value in vars(torch.optim.lr_scheduler).items()
        if isinstance(value, type) and issubclass(value, base) and value is not base
        if not found.startswith("_")
    }
    if name not in known:
        if name in _SCHEDULES_TO_COME:
            fact = "is not built yet."
        else:
            lowered = {found.lower(): found for found in known}
            close = get_close_matches(name.lower(), lowered, n=1)
            fact = "is not a schedule of torch.optim.lr_scheduler."
            fact += f' Did you mean "{lowered[close[0]]}"?' if close else ""
        raise ConfigError(
            compose(
                f'scheduler.type "{name}" {fact}',
                hint="use a class of torch.optim.lr_scheduler, or pass lr_scheduler=... to "
                "initialize().",
            )
        )
    for key, value in options.items():
        if isinstance(value, str) and value.strip("+-").replace(".", "", 1)[:1].isdigit():
            raise ConfigError(
                compose(
                    f"scheduler.params.{key} must be a number, but is {value!r}.",
                    hint="remove the quotes.",
                )
            )
    return _call("scheduler.params", known[name], optimizer, **options)
