"""``deepspeed.ops.aio``: asynchronous file access, which zeroshard does not have yet."""

from __future__ import annotations

from deepspeed._names import names

__all__ = ["AsyncIOBuilder"]


class AsyncIOBuilder:
    """What tells scripts whether state can be kept on NVMe: it cannot."""

    NAME = "async_io"

    def is_compatible(self, verbose: bool = False) -> bool:
        """Tell whether asynchronous file access is there."""
        del verbose
        return False


__getattr__, __dir__ = names(
    __name__, instead={"aio_handle": "leave nvme out; state stays on the devices"}
)
