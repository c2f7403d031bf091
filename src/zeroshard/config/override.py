"""Values that replace those of a file: KEY=VALUE, as a command line has them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import replace

from zeroshard.config.keys import ALIASES, Path
from zeroshard.config.source import Source
from zeroshard.config.values import ascii_only, is_block, show
from zeroshard.errors import ConfigError, compose

__all__ = ["override"]


def override(source: Source, assignments: Iterable[str]) -> tuple[Source, frozenset[Path]]:
    """Replace values of a source; return it with the paths of the keys that were set.

    Args:
        source: the values to start from, which stay as they are.
        assignments: dotted keys with JSON values, such as ``zero_optimization.stage=3``. A value
            that is not JSON is text, so ``bf16`` needs no quotes.

    Raises:
        ConfigError: an assignment has no key or no value, or leads through something that is not
            an object.
    """
    values = copy.deepcopy(source.values)
    changed: set[Path] = set()
    for assignment in assignments:
        path, value = _parse(assignment)
        _set(values, path, value)
        changed.add(_canonical(path))
    return replace(source, values=values), frozenset(changed)


def _parse(assignment: str) -> tuple[Path, object]:
    key, equals, text = assignment.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise ConfigError(
            compose(
                f"{show(assignment)} is not of the form KEY=VALUE.",
                hint="write the path of a key and a JSON value: zero_optimization.stage=3.",
            )
        )
    try:
        return path, json.loads(text)
    except (ValueError, RecursionError):
        return path, text


def _set(values: dict[str, object], path: Path, value: object) -> None:
    here = values
    for depth, name in enumerate(path[:-1]):
        written = _written(here, path[:depth], name)
        inner = here.get(written)
        if inner is None:
            inner = {}
        elif isinstance(inner, bool) and path[: depth + 1] == ("zero_optimization",):
            inner = {"stage": int(inner)}
        if not is_block(inner):
            raise ConfigError(
                compose(
                    f"{ascii_only('.'.join(path))} cannot be set: "
                    f"{ascii_only('.'.join(path[: depth + 1]))} is {show(inner)}, not an object.",
                    hint="set the object around it, or correct the file.",
                )
            )
        here[written] = inner
        here = inner
    here.pop(_written(here, path[:-1], path[-1]), None)
    here[path[-1]] = value


def _written(here: dict[str, object], block: Path, name: str) -> str:
    """Find the name under which a block has a key already, which may be a second name of it."""
    wanted = _canonical((*block, name))
    return next((key for key in here if _canonical((*block, key)) == wanted), name)


def _canonical(path: Path) -> Path:
    canonical: Path = ()
    for name in path:
        canonical = ALIASES.get((*canonical, name), (*canonical, name))
    return canonical
