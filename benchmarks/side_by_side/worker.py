"""One rank of a job: builds, trains, measures and forgets the engines, one after another.

Ranks tell each other through the store of the process group how each phase ended, because
collectives are of no use once a rank has left them. What an engine leaves behind when it fails is
unknown, so a failure is written down and ends the job; whoever started it starts another one for
the engines that remain, as when ranks end because an engine did not give its memory back. A rank
that fails alone, while others wait for it in a collective, ends the job after a short patience, and
so does one that waits when the engine's time is over.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any, NoReturn

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

import zeroshard
from side_by_side.claims import CLAIMS
from side_by_side.engines import Trainer, build, unavailable
from side_by_side.plan import HANDED_OVER, Entry, Plan
from side_by_side.profiles import profiled, summarize
from side_by_side.workload import SHAPES, Workload

__all__ = ["BROKEN", "work"]

BROKEN = 3  # the exit status of a job in which an engine failed
_PATIENCE_S = 20.0  # of a rank that has failed, with those that have not said so
_MOST_LEFT_GIB = 0.5  # by an engine, with which the next may be measured all the same
_MOST_LEFT_ON_HOST_GIB = 4.0  # beside what libraries take once and keep
_DATA_SEED = 1234
_GIB = 2**30


@dataclass(frozen=True)
class Failure:
    """Why an engine has no figures: a few words for a table, the message, and when it was."""

    status: str
    detail: str
    at: float


class _FailedError(Exception):
    """Some rank failed in a phase, and every rank knows."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.status)
        self.failure = failure


