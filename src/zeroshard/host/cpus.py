"""Which CPUs this process may use, which are on one NUMA node, and on which node a GPU hangs."""

from __future__ import annotations

import contextlib
import math
import os
import re
from pathlib import Path

import psutil

from zeroshard.errors import UsageError, compose
from zeroshard.host import cgroup

__all__ = ["allowed_cpus", "num_usable_cpus", "numa_node", "parse_list", "read_list"]


def parse_list(text: str) -> frozenset[int]:
    """Read a list of CPUs, such as ``0-25,27``.

    Raises:
        UsageError: an item is neither a number nor a range.
    """
    cpus: set[int] = set()
    for item in text.split(","):
        bounds = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", item)  # no host has a million
        first, last = (int(bounds[1]), int(bounds[2] or bounds[1])) if bounds else (1, 0)
        if first > last:
            raise UsageError(
                compose(
                    f"{item!r} in the list of CPU cores {text!r} is not a number or a range.",
                    hint='write a list such as "0-25,27".',
                )
            )
        cpus.update(range(first, last + 1))
    return frozenset(cpus)


def read_list(path: Path) -> frozenset[int]:
    """Read a file that holds a list of CPUs; it has none if it cannot be read."""
    # A node may have memory but no CPU: its list is empty.
    with contextlib.suppress(OSError, UsageError):
        return parse_list(path.read_text())
    return frozenset()


def allowed_cpus() -> frozenset[int]:
    """Return the CPUs this process may run on, which are fewer than the host's under Slurm."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(psutil.cpu_count() or 1))


def num_usable_cpus() -> int:
    """Count the CPUs whose time this process may use; a container may limit it below the host's."""
    limit = cgroup.of_this_process().cpu_limit()
    allowed = len(allowed_cpus())
    return allowed if limit is None else max(1, min(allowed, math.ceil(limit)))


def numa_node(bus: str, root: Path = Path("/sys/bus/pci/devices")) -> int | None:
    """Return the NUMA node of a PCI device such as ``00000000:3B:00.0``, None if unknown."""
    domain, _, rest = bus.lower().partition(":")
    with contextlib.suppress(OSError, ValueError):
        node = int((root / f"{domain[-4:]}:{rest}" / "numa_node").read_text())
        return node if node >= 0 else None
    return None
