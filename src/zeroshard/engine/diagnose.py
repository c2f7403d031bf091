"""Turning torch's complaint about an empty tensor into a sentence about a freed parameter."""

from __future__ import annotations

import traceback

from torch import nn

from zeroshard.core.unit import slot_of
from zeroshard.errors import UsageError, compose

__all__ = ["explain_freed_read"]


def explain_freed_read(model: nn.Module, error: Exception) -> str | None:
    """Say which freed parameter the failing code probably read, or None if there is none.

    The innermost frame of the traceback is the code that failed; a freed parameter whose attribute
    name, and whose owner's, occur in it is the likely cause.
    """
    if isinstance(error, UsageError) or not isinstance(
        error, (RuntimeError, IndexError, ValueError)
    ):
        return None
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = set(frames[-1].f_code.co_names) if frames else set[str]()
    suspects: list[str] = []
    for name, param in model.named_parameters():
        slot = slot_of(param)
        if slot is None or slot.unit.is_full:
            continue
        words = [word for word in name.split(".")[-2:] if not word.isdigit()]
        if names.issuperset(words):
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
