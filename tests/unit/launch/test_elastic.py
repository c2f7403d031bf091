from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from zeroshard.launch.elastic import (
    Failure,
    Job,
    _no_orphans,
    command,
    describe,
    first_failure,
    run,
)

JOB = Job("train.py", (), num_ranks=4)
ZEROSHARD = [sys.executable, "-m", "zeroshard"]


def environment() -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return {**env, "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*ZEROSHARD, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_ranks_find_their_place_and_their_arguments_untouched(tmp_path: Path) -> None:
    script = write(
        tmp_path / "train.py",
        "import json, os, pathlib, sys\n"
        "out = pathlib.Path(__file__).with_name(os.environ['RANK'] + '.json')\n"
        "out.write_text(json.dumps([sys.argv[1:], dict(os.environ)]))\n",
    )
    theirs = ["--lr=1", "--", "$$HOME ${local_rank}", "--num_gpus", "9", "-q", ""]
    ended = launch("--num_gpus", "2", "--pass_local_rank", script, *theirs)
    assert ended.returncode == 0, ended.stderr
    assert "2 ranks on the CPU" in ended.stderr
    for rank in range(2):
        argv, env = json.loads((tmp_path / f"{rank}.json").read_text())
        assert argv == [f"--local_rank={rank}", *theirs]
        assert (env["RANK"], env["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) == ("2", "2")
        assert env["MASTER_ADDR"] == "127.0.0.1"
        assert int(env["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)


def test_the_rank_that_fails_is_named_and_its_exit_code_returned(tmp_path: Path) -> None:
    script = write(
        tmp_path / "train.py",
        "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(7)\ntime.sleep(60)\n",
    )
    ended = launch("--num_gpus=2", script)
    assert ended.returncode == 7
    assert f"rank 1 of 2 failed with exit code 7 ({script})" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_last_message_is_the_traceback_of_the_rank_that_failed_first(tmp_path: Path) -> None:
    script = write(
        tmp_path / "train.py",
        "import torch, torch.distributed as dist\n"
        "from zeroshard.core.world import init_distributed\n"
        "init_distributed()\n"
        "if dist.get_rank() == 1:\n"
        "    raise ValueError('the cause')\n"
        "dist.all_reduce(torch.ones(1))\n",
    )
    ended = launch("-q", "--num_gpus=2", script)
    assert ended.returncode == 1
    last = ended.stderr[ended.stderr.rindex("zeroshard: ") :]
    assert last.startswith("zeroshard: rank 1 of 2 failed with exit code 1")
    assert last.endswith("ValueError: the cause\n")
    assert "elastic" not in last


def test_a_signal_ends_every_rank(tmp_path: Path) -> None:
    script = write(
        tmp_path / "train.py",
        "import os, pathlib, time\n"
        "pathlib.Path(__file__).with_name(os.environ['RANK'] + '.pid')"
        ".write_text(str(os.getpid()) + '.')\n"
        "time.sleep(60)\n",
    )
    launcher = subprocess.Popen(
        [*ZEROSHARD, "--num_gpus=2", script],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    files = [tmp_path / "0.pid", tmp_path / "1.pid"]
    deadline = time.monotonic() + 30
    while not all(file.exists() and file.read_text().endswith(".") for file in files):
        assert launcher.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    launcher.send_signal(signal.SIGTERM)
    _, stderr = launcher.communicate(timeout=30)
    assert launcher.returncode == 128 + signal.SIGTERM
    assert "SIGTERM arrived; all 2 ranks were ended" in stderr
    assert not any(psutil.pid_exists(int(file.read_text().rstrip("."))) for file in files)


def test_no_rank_outlives_a_launch_that_is_interrupted_for_good() -> None:
    with pytest.raises(KeyboardInterrupt), _no_orphans():
        rank = subprocess.Popen(["sleep", "60"], start_new_session=True)
        raise KeyboardInterrupt
    assert rank.wait(timeout=10) == -signal.SIGKILL


def test_arguments_survive_the_agents_templates() -> None:
    job = Job("a$b.py", ("$1", "${local_rank}"), num_ranks=1, pass_local_rank=True)
    assert command(job) == (
        sys.executable,
        ["-u", "a$$b.py", "--local_rank=${local_rank}", "$$1", "$${local_rank}"],
    )


def test_modules_run_with_python_and_programs_without() -> None:
    module = Job("package.train", ("x",), num_ranks=1, kind="module")
    assert command(module) == (sys.executable, ["-u", "-m", "package.train", "x"])
    program = Job("./a.out", ("x",), num_ranks=1, kind="executable", pass_local_rank=True)
    assert command(program) == ("./a.out", ["--local_rank=${local_rank}", "x"])


CONNECTION = Failure(0, 1, 100.2, "RuntimeError: connection closed")
KILLED_BY_US = Failure(2, -signal.SIGTERM, 100)


@pytest.mark.parametrize(
    ("cause", "others"),
    [
        (Failure(1, 1, 100.1, "ValueError: boom"), [CONNECTION, KILLED_BY_US]),
        (Failure(1, -signal.SIGKILL, 101), [CONNECTION]),  # seen late, when the agent looked
        (Failure(1, -signal.SIGSEGV, 101), [CONNECTION, KILLED_BY_US]),
        (Failure(1, 7, 100), [KILLED_BY_US]),
        (Failure(1, 1, 90, "ValueError: boom"), [Failure(0, -signal.SIGKILL, 120)]),  # 30 s later
        (Failure(1, -signal.SIGTERM, 100), []),
    ],
)
def test_the_first_failure_is_the_cause_of_the_others(
    cause: Failure, others: list[Failure]
) -> None:
    assert first_failure([*others, cause]) == cause
    assert first_failure([cause, *others]) == cause


def test_a_failure_is_described_by_rank_code_and_traceback() -> None:
    cause = Failure(1, 1, 100.1, "Traceback:\n  line\nValueError: boom\n")
    text = describe(cause, [CONNECTION, cause, KILLED_BY_US], JOB)
    assert text == (
        "rank 1 of 4 failed with exit code 1 (train.py). After it: rank 0 (exit code 1).\n\n"
        "Traceback:\n  line\nValueError: boom"
    )


def test_a_death_by_signal_names_the_signal() -> None:
    killed = Failure(3, -signal.SIGKILL, 1)
    text = describe(killed, [killed], JOB)
    assert "rank 3 of 4 was ended by SIGKILL (train.py)." in text
    assert "hint: SIGKILL often means that the host ran out of memory" in text
    assert killed.shell_code == 137
    assert Failure(3, -200, 1).signal_name == "signal 200"


def test_a_long_traceback_keeps_its_end() -> None:
    lines = ["Traceback:", *(f"  frame {number}" for number in range(100)), "ValueError: boom"]
    cause = Failure(0, 1, 1, "\n".join(lines))
    shown = describe(cause, [cause], JOB).splitlines()
    assert len(shown) < 50
    assert shown[-1] == "ValueError: boom"
    assert "  ..." in shown


def test_a_port_in_use_is_an_error_of_the_command_line(tmp_path: Path) -> None:
    import socket

    from zeroshard.errors import UsageError

    with socket.socket() as taken, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        script = write(tmp_path / "train.py", "")
        with pytest.raises(UsageError, match=f"port {port}"):
            run(Job(script, (), num_ranks=1, master_port=port))
