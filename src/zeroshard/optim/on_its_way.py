"""A scalar of the device that the host will want to know."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["OnItsWay"]


class OnItsWay:
    """A scalar that is copied to the host while the device goes on with other work.

    The copy is queued on the stream that is current, behind what that was given so far.
    """

    def __init__(self, value: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = value
        if value.is_cuda:
            self._host = torch.empty_like(value, device="cpu", pin_memory=True)
            self._host.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def tensor(self) -> Tensor:
        """The value on the host, once it has arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._host

    def get(self) -> float:
        """The value, once it has arrived."""
        return float(self.tensor())
