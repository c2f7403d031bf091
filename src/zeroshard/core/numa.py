"""Which CPUs are near a GPU: the memory that they touch first lies beside it.

Linux puts a page on the NUMA node of the CPU that touches it first. A GPU reads the memory of
another node over the link between sockets, which all GPUs of the host share.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zeroshard.host.cpus import allowed_cpus, numa_node, read_list

__all__ = ["Near", "bind", "bound", "near"]


@dataclass(frozen=True)
class Near:
    """The CPUs near a device, of those that the calling thread may run on, and their NUMA node.

    All of these, and no node, where the host does not tell, where the device is no GPU, and where
    a launcher or a job left no CPU that is near.
    """

    cpus: frozenset[int]
    node: int | None = None


def near(device: torch.device, *, bus: str | None = None, sysfs: Path = Path("/sys")) -> Near:
    """Find out what is near a device.

    Args:
        device: the device.
        bus: its PCI address; CUDA is asked unless given.
        sysfs: where the kernel describes the host.
    """
    allowed = allowed_cpus()
    if device.type == "cuda" and (bus := bus or _bus(device)) is not None:
        node = numa_node(bus, sysfs / "bus/pci/devices")
        cpus = allowed & read_list(sysfs / f"devices/system/node/node{node}/cpulist")
        if cpus:
            return Near(cpus, node)
    return Near(allowed)


def bind(cpus: frozenset[int]) -> None:
    """Let the calling thread, and threads that it starts, run on none of its CPUs but those named.

    It keeps those it has where none of them is named, and where the host does not let them be
    chosen. Fit to be the initializer of a pool of threads.
    """
    if hasattr(os, "sched_setaffinity"):
        before = os.sched_getaffinity(0)  # 0 is the calling thread, not the process
        if 0 < len(before & cpus) < len(before):
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, before & cpus)


@contextlib.contextmanager
def bound(cpus: frozenset[int]) -> Iterator[None]:
    """Bind the calling thread as :func:`bind` does while inside.

    Threads that libraries start inside for good, such as those of OpenMP, stay bound.
    """
    before = allowed_cpus()
    bind(cpus)
    try:
        yield
    finally:
        if allowed_cpus() != before:
            os.sched_setaffinity(0, before)


def _bus(device: torch.device) -> str | None:
    """The PCI address of a GPU by the driver, which all versions of torch bring along."""
    index: Any = device.index  # torch says int, but it may be None
    if index is None:
        index = torch.cuda.current_device()
    handle, text = ctypes.c_int(), ctypes.create_string_buffer(32)
    with contextlib.suppress(OSError, AttributeError):
        driver = ctypes.CDLL("libcuda.so.1")
        if (
            driver.cuInit(0) == 0
            and driver.cuDeviceGet(ctypes.byref(handle), index) == 0
            and driver.cuDeviceGetPCIBusId(text, len(text), handle) == 0
        ):
            return text.value.decode()
    return None
