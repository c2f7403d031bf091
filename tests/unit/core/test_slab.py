"""Host memory in slabs: what it takes, when it is there, how it is page-locked, and how it ends."""

from __future__ import annotations

import ctypes
import gc
import io
import logging
import os
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zeroshard.core.slab import CudaPinner, HostDepot
from zeroshard.errors import OffloadError, UsageError
from zeroshard.host.pages import PAGE_BYTES

CPU = torch.device("cpu")
MIB = 1 << 20

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="tells of pages as Linux does")


@dataclass
class Locks:
    """A way to page-lock that keeps an account, and refuses when it has locked enough."""

    limit: int = 1 << 60
    ranges: dict[int, int] = field(default_factory=dict)
    calls: list[tuple[str, int, int]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(self.ranges.values())

    def lock(self, address: int, nbytes: int) -> str | None:
        assert address % PAGE_BYTES == nbytes % PAGE_BYTES == 0
        for first, size in self.ranges.items():
            assert address + nbytes <= first or first + size <= address
        if self.nbytes + nbytes > self.limit:
            return "out of memory (CUDA error 2)"
        self.calls.append(("lock", address, nbytes))
        self.ranges[address] = nbytes
        return None

    def unlock(self, address: int) -> str | None:
        ctypes.string_at(address, 1)  # it is still mapped
        self.calls.append(("unlock", address, self.ranges.pop(address)))
        return None

    def hold(self, tensor: torch.Tensor) -> bool:
        start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return any(a <= start and stop <= a + size for a, size in self.ranges.items())


def depot(locks: Locks | None = None, **settings: Any) -> HostDepot:
    settings = {"name": "optimizer state", "pin": True, **settings}
    return HostDepot(CPU, pinner=locks or Locks(), **settings)


def is_mapped(address: int) -> bool:
    ranges = re.findall(r"^(\w+)-(\w+) ", Path("/proc/self/maps").read_text(), re.MULTILINE)
    return any(int(first, 16) <= address < int(last, 16) for first, last in ranges)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def in_a_child(fn: Any) -> int:
    """Run a function in a forked process, which then ends as Python's own children do."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            fn()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# What it takes

DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.int64)
SIZES = st.one_of(st.integers(0, 300), st.integers(0, 3 * MIB))
TAKES = st.lists(st.tuples(SIZES, st.sampled_from(DTYPES)), max_size=12)


@settings(max_examples=40, deadline=None)
@given(TAKES, st.integers(1, 8 * MIB))
def test_tensors_are_aligned_and_locked_bytes_are_theirs_but_for_alignment(
    takes: Sequence[tuple[int, torch.dtype]], largest: int
) -> None:
    locks = Locks()
    home = depot(locks, largest_slab_bytes=largest)
    tensors = [home.take(numel, dtype) for numel, dtype in takes]
    assert [(tensor.numel(), tensor.dtype) for tensor in tensors] == list(takes)
    home.seal()
    allowed = 0
    for tensor in tensors:
        large = tensor.nbytes >= MIB
        allowed += tensor.nbytes + (PAGE_BYTES if large else 64)
        if tensor.numel():
            assert tensor.data_ptr() % (PAGE_BYTES if large else 64) == 0
            assert locks.hold(tensor)
    assert home.nbytes == sum(tensor.nbytes for tensor in tensors)
    assert home.locked_bytes == locks.nbytes <= allowed + PAGE_BYTES * len(locks.calls)
    home.close()
    assert locks.ranges == {}


def test_locked_bytes_are_those_of_a_models_states_also_with_thousands_of_small_ones() -> None:
    locks = Locks()
    home = depot(locks, largest_slab_bytes=256 * MIB)
    for _ in range(1000):
        for numel in (1000, 1001, 4096, 333):
            home.take(numel, torch.float32)
    home.take(12 * MIB + 3, torch.float32)
    home.seal()
    assert home.nbytes <= locks.nbytes <= 1.02 * home.nbytes
    assert len(locks.ranges) == 2
    home.close()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_tensor_is_zero_when_taken_and_nobody_else_writes_to_it(data: st.DataObject) -> None:
    locks = Locks()
    home = depot(locks, largest_slab_bytes=8 * MIB)
    live: dict[int, torch.Tensor] = {}
    for number in range(1, data.draw(st.integers(1, 25), "steps")):
        do = data.draw(st.sampled_from(["take", "take", "give back", "seal"]))
        if do == "take":
            live[number] = home.take(data.draw(SIZES), torch.uint8)
            assert not live[number].any()
            live[number].fill_(number)
        elif do == "give back" and live:
            home.give_back(live.pop(data.draw(st.sampled_from(sorted(live)))))
        elif do == "seal":
            home.seal()
            assert all(locks.hold(tensor) for tensor in live.values() if tensor.numel())
    for number, tensor in live.items():
        assert tensor.eq(number).all()
    assert home.nbytes == sum(tensor.nbytes for tensor in live.values())
    for tensor in live.values():
        home.give_back(tensor)
    assert (home.nbytes, home.locked_bytes, locks.ranges) == (0, 0, {})


@on_linux
def test_locked_pages_are_never_exchanged_for_others_that_a_gpu_does_not_know() -> None:
    home = depot()
    tensor, _ = home.take(32 * MIB, torch.uint8).fill_(1), home.take(1, torch.uint8)
    home.seal()
    address, before = tensor.data_ptr(), resident_bytes()
    home.give_back(tensor)
    assert resident_bytes() > before - MIB
    again = home.take(16 * MIB, torch.uint8)
    assert again.data_ptr() == address
    assert not again.any()
    assert resident_bytes() > before - MIB


def test_what_was_given_back_is_used_again_before_more_is_mapped_or_locked() -> None:
    locks = Locks()
    home = depot(locks)
    first, second = home.take(MIB, torch.float32), home.take(MIB, torch.float32)
    home.seal()
    address = first.data_ptr()
    home.give_back(first)
    again = [home.take(MIB // 2, torch.float32) for _ in range(2)]
    assert again[0].data_ptr() == address
    assert all(locks.hold(tensor) for tensor in (*again, second))
    assert home.locked_bytes == 8 * MIB


def test_what_finalizers_give_back_in_the_middle_of_a_call_is_taken_back_at_its_end() -> None:
    locks, doomed = Locks(), []

    def bytes_free() -> int:
        while doomed:
            home.give_back(doomed.pop())
        return 64 * MIB

    home = depot(locks, bytes_free=bytes_free)
    doomed.append(home.take(100, torch.float32))
    tensor = home.take(8 * MIB, torch.uint8)
    assert home.nbytes == tensor.nbytes
    home.seal()
    assert locks.hold(tensor)
    assert home.locked_bytes == locks.nbytes
    home.close()


def test_what_is_no_tensor_of_the_depot_is_not_taken_back() -> None:
    home = depot()
    tensor = home.take(4, torch.float32)
    with pytest.raises(UsageError, match="to optimizer state that was not taken there"):
        home.give_back(torch.zeros(4))
    with pytest.raises(UsageError, match="not taken there"):
        home.give_back(tensor[:2])
    home.give_back(tensor)
    with pytest.raises(UsageError, match="not taken there"):
        home.give_back(tensor)


def test_saving_a_tensor_saves_its_own_bytes() -> None:
    home = depot()
    tensors = [home.take(10_000, torch.float32) for _ in range(100)]
    file = io.BytesIO()
    torch.save(tensors[3], file)
    assert len(file.getvalue()) < 2 * tensors[3].nbytes


# When it is there


@on_linux
def test_memory_is_taken_as_it_is_written_and_returned_when_given_back() -> None:
    home = depot(pin=False)
    before = resident_bytes()
    kept, tensor = home.take(MIB, torch.float32), home.take(16 * MIB, torch.float32)
    assert resident_bytes() - before < 16 * MIB
    tensor[: 8 * MIB].fill_(1)
    assert 32 * MIB <= resident_bytes() - before < 48 * MIB
    home.seal()
    assert resident_bytes() - before < 48 * MIB  # nothing is locked
    tensor.fill_(1)
    home.give_back(tensor)  # while the other one stays
    assert resident_bytes() - before < 16 * MIB
    assert not kept.any()


@on_linux
def test_a_slab_that_is_all_returned_goes_back_to_the_system_unlocked_first() -> None:
    locks = Locks()
    home = depot(locks, largest_slab_bytes=MIB)
    kept, tensor = home.take(MIB, torch.float32), home.take(MIB, torch.float32)
    home.seal()
    address = tensor.data_ptr()
    home.give_back(tensor)
    del tensor
    assert not is_mapped(address)
    assert [call for call, *_ in locks.calls] == ["lock", "lock", "unlock"]
    assert locks.hold(kept)
    assert home.locked_bytes == kept.nbytes


@on_linux
def test_tensors_keep_their_memory_and_it_ends_unlocked_with_the_last_of_them() -> None:
    locks = Locks()
    home = depot(locks)
    tensors = [home.take(MIB, torch.float32) for _ in range(2)]
    home.seal()
    address = tensors[0].data_ptr()
    del home
    gc.collect()
    tensors[1].fill_(3)
    del tensors[0]
    assert locks.hold(tensors[0])
    assert tensors[0].eq(3).all()
    tensors.clear()
    assert [call for call, *_ in locks.calls] == ["lock", "unlock"]
    assert not is_mapped(address)


def test_a_closed_depot_has_unlocked_everything_once() -> None:
    locks = Locks()
    home = depot(locks)
    tensor = home.take(100, torch.float32)
    home.seal()
    home.close()
    home.close()
    assert (home.nbytes, home.locked_bytes, locks.ranges) == (0, 0, {})
    tensor.fill_(1)
    del tensor
    assert [call for call, *_ in locks.calls] == ["lock", "unlock"]


# Page-locking


def test_a_seal_locks_what_was_taken_since_the_last_one() -> None:
    locks = Locks()
    home = depot(locks)
    first = home.take(1000, torch.float32)
    home.seal()
    assert locks.calls == [("lock", first.data_ptr(), PAGE_BYTES)]
    home.seal()
    second = home.take(3000, torch.float32)
    home.seal()
    assert locks.calls[1:] == [("lock", second.data_ptr(), 3 * PAGE_BYTES)]


def test_what_was_given_back_before_a_seal_is_not_locked_if_it_is_large() -> None:
    locks = Locks()
    home = depot(locks)
    tensors = [
        home.take(numel, torch.uint8)
        for numel in (100, 2 * MIB + 9, 5000, 4 * MIB + 7, 9000, 2 * MIB)
    ]
    for large in tensors[1::2]:
        home.give_back(large)
    home.seal()
    assert home.locked_bytes <= 9 * PAGE_BYTES
    assert all(locks.hold(tensor) for tensor in tensors[::2])
    again = [home.take(5 * MIB, torch.uint8), home.take(10, torch.uint8)]
    assert home.locked_bytes <= 9 * PAGE_BYTES
    home.seal()
    assert all(locks.hold(tensor) for tensor in again)
    for tensor in (*tensors[::2], *again):
        home.give_back(tensor)
    assert locks.ranges == {}


def test_nothing_is_locked_on_a_cpu_or_where_it_is_not_wanted() -> None:
    locks = Locks()
    homes = [depot(locks, pin=False), HostDepot(CPU, pin=True, name="optimizer state")]
    for home in homes:
        home.take(100, torch.float32)
        home.seal()
        assert home.locked_bytes == 0
    assert locks.calls == []


def test_a_refusal_halfway_unlocks_what_was_locked_and_says_who_refused_what() -> None:
    locks = Locks(limit=5 * MIB)
    home = depot(
        locks, largest_slab_bytes=MIB, pin_key="zero_optimization.offload_param.pin_memory"
    )
    early = home.take(256 << 10, torch.float32)
    home.seal()
    for _ in range(3):
        home.take(512 << 10, torch.float32)
    with pytest.raises(OffloadError) as caught:
        home.seal()
    message = str(caught.value)
    assert "rank 0 cannot page-lock 6.0 MiB of host memory for optimizer state" in message
    assert "CUDA refused 2.0 MiB after 5.0 MiB: out of memory (CUDA error 2)" in message
    assert '"pin_memory": false (zero_optimization.offload_param.pin_memory)' in message
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    assert ("is none." in message) == (limit == resource.RLIM_INFINITY)
    assert home.locked_bytes == locks.nbytes == MIB
    assert locks.hold(early)
    locks.limit = 7 * MIB  # another try begins anew
    home.seal()
    assert home.locked_bytes == 7 * MIB


def test_cuda_is_asked_for_all_devices_and_a_refusal_does_not_reach_the_next_kernel() -> None:
    calls: list[Any] = []

    def answer(*call: Any) -> int:
        calls.append(call)
        return 2 if call[-2:] == (8 * PAGE_BYTES, 1) else 0

    cudart = SimpleNamespace(
        cudaHostRegister=partial(answer, "register"),
        cudaHostUnregister=partial(answer, "unregister"),
        cudaGetErrorString=lambda _status: "out of memory",
    )
    with (
        mock.patch("torch.cuda.cudart", lambda: cudart),
        mock.patch("torch.cuda.device", lambda device: nullcontext(calls.append(device))),
        mock.patch("torch.cuda.synchronize", lambda: calls.append("synchronize")),
        mock.patch("torch.ones", lambda *_, device: calls.append(("kernel", device))),
    ):
        gpu = torch.device("cuda", 1)
        pinner = CudaPinner(gpu)
        assert pinner.lock(PAGE_BYTES, 2 * PAGE_BYTES) is None
        assert pinner.lock(3 * PAGE_BYTES, 8 * PAGE_BYTES) == "out of memory (CUDA error 2)"
        assert pinner.unlock(PAGE_BYTES) is None
    portable = 1
    assert calls == [
        *(gpu, ("register", PAGE_BYTES, 2 * PAGE_BYTES, portable)),
        *(gpu, ("register", 3 * PAGE_BYTES, 8 * PAGE_BYTES, portable), ("kernel", gpu)),
        *(gpu, "synchronize", ("unregister", PAGE_BYTES)),
    ]


def test_small_seals_are_quiet_and_long_ones_say_how_far_they_are(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="zeroshard")
    home = depot(largest_slab_bytes=MIB)
    for _ in range(4):
        home.take(256 << 10, torch.float32)
    home.seal()
    assert caplog.messages == []
    for _ in range(3):
        home.take(256 << 10, torch.float32)
    monkeypatch.setattr("zeroshard.core.slab._QUIET_BYTES", 0)
    monkeypatch.setattr("zeroshard.core.slab._SAY_EVERY_S", 0.0)
    home.seal()
    assert [re.sub(r"[\d.]+ s\b", "T", message) for message in caplog.messages] == [
        "page-locking host memory for optimizer state: 1.0 MiB of 3.0 MiB after T",
        "page-locking host memory for optimizer state: 2.0 MiB of 3.0 MiB after T",
        "page-locked 3.0 MiB of host memory for optimizer state in T (3 slabs)",
    ]


# What the host has left


def test_more_than_the_host_has_left_is_refused_before_it_is_mapped() -> None:
    home = depot(bytes_free=lambda: 100 * MIB)
    home.take(10 * MIB, torch.uint8)
    with pytest.raises(OffloadError) as caught:
        home.take(30 * MIB, torch.float32)
    message = str(caught.value)
    assert "rank 0 needs 120.0 MiB more of host memory (RAM) for optimizer state" in message
    assert "of which it holds 10.0 MiB" in message
    assert "89.2 MiB are free" in message
    assert "zeroshard.gpu_budget" in message
    assert home.nbytes == 10 * MIB
    home.take(80 * MIB, torch.uint8)


@on_linux
def test_memory_that_is_promised_counts_as_used_until_it_is() -> None:
    free = 100 * MIB
    home = depot(bytes_free=lambda: free, largest_slab_bytes=MIB)
    first = home.take(60 * MIB, torch.uint8)
    with pytest.raises(OffloadError, match=r"39\.2 MiB are free"):
        home.take(60 * MIB, torch.uint8)
    first.fill_(1)
    free -= first.nbytes
    second = home.take(30 * MIB, torch.uint8)
    with pytest.raises(OffloadError, match=r"9\.7 MiB are free"):
        home.take(30 * MIB, torch.uint8)
    home.give_back(second)
    home.take(30 * MIB, torch.uint8)


def test_many_small_tensors_do_not_look_at_free_memory_each() -> None:
    looks = 0

    def free() -> int:
        nonlocal looks
        looks += 1
        return 100 * MIB

    home = depot(bytes_free=free)
    for _ in range(1000):
        home.take(1000, torch.float32)
    assert looks < 5


def test_where_nothing_is_known_about_free_memory_nothing_is_refused() -> None:
    assert depot(bytes_free=lambda: None).take(1 << 30, torch.float32).nbytes == 4 << 30


@on_linux
def test_a_seal_that_the_host_has_no_memory_for_touches_and_locks_nothing() -> None:
    free = 1000 * MIB
    locks = Locks()
    home = depot(locks, bytes_free=lambda: free)
    home.take(200 * MIB, torch.uint8)
    free = 100 * MIB  # another process was faster
    before = resident_bytes()
    with pytest.raises(OffloadError, match=r"needs 200\.0 MiB more .* 100\.0 MiB are free"):
        home.seal()
    assert resident_bytes() - before < 16 * MIB
    assert locks.calls == []


@on_linux
def test_a_limit_of_addresses_is_named() -> None:
    def work() -> None:
        limit = 1 << 33
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        with pytest.raises(OffloadError, match=r"cannot map 64\.0 GiB .*Cannot allocate memory"):
            depot(bytes_free=lambda: None).take(1 << 34, torch.float32)

    assert in_a_child(work) == 0


# Other processes, and the end of this one


@on_linux
def test_forked_processes_lack_locked_memory_and_end_without_touching_it() -> None:
    locks = Locks()
    home = depot(locks)
    tensors = [home.take(MIB, torch.float32).fill_(2)]
    assert in_a_child(lambda: tensors[0].sum().item() == 2 * MIB or 1 / 0) == 0
    home.seal()
    address = tensors[0].data_ptr()

    def child() -> None:
        assert not is_mapped(address)
        other = ctypes.create_string_buffer(b"mine", 64 * MIB)  # may be where the slab was
        home.close()
        tensors.clear()
        gc.collect()
        assert other.value == b"mine"
        assert [call for call, *_ in locks.calls] == ["lock"]

    assert in_a_child(child) == 0
    assert locks.hold(tensors[0])
    assert tensors[0].eq(2).all()


def test_an_interpreter_that_ends_leaves_the_memory_to_the_system() -> None:
    script = """
import atexit, torch
from zeroshard.core.slab import CudaPinner, HostDepot
class Loud:
    def lock(self, address, nbytes): print("lock")
    def unlock(self, address): print("unlock")
home = HostDepot(torch.device("cpu"), pin=True, name="state", pinner=Loud())
tensor = home.take(1000, torch.float32)
atexit.register(lambda: print(tensor.sum().item()))
home.seal()
tensor.fill_(1)
"""
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr, ended.stdout) == (0, "", "lock\n1000.0\n")
