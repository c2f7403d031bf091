"""Starts the ranks of a job, again after a failure, and collects what they report.

Does not import torch: the ranks do that.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from side_by_side.plan import HANDED_OVER, Entry, Plan

__all__ = ["Report", "run"]

_ROOT = Path(__file__).resolve().parent.parent
_PAUSE_S = 0.2  # between two looks at what has been reported
# NVLink multicast stays off: nothing here is measured with it.
_SAFE = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}


@dataclass(frozen=True)
class Report:
    """What the ranks said about one engine."""

    entry: Entry
    status: str
    detail: str
    result: Mapping[str, Any] | None


class Job(Protocol):
    """Ranks that run; `subprocess.Popen` is one."""

    def poll(self) -> int | None:
        """The exit status once they have ended."""
        ...

    def terminate(self) -> None:
        """End them."""
        ...


Start = Callable[[Path, int], Job]


def run(plan: Plan, ranks: int, *, isolate: bool, start: Start | None = None) -> Iterator[Report]:
    """Measure the engines of a plan on so many ranks; each is yielded as soon as it is known.

    An engine that fails ends the job it ran in, and the rest continues in a new one; ``isolate``
    gives each engine a job from the start.
    """
    waiting = list(plan.entries)
    while waiting:
        job = waiting[:1] if isolate else waiting
        for report in _run_job(replace(plan, entries=tuple(job)), ranks, start or _start):
            yield report
            waiting = waiting[1:]


def _run_job(plan: Plan, ranks: int, start: Start) -> Iterator[Report]:
    """The reports of one job, at least one."""
    reports: list[Report] = []
    with tempfile.TemporaryDirectory(prefix="side-by-side-") as name:
        folder = Path(name)
        replace(plan, report=folder).write(folder / "plan.json")
        job = start(folder / "plan.json", ranks)
        try:
            while True:
                status = job.poll()  # before reading, so that nothing is missed
                new = _read(folder, plan.entries)[len(reports) :]
                reports += new
                yield from new
                if status is not None:
                    break
                time.sleep(_PAUSE_S)
        finally:
            if job.poll() is None:
                job.terminate()
        is_over = len(reports) == len(plan.entries) or (folder / HANDED_OVER).exists()
        if not is_over and (not reports or reports[-1].result is not None):
            yield _unreported(folder, plan.entries[len(reports)], status)


def _start(plan: Path, ranks: int) -> Job:
    command = [sys.executable, "-m", "zeroshard", "--quiet", "--num_gpus", str(ranks)]
    script = [str(_ROOT / "train_step.py"), "--plan", str(plan)]
    return subprocess.Popen([*command, *script], env=os.environ | _SAFE)


def _read(folder: Path, job: Sequence[Entry]) -> list[Report]:
    """What rank 0 wrote about the engines, in their order."""
    path = folder / "report.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
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
