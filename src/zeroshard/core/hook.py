"""What is registered on modules of the user's: it belongs to this run, not to the module."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

__all__ = ["Hook", "while_alive"]


class Hook:
    """A function that torch calls for a module; copies and pickles of the module do without it."""

    __slots__ = ("_act",)

    def __init__(self, act: Callable[..., Any]) -> None:
        self._act = act

    def __call__(self, *args: Any) -> Any:
        """Do what it was registered for."""
        return self._act(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (_nothing,)


def while_alive(method: Callable[..., Any]) -> Callable[..., None]:
    """A call of a bound method that does nothing once its object is gone, and does not keep it.

    A model reaches its hooks and units, and must not keep an engine that was dropped.
    """
    found = weakref.WeakMethod(method)

    def call(*args: Any) -> None:
        alive = found()
        if alive is not None:
            alive(*args)

    return call


def _nothing(*args: object) -> None:
    """Leave arguments and results as they are."""
