"""Optimizers that other packages bring, where those are installed.

None is a dependency. 8-bit optimizers keep their state quantised in blocks of consecutive elements.
A block never reaches from one slice into another, so they are element-wise but for the rounding of
their state, which depends on where blocks begin.
"""

from __future__ import annotations

import logging
import re
from importlib import import_module

import torch

from zeroshard.errors import ConfigError, compose
from zeroshard.optim.options import Recipe, recipe, suggestion

__all__ = ["MUP", "find_mup", "find_quantized", "is_quantized", "is_quantized_elementwise"]

_log = logging.getLogger(__name__)
# In the order they are asked.
_QUANTIZING = ("bitsandbytes", "torchao")
_QUANTIZED = re.compile(r"paged\w+|\w+(8bit|4bit|32bit|fp8)", re.IGNORECASE)
_ELEMENTWISE = re.compile(
    r"(Paged)?(Adam|AdamW|AdEMAMix|Adagrad|Lion|RMSprop|SGD)(8bit|4bit|32bit|Fp8)?"
)
MUP = {"muadam": "MuAdam", "muadamw": "MuAdamW", "musgd": "MuSGD"}
"""Optimizers of the package mup, by their names in lower case."""
_MUP_MAKES = {"MuAdam": torch.optim.Adam, "MuAdamW": torch.optim.AdamW, "MuSGD": torch.optim.SGD}


def is_quantized(name: str) -> bool:
    """Tell whether a name is that of an optimizer with quantised or paged state, by its form."""
    return _QUANTIZED.fullmatch(name) is not None


def is_quantized_elementwise(kind: type[torch.optim.Optimizer]) -> bool:
    """Tell whether a class of these packages updates each element on its own."""
    package = kind.__module__.partition(".")[0]
    return package in _QUANTIZING and _ELEMENTWISE.fullmatch(kind.__name__) is not None


def find_quantized(name: str) -> Recipe:
    """Find an optimizer with quantised or paged state in the packages that are installed.

    Raises:
        ConfigError: no installed package has it.
    """
    others: dict[str, str] = {}
    for package in _QUANTIZING:
        try:
            module = import_module(f"{package}.optim")
        except ImportError:
            continue
        classes = {
            found: value
            for found, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
        }
        for found, cls in classes.items():
            if found.lower() == name.lower():
                _log.info("%s is that of %s", found, package)
                return recipe(cls, not_set={"params", "args"})
        others |= {found: package for found in classes if is_quantized(found)}
    fact = f'optimizer.type "{name}" is not in {" or ".join(_QUANTIZING)}, as far as installed.'
    hint = "install the package that has it: `pip install bitsandbytes` or `pip install torchao`."
    if others:
        fact += suggestion(name, others)
        hint = f"use one of {', '.join(sorted(others))}, or {hint}"
    raise ConfigError(compose(fact, hint=hint))


def find_mup(name: str) -> Recipe:
    """Find an optimizer whose rates follow the widths of layers.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        module = import_module("mup")
    except ImportError as error:
        raise ConfigError(
            compose(
                f'optimizer.type "{name}" is an optimizer of the package mup, which cannot be '
                f"imported: {error}.",
                hint="`pip install mup`, and call mup.set_base_shapes on the model.",
            )
        ) from error
    return recipe(getattr(module, name), not_set={"params"}, signature=_MUP_MAKES[name])
