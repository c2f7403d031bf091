"""Quantised weights of bitsandbytes: which they are, and the statistics that go with them.

The only file that knows how bitsandbytes keeps them. It is never imported here: where it is not
loaded already, no parameter can be one of its own.

What a packed weight of 4 bits means is in its ``quant_state``, and what one of 8 bits means in
``SCB``: plain tensors that together have up to an eighth of the weight's own bytes. They are the
weight's companions, so a sharded model holds only a part of them, too. Code tables and offsets are
left where they are: a kilobyte for each weight.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from zeroshard.core.unit import Companion

__all__ = ["companions_in", "settle"]


def companions_in(model: nn.Module) -> Mapping[nn.Parameter, tuple[Companion, ...]]:
    """The quantised parameters of a model, each with the tensors it cannot be used without."""
    found: dict[nn.Parameter, tuple[Companion, ...]] = {}
    for module, param in _parameters(model):
        if _is_4bit(param):
            found[param] = _companions_of_4bit(param)
        elif _is_8bit(param):
            found[param] = _companions_of_8bit(param, module)
    return found


def settle(model: nn.Module, device: torch.device) -> None:
    """Quantise what is not yet, and give what is the form in which it is trained with.

    That is what moving such a model to the device does, and what a first forward would undo.
    """
    for module, param in _parameters(model):
        if _is_4bit(param):
            _settle_4bit(module, param, device)
        elif _is_8bit(param) and param.is_floating_point():
            param.data = param.data.cpu()  # elsewhere it would be moved and not quantised
            param.to(device)


def _parameters(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """Every parameter with a module that holds it; none where bitsandbytes is not loaded."""
    if "bitsandbytes.nn" in sys.modules:
        for module in model.modules():
            for param in module.parameters(recurse=False):
                yield module, param


def _is_4bit(param: nn.Parameter) -> bool:
    return isinstance(param, sys.modules["bitsandbytes.nn"].Params4bit)


def _is_8bit(param: Any) -> bool:
    is_8bit = isinstance(param, sys.modules["bitsandbytes.nn"].Int8Params)
    return is_8bit and not param.has_fp16_weights  # those are quantised anew in each forward


def _settle_4bit(module: Any, param: Any, device: torch.device) -> None:
    if not param.bnb_quantized:
        param.to(device)  # which quantises in place
    if getattr(param.quant_state, "packing_format_for_cpu", False):
        module.state_dict()  # which takes the weight out of the order of a kernel for inference
    if hasattr(module, "support_avx512bf16_for_cpu"):
        # Such a kernel would reorder the weight, in place and for ever, when it is evaluated.
        module.support_avx512bf16_for_cpu = False
    if param.quant_state is None:
        param.quant_state = module.quant_state
    elif getattr(module, "quant_state", None) is not None:
        module.quant_state = param.quant_state
    param.quant_state.to(device)


def _companions_of_4bit(param: Any) -> tuple[Companion, ...]:
    state = param.quant_state
    companions = [_attribute("absmax", state, "absmax")]
    if state.nested:
        companions.append(_attribute("nested_absmax", state.state2, "absmax"))
    return tuple(companions)


def _attribute(label: str, owner: object, name: str) -> Companion:
    return Companion(label, get=partial(getattr, owner, name), put=partial(setattr, owner, name))


def _companions_of_8bit(param: Any, module: Any) -> tuple[Companion, ...]:
    def owner(name: str) -> Any:
        # The parameter has it until the first forward of its module, then the module's state.
        return param if getattr(param, name) is not None else module.state

    return tuple(
        Companion(
            name,
            get=lambda name=name: getattr(owner(name), name),
            put=lambda tensor, name=name: setattr(owner(name), name, tensor),
        )
        for name in ("CB", "SCB")
    )
