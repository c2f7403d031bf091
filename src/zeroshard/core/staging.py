"""Shards in files, which pass through a few buffers in host memory on their way.

[Note: reading ahead]
A file is slower than the bus, and it is the host that waits for it, so a read has to begin well
before the gather that wants it. The schedule names the shards that are to come, nearest first, each
time it has moved on (`Reader.expect`), and as many pieces of them are read as there are buffers.
What is in a buffer and does not come any more makes room, so a wrong guess costs a read and nothing
else. A gather that is not urgent waits until its shard is in buffers; one that is makes the host
wait.

Nothing but buffers bounds what is under way. Each goes round: a read fills it, a copy on the
device's stream empties it, and the next read begins once that copy is over; on the way out, the
other way round. Threads do that waiting, one for each direction, so that the host goes on. Reads
begin after writes of the same shard have ended, and writes after reads.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from zeroshard.core.depot import Depot
from zeroshard.core.mesh import Mesh
from zeroshard.core.store import Store
from zeroshard.core.ticket import DONE, Mark, Ticket
from zeroshard.errors import OffloadError

__all__ = ["FileStore", "Files", "InFiles", "Staging"]

_ALIGN_BYTES = 4096  # of what is read and written around the page cache


class Files(Depot, Protocol):
    """A depot whose tensors are parts of files."""

    def check(self) -> None:
        """See to it that its tensors can be touched.

        Raises:
            OffloadError: something became of their file.
        """
        ...

    def read(self, home: Tensor, into: Tensor) -> Future[None]:
        """Start to read a tensor that was taken, or a part of it, into host memory."""
        ...

    def write(self, home: Tensor, source: Tensor) -> Future[None]:
        """Start to write host memory to a tensor that was taken, or a part of it."""
        ...


@dataclass(slots=True, eq=False)
class _Buffer:
    """Host memory that one piece of a shard is in, or is on its way through."""

    memory: Tensor
    job: Future[None] | None = None
    """The last read or write of a file."""

    mark: Mark = DONE
    """The last copy between it and the device."""

    def of(self, piece: Tensor) -> Tensor:
        """As much of it as a piece needs, in its dtype."""
        return self.memory[: piece.nbytes].view(piece.dtype)


@dataclass(slots=True, eq=False)
class _Shelf:
    """A shard's pieces in its file, and what is under way with them."""

    pieces: Sequence[Tensor]
    ahead: dict[int, _Buffer] = field(default_factory=dict[int, _Buffer])
    jobs: list[Future[None]] = field(default_factory=list[Future[None]])

    def under_way(self) -> list[Future[None]]:
        """The reads and writes that have not ended well."""
        self.jobs = [job for job in self.jobs if not job.done() or job.exception() is not None]
        return list(self.jobs)


