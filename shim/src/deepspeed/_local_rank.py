"""The number of a rank on a host without GPUs, as DeepSpeed's scripts hand it to torch.

They write ``batch.to(engine.local_rank)``, by which torch understands the GPU of that number. Where
there is none, torch refuses every number, and asks no subclass of ``int`` what it would rather be:
hence an integer of its own kind. Elsewhere the number stays a plain one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from operator import index
from typing import Any

import torch

__all__ = ["HostRank"]

_AS_NUMBERS_DO = (
    *("abs", "bool", "ceil", "float", "floor", "hash", "int", "invert", "neg", "pos", "round"),
    *("eq", "ne", "lt", "le", "gt", "ge", "format", "repr", "str"),
    *(
        side + name
        for side in ("", "r")
        for name in (
            *("add", "sub", "mul", "floordiv", "truediv", "mod", "divmod", "pow"),
            *("and", "or", "xor", "lshift", "rshift"),
        )
    ),
)


class HostRank:
    """An integer that ``tensor.to`` takes for the CPU."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __index__(self) -> int:
        return self._number

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call ``function`` with the CPU where it asks for a device, with the number elsewhere."""
        del types

        def plain(value: Any, *, is_device: bool) -> Any:
            if not isinstance(value, cls):
                return value
            return torch.device("cpu") if is_device else int(value)

        moves = function is torch.Tensor.to
        named = (kwargs or {}).items()
        return function(
            *(plain(arg, is_device=moves) for arg in args),
            **{name: plain(arg, is_device=name == "device") for name, arg in named},
        )


def _as_number(name: str) -> Callable[..., Any]:
    def method(self: HostRank, *others: Any) -> Any:
        numbers = [int(other) if isinstance(other, HostRank) else other for other in others]
        mixed = any(isinstance(number, float) for number in numbers)
        return getattr(float(index(self)) if mixed else index(self), name)(*numbers)

    method.__name__ = name
    return method


for _name in _AS_NUMBERS_DO:
    setattr(HostRank, f"__{_name}__", _as_number(f"__{_name}__"))
Integral.register(HostRank)
