"""Where state that is kept off the device is stepped: tried on this host, and chosen for all ranks.

On the device, the master weights and both averages of Adam cross the bus in both directions at
once. On the host, they stay, and the memory of the host has to move some 30 bytes for an element.
Which takes longer depends on the bus, the cores, and how many ranks of a host share its memory.
"""

from __future__ import annotations

import logging
import platform
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from zeroshard.core.collectives import Exchange
from zeroshard.core.files import FileDepot
from zeroshard.core.mesh import Mesh
from zeroshard.core.numa import near
from zeroshard.core.rates import bus
from zeroshard.core.unit import Unit
from zeroshard.errors import OffloadError
from zeroshard.host import cgroup
from zeroshard.host.memory import bytes_free
from zeroshard.optim.adam import Rule, Shards
from zeroshard.optim.host_update import Stepper, Worker

__all__ = ["OnHost", "Rates", "Seconds", "Where", "num_threads", "seconds", "stepped_on_host"]

Where = Literal["auto", "gpu", "cpu"]
"""Where state that is kept off the device is stepped."""

_log = logging.getLogger(__name__)

_BILLION = 1e9
_STATE_BYTES = 12  # of an element: master weights and two averages in fp32
_STILL_BYTES = 12  # of an element, when the choice is made: both averages, and the gradient
_WORTH = 0.9  # of the time on the device: rates vary, and the device gives the bits of no offload
_UNHIDDEN_WORTH = 0.5

_FEWEST_BUFFERS, _BUFFER_BYTES = 4, _STATE_BYTES * 2**24  # through which state passes

_TRIAL_NUMEL = 2**25  # 470 MB with the gradient: no cache holds it
_TRIAL_BYTES = 2**26  # of one copy
_TRIAL_S = 0.1
_ANY_BYTES = 2**62
_WORDS, _BITS = 64, 32  # of CPUs, for hosts of up to 2048


