"""Every key of a configuration in one table, and what to suggest for a key that is not in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from zeroshard.config.contents import KINDS
from zeroshard.config.keys import (
    ALIASES,
    DEVICE_SWITCHES,
    ROWS,
    Always,
    Honoured,
    NoEffect,
    Path,
    Refused,
    Treatment,
)
from zeroshard.config.kinds import Anything, Kind
from zeroshard.config.schema import BLOCKS, OPEN_BLOCKS

__all__ = [
    "LOOKED_INTO",
    "TABLE",
    "Key",
    "is_inside",
    "nearest",
    "refusal_elsewhere",
    "right_place",
]

_TELLING = 6  # a part of a key's name that is as long as this tells which one is meant


@dataclass(frozen=True, slots=True)
class Key:
    """One key: where it sits, how it is treated, and what the reference page says of it."""

    path: Path
    treatment: Treatment
    has_field: bool
    """Whether the schema has a field for it and checks its value."""
    kind: Kind = Anything
    """What the value of a key without a field has to be."""
    always: Always | None = None
    """The one value that can be had, if there is only one."""
    default: object = None
    """Its default; None also for keys without a field and for keys that have to be given."""
    doc: str = ""
    """The docstring under its field."""


def _fields() -> dict[Path, Key]:
    keys: dict[Path, Key] = {}
    for block, model in BLOCKS.items():
        around = keys[block].treatment if block in keys else Honoured()
        for name, field in model.model_fields.items():
            ignored = [item for item in field.metadata if isinstance(item, NoEffect)]
            always = [item for item in field.metadata if isinstance(item, Always)]
            path = (*block, name)
            keys[path] = Key(
                path=path,
                treatment=ignored[0] if ignored else around,
                has_field=True,
                always=always[0] if always else None,
                default=None
                if field.is_required()
                else field.get_default(call_default_factory=True),
                doc=field.description or "",
            )
    return keys


def _others() -> dict[Path, Key]:
    keys: dict[Path, Key] = {}
    for path, row in ROWS.items():
        kind = row.kind if isinstance(row, NoEffect) else Anything
        keys[path] = Key(path, row, has_field=False, kind=kind)
    for path, kind in KINDS.items():
        if path not in keys and path[:-1] in keys:
            keys[path] = Key(path, keys[path[:-1]].treatment, has_field=False, kind=kind)
    return keys


TABLE: Mapping[Path, Key] = {**_fields(), **_others()}
"""Every known key by its path; a key inside a block without a model is of the block's class."""

LOOKED_INTO = frozenset(path[:-1] for path in TABLE) | OPEN_BLOCKS
"""The blocks whose keys are known, or belong to somebody else."""


def is_inside(path: Path) -> bool:
    """Tell whether a key's class is that of the block around it, which then speaks for it."""
    treatment, around = TABLE[path].treatment, TABLE.get(path[:-1])
    return (
        not isinstance(treatment, Honoured) and around is not None and treatment is around.treatment
    )


def refusal_elsewhere(path: Path) -> str | None:
    """What to do instead of a key that is refused in another block, where it is better known."""
    rows = [row for known, row in ROWS.items() if known[-1] == path[-1]]
    refused = [row for row in rows if isinstance(row, Refused)]
    return refused[0].instead if len(rows) == len(refused) == 1 else None


def right_place(path: Path) -> str | None:
    """Say where a key belongs that has the right name in the wrong place."""
    *block, name = path
    inside = tuple(name.split("."))
    if not block and len(inside) > 1 and inside in TABLE:
        return f'move "{inside[-1]}" into the block "{".".join(inside[:-1])}".'
    if (*block, "params") in OPEN_BLOCKS and nearest(path) is None:
        return f'move it into the block "{block[0]}.params", if it is an argument.'
    return None


def nearest(path: Path) -> str | None:
    """Find the known key that an unknown one most likely means."""
    *block, name = path
    usable: list[Path] = [
        known
        for known, key in TABLE.items()
        if not isinstance(key.treatment, Refused)
        or (known[:-1] == tuple(block) and known not in ROWS)
    ]
    usable += [alias for alias in ALIASES if alias not in DEVICE_SWITCHES]
    siblings = [key[-1] for key in usable if key[:-1] == tuple(block) and "." not in key[-1]]
    lowered = {sibling.lower(): sibling for sibling in siblings}
    if name.lower() in lowered:
        return lowered[name.lower()]
    exact = [key for key in usable if key[-1] == name]
    if len(exact) == 1:
        return ".".join(exact[0])
    longer = [sibling for sibling in siblings if name.lower() in sibling.lower()]
    if len(name) >= _TELLING and len(longer) == 1:
        return longer[0]
    close = get_close_matches(name.lower(), lowered, n=1, cutoff=0.7)
    return lowered[close[0]] if close else None
