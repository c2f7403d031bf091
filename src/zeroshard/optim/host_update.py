"""Steps of Adam on the host: state that is kept off the device is stepped without being moved.

[Note: steps on the host]
What moves is the gradient, out, and the weights in the dtype computed in, back. The gradient of a
unit leaves in backward, as soon as it is reduced, for a buffer in the depot of the unit's state.
The numbers that depend on all gradients, the factor of clipping and the flag of an overflow, follow
the last of them on the same stream. So the device is waited for once, by a thread of its own:

    computation   backward       norm | forward: each unit waits for its own weights
    outgoing      gradients of units  | numbers
    worker                                      unit 1   unit 2   unit 3
    back                                                 unit 1   unit 2   unit 3

The worker steps units in the order in which forward needs them, by torch's fused kernels, in chunks
that caches hold from one pass over them to the next. It leaves the weights where the gradient was,
which nobody needs any more; the buffer has room for the larger of the two. The *ticket* of a unit
makes the host wait until the way back of its weights is queued, and then the stream until they are
there.

If the worker fails, some units have been stepped and others have not. So every ticket and every
step after that raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from zeroshard.core.mesh import Aside, Mesh
from zeroshard.core.numa import bind
from zeroshard.core.ticket import Ticket
from zeroshard.core.unit import Unit
from zeroshard.errors import OffloadError, compose
from zeroshard.optim import adam
from zeroshard.optim.adam import Shards
from zeroshard.optim.fused import FusedAdam, Pass
from zeroshard.optim.on_its_way import OnItsWay

__all__ = ["HostUpdate", "Stepper", "Worker"]

_Result = TypeVar("_Result")

_CHUNK_NUMEL = 2**21  # 40 MB with the gradient and the weights: less than caches of many cores hold


class Worker:
    """A thread that works on several CPUs while the one that made it goes on.

    Args:
        cpus: where its work runs.
        num_threads: how many threads share the work of one operation.
    """

    def __init__(self, cpus: frozenset[int], num_threads: int) -> None:
        self._cpus, self.num_threads = cpus, num_threads
        self._pool: ThreadPoolExecutor | None = None

    def submit(self, work: Callable[[], _Result]) -> Future[_Result]:
        """Start work, once what was given before is over."""
        if self._pool is None:
            # The thread must not keep this object, or it would never end.
            own = self._cpus, self.num_threads
            self._pool = ThreadPoolExecutor(1, "zeroshard-update", _settle_in, own)
            self._pool.submit(torch.get_num_threads).result()
            # A number of threads is set for one thread, and for all that are new. Not for those.
            torch.set_num_threads(torch.get_num_threads())
        return self._pool.submit(work)

    def close(self) -> None:
        """Wait until all work is over, and end the thread."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _settle_in(cpus: frozenset[int], num_threads: int) -> None:
    bind(cpus)
    torch.get_num_threads()  # asked for the first time, it takes on that of the process
    torch.set_num_threads(num_threads)


class Stepper:
    """Torch's fused kernels on host tensors, in chunks."""

    def __init__(self) -> None:
        self._wide = torch.empty(0, dtype=torch.float32, device="cpu")

    def step(self, shards: Shards, rule: adam.Rule, factor: Tensor) -> None:
        """Make a step with a gradient times ``factor``, in place.

        ``out`` may lie in the memory of the gradient, of which its first elements take no more than
        those of the gradient that come up to there.
        """
        numel = shards.grad.numel()
        for start in range(0, numel, _CHUNK_NUMEL):
            cut = _range(shards, start, min(start + _CHUNK_NUMEL, numel))
            adam.update_(replace(cut, grad=self._widened(cut.grad)), rule, factor)

    def _widened(self, grad: Tensor) -> Tensor:
        """A gradient in fp32, in memory that is used again and again."""
        if grad.dtype == torch.float32:
            return grad
        if not self._wide.numel():
            self._wide = torch.empty(_CHUNK_NUMEL, dtype=torch.float32, device="cpu")
        return self._wide[: grad.numel()].copy_(grad)


