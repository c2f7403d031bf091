"""Every value of a configuration with where it comes from and what it does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel

from zeroshard.config.auto import DERIVED, Answer, Facts, Unknown
from zeroshard.config.keys import Honoured, NoEffect, Path, Refused
from zeroshard.config.override import override
from zeroshard.config.parse import ConfigSource, Outcome, examine
from zeroshard.config.schema import BLOCKS, OPEN_BLOCKS, Config
from zeroshard.config.source import read
from zeroshard.config.table import TABLE
from zeroshard.config.values import is_block

__all__ = ["Entry", "explain"]

_NOTHING = "The value asks for nothing."
_BATCH = {
    "train_batch_size": ("train", "micro-batch x accumulation x ranks"),
    "train_micro_batch_size_per_gpu": ("micro", "batch / accumulation / ranks"),
    "gradient_accumulation_steps": ("accumulation", "batch / micro-batch / ranks"),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One key of a configuration."""

    path: Path
    value: object
    """Its effective value in JSON's types; for a key without effect, what the file says."""

    source: str
    """Where the value comes from: "file", "--set", "default", '"auto" from ...' or "derived"."""

    treatment: Literal["honoured", "no effect"]
    reason: str = ""
    """Why a key has no effect."""


def explain(
    source: ConfigSource,
    *,
    assignments: Iterable[str] = (),
    world: int | None = None,
    facts: Facts | None = None,
) -> tuple[Entry, ...]:
    """List the effective values: all keys that are honoured, and the others that the file has.

    Args:
        source: a dict, a JSON file, or JSON in url-safe base64.
        assignments: values that replace those of the source, as ``override`` takes them.
        world: the number of ranks to work out the batch numbers for.
        facts: what the caller of ``initialize`` would know; None shows "auto" where it counts.

    Raises:
        ConfigError: the configuration cannot be used.
    """
    raw, changed = override(read(source), assignments)
    outcome = examine(raw, facts)
    explainer = _Explainer(outcome, changed, _batch(outcome, world))
    return tuple(explainer.entries())


def _batch(outcome: Outcome, world: int | None) -> dict[str, int]:
    """Work out the batch numbers, unless the caller may still give the one they start from."""
    config = outcome.config
    if world is None:
        return {}
    is_open = any(isinstance(outcome.answers.get((key,)), Unknown) for key in _BATCH)
    if is_open and config.train_batch_size is config.train_micro_batch_size_per_gpu is None:
        return {}
    batch = config.batch(world)
    return {key: getattr(batch, name) for key, (name, _) in _BATCH.items()}


class _Explainer:
    def __init__(self, outcome: Outcome, changed: frozenset[Path], batch: dict[str, int]) -> None:
        self._outcome = outcome
        self._given = outcome.walk.given
        self._changed = changed
        self._batch = batch

    def entries(self) -> Iterator[Entry]:
        for path in self._in_order():
            key = TABLE.get(path)
            if path in BLOCKS and not _is_missing(self._outcome.config, path):
                continue  # its keys speak for it
            if key is None:
                yield self._honoured(path)
            elif isinstance(key.treatment, Honoured):
                if path not in OPEN_BLOCKS:
                    yield self._honoured(path)
            elif path in self._given and not is_block(self._given[path]):
                yield self._without_effect(path)

    def _in_order(self) -> Iterator[Path]:
        """Yield the table's keys with those of open blocks in their places."""
        inside: dict[Path, list[Path]] = {}
        for path in self._given:
            if path[:-1] in OPEN_BLOCKS:
                inside.setdefault(path[:-1], []).append(path)
        for path in TABLE:
            if path[:-1] in OPEN_BLOCKS:
                continue
            if len(path) > 1 and _is_missing(self._outcome.config, path[:-1]):
                continue
            yield path
            yield from inside.get(path, ())

    def _honoured(self, path: Path) -> Entry:
        value, source = self._value(path)
        key = TABLE.get(path)
        always = key.always if key else None
        if always is not None and value != always.value:
            return Entry(path, value, source, "no effect", always.reason)
        return Entry(path, value, source, "honoured")

    def _value(self, path: Path) -> tuple[object, str]:
        answer = self._outcome.answers.get(path)
        value = _plain(_find(self._outcome.config, path))
        worked_out = self._batch.get(path[0]) if len(path) == 1 else None
        if value is None and worked_out is not None:
            return worked_out, f"derived: {self._derivation(path[0])}"
        if isinstance(answer, Unknown):
            return "auto", "auto (resolved from the caller)"
        if isinstance(answer, Answer):
            return value, _auto(answer)
        if self._is_given(path):
            return value, self._where(path)
        return value, "default"

    def _derivation(self, key: str) -> str:
        """Say what a batch number is worked out from; with one other given, accumulation is 1."""
        config = self._outcome.config
        is_alone = config.train_batch_size is None or config.train_micro_batch_size_per_gpu is None
        if key == "gradient_accumulation_steps" and is_alone:
            return "1, as it is not given"
        return _BATCH[key][1]

    def _is_given(self, path: Path) -> bool:
        """Tell whether the file has the key, or an older switch in place of its block."""
        if path in self._given:
            return self._given[path] is not None
        return len(path) > 1 and isinstance(self._given.get(path[:-1]), bool)

    def _where(self, path: Path) -> str:
        if any(path[:end] in self._changed for end in range(1, len(path) + 1)):
            return "--set"
        written = self._outcome.walk.dotted(path)
        return "file" if written == ".".join(path) else f"file, as {written}"

    def _without_effect(self, path: Path) -> Entry:
        treatment = TABLE[path].treatment
        reason = _NOTHING if isinstance(treatment, Refused) else ""
        if isinstance(treatment, NoEffect):
            reason = treatment.reason
        return Entry(path, _plain(self._given[path]), self._where(path), "no effect", reason)


def _auto(answer: Answer) -> str:
    if answer.source == DERIVED:
        return '"auto": from the other batch numbers and the number of ranks'
    return '"auto": default' if answer.source == "default" else f'"auto" from {answer.source}'


def _is_missing(config: Config, path: Path) -> bool:
    """Tell whether a block, or one around it, is not there."""
    return bool(path) and path in BLOCKS and _find(config, path) is None


def _find(config: Config, path: Path) -> object:
    here: object = config
    for part in path:
        here = here.get(part) if is_block(here) else getattr(here, part, None)
    return here


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return list(value) if isinstance(value, tuple) else value
