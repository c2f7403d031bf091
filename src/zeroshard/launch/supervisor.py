"""Runs a job: all ranks to their end, again if they may be restarted, and never some of them."""

from __future__ import annotations

import contextlib
import logging
import signal
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from zeroshard.host import cgroup
from zeroshard.launch.failure import Ended, describe, first_failure
from zeroshard.launch.job import Job, rank_environment
from zeroshard.launch.output import STDERR, Output
from zeroshard.launch.processes import Crew, Signals, Step, adopting_orphans

__all__ = ["Say", "run"]

Say = Callable[[int, str], None]
"""Tells the user one message, of a level of :mod:`logging`."""

# How long ranks that have raised may take to end on their own, so that their exit codes count, and
# how long is waited for the rank to which the others have lost their connection.
_SETTLE_S = 2.0
# With what remains of the ranks' own processes, everything has ended within 10 seconds.
_AFTER_FAILURE: tuple[Step, ...] = ((signal.SIGTERM, 5.0), (signal.SIGKILL, 1.0))
# Who takes a host back usually waits for half a minute, in which a rank may save what it has.
_AFTER_REQUEST: tuple[Step, ...] = ((signal.SIGTERM, 25.0), (signal.SIGKILL, 1.0))
_AFTER_CTRL_C: tuple[Step, ...] = (
    (signal.SIGINT, 3.0),
    (signal.SIGTERM, 2.0),
    (signal.SIGKILL, 1.0),
)


def run(job: Job, say: Say) -> Ended:
    """Run a job to its end, however it ends, and restart it as often as it may be.

    It takes over the signals and the children of this process meanwhile.

    Raises:
        UsageError: the program cannot be started.
    """
    with Signals.watched() as signals, adopting_orphans():
        for attempt in range(job.max_restarts):
            ended = _run_once(job, attempt, signals, say)
            if ended.exit_code == 0 or signals.received:
                return ended
            say(logging.WARNING, ended.message)
            say(
                logging.WARNING,
                f"restarting {_ranks(job.num_ranks)} (restart {attempt + 1} of {job.max_restarts})",
            )
        return _run_once(job, job.max_restarts, signals, say)


def _run_once(job: Job, attempt: int, signals: Signals, say: Say) -> Ended:
    """Run every rank once; when this returns, nothing of a run that failed is left."""
    group = cgroup.of_this_process()
    kills_before = group.oom_kills()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="zeroshard-")))
        crew = Crew(signals)
        stack.callback(crew.close)
        try:
            for rank in range(job.num_ranks):
                sink = _sink(job, rank, stack)
                output = Output(sink, partial(_lost_output, say, rank), lambda: signals.received)
                _start(job, rank, attempt, crew, output, folder / f"{rank}.json")
        except BaseException:
            crew.end(_AFTER_FAILURE[-1:])
            raise
        say(logging.DEBUG, f"processes of the ranks: {', '.join(map(str, crew.pids))}")
        crew.wait(lambda: crew.failures or crew.all_ended or signals.received)
        if not signals.received:
            crew.wait(lambda: crew.has_settled or signals.received, _SETTLE_S)
        failures = crew.failures
        if signals.received:
            return _interrupted(job, crew, signals, say)
        if not failures:
            return Ended(0)
        crew.end(_AFTER_FAILURE)
    kills = group.oom_kills()
    return Ended(
        first_failure(failures).shell_code,
        describe(
            failures,
            job.num_ranks,
            job.script.name,
            oom_kills=0 if kills is None or kills_before is None else kills - kills_before,
            memory_limit_bytes=group.memory_limit_bytes(),
            logs=job.logs,
        ),
    )


def _start(job: Job, rank: int, attempt: int, crew: Crew, output: Output, error_file: Path) -> None:
    crew.start(
        job.script.command(rank if job.pass_local_rank else None),
        rank_environment(job, rank, attempt=attempt, error_file=str(error_file)),
        output=output,
        capture_stdout=bool(job.logs),
        error_file=error_file,
        cpus=job.cpus[rank] if job.cpus else None,
    )


def _sink(job: Job, rank: int, stack: contextlib.ExitStack) -> int:
    """Return the descriptor that a rank's output goes to."""
    if not job.logs:
        return STDERR
    # A restart continues the files of the run before it.
    return stack.enter_context(job.logs[rank].open("ab")).fileno()


def _lost_output(say: Say, rank: int, error: OSError) -> None:
    say(logging.WARNING, f"output of rank {rank} cannot be written: {error.strerror}")


def _interrupted(job: Job, crew: Crew, signals: Signals, say: Say) -> Ended:
    """End all ranks because the launcher was asked to end."""
    asked = signals.received[0]
    again = " (Ctrl-C again ends them at once)" if asked == signal.SIGINT else ""
    say(logging.ERROR, f"{asked.name} arrived; ending {_ranks(job.num_ranks)}{again}")
    crew.end(_AFTER_CTRL_C if asked == signal.SIGINT else _AFTER_REQUEST)
    return Ended(128 + asked)


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"all {count} ranks"
