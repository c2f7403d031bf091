"""What is wrong with a configuration, and one error for all of it.

A file is corrected faster with the whole list at hand, so problems are collected and raised once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zeroshard.errors import ConfigError, compose

__all__ = ["Problem", "error"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong."""

    fact: str
    """A sentence without its full stop."""

    hint: str | None = None
    """What to do about it."""

    tail: str = ""
    """What follows the full stop, with the blank or the line break before it."""


def error(name: str, problems: Sequence[Problem]) -> ConfigError:
    """Merge all problems into one error; a single one reads like any other message."""
    if len(problems) == 1:
        (only,) = problems
        return ConfigError(compose(f"{only.fact} ({name}).{only.tail}", hint=only.hint))
    lines = [f"{name} has {len(problems)} problems."]
    for number, problem in enumerate(problems, 1):
        hint = f"\nhint: {problem.hint}" if problem.hint else ""
        text = f"{problem.fact}.{problem.tail}{hint}"
        lines.append(f"{number}. " + text.replace("\n", "\n   "))
    return ConfigError("\n\n".join(lines))
