"""From plain values to a `Config`, or to one error that lists everything wrong.

The work is one walk over the values, which looks every key up in the table and keeps what the
schema has a field for, and then pydantic's validation of what was kept. Both collect problems
instead of stopping at the first, because a file is corrected faster with the whole list at hand.

Options that are accepted and do nothing, and "auto" where nobody resolved it, are each told in
one warning per load: an ignored option that nobody hears of is worse than a refused one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from zeroshard.config.keys import ALIASES, Honoured, NoEffect, Path, Refused
from zeroshard.config.schema import BLOCKS, OPEN_BLOCKS, TWO_PRECISIONS, Config
from zeroshard.config.source import Source, read
from zeroshard.config.table import TABLE, Key, nearest, refusal_elsewhere
from zeroshard.config.values import ascii_only, is_auto, is_block, shorten, show
from zeroshard.errors import ConfigError, compose

__all__ = ["load"]

_logger = logging.getLogger("zeroshard")

# "auto" is the usual way to leave these to a framework, so it is not worth a warning.
_DERIVED = frozenset(
    {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
)
_STAGE_OF_OFFLOAD_PARAM = 3


def load(source: str | FilePath | Mapping[str, object]) -> Config:
    """Load a configuration from a dict, a JSON file, or JSON in url-safe base64."""
    _check_kind(source)
    raw = read(source)
    try:
        return _load(raw)
    except RecursionError:
        raise ConfigError(
            compose(f"{raw.name} is nested too deeply.", hint="look for a missing bracket.")
        ) from None


def _check_kind(source: object) -> None:
    if not isinstance(source, str | FilePath | Mapping):
        raise ConfigError(
            compose(
                f"a configuration cannot be loaded from {show(source)}.",
                hint="pass a dict, the path of a JSON file, or JSON in url-safe base64.",
            )
        )


def _load(raw: Source) -> Config:
    walk = _Walk()
    kept = walk.block(raw.values, ())
    problems = [_duplicate(path) for path in raw.duplicates] + walk.problems
    try:
        config = Config.model_validate(kept)
    except ValidationError as error:
        # The walk has already said that two precisions are enabled, even where pydantic cannot.
        details = [d for d in error.errors(include_url=False) if d["type"] != "two_precisions"]
        problems += [walk.explain(detail) for detail in details]
        raise _error(raw.name, problems) from None
    if problems:
        raise _error(raw.name, problems)
    _warn(raw.name, walk)
    return config


@dataclass(frozen=True, slots=True)
class _Problem:
    """One thing that is wrong."""

    fact: str
    """A sentence without its full stop."""

    hint: str | None = None
    tail: str = ""
    """What follows the full stop, with the blank or the line break before it."""


class _Walk:
    """One pass over the values, collecting what to keep and what to say."""

    def __init__(self) -> None:
        self.problems: list[_Problem] = []
        self.no_effect: list[str] = []
        self.auto: list[str] = []
        self._written: dict[Path, str] = {}
        self._unresolved: set[Path] = set()

    def block(self, values: dict[str, object], block: Path) -> dict[str, object]:
        """Keep the keys of one block that the schema has fields for."""
        kept: dict[str, object] = {}
        seen: set[Path] = set()
        for written, value in values.items():
            path = ALIASES.get((*block, written), (*block, written))
            if path in seen:
                self._note_twice(written, path)
                continue
            seen.add(path)
            if path[-1] != written:
                self._written[path] = written
            key = TABLE.get(path)
            if key is None and block not in OPEN_BLOCKS:
                self._note_unknown(path)
            elif (key is None or self._accept(key, value)) and not self._leaves_out(path, value):
                kept[path[-1]] = self._inside(path, value)
        if block == ("zero_optimization",):
            self._check_offload(values)
        if not block:
            self._check_precision(kept)
        return kept

    def _inside(self, path: Path, value: object) -> object:
        if path not in BLOCKS and path not in OPEN_BLOCKS:
            return value
        return self.block(value, path) if is_block(value) else value

    def _accept(self, key: Key, value: object) -> bool:
        """Decide whether the schema gets to see a key."""
        match key.treatment:
            case Honoured():
                return True
            case NoEffect():
                if value is not None and not is_auto(value):
                    self.no_effect.append(self._dotted(key.path))
                return key.has_field
            case Refused() as row:
                if not row.harmless(value):
                    self.problems.append(self._refusal(key.path, row, value))
                elif row.reported:
                    self.no_effect.append(self._dotted(key.path))
                return False

    def _leaves_out(self, path: Path, value: object) -> bool:
        """Decide whether a value stands for "not given", noting what that means."""
        if value is None:
            return path in BLOCKS or path in OPEN_BLOCKS
        if not is_auto(value) or path in BLOCKS or path in OPEN_BLOCKS:
            return False
        self._unresolved.add(path)
        if path[:-1] in OPEN_BLOCKS:
            self.auto.append(f"{self._dotted(path)} = the {path[0]}'s own default")
        elif path[-1] not in _DERIVED and isinstance(TABLE[path].treatment, Honoured):
            self.auto.append(f"{self._dotted(path)} = {show(TABLE[path].default)}")
        return True

    def _note_unknown(self, path: Path) -> None:
        instead = refusal_elsewhere(path)
        near = None if instead else nearest(path)
        self.problems.append(
            _Problem(
                fact=f'unknown key "{shorten(self._dotted(path))}"',
                tail=f' Did you mean "{near}"?' if near else "",
                hint=None if near else instead or "remove it; no known key has a similar name.",
            )
        )

    def _note_twice(self, written: str, path: Path) -> None:
        self.problems.append(
            _Problem(
                fact=f'"{self._dotted(path)}" and "{written}" are one key, and both are given',
                hint=f'remove "{written}".',
            )
        )

    def _refusal(self, path: Path, row: Refused, value: object) -> _Problem:
        name = self._dotted(path)
        if row.subkey and is_block(value) and row.subkey in value:
            name, value = f"{name}.{row.subkey}", value[row.subkey]
        return _Problem(
            fact=f"{name} cannot be {show(value)}", tail=f"\n{row.reason}", hint=row.instead
        )

    def _check_offload(self, zero: dict[str, object]) -> None:
        """Say that a stage has nothing to offload, which stays true when offloading is built."""
        given = zero.get("stage", 0)
        stage = 0 if given is None or is_auto(given) else given
        row = TABLE["zero_optimization", "offload_param"].treatment
        if not isinstance(stage, int) or not isinstance(row, Refused):
            return
        if stage >= _STAGE_OF_OFFLOAD_PARAM or row.harmless(zero.get("offload_param")):
            return
        self.problems.append(
            _Problem(
                fact=f"zero_optimization.offload_param needs stage 3, but stage is {stage:d}",
                tail=f"\nStage {stage:d} keeps full parameters on the device, "
                "so there is nothing to offload.",
                hint='set "stage": 3, or remove "offload_param".',
            )
        )

    def _check_precision(self, kept: dict[str, object]) -> None:
        blocks = (kept.get("fp16"), kept.get("bf16"))
        if all(is_block(block) and block.get("enabled") is True for block in blocks):
            self.problems.append(
                _Problem(fact=TWO_PRECISIONS, hint='set "enabled": false in one of the two blocks.')
            )

    def explain(self, detail: ErrorDetails) -> _Problem:
        """Put an error of pydantic into this library's words."""
        context = detail.get("ctx", {})
        location = detail["loc"]
        path = tuple(str(part) for part in location)
        name = self._dotted(path) or "the configuration"
        match detail["type"]:
            case "missing" if path in self._unresolved:
                return _Problem(
                    fact=f'{name} cannot be "auto" here, where nothing resolves it',
                    hint="write the name that is meant.",
                )
            case "missing":
                return _Problem(fact=f"{name} is missing", hint=f'add "{path[-1]}".')
            case "expected":
                wanted = str(context["expected"])
            case "dict_type" | "model_type" | "model_attributes_type":
                wanted = "an object"
            case _:
                wanted = f"a value that fits ({detail['msg']})"
        return _Problem(
            fact=f"{name} must be {wanted}, but is {show(detail['input'])}",
            hint=_default_hint(TABLE.get(path)),
        )

    def _dotted(self, path: Path) -> str:
        """Join a path as the user wrote it, in ASCII."""
        parts = [self._written.get(path[: i + 1], part) for i, part in enumerate(path)]
        return ascii_only(".".join(parts))


def _default_hint(key: Key | None) -> str:
    if key is None or key.default is None or key.path in BLOCKS:
        return "correct the value, or remove the key."
    return f"correct the value, or remove the key for the default, {show(key.default)}."


def _duplicate(path: str) -> _Problem:
    return _Problem(
        fact=f'duplicate key "{path}"',
        tail="\nOnly one of its values could count, and which one is easy to misread.",
        hint="keep one of them.",
    )


def _error(name: str, problems: Sequence[_Problem]) -> ConfigError:
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


def _warn(name: str, walk: _Walk) -> None:
    if walk.no_effect:
        _logger.warning(
            "%s: accepted, no effect in this version: %s", name, ", ".join(walk.no_effect)
        )
    if walk.auto:
        _logger.warning('%s: "auto" is resolved to: %s', name, ", ".join(walk.auto))