class _Rank:
    """This rank: its device, and its way to agree with the others about how a phase ended."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.number, self.world = dist.get_rank(), dist.get_world_size()
        self.on_gpu = torch.cuda.is_available()
        self.device = (
            torch.device("cuda", torch.cuda.current_device())
            if self.on_gpu
            else torch.device("cpu")
        )
        self._store = dist.PrefixStore("side_by_side", _get_default_store())
        self._rounds = 0
        self._deadline = time.monotonic() + plan.limit_s

    def together(self, phase: str, action: Callable[[], object]) -> list[Any]:
        """Run an action, wait for the device, and return what the action gave on each rank.

        Raises:
            _FailedError: it failed on some rank.
        """
        failure = None
        try:
            said: dict[str, Any] = {"value": action()}
            self.synchronize()
        except Exception as error:
            failure = _failure(phase, self.number, error)
            said = {"failure": asdict(failure)}
        heard = self._exchange(phase, said, failure)
        failures = [Failure(**each["failure"]) for each in heard if "failure" in each]
        if failures:  # the others may have failed because the first had left
            raise _FailedError(min(failures, key=lambda failure: failure.at))
        return [each["value"] for each in heard]

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def trim(self) -> None:
        """Give back memory that nothing uses."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def barrier(self) -> None:
        """Wait for all ranks on their devices, so that they leave at nearly the same time."""
        if self.world > 1:
            dist.barrier(device_ids=[self.device.index] if self.on_gpu else None)

    def begin(self) -> None:
        """Another engine has the time of the plan from now on."""
        self._deadline = time.monotonic() + self.plan.limit_s
        # A rank that waits for others says so at the deadline. If all hang, their stacks are shown.
        later = self.plan.limit_s + _PATIENCE_S
        faulthandler.dump_traceback_later(later, exit=True, file=sys.__stderr__)

    def _exchange(
        self, phase: str, said: dict[str, Any], failure: Failure | None
    ) -> list[dict[str, Any]]:
        self._rounds += 1
        keys = [f"{self._rounds}/{rank}" for rank in range(self.world)]
        self._store.set(keys[self.number], json.dumps(said))
        patience = max(self._deadline - time.monotonic(), 1.0)
        if failure is not None:
            patience = min(patience, _PATIENCE_S)
        try:
            self._store.wait(keys, timedelta(seconds=patience))
        except Exception:
            waited = f"rank {self.number} waited for others until the limit of the engine"
            self.leave(failure or Failure(f"hung ({phase})", waited, time.time()))
        return [json.loads(self._store.get(key)) for key in keys]

    def leave(self, failure: Failure | None = None) -> NoReturn:
        """End without the interpreter's exit, which waits for collectives that never end."""
        if failure is not None:
            path = self.plan.report / f"failure-{self.number}.json"
            path.write_text(json.dumps(asdict(failure)), encoding="utf-8")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(BROKEN)

    def leave_after_first(self) -> NoReturn:
        """End once rank 0 has written the report: whoever sees one rank end may end all.

        Rank 0 goes last, because the store goes with it.
        """
        gone = [f"gone/{rank}" for rank in range(1, self.world)]
        with contextlib.suppress(Exception):
            if self.number == 0:
                self._store.set("reported", "")
                self._store.wait(gone, timedelta(seconds=_PATIENCE_S))
            else:
                self._store.wait(["reported"], timedelta(seconds=_PATIENCE_S))
                self._store.set(gone[self.number - 1], "")
        self.leave()

    def say(self, text: str) -> None:
        if self.number == 0:
            print(text, file=sys.stderr, flush=True)

    def report(self, entry: Entry, **content: Any) -> None:
        """Append what was found about an engine to the report."""
        if self.number == 0:
            with (self.plan.report / "report.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"engine": entry.variant.label, **content}) + "\n")

    def hand_over(self) -> None:
        """Leave the engines that remain to other ranks, however these end."""
        if self.number == 0:
            (self.plan.report / HANDED_OVER).touch()


def work(plan: Plan) -> None:
    """Measure the engines of a plan, or those up to one that does not give its memory back.

    Every rank calls it; does not return if an engine fails.
    """
    # Later than ours, which knows what it was waiting for.
    zeroshard.init_distributed(timeout=timedelta(seconds=plan.limit_s + 2 * _PATIENCE_S))
    rank = _Rank(plan)
    for entry in plan.entries:
        rank.begin()
        began, name = time.perf_counter(), entry.variant.label
        if (reason := unavailable(entry.variant)) is not None:
            rank.say(f"{name}: {reason}")
            rank.report(entry, status=reason, result=None)
            continue
        try:
            result = _measure(rank, entry)
        except _FailedError as error:
            rank.say(f"{name}: {error.failure.status}: {error.failure.detail}")
            status, detail = error.failure.status, error.failure.detail
            rank.report(entry, status=status, detail=detail, result=None)
            rank.leave_after_first()
        rank.report(entry, status="ok", result=result)
        whole_s = time.perf_counter() - began
        rank.say(f"{name}: {result['median_s']:.4f} s a step, all in {whole_s:.0f} s")
        left_on_host = result["host_left_gib"] - result["host_before_gib"]
        if (result["left_gib"] or 0.0) > _MOST_LEFT_GIB or left_on_host > _MOST_LEFT_ON_HOST_GIB:
            rank.say(f"{name} does not give all its memory back; new ranks measure the others")
            rank.hand_over()
            break
    # What is left to do may hang, too, and everything has been reported.
    faulthandler.dump_traceback_later(_PATIENCE_S, exit=True, file=sys.__stderr__)
    with contextlib.suppress(Exception):
        dist.destroy_process_group()


def _measure(rank: _Rank, entry: Entry) -> dict[str, Any]:
    workload = entry.own_workload
    before = _allocated_gib(rank)
    host_before = sum(rank.together("start", _host_gib))
    began = time.perf_counter()
    built: list[Trainer] = []
    rank.together("build", lambda: built.append(build(entry.variant, workload, rank.device)))
    build_s = time.perf_counter() - began
    trainer = built.pop()
    rank.together("build", rank.trim)  # else an engine's reserved memory shows how it was built
    x = _tokens(rank, workload)
    losses: list[Tensor] = []
    for number in range(workload.warmup):
        rank.together(f"warm-up step {number}", lambda: losses.append(trainer.warm(x)))
    warmup_s = time.perf_counter() - began - build_s
    if rank.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    rank.together("steps", rank.barrier)
    by_rank = rank.together("steps", lambda: _timed(rank, trainer, x, losses, workload.steps))
    timed = list(zip(*by_rank, strict=True))
    memory = rank.together("memory", lambda: _memory(rank, trainer))
    host = sum(rank.together("memory", _host_gib))
    moved = rank.together("memory", lambda: _off_device(trainer))
    heard = rank.together("losses", lambda: torch.stack(losses).double().tolist())
    asked = CLAIMS[entry.claim].profiled if entry.claim else set[str]()
    wanted = {entry.variant.label, "all"} & {*rank.plan.profile, *asked}
    profile = _profile(rank, entry, trainer, x) if wanted else None
    optimizer = trainer.optimizer
    left = rank.together("end", lambda: _forget(rank, trainer))
    host_left = sum(rank.together("end", _host_gib))
    seconds = [max(whole for whole, _ in ranks) for ranks in timed]  # until the slowest is done
    allocated, reserved, used = (_most(ranks) for ranks in zip(*memory, strict=True))
    median = statistics.median(seconds)
    return {
        "parameters": trainer.parameters,
        "median_s": round(median, 5),
        "min_s": round(min(seconds), 5),
        "max_s": round(max(seconds), 5),
        "step_s": [round(each, 5) for each in seconds],
        "host_s": round(statistics.median(max(h for _, h in ranks) for ranks in timed), 5),
        "tokens_per_s_per_rank": round(workload.tokens / median, 1),
        "allocated_gib": allocated,
        "reserved_gib": reserved,
        "device_used_gib": used,
        "before_gib": before,
        "left_gib": _most(left),
        "host_gib": round(host, 3),
        "host_before_gib": round(host_before, 3),
        "host_left_gib": round(host_left, 3),
        **({"off_device": moved} if any(moved) else {}),
        **({"optimizer": optimizer} if optimizer else {}),
        "build_s": round(build_s, 2),
        "warmup_s": round(warmup_s, 2),
        "losses": [sum(ranks) / rank.world for ranks in zip(*heard, strict=True)],
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if rank.on_gpu else None,
        **({"profile": profile} if profile else {}),
    }


def _tokens(rank: _Rank, workload: Workload) -> Tensor:
    generator = torch.Generator(device=rank.device).manual_seed(_DATA_SEED + rank.number)
    vocab, shape = SHAPES[workload.model].vocab, (workload.batch, workload.seq)
    return torch.randint(0, vocab, shape, device=rank.device, generator=generator)


def _timed(
    rank: _Rank, trainer: Trainer, x: Tensor, losses: list[Tensor], steps: int
) -> list[tuple[float, float]]:
    """Seconds of some steps in a row, and of the host's part: until every kernel has been issued.

    Nobody waits between two steps, as nobody does in training: what a step leaves to be done under
    the next one counts there. The first step is not counted: it finds the device idle.
    """
    clock = _Clock(rank)
    clock.note()
    for _ in range(steps + 1):
        losses.append(trainer.step(x))
        clock.note()
    return clock.intervals()[1:]


class _Clock:
    """Times of the device, in order with the computation, and of the host."""

    def __init__(self, rank: _Rank) -> None:
        self._rank = rank
        self._events: list[torch.cuda.Event] = []
        self._host: list[float] = []

    def note(self) -> None:
        """Note when the computation is here, and when the host is."""
        if self._rank.on_gpu:
            self._events.append(torch.cuda.Event(enable_timing=True))
            self._events[-1].record()
        self._host.append(time.perf_counter())

    def intervals(self) -> list[tuple[float, float]]:
        """Seconds between what was noted: of the device, then of the host. Waits for the device."""
        self._rank.synchronize()
        host = [after - before for before, after in pairwise(self._host)]
        device = [before.elapsed_time(after) / 1e3 for before, after in pairwise(self._events)]
        return list(zip(device or host, host, strict=True))


def _memory(rank: _Rank, trainer: Trainer) -> tuple[float | None, float | None, float | None]:
    """Peaks of allocated and reserved memory, and all that is in use on the device, in GiB.

    The first two have what the engine holds beside torch's allocator, and the last what only the
    device knows of, such as NCCL's buffers.
    """
    if not rank.on_gpu:
        return None, None, None
    free, total = torch.cuda.mem_get_info()
    beside = trainer.bytes_beside()
    allocated_bytes = torch.cuda.max_memory_allocated() + beside
    found = allocated_bytes, torch.cuda.max_memory_reserved() + beside, total - free
    allocated, reserved, used = (round(each / _GIB, 3) for each in found)
    return allocated, reserved, used


def _host_gib() -> float:
    """Host memory of this process, page-locked included."""
    return psutil.Process().memory_info().rss / _GIB


def _off_device(trainer: Trainer) -> dict[str, int] | None:
    found = trainer.off_device()
    return None if found is None else asdict(found)


def _allocated_gib(rank: _Rank) -> float | None:
    return round(torch.cuda.memory_allocated() / _GIB, 3) if rank.on_gpu else None


def _most(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return max(found) if found else None


def _profile(rank: _Rank, entry: Entry, trainer: Trainer, x: Tensor) -> dict[str, Any] | None:
    name = re.sub(r"[^\w.-]+", "-", f"{entry.claim or entry.workload.model}-{entry.variant.label}")
    path = rank.plan.traces / f"trace-{name}-on-{rank.world}.json.gz"

    steps: list[Tensor] = []

    def action() -> dict[str, Any] | None:
        if rank.number != 0:
            trainer.step(x)
            return None
        try:
            return summarize(profiled(lambda: steps.append(trainer.step(x)), path))
        except Exception as error:
            if not steps:
                raise
            # The engine has its figures; it is the profiler that failed.
            return {"error": f"{type(error).__name__}: {error}"[:400]}

    return rank.together("profile", action)[0]


def _forget(rank: _Rank, trainer: Trainer) -> float | None:
    """Give everything back and return what is left of it, in GiB."""
    trainer.close()
    trainer.release()
    gc.collect()
    torch._dynamo.reset()
    rank.trim()
    return _allocated_gib(rank)


def _failure(phase: str, rank: int, error: Exception) -> Failure:
    message = str(error).strip()
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "?"
    traceback.print_exception(error)
    status = "out of memory" if isinstance(error, torch.OutOfMemoryError) else "failed"
    first = " ".join(message.split("\n\n")[0].split())[:400]
    detail = f"rank {rank}: {type(error).__name__}: {first} [{where}]"
    return Failure(f"{status} ({phase})", detail, time.time())
