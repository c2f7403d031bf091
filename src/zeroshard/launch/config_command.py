"""The commands `zeroshard config explain` and `zeroshard config template`.

Neither imports torch, so both answer at once.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zeroshard.errors import UsageError, compose

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zeroshard.config import Entry

__all__ = ["config"]

_WIDEST_VALUE = 48
_NO_LIMIT = 10_000


@click.group(short_help="Explain a configuration, or write one to start from.")
def config() -> None:
    """Explain a configuration, or write one to start from."""


@config.command()
@click.argument("file")
@click.option(
    "--world-size",
    "--world_size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Work out the batch numbers for N ranks.",
)
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="Replace a value of FILE: a dotted key and JSON, such as zero_optimization.stage=3.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects for programs.")
def explain(file: str, world_size: int | None, assignments: tuple[str, ...], as_json: bool) -> None:
    """Print every value that counts in FILE, where it comes from and what it does.

    A configuration that cannot be used is an error, which lists everything wrong with it.
    """
    from zeroshard.config import explain as entries_of  # noqa: PLC0415 - pydantic takes a moment

    entries = entries_of(file, assignments=assignments, world=world_size)
    if as_json:
        click.echo(json.dumps([_as_object(entry) for entry in entries], indent=2))
    else:
        click.echo(_as_tables(entries))


def _as_object(entry: Entry) -> dict[str, object]:
    return {
        "path": ".".join(entry.path),
        "value": entry.value,
        "source": entry.source,
        "class": entry.treatment,
        "reason": entry.reason,
    }


def _as_tables(entries: Sequence[Entry]) -> str:
    """Lay entries out in one table per block, in text that needs neither colour nor a terminal."""
    from rich.console import Console  # noqa: PLC0415 - only this command draws
    from rich.table import Table  # noqa: PLC0415

    blocks: dict[str, list[Entry]] = {}
    for entry in entries:
        blocks.setdefault(".".join(entry.path[:-1]), []).append(entry)
    # In a file or a pipe, a line is as long as it has to be.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _NO_LIMIT
    console = Console(width=width, color_system=None, highlight=False, markup=False, emoji=False)
    with console.capture() as capture:
        for block, inside in blocks.items():
            table = Table(box=None)
            table.add_column(block or "top level", no_wrap=True)
            for title in ("value", "source", "class"):
                table.add_column(title, overflow="fold")
            said: set[str] = set()
            for entry in inside:
                table.add_row(*_row(entry, repeated=entry.reason in said))
                said.add(entry.reason)
            console.print(table)
            console.print()
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())


def _row(entry: Entry, *, repeated: bool) -> tuple[str, str, str, str]:
    value = json.dumps(entry.value)
    if len(value) > _WIDEST_VALUE:
        value = f"{value[:_WIDEST_VALUE]}..."
    reason = "as above" if entry.reason and repeated else entry.reason
    treatment = f"{entry.treatment}: {reason}" if reason else entry.treatment
    return f"  {entry.path[-1]}", value, entry.source, treatment


@config.command()
@click.option("--stage", type=click.IntRange(0, 3), default=2, show_default=True)
@click.option(
    "--offload",
    type=click.Choice(["none", "cpu", "nvme"]),
    default="none",
    show_default=True,
    help="Where optimizer state, and at stage 3 parameters, are moved to.",
)
@click.option(
    "--precision",
    type=click.Choice(["bf16", "fp16", "fp32"]),
    default="bf16",
    show_default=True,
)
@click.option(
    "--nvme-path",
    "--nvme_path",
    default="/local_nvme",
    show_default=True,
    metavar="FOLDER",
    help="The folder on the drive for `--offload nvme`.",
)
@click.option("--plain", is_flag=True, help="Leave out comments, for tools that read strict JSON.")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write FILE instead of the terminal.",
)
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
def template(
    output: Path | None,
    *,
    force: bool,
    plain: bool,
    **choice: Any,
) -> None:
    """Write a good configuration to start from, with a comment on every choice."""
    from zeroshard.config.template import Choice, render  # noqa: PLC0415 - as above

    text = render(Choice(**choice), comments=not plain)
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        with output.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(
            compose(f"{output} exists already.", hint="add --force to replace it.")
        ) from None
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {error.strerror}.") from None
