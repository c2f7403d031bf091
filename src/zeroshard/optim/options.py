"""Arguments that come from a block of the configuration: checked by the signature they go to."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from zeroshard.errors import ConfigError, compose

__all__ = ["Recipe", "is_number", "recipe", "suggestion"]

# Arguments whose default of None does not say what else they may be.
_FLAGS = frozenset({"foreach", "fused"})
# What classes raise over arguments that they cannot use.
_UNUSABLE = (ArithmeticError, AssertionError, KeyError, RuntimeError, TypeError, ValueError)
_RATES = frozenset({"lr", "muon_lr", "adam_lr"})


def is_number(value: object) -> bool:
    """Tell whether a value is a finite number, which true and false are not."""
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def suggestion(name: str, known: Iterable[str]) -> str:
    """Say which known name is meant, with a leading space; nothing if none is close."""
    lowered = {found.lower(): found for found in known}
    close = get_close_matches(name.lower(), lowered, n=1)
    return f' Did you mean "{lowered[close[0]]}"?' if close else ""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A class or function, and which of its arguments a block of the configuration may set."""

    name: str
    make: Callable[..., Any]
    takes: Mapping[str, inspect.Parameter]

    def __call__(self, block: str, options: Mapping[str, Any], *args: Any) -> Any:
        """Make the thing.

        Raises:
            ConfigError: an option is unknown, missing or unusable; ``block`` and key are named.
        """
        self._check_keys(block, options)
        options = {key: self._as_default(key, value) for key, value in options.items()}
        try:
            return self.make(*args, **options)
        except _UNUSABLE as error:
            if isinstance(error, ConfigError):
                raise
            home = getattr(self.make, "__module__", "")
            raise ConfigError(
                compose(
                    f"{block} do not fit {self.name}: {error}",
                    hint=f"see the arguments of {home}.{self.name}.",
                )
            ) from error

    def check_values(self, block: str, options: Mapping[str, Any]) -> None:
        """Refuse values that are no replacement for the default of the same argument.

        Raises:
            ConfigError: there is one; ``block`` and key are named.
        """
        for key, value in options.items():
            wanted = _wanted(key, self.takes[key].default, value) if key in self.takes else ""
            if wanted:
                raise ConfigError(
                    compose(
                        f"{block}.{key} must be {wanted}, but is {value!r}.",
                        hint="correct the value, or remove the key for the default.",
                    )
                )

    def _check_keys(self, block: str, options: Collection[str]) -> None:
        unknown = sorted(set(options) - set(self.takes))
        if unknown:
            meant = suggestion(unknown[0], self.takes) if len(unknown) == 1 else ""
            raise ConfigError(
                compose(
                    f"{block}: {self.name} does not take {', '.join(unknown)}.{meant}",
                    hint=f"it takes {', '.join(sorted(self.takes))}.",
                )
            )
        for key, parameter in self.takes.items():
            if parameter.default is inspect.Parameter.empty and key not in options:
                raise ConfigError(
                    compose(
                        f"{block}.{key} is missing, and {self.name} cannot do without it.",
                        hint="add the key.",
                    )
                )

    def _as_default(self, key: str, value: Any) -> Any:
        """JSON has lists where Python's defaults are tuples."""
        is_pair = isinstance(self.takes[key].default, tuple) and isinstance(value, list)
        return tuple(value) if is_pair else value


def recipe(
    make: Callable[..., Any],
    *,
    not_set: Collection[str],
    signature: Callable[..., Any] | None = None,
) -> Recipe:
    """Describe a class or function; ``signature`` is where its keyword arguments go in the end."""
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    takes = {
        key: parameter
        for key, parameter in inspect.signature(signature or make).parameters.items()
        if key not in not_set and parameter.kind not in kinds
    }
    return Recipe(getattr(make, "__name__", str(make)), make, takes)


def _wanted(key: str, default: object, value: object) -> str:
    """What a value should be but is not, going by the default it replaces; nothing if it may be."""
    if isinstance(default, bool) or key in _FLAGS:
        fits = isinstance(value, bool) or (value is None and default is None)
        return "" if fits else "true or false"
    if is_number(default) or key in _RATES:
        return "" if is_number(value) else "a number"
    if isinstance(default, tuple):
        given = value if isinstance(value, (list, tuple)) else ()
        fits = len(given) == len(default) and all(
            is_number(item) or (item is None and replaced is None)
            for item, replaced in zip(given, default, strict=True)
        )
        count = {2: "two", 3: "three"}.get(len(default), str(len(default)))
        return "" if fits else f"{count} numbers"
    if isinstance(default, str):
        return "" if isinstance(value, str) else "a text"
    return ""
