"""Write docs/reference/configuration.md from the configuration schema.

Every statement on the page is taken from the code that acts on it: field types, defaults and
docstrings from `zeroshard.config.schema`, and the reasons for ignored and refused keys from
`zeroshard.config.keys`. With --check nothing is written, and a page that differs is an error.
"""

from __future__ import annotations

import json
import sys
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from zeroshard.config import keys, schema

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "configuration.md"

INTRODUCTION = """\
# Configuration

<!-- Written by tools/make_reference.py; run `make reference` after a change of the schema. -->

A configuration is DeepSpeed's JSON: a file, its path in `--deepspeed_config`, or a dictionary given
to `zeroshard.initialize(config=...)`. A key not on this page is an error at every level, except in
`optimizer.params` and `scheduler.params`, which go to the optimizer and the schedule.

| status | meaning |
|---|---|
| honoured | the key does what its row says |
| no effect | the value is accepted and changes no number; the row says why |
| refused | an error, except at values that ask for nothing (null, "auto", switched off) |
"""

NAMES_OF_TYPES = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    types.NoneType: "null",
}


def name_of(path: keys.Path) -> str:
    return ".".join(path)


def values(annotation: object) -> str:
    """Describe in JSON's words what a field accepts."""
    origin = typing.get_origin(annotation)
    parts = typing.get_args(annotation)
    if origin is typing.Annotated:
        words = values(parts[0])
    elif origin is typing.Literal:
        words = ", ".join(f"`{json.dumps(part)}`" for part in parts)
    elif origin in {typing.Union, types.UnionType}:
        words = ", ".join(values(part) for part in parts)
    elif origin in {list, tuple}:
        words = f"list of {values(parts[0])}"
    elif origin is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        words = "block"
    else:
        assert isinstance(annotation, type), f"no words for the type {annotation!r}"
        words = NAMES_OF_TYPES[annotation]
    return words


def default(field: FieldInfo) -> str:
    """Write a field's default as JSON; a block has none of its own."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel) or value == {}:
        return ""
    return f"`{json.dumps(value)}`"


def in_one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(in_one_line(cell) for cell in row)} |"


def row_of_field(path: keys.Path, field: FieldInfo) -> tuple[str, ...]:
    meaning = field.description
    assert meaning, f"{name_of(path)} has no docstring"
    ignored = next((part for part in field.metadata if isinstance(part, keys.NoEffect)), None)
    status = "honoured" if ignored is None else f"no effect. {ignored.reason}"
    key = f"`{path[-1]}`"
    if path in schema.BLOCKS:
        key = f"[{key}](#{name_of(path).replace('.', '')})"
    return key, values(field.annotation), default(field), meaning, status


def row_of_other_key(path: keys.Path, row: keys.NoEffect | keys.Refused) -> tuple[str, ...]:
    if isinstance(row, keys.Refused):
        return (
            f"`{path[-1]}`",
            f"refused. {row.reason}",
            f"{row.instead[0].upper()}{row.instead[1:]}",
        )
    return f"`{path[-1]}`", f"no effect. {row.reason}", ""


def section(block: keys.Path, model: type[BaseModel] | None) -> Iterator[str]:
    """Yield one block: what it is, its fields, then the keys that are known and not acted on."""
    yield ""
    yield f"## {name_of(block) or 'Top level'}"
    if model is not None:
        if block:
            yield ""
            yield in_one_line(model.__doc__ or "")
        yield ""
        fields = model.model_fields.items()
        rows = (row_of_field((*block, name), field) for name, field in fields)
        yield from table(("key", "values", "default", "meaning", "status"), rows)
    others = {path: row for path, row in sorted(keys.ROWS.items()) if path[:-1] == block}
    if others:
        yield ""
        rows = (row_of_other_key(path, row) for path, row in others.items())
        yield from table(("other key", "status", "instead"), rows)


def render() -> str:
    """Return the text of the page."""
    models: dict[keys.Path, type[BaseModel]] = dict(schema.BLOCKS)
    blocks = list(models)
    # A block without a model, such as optimizer.params, stands behind the block that holds it.
    for path in keys.ROWS:
        if path[:-1] not in blocks:
            blocks.insert(blocks.index(path[:-2]) + 1, path[:-1])
    lines = [INTRODUCTION.rstrip("\n")]
    for block in blocks:
        lines.extend(section(block, models.get(block)))
    lines.extend(["", "## Second names", ""])
    rows = ((f"`{name_of(old)}`", f"`{name_of(new)}`") for old, new in keys.ALIASES.items())
    lines.extend(table(("key", "is read as"), rows))
    return "\n".join(lines) + "\n"


def main() -> int:
    text = render()
    if "--check" in sys.argv[1:]:
        current = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
        if current != text:
            sys.stderr.write(f"{PAGE} is out of date; run `make reference`.\n")
            return 1
        return 0
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
