"""The memory of the process outside of devices."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

__all__ = ["trim"]


def trim() -> None:
    """Give memory that is free back to the operating system, where the C library can.

    glibc maps only the largest blocks one by one. The others share a heap, which ends at the last
    block in use: of full parameters that come and go between shards that stay, it would keep the
    memory for good.
    """
    malloc_trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
