"""Files as a home for tensors: the state of training that lies on a drive.

A depot has one file of its own, which grows by what is taken and is preallocated, so that a full
drive is known at once. A tensor that was taken is a mapping of its range of that file: to read or
edit it needs no host memory but what the page cache lends. To move it at the speed of the drive,
:meth:`FileDepot.read` and :meth:`FileDepot.write` go around the page cache (O_DIRECT), in blocks,
several of them at once, on threads.

The file has no name: it is removed from its folder as soon as it is open. So no other run can
touch it, and the system gives its space back when the process ends, however it ends.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zeroshard.errors import OffloadError, UsageError, compose
from zeroshard.host.memory import in_words
from zeroshard.host.pages import Pages, punch, up_to_page

__all__ = ["ALIGNMENT", "FileDepot", "FileSettings", "free_bytes"]

_log = logging.getLogger(__name__)

# Direct I/O moves multiples of this, in memory and in the file; no drive asks for more.
ALIGNMENT = 4096

_MIB = 1 << 20
_MOST_THREADS = 64  # in each direction; more of them wait for the same drive
_QUIET_BYTES = 1 << 30
_O_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux alone has it


@dataclass(frozen=True)
class FileSettings:
    """How bytes travel between host memory and a file.

    Of DeepSpeed's block ``aio``, ``block_size`` is `block_bytes`, and ``queue_depth`` requests on
    each of ``intra_op_parallelism`` threads are a `depth` of their product, since a request here is
    a thread. ``single_submit`` and ``overlap_events`` choose how libaio is called and ``use_gds``
    a driver that bypasses the host: neither is used here. ``thread_count`` has no meaning there
    either.

    Attributes:
        block_bytes: what one request reads or writes at most; rounded up to :data:`ALIGNMENT`.
        depth: reads under way at once, and writes beside them; what is beyond 64 is not used.
        direct: whether to go around the page cache where the file system can.
        pin: whether host memory is page-locked that bytes pass through on their way to a device.
    """

    block_bytes: int = 16 * _MIB
    depth: int = 8
    direct: bool = True
    pin: bool = True

    def __post_init__(self) -> None:
        if self.block_bytes < 1 or self.depth < 1:
            raise ValueError("block_bytes and depth are at least 1")


@dataclass(frozen=True)
class _Place:
    """Where a tensor that was taken lies in the file, and its mapping."""

    offset: int
    nbytes: int
    pages: Pages


class _Job:
    """A read or write, over when the last of its blocks is."""

    def __init__(self, blocks: int) -> None:
        self.future: Future[None] = Future()
        self.future.set_running_or_notify_cancel()  # its blocks may run, so nobody can cancel it
        self._left = blocks
        self._error: BaseException | None = None
        self._lock = threading.Lock()

    def end(self, error: BaseException | None) -> None:
        """One block is done; the first error of any is the job's."""
        with self._lock:
            self._left -= 1
            self._error = self._error or error
            is_over = not self._left
        if not is_over:
            return
        if self._error is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(self._error)