def _range(shards: Shards, start: int, stop: int) -> Shards:
    return Shards(
        shards.grad[start:stop],
        shards.master[start:stop],
        shards.average[start:stop],
        shards.square[start:stop],
        None if shards.out is None else shards.out[start:stop],
    )


class _Room:
    """Memory of a unit's state depot for its gradient, and then for its weights."""

    def __init__(self, unit: Unit, dtype: torch.dtype) -> None:
        self._unit, self._numel = unit, unit.layout.shard_numel
        self._itemsize = max(dtype.itemsize, unit.dtype.itemsize)
        self.buffer = unit.state.take(self._numel * self._itemsize, torch.uint8)

    def holds(self, dtype: torch.dtype) -> bool:
        """Whether there is room for a gradient of a dtype."""
        return dtype.itemsize <= self._itemsize

    def gradient(self, dtype: torch.dtype) -> Tensor:
        """The gradient, at the end: weights are written from the beginning as it is used up."""
        return self.buffer[self._numel * (self._itemsize - dtype.itemsize) :].view(dtype)

    def weights(self) -> Tensor:
        """The weights in the dtype computed in."""
        return self.buffer[: self._numel * self._unit.dtype.itemsize].view(self._unit.dtype)

    def give_back(self) -> None:
        """End the use of the memory."""
        self._unit.state.give_back(self.buffer)


@dataclass(frozen=True, slots=True)
class _Numbers:
    """What a step depends on beside the gradients, on its way to the host."""

    factor: OnItsWay
    found_inf: OnItsWay | None

    def is_skipped(self) -> bool:
        """Whether nothing is stepped, once that is known."""
        return self.found_inf is not None and self.found_inf.get() != 0


@dataclass(frozen=True, slots=True)
class _Job:
    """The step of one unit; ``out`` is where its weights go on the device, None if elsewhere."""

    unit: Unit
    passes: Sequence[Pass]
    weights: Tensor
    out: Tensor | None
    begun: Ticket
    numbers: _Numbers


@dataclass(frozen=True, slots=True)
class _Stepped:
    """The step of a unit that the worker was given."""

    queued: Future[Ticket]

    def wait(self) -> None:
        self.queued.result().wait()


