"""``deepspeed.utils.nvtx``: ranges that profilers show."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from torch.profiler import record_function

from deepspeed._names import names

__all__ = ["instrument_w_nvtx"]

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


def instrument_w_nvtx(func: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
    """Decorate a function so that profilers show its calls by its name."""

    @wraps(func)
    def wrapped(*args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        with record_function(func.__qualname__):
            return func(*args, **kwargs)

    return wrapped


__getattr__, __dir__ = names(__name__)
