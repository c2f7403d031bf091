"""Runs one process per GPU of this host, on torch's own elastic agent.

The agent starts the ranks, ends the others when one fails, and passes signals on. What is added
here is what its user meets: a meeting point that cannot collide with another job, arguments that
arrive as they were typed, and a last message that names the rank that failed first in place of the
agent's own traceback.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.utils.api import macros
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from zeroshard.errors import UsageError, compose

__all__ = [
    "Ended",
    "Failure",
    "Job",
    "Kind",
    "command",
    "describe",
    "first_failure",
    "num_visible_gpus",
    "run",
]

_LOOPBACK = "127.0.0.1"
_OMP_NUM_THREADS = "OMP_NUM_THREADS"
# A peer that loses its connection fails a moment after the rank that broke it.
_SAME_EVENT_S = 2.0
# Deaths that a rank does not die because a peer has gone.
_OWN_DEATHS = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
_TRACEBACK_LINES = 40

Kind = Literal["script", "module", "executable"]


@dataclass(frozen=True)
class Job:
    """What to run, how many times, and where the ranks meet.

    ``master_port`` None takes a port that is free.
    """

    script: str
    arguments: tuple[str, ...]
    num_ranks: int
    kind: Kind = "script"
    master_port: int | None = None
    pass_local_rank: bool = False


@dataclass(frozen=True)
class Failure:
    """How one rank ended, and its traceback if it left one."""

    rank: int
    exit_code: int  # minus the number of the signal that ended it
    time_s: float  # since the epoch
    traceback: str = ""

    @property
    def signal_name(self) -> str:
        """The signal that ended the rank, or an empty string."""
        if self.exit_code >= 0:
            return ""
        try:
            return signal.Signals(-self.exit_code).name
        except ValueError:
            return f"signal {-self.exit_code}"

    @property
    def shell_code(self) -> int:
        """The exit code a shell would report."""
        return self.exit_code if self.exit_code > 0 else 128 - self.exit_code


@dataclass(frozen=True)
class Ended:
    """How a launch ended: the launcher's exit code, and what to tell when it is not 0."""

    exit_code: int
    message: str = ""


