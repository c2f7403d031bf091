"""What the control group of this process tells: memory limits, CPU limits, and deaths.

When the kernel kills a process for lack of memory, the process cannot say so; its group's counters
can. Both versions of the interface are read, through one value that tests can point elsewhere.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Cgroup", "of_this_process"]


@dataclass(frozen=True)
class Cgroup:
    """The folders of a process's memory and CPU controllers; None where there is no such folder."""

    memory: Path | None
    cpu: Path | None
    root: Path = Path("/sys/fs/cgroup")
    host: Path = Path("/proc/vmstat")

    def oom_kills(self) -> int | None:
        """Count the processes that the out-of-memory killer has ended here; None if unknown.

        Outside of any group, here means on this host.
        """
        group = self.memory or Path()
        for file in (group / "memory.events", group / "memory.oom_control", self.host):
            text = _read(file)
            if text is not None and (line := re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)):
                return int(line[1])
        return None

    def memory_limit_bytes(self) -> int | None:
        """Return the smallest memory limit of this group and the groups around it."""
        limits = [_memory_limit(folder) for folder in self._upwards(self.memory)]
        return min((limit for limit in limits if limit is not None), default=None)

    def memory_free_bytes(self) -> int | None:
        """Return how much more this group may take before one around it reaches its limit.

        Pages of files count as free, since the kernel drops them first. None where nothing is
        limited, or where what is used is not told.
        """
        free: list[int] = []
        for folder in self._upwards(self.memory):
            limit = _memory_limit(folder)
            used = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")
            if limit is None or used is None:
                continue
            # Version 1 counts the groups inside of this one only under names of their own.
            text = _read(folder / "memory.stat") or ""
            prefix = "total_" if "\ntotal_" in text else ""
            files = re.findall(rf"^{prefix}(?:in)?active_file (\d+)$", text, re.MULTILINE)
            free.append(max(0, limit - int(used) + sum(map(int, files))))
        return min(free, default=None)

    def cpu_limit(self) -> float | None:
        """Return how many CPUs' time the processes here may use at once."""
        limits: list[float] = []
        for folder in self._upwards(self.cpu):
            text = _read(folder / "cpu.max")
            quota, period = text.split() if text else ("max", "1")
            if text is None:
                quota = _read(folder / "cpu.cfs_quota_us") or "-1"
                period = _read(folder / "cpu.cfs_period_us") or "1"
            if quota.isdigit():
                limits.append(int(quota) / int(period))
        return min(limits, default=None)

    def _upwards(self, folder: Path | None) -> list[Path]:
        if folder is None:
            return []
        return [part for part in (folder, *folder.parents) if part.is_relative_to(self.root)]


def of_this_process(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Cgroup:
    """Find the groups of this process in both versions of the interface."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return Cgroup(None, None, root)
    paths: dict[str, str] = {}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))

    def find(controller: str) -> Path | None:
        # Version 2 has one tree for all controllers, listed without a name.
        for base, name in ((root / controller, controller), (root, "")):
            if name not in paths:
                continue
            inside = base / paths[name].lstrip("/")
            # A container sees its own group as the root, but may be told its path outside.
            for folder in (inside, base):
                if any((folder / file).is_file() for file in _FILES[controller]):
                    return folder
        return None

    return Cgroup(find("memory"), find("cpu"), root)


_FILES = {
    "memory": ("memory.events", "memory.oom_control"),
    "cpu": ("cpu.max", "cpu.cfs_quota_us"),
}


def _memory_limit(folder: Path) -> int | None:
    text = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
    # Version 1 writes "no limit" as the largest number of pages.
    if text is not None and text.isdigit() and int(text) < 1 << 60:
        return int(text)
    return None


def _read(path: Path) -> str | None:
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return None
