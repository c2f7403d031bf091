"""The command `zeroshard env`: what to look at, and what to send along, when something is wrong."""

from __future__ import annotations

import dataclasses
import json

import click

from zeroshard.launch.report import Report, collect

__all__ = ["env"]


@click.command(short_help="Show versions, devices, limits and optional features.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON, for programs and bug reports.")
def env(*, as_json: bool) -> None:
    """Show what this machine offers to a training job, and what each optional feature needs."""
    report = collect()
    click.echo(json.dumps(dataclasses.asdict(report), indent=2) if as_json else _text(report))


def _text(report: Report) -> str:
    blocks: list[str] = []
    for title, facts in report.sections.items():
        rows = list(facts.items()) or [("", "nothing set")]
        blocks.append(_block(title, [list(row) for row in rows]))
    features = [["feature", "needs", "there?", "found"]]
    for feature in report.features:
        answer = "yes" if feature.is_there else "no"
        features.append([feature.name, feature.needs, answer, feature.found])
    blocks.append(_block("optional features", features))
    return "\n\n".join(blocks)


def _block(title: str, rows: list[list[str]]) -> str:
    """Return rows in columns under a title, which is bold on a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([click.style(title, bold=True), *lines])