@dataclass(frozen=True, slots=True)
class Rates:
    """What one rank has, while all the others of its host ask for the same."""

    bus: float
    """Bytes per second in each direction, both at once."""

    adam: float
    """Elements per second that its threads step."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """How long the update of a billion parameters takes beyond backward, in each of two places."""

    device: float
    host: float

    def prefers_host(self, *, runs_on: bool) -> bool:
        """Whether the host is worth it; on equal terms it is not.

        Args:
            runs_on: whether a step on the host may run on under the next forward, as that on the
                device does; where it may not, forward is taken to hide half of the device's.
        """
        return self.host < self.device * (_WORTH if runs_on else _UNHIDDEN_WORTH)


def seconds(rates: Rates, *, ahead: float = 0.0, weight_bytes: int = 2) -> Seconds:
    """Turn rates into times.

    Gradients leave in backward in either case, or stay. What follows it is, on the device, the way
    of the state in, less what is read ahead in backward, while what was stepped leaves; on the
    host, the step itself or, if it takes longer, the way of the weights.

    Args:
        rates: what was measured.
        ahead: the part of the state that has arrived when the step begins.
        weight_bytes: of an element in the dtype computed in.
    """
    return Seconds(
        device=(1 - ahead) * _STATE_BYTES * _BILLION / rates.bus,
        host=max(_BILLION / rates.adam, weight_bytes * _BILLION / rates.bus),
    )


def num_threads(
    own: frozenset[int],
    on_host: Sequence[frozenset[int]],
    limit: float | None,
    part: float | None,
) -> int:
    """How many threads of a rank step, so that all ranks of a host have no more than its CPUs.

    Args:
        own: the CPUs near this rank's device.
        on_host: those of all ranks of the host, this one included.
        limit: CPUs whose time the ranks may use altogether, if that is limited.
        part: of a rank's share, at least one; None leaves one CPU to the program, if there are
            more than two.
    """
    share = sum(1 / sum(cpu in theirs for theirs in on_host) for cpu in own)
    if limit is not None:
        share = min(share, limit / len(on_host))
    share = int(share + 1e-6)
    if part is not None:
        return max(1, int(share * part))
    return share - 1 if share > 2 else max(1, share)


@dataclass(frozen=True, slots=True)
class OnHost:
    """What is stepped on the host, and by whom."""

    units: Sequence[Unit]
    worker: Worker


def stepped_on_host(
    mesh: Mesh,
    units: Sequence[Unit],
    wanted: Where,
    *,
    is_adam: bool,
    cores: float | None,
    num_buffers: int | None,
) -> OnHost | None:
    """Choose which units whose state is off the device are stepped on the host. A collective.

    Args:
        mesh: the ranks; all of them choose alike.
        units: the units, in the order of use.
        wanted: what the configuration says.
        is_adam: whether the optimizer is one that can be stepped there.
        cores: the part of the rank's CPUs that step; None for the engine's choice.
        num_buffers: through which state passes on the device, None if that is not known.
    """
    fit = [
        unit
        for unit in units
        if not isinstance(unit.state, FileDepot) and unit.store.reader is None
    ]
    hosts = _Hosts(mesh)
    obstacle = (
        "what is not torch's Adam or AdamW, or is to be stepped by torch, is stepped there"
        if not is_adam
        else "what is in files passes through it"
        if not fit
        else "the CPUs of ranks with the same weights differ, and would round differently"
        if mesh.replicate.size > 1 and not hosts.are_alike
        else None
    )
    if obstacle is not None or (wanted == "auto" and _is_the_host(mesh.device)):
        _log.log(
            logging.WARNING if wanted == "cpu" else logging.DEBUG,
            "the update of offloaded state runs on the device: %s",
            obstacle or "it is the host",
        )
        return None
    worker = Worker(hosts.cpus, hosts.threads(cores))
    if wanted == "cpu":
        _log.info("the update of offloaded state runs on the host (%d threads)", worker.num_threads)
        return OnHost(fit, worker)
    rates = _try(mesh, worker) if hosts.have_room(fit) else None
    if rates is None:
        _log.info("the update of offloaded state runs on the GPU: host memory is short")
        return None
    state_bytes = _STATE_BYTES * sum(unit.layout.shard_numel for unit in units)
    ahead_bytes = (num_buffers or _FEWEST_BUFFERS) * _BUFFER_BYTES
    ahead = min(1.0, ahead_bytes / max(1, state_bytes))
    found = seconds(rates, ahead=ahead, weight_bytes=max(unit.dtype.itemsize for unit in fit))
    prefers = found.prefers_host(runs_on=not any(unit.reads_as_published for unit in fit))
    _log.info(
        "the update of offloaded state runs on the %s: %.2f s per billion parameters on the GPU, "
        "%.2f s on the host (%d threads)",
        *("host" if prefers else "GPU", found.device, found.host, worker.num_threads),
    )
    if prefers:
        return OnHost(fit, worker)
    worker.close()
    return None


def _is_the_host(device: torch.device) -> bool:
    return device.type == "cpu"


class _Hosts:
    """The CPUs of all ranks. Made by all ranks together."""

    def __init__(self, mesh: Mesh) -> None:
        self.cpus = near(mesh.device).cpus
        kind = zlib.crc32(
            f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}".encode()
        )
        self._name = zlib.crc32(platform.node().encode())
        self._tell = Exchange(mesh, 3)
        mine = [self._name, kind, *_packed(self.cpus)]
        shown = Exchange(mesh, len(mine))(mine)
        self.are_alike = len({each[1] for each in shown}) == 1
        here = [each for each in shown if each[0] == self._name]
        self._on_host = [_unpacked(each[2:]) for each in here]

    def have_room(self, units: Sequence[Unit]) -> bool:
        """Whether each host has memory for what these units have yet to take there."""
        mine = _STILL_BYTES * sum(unit.layout.shard_numel for unit in units)
        free = bytes_free()
        shown = self._tell([self._name, mine, _ANY_BYTES if free is None else free])
        return all(
            sum(theirs for other, theirs, _ in shown if other == host) <= room
            for host, _, room in shown
        )

    def threads(self, part: float | None) -> int:
        """How many threads of this rank step."""
        limit = cgroup.of_this_process().cpu_limit()
        return num_threads(self.cpus, self._on_host, limit, part)


def _packed(cpus: frozenset[int]) -> list[int]:
    words = [0] * _WORDS
    for cpu in cpus:
        if cpu < _WORDS * _BITS:
            words[cpu // _BITS] |= 1 << cpu % _BITS
    return words


def _unpacked(words: Sequence[int]) -> frozenset[int]:
    return frozenset(
        at * _BITS + bit for at, word in enumerate(words) for bit in range(_BITS) if word >> bit & 1
    )


def _lowest(measure: Callable[[], float], mesh: Mesh) -> float:
    """The rate of the slowest rank, while all measure theirs; 0 where one has no room for it."""
    show = Exchange(mesh, 1)
    show([0])  # all are there
    try:
        rate = measure()
    except (OffloadError, RuntimeError):  # no memory of either kind
        rate = 0.0
    return min(each for (each,) in show([int(rate)]))


def _try(mesh: Mesh, worker: Worker) -> Rates | None:
    """Measure what the slowest rank has while all do the same; None where there is no room."""

    def crosses() -> float:
        return bus([mesh.device], _TRIAL_BYTES, _TRIAL_S).both_ways / 2

    def steps() -> float:
        return worker.submit(_adam_rate).result()

    each_way = _lowest(crosses, mesh)
    adam = _lowest(steps, mesh)
    return Rates(each_way, adam) if each_way and adam else None


def _adam_rate() -> float:
    """Elements per second that this thread and its helpers step, with gradients in bf16."""
    master, average, square = (torch.ones(_TRIAL_NUMEL, device="cpu") for _ in range(3))
    grad = torch.ones(_TRIAL_NUMEL, dtype=torch.bfloat16, device="cpu")
    stepper, one = Stepper(), torch.ones((), device="cpu")
    rule = Rule(0.0, 0.9, 0.999, 1e-8, 0.0, decoupled=True, step=1)
    shards = Shards(grad, master, average, square, grad)
    stepper.step(shards, rule, one)
    rounds, begin = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < _TRIAL_S:
        stepper.step(shards, rule, one)
        rounds += 1
    return rounds * _TRIAL_NUMEL / elapsed
