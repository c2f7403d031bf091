"""Where a unit keeps what is not needed between uses: on the device, on the host or in files.

A depot hands out memory of exactly the size that is asked for, as ordinary tensors: those of a
device are of that device, and those of the host and of files are of the CPU, so whoever looks at
them or edits them between two steps needs to know nothing of it. Only what moves bytes at speed
asks which of the three it is.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Depot", "DeviceDepot"]


class Depot(Protocol):
    """A home for tensors."""

    @property
    def is_near(self) -> bool:
        """Whether kernels of the device work on its tensors where they are."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that were taken and not given back."""
        ...

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A flat tensor of zeros whose memory belongs to nobody else.

        Raises:
            OffloadError: there is no room for it.
        """
        ...

    def give_back(self, tensor: Tensor) -> None:
        """End the use of a tensor that was taken; its memory may go to another one."""
        ...

    def seal(self) -> None:
        """Do what is best done once, after the tensors were taken and before the first step.

        May be called again after more was taken.
        """
        ...

    def close(self) -> None:
        """Give everything back. No tensor that was taken may be used afterwards."""
        ...


class DeviceDepot:
    """The memory of the device itself."""

    is_near = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.nbytes = 0

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A flat tensor of zeros."""
        tensor = torch.zeros(numel, dtype=dtype, device=self._device)
        self.nbytes += tensor.nbytes
        return tensor

    def give_back(self, tensor: Tensor) -> None:
        """Count it out: its memory is freed with the last reference to it."""
        self.nbytes -= tensor.nbytes

    def seal(self) -> None:
        """Nothing is left to do."""

    def close(self) -> None:
        """Nothing is held."""
