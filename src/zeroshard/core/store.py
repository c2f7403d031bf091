"""Where a shard lives between uses.

A placement is a store: the unit asks it for the shard when a gather starts and hands it the stepped
master weights afterwards, and does not know where the bytes are. Device memory is the first store;
host memory and files are others with the same two verbs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

__all__ = ["DeviceStore", "Store"]


class Store(Protocol):
    """A home for one shard in the compute dtype."""

    @property
    def nbytes(self) -> int:
        """Bytes the store keeps on the device."""
        ...

    @property
    def tensors(self) -> Sequence[Tensor]:
        """What it keeps on the device."""
        ...

    def read(self, into: Tensor) -> Tensor:
        """The shard as a device tensor: ``into`` filled with it, or one that holds it already."""
        ...

    def write(self, shard: Tensor) -> None:
        """Replace the content, casting from the dtype of ``shard``."""
        ...


class DeviceStore:
    """A shard in device memory, possibly a part of a larger tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def nbytes(self) -> int:
        """Bytes the store keeps on the device."""
        return self.tensor.nbytes

    @property
    def tensors(self) -> Sequence[Tensor]:
        """What it keeps on the device."""
        return (self.tensor,)

    def read(self, into: Tensor) -> Tensor:
        """The stored tensor itself; nothing is copied."""
        return self.tensor

    def write(self, shard: Tensor) -> None:
        """Copy ``shard`` in, unless it is the very memory of the store."""
        if shard.data_ptr() != self.tensor.data_ptr():
            self.tensor.copy_(shard)
