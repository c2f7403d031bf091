"""Real ranks through the command: how they start, fail, are killed, restarted and interrupted."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import psutil
import pytest

from zeroshard.host import cgroup

ZEROSHARD = [sys.executable, "-m", "zeroshard"]
Write = Callable[[str], str]
PATIENCE_S = 30
PIPE_IS_FULL = 60000
# What most scripts below begin with.
HEAD = """\
import os, pathlib, signal, subprocess, sys, time
rank = os.environ["RANK"]
here = pathlib.Path(__file__).parent
def leave(name, text=""):
    new = here / f".{name}.new"  # of this name alone, and found by no pattern below
    new.write_text(text)
    new.replace(here / name)
"""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> str:
        path = tmp_path / "train.py"
        path.write_text(HEAD + text)
        return str(path)

    return write


def environment(**more: str) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return {**env, "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "", **more}


def launch(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*ZEROSHARD, *arguments],
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


@contextlib.contextmanager
def running(
    *arguments: str, prefix: tuple[str, ...] = (), tmp_path: Path, until: str = "ready*"
) -> Iterator[subprocess.Popen[str]]:
    """Yield a launcher whose two ranks have both left a file."""
    launcher = subprocess.Popen(
        [*prefix, *ZEROSHARD, "--num_gpus=2", *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(lambda: len(list(tmp_path.glob(until))) >= 2 or launcher.poll() is not None)
        assert launcher.returncode is None, launcher.communicate()[1]
        yield launcher
    finally:
        launcher.kill()
        launcher.communicate()


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        select.select([], [], [], 0.02)


def is_alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def num_waiting(stream: IO[str] | None) -> int:
    """The bytes in a pipe."""
    assert stream is not None
    (count,) = struct.unpack("i", fcntl.ioctl(stream, termios.FIONREAD, bytes(4)))
    return count


def pids(folder: Path, pattern: str) -> list[int]:
    return [int(path.read_text()) for path in sorted(folder.glob(pattern))]


def test_ranks_find_their_place_and_their_arguments_untouched(write: Write, tmp_path: Path) -> None:
    script = write(
        "import json\nleave(rank + '.json', json.dumps([sys.argv[1:], dict(os.environ)]))\n"
    )
    theirs = ["--lr=1", "--", "$$HOME ${local_rank}", "--num_gpus", "9", "-q", ""]
    ended = launch("--num_gpus", "2", "--pass_local_rank", script, *theirs)
    assert ended.returncode == 0, ended.stderr
    assert "2 ranks on the CPU" in ended.stderr
    for rank in range(2):
        argv, env = json.loads((tmp_path / f"{rank}.json").read_text())
        assert argv == [f"--local_rank={rank}", *theirs]
        assert (env["RANK"], env["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"], env["LOCAL_SIZE"]) == ("2", "2", "2")
        assert (env["CROSS_RANK"], env["CROSS_SIZE"]) == ("0", "1")
        assert env["MASTER_ADDR"] == "127.0.0.1"
        assert 0 < int(env["MASTER_PORT"]) < 65536
        assert int(env["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)


def test_ranks_meet_in_a_process_group_at_the_port_that_is_kept_for_them(write: Write) -> None:
    script = write(
        "import atexit, torch, torch.distributed as dist\n"
        "from zeroshard.core.world import init_distributed\n"
        "at_exit = lambda: os.write(1, b'joined at exit: %r\\n' % dist.is_initialized())\n"
        "atexit.register(at_exit)\n"
        "init_distributed()\n"
        "total = torch.tensor(dist.get_rank() + 1)\n"
        "dist.all_reduce(total)\n"
        "os.write(1, b'total %d\\n' % total.item())\n"
        "if rank == '1':\n"
        "    raise ValueError('the cause')\n"
        "dist.all_reduce(total)\n"
    )
    ended = launch("-q", "--num_gpus=2", script)
    assert ended.stdout.count("total 3\n") == 2
    # Gloo's threads must have ended by now: one that outlives the interpreter aborts the process.
    assert "joined at exit: False\n" in ended.stdout
    assert ended.returncode == 1
    last = ended.stderr[ended.stderr.rindex("zeroshard: ") :]
    assert last.startswith("zeroshard: rank 1 of 2 failed with exit code 1")
    assert last.endswith("ValueError: the cause\n")


def test_the_rank_that_fails_is_named_and_its_exit_code_returned(write: Write) -> None:
    script = write("if rank == '1': sys.exit(7)\ntime.sleep(60)\n")
    ended = launch("--num_gpus=2", script)
    assert ended.returncode == 7
    assert f"rank 1 of 2 failed with exit code 7 ({script})" in ended.stderr
    assert "rank 1 wrote nothing to stderr" in ended.stderr
    assert "rank 0" not in ended.stderr


def test_the_last_lines_are_known_even_of_a_rank_that_leaves_no_traceback(write: Write) -> None:
    script = write(
        "for step in range(200): print('step', step, file=sys.stderr)\n"
        "if rank == '0': time.sleep(60)\n"
        "os._exit(3)\n"
    )
    ended = launch("--num_gpus=2", script)
    assert ended.returncode == 3
    told = ended.stderr[ended.stderr.index("Its last lines:") :]
    assert "step 199" in told
    assert "step 159\n" not in told
    assert "step 0\nstep 1\n" in ended.stderr  # and everything went to the console


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_death_by_signal_is_not_a_success(write: Write, number: signal.Signals) -> None:
    script = write(
        "print('about to die', file=sys.stderr)\n"
        f"if rank == '1': os.kill(os.getpid(), {int(number)})\n"
        "time.sleep(60)\n"
    )
    ended = launch("--num_gpus=2", script)
    assert ended.returncode == 128 + number
    assert f"rank 1 of 2 was ended by {number.name}" in ended.stderr
    assert "about to die" in ended.stderr[ended.stderr.index("Its last lines:") :]
    assert ("ran out of memory" in ended.stderr) == (number == signal.SIGKILL)


def test_a_rank_that_raised_first_is_the_cause_though_another_ends_first(write: Write) -> None:
    script = write(
        "def read_until_peer_raised():\n"
        "    while not (here / 'raised').exists(): pass\n"
        "if rank == '0':\n"
        "    read_until_peer_raised()\n"
        "    raise ConnectionError('the peer has gone')\n"
        "import atexit\n"
        "atexit.register(lambda: (leave('raised'), time.sleep(0.5)))\n"
        "raise ValueError('the cause')\n"
    )
    ended = launch("--num_gpus=2", script)
    assert "rank 1 of 2 failed with exit code 1" in ended.stderr
    assert "After it: rank 0 (exit code 1)." in ended.stderr
    assert ended.stderr.endswith("ValueError: the cause\n")


def test_a_rank_that_exits_slowly_is_the_cause_though_others_lose_it_first(write: Write) -> None:
    script = write(
        "if rank == '0':\n"
        "    raise RuntimeError('[gloo/transport/tcp/pair.cc:547] Connection closed by peer')\n"
        "print('giving up', file=sys.stderr)\n"
        "time.sleep(0.5)\n"
        "sys.exit(9)\n"
    )
    done = launch("--num_gpus=2", script)
    assert done.returncode == 9
    assert "rank 1 of 2 failed with exit code 9" in done.stderr
    assert "Its last lines:\n  giving up" in done.stderr


def test_a_reader_that_goes_away_changes_neither_restarts_nor_the_exit_code(
    write: Write, tmp_path: Path
) -> None:
    script = write("leave('attempt' + os.environ['TORCHELASTIC_RESTART_COUNT']); sys.exit(5)\n")
    reader, writer = os.pipe()
    os.close(reader)
    command = [*ZEROSHARD, "--max_restarts=2", script]
    done = subprocess.run(
        command, env=environment(), stderr=writer, timeout=PATIENCE_S, check=False
    )
    os.close(writer)
    assert done.returncode == 5
    assert len(list(tmp_path.glob("attempt*"))) == 3


def test_a_reader_that_has_stopped_reading_does_not_keep_anything_from_ending(
    write: Write, tmp_path: Path
) -> None:
    script = write(
        "leave('ready' + rank, str(os.getpid()))\nwhile True:\n    os.write(2, bytes(100000))\n"
    )
    with running(script, tmp_path=tmp_path) as launcher:
        # Until the pipe is full, which nobody reads here.
        wait_for(lambda: num_waiting(launcher.stderr) >= PIPE_IS_FULL)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(10) == 128 + signal.SIGTERM
    assert not any(is_alive(pid) for pid in pids(tmp_path, "ready*"))


def test_streams_that_are_closed_are_nobody_elses(write: Write, tmp_path: Path) -> None:
    script = write("sys.stderr.write('x' * 1000000)\nleave('done')\nsys.exit(3)\n")
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *ZEROSHARD, script]
    done = subprocess.run(command, env=environment(), timeout=PATIENCE_S, check=False)
    assert done.returncode == 3
    assert (tmp_path / "done").exists()


def test_output_goes_to_a_file_per_rank_and_only_the_launchers_words_to_the_console(
    write: Write, tmp_path: Path
) -> None:
    script = write(
        "print('out', rank); print('err', rank, file=sys.stderr)\n"
        "if rank == '1': raise ValueError('the cause')\n"
        "time.sleep(60)\n"
    )
    logs = tmp_path / "deep" / "logs"
    ended = launch("--num_gpus=2", f"--enable_each_rank_log={logs}", script)
    assert ended.returncode == 1
    assert ended.stdout == ""
    files = sorted(logs.iterdir())
    assert [file.name[14:] for file in files] == ["_rank0.log", "_rank1.log"]
    assert all(file.name[:14].isdigit() for file in files)
    assert files[1].read_text().startswith("out 1\nerr 1\nTraceback")
    assert "err" not in ended.stderr
    assert f"Its last lines (all are in {files[1]}):" in ended.stderr
    assert ended.stderr.endswith("ValueError: the cause\n")


def test_ranks_are_restarted_together_and_told_so(write: Write, tmp_path: Path) -> None:
    script = write(
        "attempt = os.environ['TORCHELASTIC_RESTART_COUNT']\n"
        "leave(f'attempt{attempt}.{rank}')\n"
        "if attempt < '2' and rank == '1': sys.exit(5)\n"
        "if attempt < '2': time.sleep(60)\n"
    )
    ended = launch("--num_gpus=2", "--max_restarts=3", script)
    assert ended.returncode == 0
    assert ended.stderr.count("rank 1 of 2 failed with exit code 5") == 2
    assert "restarting all 2 ranks (restart 2 of 3)" in ended.stderr
    assert {path.name for path in tmp_path.glob("attempt2.*")} == {"attempt2.0", "attempt2.1"}


def test_restarts_end_and_the_last_failure_counts(write: Write) -> None:
    ended = launch("--max_restarts=1", write("sys.exit(6)\n"))
    assert ended.returncode == 6
    assert ended.stderr.count("restarting 1 rank (restart 1 of 1)") == 1


def test_processes_of_processes_end_with_a_failed_run_wherever_they_went(
    write: Write, tmp_path: Path
) -> None:
    script = write(
        "child = 'import os, sys, time; open(sys.argv[1], \"w\").write(str(os.getpid()));'\n"
        "child += 'time.sleep(60)'\n"
        "for number in range(2):\n"
        "    name = str(here / f'child{rank}{number}')\n"
        "    command = [sys.executable, '-S', '-c', child, name]\n"
        "    if number:  # an orphan in a session of its own\n"
        "        command = ['sh', '-c', 'setsid \"$@\" & exit 0', 'sh', *command]\n"
        "    subprocess.Popen(command)\n"
        "while sum(bool(p.read_text()) for p in here.glob('child*')) < 4: time.sleep(0.01)\n"
        "if rank == '1': sys.exit(1)\n"
        "time.sleep(60)\n"
    )
    ended = launch("--num_gpus=2", script)
    assert ended.returncode == 1
    found = pids(tmp_path, "child*")
    assert len(found) == 4
    assert not any(is_alive(pid) for pid in found)


def test_what_a_good_run_leaves_behind_is_left_alone(write: Write, tmp_path: Path) -> None:
    script = write(
        "child = subprocess.Popen(['sleep', '30'], stderr=subprocess.DEVNULL,\n"
        "                         stdout=subprocess.DEVNULL, start_new_session=True)\n"
        "leave('child', str(child.pid))\n"
        "os._exit(0)\n"
    )
    assert launch("--num_gpus=1", script).returncode == 0
    (pid,) = pids(tmp_path, "child")
    assert is_alive(pid)
    os.kill(pid, signal.SIGKILL)


def test_a_rank_that_will_not_listen_is_killed_in_less_than_ten_seconds(
    write: Write, tmp_path: Path
) -> None:
    script = write(
        "if rank == '0':\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    leave('deaf', str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "while not (here / 'deaf').exists(): time.sleep(0.01)\n"
        "sys.exit(4)\n"
    )
    start_s = time.monotonic()
    ended = launch("--num_gpus=2", script)
    assert ended.returncode == 4
    assert time.monotonic() - start_s < 10
    assert not is_alive(*pids(tmp_path, "deaf"))


SLEEPER = "leave('ready' + rank, str(os.getpid()))\ntime.sleep(60)\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_launcher_ends_every_rank(
    write: Write, tmp_path: Path, number: signal.Signals
) -> None:
    with running(write(SLEEPER), tmp_path=tmp_path) as launcher:
        launcher.send_signal(number)
        _, stderr = launcher.communicate(timeout=PATIENCE_S)
    assert launcher.returncode == 128 + number
    assert stderr.endswith(f"zeroshard: {number.name} arrived; ending all 2 ranks\n")
    assert not any(is_alive(pid) for pid in pids(tmp_path, "ready*"))


def test_a_rank_has_time_to_save_when_the_launcher_is_told_to_end(
    write: Write, tmp_path: Path
) -> None:
    """More than the five seconds that ranks have after another one failed."""
    script = write(
        "def save(*_):\n"
        "    time.sleep(6)\n"
        "    leave('saved' + rank, '')\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\n" + SLEEPER
    )
    with running(script, tmp_path=tmp_path) as launcher:
        launcher.send_signal(signal.SIGTERM)
        launcher.communicate(timeout=PATIENCE_S)
    assert launcher.returncode == 128 + signal.SIGTERM
    assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()


def test_a_hangup_that_was_ignored_before_stays_ignored(write: Write, tmp_path: Path) -> None:
    script = write(SLEEPER)
    nohup = (sys.executable, "-S", "-c", NOHUP)
    with running(script, prefix=nohup, tmp_path=tmp_path) as launcher:
        launcher.send_signal(signal.SIGHUP)
        launcher.send_signal(signal.SIGTERM)
        _, stderr = launcher.communicate(timeout=PATIENCE_S)
    assert launcher.returncode == 128 + signal.SIGTERM
    assert "SIGHUP" not in stderr


NOHUP = """\
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_ranks_do_not_outlive_a_launcher_that_is_killed(write: Write, tmp_path: Path) -> None:
    with running(write(SLEEPER), tmp_path=tmp_path) as launcher:
        launcher.kill()
        launcher.wait()
        wait_for(lambda: not any(is_alive(pid) for pid in pids(tmp_path, "ready*")))


