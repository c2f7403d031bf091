"""Which CPU cores each rank of this host is bound to.

The arithmetic is :func:`assign`, over a described host; :func:`read_cores` describes this one.
A core is given whole, with all its hardware threads, since two ranks on one core would share its
arithmetic units.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from zeroshard.errors import UsageError, compose
from zeroshard.launch import cgroup

__all__ = ["Core", "allowed_cpus", "assign", "num_usable_cpus", "parse_list", "read_cores"]


@dataclass(frozen=True)
class Core:
    """One core: its hardware threads as the kernel numbers CPUs, and its NUMA node."""

    cpus: tuple[int, ...]
    node: int


def assign(cores: Sequence[Core], near: Sequence[int | None]) -> list[tuple[Core, ...]]:
    """Give every rank the same number of cores, as many as leave each rank on one NUMA node.

    Args:
        cores: the cores to divide.
        near: one entry per rank: the NUMA node of its GPU, or None where any will do.

    Raises:
        UsageError: there are fewer cores than ranks.
    """
    if len(cores) < len(near):
        raise UsageError(
            compose(
                f"{len(near)} ranks cannot be bound to {len(cores)} CPU cores.",
                hint="start fewer ranks, allow more cores, or drop --bind_cores_to_rank.",
            )
        )
    by_node: dict[int, list[Core]] = {}
    for core in sorted(cores, key=lambda core: core.cpus):
        by_node.setdefault(core.node, []).append(core)
    sizes = {node: len(of_node) for node, of_node in sorted(by_node.items())}
    wishes = [node if node in sizes else None for node in near]
    nodes = _place(sizes, wishes) or _place(sizes, [None] * len(near)) or []
    share = min(sizes[node] // count for node, count in Counter(nodes).items())
    return [tuple(by_node[node].pop(0) for _ in range(share)) for node in nodes]


def _place(sizes: dict[int, int], wishes: Sequence[int | None]) -> list[int] | None:
    """Return a node per rank that lets the ranks be as large as they can; None if none does."""
    for share in range(sum(sizes.values()) // len(wishes), 0, -1):
        free = {node: size // share for node, size in sizes.items()}
        for node in wishes:
            if node is not None:
                free[node] -= 1
        open_ranks = sum(node is None for node in wishes)
        if min(free.values()) < 0 or sum(free.values()) < open_ranks:
            continue
        anywhere = iter([node for node, places in free.items() for _ in range(places)])
        return [next(anywhere) if node is None else node for node in wishes]
    return None


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


def read_cores(allowed: Collection[int], root: Path = Path("/sys/devices/system")) -> list[Core]:
    """Describe the cores of this host, as far as they are allowed.

    A host that does not describe itself has one NUMA node and cores of one hardware thread.
    """
    node_of = {
        cpu: int(folder.name.removeprefix("node"))
        for folder in root.glob("node/node[0-9]*")
        for cpu in _cpus_in(folder / "cpulist")
    }
    cores: set[Core] = set()
    for cpu in allowed:
        threads = _cpus_in(root / f"cpu/cpu{cpu}/topology/thread_siblings_list") | {cpu}
        cores.add(Core(tuple(sorted(threads & set(allowed))), node_of.get(cpu, 0)))
    return sorted(cores, key=lambda core: core.cpus)


def _cpus_in(path: Path) -> frozenset[int]:
    # A node may have memory but no CPU: its list is empty.
    with contextlib.suppress(OSError, UsageError):
        return parse_list(path.read_text())
    return frozenset()
