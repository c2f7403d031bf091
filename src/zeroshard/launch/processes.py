"""The processes of one run of a job: started, watched and ended together.

One loop waits for whatever can happen: a rank writes, a process ends, a signal arrives. There are
no threads, so nothing here races. On Linux the launcher adopts what its ranks leave behind, so that
processes of processes are found and ended too, and the kernel ends the ranks should the launcher
itself be killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from zeroshard.errors import UsageError, compose
from zeroshard.launch.failure import Failure
from zeroshard.launch.output import Output

__all__ = ["Crew", "Signals", "Step", "adopting_orphans"]

Step = tuple[signal.Signals, float]
"""A signal, and the seconds that processes have to follow it."""

_LAST_LINES = 40
# A traceback older than this is not why a rank ends now.
_TEARDOWN_S = 5.0
# What the ranks leave behind has this long to follow each of SIGTERM and SIGKILL.
_LEFTOVERS_S = 1.0
_ASKS_TO_END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SCARCE = {errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE}
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_ON_LINUX = sys.platform == "linux"
_LIBC = ctypes.CDLL(None)


@dataclass
class Signals:
    """Signals that asked the launcher to end, in the order they came."""

    received: list[signal.Signals]
    wakeup: socket.socket  # readable after any signal, the end of a child included

    @classmethod
    @contextlib.contextmanager
    def watched(cls) -> Generator[Signals, None, None]:
        """Take note of signals in place of ending; those ignored already (nohup) stay ignored."""
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        signals = cls([], reader)
        handled = [name for name in _ASKS_TO_END if signal.getsignal(name) != signal.SIG_IGN]
        previous = {name: signal.signal(name, signals._note) for name in handled}
        previous[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        previous_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield signals
        finally:
            signal.set_wakeup_fd(previous_fd)
            for name, handler in previous.items():
                signal.signal(name, handler)
            reader.close()
            writer.close()

    def clear_wakeup(self) -> None:
        """Read what woke us; the handlers have noted what it was."""
        with contextlib.suppress(BlockingIOError):
            while self.wakeup.recv(4096):
                pass

    def _note(self, number: int, _frame: object) -> None:
        self.received.append(signal.Signals(number))


@contextlib.contextmanager
def adopting_orphans() -> Generator[None, None, None]:
    """Become the parent of processes whose own parent ends, where the system can do that."""
    if _ON_LINUX:
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        if _ON_LINUX:
            _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 0)


@dataclass
class _Process:
    """A rank that was started, and how it failed if it has."""

    rank: int
    popen: subprocess.Popen[bytes]
    output: Output
    error_file: Path
    failure: Failure | None = None

    @property
    def has_ended(self) -> bool:
        return self.popen.returncode is not None

    @property
    def is_failing(self) -> bool:
        """Whether the rank has raised a moment ago but not ended yet."""
        return not self.has_ended and self.output.traceback_time_s > time.time() - _TEARDOWN_S

    def look(self) -> None:
        """Find out whether the rank has ended, and take down how if it failed."""
        if self.has_ended or self.popen.poll() in (None, 0):
            return
        self.output.pass_on()
        now = time.time()
        raised = self.output.traceback_time_s
        self.failure = _from_error_file(self.error_file, self.rank, self.popen.returncode) or (
            Failure(
                self.rank,
                self.popen.returncode,
                time_s=raised if raised > now - _TEARDOWN_S else now,
                last_lines=tuple(self.output.last_lines(_LAST_LINES)),
            )
        )


class Crew:
    """All ranks of one run."""

    def __init__(self, signals: Signals) -> None:
        self._signals = signals
        self._processes: list[_Process] = []
        self._older = set(psutil.Process().children())
        self._selector = selectors.DefaultSelector()
        self._selector.register(signals.wakeup, selectors.EVENT_READ, signals.clear_wakeup)

    @property
    def all_ended(self) -> bool:
        """Whether no rank runs any more."""
        return all(process.has_ended for process in self._processes)

    @property
    def has_settled(self) -> bool:
        """Whether it is known who failed first.

        It is not while a rank that raised has not ended, or the one that the others lost.
        """
        lost = [failure.is_lost_connection for failure in self.failures]
        return self.all_ended or not (
            (lost and all(lost)) or any(process.is_failing for process in self._processes)
        )

    @property
    def failures(self) -> list[Failure]:
        """The ranks that have failed so far."""
        return [process.failure for process in self._processes if process.failure]

    @property
    def pids(self) -> list[int]:
        """The process of each rank."""
        return [process.popen.pid for process in self._processes]

    def start(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        *,
        output: Output,
        capture_stdout: bool,
        error_file: Path,
        cpus: frozenset[int] | None,
    ) -> None:
        """Start the next rank.

        Raises:
            UsageError: there is no such program, or it cannot be run.
        """
        try:
            popen = subprocess.Popen(
                command,
                env=env,
                stdout=output.writer if capture_stdout else None,
                stderr=output.writer,
                start_new_session=True,  # Ctrl-C reaches the launcher alone
                preexec_fn=partial(_before_exec, os.getpid(), cpus),  # noqa: PLW1509 - no threads here
            )
        except OSError as error:
            output.started()
            output.close()
            hint = (
                "the user may have too few processes or open files; `ulimit -a` tells."
                if error.errno in _SCARCE
                else "check that it is a program for this machine; a script needs a first line "
                "such as `#!/bin/sh`."
            )
            fact = f"{command[0]!r} cannot be started: {error.strerror}."
            raise UsageError(compose(fact, hint=hint)) from error
        output.started()
        rank = len(self._processes)
        self._processes.append(_Process(rank, popen, output, error_file))
        self._selector.register(output.reader, selectors.EVENT_READ, partial(self._pass_on, output))

    def wait(self, until: Callable[[], object], timeout_s: float | None = None) -> None:
        """Pass output on and take note of ends, until something holds or time is up."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            for process in self._processes:
                process.look()
            self._bury_orphans()
            left_s = None if deadline_s is None else deadline_s - time.monotonic()
            if until() or (left_s is not None and left_s <= 0):
                return
            for key, _ in self._selector.select(left_s):
                key.data()

    def end(self, steps: Sequence[Step]) -> None:
        """End every rank, and whatever they have started, by each signal in turn.

        A further signal from the user hurries through what is left of the signals.
        """
        heard = len(self._signals.received)
        ours = self._descendants()

        def is_hurried() -> bool:
            return len(self._signals.received) > heard

        for number, patience_s in steps:
            if number == signal.SIGINT:
                for process in self._processes:
                    process.output.drop_interrupts()
            for process in self._processes:
                process.popen.send_signal(number)  # does nothing to a process that has ended
            is_last = number == signal.SIGKILL
            self.wait(
                lambda last=is_last: self.all_ended or (is_hurried() and not last), patience_s
            )
            if self.all_ended:
                break
        for end in (psutil.Process.terminate, psutil.Process.kill):
            ours = [process for process in {*ours, *self._descendants()} if process.is_running()]
            for process in ours:
                with contextlib.suppress(psutil.Error):
                    end(process)
            psutil.wait_procs(ours, timeout=_LEFTOVERS_S)

    def close(self) -> None:
        """Pass on the last output and let go of the streams."""
        for process in self._processes:
            process.output.close()
        self._selector.close()

    def _pass_on(self, output: Output) -> None:
        if not output.pass_on():
            self._selector.unregister(output.reader)

    def _bury_orphans(self) -> None:
        """Collect processes that were adopted and have ended, or they would fill the table."""
        if not _ON_LINUX:
            return
        ranks = {process.popen.pid for process in self._processes if not process.has_ended}
        with contextlib.suppress(ChildProcessError):
            while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if ended.si_pid in ranks:
                    return  # it ended just now and has rung the bell
                os.waitpid(ended.si_pid, 0)

    def _descendants(self) -> list[psutil.Process]:
        found = psutil.Process().children(recursive=True)
        return [process for process in found if process not in self._older]


def _before_exec(launcher: int, cpus: frozenset[int] | None) -> None:
    """Prepare a process that is about to become a rank."""
    if _ON_LINUX:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:  # the launcher has died already
            os._exit(1)
    if cpus is not None:
        os.sched_setaffinity(0, cpus)


def _from_error_file(path: Path, rank: int, exit_code: int) -> Failure | None:
    """Read what a rank left in torch's layout of error files, if it left anything."""
    if exit_code < 0:
        return None  # a signal ended it, not the error
    try:
        message: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["message"]
        extra: dict[str, Any] = message["extraInfo"]
        lines = str(extra["py_callstack"]).rstrip().splitlines()
        time_s = float(extra.get("time_s", extra["timestamp"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if len(lines) > _LAST_LINES:
        lines = [lines[0], "  ...", *lines[-_LAST_LINES:]]
    return Failure(rank, exit_code, time_s, tuple(lines))
