"""Checkpointing by models themselves, as in transformers and diffusers, set aside for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["Switch", "is_layer"]

_FLAG, _FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"
_ABSENT = object()


def _straight(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run what a model would checkpoint by itself."""
    return function(*args, **kwargs)


def is_layer(module: nn.Module) -> bool:
    """Whether it is a layer of transformers that can checkpoint itself."""
    return any(kind.__name__ == "GradientCheckpointingLayer" for kind in type(module).__mro__)


class Switch:
    """Checkpointing by a module itself, as in transformers and diffusers, while it has no effect.

    A layer acts as if it checkpointed, so that it drops caches of keys and values, which must not
    be filled twice, whether it runs again or not.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._wanted: dict[str, Any] = {_FUNCTION: _straight}
        if is_layer(module):
            self._wanted[_FLAG] = True
        self._former: dict[str, Any] = {}

    @classmethod
    def find(cls, model: nn.Module) -> list[Switch]:
        """Those of a model."""
        return [
            cls(module)
            for module in model.modules()
            if is_layer(module) or hasattr(module, _FUNCTION)
        ]

    def take_over(self) -> None:
        """Take the effect away, also if it was switched on or off meanwhile."""
        own = vars(self._module)
        for name, value in self._wanted.items():
            if own.get(name) is not value:
                self._former[name] = own.get(name, _ABSENT)
                own[name] = value

    def give_back(self) -> None:
        """Let it have the effect again that it was to have."""
        own = vars(self._module)
        for name, value in self._former.items():
            if own.get(name) is not self._wanted[name]:
                continue
            if value is _ABSENT:
                del own[name]
            else:
                own[name] = value
        self._former.clear()
