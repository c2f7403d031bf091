"""``deepspeed.checkpoint.utils``: state made ready for a file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepspeed._names import names
from zeroshard.core import tree

__all__ = ["clone_tensors_for_torch_save"]


def clone_tensors_for_torch_save(item: Any, device: torch.device | str = "cpu") -> Any:
    """Copy every tensor in nested containers to a device, with no more memory than its own.

    Parameters are views of larger buffers, all of which a file would hold. Those that are one and
    the same stay so.
    """
    copies: dict[object, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
        key = (*place, tensor.dtype, tensor.shape, tensor.stride())
        if key not in copies or not tensor.numel():
            copies[key] = torch.empty_like(tensor, device=device).copy_(tensor.detach())
        return copies[key]

    return tree.replace(item, copy)


__getattr__, __dir__ = names(__name__)
