"""Parameters read by a module that does not hold them.

``functional.linear(hidden, self.embedding.weight)`` in the forward of the model reads a parameter
whose unit is gathered only while the embedding itself runs. So the layers that are units of their
own look up their parameters through a mapping that notices such a read: the unit is gathered on the
spot, and from then on it belongs to the reading module too, in forward and in backward.
"""

# torch keeps a module's own parameters in a mapping without a public name.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

__all__ = ["unwatch", "watch"]


class _Watched(dict[str, nn.Parameter | None]):
    """A module's own parameters, reporting each one that is looked up by name."""

    def __init__(
        self,
        params: dict[str, nn.Parameter | None],
        on_read: Callable[[nn.Parameter], None],
    ) -> None:
        super().__init__(params)
        self._on_read = on_read

    def __getitem__(self, name: str) -> nn.Parameter | None:
        param = super().__getitem__(name)
        if param is not None:
            self._on_read(param)
        return param

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the module is an ordinary module.
        return dict, (dict(self),)


def watch(modules: Iterable[nn.Module], on_read: Callable[[nn.Parameter], None]) -> None:
    """Report every parameter that is read as an attribute of one of the modules."""
    for module in modules:
        module.__dict__["_parameters"] = _Watched(module._parameters, on_read)


def unwatch(modules: Iterable[nn.Module]) -> None:
    """Make the modules ordinary again."""
    for module in modules:
        module.__dict__["_parameters"] = dict(module._parameters)
