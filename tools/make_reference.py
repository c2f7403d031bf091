"""Write docs/reference/configuration.md from the configuration schema.

Every statement on the page is taken from the code that acts on it: field types, defaults and
docstrings from `zeroshard.config.schema`, the reasons for ignored and refused keys from
`zeroshard.config.keys`, and what is inside their blocks from `zeroshard.config.contents`. With
--check nothing is written, and a page that differs is an error.
"""

from __future__ import annotations

import functools
import json
import sys
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from zeroshard.config import contents, keys, kinds, schema
from zeroshard.config import table as known

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "configuration.md"

INTRODUCTION = """\
# Configuration

<!-- Written by tools/make_reference.py; run `make reference` after a change of the schema. -->

A configuration is DeepSpeed's JSON: a file, its path in `--deepspeed_config`, or a dictionary given
to `zeroshard.initialize(config=...)`. A key not on this page is an error at every level, except in
`optimizer.params`, `scheduler.params` and `compile.kwargs`, which go to the optimizer, the schedule
and the compiler.

Every key is in one class:

| class | meaning |
|---|---|
| honoured | the key does what its row says |
| no effect | the value is checked and changes no number; one warning says why |
| refused | an error that says what to write instead |

Of a value that asks for nothing, such as null, "auto" or a block that is switched off, nothing is
said. The keys inside a block without a class of their own are in the class of the block. The
[guide](../guides/configuration.md) shows how to see what a file means.
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
    if annotation is kinds.Anything:
        words = "anything"
    elif annotation is kinds.Block:
        words = "block"
    elif origin is typing.Annotated:
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
    value = list(value) if isinstance(value, tuple) else value
    return f"`{json.dumps(value)}`"


def in_one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(in_one_line(cell) for cell in row)} |"


def named(path: keys.Path) -> str:
    """Write a key's name, as a link if it is a block with a section of its own."""
    name = f"`{path[-1]}`"
    return f"[{name}](#{anchor(path)})" if path in sections() else name


def anchor(path: keys.Path) -> str:
    return name_of(path).replace(".", "")


def row_of_field(path: keys.Path, field: FieldInfo) -> tuple[str, ...]:
    meaning = field.description
    assert meaning, f"{name_of(path)} has no docstring"
    key = known.TABLE[path]
    status = "honoured"
    if isinstance(key.treatment, keys.NoEffect):
        status = "no effect" + ("" if known.is_inside(path) else f". {key.treatment.reason}")
    elif key.always is not None:
        value = json.dumps(key.always.value)
        status = f"honoured at `{value}`; another value has no effect. {key.always.reason}"
    return named(path), values(field.annotation), default(field), meaning, status


def row_of_other_key(path: keys.Path, row: keys.NoEffect | keys.Refused) -> tuple[str, ...]:
    words = values(contents.KINDS[path]) if path in contents.KINDS else ""
    if isinstance(row, keys.NoEffect):
        words = words or values(row.kind)
        return named(path), words, f"no effect. {row.reason}", ""
    instead = f"{row.instead[0].upper()}{row.instead[1:]}"
    return named(path), words, f"refused. {row.reason}", instead


def section(block: keys.Path) -> Iterator[str]:
    """Yield one block: what it is, its fields, then the keys that are known and not acted on."""
    model = schema.BLOCKS.get(block)
    yield ""
    yield f"## {name_of(block) or 'Top level'}"
    if model is not None:
        if block:
            yield ""
            yield in_one_line(model.__doc__ or "")
        yield ""
        fields = model.model_fields.items()
        rows = (row_of_field((*block, name), field) for name, field in fields)
        yield from table(("key", "values", "default", "meaning", "class"), rows)
    others = {path: row for path, row in sorted(keys.ROWS.items()) if path[:-1] == block}
    if others:
        yield ""
        rows = (row_of_other_key(path, row) for path, row in others.items())
        yield from table(("other key", "values", "class", "instead"), rows)
    inside = [path for path in contents.KINDS if path[:-1] == block and path not in keys.ROWS]
    inside = [path for path in inside if path in known.TABLE]
    if inside and block:
        yield ""
        rows = ((named(path), values(contents.KINDS[path])) for path in inside)
        yield from table(("key", "values"), rows)


@functools.cache
def sections() -> tuple[keys.Path, ...]:
    """Return the blocks in the order of the page: each behind the one that holds it."""
    blocks: list[keys.Path] = []

    def add(block: keys.Path) -> None:
        blocks.append(block)
        inside = dict.fromkeys(path[:-1] for path in known.TABLE if len(path) > len(block) + 1)
        for path in inside:
            if path[:-1] == block:
                add(path)

    add(())
    return tuple(blocks)


def render() -> str:
    """Return the text of the page."""
    lines = [INTRODUCTION.rstrip("\n")]
    for block in sections():
        lines.extend(section(block))
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
