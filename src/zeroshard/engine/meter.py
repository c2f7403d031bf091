"""What the allocator of a device says about its memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

__all__ = ["Memory", "Meter", "meter_of"]

# What is left alone of the memory that can be had: blocks of memory that are free but lie apart,
# and what NCCL and other libraries take later.
_RESERVE = 0.1


@dataclass(frozen=True, slots=True)
class Memory:
    """The state of an allocator: bytes, and how often it has run short."""

    allocated: int
    peak: int
    shortages: int


class Meter(Protocol):
    """Measures the memory of a device."""

    def read(self) -> Memory:
        """The state now, with the peak since the last ``restart``."""
        ...

    def restart(self) -> None:
        """Begin a new peak."""
        ...

    def limit(self) -> int:
        """Bytes that this process may allocate, a reserve taken off."""
        ...


class _CudaMeter:
    """Asks torch's caching allocator; nothing here waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def read(self) -> Memory:
        # The flat form of the same takes several times as long.
        stats = torch.cuda.memory_stats_as_nested_dict(self._device)
        now = stats["allocated_bytes"]["all"]
        return Memory(now["current"], now["peak"], stats["num_alloc_retries"] + stats["num_ooms"])

    def restart(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def limit(self) -> int:
        free, total = torch.cuda.mem_get_info(self._device)
        fraction: Any = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # from 2.8
        allowed = total if fraction is None else int(total * fraction(self._device))
        return int(min(free + torch.cuda.memory_reserved(self._device), allowed) * (1 - _RESERVE))


def meter_of(device: torch.device) -> Meter | None:
    """The meter of a device, if its memory can be measured."""
    return _CudaMeter(device) if device.type == "cuda" else None
