"""Runs a function on several gloo ranks that are forked from the test's own process.

Forking a process that has torch loaded takes a few milliseconds where spawning one takes seconds,
and the function may be a closure. The price is one rule: the parent must not have run autograd's
or OpenMP's thread pools, because a child inherits their locks but not their threads. So reference
runs belong into a child too, if need be a world of one.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import gc
import itertools
import os
import pickle
import selectors
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch._dynamo  # the first optimizer imports it, which would cost each child two seconds
import torch.distributed as dist

__all__ = ["RankError", "run_ranks"]

Result = TypeVar("Result")

_READ_BYTES = 1 << 20
_STACKS_BEFORE_S = 1.0  # the stacks of hanging ranks are written this long before the timeout


class RankError(AssertionError):
    """A rank raised, ended without an answer, or did not answer in time."""

    def __init__(self, message: str, *, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


@dataclass
class _Child:
    """One forked rank, and what it has reported so far."""

    rank: int
    pid: int
    pipe: int
    received: bytearray = field(default_factory=bytearray)
    ended: bool = False


@dataclass
class _Family:
    """The forked ranks, and a pipe that nobody writes to: it ends when the parent does."""

    leash: int
    leash_of_parent: int
    children: list[_Child] = field(default_factory=list)


@dataclass(frozen=True)
class _World:
    """What every rank of one run has in common."""

    size: int
    folder: Path
    timeout_s: float
    process_group: bool


def run_ranks(
    fn: Callable[[int, int], Result],
    world: int = 2,
    timeout: float = 60,
    *,
    process_group: bool = True,
) -> list[Result]:
    """Return `[fn(0, world), fn(1, world), ...]`, each computed in its own forked gloo rank.

    The first exception of any rank ends all of them and is raised here as a :class:`RankError`
    which names the rank and carries the traceback; its cause is the exception itself where that
    survives pickling. `timeout` is in seconds and covers everything.
    """
    with tempfile.TemporaryDirectory(prefix="zeroshard-ranks-") as folder, _family() as family:
        common = _World(world, Path(folder), timeout, process_group)
        for rank in range(world):
            family.children.append(_fork(fn, rank, common, family))
        _collect(family.children, common)
        return [_result(child) for child in family.children]


@contextlib.contextmanager
def _family() -> Iterator[_Family]:
    """Children none of which outlives the block, not even as a zombie."""
    family = _Family(*os.pipe())
    try:
        yield family
    finally:
        for child in family.children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
        for child in family.children:
            os.waitpid(child.pid, 0)
            os.close(child.pipe)
        os.close(family.leash)
        os.close(family.leash_of_parent)


def _fork(
    fn: Callable[[int, int], Any],
    rank: int,
    world: _World,
    family: _Family,
) -> _Child:
    sys.stdout.flush()  # else each child would write the parent's buffered text once more
    sys.stderr.flush()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        os.close(family.leash_of_parent)
        _be_a_rank(fn, rank, world, writing, family.leash)
    os.close(writing)
    os.set_blocking(reading, False)
    return _Child(rank, pid, reading)


def _be_a_rank(
    fn: Callable[[int, int], Any],
    rank: int,
    world: _World,
    writing: int,
    leash: int,
) -> NoReturn:
    """The whole life of a child: it reports through the pipe and leaves by `os._exit`.

    The interpreter's own exit would run the parent's exit handlers, and gloo's threads sometimes
    abort in it.
    """
    try:
        with (world.folder / f"stacks-{rank}").open("w") as stacks:
            patience = max(world.timeout_s - _STACKS_BEFORE_S, 0.1)
            faulthandler.dump_traceback_later(patience, file=stacks)
            try:
                _join(rank, world)
                report = _pickled_result(fn(rank, world.size))
            except BaseException as error:
                report = _pickled_error(error)
            faulthandler.cancel_dump_traceback_later()
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(report)
        sys.stdout.flush()
        sys.stderr.flush()
        # A rank that is still inside its last collective would fail on a closed connection, so wait
        # for the parent, which ends all ranks at once, or for its death, which closes the leash.
        os.read(leash, 1)
    finally:
        os._exit(0)


def _join(rank: int, world: _World) -> None:
    gc.freeze()  # what the parent left is not this rank's garbage; to walk it would copy it
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world.size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world.size),
        OMP_NUM_THREADS="1",
    )
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if world.process_group:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(world.folder / "store"), world.size),
            rank=rank,
            world_size=world.size,
            timeout=datetime.timedelta(seconds=world.timeout_s),
        )


def _pickled_result(result: Any) -> bytes:
    return pickle.dumps(("result", result), pickle.HIGHEST_PROTOCOL)


def _pickled_error(error: BaseException) -> bytes:
    text = "".join(traceback.format_exception(error))
    try:
        copy = pickle.dumps(error)
        pickle.loads(copy)
    except Exception:
        copy = None
    return pickle.dumps(("error", (text, copy)), pickle.HIGHEST_PROTOCOL)


def _collect(children: list[_Child], world: _World) -> None:
    """Read all reports; raise on the first failure or when the time is over."""
    deadline = time.monotonic() + world.timeout_s
    with selectors.DefaultSelector() as selector:
        for child in children:
            selector.register(child.pipe, selectors.EVENT_READ, child)
        while selector.get_map():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise RankError(_timeout_message(children, world))
            for key, _ in selector.select(remaining):
                child: _Child = key.data
                while chunk := _read(child.pipe):
                    child.received += chunk
                if chunk is None:
                    continue
                selector.unregister(child.pipe)
                child.ended = True
                _raise_if_failed(child)


def _read(pipe: int) -> bytes | None:
    """What the pipe holds; None when it is empty for now, no bytes when it has been closed."""
    try:
        return os.read(pipe, _READ_BYTES)
    except BlockingIOError:
        return None


def _raise_if_failed(child: _Child) -> None:
    if not child.received:
        raise RankError(
            f"rank {child.rank} ended without an answer (crashed or killed)", rank=child.rank
        )
    kind, content = pickle.loads(child.received)
    if kind == "error":
        text, copy = content
        cause = None if copy is None else pickle.loads(copy)
        raise RankError(f"rank {child.rank} raised\n\n{text}", rank=child.rank) from cause


def _result(child: _Child) -> Any:
    return pickle.loads(child.received)[1]


def _timeout_message(children: list[_Child], world: _World) -> str:
    silent = [child.rank for child in children if not child.ended]
    lines = [f"ranks {silent} gave no answer in {world.timeout_s:g} s"]
    for rank in silent:
        lines.append(f"--- rank {rank}, most recent call first ---")
        stacks = world.folder / f"stacks-{rank}"
        text = stacks.read_text() if stacks.exists() else ""
        # What called the function is the same in every rank, and long.
        inner = itertools.takewhile(lambda line: __file__ not in line, text.splitlines())
        lines += [line for line in inner if line.startswith("  ")]
    return "\n".join(lines)