class Terminal:
    """A launcher in a terminal of its own, where Ctrl-C can be typed."""

    COLUMNS = 91

    def __init__(self, *arguments: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            try:
                size = struct.pack("4H", 20, self.COLUMNS, 0, 0)
                fcntl.ioctl(0, termios.TIOCSWINSZ, size)
                signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored by jobs in the background
                os.execve(sys.executable, [*ZEROSHARD, *arguments], environment())
            finally:
                os._exit(127)
        self.shown = ""

    def wait_for(self, text: str, count: int = 1) -> None:
        while self.shown.count(text) < count:
            assert self._read(), self.shown

    def press_ctrl_c(self) -> None:
        os.write(self.fd, b"\x03")

    def exit_code(self) -> int:
        while self._read():
            pass
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self) -> bool:
        ready, _, _ = select.select([self.fd], [], [], PATIENCE_S)
        assert ready, self.shown
        try:
            data = os.read(self.fd, 1 << 16)
        except OSError:  # how a terminal says that nobody is left
            return False
        self.shown += data.decode()
        return bool(data)


def test_ctrl_c_ends_everything_once_with_one_short_message(write: Write, tmp_path: Path) -> None:
    script = write(
        "leave('ready' + rank, str(os.getpid()))\n"
        "try:\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "finally:\n"
        "    print('cleaned up', file=sys.stderr)\n"
    )
    terminal = Terminal("--num_gpus=2", script)
    terminal.wait_for("ready", 2)
    terminal.press_ctrl_c()
    assert terminal.exit_code() == 130
    assert terminal.shown.count("cleaned up") == 2  # each rank was interrupted, and only once
    after = terminal.shown[terminal.shown.index("SIGINT") :]
    assert "SIGINT arrived; ending all 2 ranks (Ctrl-C again ends them at once)" in after
    assert "Traceback" not in after
    assert not any(is_alive(pid) for pid in pids(tmp_path, "ready*"))


