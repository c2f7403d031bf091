"""What one call measures, as a value that the processes of the job read from a file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from side_by_side.workload import Variant, Workload

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """Engines to measure on the ranks of one job, and where ranks report to.

    ``limit_s`` is how long one engine may take, ``profile`` names variants of which a step is
    profiled, and ``report`` is a folder.
    """

    workload: Workload
    variants: tuple[Variant, ...]
    report: Path
    traces: Path
    profile: tuple[str, ...] = ()
    limit_s: float = 300.0

    def write(self, path: Path) -> None:
        """Write the plan to a file."""
        content = {
            "workload": self.workload.as_dict(),
            "variants": [variant.label for variant in self.variants],
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
            Workload(**content["workload"]),
            tuple(Variant.parse(label) for label in content["variants"]),
            Path(content["report"]),
            Path(content["traces"]),
            tuple(content["profile"]),
            content["limit_s"],
        )
