from __future__ import annotations

from pathlib import Path

from zeroshard.host.cgroup import Cgroup, of_this_process


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    return path


def test_version_2_counts_kills_and_has_the_smallest_limit_of_all_groups_around(
    tmp_path: Path,
) -> None:
    membership = write(tmp_path / "cgroup", "0::/job/step")
    root = tmp_path / "fs"
    events = write(root / "job/step/memory.events", "low 0\noom 3\noom_kill 2\noom_group_kill 1")
    write(root / "job/step/memory.max", "max")
    write(root / "job/memory.max", str(3 << 30))
    write(root / "job/step/cpu.max", "max 100000")
    write(root / "job/cpu.max", "250000 100000")
    group = of_this_process(membership, root)
    assert group.oom_kills() == 2
    assert group.memory_limit_bytes() == 3 << 30
    assert group.cpu_limit() == 2.5
    write(events, "oom_kill 5")
    assert group.oom_kills() == 5


def test_version_1_counts_kills_and_has_limits(tmp_path: Path) -> None:
    membership = write(tmp_path / "cgroup", "4:memory:/job\n3:cpu,cpuacct:/job\n0::/")
    root = tmp_path / "fs"
    write(root / "memory/job/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 7")
    write(root / "memory/job/memory.limit_in_bytes", str(1 << 30))
    write(root / "memory/memory.limit_in_bytes", "9223372036854771712")  # none
    write(root / "cpu/job/cpu.cfs_quota_us", "50000")
    write(root / "cpu/job/cpu.cfs_period_us", "100000")
    write(root / "cpu/cpu.cfs_quota_us", "-1")
    group = of_this_process(membership, root)
    assert group.oom_kills() == 7
    assert group.memory_limit_bytes() == 1 << 30
    assert group.cpu_limit() == 0.5


def test_a_container_finds_its_group_at_the_root_though_told_the_path_outside(
    tmp_path: Path,
) -> None:
    membership = write(tmp_path / "cgroup", "0::/docker/0123")
    write(tmp_path / "fs/memory.events", "oom_kill 1")
    write(tmp_path / "fs/memory.max", "1048576")
    group = of_this_process(membership, tmp_path / "fs")
    assert group.oom_kills() == 1
    assert group.memory_limit_bytes() == 1 << 20


def test_outside_of_any_group_the_hosts_counter_is_read_and_nothing_is_limited(
    tmp_path: Path,
) -> None:
    group = of_this_process(tmp_path / "missing", tmp_path)
    assert group.memory_limit_bytes() is None
    assert group.cpu_limit() is None
    counters = write(tmp_path / "vmstat", "nr_free_pages 1\noom_kill 4")
    assert Cgroup(None, None, tmp_path, counters).oom_kills() == 4
    assert Cgroup(None, None, tmp_path, tmp_path / "missing").oom_kills() is None
