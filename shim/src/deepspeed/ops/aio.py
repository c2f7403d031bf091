"""``deepspeed.ops.aio``: whether state can be kept in files; nothing has to be built for it."""

from __future__ import annotations

from deepspeed._names import names

__all__ = ["AsyncIOBuilder"]


class AsyncIOBuilder:
    """What tells scripts whether state can be kept on NVMe: it can."""

    NAME = "async_io"

    def is_compatible(self, verbose: bool = False) -> bool:
        """Tell whether asynchronous file access is there."""
        del verbose
        return True


__getattr__, __dir__ = names(
    __name__,
    instead={
        "aio_handle": "read and write files with torch or Python; state that is "
        "offloaded to nvme needs nobody's help"
    },
)