def test_ranks_may_clean_up_when_their_terminal_goes_away(write: Write, tmp_path: Path) -> None:
    script = write(
        "def finish(*_):\n"
        "    leave('cleaned' + rank)\n"
        "    sys.exit()\n"
        "signal.signal(signal.SIGTERM, finish)\n"
        "os.write(1, b'ready')\n"
        "time.sleep(60)\n"
    )
    terminal = Terminal("--num_gpus=2", script)
    terminal.wait_for("ready", 2)
    os.close(terminal.fd)
    status = os.waitpid(terminal.pid, 0)[1]
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    assert len(list(tmp_path.glob("cleaned*"))) == 2


def test_a_second_ctrl_c_ends_ranks_that_are_busy_at_once(write: Write, tmp_path: Path) -> None:
    script = write(
        "def busy(*_):\n"
        "    print('saving', flush=True)\n"
        "    time.sleep(60)\n"
        "signal.signal(signal.SIGINT, busy)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "leave('ready' + rank, str(os.getpid()))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    terminal = Terminal("--num_gpus=2", script)
    terminal.wait_for("ready", 2)
    terminal.press_ctrl_c()
    terminal.wait_for("saving", 2)
    start_s = time.monotonic()
    terminal.press_ctrl_c()
    assert terminal.exit_code() == 130
    assert time.monotonic() - start_s < 2.5
    assert not any(is_alive(pid) for pid in pids(tmp_path, "ready*"))


def test_ranks_write_to_a_terminal_where_the_launcher_does(write: Write) -> None:
    script = write(
        "print(sys.stderr.isatty(), file=sys.stderr)\n"
        "if sys.stderr.isatty(): print(os.get_terminal_size(2)[0], file=sys.stderr)\n"
    )
    terminal = Terminal("-q", script)
    assert terminal.exit_code() == 0
    assert terminal.shown == f"True\r\n{Terminal.COLUMNS}\r\n"
    assert launch("-q", script).stderr == "False\n"


def test_progress_bars_pass_through_and_only_their_last_state_is_repeated(write: Write) -> None:
    script = write(
        "for step in range(50): sys.stderr.write(f'\\r{step}/50')\n"
        "sys.stderr.flush()\nsys.exit(2)\n"
    )
    ended = launch("-q", script)
    assert "\r0/50\r1/50" in ended.stderr.replace("\n", "\r")
    assert "Its last lines:\n  49/50\n" in ended.stderr


@contextlib.contextmanager
def memory_limited_group(limit_bytes: int) -> Iterator[Path]:
    """Yield a control group inside our own that has a small memory limit."""
    ours = cgroup.of_this_process().memory
    if ours is None:
        pytest.skip("this process is in no memory control group")
    group = ours / f"zeroshard-test-{os.getpid()}"
    limit = "memory.max" if (ours / "memory.max").exists() else "memory.limit_in_bytes"
    try:
        group.mkdir()
        (group / limit).write_text(str(limit_bytes))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"a control group cannot be made here: {error}")
    try:
        yield group
    finally:
        group.rmdir()


