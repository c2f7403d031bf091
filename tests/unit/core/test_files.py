"""Files as a home for tensors: what they hold, how they move, and how they fail."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zeroshard.core.files import ALIGNMENT, FileDepot, FileSettings, free_bytes
from zeroshard.errors import OffloadError, UsageError
from zeroshard.host.memory import in_words

MIB = 1 << 20
SMALL = FileSettings(block_bytes=ALIGNMENT, depth=4)
FOLDERS = [Path(tempfile.gettempdir()), *(path for path in [Path("/dev/shm")] if path.is_dir())]


def aligned(nbytes: int, shift: int = 0) -> Tensor:
    """Host memory that begins `shift` bytes after a multiple of the alignment."""
    memory = torch.zeros(nbytes + 2 * ALIGNMENT, dtype=torch.uint8)
    begin = -memory.data_ptr() % ALIGNMENT + shift
    return memory[begin : begin + nbytes]


def descriptor(folder: Path) -> str:
    """A path to the file of the only depot in a folder, which has no name there."""
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if str(link.readlink()).startswith(f"{folder}/"):
                return str(link)
    raise AssertionError(f"no file in {folder} is open")


def replace_calls(
    monkeypatch: pytest.MonkeyPatch, name: str, instead: Callable[..., Any]
) -> Callable[..., Any]:
    """Let a function of os be another one, which is given the true one first."""
    true = getattr(os, name)
    monkeypatch.setattr(os, name, lambda *args: instead(true, *args))
    return true


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[bool]:
    """A file system in memory on a folder, where this user may mount one; says whether."""
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    is_mounted = (
        bool(shutil.which("mount"))
        and not subprocess.run(command, capture_output=True, check=False).returncode
    )
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Path]:
    """A folder in which there is room for 4 MiB, or at least for no larger file."""
    with mounted(tmp_path, "size=4m") as is_small:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if not is_small:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MIB, hard))
        yield tmp_path
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder in which no file can be made."""
    with mounted(tmp_path, "ro") as is_mounted:
        if not is_mounted:
            tmp_path.chmod(0o555)
        yield Path("/proc/self") if os.access(tmp_path, os.W_OK) else tmp_path
        if not is_mounted:
            tmp_path.chmod(0o755)


def test_tensors_are_zeros_of_any_dtype_and_only_they_are_counted(tmp_path: Path) -> None:
    depot = FileDepot(tmp_path, name="rank 0")
    taken = [
        depot.take(5, torch.bfloat16),
        depot.take(3000, torch.float32),
        depot.take(0, torch.float32),
        depot.take(7, torch.int64),
    ]
    assert [(t.numel(), t.dtype, t.device.type) for t in taken] == [
        (5, torch.bfloat16, "cpu"),
        (3000, torch.float32, "cpu"),
        (0, torch.float32, "cpu"),
        (7, torch.int64, "cpu"),
    ]
    assert not any(t.any() for t in taken)
    assert depot.nbytes == sum(t.nbytes for t in taken)
    for value, tensor in enumerate(taken):
        tensor.fill_(value + 1)
    assert [t.unique().tolist() for t in taken] == [[1], [2], [], [4]]
    depot.give_back(taken[1])
    assert depot.nbytes == 10 + 56
    with pytest.raises(UsageError, match="given back that was not taken"):
        depot.give_back(taken[1])
    depot.close()
    assert depot.nbytes == 0


def test_space_that_was_reserved_is_there_when_it_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    depot = FileDepot(tmp_path, name="rank 0")
    depot.reserve(MIB)

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    tensor = depot.take(MIB, torch.uint8)
    tensor.fill_(3)
    with pytest.raises(OffloadError, match=r"asked for .* beside 1\.0 MiB"):
        depot.take(1, torch.uint8)
    assert tensor.eq(3).all()
    depot.close()


