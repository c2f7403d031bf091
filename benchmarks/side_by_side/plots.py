"""A run as a picture: tokens per second and peak memory of each engine, for screen and paper."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from side_by_side.claims import CLAIMS
from side_by_side.records import OK
from side_by_side.workload import Variant, Workload

__all__ = ["draw"]

Record = Mapping[str, Any]

# Of different lightness, so that they also differ in print; after Okabe and Ito.
_COLOURS = {
    "zeroshard": "#0072B2",
    "fsdp2": "#E69F00",
    "fsdp2-root-kept": "#E69F00",
    "fsdp2-kept": "#E69F00",
    "deepspeed": "#009E73",
    "plain": "#B0B0B0",
    "plain-master": "#B0B0B0",
}
_GREY = "#555555"


def draw(records: Sequence[Record], folder: Path) -> Path | None:
    """Draw a run into a PNG and return its path, or None where there is nothing to draw with."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed (pip install matplotlib)")
        return None
    if not any(each["status"] == OK for each in records):
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - optional
    from matplotlib.figure import Figure  # noqa: PLC0415

    rows = list(reversed(records))  # bars are drawn from the bottom
    figure = Figure(figsize=(10.5, 1.9 + 0.52 * len(rows)), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    speed, memory = figure.subplots(1, 2, sharey=True)
    _speed(speed, rows, records)
    _memory(memory, rows)
    speed.set_yticks(range(len(rows)), [_name(each, records) for each in rows])
    figure.suptitle(_title(records), fontsize=11, x=0.01, ha="left")
    folder.mkdir(parents=True, exist_ok=True)
    name = records[0].get("claim") or records[0]["workload"]["model"]
    path = folder / f"train_step-{name}-{records[0]['run']}.png"
    figure.savefig(path)
    print(path)
    return path


def _speed(axes: Any, rows: Sequence[Record], records: Sequence[Record]) -> None:
    fine = [each["result"] for each in records if each["status"] == OK]
    first = fine[0]["tokens_per_s_per_rank"]
    most = max(each["tokens_per_s_per_rank"] * each["median_s"] / each["min_s"] for each in fine)
    for at, each in enumerate(rows):
        if each["status"] != OK:
            axes.text(0.01 * most, at, each["status"], va="center", color=_GREY, fontsize=8.5)
            continue
        result = each["result"]
        value = result["tokens_per_s_per_rank"]
        tokens = value * result["median_s"]
        slow, fast = tokens / result["max_s"], tokens / result["min_s"]
        spread = [[max(value - slow, 0)], [max(fast - value, 0)]]
        axes.barh(at, value, 0.62, color=_colour(each), edgecolor="black", linewidth=0.6)
        axes.errorbar(value, at, xerr=spread, color="black", capsize=2.5, linewidth=0.8)
        ratio = "" if value == first else f"   x {value / first:.3f}"
        axes.text(max(fast, value) + 0.02 * most, at, f"{value:,.0f}{ratio}", va="center", size=9)
    axes.set_xlim(0, 1.42 * most)
    base = next(each["engine"] for each in records if each["status"] == OK)
    axes.set_xlabel(
        f"tokens/s/{_unit(rows)}, median of the steps\n"
        f"line: slowest to fastest step; x: over {base}"
    )
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(-0.6, len(rows) - 0.4)
    _plain(axes)


def _memory(axes: Any, rows: Sequence[Record]) -> None:
    fine = [each["result"] for each in rows if each["status"] == OK]
    reserved = [each["reserved_gib"] for each in fine if each["reserved_gib"] is not None]
    axes.set_xlabel("peak memory per GPU, GiB\nfilled: allocated; with hatched: reserved; x: ratio")
    _plain(axes)
    if not reserved:
        axes.text(0.5, 0.5, "no GPU", transform=axes.transAxes, ha="center", color=_GREY)
        axes.set_xticks([])
        return
    for at, each in enumerate(rows):
        if each["status"] != OK:
            continue
        result = each["result"]
        used, kept = result["allocated_gib"], result["reserved_gib"]
        style = {"edgecolor": "black", "linewidth": 0.6}
        axes.barh(at, used, 0.62, color=_colour(each), **style)
        axes.barh(at, kept - used, 0.62, left=used, color="white", hatch="////", **style)
        text = f"{used:.1f} / {kept:.1f}   x {kept / used:.2f}"
        axes.text(kept + 0.02 * max(reserved), at, text, va="center", size=9)
    axes.set_xlim(0, 1.6 * max(reserved))


def _plain(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def _colour(one: Record) -> str:
    return _COLOURS[Variant.parse(one["engine"]).family]


def _unit(rows: Sequence[Record]) -> str:
    return "rank" if rows[0]["hardware"]["device"] == "CPU" else "GPU"


def _name(one: Record, records: Sequence[Record]) -> str:
    engine, *settings = one["engine"].split(":")
    several = len({each["ranks"] for each in records}) > 1
    lines = [f"{engine}, {one['ranks']} ranks" if several else engine, *settings]
    return "\n".join(line for text in lines for line in textwrap.wrap(text, 34))


def _title(records: Sequence[Record]) -> str:
    first = records[0]
    claim = CLAIMS.get(first.get("claim") or "")
    ranks = " and ".join(str(n) for n in sorted({each["ranks"] for each in records}))
    where = f"{ranks} x {first['hardware']['device']}, torch {first['versions'].get('torch', '?')}"
    about = [Workload(**first["workload"]).describe(), f"{where}, {first['date'].split()[0]}"]
    return "\n".join([*([claim.title[0].upper() + claim.title[1:]] if claim else []), *about])
