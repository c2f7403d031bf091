"""What a disk moves without anything above it: reads and writes past the page cache, by threads."""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Rates", "measure"]

_DIRECT = getattr(os, "O_DIRECT", 0)
_MIB = 2**20


@dataclass(frozen=True)
class Rates:
    """Bytes per second of writing, of reading, and of both at once, in sum."""

    write: float
    read: float
    both: float
    is_direct: bool

    def of(self, read: int, written: int) -> float:
        """Return the most bytes per second at which so many are read and written.

        At once, if as many are, or one after another.
        """
        apart = (read + written) / (read / self.read + written / self.write)
        return max(self.both, apart)


def measure(
    folder: Path, file_bytes: int, *, block_bytes: int = 8 * _MIB, threads: int = 8, times: int = 2
) -> Rates:
    """Write and read a file of a folder, which is there only meanwhile; the best of some times.

    Raises:
        OSError: there is no room, or the folder cannot be written to.
    """
    file_bytes = max(file_bytes // (2 * block_bytes), 1) * 2 * block_bytes
    with _file(folder, file_bytes) as (handle, is_direct):
        memory = mmap.mmap(-1, threads * block_bytes)  # which begins on a page

        def through(move: Callable[[int, list[memoryview], int], int], start: int, end: int) -> int:
            def work(number: int) -> None:
                view = memoryview(memory)[number * block_bytes : (number + 1) * block_bytes]
                for at in range(start + number * block_bytes, end, threads * block_bytes):
                    if move(handle, [view], at) != block_bytes:
                        raise OSError(f"a block at {at} of {folder} was moved in part")

            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(work, range(threads)))
            return end - start

        def rate(run: Callable[[], int]) -> float:
            began = time.perf_counter()
            return run() / (time.perf_counter() - began)

        def both() -> int:
            half = file_bytes // 2
            with ThreadPoolExecutor(2) as pool:
                writing = pool.submit(through, os.pwritev, 0, half)
                reading = pool.submit(through, os.preadv, half, file_bytes)
                return writing.result() + reading.result()

        through(os.pwritev, 0, file_bytes)  # the first time, blocks of the disk are found for it
        found = [
            (
                rate(lambda: through(os.pwritev, 0, file_bytes)),
                rate(lambda: through(os.preadv, 0, file_bytes)),
                rate(both),
            )
            for _ in range(times)
        ]
    return Rates(*(max(each) for each in zip(*found, strict=True)), is_direct=is_direct)


@contextlib.contextmanager
def _file(folder: Path, nbytes: int) -> Iterator[tuple[int, bool]]:
    path = folder / f"bare-disk-{os.getpid()}"
    flags, is_direct = os.O_RDWR | os.O_CREAT | os.O_EXCL, bool(_DIRECT)
    try:
        handle = os.open(path, flags | _DIRECT, 0o600)
    except OSError:
        # Some file systems make the file and then refuse.
        path.unlink(missing_ok=True)
        handle, is_direct = os.open(path, flags, 0o600), False
    try:
        os.posix_fallocate(handle, 0, nbytes)
        yield handle, is_direct
    finally:
        os.close(handle)
        path.unlink()