def test_a_tensor_outlives_its_depot(tmp_path: Path) -> None:
    depot = FileDepot(tmp_path, name="rank 0")
    tensor = depot.take(2 * MIB, torch.uint8)
    depot.write(tensor, torch.full_like(tensor, 3)).result()
    depot.close()
    del depot
    assert tensor.eq(3).all()


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
@pytest.mark.parametrize("direct", [True, False])
def test_reads_writes_and_edits_of_any_ranges_act_as_on_plain_memory(
    folder: Path, direct: bool
) -> None:
    sizes = [5, 3 * ALIGNMENT, 6 * ALIGNMENT + 12]

    @given(
        st.lists(
            st.tuples(
                st.sampled_from(["read", "write", "edit"]),
                st.integers(0, 2),  # which tensor
                st.integers(0, 6),  # first and last page
                st.integers(0, 6),
                st.sampled_from([0, 64, 512, ALIGNMENT]),  # where the memory begins
                st.integers(1, 255),
            ),
            max_size=12,
        )
    )
    def check(actions: list[tuple[str, int, int, int, int, int]]) -> None:
        depot = FileDepot(folder, name="rank 0", settings=FileSettings(ALIGNMENT, 4, direct))
        homes = [depot.take(size, torch.uint8) for size in sizes]
        expected = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
        for what, which, first, last, shift, value in actions:
            size = sizes[which]
            begin = min(first * ALIGNMENT, size // ALIGNMENT * ALIGNMENT)
            end = max(begin, min((last + 1) * ALIGNMENT, size))
            home, plain = homes[which][begin:end], expected[which][begin:end]
            memory = aligned(end - begin + 1, shift)
            if what == "edit":
                home[::3] = value
                plain[::3] = value
            elif what == "write":
                memory.copy_(torch.arange(end - begin + 1) % value)
                depot.write(home, memory[:-1]).result()
                plain.copy_(memory[:-1])
            else:
                memory[-1] = value
                depot.read(home, memory[:-1]).result()
                assert torch.equal(memory[:-1], plain)
                assert memory[-1] == value  # nothing beside it is written
        assert all(map(torch.equal, homes, expected))
        depot.close()

    check()


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_a_tensor_and_direct_transfers_show_the_same_bytes_in_turns(folder: Path) -> None:
    # Large enough for readahead, with pages cached, mapped and dirty when the transfers come.
    depot = FileDepot(folder, name="rank 0", settings=FileSettings(64 * 1024, 4))
    home = depot.take(MIB, torch.int32)
    neighbour = depot.take(MIB, torch.int32)
    memory = aligned(4 * MIB).view(torch.int32)
    for turn in range(10):
        memory.copy_(torch.arange(MIB, dtype=torch.int32) + turn)
        depot.write(home, memory).result()
        assert torch.equal(home, memory)
        home[turn::1000] += 7
        neighbour.fill_(turn)
        expected = home.clone()
        depot.read(home, memory.zero_()).result()
        assert torch.equal(memory, expected)
        depot.read(neighbour, memory).result()
        assert memory.eq(turn).all()
    depot.close()


def test_after_sealing_a_file_takes_no_host_memory(tmp_path: Path) -> None:
    depot = FileDepot(tmp_path, name="rank 0")
    tensor = depot.take(4 * MIB, torch.uint8)
    tensor.fill_(9)

    def resident_kib() -> int:
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        return sum(
            int(next(line for line in lines if line.startswith("Rss:")).split()[1])
            for line in lines
            if f" {tmp_path}/" in line
        )

    assert resident_kib() >= 4096
    depot.seal()
    assert resident_kib() <= ALIGNMENT // 1024  # the page of the trial
    assert tensor.eq(9).all()
    depot.close()


def test_many_transfers_at_once_end_each_in_its_own_place(tmp_path: Path) -> None:
    depot = FileDepot(tmp_path, name="rank 0", settings=SMALL)
    homes = [depot.take(30 * ALIGNMENT + 8 * index, torch.uint8) for index in range(20)]
    sources = [torch.full_like(home, index + 1) for index, home in enumerate(homes)]
    written = [depot.write(*pair) for pair in zip(homes, sources, strict=True)]
    depot.drain()
    assert all(future.done() for future in written)
    into = [torch.zeros_like(home) for home in homes]
    for future in [depot.read(home, memory) for home, memory in zip(homes, into, strict=True)]:
        future.result()
    assert all(map(torch.equal, into, sources))
    depot.close()


def test_calls_that_move_a_part_only_are_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    depot = FileDepot(tmp_path, name="rank 0")
    home, source = depot.take(8 * ALIGNMENT, torch.uint8), aligned(8 * ALIGNMENT).random_()

    def a_page(true: Callable[..., int], handle: int, buffers: list[Any], offset: int) -> int:
        return true(handle, [buffers[0][:ALIGNMENT]], offset)

    replace_calls(monkeypatch, "pwritev", a_page)
    replace_calls(monkeypatch, "preadv", a_page)
    depot.write(home, source).result()
    into = aligned(8 * ALIGNMENT)
    depot.read(home, into).result()
    assert torch.equal(into, source)
    assert torch.equal(home, source)
    depot.close()


def test_what_cannot_be_moved_is_refused_before_anything_moves(tmp_path: Path) -> None:
    depot = FileDepot(tmp_path, name="rank 0")
    home = depot.take(4 * ALIGNMENT, torch.uint8)
    for part in (home[1:], home[: ALIGNMENT + 1], home[::2]):
        with pytest.raises(UsageError):
            depot.read(part, torch.empty(part.numel(), dtype=torch.uint8))
    with pytest.raises(UsageError, match="5 bytes of memory for 16384"):
        depot.write(home, torch.empty(5, dtype=torch.uint8))
    with pytest.raises(UsageError, match="contiguous host memory"):
        depot.write(home, torch.empty(8 * ALIGNMENT, dtype=torch.uint8)[::2])
    with pytest.raises(UsageError, match="no contiguous part of a tensor of the offload file"):
        depot.read(torch.zeros(8), torch.zeros(8))
    depot.close()


# The drive.


def test_a_full_drive_is_known_when_room_is_taken(drive: Path) -> None:
    depot = FileDepot(drive, name="rank 3")
    first = depot.take(2 * MIB, torch.uint8)
    first.fill_(1)
    with pytest.raises(OffloadError) as caught:
        depot.take(8 * MIB, torch.float32)
    message = str(caught.value)
    assert message.startswith(f"rank 3 asked for 32.0 MiB in {drive}, beside 2.0 MiB that it has")
    assert f"and {in_words(free_bytes(drive))} are free: " in message
    assert "hint: free space" in message
    assert depot.take(MIB, torch.uint8).eq(0).all()  # it had not kept what it had got
    depot.write(first, torch.full_like(first, 2)).result()
    assert first.eq(2).all()
    depot.close()


def test_the_part_that_a_full_drive_has_given_is_free_again(
    drive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    depot = FileDepot(drive, name="rank 0")
    true, free = os.posix_fallocate, free_bytes(drive)

    def give_half(handle: int, offset: int, nbytes: int) -> None:
        true(handle, offset, nbytes // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", give_half)
    with pytest.raises(OffloadError, match=f"and {in_words(free)} are free: No space left"):
        depot.take(2 * MIB, torch.uint8)
    depot.close()


def test_what_is_given_back_is_room_for_others(drive: Path) -> None:
    depot = FileDepot(drive, name="rank 0")
    free = free_bytes(drive)
    for _ in range(3):
        tensor = depot.take(MIB, torch.uint8)
        assert not tensor.any()
        tensor.fill_(1)
        depot.give_back(tensor)
    if free < 4 * MIB:  # a drive of its own
        assert free_bytes(drive) == free
    depot.close()


def test_a_missing_folder_is_not_made_and_the_error_names_what_exists(tmp_path: Path) -> None:
    missing = tmp_path / "mnt" / "nvme"
    with pytest.raises(OffloadError) as caught:
        FileDepot(missing, name="rank 1")
    message = str(caught.value)
    assert message.startswith(f"rank 1 cannot make a file in {missing}: No such file")
    assert f"Of its path, {tmp_path} exists." in message
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OffloadError, match=f"Of its path, {tmp_path} exists"):
        free_bytes(missing)


def test_a_folder_that_cannot_be_written_to_is_an_error_of_its_own(read_only: Path) -> None:
    with pytest.raises(OffloadError, match="hint: name a folder as nvme_path that this user may"):
        FileDepot(read_only, name="rank 0")


def test_a_file_where_a_folder_is_meant_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(OffloadError, match="Not a directory"):
        FileDepot(path, name="rank 0")


def test_a_file_that_is_lengthened_while_another_thread_looks_at_it_is_not_cut_short(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    depot = FileDepot(tmp_path, name="rank 0", settings=SMALL)
    taken: list[Tensor] = []

    def meanwhile(true: Callable[[int], os.stat_result], handle: int) -> os.stat_result:
        found = true(handle)
        taken.append(depot.take(ALIGNMENT, torch.uint8))
        return found

    with monkeypatch.context() as patch:
        replace_calls(patch, "fstat", meanwhile)
        depot.check()
    assert len(taken) == 1
    depot.check()


def test_a_file_that_is_cut_short_is_an_error_now_and_later_and_never_a_crash(
    tmp_path: Path,
) -> None:
    depot = FileDepot(tmp_path, name="rank 2", settings=SMALL)
    home = depot.take(16 * ALIGNMENT, torch.uint8)
    memory = torch.zeros_like(home)
    depot.check()
    os.truncate(descriptor(tmp_path), 5 * ALIGNMENT)
    expected = (
        f"the offload file of rank 2 in {tmp_path} was cut short from outside: "
        f"it has {5 * ALIGNMENT} of {17 * ALIGNMENT} bytes"
    )
    with pytest.raises(OffloadError, match=expected):
        depot.check()
    os.truncate(descriptor(tmp_path), 17 * ALIGNMENT)  # zeros, where there was state
    for later in (
        lambda: depot.read(home, memory),
        lambda: depot.write(home, memory),
        lambda: depot.take(1, torch.uint8),
        depot.drain,
        depot.seal,
    ):
        with pytest.raises(OffloadError, match=expected):
            later()
    depot.close()


def test_a_file_that_is_cut_short_during_a_transfer_fails_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    depot = FileDepot(tmp_path, name="rank 0", settings=SMALL)
    home = depot.take(16 * ALIGNMENT, torch.uint8)

    def cut(true: Callable[..., int], *args: Any) -> int:
        os.truncate(descriptor(tmp_path), 0)
        return true(*args)

    replace_calls(monkeypatch, "preadv", cut)
    with pytest.raises(OffloadError, match="it has 0 of"):
        depot.read(home, torch.zeros_like(home)).result()
    depot.close()


def test_an_error_of_the_drive_ends_the_use_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    depot = FileDepot(tmp_path, name="rank 0", settings=SMALL)
    home = depot.take(64 * ALIGNMENT, torch.uint8)

    def fail_once(true: Callable[..., int], handle: int, buffers: list[Any], offset: int) -> int:
        if offset == 8 * ALIGNMENT:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return true(handle, buffers, offset)

    replace_calls(monkeypatch, "pwritev", fail_once)
    future = depot.write(home, aligned(home.nbytes))
    expected = f"failed in writing {ALIGNMENT} bytes at byte {8 * ALIGNMENT}: Input/output error"
    with pytest.raises(OffloadError, match=expected):
        future.result()
    with pytest.raises(OffloadError, match=expected):
        depot.drain()
    with pytest.raises(OffloadError, match=expected):
        depot.read(home, aligned(home.nbytes))
    depot.close()


def test_closing_ends_the_block_under_way_and_fails_those_that_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    depot = FileDepot(tmp_path, name="rank 0", settings=FileSettings(ALIGNMENT, 1))
    home = depot.take(ALIGNMENT, torch.uint8)
    has_begun, may_go_on = threading.Event(), threading.Event()

    def wait(true: Callable[..., int], *args: Any) -> int:
        has_begun.set()
        may_go_on.wait()
        return true(*args)

    replace_calls(monkeypatch, "preadv", wait)
    futures: list[Future[None]] = [depot.read(home, aligned(ALIGNMENT)) for _ in range(3)]
    has_begun.wait()
    closing = threading.Thread(target=depot.close)
    closing.start()
    with pytest.raises(OffloadError, match="was closed"):
        while True:
            depot.check()
    may_go_on.set()
    closing.join()
    assert futures[0].exception() is None
    for future in futures[1:]:
        with pytest.raises(OffloadError, match="was closed"):
            future.result()
    depot.close()


def test_however_deep_the_queue_there_are_64_threads_in_a_direction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    depot = FileDepot(tmp_path, name="rank 0", settings=FileSettings(ALIGNMENT, 256))
    home = depot.take(100 * ALIGNMENT, torch.uint8)
    may_go_on = threading.Event()

    def wait(true: Callable[..., int], *args: Any) -> int:
        may_go_on.wait()
        return true(*args)

    replace_calls(monkeypatch, "preadv", wait)
    future = depot.read(home, aligned(home.nbytes))
    names = [thread.name for thread in threading.enumerate()]
    assert sum(name.startswith("zeroshard-files-in") for name in names) == 64
    may_go_on.set()
    future.result()
    depot.close()


def test_a_depot_that_nobody_closes_goes_when_its_last_transfer_is_over(tmp_path: Path) -> None:
    depot = FileDepot(tmp_path, name="rank 0", settings=SMALL)
    home = depot.take(64 * ALIGNMENT, torch.uint8)
    future = depot.write(home, torch.full_like(home, 4))
    del depot
    future.result()
    assert home.eq(4).all()
    del home, future
    with pytest.raises(AssertionError, match="is open"):
        while descriptor(tmp_path):
            os.sched_yield()


# Where direct I/O cannot be had.


def refuse_at_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    true = os.open

    def refuse(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return true(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)


def refuse_at_the_first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(true: Callable[..., int], handle: int, *rest: Any) -> int:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return true(handle, *rest)

    replace_calls(monkeypatch, "preadv", refuse)
    replace_calls(monkeypatch, "pwritev", refuse)


def ignore_what_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_stale(true: Callable[..., int], handle: int, buffers: list[Any], at: int) -> int:
        moved = true(handle, buffers, at)
        if at == 0:  # the trial
            buffers[0][:1] = b"\x07"
        return moved

    replace_calls(monkeypatch, "preadv", read_stale)


def keep_what_is_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(true: Callable[..., int], handle: int, buffers: list[Any], at: int) -> int:
        return true(handle, buffers, at) if at else ALIGNMENT

    replace_calls(monkeypatch, "pwritev", lose)


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (refuse_at_opening, "opening it for direct I/O: Invalid argument"),
        (refuse_at_the_first_request, "direct I/O: Invalid argument"),
        (ignore_what_is_cached, "direct I/O does not see what was stored through a mapping"),
        (keep_what_is_mapped, "a mapping does not show what direct I/O has written"),
    ],
)
def test_without_direct_transfers_that_can_be_trusted_the_page_cache_is_used_and_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    break_it: Callable[[pytest.MonkeyPatch], None],
    reason: str,
) -> None:
    break_it(monkeypatch)
    with caplog.at_level(logging.WARNING, "zeroshard"):
        depot = FileDepot(tmp_path, name="rank 0", settings=SMALL)
    assert not depot.is_direct
    (message,) = caplog.messages
    assert str(tmp_path) in message
    assert "costs a copy and host memory" in message
    assert reason in message
    home, source = depot.take(3 * ALIGNMENT + 8, torch.uint8), aligned(3 * ALIGNMENT + 8, 1)
    source.random_()
    depot.write(home, source).result()
    into = torch.zeros_like(source)
    depot.read(home, into).result()
    assert torch.equal(into, source)
    assert torch.equal(home, source)
    depot.close()


# Runs.


def test_runs_on_one_folder_do_not_meet_and_a_killed_one_leaves_nothing(drive: Path) -> None:
    foreign = drive / "foreign"
    foreign.write_text("kept")
    free = free_bytes(drive)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            depot = FileDepot(drive, name="rank 0", settings=SMALL)
            other = depot.take(2 * MIB, torch.uint8)
            depot.write(other, torch.full_like(other, 8)).result()
            os.write(writing, b"x")
            signal.pause()
        os._exit(1)
    assert os.read(reading, 1) == b"x"
    if free < 4 * MIB:
        assert free_bytes(drive) <= free - 2 * MIB
    depot = FileDepot(drive, name="rank 0", settings=SMALL)  # while the other one lives
    home = depot.take(MIB, torch.uint8)
    depot.write(home, torch.full_like(home, 5)).result()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert home.eq(5).all()
    assert sorted(path.name for path in drive.iterdir()) == ["foreign"]
    depot.close()
    del depot, home
    if free < 4 * MIB:
        assert free_bytes(drive) == free
    assert foreign.read_text() == "kept"
    os.close(reading)
    os.close(writing)


def test_a_program_that_ends_without_closing_ends_at_once_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    program = f"""
import torch
from zeroshard.core.files import FileDepot
depot = FileDepot({str(tmp_path)!r}, name="rank 0")
home = depot.take(1 << 24, torch.uint8)
depot.write(home, torch.ones(1 << 24, dtype=torch.uint8))
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