def test_a_rank_killed_for_lack_of_memory_is_told_from_other_kills(write: Write) -> None:
    script = write("held = []\nwhile rank == '1': held.append(b'x' * (1 << 20))\ntime.sleep(60)\n")
    enter = (
        "import os, sys\n"
        "open(sys.argv[1], 'w').write(str(os.getpid()))\n"
        "os.execv(sys.argv[2], sys.argv[2:])\n"
    )
    with memory_limited_group(96 << 20) as group:
        ended = subprocess.run(
            [
                sys.executable,
                "-S",
                "-c",
                enter,
                str(group / "cgroup.procs"),
                *ZEROSHARD,
                "--num_gpus=2",
                script,
            ],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
    assert ended.returncode == 128 + signal.SIGKILL
    assert "rank 1 of 2 was ended by SIGKILL" in ended.stderr
    assert "out-of-memory killer ended it because host memory (RAM, not GPU memory)" in ended.stderr
    assert "limited to 96 MiB" in ended.stderr


def test_a_rank_refused_memory_says_so_itself(write: Write) -> None:
    script = write(
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 28, 1 << 28))\n"
        "bytearray(1 << 29)\n"
    )
    ended = launch("-q", script)
    assert ended.returncode == 1
    assert "MemoryError" in ended.stderr[ended.stderr.index("Its last lines") :]