class FileDepot:
    """A file in a folder on a drive, as a home for tensors.

    Reads begin in the order in which they are asked for, and so do writes, but all overlap: two of
    them that concern the same bytes need a wait in between. The tensors are coherent with them, in
    both directions: what was written is seen through the tensor, and an edit through the tensor is
    what the next read brings. The first bytes of the file are there to try that out on the spot;
    where it does not hold, and where direct I/O is refused, everything goes through the page cache.

    After a failed read or write the file is not used any more: every later call raises.
    """

    is_near = False

    def __init__(
        self, folder: str | os.PathLike[str], *, name: str, settings: FileSettings | None = None
    ) -> None:
        """Make the file.

        Args:
            folder: an existing folder on the drive.
            name: of the owner, such as "rank 3", for messages.
            settings: how bytes travel.

        Raises:
            OffloadError: the folder does not exist, or no file can be made there.
        """
        settings = settings or FileSettings()
        self._folder, self._name = Path(folder), name
        self.pin = settings.pin
        self._block = _padded(settings.block_bytes)
        self.nbytes = 0
        self._size = self._sealed_bytes = 0
        self._end = 0  # of what is allocated
        self._places: dict[int, _Place] = {}  # by address
        self._failure: str | None = None
        self._jobs: set[Future[None]] = set()
        self._bounce = threading.local()
        # Two, for a read that the step waits for is not to queue up behind writes that can wait.
        threads = min(settings.depth, _MOST_THREADS)
        self._readers, self._writers = (
            ThreadPoolExecutor(threads, f"zeroshard-files-{way}") for way in ("in", "out")
        )
        self._plain, self._direct, reason = self._open(want_direct=settings.direct)
        pools = self._readers, self._writers
        self._close = weakref.finalize(self, _close, pools, (self._plain, self._direct))
        self._trial = self._bytes_of(self._extend(ALIGNMENT))
        if self._direct is not None:
            reason = self._why_not_direct(self._direct)
        if reason:
            self._direct = None
            _log.warning(
                "%s: files in %s are read and written through the page cache, which costs a copy "
                "and host memory: %s",
                *(name, self._folder, reason),
            )

    @property
    def is_direct(self) -> bool:
        """Whether reads and writes go around the page cache."""
        return self._direct is not None

    def reserve(self, nbytes: int) -> None:
        """Take space on the drive now, for tensors that will be taken.

        Raises:
            OffloadError: the drive has no room for it.
        """
        self._require_usable()
        self._allocate(self._size + up_to_page(nbytes))

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A flat tensor of zeros: a mapping of a range that the file is extended by.

        Raises:
            OffloadError: the drive has no room for it.
        """
        self._require_usable()
        nbytes = numel * dtype.itemsize
        if not nbytes:
            return torch.zeros(0, dtype=dtype)
        place = self._extend(nbytes)
        tensor = self._bytes_of(place).view(dtype)
        self._places[tensor.data_ptr()] = place
        self.nbytes += nbytes
        return tensor

    def give_back(self, tensor: Tensor) -> None:
        """Give the range back to the drive; no read or write of it is under way.

        Raises:
            UsageError: it is none of this depot, or was given back before.
        """
        if not tensor.numel():
            return
        place = self._places.pop(tensor.data_ptr(), None)
        if place is None:
            raise UsageError(f"a tensor was given back that was not taken from {self._file}.")
        self.nbytes -= place.nbytes
        punch(self._plain, place.offset, place.pages.nbytes)

    def seal(self) -> None:
        """Bring to the drive what was stored through the tensors, and free the host memory of it.

        Raises:
            OffloadError: the drive did not take it.
        """
        self.drain()
        begin, new = time.monotonic(), self.nbytes - self._sealed_bytes
        level = logging.INFO if new >= _QUIET_BYTES else logging.DEBUG
        what = self._name, in_words(self.nbytes), self._folder
        _log.log(level, "%s: bringing %s to the drive of %s", *what)
        try:
            os.fdatasync(self._plain)
            for place in list(self._places.values()):  # a finalizer may give one back meanwhile
                place.pages.release()  # or they would stay in the page cache
            os.posix_fadvise(self._plain, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise self._fail(f"cannot be brought to the drive: {error.strerror}.") from error
        self._sealed_bytes = self.nbytes
        _log.log(
            level,
            "%s: %s are in a file without a name in %s after %.1f s: df shows it, ls does not",
            *(*what, time.monotonic() - begin),
        )

    def read(self, home: Tensor, into: Tensor) -> Future[None]:
        """Read a range of the file into host memory.

        Memory that does not begin at a multiple of 4096 bytes, and the last bytes of a tensor that
        are no whole 4096, pass through a buffer, which costs a copy. Nothing beside `into` is
        written, so nothing has to be kept free for padding.

        Args:
            home: a tensor that was taken, or a contiguous part of one which begins at a multiple of
                :data:`ALIGNMENT` bytes and ends at one, or where the tensor does.
            into: contiguous host memory of as many bytes, page-locked or not. It belongs to the
                read until the future is done.

        Raises:
            OffloadError: the file is damaged, or an earlier read or write has failed; from the
                future if this one does.
            UsageError: these tensors cannot be the two sides of a read.
        """
        return self._start(home, into, self._readers, self._read_block)

    def write(self, home: Tensor, source: Tensor) -> Future[None]:
        """Write host memory to a range of the file; as :meth:`read`, the other way round."""
        return self._start(home, source, self._writers, self._write_block)

    def drain(self) -> None:
        """Wait until no read or write is under way.

        Raises:
            OffloadError: one of them has failed, or the file is damaged.
        """
        wait(tuple(self._jobs))
        self.check()

    def check(self) -> None:
        """See to it that the tensors can be touched.

        To touch a mapping beyond the end of its file would end the process.

        Raises:
            OffloadError: the file was cut short, or an earlier read or write has failed.
        """
        self._require_usable()
        self._require_whole()

    def close(self) -> None:
        """End the reads and writes under way, and give the space back.

        Those that have not begun fail. Space is held for as long as a tensor that was taken lives.
        """
        self._failure = self._failure or f"{self._file} was closed."
        for pool in (self._readers, self._writers):
            pool.shutdown()
        self._close()
        self._places.clear()
        self.nbytes = 0

    # The file.

    @property
    def _file(self) -> str:
        return f"the offload file of {self._name} in {self._folder}"

    def _open(self, *, want_direct: bool) -> tuple[int, int | None, str]:
        """Two descriptors of a new file, the second for direct I/O; or why there is no second."""
        try:
            plain, path = tempfile.mkstemp(prefix=".zeroshard-", dir=self._folder)
        except OSError as error:
            raise OffloadError(_why_no_file(self._folder, self._name, error)) from error
        try:
            if want_direct:
                return plain, os.open(path, os.O_RDWR | os.O_CLOEXEC | _O_DIRECT), ""
        except OSError as error:
            return plain, None, f"opening it for direct I/O: {error.strerror}."
        finally:
            # A run that is killed then leaves nothing behind, and nobody else can find the file.
            Path(path).unlink()
        return plain, None, ""

    def _extend(self, nbytes: int) -> _Place:
        """Lengthen the file by whole pages, whose space is had for certain."""
        offset, padded = self._size, up_to_page(nbytes)
        self._allocate(offset + padded)
        self._size += padded
        try:
            return _Place(offset, nbytes, Pages(padded, file=self._plain, offset=offset))
        except OSError as error:
            raise self._fail(f"cannot be mapped: {error.strerror}.") from error

    def _allocate(self, end: int) -> None:
        """Have space for the file up to a byte, for certain."""
        more = end - self._end
        if more <= 0:
            return
        try:
            os.posix_fallocate(self._plain, self._end, more)
        except OSError as error:
            os.ftruncate(self._plain, self._end)  # gives back the part that it has got
            free = _free(os.fstatvfs(self._plain))
            raise OffloadError(
                compose(
                    f"{self._name} asked for {in_words(more)} in {self._folder}, beside "
                    f"{in_words(self.nbytes)} that it has there, and {in_words(free)} are free: "
                    f"{error.strerror}.",
                    hint="free space on that drive, name a folder on another one as nvme_path, or "
                    'offload less with "ratio" or "gpu_budget".',
                )
            ) from error
        self._end = end

    @staticmethod
    def _bytes_of(place: _Place) -> Tensor:
        return torch.frombuffer(place.pages.buffer, dtype=torch.uint8, count=place.nbytes)

    def _why_not_direct(self, handle: int) -> str:
        """Why direct I/O cannot be used here; nothing if it can.

        That the system refuses it may show at the first request only, and that it does not keep a
        mapping coherent never would.
        """
        page = mmap.mmap(-1, ALIGNMENT)
        try:
            for value in range(3):
                self._trial.fill_(255 - value)
                os.preadv(handle, [page], 0)
                if page[:] != bytes([255 - value]) * ALIGNMENT:
                    return "direct I/O does not see what was stored through a mapping."
                page[:] = bytes([value]) * ALIGNMENT
                os.pwritev(handle, [page], 0)
                if not bool((self._trial == value).all()):
                    return "a mapping does not show what direct I/O has written."
        except OSError as error:
            return f"direct I/O: {error.strerror}."
        finally:
            page.close()
        return ""

    def _fail(self, what: str) -> OffloadError:
        """The error of a failure after which the file is not used any more."""
        message = compose(
            f"{self._file} {what}",
            hint="what it held is lost to this run: go on from the last checkpoint.",
        )
        self._failure = self._failure or message
        return OffloadError(message)

    def _require_usable(self) -> None:
        if self._failure is not None:
            raise OffloadError(self._failure)

    def _require_whole(self) -> None:
        expected = self._end  # first: another thread may lengthen the file meanwhile
        size = os.fstat(self._plain).st_size
        if size < expected:
            raise self._fail(f"was cut short from outside: it has {size} of {expected} bytes.")

    # Reads and writes.

    def _start(
        self,
        home: Tensor,
        memory: Tensor,
        pool: ThreadPoolExecutor,
        block: Callable[[int, memoryview], None],
    ) -> Future[None]:
        self.check()
        offset = self._offset(home)
        if memory.device.type != "cpu" or not memory.is_contiguous():
            raise UsageError("a file is read into, and written from, contiguous host memory.")
        if memory.nbytes != home.nbytes:
            raise UsageError(f"{memory.nbytes} bytes of memory for {home.nbytes} bytes of a file.")
        content = memory.detach().flatten().view(torch.uint8).numpy().data
        starts = range(0, len(content), self._block)
        job = _Job(len(starts) or 1)
        if not starts:
            job.end(None)
        self._jobs.add(job.future)
        job.future.add_done_callback(self._jobs.discard)

        def run(start: int) -> None:
            try:
                self._require_usable()
                block(offset + start, content[start : start + self._block])
            except BaseException as error:
                job.end(error)
            else:
                job.end(None)

        for start in starts:
            try:
                pool.submit(run, start)
            except RuntimeError as error:  # the interpreter is going down
                job.end(OffloadError(f"{self._file} cannot be used any more: {error}"))
        return job.future

    def _offset(self, home: Tensor) -> int:
        """Where a tensor that was taken, or a part of one, lies in the file."""
        if not home.numel():
            return 0
        address = home.untyped_storage().data_ptr()
        place = self._places.get(address)
        if place is None or not home.is_contiguous():
            raise UsageError(f"this is no contiguous part of a tensor of {self._file}.")
        begin = home.data_ptr() - address
        end = begin + home.nbytes
        if begin % ALIGNMENT or (end % ALIGNMENT and end != place.nbytes):
            raise UsageError(
                f"bytes {begin} to {end} of a tensor of {place.nbytes} bytes cannot be moved by "
                f"themselves: parts begin and end at multiples of {ALIGNMENT}."
            )
        return place.offset + begin

    def _read_block(self, offset: int, content: memoryview) -> None:
        self._require_whole()
        whole = self._whole(content)
        self._move(os.preadv, "reading", offset, content[:whole])
        if whole < len(content):
            page = self._page(len(content) - whole)
            self._move(os.preadv, "reading", offset + whole, page)
            content[whole:] = page[: len(content) - whole]

    def _write_block(self, offset: int, content: memoryview) -> None:
        self._require_whole()
        whole = self._whole(content)
        self._move(os.pwritev, "writing", offset, content[:whole])
        if whole < len(content):
            page = self._page(len(content) - whole)
            page[: len(content) - whole] = content[whole:]
            self._move(os.pwritev, "writing", offset + whole, page)

    def _whole(self, content: memoryview) -> int:
        """How many bytes from the beginning can travel without a buffer."""
        if self._direct is None:
            return len(content)
        if _address(content) % ALIGNMENT:
            return 0
        return len(content) - len(content) % ALIGNMENT

    def _page(self, nbytes: int) -> memoryview:
        """This thread's aligned buffer, as long as the padded bytes."""
        buffer: mmap.mmap | None = getattr(self._bounce, "buffer", None)
        if buffer is None:
            buffer = self._bounce.buffer = mmap.mmap(-1, self._block)
        return memoryview(buffer)[: _padded(nbytes)]

    def _move(
        self,
        call: Callable[[int, list[memoryview], int], int],
        doing: str,
        offset: int,
        content: memoryview,
    ) -> None:
        """Move all of a block, which a single call need not do."""
        handle = self._plain if self._direct is None else self._direct
        done = 0
        while done < len(content):
            try:
                moved = call(handle, [content[done:]], offset + done)
            except OSError as error:
                reason = error.strerror
                cause = error
            else:
                done += moved
                if moved:
                    continue
                self._require_whole()
                reason, cause = "no byte was moved", None
            raise self._fail(
                f"failed in {doing} {len(content) - done} bytes at byte {offset + done}: {reason}."
            ) from cause


