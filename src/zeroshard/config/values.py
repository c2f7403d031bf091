"""Questions about plain JSON values, and how messages show them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TypeGuard

__all__ = [
    "ascii_only",
    "is_auto",
    "is_block",
    "is_list",
    "is_mapping",
    "is_sequence",
    "shorten",
    "show",
    "show_items",
]

_LONGEST_VALUE = 60
_LONGEST_NAME = 400


def is_auto(value: object) -> bool:
    """Tell whether a value is left to whoever resolves "auto"."""
    return isinstance(value, str) and value == "auto"


def is_block(value: object) -> TypeGuard[dict[str, object]]:
    """Tell whether a value is a JSON object; keys were checked when it was read."""
    return isinstance(value, dict)


def is_list(value: object) -> TypeGuard[list[object]]:
    """Tell whether a value is a JSON list."""
    return isinstance(value, list)


def is_sequence(value: object) -> TypeGuard[Sequence[object]]:
    """Tell whether a value is a list or the tuple that Python code writes instead."""
    return isinstance(value, list | tuple)


def is_mapping(value: object) -> TypeGuard[Mapping[object, object]]:
    """Tell whether a value is a mapping with keys of any kind."""
    return isinstance(value, Mapping)


def show(value: object) -> str:
    """Render a value for a message: JSON, in ASCII, on one short line."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    if value is None or isinstance(value, bool | int | float | str):
        try:
            return shorten(json.dumps(value), _LONGEST_VALUE)
        except ValueError:  # Python does not print integers of thousands of digits.
            return "a number of thousands of digits"
    return f"a value of type {type(value).__name__}"


def show_items(value: object) -> str:
    """Render a value with what is in it, where that is a list."""
    if not is_sequence(value):
        return show(value)
    return shorten(f"[{', '.join(map(show, value))}]", _LONGEST_VALUE)


def shorten(text: str, longest: int = _LONGEST_NAME) -> str:
    """Cut a text to what fits into a message; paths and keys are rarely cut."""
    return text if len(text) <= longest else f"{text[:longest]}..."


def ascii_only(text: str) -> str:
    """Escape what a terminal or a log file may not be able to hold."""
    return "".join(
        c if c.isascii() and c.isprintable() else c.encode("unicode_escape").decode("ascii")
        for c in text
    )
