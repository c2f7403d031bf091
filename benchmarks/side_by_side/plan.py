"""What the ranks of a job measure, as a value that they read from a file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from side_by_side.workload import Variant, Workload

__all__ = ["HANDED_OVER", "Entry", "Plan"]

HANDED_OVER = "handed-over"  # a file beside the report: new ranks are to measure what remains


@dataclass(frozen=True)
class Entry:
    """An engine to measure, the workload of all engines it is compared with, and for which claim.

    Where the engine differs from that workload, its own is :attr:`own_workload`.
    """

    workload: Workload
    variant: Variant
    claim: str | None = None

    @property
    def own_workload(self) -> Workload:
        """What this engine computes."""
        return self.variant.workload(self.workload)


@dataclass(frozen=True)
class Plan:
    """What is measured in one job, and where its ranks report to.

    ``limit_s`` is how long one engine may take, ``profile`` names variants of which a step is
    profiled, ``report`` and ``traces`` are folders.
    """

    entries: tuple[Entry, ...]
    report: Path
    traces: Path
    profile: tuple[str, ...] = ()
    limit_s: float = 300.0

    def write(self, path: Path) -> None:
        """Write the plan to a file."""
        content = {
            "entries": [
                [entry.workload.as_dict(), entry.variant.label, entry.claim]
                for entry in self.entries
            ],
            "report": str(self.report),
            "traces": str(self.traces),
            "profile": self.profile,
            "limit_s": self.limit_s,
        }
        path.write_text(json.dumps(content), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read what :meth:`write` wrote."""
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            tuple(
                Entry(Workload(**workload), Variant.parse(label), claim)
                for workload, label, claim in content["entries"]
            ),
            Path(content["report"]),
            Path(content["traces"]),
            tuple(content["profile"]),
            content["limit_s"],
        )
