"""Methods that may outlive their objects."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import ParamSpec

__all__ = ["weakly"]

Arguments = ParamSpec("Arguments")


def weakly(method: Callable[Arguments, object]) -> Callable[Arguments, None]:
    """A bound method that does not keep its object alive, and does nothing once that is gone."""
    reference = weakref.WeakMethod(method)

    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        if (found := reference()) is not None:
            found(*args, **kwargs)

    return call
