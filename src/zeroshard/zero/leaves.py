"""Leaf modules, by DeepSpeed's calls: whole modules that are gathered and freed as one.

The marks are read by ``initialize``. ``"zeroshard": {"units": [...]}`` in the configuration names
all blocks of a model; a mark adds one module to what is found automatically.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from zeroshard.core.leaves import CONTAINERS, holds, is_marked, mark, unmark
from zeroshard.core.slots import slot_of
from zeroshard.errors import UsageError, compose

__all__ = [
    "get_z3_leaf_modules",
    "set_z3_leaf_module",
    "set_z3_leaf_modules",
    "set_z3_leaf_modules_by_name",
    "set_z3_leaf_modules_by_suffix",
    "unset_z3_leaf_modules",
    "z3_leaf_module",
    "z3_leaf_parameter",
]


def _names_of(module: nn.Module) -> set[str]:
    """What a class may be called: its name, or its name with its module."""
    kind = type(module)
    return {kind.__name__, kind.__qualname__, f"{kind.__module__}.{kind.__qualname__}"}


def _is_one_of(module: nn.Module, kinds: Iterable[type | str]) -> bool:
    names = _names_of(module)
    return any(
        kind in names if isinstance(kind, str) else isinstance(module, kind) for kind in kinds
    )


def _matching(
    model: nn.Module, kinds: Iterable[type | str], raise_if_not_found: bool
) -> list[nn.Module]:
    kinds = [kinds] if isinstance(kinds, (str, type)) else list(kinds)
    for kind in kinds:
        if not isinstance(kind, (str, type)):
            raise UsageError(
                compose(
                    f"leaf modules are named by their classes, not by {kind!r}.",
                    hint="pass a list of classes or of their names; set_z3_leaf_modules_by_name() "
                    "takes the names of modules.",
                )
            )
    found = [module for module in model.modules() if _is_one_of(module, kinds)]
    if not found and raise_if_not_found:
        names = [kind if isinstance(kind, str) else kind.__name__ for kind in kinds]
        raise _not_found("class", names, sorted({type(each).__name__ for each in model.modules()}))
    return found


def _not_found(what: str, names: Iterable[str], known: list[str]) -> UsageError:
    more = ", ..." if len(known) > 20 else ""
    return UsageError(
        compose(
            f"leaf modules: the model has no module of the {what} {' or '.join(names)}.",
            hint=f"it has {', '.join(known[:20])}{more}.",
        )
    )


def set_z3_leaf_module(model: nn.Module, flag: bool) -> None:
    """Mark this very module to form one unit, or take the mark away; before ``initialize``.

    Raises:
        UsageError: an engine has divided the module into units already, or it is never called.
    """
    slots = (slot_of(param) for param in model.parameters())
    if any(slot is not None and slot.unit.add_use is not None for slot in slots):
        raise UsageError(
            compose(
                f"a {type(model).__name__} was made a leaf module, or no longer one, after "
                "initialize() had divided the model into units.",
                hint="mark leaf modules before initialize().",
            )
        )
    if flag and isinstance(model, CONTAINERS):
        raise UsageError(
            compose(
                f"a {type(model).__name__} cannot be a leaf module, as it is never called itself.",
                hint="mark the module that holds it, or the modules inside it.",
            )
        )
    (mark if flag else unmark)(model)


def set_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Iterable[type | str], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Have each module of these classes form one unit; for use before ``initialize``.

    Args:
        model: the model, or a part of it.
        leaf_module_classes: classes, names of classes, or names with the module they are from.
        raise_if_not_found: false to accept a model that has none of them.

    Returns:
        The modules that were marked.

    Raises:
        UsageError: none was found, or an engine has divided the model already.
    """
    found = _matching(model, leaf_module_classes, raise_if_not_found)
    for module in found:
        set_z3_leaf_module(module, True)
    return found


def unset_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Iterable[type | str], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Take the marks of :func:`set_z3_leaf_modules` away, with the same arguments and result."""
    found = _matching(model, leaf_module_classes, raise_if_not_found)
    for module in found:
        set_z3_leaf_module(module, False)
    return found


def set_z3_leaf_modules_by_name(
    model: nn.Module, module_names: Iterable[str], raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """Have the modules of these names, as in ``named_modules``, form one unit each.

    Returns:
        The modules that were marked, and the names that matched none.

    Raises:
        UsageError: a name matched none, or an engine has divided the model already.
    """
    return _mark_named(model, module_names, lambda name, given: name == given, raise_if_not_found)


def set_z3_leaf_modules_by_suffix(
    model: nn.Module, module_name_suffixes: Iterable[str], raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """Have the modules whose names end in one of these form one unit each.

    Returns:
        The modules that were marked, and the suffixes that matched none.

    Raises:
        UsageError: a suffix matched none, or an engine has divided the model already.
    """
    return _mark_named(model, module_name_suffixes, str.endswith, raise_if_not_found)


def _mark_named(
    model: nn.Module,
    names: Iterable[str],
    matches: Callable[[str, str], bool],
    raise_if_not_found: bool,
) -> tuple[list[nn.Module], list[str]]:
    names = [names] if isinstance(names, str) else list(names)
    known = dict(model.named_modules())
    missing = [given for given in names if not any(matches(name, given) for name in known)]
    if missing and raise_if_not_found:
        raise _not_found("name", missing, [name for name in known if name])
    found = [m for name, m in known.items() if any(matches(name, given) for given in names)]
    for module in found:
        set_z3_leaf_module(module, True)
    return found, missing


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    """All marked modules of a model, those inside others too."""
    return [module for module in model.modules() if is_marked(module)]


def z3_leaf_module(model: nn.Module) -> bool:
    """Whether this very module is marked."""
    return is_marked(model)


def z3_leaf_parameter(model: Tensor) -> bool:
    """Whether a parameter, here called ``model``, lies in a marked module."""
    return holds(model)
