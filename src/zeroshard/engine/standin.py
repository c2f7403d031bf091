"""What stands in for a function of a module, for a while."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["StandIn"]

Function = Callable[..., Any]


def _same(function: Function) -> Function:
    return function


class StandIn(ABC):
    """Something to call in the place of a module's own function.

    Copies and pickles of the module have that one.

    Args:
        module: the module.
        attribute: where the module looks the function up.
        plain: the function.
    """

    def __init__(self, module: nn.Module, attribute: str, plain: Function) -> None:
        self.module, self.plain, self._attribute = module, plain, attribute
        self._replaced: Function | None = vars(module).get(attribute)
        functools.update_wrapper(self, plain, updated=())

    def install(self) -> None:
        """Let the module use it."""
        vars(self.module)[self._attribute] = self

    def remove(self) -> None:
        """Give the module what it had, unless somebody has wrapped this meanwhile."""
        if not self.is_installed_in(self.module):
            return
        if self._replaced is None:
            del vars(self.module)[self._attribute]
        else:
            vars(self.module)[self._attribute] = self._replaced

    def is_installed_in(self, module: nn.Module) -> bool:
        """Whether it is what a module uses, and was made for that one."""
        return module is self.module and vars(module).get(self._attribute) is self

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the function does, in another way."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _same, (self.plain,)
