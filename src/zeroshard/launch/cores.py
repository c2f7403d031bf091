"""Which CPU cores each rank of this host is bound to.

The arithmetic is :func:`assign`, over a described host; :func:`read_cores` describes this one.
A core is given whole, with all its hardware threads, since two ranks on one core would share its
arithmetic units.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from zeroshard.errors import UsageError, compose
from zeroshard.host.cpus import read_list

__all__ = ["Core", "assign", "read_cores"]


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


def read_cores(allowed: Collection[int], root: Path = Path("/sys/devices/system")) -> list[Core]:
    """Describe the cores of this host, as far as they are allowed.

    A host that does not describe itself has one NUMA node and cores of one hardware thread.
    """
    node_of = {
        cpu: int(folder.name.removeprefix("node"))
        for folder in root.glob("node/node[0-9]*")
        for cpu in read_list(folder / "cpulist")
    }
    cores: set[Core] = set()
    for cpu in allowed:
        threads = read_list(root / f"cpu/cpu{cpu}/topology/thread_siblings_list") | {cpu}
        cores.add(Core(tuple(sorted(threads & set(allowed))), node_of.get(cpu, 0)))
    return sorted(cores, key=lambda core: core.cpus)
