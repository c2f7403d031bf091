"""Files that are no files: what a depot of files does, by threads in memory, and by hand."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from zeroshard.core.depot import DeviceDepot

__all__ = ["FilesByHand", "PlainDepot", "ThreadedFiles"]


class PlainDepot(DeviceDepot):
    """Ordinary memory, as if it were not that of the device."""

    is_near = False

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))


class ThreadedFiles(PlainDepot):
    """Reads and writes run at once, on threads, in any order."""

    def __init__(self, num_threads: int = 2) -> None:
        super().__init__()
        self._pool = ThreadPoolExecutor(num_threads)
        self.num_reads = self.num_writes = 0

    def check(self) -> None:
        """Memory does not fail."""

    def read(self, home: Tensor, into: Tensor) -> Future[None]:
        """Start to copy ``home``."""
        self.num_reads += 1
        return self._pool.submit(lambda: (into.copy_(home), None)[1])

    def write(self, home: Tensor, source: Tensor) -> Future[None]:
        """Start to copy to ``home``."""
        self.num_writes += 1
        return self._pool.submit(lambda: (home.copy_(source), None)[1])


class FilesByHand(PlainDepot):
    """Nothing that was started ends before a test lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[tuple[str, Callable[[], object], Future[None]]] = []

    def check(self) -> None:
        """Memory does not fail."""

    def read(self, home: Tensor, into: Tensor) -> Future[None]:
        """Note a copy of ``home``."""
        return self._note("read", lambda: into.copy_(home))

    def write(self, home: Tensor, source: Tensor) -> Future[None]:
        """Note a copy to ``home``."""
        return self._note("write", lambda: home.copy_(source))

    def _note(self, kind: str, copy: Callable[[], object]) -> Future[None]:
        future: Future[None] = Future()
        self.jobs.append((kind, copy, future))
        return future

    def end(self, at: int = 0, error: Exception | None = None) -> str:
        """End one job, well or not; return its kind."""
        kind, copy, future = self.jobs.pop(at)
        if error is None:
            copy()
            future.set_result(None)
        else:
            future.set_exception(error)
        return kind
