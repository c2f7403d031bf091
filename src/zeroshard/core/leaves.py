"""Modules that the user wants gathered as a whole, marked before the model is divided into units.

A marked module is one unit, whatever runs inside: for modules whose forward takes another way each
time, such as a router with its experts.
"""

from __future__ import annotations

from weakref import WeakSet

from torch import Tensor, nn

__all__ = ["CONTAINERS", "holds", "is_marked", "mark", "marked", "unmark"]

# Modules that are never called themselves, so nothing can be gathered at them.
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)

# One registry instead of an attribute planted on modules; it keeps none of them alive.
_MARKED: WeakSet[nn.Module] = WeakSet()


def mark(module: nn.Module) -> None:
    """Have the module form one unit."""
    _MARKED.add(module)


def unmark(module: nn.Module) -> None:
    """Let the module be divided like any other again."""
    _MARKED.discard(module)


def is_marked(module: nn.Module) -> bool:
    """Whether this very module is marked."""
    return module in _MARKED


def marked(model: nn.Module) -> list[nn.Module]:
    """The outermost marked modules of a model, each once, in the order of ``model.modules()``."""
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():  # from the outside in
        if module in _MARKED and module not in inside:
            found.append(module)
            inside.update(module.modules())
    return found


def holds(param: Tensor) -> bool:
    """Whether a parameter lies in a marked module."""
    return any(param is each for module in _MARKED for each in module.parameters())
