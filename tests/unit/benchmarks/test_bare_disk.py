"""The bare disk is measured with a file that is gone afterwards, whatever happens."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

from side_by_side import bare_disk
from side_by_side.bare_disk import Rates


def test_all_rates_are_found_and_nothing_is_left(tmp_path: Path) -> None:
    rates = bare_disk.measure(tmp_path, 1 << 20, block_bytes=1 << 16, threads=2, times=1)
    assert min(rates.write, rates.read, rates.both) > 0
    assert not list(tmp_path.iterdir())


def test_a_file_system_that_refuses_direct_io_is_measured_through_the_page_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & bare_disk._DIRECT:
            raise OSError(22, "Invalid argument")
        return opened(path, flags, mode)

    opened = os.open
    monkeypatch.setattr(os, "open", refuse)
    rates = bare_disk.measure(tmp_path, 1 << 18, block_bytes=1 << 16, threads=2, times=1)
    assert not rates.is_direct and rates.read > 0


def test_a_block_that_is_moved_in_part_is_an_error_and_the_file_goes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "pwritev", lambda handle, views, at: len(views[0]) // 2)
    with pytest.raises(OSError, match="in part"):
        bare_disk.measure(tmp_path, 1 << 18, block_bytes=1 << 16, threads=2, times=1)
    assert not list(tmp_path.iterdir())


def test_the_faster_way_to_read_and_write_as_many_bytes_is_what_a_disk_can_do() -> None:
    assert Rates(write=2.0, read=2.0, both=3.0, is_direct=True).of(5, 5) == 3.0
    assert Rates(write=2.0, read=6.0, both=2.5, is_direct=True).of(6, 6) == 3.0
    assert Rates(write=2.0, read=6.0, both=2.5, is_direct=True).of(12, 0) == 6.0
