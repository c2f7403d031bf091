"""The depots of one engine: host memory and files for what its plan lets leave the device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from zeroshard.config import AioConfig, Config
from zeroshard.core.depot import Depot
from zeroshard.core.files import FileDepot, FileSettings
from zeroshard.core.mesh import Mesh
from zeroshard.core.slab import HostDepot
from zeroshard.core.staging import InFiles, Staging
from zeroshard.core.store import ON_DEVICE, OnHost, Place
from zeroshard.engine.placement import Home, Placed

__all__ = ["Depots", "file_settings", "staging_bytes"]

# A GiB in all, as in DeepSpeed, in pieces that a drive is fast with.
_NUM_BUFFERS, _BUFFER_BYTES = 16, 64 << 20


def file_settings(aio: AioConfig) -> FileSettings:
    """How bytes travel between memory and files, by the words of the configuration."""
    usual = FileSettings()
    threads = aio.intra_op_parallelism or aio.thread_count or 1
    return FileSettings(
        block_bytes=aio.block_size or usual.block_bytes,
        depth=(aio.queue_depth or usual.depth) * threads,
    )


@dataclass(frozen=True, slots=True)
class _Buffers:
    """Host memory that shards pass through on their way from and to files."""

    count: int
    nbytes: int


def _buffers(settings: Config) -> _Buffers:
    block = settings.zero_optimization.offload_param
    numel, itemsize = block.buffer_size, 2 if settings.fp16.enabled or settings.bf16.enabled else 4
    return _Buffers(
        count=block.buffer_count or _NUM_BUFFERS,
        nbytes=_BUFFER_BYTES if numel is None else numel * itemsize,
    )


def staging_bytes(placed: Iterable[Placed], settings: Config) -> int:
    """Most bytes of host memory that shards in files pass through."""
    in_files = sum(each.size.parameters for each in placed if each.shard == "nvme")
    buffers = _buffers(settings)
    return min(in_files, buffers.count * buffers.nbytes)


class Depots:
    """Makes each depot once; all of it is local.

    Args:
        settings: the configuration.
        mesh: the device, and this rank's number for messages.
    """

    def __init__(self, settings: Config, mesh: Mesh) -> None:
        self._settings, self._mesh = settings, mesh
        self._state: dict[Home, Depot] = {}
        self._shards: dict[Home, Place] = {"none": ON_DEVICE}
        self._host: list[HostDepot] = []
        self._files: dict[str, FileDepot] = {}  # by the block of the configuration
        self._staging: list[Staging] = []

    def make(self, placed: Iterable[Placed], file_bytes: tuple[int, int]) -> None:
        """Make all depots of a plan, and take the space of files.

        Args:
            placed: the plan.
            file_bytes: of optimizer state, and of shards.

        Raises:
            OffloadError: no file can be made, or not so large.
        """
        for each in placed:
            self.state(each.state)
            self.shards(each.shard)
        blocks = ("offload_optimizer", "offload_param")
        for block, nbytes in zip(blocks, file_bytes, strict=True):
            if block in self._files:
                self._files[block].reserve(nbytes)

    def state(self, home: Home) -> Depot | None:
        """Where the optimizer's state and master weights of a unit are kept; None on the device."""
        if home == "none":
            return None
        if home not in self._state:
            block = self._settings.zero_optimization.offload_optimizer
            if home == "nvme":
                self._state[home] = self._make_files(
                    "offload_optimizer", block.nvme_path, pin=block.pin_memory
                )
            else:
                self._state[home] = self._make_host(
                    "optimizer state", "offload_optimizer", pin=block.pin_memory
                )
        return self._state[home]

    def shards(self, home: Home) -> Place:
        """Where the shards of a unit are kept."""
        if home not in self._shards:
            block = self._settings.zero_optimization.offload_param
            what = "parameters" if home == "cpu" else "buffers of parameters"
            host = self._make_host(what, "offload_param", pin=block.pin_memory)
            if home == "nvme":
                buffers = _buffers(self._settings)
                files = self._make_files("offload_param", block.nvme_path, pin=block.pin_memory)
                staging = Staging(files, host, count=buffers.count, nbytes=buffers.nbytes)
                self._staging.append(staging)
                self._shards[home] = InFiles(staging)
            else:
                self._shards[home] = OnHost(host)
        return self._shards[home]

    def _make_files(self, block: str, folder: str | None, *, pin: bool) -> FileDepot:
        assert folder is not None, "files without a folder are refused by the rules"
        settings = replace(file_settings(self._settings.aio), pin=pin)
        made = FileDepot(folder, name=f"rank {self._mesh.rank}", settings=settings)
        self._files[block] = made
        return made

    def _make_host(self, what: str, block: str, *, pin: bool) -> HostDepot:
        made = HostDepot(
            self._mesh.device,
            pin=pin,
            name=what,
            pin_key=f"zero_optimization.{block}.pin_memory",
        )
        self._host.append(made)
        return made

    def seal(self) -> None:
        """Page-lock what was taken, and bring what is in files to the drive.

        Raises:
            OffloadError: memory cannot be locked, or the drive refuses.
        """
        for each in (*self._files.values(), *self._host, *self._staging):
            each.seal()

    @property
    def host_bytes(self) -> int:
        """Bytes of what is in host memory."""
        return sum(depot.nbytes for depot in self._host)

    @property
    def pinned_bytes(self) -> int:
        """Bytes of host memory that are page-locked."""
        return sum(depot.locked_bytes for depot in self._host)

    @property
    def file_bytes(self) -> int:
        """Bytes of what is in files."""
        return sum(depot.nbytes for depot in self._files.values())

    @property
    def is_empty(self) -> bool:
        """Whether nothing leaves the device."""
        return not self._host and not self._files

    @property
    def has_files(self) -> bool:
        """Whether anything is in files."""
        return bool(self._files)

    def close(self) -> None:
        """Give the optimizer's state back, which nobody reads any more.

        Shards stay as long as somebody owns them, such as parameters that wait for another engine.
        """
        for depot in self._state.values():
            depot.close()
        self._state.clear()

    def discard(self) -> None:
        """Give everything back: no unit has taken anything."""
        self.close()
        for each in (*self._staging, *self._files.values(), *self._host):
            each.close()
