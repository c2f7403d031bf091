from __future__ import annotations

from pathlib import Path

import pytest

from zeroshard.host.cgroup import Cgroup
from zeroshard.host.memory import bytes_free

MEMINFO = "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    700 kB\n"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    return path


def test_the_tightest_group_of_version_2_counts_and_pages_of_files_are_free(tmp_path: Path) -> None:
    meminfo = write(tmp_path / "meminfo", MEMINFO)
    root = tmp_path / "fs"
    group = Cgroup(root / "job/step", None, root)
    write(root / "job/step/memory.max", "max")
    write(root / "job/step/memory.current", "1")
    write(root / "job/memory.max", "600000")
    write(root / "job/memory.current", "400000")
    stat = write(root / "job/memory.stat", "anon 1\ninactive_file 5000\nactive_file 7000\nslab 9")
    assert bytes_free(meminfo, group) == 212_000
    stat.unlink()
    assert bytes_free(meminfo, group) == 200_000
    write(root / "job/memory.current", "700000")  # a limit may be lowered below what is used
    assert bytes_free(meminfo, group) == 0
    write(root / "job/memory.current", "10")
    assert bytes_free(meminfo, group) == 599_990
    write(root / "job/memory.max", "900000")
    assert bytes_free(meminfo, group) == 700 << 10  # now the host itself is the limit


def test_a_group_of_version_1_counts_with_the_groups_inside_of_it(tmp_path: Path) -> None:
    root = tmp_path / "memory"
    write(root / "memory.limit_in_bytes", "600000")
    write(root / "memory.usage_in_bytes", "400000")
    stat = "inactive_file 1\nactive_file 1\ntotal_inactive_file 30\ntotal_active_file 20"
    write(root / "memory.stat", stat)
    assert bytes_free(tmp_path / "missing", Cgroup(root, None, root)) == 200_050


def test_without_any_limit_the_host_counts_and_nothing_is_known_where_nothing_is_told(
    tmp_path: Path,
) -> None:
    free = Cgroup(None, None)
    assert bytes_free(write(tmp_path / "meminfo", MEMINFO), free) == 700 << 10
    assert bytes_free(tmp_path / "missing", free) is None
    assert bytes_free(write(tmp_path / "old", "MemFree:         100 kB"), free) is None


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="no Linux")
def test_this_host_has_some_memory_left() -> None:
    free = bytes_free()
    assert free is not None
    assert 0 < free < 1 << 60