class Staging:
    """The buffers of all shards in the files of one depot. See [Note: reading ahead]."""

    def __init__(self, files: Files, host: Depot, *, count: int, nbytes: int) -> None:
        """Describe the buffers; no memory is taken yet.

        Args:
            files: where the shards are.
            host: where the buffers are taken from.
            count: most buffers, at least 1.
            nbytes: most bytes of a buffer; larger shards travel in pieces.
        """
        self.files, self._host, self._most = files, host, max(count, 1)
        self.piece_bytes = max(nbytes // _ALIGN_BYTES, 1) * _ALIGN_BYTES
        self._largest = self._num_pieces = 0
        self._buffers: list[_Buffer] = []
        self._free: deque[_Buffer] = deque()
        self._out: deque[_Buffer] = deque()  # being written, oldest first
        self._ahead: dict[tuple[_Shelf, int], None] = {}  # being read or full, nearest first
        self._porters = [
            ThreadPoolExecutor(1, thread_name_prefix=f"zeroshard-{way}") for way in ("in", "out")
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.memory.nbytes for buffer in self._buffers)

    def seal(self) -> None:
        """Take the buffers, now that the largest piece is known; no more than there are pieces."""
        count = min(self._most, self._num_pieces)
        if len(self._buffers) == count and self.nbytes == count * self._largest:
            return
        self._settle()
        for buffer in self._buffers:
            self._host.give_back(buffer.memory)
        self._buffers = [_Buffer(self._host.take(self._largest, torch.uint8)) for _ in range(count)]
        self._free = deque(self._buffers)
        self._host.seal()

    def close(self) -> None:
        """Wait for what is under way, and give the buffers back."""
        self._settle()
        for porter in self._porters:
            porter.shutdown()
        for buffer in self._buffers:
            self._host.give_back(buffer.memory)
        self._buffers.clear()
        self._free.clear()

    def _settle(self) -> None:
        """Wait for every buffer, and forget what was read ahead."""
        for shelf in {shelf for shelf, _ in self._ahead}:
            self.forget(shelf)
        for buffer in self._buffers:
            if buffer.job is not None:
                wait([buffer.job])
            buffer.mark.synchronize()
        self._free.extend(self._out)
        self._out.clear()

    def shelve(self, home: Tensor) -> _Shelf:
        """Take note of a shard."""
        shelf = _Shelf(home.split(self.piece_bytes // home.dtype.itemsize))
        self._num_pieces += len(shelf.pieces)
        self._largest = max(self._largest, shelf.pieces[0].nbytes)
        if self._buffers:
            self.seal()
        return shelf

    # In

    def expect(self, coming: Iterable[Store]) -> None:
        """Read ahead what is to come, nearest first, as far as there are buffers."""
        wanted: dict[tuple[_Shelf, int], None] = {}
        for store in coming:
            if isinstance(store, FileStore) and store.staging is self:
                wanted |= dict.fromkeys((store.shelf, at) for at in range(len(store.shelf.pieces)))
            if len(wanted) >= self._most:
                break
        for key in [key for key in self._ahead if key not in wanted]:
            self._drop(key)
        for shelf, at in wanted:
            if not self._start(shelf, at):
                break

    def has(self, shelf: _Shelf) -> bool:
        """Whether all of a shard is in buffers."""
        return len(shelf.ahead) == len(shelf.pieces) and all(
            buffer.job is None or buffer.job.done() for buffer in shelf.ahead.values()
        )

    def fetch(self, shelf: _Shelf, at: int) -> _Buffer:
        """A buffer with a piece in it, for which the host waits; `hand_in` returns it."""
        if at not in shelf.ahead and not self._start(shelf, at):
            self._make_room()
            self._start(shelf, at)
        for later in range(at + 1, len(shelf.pieces)):
            if not self._start(shelf, later):
                break
        buffer = shelf.ahead.pop(at)
        del self._ahead[shelf, at]
        if buffer.job is not None:
            try:
                buffer.job.result()
            except BaseException:
                self._free.append(buffer)
                raise
        return buffer

    def hand_in(self, buffer: _Buffer, mark: Mark) -> None:
        """Take a buffer back that may be used again after a copy out of it."""
        buffer.mark, buffer.job = mark, None
        self._free.append(buffer)

    def _start(self, shelf: _Shelf, at: int) -> bool:
        """Let a piece be read if it is not yet; say whether there was a buffer for it."""
        if at in shelf.ahead:
            return True
        if not self._buffers:
            self.seal()
        if not self._free:
            return False
        buffer, piece = self._free.popleft(), shelf.pieces[at]
        self._send(0, shelf, buffer, lambda: self.files.read(piece, buffer.of(piece)), buffer.mark)
        shelf.ahead[at] = buffer
        self._ahead[shelf, at] = None
        return True

    def _drop(self, key: tuple[_Shelf, int]) -> None:
        shelf, at = key
        del self._ahead[key]
        self._free.append(shelf.ahead.pop(at))

    def _make_room(self) -> None:
        """Give up what was read for the most distant use, or wait for what is being written."""
        if self._ahead:
            self._drop(next(reversed(self._ahead)))
        else:
            self._reclaim(self._out.popleft())

    def _reclaim(self, buffer: _Buffer) -> None:
        if buffer.job is not None:
            wait([buffer.job])
        self._free.append(buffer)

    # Out

    def room(self, shelf: _Shelf) -> _Buffer:
        """A buffer for a piece on its way out, which the current stream may fill."""
        if not self._buffers:
            self.seal()
        while self._out and (self._out[0].job is None or self._out[0].job.done()):
            self._reclaim(self._out.popleft())
        if not self._free:
            self._make_room()
        buffer = self._free.popleft()
        if buffer.job is not None:
            wait([buffer.job])  # of a guess that was wrong
        buffer.mark.wait()
        return buffer

    def send(self, shelf: _Shelf, at: int, buffer: _Buffer, mark: Mark) -> None:
        """Let a buffer be written to a piece after the copy into it."""
        piece = shelf.pieces[at]
        self._send(1, shelf, buffer, lambda: self.files.write(piece, buffer.of(piece)), mark)
        buffer.mark = DONE
        self._out.append(buffer)

    def forget(self, shelf: _Shelf) -> None:
        """Drop what has been read of a shard, which has changed."""
        for at in list(shelf.ahead):
            self._drop((shelf, at))

    # Both

    def _send(
        self, way: int, shelf: _Shelf, buffer: _Buffer, move: Callable[[], Future[None]], mark: Mark
    ) -> None:
        """Let a porter start a read or write when nothing speaks against it any more."""
        before = shelf.under_way()
        if buffer.job is not None:
            before.append(buffer.job)
        job: Future[None] = Future()

        def begin() -> None:
            try:
                wait(before)
                mark.synchronize()
                move().add_done_callback(lambda moved: _pass_on(moved, job))
            except BaseException as error:  # told to whoever waits for it
                job.set_exception(error)

        buffer.job = job
        shelf.jobs.append(job)
        self._porters[way].submit(begin)


def _pass_on(moved: Future[None], job: Future[None]) -> None:
    error = moved.exception()
    if error is None:
        job.set_result(None)
    else:
        job.set_exception(error)


class FileStore:
    """A shard in a file. See [Note: reading ahead]."""

    nbytes = 0
    tensors = ()

    def __init__(self, home: Tensor, staging: Staging, mesh: Mesh) -> None:
        self._home, self.staging = home, staging
        self.failure: OffloadError | None = None
        self.shelf = staging.shelve(home)
        self._reading, self._writing = mesh.reading, mesh.writing
        weakref.finalize(self, _give_back, staging, self.shelf, home).atexit = False

    @property
    def reader(self) -> Staging:
        """What reads it ahead."""
        return self.staging

    @property
    def is_at_hand(self) -> bool:
        """Whether all of it is in buffers."""
        return self.staging.has(self.shelf)

    @property
    def home(self) -> Tensor:
        """The shard as a part of its file, where all that was written is by now."""
        for job in self.shelf.under_way():
            job.result()
        self.staging.files.check()
        return self._home

    def feed(self, into: Tensor, gather: Callable[[Tensor], Ticket]) -> Ticket:
        """Copy pieces to the device as they arrive, and start a gather behind them."""
        end: Mark = DONE
        with self._reading.entered():
            parts = into.split([piece.numel() for piece in self.shelf.pieces])
            try:
                for at, part in enumerate(parts):
                    buffer = self.staging.fetch(self.shelf, at)
                    part.copy_(buffer.of(part), non_blocking=True)
                    end = self._reading.end()
                    self.staging.hand_in(buffer, end)
            except OffloadError as error:
                self.failure = error.with_traceback(None)  # which would hold on to memory
            gathering = gather(into)
        return end if gathering is DONE else gathering

    def write(self, shard: Tensor) -> Ticket:
        """Copy pieces into buffers beside the computation, and from there to the file."""
        self.staging.forget(self.shelf)
        if shard.data_ptr() == self._home.data_ptr():
            return DONE
        end: Mark = DONE
        with self._writing.entered():
            for at, part in enumerate(shard.split([p.numel() for p in self.shelf.pieces])):
                buffer = self.staging.room(self.shelf)
                into = buffer.of(self.shelf.pieces[at])
                if part.device == into.device:  # the host copies, and no stream waits for it
                    buffer.mark.synchronize()
                into.copy_(part.to(into.dtype), non_blocking=True)
                end = self._writing.end()
                self.staging.send(self.shelf, at, buffer, end)
        return end


def _give_back(staging: Staging, shelf: _Shelf, home: Tensor) -> None:
    staging.forget(shelf)
    wait(shelf.under_way())
    staging.files.give_back(home)


class InFiles:
    """Files, out of a depot, through the buffers of a staging."""

    is_near = False

    def __init__(self, staging: Staging) -> None:
        self._staging = staging

    def store(self, shard: Tensor, mesh: Mesh) -> FileStore:
        """A copy in the file, which gets the space back with the end of the store."""
        files = self._staging.files
        home = files.take(shard.numel(), shard.dtype)
        files.write(home, shard.to("cpu")).result()
        return FileStore(home, self._staging, mesh)