def num_visible_gpus() -> int:
    """Count the GPUs that CUDA_VISIBLE_DEVICES leaves visible."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def run(job: Job) -> Ended:
    """Run a job to its end, however it ends."""
    os.environ.setdefault(_OMP_NUM_THREADS, str(max(1, _num_cores() // job.num_ranks)))
    executable, arguments = command(job)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="zeroshard-") as folder,
            _no_orphans(),
            _quiet_agent(),
        ):
            elastic_launch(_config(job, folder), executable)(*arguments)
    except ChildFailedError as error:
        failures = [_failure(rank, failure) for rank, failure in error.failures.items()]
        first = first_failure(failures)
        return Ended(first.shell_code, describe(first, failures, job))
    except SignalException as error:
        return Ended(
            128 + error.sigval,
            f"{error.sigval.name} arrived; all {job.num_ranks} ranks were ended.",
        )
    except dist.DistError as error:
        raise UsageError(
            compose(
                f"the ranks cannot meet at port {job.master_port} of this host. "
                f"{str(error).splitlines()[0]}",
                hint="leave --master_port out to take a port that is free.",
            )
        ) from error
    return Ended(0)


def command(job: Job) -> tuple[str, list[str]]:
    """Return the program and the arguments of every rank, as the agent wants them."""
    # The agent expands ${local_rank} in each argument; a doubled dollar comes out single.
    arguments = [argument.replace("$", "$$") for argument in (job.script, *job.arguments)]
    if job.pass_local_rank:
        arguments.insert(1, f"--local_rank={macros.local_rank}")
    if job.kind == "executable":
        return job.script, arguments[1:]
    return sys.executable, ["-u", *(["-m"] if job.kind == "module" else []), *arguments]


def first_failure(failures: Sequence[Failure]) -> Failure:
    """Choose the rank that failed on its own from those that fell with it.

    Clocks alone do not tell: a crash is seen when the agent looks, after peers that lost their
    connection have written down when they did.
    """
    start = min(failure.time_s for failure in failures)
    return min(
        (failure for failure in failures if failure.time_s <= start + _SAME_EVENT_S),
        key=lambda failure: (
            -failure.exit_code not in _OWN_DEATHS,
            failure.exit_code == -signal.SIGTERM,
            not failure.traceback,
            failure.time_s,
            failure.rank,
        ),
    )


def describe(first: Failure, failures: Sequence[Failure], job: Job) -> str:
    """Tell which rank failed, how, and what else is known."""
    how = (
        f"was ended by {first.signal_name}"
        if first.signal_name
        else f"failed with exit code {first.exit_code}"
    )
    parts = [f"rank {first.rank} of {job.num_ranks} {how} ({job.script})."]
    # SIGTERM is what the agent ends the others with, so it is not news.
    others = [
        f"rank {other.rank} ({other.signal_name or f'exit code {other.exit_code}'})"
        for other in sorted(failures, key=lambda failure: failure.rank)
        if other is not first and other.exit_code != -signal.SIGTERM
    ]
    if others:
        parts[0] += f" After it: {', '.join(others)}."
    if first.traceback:
        parts.append(_tail(first.traceback))
    return compose("\n\n".join(parts), hint=_hint(first))


def _hint(first: Failure) -> str | None:
    if first.exit_code == -signal.SIGKILL:
        return "SIGKILL often means that the host ran out of memory; the kernel log tells."
    if first.traceback or first.signal_name:
        return None
    return f"what rank {first.rank} printed is above, among the output of all ranks."


def _tail(text: str) -> str:
    lines = text.rstrip().splitlines()
    if len(lines) <= _TRACEBACK_LINES:
        return "\n".join(lines)
    return "\n".join([lines[0], "  ...", *lines[-_TRACEBACK_LINES:]])


def _failure(rank: int, failure: ProcessFailure) -> Failure:
    """Read what the agent found in a rank's error file."""
    message: Any = failure.message
    extra: dict[str, Any] = message.get("extraInfo", {}) if isinstance(message, dict) else {}
    return Failure(
        rank=rank,
        exit_code=failure.exitcode,
        time_s=float(extra.get("time_s", failure.timestamp)),
        traceback=str(extra.get("py_callstack", "")),
    )


def _config(job: Job, folder: str) -> LaunchConfig:
    """Describe one host without restarts, whose ranks meet at a store that the agent holds.

    Without a wish for a port the agent's store takes a free one and keeps it, so no other job can
    have it between choosing and use.
    """
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=job.num_ranks,
        run_id=uuid.uuid4().hex,
        role="rank",
        rdzv_backend="c10d" if job.master_port is None else "static",
        rdzv_endpoint=f"{_LOOPBACK}:{job.master_port or 0}",
        rdzv_configs={} if job.master_port is None else {"rank": 0},
        max_restarts=0,
        # The default would look this host up by name, which many containers cannot.
        local_addr=_LOOPBACK,
        logs_specs=DefaultLogsSpecs(log_dir=folder),
    )


def _num_cores() -> int:
    """Count the cores this process may use, which are fewer than the host's under Slurm."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def _quiet_agent() -> Generator[None, None, None]:
    """Keep the agent's warnings to itself: what matters of them is in our own message.

    LOGLEVEL, the agent's own switch, turns them on again.
    """
    log = logging.getLogger("torch.distributed.elastic")
    silence, propagate = logging.NullHandler(), log.propagate
    if "LOGLEVEL" not in os.environ:
        log.addHandler(silence)
        log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(silence)
        log.propagate = propagate


@contextlib.contextmanager
def _no_orphans() -> Generator[None, None, None]:
    """Kill what is left of the ranks: a third Ctrl-C interrupts even the agent's own ending."""
    before = {child.pid for child in psutil.Process().children()}
    try:
        yield
    finally:
        for child in psutil.Process().children():
            if child.pid not in before:
                with contextlib.suppress(OSError):
                    # Each rank leads its own process group, with the workers of its data loaders.
                    os.killpg(child.pid, signal.SIGKILL)
