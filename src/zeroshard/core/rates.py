"""What this host moves and updates per second: measured, not looked up.

Raw rates, which training can approach and not exceed: large page-locked buffers, nothing else under
way, a first round that does not count, and then as many as fill the time that was asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zeroshard.core.files import ALIGNMENT, FileDepot, FileSettings
from zeroshard.core.slab import HostDepot

__all__ = [
    "BYTES_OF_AN_UPDATE",
    "Bus",
    "Drive",
    "bus",
    "drive",
    "host_copy",
    "host_memory",
    "host_update",
]

# Adam in fp32 reads the weight, its gradient and two moments, and writes all but the gradient.
BYTES_OF_AN_UPDATE = 7 * 4

_COPIES_AT_ONCE = 4  # enough for the host to be ahead of the bus


@dataclass(frozen=True)
class Bus:
    """Bytes per second between page-locked host memory and devices, of all devices together."""

    to_devices: float
    to_host: float
    both_ways: float  # the sum, with copies in both directions at once


@dataclass(frozen=True)
class Drive:
    """Bytes per second between host memory and a file."""

    write: float
    read: float
    both_ways: float  # the sum, with as many bytes read as written at the same time
    is_direct: bool  # else through the page cache, and so are the rates


def bus(devices: Sequence[torch.device], nbytes: int, seconds: float) -> Bus:
    """Measure copies between the host and CUDA devices, on all of them at once.

    Args:
        devices: which copy.
        nbytes: of one copy; each device takes twice that of its memory and of page-locked memory.
        seconds: that each of the three measurements takes, at least.
    """
    lanes = [_Lane(device, nbytes) for device in devices]

    def rate(*directions: Callable[[_Lane], None]) -> float:
        def copies() -> None:
            for _ in range(_COPIES_AT_ONCE):
                for lane in lanes:
                    for copy in directions:
                        copy(lane)
            for lane in lanes:
                torch.cuda.synchronize(lane.device)

        moved = _COPIES_AT_ONCE * len(lanes) * len(directions) * nbytes
        return moved * _per_second(copies, seconds)

    return Bus(
        to_devices=rate(_Lane.copy_in),
        to_host=rate(_Lane.copy_out),
        both_ways=rate(_Lane.copy_in, _Lane.copy_out),
    )


def host_copy(nbytes: int, seconds: float) -> float:
    """Measure bytes per second that are copied within host memory, by all of torch's threads."""
    # Both buffers are written to first, or all pages of the source would be one page of zeros.
    source, target = (torch.ones(nbytes, dtype=torch.uint8) for _ in range(2))
    return nbytes * _per_second(lambda: target.copy_(source), seconds)


def host_update(numel: int, seconds: float) -> float:
    """Measure parameters per second that torch's fused AdamW updates on all of torch's threads.

    Args:
        numel: parameters of one update, which takes 16 bytes of memory for each.
        seconds: that the measurement takes, at least.
    """
    weight = torch.ones(numel, requires_grad=True)
    weight.grad = torch.ones(numel)
    optimizer = torch.optim.AdamW([weight], lr=1e-3, fused=True)
    return numel * _per_second(optimizer.step, seconds)


def drive(
    folder: Path,
    settings: FileSettings,
    nbytes: int,
    memory: tuple[Tensor, Tensor],
    seconds: float,
) -> Drive:
    """Measure writes to a file and reads of it, as state of training is written and read.

    The file has no name and is gone at the end, however that comes. Through the page cache, a
    write ends when the drive has it, and a read begins with an empty cache.

    Args:
        folder: where the file is made.
        settings: how bytes travel.
        nbytes: of the file.
        memory: two pieces of host memory of the same size, one to write from and one to read into,
            over and over: aligned, page-locked where those of training will be, and of content that
            no drive can make smaller.
        seconds: that each of the three measurements takes, at least.

    Raises:
        OffloadError: the file cannot be made, written or read.
    """
    source, target = memory
    depot = FileDepot(folder, name="io-bench", settings=settings)
    try:
        home = depot.take(nbytes, torch.uint8)
        half = -(-nbytes // (2 * ALIGNMENT)) * ALIGNMENT
        parts = home.split(min(source.nbytes, half))

        def move(written: Sequence[Tensor], read: Sequence[Tensor]) -> None:
            if not depot.is_direct:
                depot.seal()
            moves = [depot.write(part, source[: part.nbytes]) for part in written]
            moves += [depot.read(part, target[: part.nbytes]) for part in read]
            for future in moves:
                future.result()
            if written and not depot.is_direct:
                depot.seal()

        # The first write does not count: it turns what was allocated only into what holds data.
        rounds = [
            _per_second(lambda: move(parts, []), seconds),
            _per_second(lambda: move([], parts), seconds),
            _per_second(lambda: move(parts[::2], parts[1::2]), seconds),
        ]
        write, read, both_ways = (nbytes * times for times in rounds)
        return Drive(write, read, both_ways, depot.is_direct)
    finally:
        depot.close()


def host_memory(device: torch.device, count: int, nbytes: int) -> list[Tensor]:
    """Pieces of host memory of so many bytes each, as training has them for this device.

    They are page-locked for a GPU, for as long as one of them lives.

    Raises:
        OffloadError: the host has not enough memory left, or does not let it be locked.
    """
    depot = HostDepot(device, pin=True, name="io-bench")
    pieces = [depot.take(nbytes, torch.uint8) for _ in range(count)]
    depot.seal()
    return pieces


class _Lane:
    """The buffers and streams of one device."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self.device = device
        self._here = host_memory(device, 2, nbytes)
        self._there = [torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self._streams = [torch.cuda.Stream(device) for _ in range(2)]
        torch.cuda.synchronize(device)

    def copy_in(self) -> None:
        with torch.cuda.stream(self._streams[0]):
            self._there[0].copy_(self._here[0], non_blocking=True)

    def copy_out(self) -> None:
        with torch.cuda.stream(self._streams[1]):
            self._here[1].copy_(self._there[1], non_blocking=True)


def _per_second(work: Callable[[], object], seconds: float) -> float:
    """How often something is done per second, after it was done once."""
    work()
    rounds, begin = 0, time.perf_counter()
    while True:
        work()
        rounds += 1
        elapsed = time.perf_counter() - begin
        if elapsed >= seconds:
            return rounds / elapsed
