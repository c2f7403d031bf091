"""Turning torch's complaint about an empty tensor into a sentence about a freed parameter."""

from __future__ import annotations

import re
import traceback

from torch import nn

from zeroshard.core.unit import slot_of
from zeroshard.errors import UsageError, compose

__all__ = ["explain_backward", "explain_freed_read"]

# How torch's complaints about an empty operand look.
_EMPTY = re.compile(r"\b0\b|must be a matrix|1-?D|dimension 1")
_EMPTY_GRADIENT = re.compile(r"invalid gradient .* got \[0\] .* \[([\d, ]*)\]")


def explain_backward(model: nn.Module, error: Exception) -> str | None:
    """Say what to call instead, for the two mistakes that show in backward."""
    text = str(error)
    if "backward through the graph a second time" in text:
        return compose(
            "engine.backward() was called on a graph that an earlier backward used up.",
            hint="call engine(...) again for a new graph, or keep the old one with "
            "backward(loss, retain_graph=True).",
        )
    if empty := _EMPTY_GRADIENT.search(text):
        shape = tuple(int(size) for size in empty[1].split(",") if size.strip())
        slots = ((name, slot_of(param)) for name, param in model.named_parameters())
        names = [name for name, slot in slots if slot and slot.unit.shapes[slot.index] == shape]
        return compose(
            f"a parameter of shape {shape} was read while its unit was freed, and elsewhere while "
            f"it was full: {', '.join(names)}.",
            hint="wrap the read in zeroshard.gathered(...), or declare it after initialize(): "
            "zeroshard.register_external_parameter(reading_module, parameter).",
        )
    return None


def explain_freed_read(model: nn.Module, error: Exception) -> str | None:
    """Say which freed parameter the failing code probably read, or None if there is none.

    The innermost frame of the traceback is the code that failed; a freed parameter whose attribute
    name, and whose owner's, occur in it is the likely cause.
    """
    is_torchs = isinstance(error, (RuntimeError, IndexError, ValueError))
    if isinstance(error, UsageError) or not is_torchs or not _EMPTY.search(str(error)):
        return None
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = set(frames[-1].f_code.co_names) if frames else set[str]()
    suspects: list[str] = []
    for name, param in model.named_parameters():
        slot = slot_of(param)
        if slot is None or slot.unit.is_full:
            continue
        words = [word for word in name.split(".") if not word.isdigit()][-2:]
        if len(words) == 2 and names.issuperset(words):
            suspects.append(name)
    if not suspects:
        return None
    return compose(
        f"{', '.join(suspects[:3])} was probably read while its unit was freed: {error}\n"
        f"Parameters are full only while a module that uses them runs, and "
        f"{frames[-1].f_code.co_name} at line {frames[-1].f_lineno} of "
        f"{frames[-1].f_code.co_filename} is not known to.",
        hint="wrap the read in zeroshard.gathered(...), or declare it after initialize(): "
        f"zeroshard.register_external_parameter(reading_module, model.{suspects[0]}).",
    )
