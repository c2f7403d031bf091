"""Results as JSON lines: one object per engine and run, with all that is needed to read it later.

Every benchmark writes the same envelope. ``status`` is ``ok`` or says in a few words why there is
no ``result``; ``detail`` then has the message. What ``workload`` and ``result`` hold depends on the
benchmark, but seconds of a step are always ``result["median_s"]``.

torch is not imported here: it takes seconds, and what starts the ranks does not need it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

__all__ = ["OK", "Origin", "add_out", "origin", "read", "record", "times", "write"]

OK = "ok"
ROOT = Path(__file__).resolve().parent.parent.parent
OUT = ROOT / "benchmarks" / "out"
_PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "deepspeed", "zeroshard")


@dataclass(frozen=True)
class Origin:
    """Where, when and from which code the records of a run come."""

    run: str  # the same for all records of one call
    date: str  # UTC, to the minute
    commit: str | None
    modified: bool  # whether files differed from that commit
    hardware: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)


def origin(commit: str | None = None) -> Origin:
    """Describe this machine and this checkout.

    ``commit`` is for a copy without its history, and says that nothing is changed there.
    """
    status = ("status", "--porcelain", "--untracked-files=no")
    found = commit or _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changes = "" if commit else _output("git", "-C", str(ROOT), *status)
    now = datetime.now(timezone.utc)
    return Origin(
        uuid.uuid4().hex[:12],
        now.strftime("%Y-%m-%d %H:%M"),
        (found or "")[:12] or None,
        bool(changes),
        _hardware(),
        {"python": platform.python_version(), **_versions()},
    )


def times(own: Sequence[float], peer: Sequence[float]) -> dict[str, float]:
    """Return the figures of steps that took turns with those of a peer, of so many seconds each."""
    ratios = [a / b for a, b in zip(own, peer, strict=True)]
    return {
        "median_s": round(statistics.median(own), 6),
        "min_s": round(min(own), 6),
        "max_s": round(max(own), 6),
        "time_ratio": round(statistics.median(ratios), 4),
    }


def record(
    source: Origin,
    benchmark: str,
    ranks: int,
    workload: Mapping[str, Any],
    engine: str,
    result: Mapping[str, Any] | None,
    *,
    status: str = OK,
    detail: str = "",
    **more: Any,
) -> dict[str, Any]:
    """Return one line's object."""
    return {
        "benchmark": benchmark,
        "engine": engine,
        "status": status,
        **({"detail": detail} if detail else {}),
        **more,
        "ranks": ranks,
        "workload": dict(workload),
        "result": None if result is None else dict(result),
        **asdict(source),
    }


def add_out(parser: argparse.ArgumentParser) -> None:
    """Declare the options that every benchmark has."""
    text = "folder of what is written: JSON lines, plots, traces"
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=text)
    text = "of this code, where it is a copy without its history"
    parser.add_argument("--commit", metavar="HASH", help=text)


def write(folder: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Add lines to the files of a folder, one file for each benchmark."""
    folder.mkdir(parents=True, exist_ok=True)
    for each in records:
        with (folder / f"{each['benchmark']}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(each) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """Return all records of a folder's files, in the order of their dates.

    Lines of programs with a form of their own, which lack an envelope, are left out.
    """
    lines = [
        json.loads(line)
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]
    return sorted((each for each in lines if "run" in each), key=lambda each: each["date"])


def _hardware() -> dict[str, Any]:
    query = ("--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    rows = (_output("nvidia-smi", *query) or "").splitlines()
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    host = {"cpu": _cpu_name(), "cpus": cpus}
    if not rows or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return {"device": "CPU", **host}
    name, driver, memory = (part.strip() for part in rows[0].split(","))
    return {"device": name, "gpus": len(rows), "memory": memory, "driver": driver, **host}


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "+zeroshard" in found.get("deepspeed", ""):
        del found["deepspeed"]  # our stand-in, which no engine is measured with
    return found


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
