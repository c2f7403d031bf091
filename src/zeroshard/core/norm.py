"""The norm of flat tensors, in two levels: a long sum in fp32 loses its last addends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["row_norms", "squared"]

_ROW = 4096  # elements that are summed in the dtype of the tensor, or in fp32 if that is narrower


def row_norms(flat: Tensor) -> list[Tensor]:
    """The L2 norms of a flat tensor's rows of some thousands of elements."""
    dtype = torch.promote_types(flat.dtype, torch.float32)
    end = flat.numel() - flat.numel() % _ROW
    norms: list[Tensor] = []
    if end:
        norms.append(torch.linalg.vector_norm(flat[:end].view(-1, _ROW), dim=1, dtype=dtype))
    if end < flat.numel():
        norms.append(torch.linalg.vector_norm(flat[end:], dtype=dtype).view(1))
    return norms


def squared(norms: Sequence[Tensor]) -> Tensor:
    """The squared norm in fp64 of all that the rows belong to."""
    return torch.cat(list(norms)).double().square().sum()
