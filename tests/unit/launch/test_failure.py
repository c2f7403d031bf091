from __future__ import annotations

import signal
from pathlib import Path

import pytest

from zeroshard.launch.failure import Failure, describe, first_failure

CONNECTION = Failure(0, 1, 100.2, ("RuntimeError: connection closed",))
GLOO = Failure(3, 1, 99, ("RuntimeError: [/third_party/gloo/gloo/transport/tcp/pair.cc:547] x",))
STORE = Failure(4, 1, 99, ("DistNetworkError: Failed to recv. Connection was likely closed.",))
NCCL = Failure(5, 1, 99, ("DistBackendError: NCCL error", "ncclRemoteError: A call failed"))
WATCHDOG = Failure(2, -signal.SIGABRT, 100)


@pytest.mark.parametrize(
    ("cause", "others"),
    [
        (Failure(1, 1, 100.1, ("ValueError: boom",)), [CONNECTION]),
        (Failure(1, -signal.SIGKILL, 101), [CONNECTION, WATCHDOG]),  # seen late
        (Failure(1, -signal.SIGSEGV, 101), [CONNECTION]),
        (Failure(1, 7, 99), [CONNECTION, WATCHDOG]),
        (Failure(1, -signal.SIGTERM, 100), []),
        (Failure(1, 9, 100), [GLOO, STORE, NCCL]),  # takes its time to exit
        (Failure(1, -signal.SIGABRT, 100), [GLOO]),
    ],
)
def test_the_first_failure_is_the_cause_of_the_others(
    cause: Failure, others: list[Failure]
) -> None:
    assert first_failure([*others, cause]) == cause
    assert first_failure([cause, *others]) == cause


def test_a_failure_is_described_by_rank_code_and_last_lines() -> None:
    cause = Failure(1, 1, 100.1, ("Traceback:", "  line", "ValueError: boom"))
    assert describe([CONNECTION, cause], 4, "train.py") == (
        "rank 1 of 4 failed with exit code 1 (train.py). After it: rank 0 (exit code 1).\n\n"
        "Its last lines:\n  Traceback:\n    line\n  ValueError: boom"
    )
    logs = [Path("logs/0.log"), Path("logs/1.log")]
    assert "Its last lines (all are in logs/1.log):" in describe([cause], 2, "x", logs=logs)


def test_a_death_by_signal_names_the_signal_and_what_may_have_sent_it() -> None:
    killed = Failure(3, -signal.SIGKILL, 1)
    text = describe([killed], 4, "train.py")
    assert "rank 3 of 4 was ended by SIGKILL (train.py)." in text
    assert "most often because the host ran out of memory (RAM)" in text
    assert killed.shell_code == 137
    assert Failure(3, -200, 1).signal_name == "signal 200"


def test_the_out_of_memory_killer_is_named_with_the_limit() -> None:
    killed = Failure(3, -signal.SIGKILL, 1)
    text = describe([killed], 4, "train.py", oom_kills=1, memory_limit_bytes=3 << 29)
    assert "out-of-memory killer ended it because host memory (RAM, not GPU memory)" in text
    assert "limited to 1.5 GiB" in text
    assert "hint: give the job more host memory" in text


def test_a_rank_that_fell_with_a_worker_killed_for_memory_tells_so() -> None:
    fell = Failure(0, 1, 1, ("RuntimeError: DataLoader worker is killed by signal: Killed.",))
    text = describe([fell], 1, "train.py", oom_kills=2)
    assert "Meanwhile the kernel's out-of-memory killer ended 2 processes here" in text
    assert "limited" not in text
