"""How much state an optimizer will keep, before it has made any."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from zeroshard.optim.elementwise import Lion, UncorrectedAdam
from zeroshard.optim.lamb import Lamb
from zeroshard.optim.muon import Muon
from zeroshard.optim.packages import is_quantized

__all__ = ["bytes_of_averages"]

_Group = Mapping[str, Any]


def _always(number: int) -> Callable[[_Group], int]:
    return lambda group: number


# Tensors like the parameter that are kept for each one of a param group.
_NUMBERS: Mapping[type[torch.optim.Optimizer], Callable[[_Group], int]] = {
    torch.optim.ASGD: _always(1),
    torch.optim.Adadelta: _always(2),
    torch.optim.Adagrad: _always(1),
    torch.optim.Adam: lambda group: 3 if group.get("amsgrad") else 2,
    torch.optim.AdamW: lambda group: 3 if group.get("amsgrad") else 2,
    torch.optim.Adamax: _always(2),
    torch.optim.NAdam: _always(2),
    torch.optim.RAdam: _always(2),
    torch.optim.RMSprop: lambda group: 1 + bool(group["momentum"]) + bool(group["centered"]),
    torch.optim.Rprop: _always(2),
    torch.optim.SGD: lambda group: int(bool(group["momentum"])),
    Lamb: _always(2),
    Lion: _always(1),
    Muon: lambda group: 1 if group["use_muon"] else 2,
    UncorrectedAdam: _always(2),
}
_OF_PACKAGES = {"adam": 2, "ademamix": 3, "lamb": 2}  # others keep one
_BYTES = {"8bit": 1.0, "4bit": 0.5, "fp8": 1.0}
_SCALES = 1.02  # of quantised blocks


def bytes_of_averages(
    optimizer: torch.optim.Optimizer, group: _Group, itemsize: int
) -> float | None:
    """Bytes that will be kept for an element of the parameters of a group; None if not known.

    Args:
        optimizer: the optimizer, which need not have made a step.
        group: one of its param groups.
        itemsize: bytes of an element of what is stepped.
    """
    for kind in type(optimizer).__mro__:
        if kind in _NUMBERS:
            return float(_NUMBERS[kind](group) * itemsize)
    name = type(optimizer).__name__
    if not is_quantized(name):
        return None
    lowered = name.lower()
    number = next((n for part, n in _OF_PACKAGES.items() if part in lowered), 1)
    form = re.search(r"8bit|4bit|fp8", lowered)
    return number * (_BYTES[form[0]] * _SCALES if form else float(itemsize))
