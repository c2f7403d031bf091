"""How much memory of the host is left for this process."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from zeroshard.host import cgroup
from zeroshard.host.cgroup import Cgroup

__all__ = ["bytes_free", "in_words"]


def bytes_free(meminfo: Path = Path("/proc/meminfo"), group: Cgroup | None = None) -> int | None:
    """Return how many bytes can be taken before the kernel ends a process; None if unknown.

    The smaller of what the host has available and what the control groups around this process,
    such as a container or a job, leave to it. Swap counts as nothing.

    Args:
        meminfo: what the kernel tells about the host.
        group: the control group; this process's own unless given.
    """
    known: list[int | None] = [(group or cgroup.of_this_process()).memory_free_bytes()]
    with contextlib.suppress(OSError):
        if line := re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo.read_text(), re.MULTILINE):
            known.append(int(line[1]) << 10)
    return min((free for free in known if free is not None), default=None)


def in_words(nbytes: int) -> str:
    """A number of bytes for people."""
    for shift, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if nbytes >= 1 << shift:
            return f"{nbytes / (1 << shift):.1f} {name}"
    return f"{nbytes} bytes"
