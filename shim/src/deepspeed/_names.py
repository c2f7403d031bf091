"""What a module of this package answers to a name that it does not hold.

A name may have a home elsewhere: it is imported when it is first used, and is an attribute of the
module from then on. Any other name is refused with what zeroshard has instead: by an AttributeError
where it is looked up, by an ImportError where it is imported. Python keeps the text of neither for
``from module import name``; but it then looks for a submodule of that name, and is told here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["names"]

_PACKAGE = __package__ or "deepspeed"
_GUIDE = "docs/guides/drop-in.md of zeroshard lists the names it answers to"
_NOWHERE: Mapping[str, str] = {}
# What to say about names, by module. It grows as modules of this package are imported.
_INSTEAD: dict[str, Mapping[str, str]] = {}


def names(
    module: str, homes: Mapping[str, str] = _NOWHERE, instead: Mapping[str, str] = _NOWHERE
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make the ``__getattr__`` and the ``__dir__`` of a module of this package.

    Args:
        module: its ``__name__``.
        homes: ``"package.module:name"`` of names that are imported when they are used, or
            ``"package.module"`` of a module.
        instead: what to use in place of names that are refused.
    """
    held = vars(sys.modules[module])
    held.setdefault("__path__", [])  # so that Python looks for a submodule at all
    _INSTEAD[module] = instead

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(_refusal(module, name), name=name, obj=sys.modules[module])
        home, _, attribute = homes[name].partition(":")
        value = import_module(home)
        if attribute:
            value = getattr(value, attribute)
        held[name] = value
        return value

    def known() -> list[str]:
        return sorted({*held, *homes})

    return find, known


def _refusal(module: str, name: str) -> str:
    fact = f"{module}.{name}: zeroshard, which is installed under the name {_PACKAGE}, has no such"
    hint = _INSTEAD[module].get(name)
    return f"{fact} name.\n\nhint: {hint or _GUIDE}."


class _Refusals:
    """The last one asked for a module: nobody else has found it."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        """Refuse what is not in this package.

        Raises:
            ImportError: always, for an ordinary name in one of its modules.
        """
        del path, target
        module, _, name = fullname.rpartition(".")
        if module in _INSTEAD and not name.startswith("__"):
            # Not a ModuleNotFoundError: Python drops the text of that one for `from ... import`.
            raise ImportError(_refusal(module, name), name=fullname)


sys.meta_path.append(_Refusals())