def free_bytes(folder: Path) -> int:
    """Bytes that a user may still take on the drive of a folder.

    Raises:
        OffloadError: the folder does not exist.
    """
    try:
        found = os.statvfs(folder)
    except OSError as error:
        raise OffloadError(_why_no_file(folder, "this process", error)) from error
    return _free(found)


def _free(found: os.statvfs_result) -> int:
    return found.f_bavail * found.f_frsize


def _why_no_file(folder: Path, name: str, error: OSError) -> str:
    fact = f"{name} cannot make a file in {folder}: {error.strerror}."
    absolute = folder.absolute()
    if _is_folder(absolute):
        return compose(fact, hint="name a folder as nvme_path that this user may write to.")
    existing = next(path for path in absolute.parents if _is_folder(path))
    return compose(
        f"{fact} Of its path, {existing} exists.",
        hint="mount the drive, correct nvme_path, or make the folder: it is not made here, lest "
        "files that are meant for a drive fill the disk of the system.",
    )


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # in a folder that this user may not search
        return False


def _close(pools: Iterable[ThreadPoolExecutor], handles: Iterable[int | None]) -> None:
    """End what a depot has when nothing is under way, since that would keep the depot alive."""
    for pool in pools:
        pool.shutdown(wait=False)  # this may be one of its threads
    for handle in handles:
        if handle is not None:
            os.close(handle)


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _address(content: memoryview) -> int:
    return ctypes.addressof(ctypes.c_ubyte.from_buffer(content)) if content else 0
