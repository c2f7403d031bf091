"""Starts the ranks of a job, again after a failure, and collects what they report.

Does not import torch: the ranks do that.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from side_by_side.plan import Entry, Plan

__all__ = ["Report", "run"]

_ROOT = Path(__file__).resolve().parent.parent
# NVLink multicast stays off: nothing here is measured with it.
_SAFE = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}


@dataclass(frozen=True)
class Report:
    """What the ranks said about one engine."""

    entry: Entry
    status: str
    detail: str
    result: Mapping[str, Any] | None


Start = Callable[[Path, int], int]


def run(plan: Plan, ranks: int, *, isolate: bool, start: Start | None = None) -> Iterator[Report]:
    """Measure the engines of a plan on so many ranks, each as soon as it is known.

    An engine that fails ends the job it ran in, and the rest continues in a new one; ``isolate``
    gives each engine a job from the start.
    """
    start = start or _start
    waiting = list(plan.entries)
    while waiting:
        job = waiting[:1] if isolate else waiting
        with tempfile.TemporaryDirectory(prefix="side-by-side-") as folder:
            path = Path(folder) / "plan.json"
            replace(plan, entries=tuple(job), report=Path(folder)).write(path)
            status = start(path, ranks)
            reports = _read(Path(folder), job)
            if len(reports) < len(job) and (not reports or reports[-1].result is not None):
                reports.append(_unreported(Path(folder), job[len(reports)], status))
        yield from reports
        waiting = waiting[len(reports) :]


def _start(plan: Path, ranks: int) -> int:
    command = [sys.executable, "-m", "zeroshard", "--quiet", "--num_gpus", str(ranks)]
    script = [str(_ROOT / "train_step.py"), "--plan", str(plan)]
    return subprocess.run([*command, *script], env=os.environ | _SAFE, check=False).returncode


def _read(folder: Path, job: Sequence[Entry]) -> list[Report]:
    """What rank 0 wrote about the engines, in their order."""
    path = folder / "report.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines]
    return [
        Report(entry, each["status"], each.get("detail", ""), each["result"])
        for entry, each in zip(job, found, strict=False)
    ]


def _unreported(folder: Path, entry: Entry, status: int) -> Report:
    """About an engine in which the job ended: what a rank left behind, or that none did."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("failure-*.json")]
    if found:
        first = min(found, key=lambda each: each["at"])
        return Report(entry, first["status"], first["detail"], None)
    return Report(entry, "failed", f"the ranks ended with status {status} or hung", None)
