"""How ranks end, which of several ends was the cause, and how that is told."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zeroshard.errors import compose

__all__ = ["Ended", "Failure", "describe", "first_failure"]

# What ranks do because of another: their watchdog aborts, or they lose their connection and raise.
_CONSEQUENCES = {signal.SIGABRT}
_LOST_CONNECTION = re.compile(
    r"gloo/transport/|ncclRemoteError|Connection was likely closed"
    r"|Connection (?:closed|reset) by peer|Broken pipe",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Failure:
    """How one rank failed, and its last lines."""

    rank: int
    exit_code: int  # minus the number of the signal that ended it
    time_s: float  # since the epoch
    last_lines: tuple[str, ...] = ()

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
    def is_lost_connection(self) -> bool:
        """Whether the rank raised because another did not answer any more."""
        return self.exit_code >= 0 and any(map(_LOST_CONNECTION.search, self.last_lines))

    @property
    def shell_code(self) -> int:
        """The exit code a shell would report."""
        return self.exit_code if self.exit_code > 0 else 128 - self.exit_code


@dataclass(frozen=True)
class Ended:
    """How a launch ended: the launcher's exit code, and what to tell when it is not 0."""

    exit_code: int
    message: str = ""


def first_failure(failures: Sequence[Failure]) -> Failure:
    """Choose the rank that failed on its own from those that fell with it.

    Clocks alone do not tell: a rank that was killed, or one that takes its time to exit, may be
    seen a moment after the peers that lost their connection to it.
    """
    return min(
        failures,
        key=lambda failure: (
            failure.exit_code >= 0 or -failure.exit_code in _CONSEQUENCES,
            failure.is_lost_connection,
            failure.time_s,
            failure.rank,
        ),
    )


def describe(
    failures: Sequence[Failure],
    num_ranks: int,
    script: str,
    *,
    oom_kills: int = 0,
    memory_limit_bytes: int | None = None,
    logs: Sequence[Path] = (),
) -> str:
    """Tell which rank failed first, how, and what else is known.

    Args:
        failures: the ranks that failed before the others were ended.
        num_ranks: the number of ranks of the job.
        script: what they ran.
        oom_kills: the processes that the kernel ended meanwhile because memory ran out.
        memory_limit_bytes: what the processes here may use of the host's memory, if limited.
        logs: the file of each rank's output, if it went to files.
    """
    first = first_failure(failures)
    how = (
        f"was ended by {first.signal_name}"
        if first.signal_name
        else f"failed with exit code {first.exit_code}"
    )
    fact = f"rank {first.rank} of {num_ranks} {how} ({script})."
    if oom_kills > 0:
        fact += f" {_out_of_memory(first, oom_kills, memory_limit_bytes)}"
    others = [
        f"rank {other.rank} ({other.signal_name or f'exit code {other.exit_code}'})"
        for other in sorted(failures, key=lambda failure: failure.rank)
        if other is not first
    ]
    if others:
        fact += f" After it: {', '.join(others)}."
    if first.last_lines:
        lines = "\n".join(f"  {line}" for line in first.last_lines)
        source = f" (all are in {logs[first.rank]})" if logs else ""
        fact += f"\n\nIts last lines{source}:\n{lines}"
    return compose(fact, hint=_hint(first, oom_kills))


def _out_of_memory(first: Failure, kills: int, limit_bytes: int | None) -> str:
    """Tell the part of the kernel's out-of-memory killer in a failure."""
    limit = "" if limit_bytes is None else f", which is limited to {_size(limit_bytes)}"
    cause = f"because host memory (RAM, not GPU memory) ran out{limit}."
    if first.exit_code == -signal.SIGKILL:
        return f"The kernel's out-of-memory killer ended it {cause}"
    processes = "a process" if kills == 1 else f"{kills} processes"
    return f"Meanwhile the kernel's out-of-memory killer ended {processes} here {cause}"


def _size(num_bytes: int) -> str:
    gib = num_bytes / 2**30
    return f"{gib:.1f} GiB" if gib >= 1 else f"{num_bytes / 2**20:.0f} MiB"


def _hint(first: Failure, oom_kills: int) -> str | None:
    if oom_kills > 0:
        return (
            "give the job more host memory (`--mem` under Slurm), or use less: fewer data loader "
            "workers, fewer ranks, no full copy of the model in each rank."
        )
    if first.exit_code == -signal.SIGKILL:
        return (
            "SIGKILL comes from outside the program, most often because the host ran out of "
            "memory (RAM); `dmesg` and the cluster's accounting tell."
        )
    if first.last_lines or first.signal_name:
        return None
    return f"rank {first.rank} wrote nothing to stderr; look at what it printed."