class HostUpdate:
    """Steps units whose state is in memory of the host there. See [Note: steps on the host].

    Args:
        mesh: the device, and the streams beside the computation.
        units: the units, in the order of use.
        worker: who steps them.
        sums: whether gradients are sums over several micro-steps, which may be in a wider dtype.

    Raises:
        OffloadError: there is no room for the gradients.
    """

    def __init__(self, mesh: Mesh, units: Sequence[Unit], worker: Worker, *, sums: bool) -> None:
        self.units = tuple(units)
        self._mesh, self._worker, self._stepper = mesh, worker, Stepper()
        self._back = Aside(mesh.device)
        self._rooms = {unit: _Room(unit, _gradient_dtype(unit, sums=sums)) for unit in units}
        self._last: Future[Ticket] | None = None
        self._failure: OffloadError | None = None

    def send_as_reduced(self, is_due: bool) -> None:
        """Let gradients leave as soon as they are reduced from now on, or no more."""
        for unit in self.units:
            unit.on_reduced = self._send if is_due else None

    def _send(self, unit: Unit) -> None:
        grad = unit.grad_shard
        assert grad is not None, f"{unit.name}: no gradient"
        room = self._rooms[unit]
        if not room.holds(grad.dtype):
            room.give_back()
            room = self._rooms[unit] = _Room(unit, grad.dtype)
            unit.state.seal()
        unit.send_gradient(room.gradient(grad.dtype))

    def step(
        self, fused: FusedAdam, factor: Tensor, found_inf: Tensor | None
    ) -> dict[Unit, Ticket]:
        """Start the step of all units, in order, and give the end of each.

        Args:
            fused: what is stepped by which rule.
            factor: multiplies gradients; a scalar in fp32 on the device.
            found_inf: the same, 1 to leave everything as it is; None for 0.

        Raises:
            OffloadError: an earlier step has failed.
        """
        if self._failure is not None:
            raise self._failure
        for unit in self.units:
            if unit.away_gradient is None:
                self._send(unit)
        with self._mesh.outgoing.entered():
            flag = None if found_inf is None else OnItsWay(found_inf)
            numbers = _Numbers(OnItsWay(factor), flag)
        begun = self._mesh.now()
        return {unit: self._submit(unit, fused, begun, numbers) for unit in self.units}

    def _submit(self, unit: Unit, fused: FusedAdam, begun: Ticket, numbers: _Numbers) -> Ticket:
        out = unit.shard_to_write() if unit.is_shard_near else None
        unit.end_gather()  # which may read it
        weights = self._rooms[unit].weights()
        job = _Job(unit, list(self._passes(unit, fused, weights)), weights, out, begun, numbers)
        self._last = self._worker.submit(lambda: self._run(job))
        return _Stepped(self._last)

    def _passes(self, unit: Unit, fused: FusedAdam, weights: Tensor) -> Iterator[Pass]:
        grad = unit.away_gradient
        assert grad is not None, f"{unit.name}: the gradient was sent"
        for part in fused.parts(unit):
            yield from fused.passes(unit, part, part.load.homes, grad, weights)

    @torch.no_grad()
    def _run(self, job: _Job) -> Ticket:
        """Step a unit; on the worker's thread."""
        if self._failure is not None:
            raise self._failure
        try:
            factor = job.numbers.factor.tensor()
            if not job.numbers.is_skipped():
                self._step(job, factor)
            return self._back.end()
        except Exception as error:
            self._failure = _failed(job.unit, error)
            raise self._failure from error

    def _step(self, job: _Job, factor: Tensor) -> None:
        """Step a unit and send its weights, those of a pass while the next one is made."""
        at = 0
        for each in job.passes:
            job.weights[at : each.start].zero_()  # between parameters
            self._stepper.step(each.shards, each.rule, factor)
            if job.out is not None:
                with self._back.after(job.begun):
                    part = slice(at, each.stop)
                    job.out[part].copy_(job.weights[part], non_blocking=True)
            at = each.stop
        if job.out is None:
            job.weights[at:].zero_()
            job.unit.write_shard(job.weights)

    def settle(self) -> None:
        """Let the host wait until all state is as stepped.

        Raises:
            OffloadError: the step has failed.
        """
        if self._last is not None:
            self._last.result()

    def give_up(self) -> None:
        """End a step that something else has ended; gradients that it may have used up are gone."""
        with suppress(OffloadError):  # every later step raises it
            if self._last is not None:
                self._last.result().wait()
        for unit in self.units:
            if unit.away_gradient is not None:
                unit.clear_gradients()

    def leave(self, units: Iterable[Unit]) -> None:
        """Step some of the units no more, and give the memory beside their state back."""
        self.send_as_reduced(False)
        self.settle()
        self._back.finish()
        for unit in set(units).intersection(self.units):
            self._rooms.pop(unit).give_back()
        self.units = tuple(unit for unit in self.units if unit in self._rooms)

    def close(self) -> None:
        """Wait for the worker, and give all memory back."""
        self.send_as_reduced(False)
        self._worker.close()
        self._back.finish()
        for room in self._rooms.values():
            room.give_back()
        self._rooms.clear()


def _gradient_dtype(unit: Unit, *, sums: bool) -> torch.dtype:
    """In which dtype a unit's gradient is expected."""
    reduce, accumulate = unit.precision.reduce, unit.precision.accumulate
    return accumulate if sums or accumulate.itemsize < reduce.itemsize else reduce


def _failed(unit: Unit, error: Exception) -> OffloadError:
    return OffloadError(
        compose(
            f"rank {unit.mesh.rank}: the step of {unit.name} on the host failed, after those of "
            f"the units before it: {type(error).__name__}: {error}",
            hint='go on from the last checkpoint; "zeroshard": {"offload_update": "gpu"} steps on '
            "the device.",
        )
    )
