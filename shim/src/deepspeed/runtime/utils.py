"""``deepspeed.runtime.utils``: batches moved to devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deepspeed._names import names
from zeroshard.core import tree

__all__ = ["move_to_device"]


def move_to_device(
    item: Any, device: torch.device | str, criterion_func: Callable[[Tensor], bool] | None = None
) -> Any:
    """Move the tensors of nested containers to a device, all or those that a function chooses."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device) if criterion_func is None or criterion_func(tensor) else tensor

    return tree.replace(item, move)


_MEMORY = "engine.memory() counts model state, and torch.cuda.memory_summary() all"

__getattr__, __dir__ = names(
    __name__,
    instead={
        "clip_grad_norm_": 'set "gradient_clipping" in the configuration',
        "memory_status": _MEMORY,
        "see_memory_usage": _MEMORY,
    },
)
