"""From plain values to a `Config`, or to one error that lists everything wrong.

A walk looks every key up in the table, "auto" is resolved, pydantic checks every value, and rules
check keys against each other. All four collect problems instead of stopping at the first.

What is accepted and does nothing is told in one warning per reason: an ignored option that nobody
hears of is worse than a refused one. What "auto" stands for is told in one line.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from zeroshard.config import rules
from zeroshard.config.auto import DERIVED, Answer, Facts, Unknown, resolve
from zeroshard.config.keys import Path
from zeroshard.config.problems import Problem, error
from zeroshard.config.schema import BLOCKS, Config
from zeroshard.config.source import Source, read
from zeroshard.config.table import TABLE, Key
from zeroshard.config.values import is_block, show, show_items
from zeroshard.config.walk import Walk
from zeroshard.errors import ConfigError, compose

__all__ = ["ConfigSource", "Outcome", "examine", "load", "peek"]

_logger = logging.getLogger("zeroshard")

ConfigSource = str | FilePath | Mapping[str, object]
"""A dict, the path of a JSON file, or JSON in url-safe base64."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A configuration, and how it came about."""

    config: Config
    walk: Walk
    answers: Mapping[Path, Answer | Unknown]
    """What each "auto" stands for."""


def load(source: ConfigSource, facts: Facts | None = None) -> Config:
    """Load a configuration from a dict, a JSON file, or JSON in url-safe base64.

    Args:
        source: where it is.
        facts: what the caller knows and a file may leave to it by "auto". Without facts, such
            values stay at their defaults, and arguments of the optimizer and the schedule stay
            out; with facts, an "auto" that they do not resolve is an error.

    Raises:
        ConfigError: something is wrong; the message lists everything that is.
    """
    raw = read(source)
    outcome = examine(raw, facts)
    _tell(raw.name, outcome)
    return outcome.config


def peek(source: ConfigSource) -> Config:
    """Load a configuration for somebody who needs a part of it, before :func:`load` or beside it.

    What is ignored is left to ``load`` to tell, so that it is told once.

    Raises:
        ConfigError: something is wrong; the message lists everything that is.
    """
    return examine(read(source), None).config


def examine(raw: Source, facts: Facts | None) -> Outcome:
    """Turn plain values into a configuration, without a word to the log.

    Raises:
        ConfigError: something is wrong; the message lists everything that is.
    """
    try:
        return _examine(raw, facts)
    except RecursionError:
        raise ConfigError(
            compose(f"{raw.name} is nested too deeply.", hint="look for a missing bracket.")
        ) from None


def _examine(raw: Source, facts: Facts | None) -> Outcome:
    walk = Walk(raw.values)
    problems = [_duplicate(path) for path in raw.duplicates] + walk.problems
    answers = resolve(walk.auto, walk.kept, facts)
    for path, answer in answers.items():
        if isinstance(answer, Answer):
            _place(walk.kept, path, answer.value)
        elif facts is not None and path[0] not in facts.replaced:
            problems.append(_unresolved(walk.dotted(path), answer))
    config, details = _validate(walk.kept)
    wrong = [_known_part(detail["loc"]) for detail in details]
    problems += [_explain(detail, walk, answers) for detail in details]
    problems += rules.broken(config, wrong)
    if problems:
        raise error(raw.name, problems)
    return Outcome(config, walk, answers)


def _place(values: dict[str, object], path: Path, value: object) -> None:
    """Put a value where its blocks exist."""
    for part in path[:-1]:
        inner = values[part]
        assert is_block(inner), "an auto was found inside this block"
        values = inner
    values[path[-1]] = value


def _validate(kept: dict[str, object]) -> tuple[Config, list[ErrorDetails]]:
    """Validate, and where that fails say why and validate what remains without the mistakes."""
    first: list[ErrorDetails] = []
    while True:
        try:
            return Config.model_validate(kept), first
        except ValidationError as failure:
            details = failure.errors(include_url=False)
        first = first or details
        for detail in details:
            _remove(kept, _known_part(detail["loc"]))


def _remove(values: dict[str, object], path: Path) -> None:
    """Remove a key; one that is missing takes the block that misses it with it."""
    *blocks, name = path
    here = values
    for depth, part in enumerate(blocks):
        inner = here.get(part)
        if not is_block(inner):
            return
        if depth == len(blocks) - 1 and name not in inner:
            del here[part]
            return
        here = inner
    here.pop(name, None)


def _known_part(location: tuple[int | str, ...]) -> Path:
    """Cut a place off where it leaves the table, such as at an item of a list."""
    path = tuple(str(part) for part in location)
    return next(path[:end] for end in range(len(path), -1, -1) if path[:end] in TABLE)


def _explain(detail: ErrorDetails, walk: Walk, answers: Mapping[Path, Answer | Unknown]) -> Problem:
    """Put an error of pydantic into this library's words."""
    path = tuple(str(part) for part in detail["loc"])
    name = walk.dotted(path)
    match detail["type"]:
        case "missing":
            return Problem(fact=f"{name} is missing", hint=f'add "{path[-1]}".')
        case "expected":
            wanted = str(detail.get("ctx", {})["expected"])
        case "dict_type" | "model_type" | "model_attributes_type":
            wanted = "an object"
        case _:
            wanted = f"a value that fits ({detail['msg']})"
    answer = answers.get(path)
    source = f', from {answer.source}, for "auto"' if isinstance(answer, Answer) else ""
    return Problem(
        fact=f"{name} must be {wanted}, but is {show(detail['input'])}{source}",
        hint=_default_hint(TABLE.get(path)),
    )


def _default_hint(key: Key | None) -> str:
    if key is None or key.default in (None, ()) or key.path in BLOCKS:
        return "correct the value, or remove the key."
    return f"correct the value, or remove the key for the default, {show(key.default)}."


def _unresolved(name: str, answer: Unknown) -> Problem:
    return Problem(
        fact=f'{name} is "auto", but nobody gives its value',
        hint=answer.hint,
    )


def _duplicate(path: str) -> Problem:
    return Problem(
        fact=f'duplicate key "{path}"',
        tail="\nOnly one of its values could count, and which one is easy to misread.",
        hint="keep one of them.",
    )


def _tell(name: str, outcome: Outcome) -> None:
    by_reason: dict[str, list[str]] = {}
    for ignored in outcome.walk.ignored:
        by_reason.setdefault(ignored.reason, []).append(outcome.walk.dotted(ignored.path))
    for reason, paths in by_reason.items():
        _logger.warning("%s: accepted, no effect: %s. %s", name, ", ".join(paths), reason)
    resolved = [
        f"{outcome.walk.dotted(path)} = {show_items(answer.value)} ({answer.source})"
        for path, answer in outcome.answers.items()
        if isinstance(answer, Answer) and answer.source != DERIVED
    ]
    if resolved:
        _logger.info('%s: "auto" is resolved to: %s', name, ", ".join(resolved))