def test_binding_holds_in_the_rank_and_sets_its_threads(write: Write, tmp_path: Path) -> None:
    script = write(
        "leave(rank, f'{sorted(os.sched_getaffinity(0))} {os.environ[\"OMP_NUM_THREADS\"]}')\n"
    )
    cpu = min(os.sched_getaffinity(0))
    ended = launch(f"--bind_core_list={cpu}", "--bind_cores_to_rank", script, OMP_NUM_THREADS="77")
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "0").read_text() == f"[{cpu}] 1"


def test_the_pid_file_is_there_while_the_launcher_runs_and_gone_after(
    write: Write, tmp_path: Path
) -> None:
    with running("--save_pid", write(SLEEPER), tmp_path=tmp_path) as launcher:
        said = launcher.stderr.readline()
        path = Path(said.rpartition("process id in ")[2].strip())
        assert path.name == f"{launcher.pid}.deepspeed"
        assert path.read_text() == str(launcher.pid)
        launcher.send_signal(signal.SIGTERM)
        launcher.communicate(timeout=PATIENCE_S)
    assert not path.exists()


def test_variables_of_a_file_reach_the_ranks(write: Write, tmp_path: Path) -> None:
    (tmp_path / "my_env").write_text("# for the ranks\n\nexport GREETING='hello world'\n")
    script = write("leave(rank + '.txt', os.environ['GREETING'])\n")
    ended = launch(script, DS_ENV_FILE=str(tmp_path / "my_env"))
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "0.txt").read_text() == "hello world"
    assert ended.stderr.count(f"1 variables from {tmp_path / 'my_env'}") == 1


def test_a_program_that_cannot_start_is_an_error_of_the_command_line(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("no program\n")
    program.chmod(0o755)
    ended = launch("--no_python", str(program))
    assert ended.returncode == 2
    assert f"{str(program)!r} cannot be started: Exec format error" in ended.stderr


def test_a_module_and_a_program_are_run_as_asked(write: Write, tmp_path: Path) -> None:
    write("print(sys.argv[1:])\n")
    assert (
        launch(
            "-m", "train", "x", PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
        ).stdout
        == "['x']\n"
    )
    assert launch("--no_python", "echo", "--pass", "x").stdout == "--pass x\n"


def test_the_launcher_starts_without_importing_torch() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", "import sys, zeroshard.launch.cli; print('torch' in sys.modules)"],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout == "False\n"
