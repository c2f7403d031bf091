"""Tensors inside the containers that modules take and return.

Lists, tuples, named tuples, mappings and dataclasses are looked into. Anything else that is not a
plain value is reported as opaque: a tensor may hide in it.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["Found", "find", "replace"]

_PLAIN = (
    *(int, float, complex, str, bytes, bool, type(None), range, slice, enum.Enum),
    *(torch.dtype, torch.device, torch.Size),
)
_NUMBERS = frozenset({int, float, bool})


@dataclasses.dataclass(slots=True)
class Found:
    """The tensors of a structure, and whether something in it could not be looked into."""

    tensors: list[Tensor]
    opaque: bool = False


def find(tree: Any) -> Found:
    """Collect the tensors of ``tree`` in order."""
    found = Found([])
    _collect(tree, found, set())
    return found


def _collect(tree: Any, found: Found, inside: set[int]) -> None:
    """Add what is in ``tree``, which is in the containers ``inside``."""
    if isinstance(tree, Tensor):
        found.tensors.append(tree)
        return
    values: Iterable[Any]
    if isinstance(tree, Mapping):
        values = tree.values()
    elif isinstance(tree, (list, tuple)):
        values = () if _NUMBERS.issuperset(map(type, tree)) else tree  # they may be many
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        values = [getattr(tree, field.name, None) for field in dataclasses.fields(tree)]
    else:
        found.opaque = found.opaque or not isinstance(tree, _PLAIN)
        return
    if id(tree) not in inside:  # else it holds itself
        for value in values:
            _collect(value, found, inside | {id(tree)})


def replace(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with ``function`` applied to its tensors.

    A container none of whose tensors change is returned as it is, so that a module which edits a
    list it is given still edits the caller's.
    """
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return _rebuild(tree, tree, lambda new, key, value: new.__setitem__(key, value), function)
    if isinstance(tree, (list, tuple)):
        values = [replace(value, function) for value in tree]
        if all(new is old for new, old in zip(values, tree, strict=True)):
            return tree
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = [field.name for field in dataclasses.fields(tree) if hasattr(tree, field.name)]
        fields = {name: getattr(tree, name) for name in names}
        return _rebuild(tree, fields, object.__setattr__, function)
    return tree


def _rebuild(
    tree: Any,
    items: Mapping[Any, Any],
    assign: Callable[[Any, Any, Any], None],
    function: Callable[[Tensor], Tensor],
) -> Any:
    """A mapping or dataclass with changed values, copied without calling its constructor."""
    changed = {key: new for key, old in items.items() if (new := replace(old, function)) is not old}
    if not changed:
        return tree
    new_tree = copy.copy(tree)
    for key, value in changed.items():
        assign(new_tree, key, value)
    return new_tree
