"""Memory that is mapped past the C library, and what the kernel is told about its pages.

Mapped through ctypes rather than :mod:`mmap`, whose objects unmap in whatever process they die in:
a child from which the memory was kept may have something else at these addresses by then. These
calls also let other threads run, which those of :mod:`mmap` do not.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import platform
import sys
import weakref
from collections.abc import Callable

__all__ = ["PAGE_BYTES", "Pages", "punch", "up_to_page"]

PAGE_BYTES = mmap.PAGESIZE
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14, which Python has no name for
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # of fallocate, likewise
_MBIND = {"x86_64": 237, "aarch64": 235}.get(platform.machine())  # its number as a system call
_PREFERRED = 1  # MPOL_PREFERRED
_FAILED = ctypes.c_void_p(-1).value


def up_to_page(nbytes: int) -> int:
    """So many bytes, in whole pages."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


class Pages:
    """Mapped memory: zeros that take up room only from their first write on, or a part of a file.

    ``address`` and ``nbytes`` are of whole pages. ``buffer`` is the memory as an object; it is
    unmapped with the last reference to that, in the process that mapped it, and not at the end of
    the interpreter, when somebody may still look at it and the kernel is about to clean up anyway.
    Of memory huge pages are asked for: there are fewer to fault in, to lock and to translate.
    """

    def __init__(
        self,
        nbytes: int,
        *,
        node: int | None = None,
        file: int | None = None,
        offset: int = 0,
        before_unmapping: Callable[[], None] = lambda: None,
    ) -> None:
        """Map memory.

        Args:
            nbytes: how much, rounded up to whole pages.
            node: the NUMA node that it should be of, whoever writes to it first. Containers often
                refuse that wish; pages are then of the node of who does.
            before_unmapping: called when nobody refers to the memory any more.
            file: the descriptor of a file, which stores go to; may be closed afterwards.
            offset: where its part begins: with a page.

        Raises:
            OSError: there is no room in the address space.
        """
        self.nbytes = up_to_page(nbytes)
        rights = mmap.PROT_READ | mmap.PROT_WRITE
        kind = mmap.MAP_SHARED if file is not None else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        handle = -1 if file is None else file
        self.address: int = _libc().mmap(None, self.nbytes, rights, kind, handle, offset)
        if self.address == _FAILED:
            raise _last_error()
        self.buffer = (ctypes.c_ubyte * self.nbytes).from_address(self.address)
        end = weakref.finalize(
            self.buffer, _unmap, self.address, self.nbytes, os.getpid(), before_unmapping
        )
        end.atexit = False
        if file is None:
            self._advise(0, self.nbytes, "MADV_HUGEPAGE")
            if node is not None:
                self._prefer(node)

    def touch(self, start: int, stop: int) -> None:
        """Back a range of whole pages by memory, without a change of what it holds.

        Kernels before Linux 5.14 leave that to the first write.
        """
        if sys.platform == "linux":
            _libc().madvise(self.address + start, stop - start, _POPULATE_WRITE)

    def clear(self, start: int, stop: int) -> None:
        """Turn any range into zeros, and give the memory of whole pages in it back."""
        first, last = up_to_page(start), stop // PAGE_BYTES * PAGE_BYTES
        if first < last and self._advise(first, last, "MADV_DONTNEED"):
            self.overwrite(start, first)
            self.overwrite(last, stop)
        else:
            self.overwrite(start, stop)

    def release(self) -> None:
        """Let go of the pages of a file, which keeps what was stored; the next access finds it."""
        self._advise(0, self.nbytes, "MADV_DONTNEED")

    def overwrite(self, start: int, stop: int) -> None:
        """Write zeros to any range: page-locked memory cannot be given back."""
        ctypes.memset(self.address + start, 0, stop - start)

    def keep_from_children(self, kept: bool) -> None:
        """Whether processes that are forked from now on lack the memory."""
        self._advise(0, self.nbytes, "MADV_DONTFORK" if kept else "MADV_DOFORK")

    def resident_bytes(self, start: int, stop: int) -> int:
        """How much of a range of whole pages is backed by memory."""
        if sys.platform != "linux" or start == stop:
            return stop - start
        pages = ctypes.create_string_buffer((stop - start) // PAGE_BYTES)
        if _libc().mincore(self.address + start, stop - start, pages):
            return stop - start
        return pages.raw.count(1) * PAGE_BYTES

    def _prefer(self, node: int) -> None:
        if sys.platform != "linux" or _MBIND is None:
            return
        word = 8 * ctypes.sizeof(ctypes.c_ulong)
        nodes = (ctypes.c_ulong * (node // word + 1))()
        nodes[node // word] = 1 << node % word
        address, nbytes = ctypes.c_void_p(self.address), ctypes.c_ulong(self.nbytes)
        # The kernel takes the number of bits as one more than there are.
        bits = ctypes.c_ulong(len(nodes) * word + 1)
        _libc().syscall(ctypes.c_long(_MBIND), address, nbytes, _PREFERRED, nodes, bits, 0)

    def _advise(self, start: int, stop: int, name: str) -> bool:
        """Tell the kernel something by its name in :mod:`mmap`; whether it was of a mind to listen.

        What one kernel does is asked of Linux only: elsewhere the same name may be just a hint.
        """
        advice: int | None = getattr(mmap, name, None)
        if sys.platform != "linux" or advice is None:
            return False
        return _libc().madvise(self.address + start, stop - start, advice) == 0


def punch(file: int, offset: int, nbytes: int) -> None:
    """Give whole pages of a file back to its drive, and read as zeros; where holes can be made."""
    if sys.platform == "linux":
        _libc().fallocate(file, _KEEP_SIZE | _PUNCH_HOLE, offset, nbytes)


def _unmap(address: int, nbytes: int, owner: int, before: Callable[[], None]) -> None:
    if os.getpid() == owner:
        before()
        _libc().munmap(address, nbytes)


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


@functools.cache
def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    library.mmap.restype = address
    library.mmap.argtypes = [address, size, number, number, number, ctypes.c_long]
    library.munmap.argtypes = [address, size]
    library.madvise.argtypes = [address, size, number]
    if sys.platform == "linux":
        library.mincore.argtypes = [address, size, ctypes.c_char_p]
        library.fallocate.argtypes = [number, number, ctypes.c_long, ctypes.c_long]
    return library
