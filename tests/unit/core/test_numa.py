"""Which CPUs are near a GPU, and how a thread is bound to them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

import pytest
import torch

from zeroshard.core import numa
from zeroshard.core.numa import Near, bind, bound, near

GPU = torch.device("cuda", 1)
BUS = "0000:3b:00.0"

needs_two_cpus = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="a thread cannot be bound to some of its CPUs",
)


def host(folder: Path, node: str, cpulist: str) -> Path:
    (folder / f"bus/pci/devices/{BUS}").mkdir(parents=True)
    (folder / f"bus/pci/devices/{BUS}/numa_node").write_text(node + "\n")
    (folder / "devices/system/node/node1").mkdir(parents=True)
    (folder / "devices/system/node/node1/cpulist").write_text(cpulist + "\n")
    return folder


@pytest.mark.parametrize(
    ("node", "cpulist", "allowed", "found"),
    [
        ("1", "4-6,8", range(10), ({4, 5, 6, 8}, 1)),
        ("1", "4-6,8", {0, 1, 6, 7}, ({6}, 1)),  # a job has less than the node
        ("1", "4-6,8", {0, 1}, ({0, 1}, None)),  # a launcher bound the rank elsewhere
        ("-1", "4-6,8", range(10), (range(10), None)),  # what a host says that has one node
        ("0", "4-6,8", range(10), (range(10), None)),  # a node that is not described
        ("1", "", range(10), (range(10), None)),  # a node of memory alone
    ],
)
def test_the_cpus_near_a_gpu_are_those_of_its_node_that_the_process_may_use(
    node: str,
    cpulist: str,
    allowed: Iterable[int],
    found: tuple[Iterable[int], int | None],
    tmp_path: Path,
) -> None:
    sysfs = host(tmp_path, node, cpulist)
    with mock.patch.object(numa, "allowed_cpus", lambda: frozenset(allowed)):
        assert near(GPU, bus=BUS, sysfs=sysfs) == Near(frozenset(found[0]), found[1])
        assert near(torch.device("cpu"), bus=BUS, sysfs=sysfs) == Near(frozenset(allowed))


def test_without_a_driver_to_ask_all_cpus_are_as_near() -> None:
    with mock.patch("ctypes.CDLL", side_effect=OSError("no such library")):
        assert near(GPU) == Near(numa.allowed_cpus())


@needs_two_cpus
def test_a_thread_is_bound_inside_and_has_its_cpus_back_afterwards() -> None:
    before = os.sched_getaffinity(0)
    one = min(before)
    with bound(frozenset({one, 1 << 12})):
        assert os.sched_getaffinity(0) == {one}
        with bound(frozenset(before)):  # never widened
            assert os.sched_getaffinity(0) == {one}
        with bound(frozenset({1 << 12})):  # never left without any
            assert os.sched_getaffinity(0) == {one}
    assert os.sched_getaffinity(0) == before


@needs_two_cpus
def test_binding_is_of_the_calling_thread_alone() -> None:
    before = os.sched_getaffinity(0)
    one = min(before)
    seen: list[set[int]] = []

    def work() -> None:
        bind(frozenset({one}))
        seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [{one}]
    assert os.sched_getaffinity(0) == before


@needs_two_cpus
def test_where_the_host_does_not_let_cpus_be_chosen_a_thread_keeps_its_own() -> None:
    before = os.sched_getaffinity(0)
    refusing = mock.patch("os.sched_setaffinity", side_effect=PermissionError("not here"))
    with refusing, bound(frozenset({min(before)})):
        assert os.sched_getaffinity(0) == before
