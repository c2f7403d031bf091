"""The depots of one engine: host memory and files for what its plan lets leave the device."""

from __future__ import annotations

from zeroshard.config import AioConfig, Config, OffloadOptimizer, OffloadParam
from zeroshard.core.depot import Depot
from zeroshard.core.files import FileDepot, FileSettings
from zeroshard.core.mesh import Mesh
from zeroshard.core.slab import HostDepot
from zeroshard.engine.placement import Home

__all__ = ["Depots", "file_settings"]


def file_settings(aio: AioConfig) -> FileSettings:
    """How bytes travel between memory and files, by the words of the configuration."""
    usual = FileSettings()
    threads = aio.intra_op_parallelism or aio.thread_count or 1
    return FileSettings(
        block_bytes=aio.block_size or usual.block_bytes,
        depth=(aio.queue_depth or usual.depth) * threads,
    )


class Depots:
    """Makes each depot when it is first asked for; all of it is local.

    Args:
        settings: the configuration.
        mesh: the device, and this rank's number for messages.
    """

    def __init__(self, settings: Config, mesh: Mesh) -> None:
        self._settings, self._mesh = settings, mesh
        self._state: dict[Home, Depot] = {}

    def state(self, home: Home) -> Depot | None:
        """Where the optimizer's state and master weights of a unit are kept; None on the device.

        Raises:
            OffloadError: no file can be made.
        """
        if home == "none":
            return None
        if home not in self._state:
            block = self._settings.zero_optimization.offload_optimizer
            self._state[home] = self._make(home, block, "optimizer state", "offload_optimizer")
        return self._state[home]

    def _make(
        self, home: Home, block: OffloadOptimizer | OffloadParam, what: str, key: str
    ) -> Depot:
        if home == "nvme":
            assert block.nvme_path is not None, "files without a folder are refused by the rules"
            return FileDepot(
                block.nvme_path,
                name=f"rank {self._mesh.rank}",
                settings=file_settings(self._settings.aio),
            )
        return HostDepot(
            self._mesh.device,
            pin=block.pin_memory,
            name=what,
            pin_key=f"zero_optimization.{key}.pin_memory",
        )

    def seal(self) -> None:
        """Page-lock what was taken, and bring what is in files to the drive.

        Raises:
            OffloadError: memory cannot be locked, or the drive refuses.
        """
        for depot in self._state.values():
            depot.seal()

    def close(self) -> None:
        """Give the optimizer's state back, which nobody reads any more."""
        for depot in self._state.values():
            depot.close()
        self._state.clear()
