"""Gathers that copy the shards out of the other ranks' memory: no collective, no order, no waiting.

[Note: pulls]
Shards are read between two optimizer steps and changed only in them. So a rank may copy the other
ranks' shards whenever it likes, if all agree twice a step: that all have read the old values before
any is changed, and that all are changed before any is read. Between these fences no rank waits for
another, and each gathers what it alone needs in an order of its own.

The shards of all units of a rank lie in one *slab*, memory that the other ranks of its shard axis
have mapped: symmetric memory on GPUs, where copy engines do the reading over NVLink and no
multiprocessor is taken from the computation; POSIX shared memory on CPUs. Stores are views of it,
and so are master weights that are the shard itself. Whoever changes shards does it inside of
`rewriting`; whoever wants to move them first gives the slab up (`withdraw`).

Pulls run on streams of their own: a pull starts after everything that the compute stream was given
so far (that includes the fence, and the allocation of the buffer), and the compute stream waits for
its end through the ticket. A fence makes the compute stream wait for all pulls of this rank, then
for all other ranks.
"""

# torch has no types for its symmetric memory.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import logging
import mmap
import os
import platform
import secrets
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from zeroshard.core.collectives import (
    DONE,
    Answered,
    Exchange,
    Ticket,
    all_reduce_,
    broadcast_bytes,
)
from zeroshard.core.mesh import Axis, Mesh
from zeroshard.core.transport import COLLECTIVE
from zeroshard.core.unit import Unit

__all__ = [
    "BatchedCopies",
    "Copier",
    "Pulled",
    "Slab",
    "StreamCopies",
    "UnavailableError",
    "aligned",
    "host_number",
    "map_slab",
    "on_all",
    "share",
    "withdraw",
]

_log = logging.getLogger(__name__)
_ALIGN_BYTES = 512
_NUM_STREAMS = 2
_SHARED_MEMORY = Path("/dev/shm")


