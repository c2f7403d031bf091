"""Host memory for what was taken off the device, in slabs that are page-locked in one call each.

[Note: slabs]
torch's own pinned memory comes in powers of two, up to twice of what is asked for, and is locked
block by block. Here tensors lie side by side in a few *slabs*. A slab is a range of addresses that
takes up memory only where its tensors were written. `seal` ends it behind its last tensor, has
several threads back it by memory, and page-locks it in one call; in one more for each large part
that was given back before, which is left out. So no tensor, whatever its size, lies in two locked
ranges, which a copy must not cross; no page is in two of them; and what a tensor needs beyond its
bytes is less than 64 of them, or less than a page from 1 MiB on. Memory is of the NUMA node of the
device: that is asked of the kernel, and the threads that touch it run there.

What is locked, a GPU may be reading or writing without the kernel's knowledge. So it is kept from
forked processes, where the kernel would copy each page of it into each child (or, older ones, give
the child the page that the GPU writes to), and it is unlocked before it is unmapped, with the
device at rest. When the interpreter ends, both are left to the kernel.
"""

from __future__ import annotations

import logging
import os
import resource
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from zeroshard.core.numa import bind, near
from zeroshard.core.world import rank_so_far
from zeroshard.errors import OffloadError, UsageError, compose
from zeroshard.host.cpus import num_usable_cpus
from zeroshard.host.memory import bytes_free as host_bytes_free
from zeroshard.host.memory import in_words
from zeroshard.host.pages import PAGE_BYTES, Pages, up_to_page

__all__ = ["CudaPinner", "HostDepot", "Pinner", "host_bytes_free"]

_log = logging.getLogger(__name__)

_ALIGN_BYTES = 64
_LARGE_BYTES = 1 << 20  # from here on a tensor starts with a page, as O_DIRECT wants it
_SMALLEST_SLAB_BYTES = 64 << 20
_LARGEST_SLAB_BYTES = 4 << 30  # a second or so to lock; beyond 512 GiB drivers refuse

_TOUCH_BYTES = 64 << 20  # that a thread asks for at once
_LOOK_BYTES = 1 << 30  # that are touched, or promised, before free memory is looked at again
_MOST_THREADS = 8  # the kernel's own locks let more of them add little
_PER_BYTE = 1 / 128  # what page tables, and the driver's tables of locked pages, take beside

_QUIET_BYTES = 1 << 30
_SAY_EVERY_S = 5.0


_Range: TypeAlias = tuple[int, int]
"""The first byte, and the one behind the last."""


class Pinner(Protocol):
    """A way to page-lock memory."""

    def lock(self, address: int, nbytes: int) -> str | None:
        """Lock whole pages; the reason where that is refused."""
        ...

    def unlock(self, address: int) -> str | None:
        """Unlock what was locked at an address, when no copy is under way; the reason if not."""
        ...


@dataclass(frozen=True)
class CudaPinner:
    """Registers memory with CUDA: copies are then asynchronous, and run at the rate of the bus."""

    device: torch.device

    def lock(self, address: int, nbytes: int) -> str | None:
        """Lock whole pages, for all devices; the reason where that is refused."""
        cudart: Any = torch.cuda.cudart()
        with torch.cuda.device(self.device):
            status = cudart.cudaHostRegister(address, nbytes, 1)  # cudaHostRegisterPortable
            return self._reason(cudart, status)

    def unlock(self, address: int) -> str | None:
        """Wait for the device, and unlock what was locked at an address; the reason if not."""
        cudart: Any = torch.cuda.cudart()
        with torch.cuda.device(self.device):
            with suppress(RuntimeError):  # of a kernel that failed, whoever wants its result hears
                torch.cuda.synchronize()
            return self._reason(cudart, cudart.cudaHostUnregister(address))

    def _reason(self, cudart: Any, status: Any) -> str | None:
        if int(status) == 0:
            return None
        # The runtime tells an error once more, to whoever launches the next kernel.
        with suppress(RuntimeError):
            torch.ones(1, device=self.device)
        return f"{cudart.cudaGetErrorString(status)} (CUDA error {int(status)})"


