"""Every key of a configuration in one table, and what to suggest for a key that is not in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from zeroshard.config.keys import ALIASES, ROWS, Honoured, NoEffect, Path, Refused, Treatment
from zeroshard.config.schema import BLOCKS

__all__ = ["TABLE", "Key", "nearest", "refusal_elsewhere"]

_TELLING = 6  # a part of a key's name that is as long as this tells which one is meant


@dataclass(frozen=True, slots=True)
class Key:
    """One key: where it sits, how it is treated, and what the reference page says of it."""

    path: Path
    treatment: Treatment
    has_field: bool
    """Whether the schema has a field for it, so that its value is checked."""
    default: object = None
    """Its default; None also for keys without a field and for keys that have to be given."""
    doc: str = ""
    """The docstring under its field."""


def _fields() -> dict[Path, Key]:
    keys: dict[Path, Key] = {}
    for block, model in BLOCKS.items():
        for name, field in model.model_fields.items():
            found = [item for item in field.metadata if isinstance(item, NoEffect)]
            path = (*block, name)
            keys[path] = Key(
                path=path,
                treatment=found[0] if found else Honoured(),
                has_field=True,
                default=None
                if field.is_required()
                else field.get_default(call_default_factory=True),
                doc=field.description or "",
            )
    return keys


TABLE: Mapping[Path, Key] = {
    **_fields(),
    **{path: Key(path, row, has_field=False) for path, row in ROWS.items()},
}
"""Every known key by its path."""


def refusal_elsewhere(path: Path) -> str | None:
    """What to do instead of a key that is refused in another block, where it is better known."""
    rows = [key.treatment for key in TABLE.values() if key.path[-1] == path[-1]]
    refused = [row for row in rows if isinstance(row, Refused)]
    return refused[0].instead if len(rows) == len(refused) == 1 else None


def nearest(path: Path) -> str | None:
    """Find the known key that an unknown one most likely means."""
    *block, name = path
    usable: list[Path] = [key for key in TABLE if not isinstance(TABLE[key].treatment, Refused)]
    usable += [alias for alias, key in ALIASES.items() if key in usable]
    siblings = [key[-1] for key in usable if key[:-1] == tuple(block) and "." not in key[-1]]
    exact = [key for key in usable if key[-1] == name]
    if len(exact) == 1:
        return ".".join(exact[0])
    longer = [sibling for sibling in siblings if name.lower() in sibling.lower()]
    if len(name) >= _TELLING and len(longer) == 1:
        return longer[0]
    lowered = {sibling.lower(): sibling for sibling in siblings}
    close = get_close_matches(name.lower(), lowered, n=1, cutoff=0.7)
    return lowered[close[0]] if close else None