def aligned(nbytes: int) -> int:
    """So many bytes, or a few more, so that what follows them in a slab is aligned."""
    return -(-nbytes // _ALIGN_BYTES) * _ALIGN_BYTES


class UnavailableError(Exception):
    """Ranks cannot read each other's memory; the text says why. Raised on all of them."""


# Copies


Copy: TypeAlias = tuple[Tensor, Tensor]
"""A target and a source, contiguous and of equal sizes."""


class Copier(Protocol):
    """A way to copy between the memories of two ranks."""

    def __call__(self, copies: Sequence[Copy]) -> Ticket:
        """Start copies, in order with what the compute stream has been given."""
        ...

    def join(self) -> None:
        """Make the compute stream wait for all copies."""
        ...


class HostCopies:
    """Copies by the calling thread."""

    def __call__(self, copies: Sequence[Copy]) -> Ticket:
        """Copy."""
        for target, source in copies:
            target.copy_(source)
        return DONE

    def join(self) -> None:
        """They are done already."""


@dataclass(frozen=True, slots=True)
class _Events:
    """The end of copies on several streams."""

    device: torch.device
    events: Sequence[Any]  # torch.cuda.Event

    def wait(self) -> None:
        stream = torch.cuda.current_stream(self.device)
        for event in self.events:
            stream.wait_event(event)


class StreamCopies:
    """One asynchronous copy for each pair, dealt out to some streams."""

    def __init__(self, device: torch.device, num_streams: int = _NUM_STREAMS) -> None:
        self._device = device
        self._streams = [torch.cuda.Stream(device) for _ in range(num_streams)]

    def __call__(self, copies: Sequence[Copy]) -> Ticket:
        """Start the copies."""
        start = torch.cuda.current_stream(self._device).record_event()
        ends: list[Any] = []
        for number, stream in enumerate(self._streams):
            share = copies[number :: len(self._streams)]
            if not share:
                break
            stream.wait_event(start)
            with torch.cuda.stream(stream):
                for target, source in share:
                    target.copy_(source, non_blocking=True)
            ends.append(stream.record_event())
        return _Events(self._device, ends)

    def join(self) -> None:
        """Make the compute stream wait for all copies."""
        current = torch.cuda.current_stream(self._device)
        for stream in self._streams:
            current.wait_stream(stream)


class BatchedCopies:
    """One call of the CUDA runtime for all copies, with the wish that copy engines make them.

    Those within this rank's memory are made by a kernel all the same.

    Raises:
        ImportError: there is no ``cuda.bindings``.
        AttributeError: it does not know the call.
    """

    def __init__(self, device: torch.device) -> None:
        from cuda.bindings import runtime  # pyright: ignore  # noqa: PLC0415

        cuda: Any = runtime
        attributes = cuda.cudaMemcpyAttributes()
        attributes.srcAccessOrder = cuda.cudaMemcpySrcAccessOrder.cudaMemcpySrcAccessOrderStream
        attributes.flags = int(cuda.cudaMemcpyFlags.cudaMemcpyFlagPreferOverlapWithCompute)
        self._call: Callable[..., Any] = cuda.cudaMemcpyBatchAsync
        self._forget_error: Callable[[], object] = cuda.cudaGetLastError
        self._attributes = [attributes]
        self._device, self._stream = device, torch.cuda.Stream(device)

    def __call__(self, copies: Sequence[Copy]) -> Ticket:
        """Start the copies.

        Raises:
            RuntimeError: the call failed.
        """
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(self._device))
        targets = [target.data_ptr() for target, _ in copies]
        sources = [source.data_ptr() for _, source in copies]
        sizes = [target.nbytes for target, _ in copies]
        count, handle = len(copies), stream.cuda_stream
        status, *_ = self._call(targets, sources, sizes, count, self._attributes, [0], 1, handle)
        if int(status) != 0:
            self._forget_error()  # else torch finds it after a call of its own
            raise RuntimeError(f"cudaMemcpyBatchAsync failed: {status}")
        return stream.record_event()

    def join(self) -> None:
        """Make the compute stream wait for all copies."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


def _copier(device: torch.device) -> Copier:
    """The way to copy with the fewest calls that the installed libraries and the driver know."""
    try:
        copier = BatchedCopies(device)
    except (ImportError, AttributeError):
        return StreamCopies(device)
    try:
        source = torch.ones(_ALIGN_BYTES, dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        copier([(target, source)]).wait()
        if not torch.equal(target, source):
            raise RuntimeError("cudaMemcpyBatchAsync copied nothing")
    except Exception as error:  # older drivers do not know the call, whatever the library says
        _log.info("shards of other ranks are copied one by one: %s", error)
        return StreamCopies(device)
    return copier


# Slabs


class Slab:
    """As many bytes of each rank of the shard axis, mapped by all of them. See [Note: pulls].

    ``rows`` are the bytes by rank; ``owner`` is what keeps the mappings alive; ``handle`` is
    that of torch's symmetric memory, on GPUs.
    """

    def __init__(
        self, rows: Sequence[Tensor], mesh: Mesh, copy: Copier, owner: object, handle: Any = None
    ) -> None:
        self.rows, self.copy, self.handle = rows, copy, handle
        self._mesh, self._owner = mesh, owner
        self._flag = torch.zeros(1, dtype=torch.int32, device=mesh.device)

    def fence(self) -> None:
        """Go on when all ranks have come here, with all that they read and wrote before."""
        self.copy.join()
        with Answered(self._mesh.rank, "to change the shards that others read"):
            all_reduce_(self._flag, self._mesh.shard)


class Pulled:
    """A unit's shards, in the slab of each rank."""

    def __init__(self, slab: Slab, start: int, numel: int, dtype: torch.dtype) -> None:
        self._slab = slab
        stop = start + numel * dtype.itemsize
        self._shards = [row[start:stop].view(dtype) for row in slab.rows]

    @property
    def memory(self) -> Slab:
        """Where other ranks read the shard."""
        return self._slab

    def of(self, rank: int) -> Tensor:
        """The shard of a rank."""
        return self._shards[rank]

    def gather(self, full: Tensor, shard: Tensor, axis: Axis) -> Ticket:
        """Start copying the shards of all ranks, beginning with the next one's."""
        if not full.numel():
            return DONE
        parts = full.split(full.numel() // axis.size)
        copies = [(parts[rank], self._shards[rank]) for rank in axis.others]
        return self._slab.copy([*copies, (parts[axis.rank], shard)])


@contextmanager
def on_all(mesh: Mesh) -> Iterator[None]:
    """What is done inside is done on every rank afterwards. A collective.

    Raises:
        UnavailableError: on every rank, if it failed on one.
    """
    reason = ""
    try:
        yield
    except Exception as error:  # whatever it is, the others wait below
        reason = f"rank {mesh.rank}: {error}"
    failed = [rank for rank, (one,) in enumerate(Exchange(mesh, 1)([bool(reason)])) if one]
    if failed:
        raise UnavailableError(broadcast_bytes(reason.encode(), mesh, failed[0]).decode())


def _of_my_row(values: Sequence[int], mesh: Mesh) -> list[int]:
    """What the ranks of this rank's shard axis have shown, in their order."""
    first = mesh.rank - mesh.shard.rank
    return list(values[first : first + mesh.shard.size])


def _map_host(nbytes: int, mesh: Mesh) -> Slab:
    """Shared memory without a name: nothing is left behind, whichever rank dies when."""
    folder = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
    tokens = [token for (token,) in Exchange(mesh, 1)([secrets.randbits(62)])]
    mine = folder / f"zeroshard-{tokens[mesh.rank]:016x}"
    with ExitStack() as ends:
        with on_all(mesh):
            own = os.open(mine, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            ends.callback(os.close, own)
            ends.callback(mine.unlink)
        files: list[int] = []
        with on_all(mesh):  # fails where a peer is on another host
            for token in _of_my_row(tokens, mesh):
                files.append(os.open(folder / f"zeroshard-{token:016x}", os.O_RDWR))
                ends.callback(os.close, files[-1])
            # Files take up memory only from here on.
            if sys.platform == "linux":
                os.posix_fallocate(own, 0, nbytes)
            else:
                os.ftruncate(own, nbytes)
        with on_all(mesh):
            maps = [mmap.mmap(file, nbytes) for file in files]
    rows = [torch.frombuffer(each, dtype=torch.uint8) for each in maps]
    return Slab(rows, mesh, HostCopies(), maps)


@contextmanager
def _without_multicast() -> Iterator[None]:
    """Symmetric memory that is mapped inside gets no multicast object: pulls have no use for it."""
    name = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def host_number() -> int:
    """A number that two ranks share if they are on one host."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    name = platform.node() + (boot.read_text() if boot.exists() else "")
    return zlib.crc32(name.encode())


def _check_gpus(mesh: Mesh) -> None:
    """Refuse GPUs that cannot read each other's memory.

    Raises:
        UnavailableError: on every rank.
    """
    mine = mesh.device.index
    shown = Exchange(mesh, 2)([host_number(), mine])
    hosts = _of_my_row([host for host, _ in shown], mesh)
    devices = _of_my_row([device for _, device in shown], mesh)
    with on_all(mesh):
        if len(set(hosts)) > 1:
            raise OSError("the ranks that share shards are on several hosts")
        if len(set(devices)) < len(devices):
            raise OSError("ranks share a GPU, or each of them sees only its own")
        for device in devices:
            if device != mine and not torch.cuda.can_device_access_peer(mine, device):
                raise OSError(f"GPU {mine} cannot read the memory of GPU {device}")


def _map_gpus(nbytes: int, mesh: Mesh) -> Slab:
    """Symmetric memory: one allocation of each GPU, mapped by all the others."""
    device, group = mesh.device, mesh.shard.gather
    assert group is not None, "pulls are for several ranks"
    with on_all(mesh):
        if torch.version.cuda is None:
            raise OSError("this torch is not built for CUDA")
        import torch.distributed._symmetric_memory as symmetric_memory  # noqa: PLC0415

        asked: Any = getattr(symmetric_memory, "get_backend", None)  # older torch has one kind
        if asked is not None and asked(device) != "CUDA":
            raise OSError(f"symmetric memory is of the kind {asked(device)}, not CUDA")
    _check_gpus(mesh)
    with _without_multicast(), torch.cuda.device(device):
        with on_all(mesh):  # a rank without memory would let the others wait for it in there
            own = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device)
        with on_all(mesh):
            handle = symmetric_memory.rendezvous(own, group.group_name)
            rows = [
                own if rank == mesh.shard.rank else handle.get_buffer(rank, (nbytes,), torch.uint8)
                for rank in range(mesh.shard.size)
            ]
        return Slab(rows, mesh, _copier(device), (own, handle), handle)


def map_slab(nbytes: int, mesh: Mesh) -> Slab:
    """Memory of all ranks of the shard axis, mapped by each of them. A collective over all ranks.

    Raises:
        UnavailableError: on every rank; what has been mapped is given back.
    """
    slab = (_map_gpus if mesh.device.type == "cuda" else _map_host)(nbytes, mesh)
    # Each rank leaves its number for the others, which look whether they find it.
    slab.rows[mesh.shard.rank][:1].fill_(mesh.shard.rank)
    slab.fence()
    with on_all(mesh):
        found = [int(row[0]) for row in slab.rows]
        if found != [rank % 256 for rank in range(mesh.shard.size)]:
            raise OSError(f"the memory of other ranks is not what they wrote: {found}")
    slab.fence()
    return slab


# Units


def share(units: Sequence[Unit], mesh: Mesh) -> None:
    """Let units be gathered by pulls: their shards move into a slab. A collective over all ranks.

    For units that are freed after use, the same on all ranks. Unit by unit the memory that shards
    had before is given back, so up to one more set of shards is held meanwhile.

    Raises:
        UnavailableError: on every rank, with nothing changed.
    """
    starts: list[int] = []
    nbytes = 0
    for unit in units:
        assert not unit.lifetime.params_stay, f"{unit.name} is never gathered from its shards"
        starts.append(nbytes)
        size = unit.layout.shard_numel * unit.dtype.itemsize
        nbytes += aligned(size)
    slab = map_slab(max(nbytes, 1), mesh)
    for unit, start in zip(units, starts, strict=True):
        pulled = Pulled(slab, start, unit.layout.shard_numel, unit.dtype)
        unit.rehouse(pulled.of(mesh.shard.rank), pulled)
    slab.fence()
    if mesh.device.type == "cuda":
        torch.cuda.empty_cache()  # of what the shards were in


def withdraw(units: Iterable[Unit]) -> list[Unit]:
    """Move shards out of memory that other ranks read, and gather them by collectives.

    Local: what other ranks still read stays what it was. The slab's memory is given back when the
    last rank has withdrawn.

    Returns:
        The units that had been shared.
    """
    shared = [unit for unit in units if unit.gathers_alone]
    for unit in shared:
        numel, device = unit.layout.shard_numel, unit.mesh.device
        unit.rehouse(torch.empty(numel, dtype=unit.dtype, device=device), COLLECTIVE)
    return shared
