"""Parameters read by a module that does not hold them.

``functional.linear(hidden, self.embedding.weight)`` in the forward of the model reads a parameter
whose unit is gathered only while the embedding itself runs. So the layers that are units of their
own look up their parameters through a mapping that notices such a read: the unit is gathered on the
spot, and from then on it belongs to the reading module too, in forward and in backward.

Other reads are declared by the user, before there is an engine or after.
"""

# torch keeps a module's own parameters in a mapping without a public name.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from zeroshard.core.slots import slot_of
from zeroshard.errors import UsageError, compose

__all__ = [
    "declared",
    "register_external_parameter",
    "unregister_external_parameter",
    "unwatch",
    "watch",
]

# What each module reads without holding it; for engines to come, so it owns neither of the two.
_DECLARED: WeakKeyDictionary[nn.Module, MutableMapping[Tensor, None]] = WeakKeyDictionary()


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


def register_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Keep a parameter full while a module runs that uses it without holding it.

    May be called before ``initialize``, as in the constructor of the module, or after it.

    Raises:
        UsageError: one of the two is something else.
    """
    _check(module, parameter)
    _DECLARED.setdefault(module, WeakIdKeyDictionary())[parameter] = None
    slot = slot_of(parameter)
    if slot is not None and slot.unit.add_use is not None:
        slot.unit.add_use(module)


def unregister_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Take back what :func:`register_external_parameter` declared.

    Raises:
        UsageError: it was not declared.
    """
    _check(module, parameter)
    params = _DECLARED.get(module, {})
    if parameter not in params:
        raise UsageError(
            compose(
                f"this parameter is not registered as an external one of the "
                f"{type(module).__name__}.",
                hint="pass the module and the parameter that were given to "
                "register_external_parameter().",
            )
        )
    del params[parameter]
    slot = slot_of(parameter)
    if slot is None or slot.unit.drop_use is None:
        return
    others = (slot_of(other) for other in params)
    if not any(other is not None and other.unit is slot.unit for other in others):
        slot.unit.drop_use(module)


def _check(module: nn.Module, parameter: nn.Parameter) -> None:
    if not isinstance(module, nn.Module) or not isinstance(parameter, nn.Parameter):
        raise UsageError(
            compose(
                "an external parameter was given as a "
                f"{type(module).__name__} and a {type(parameter).__name__}.",
                hint="pass the module that reads it, and the parameter itself.",
            )
        )


def declared(model: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    """Each module of a model with each parameter that it was declared to read elsewhere."""
    for module in model.modules():
        for param in _DECLARED.get(module, ()):
            yield module, param
