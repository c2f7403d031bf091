from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

from zeroshard.host.pages import PAGE_BYTES, Pages

NUMA_MAPS = Path("/proc/self/numa_maps")
SMAPS = Path("/proc/self/smaps")

on_linux = pytest.mark.skipif(not SMAPS.exists(), reason="tells of pages as Linux does")


def flags(address: int) -> list[str]:
    """What the kernel has noted about the mapping that begins at an address."""
    _, _, found = SMAPS.read_text().partition(f"\n{address:x}-")
    line = re.search(r"^VmFlags: (.*)$", found, re.MULTILINE)
    assert line is not None
    return line[1].split()


def test_pages_are_zero_after_they_were_cleared_and_what_is_beside_them_stays() -> None:
    pages = Pages(5 * PAGE_BYTES - 1)
    assert pages.nbytes == 5 * PAGE_BYTES
    for start, stop in ((10, 20), (10, 3 * PAGE_BYTES + 5), (PAGE_BYTES, 2 * PAGE_BYTES)):
        ctypes.memset(pages.address, 7, pages.nbytes)
        pages.clear(start, stop)
        kept = ctypes.string_at(pages.address, pages.nbytes)
        assert kept == b"\7" * start + bytes(stop - start) + b"\7" * (pages.nbytes - stop)


@on_linux
def test_memory_is_there_when_it_was_touched_and_gone_when_it_was_cleared() -> None:
    pages = Pages(64 * PAGE_BYTES)
    ctypes.memset(pages.address, 7, 1)
    pages.touch(0, 32 * PAGE_BYTES)
    there = pages.resident_bytes(0, pages.nbytes)
    if there < 32 * PAGE_BYTES:
        pytest.skip("this kernel does not touch pages by itself")
    assert ctypes.string_at(pages.address, 2) == b"\7\0"
    pages.clear(0, pages.nbytes)
    assert pages.resident_bytes(0, pages.nbytes) == 0


@on_linux
def test_the_kernel_is_asked_for_huge_pages_and_to_keep_memory_from_children() -> None:
    pages = Pages(64 * PAGE_BYTES)
    pages.keep_from_children(True)  # so that it is not merged with its neighbours
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    assert ("hg" in flags(pages.address)) == huge.exists()
    assert "dc" in flags(pages.address)
    pages.keep_from_children(False)
    assert "dc" not in flags(pages.address)


@pytest.mark.skipif(not NUMA_MAPS.exists(), reason="this kernel knows no NUMA")
def test_memory_is_wished_to_be_of_a_node() -> None:
    pages = Pages(64 * PAGE_BYTES, node=0)
    policy = re.search(rf"^{pages.address:x} (\S+)", NUMA_MAPS.read_text(), re.MULTILINE)
    if policy is None:
        pytest.skip("this container does not let memory be placed")
    assert policy[1] in {"prefer:0", "prefer=relative:0"}


def test_a_node_that_is_not_there_is_no_failure() -> None:
    assert Pages(PAGE_BYTES, node=70).nbytes == PAGE_BYTES