class _Lock:
    """The page-locking of one slab: ended with the slab, or with the last tensor in it."""

    def __init__(self, pinner: Pinner | None) -> None:
        self.nbytes = 0
        self._addresses: list[int] = []
        self._pinner, self._owner = pinner, os.getpid()

    def close(self, address: int, nbytes: int) -> str | None:
        """Lock a range; the reason where that is refused."""
        assert self._pinner is not None
        reason = self._pinner.lock(address, nbytes)
        if reason is None:
            self._addresses.append(address)
            self.nbytes += nbytes
        return reason

    def open(self) -> None:
        """Unlock what is locked, if it belongs to this process."""
        if self._pinner is None or os.getpid() != self._owner:
            return
        self.nbytes = 0
        while self._addresses:
            reason = self._pinner.unlock(self._addresses.pop())
            if reason is not None:
                _log.warning("host memory stays page-locked until the process ends: %s", reason)


@dataclass
class _Slab:
    """A range of addresses, and which parts of it belong to tensors. See [Note: slabs].

    Bytes from ``top`` on have never been given to anybody. ``holes`` are what is free below it, in
    order, none next to another; ``live`` are the bytes of tensors. ``is_filled`` says that all
    of these were seen to be backed by memory.
    """

    pages: Pages
    lock: _Lock
    end: int
    top: int = 0
    live: int = 0
    holes: list[_Range] = field(default_factory=list[_Range])
    is_filled: bool = True

    @property
    def is_locked(self) -> bool:
        return self.lock.nbytes > 0

    def find(self, nbytes: int) -> int | None:
        """Where so many bytes would lie, a hole first."""
        align = PAGE_BYTES if nbytes >= _LARGE_BYTES else _ALIGN_BYTES
        for first, last in [*self.holes, (self.top, self.end)]:
            start = -(-first // align) * align
            if start + nbytes <= last:
                return start
        return None

    def promised_bytes(self) -> int:
        """Bytes of tensors that are not backed by memory yet."""
        if self.is_locked or self.is_filled:
            return 0
        missing = max(0, self.live - self.pages.resident_bytes(0, up_to_page(self.top)))
        self.is_filled = not missing
        return missing

    def occupy(self, start: int, nbytes: int) -> None:
        """Give a range that was found to a tensor, as zeros."""
        stop = start + _slot(nbytes)
        self.live += stop - start
        self.is_filled = False
        if start < self.top:
            if self.is_locked:
                self.pages.overwrite(start, stop)
            else:
                self.pages.clear(start, stop)
            first, last = next(hole for hole in self.holes if hole[0] <= start < hole[1])
            self.holes.remove((first, last))
            self._add_holes((first, start), (stop, last))
        else:
            self._add_holes((self.top, start))
            self.top = stop

    def leave(self, start: int, nbytes: int) -> None:
        """Take a tensor's range back; where it is not locked, the system gets its pages."""
        stop = start + _slot(nbytes)
        self.live -= stop - start
        if not self.is_locked:
            self.pages.clear(start, stop)
        self._add_holes((start, stop))

    def used(self) -> list[_Range]:
        """The ranges of whole pages between holes that are large enough to be left out."""
        starts = [0, *(last // PAGE_BYTES * PAGE_BYTES for _, last in self._large_holes())]
        stops = [*(up_to_page(first) for first, _ in self._large_holes()), up_to_page(self.top)]
        return [(first, last) for first, last in zip(starts, stops, strict=True) if first < last]

    def end_here(self) -> None:
        """Let nothing be found behind the last tensor, nor in holes that were left out."""
        large = self._large_holes()
        self.end, self.holes = self.top, [hole for hole in self.holes if hole not in large]

    def unlock(self) -> None:
        """End the page-locking, if it is locked."""
        self.lock.open()
        self.pages.keep_from_children(False)

    def _large_holes(self) -> list[_Range]:
        return [(first, last) for first, last in self.holes if last - first >= _LARGE_BYTES]

    def _add_holes(self, *added: _Range) -> None:
        holes: list[_Range] = []
        for first, last in sorted([*self.holes, *added]):
            if holes and holes[-1][1] == first:
                holes[-1] = (holes[-1][0], last)
            elif first < last:
                holes.append((first, last))
        self.holes = holes


class HostDepot:
    """Host memory for what is not on the device, page-locked when sealed. See [Note: slabs].

    A tensor keeps its memory, even past the depot's end, but after it was given back that memory
    may be another's. torch does not know of copies from and to memory that it did not allocate:
    whoever gives a tensor back has waited for those with it.

    For one thread at a time, but for `give_back`: what finalizers call, any thread may call at any
    time, this one in the middle of a call of its own as well.
    """

    is_near = False

    def __init__(
        self,
        device: torch.device,
        *,
        pin: bool,
        name: str,
        pin_key: str = "zero_optimization.offload_optimizer.pin_memory",
        largest_slab_bytes: int = _LARGEST_SLAB_BYTES,
        pinner: Pinner | None = None,
        bytes_free: Callable[[], int | None] = host_bytes_free,
    ) -> None:
        """Describe a depot; nothing is mapped yet.

        Args:
            device: what the memory is copied from and to; page-locked only for a GPU.
            pin: whether to page-lock.
            name: what lies in it, for messages, such as "optimizer state".
            pin_key: the key of the configuration that says ``pin``, for messages.
            largest_slab_bytes: upper limit of slabs that hold more than one tensor.
            pinner: the way to page-lock; CUDA's unless given.
            bytes_free: tells how much memory of the host is left; None where that is unknown.
        """
        if pinner is None and device.type == "cuda":
            pinner = CudaPinner(device)
        self._pinner = pinner if pin else None
        self._name, self._pin_key = name, pin_key
        self._near = near(device)
        self._largest_slab_bytes = largest_slab_bytes
        self._bytes_free = bytes_free
        self._slabs: list[_Slab] = []
        self._homes: dict[int, tuple[_Slab, int]] = {}
        self._given_back: deque[tuple[_Slab, int, int]] = deque()
        self._lock_of_slabs = threading.Lock()
        self._granted = 0
        self.nbytes = 0

    @property
    def locked_bytes(self) -> int:
        """Bytes of memory that are page-locked."""
        return sum(slab.lock.nbytes for slab in self._slabs)

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A flat tensor of zeros that take up memory when they are written, or at `seal`.

        Raises:
            OffloadError: the host has not enough memory left.
        """
        nbytes = numel * dtype.itemsize
        if not nbytes:
            return torch.empty(numel, dtype=dtype)
        with self._alone():
            slab, start = self._find(nbytes)
            slab.occupy(start, nbytes)
            # Each tensor has a storage of its own, so saving one does not save the slab.
            tensor = torch.frombuffer(slab.pages.buffer, dtype=dtype, count=numel, offset=start)
            self._homes[tensor.data_ptr()] = slab, nbytes
            self.nbytes += nbytes
        return tensor

    def give_back(self, tensor: Tensor) -> None:
        """End the use of a tensor, with which no copy is under way; slabs without any are unmapped.

        Raises:
            UsageError: it is none of this depot, or was given back before.
        """
        if not tensor.numel():
            return
        address = tensor.data_ptr()
        slab, nbytes = self._homes.get(address, (None, 0))
        if slab is None or nbytes != tensor.nbytes:
            raise UsageError(f"a tensor was given back to {self._name} that was not taken there.")
        del self._homes[address]
        self._given_back.append((slab, address - slab.pages.address, nbytes))
        self._clear_up()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let nobody else change slabs inside; what is given back meanwhile waits for the end."""
        try:
            with self._lock_of_slabs:
                yield
        finally:
            self._clear_up()

    def _clear_up(self) -> None:
        """Take back what was given back, unless somebody is at work, who does it afterwards."""
        while self._given_back and self._lock_of_slabs.acquire(blocking=False):
            try:
                while self._given_back:
                    self._take_back(*self._given_back.popleft())
            finally:
                self._lock_of_slabs.release()

    def _take_back(self, slab: _Slab, start: int, nbytes: int) -> None:
        self.nbytes -= nbytes
        if slab.live == _slot(nbytes):
            slab.unlock()
            self._slabs.remove(slab)
        slab.leave(start, nbytes)

    def seal(self) -> None:
        """Page-lock what was taken and is not locked yet, if this depot is to be locked at all.

        Takes some tenths of a second per GiB, with a line in the log every few seconds.

        Raises:
            OffloadError: the host has not enough memory left, or does not let it be locked. What
                this call locked is unlocked then.
        """
        if self._pinner is not None:
            with self._alone():
                self._lock_slabs([slab for slab in self._slabs if not slab.is_locked])

    def _lock_slabs(self, slabs: Sequence[_Slab]) -> None:
        if not slabs:
            return
        total = sum(last - first for slab in slabs for first, last in slab.used())
        begin = time.monotonic()
        done, said = 0, begin
        cpus = self._near.cpus
        num_threads = min(_MOST_THREADS, len(cpus), num_usable_cpus())
        try:
            with ThreadPoolExecutor(num_threads, "zeroshard-touch", bind, (cpus,)) as threads:
                for slab in slabs:
                    self._touch(slab, threads)
                    self._lock(slab, total)
                    done += slab.lock.nbytes
                    if time.monotonic() - said >= _SAY_EVERY_S and done < total:
                        said = time.monotonic()
                        _log.info(
                            "page-locking host memory for %s: %s of %s after %.0f s",
                            *(self._name, in_words(done), in_words(total), said - begin),
                        )
        except OffloadError:
            for slab in slabs:
                slab.unlock()
            raise
        _log.log(
            logging.INFO if total >= _QUIET_BYTES else logging.DEBUG,
            "page-locked %s of host memory for %s in %.1f s (%d slabs)",
            *(in_words(total), self._name, time.monotonic() - begin, len(slabs)),
        )

    def close(self) -> None:
        """Unlock everything. Memory is unmapped with the last tensor that is left in a slab."""
        with self._alone():
            for slab in self._slabs:
                slab.unlock()
            self._slabs, self._homes, self.nbytes = [], {}, 0
            self._given_back.clear()

    def _find(self, nbytes: int) -> tuple[_Slab, int]:
        """Room for so many bytes, in a new slab if in no other.

        Raises:
            OffloadError: the host has not enough memory left.
        """
        found = ((slab, slab.find(nbytes)) for slab in self._slabs)
        slab, start = next(((slab, at) for slab, at in found if at is not None), (None, 0))
        if slab is None or not slab.is_locked:
            self._expect_room(nbytes)
        return (slab, start) if slab is not None else (self._add_slab(nbytes), 0)

    def _add_slab(self, nbytes: int) -> _Slab:
        """Map a slab, as large as all others, so that there are few and none is much too large."""
        held = sum(slab.pages.nbytes for slab in self._slabs)
        size = max(nbytes, min(self._largest_slab_bytes, max(held, _SMALLEST_SLAB_BYTES)))
        lock = _Lock(self._pinner)
        try:
            pages = Pages(size, node=self._near.node, before_unmapping=lock.open)
        except OSError as error:
            raise OffloadError(
                compose(
                    f"rank {rank_so_far()} cannot map {in_words(size)} of host memory for "
                    f"{self._name}, of which {in_words(self.nbytes)} are mapped: {error.strerror}.",
                    hint="raise the limit of addresses (`ulimit -v`), or the host's "
                    "vm.overcommit_memory and vm.overcommit_ratio.",
                )
            ) from error
        self._slabs.append(_Slab(pages, lock, pages.nbytes))
        return self._slabs[-1]

    def _expect_room(self, nbytes: int) -> None:
        """See to it that memory for a tensor is there when it is written.

        What other tensors have not used yet counts as used. Free memory is looked at again when
        what was taken since then has come near to it, or to a GiB.

        Raises:
            OffloadError: the host has not enough memory left.
        """
        if nbytes <= self._granted:
            self._granted -= nbytes
            return
        free = self._bytes_free()
        if free is None:
            return
        room = int(free / (1 + _PER_BYTE)) - sum(slab.promised_bytes() for slab in self._slabs)
        if nbytes > room:
            raise self._exhausted(nbytes, max(room, 0))
        self._granted = min(_LOOK_BYTES, (room - nbytes) // 16)

    def _exhausted(self, asked: int, free: int) -> OffloadError:
        return OffloadError(
            compose(
                f"rank {rank_so_far()} needs {in_words(asked)} more of host memory (RAM) for "
                f"{self._name}, of which it holds {in_words(self.nbytes)}, and "
                f"{in_words(free)} are free on this host or within the limit of its container.",
                hint="offload less (zeroshard.gpu_budget, zero_optimization.offload_optimizer."
                'ratio), offload to "nvme", use more GPUs or hosts, or raise the memory limit.',
            )
        )

    def _touch(self, slab: _Slab, threads: ThreadPoolExecutor) -> None:
        """Back a slab by memory, which the one thread that locks would do page by page.

        Raises:
            OffloadError: the host has not enough memory left.
        """
        for used in slab.used():
            for start, stop in _cut(*used, _LOOK_BYTES):
                missing = stop - start - slab.pages.resident_bytes(start, stop)
                free = self._bytes_free() if missing else None
                if free is not None and missing * (1 + _PER_BYTE) > free:
                    raise self._exhausted(missing, free)
                starts, stops = zip(*_cut(start, stop, _TOUCH_BYTES), strict=True)
                list(threads.map(slab.pages.touch, starts, stops))

    def _lock(self, slab: _Slab, total: int) -> None:
        """Page-lock a slab, behind whose last tensor it ends from now on.

        Raises:
            OffloadError: it is refused.
        """
        slab.pages.keep_from_children(True)
        for start, stop in slab.used():
            reason = slab.lock.close(slab.pages.address + start, stop - start)
            if reason is not None:
                raise self._refused(stop - start, total, reason)
        slab.end_here()

    def _refused(self, nbytes: int, total: int, reason: str) -> OffloadError:
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        return OffloadError(
            compose(
                f"rank {rank_so_far()} cannot page-lock {in_words(total)} of host memory for "
                f"{self._name}: CUDA refused {in_words(nbytes)} after "
                f"{in_words(self.locked_bytes)}: {reason}. The limit of locked memory "
                "(RLIMIT_MEMLOCK) is "
                f"{'none' if limit == resource.RLIM_INFINITY else in_words(limit)}.",
                hint=f'set "pin_memory": false ({self._pin_key}), with which copies are slower, '
                "or raise the limit (`ulimit -l unlimited`; `--ulimit memlock=-1` for a "
                "container).",
            )
        )


def _slot(nbytes: int) -> int:
    """What a tensor of so many bytes occupies: all that the next one needs to be aligned."""
    return -(-nbytes // _ALIGN_BYTES) * _ALIGN_BYTES


def _cut(start: int, stop: int, nbytes: int) -> Iterator[_Range]:
    """Cut a range into parts of so many bytes, and a rest."""
    return ((first, min(first + nbytes, stop)) for first in range(start, stop, nbytes))
