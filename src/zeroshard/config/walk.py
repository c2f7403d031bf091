"""One pass over the values of a file, which looks every key up in the table."""

from __future__ import annotations

from dataclasses import dataclass

from zeroshard.config.keys import ALIASES, DEVICE_SWITCHES, Honoured, NoEffect, Path, Refused
from zeroshard.config.kinds import misfit
from zeroshard.config.problems import Problem
from zeroshard.config.schema import AUTO_IS_A_VALUE, BLOCKS, NEVER_AUTO, OPEN_BLOCKS
from zeroshard.config.table import (
    LOOKED_INTO,
    TABLE,
    Key,
    is_inside,
    nearest,
    refusal_elsewhere,
    right_place,
)
from zeroshard.config.values import ascii_only, is_auto, is_block, shorten, show

__all__ = ["Ignored", "Walk"]


@dataclass(frozen=True, slots=True)
class Ignored:
    """A key that the file gives and that changes nothing."""

    path: Path
    reason: str


# How people mark keys that are remarks, since JSON has no comments; no known key begins like that.
_COMMENT_MARKS = ("_", "$", "//", "#")
_COMMENT = "A key that begins like this is read as a remark."


class Walk:
    """What a pass has found: values to keep, and things to say."""

    def __init__(self, values: dict[str, object]) -> None:
        self.problems: list[Problem] = []
        self.ignored: list[Ignored] = []
        self.auto: list[Path] = []
        """Fields and arguments whose value is "auto"."""
        self.given: dict[Path, object] = {}
        """Every known key of the file, with its value as it is written."""
        self._written: dict[Path, str] = {}
        self.kept = self._block(values, ())
        """The values of fields, as the schema nests them."""

    def dotted(self, path: Path) -> str:
        """Join a path as the user wrote it, in ASCII."""
        parts = [self._written.get(path[: i + 1], part) for i, part in enumerate(path)]
        return ascii_only(".".join(parts))

    def _block(self, values: dict[str, object], block: Path) -> dict[str, object]:
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
            if (*block, written) in DEVICE_SWITCHES:
                value = self._as_offload_block(path, value)
            key = TABLE.get(path)
            if key is None and block not in OPEN_BLOCKS:
                if written.startswith(_COMMENT_MARKS):
                    self.ignored.append(Ignored(path, _COMMENT))
                else:
                    self._note_unknown(path)
                continue
            self.given[path] = value
            keeps = key is None or self._accept(key, value)
            inside = value
            if path in LOOKED_INTO and is_block(value):
                inside = self._block(value, path)
            if keeps and not self._leaves_out(path, value):
                kept[path[-1]] = inside
        return kept

    def _as_offload_block(self, path: Path, value: object) -> object:
        if isinstance(value, bool):
            return {"device": "cpu" if value else "none"}
        if value is not None and not is_auto(value):
            self._note_misfit(path, "true or false", value)
        return None

    def _accept(self, key: Key, value: object) -> bool:
        """Decide whether the schema gets to see a key."""
        given = value is not None and not is_auto(value)
        if given and not key.has_field and (wanted := misfit(key.kind, value)):
            self._note_misfit(key.path, wanted, value)
            return False
        if is_inside(key.path):  # the block around it has been dealt with
            return key.has_field
        match key.treatment:
            case Honoured():
                always = key.always
                if given and always and isinstance(value, bool) and value != always.value:
                    self.ignored.append(Ignored(key.path, always.reason))
            case NoEffect() as row:
                if not row.asks_for_nothing(value):
                    self.ignored.append(Ignored(key.path, row.reason))
            case Refused() as row:
                if not row.asks_for_nothing(value):
                    self.problems.append(self._refusal(key.path, row, value))
                elif row.reported:
                    self.ignored.append(Ignored(key.path, row.reason))
        return key.has_field

    def _leaves_out(self, path: Path, value: object) -> bool:
        """Decide whether a value stands for "not given", noting an "auto"."""
        is_a_block = path in BLOCKS or path in OPEN_BLOCKS
        if value is None:
            return is_a_block
        if not is_auto(value) or is_a_block or path in AUTO_IS_A_VALUE:
            return False
        if path in NEVER_AUTO:
            self.problems.append(
                Problem(
                    fact=f'{self.dotted(path)} cannot be "auto", as nothing resolves it',
                    hint="write the value that is meant.",
                )
            )
            return TABLE[path].default is not None  # else it would be missed, too
        self.auto.append(path)
        return True

    def _note_misfit(self, path: Path, wanted: str, value: object) -> None:
        self.problems.append(
            Problem(
                fact=f"{self.dotted(path)} must be {wanted}, but is {show(value)}",
                hint="correct the value, or remove the key.",
            )
        )

    def _note_unknown(self, path: Path) -> None:
        instead = refusal_elsewhere(path) or right_place(path)
        near = None if instead else nearest(path)
        self.problems.append(
            Problem(
                fact=f'unknown key "{shorten(self.dotted(path))}"',
                tail=f' Did you mean "{near}"?' if near else "",
                hint=None if near else instead or "remove it; no known key has a similar name.",
            )
        )

    def _note_twice(self, written: str, path: Path) -> None:
        older = self._written.get(path, written)  # where both are, one of them is a second name
        self.problems.append(
            Problem(
                fact=f'"{self.dotted(path)}" and "{written}" are one key, and both are given',
                hint=f'remove "{older}".',
            )
        )

    def _refusal(self, path: Path, row: Refused, value: object) -> Problem:
        name = self.dotted(path)
        if row.subkey and is_block(value) and row.subkey in value:
            name, value = f"{name}.{row.subkey}", value[row.subkey]
        return Problem(
            fact=f"{name} cannot be {show(value)}", tail=f"\n{row.reason}", hint=row.instead
        )
