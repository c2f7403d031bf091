"""`zeroshard io-bench`: what it measures, what it concludes, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from zeroshard.launch.cli import main
from zeroshard.launch.io_bench_command import (
    BusRate,
    DriveRate,
    Model,
    Rates,
    Room,
    what_it_means,
)

Run = Callable[..., tuple[int, str, str]]

# 1 MiB, or nearly: a page less than two pieces of memory.
TINY = ("--size", "0.0009", "--seconds", "0", "--block-size", "0.25", "--depth", "2")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run_main(*arguments: str) -> tuple[int, str, str]:
        code = main(["io-bench", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_main


def test_a_step_costs_what_its_bytes_take_at_the_best_rate_of_each_kind() -> None:
    rates = Rates(
        bus=(BusRate(1, 50e9, 50e9, 100e9), BusRate(8, 190e9, 130e9, 192e9)),
        host_copy_bytes_per_second=1.0,
        update_parameters_per_second=6e9,
        update_bytes_per_second=1.0,
        threads=1,
        drive=(DriveRate(1, 1, 1.0, 1.0, 2e9), DriveRate(16, 8, 1.0, 1.0, 4e9)),
        drive_is_direct=True,
    )
    room = Room(host_bytes_free=100 * 10**9, drive_bytes_free=96 * 10**9 - 1)
    assert what_it_means(8e9, rates, room) == Model(
        parameters=8e9,
        state_bytes=96e9,
        bus_seconds=1.0,  # 96 GB in and 96 GB out
        update_seconds=8 / 6,
        drive_seconds=48.0,
        fits_host=True,
        fits_drive=False,
    )
    assert (room.host_parameters, room.drive_parameters) == (100e9 / 12, (96e9 - 1) / 12)


def test_every_rate_is_measured_and_nothing_stays_behind(run: Run, tmp_path: Path) -> None:
    code, out, err = run(str(tmp_path), *TINY, "--depth", "1", "--parameters", "1e3", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    rates, room = found["rates"], found["room"]
    assert found["path"] == str(tmp_path)
    assert rates["bus"] == []  # tests see no GPU
    assert rates["host_copy_bytes_per_second"] > 0
    assert rates["update_bytes_per_second"] == rates["update_parameters_per_second"] * 28
    assert [(rate["block_bytes"], rate["depth"]) for rate in rates["drive"]] == [
        (1 << 18, 2),
        (1 << 18, 1),
    ]
    for rate in rates["drive"]:
        assert all(rate[f"{what}_bytes_per_second"] > 0 for what in ("write", "read", "both_ways"))
    (model,) = found["models"]
    assert model["state_bytes"] == 12_000
    assert model["bus_seconds"] is None
    assert model["fits_host"] == (room["host_bytes_free"] >= 12_000)
    assert list(tmp_path.iterdir()) == []


def test_the_text_is_plain_and_says_what_fits_and_what_was_not_measured(
    run: Run, tmp_path: Path
) -> None:
    code, out, _ = run(str(tmp_path), *TINY, "--parameters", "8e9", "--parameters", "9e15")
    assert code == 0
    assert out.isascii()
    assert "\x1b" not in out
    assert "No GPU is visible, so no bus was measured." in out
    lines = [line.split("  ") for line in out.splitlines()]
    cells = {cells[0].strip(): [cell.strip() for cell in cells[1:] if cell] for cells in lines}
    assert cells["fused AdamW on the host"][1].endswith("billion parameters/s, 1 thread")
    assert cells["blocks of 0.25 MiB"][0] == "2"
    assert cells["8 billion"][:2] == ["96 GB", "-"]
    assert cells["9e+06 billion"][3].endswith("(no room)")


def test_a_file_system_without_direct_transfers_is_named_in_the_text(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = os.open

    def refuse(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return true(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    code, out, _ = run(str(tmp_path), *TINY)
    assert code == 0
    assert "does not take direct I/O, so the page cache is in these rates." in out


def test_a_file_that_does_not_fit_is_refused_before_anything_is_measured(
    run: Run, tmp_path: Path
) -> None:
    code, out, err = run(str(tmp_path), "--size", "1e9")
    assert (code, out) == (2, "")
    assert f"the file would take 1000000000.0 GiB in {tmp_path}, and " in err
    assert "hint: name a smaller --size" in err


def test_a_folder_that_does_not_exist_is_an_error(run: Run, tmp_path: Path) -> None:
    code, _, err = run(str(tmp_path / "missing"))
    assert code == 2
    assert f"'{tmp_path / 'missing'}' does not exist" in err
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_it_and_gives_the_space_back(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            code = main(["io-bench", str(tmp_path), *TINY, "--seconds", "1000"])
        finally:
            os._exit(code)
    descriptors = Path(f"/proc/{pid}/fd")

    def has_a_file() -> bool:
        """Whether it is open and has lost the name that it has for a moment."""
        try:
            links = [str(link.readlink()) for link in descriptors.iterdir()]
            return any(str(tmp_path) in link and link.endswith("(deleted)") for link in links)
        except FileNotFoundError:
            return False

    while not has_a_file():
        os.sched_yield()
    os.kill(pid, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    assert list(tmp_path.iterdir()) == []
