"""The mean of the ranks' rows, added up in the order of ranks in fp32, whatever they arrive in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from zeroshard.core.with_triton import if_it_runs

__all__ = ["Mean", "mean_of"]

Mean: TypeAlias = Callable[[Tensor], object]
"""Writes the mean of some rows into a tensor, in the dtype of that; on the current stream."""


def mean_of(rows: Sequence[Tensor], num_programs: int | None = None) -> Mean:
    """What writes the mean of rows whose memory stays where it is.

    Args:
        rows: contiguous, of one size and one dtype; any of them may be another GPU's memory.
        num_programs: how many blocks of threads a GPU's kernel has at most; None for as many as
            there are parts of a row.
    """
    make = _kernel(rows[0].device)
    if make is None or rows[0].dtype not in {torch.float32, torch.bfloat16, torch.float16}:
        return functools.partial(_mean, rows)
    return make(rows, num_programs)


def _mean(rows: Sequence[Tensor], out: Tensor) -> None:
    """The same by torch, in fp64 for rows of fp64."""
    wide = torch.promote_types(rows[0].dtype, torch.float32)
    total = out if out.dtype == wide else torch.empty_like(out, dtype=wide)
    total.copy_(rows[0])
    for row in rows[1:]:
        total.add_(row)
    total.mul_(1.0 / len(rows))
    if total is not out:
        out.copy_(total)


@functools.cache
def _kernel(device: torch.device) -> Callable[[Sequence[Tensor], int | None], Mean] | None:
    """The Triton kernel, once it has run on this device; None where it cannot."""

    def load() -> Callable[[Sequence[Tensor], int | None], Mean]:
        from zeroshard.core import row_kernel  # noqa: PLC0415 - needs Triton

        rows = [torch.ones(8, dtype=torch.bfloat16, device=device) for _ in range(2)]
        row_kernel.mean_of(rows, None)(torch.empty(8, device=device))
        return row_kernel.mean_of

    return if_it_runs(device, load, "torch's kernels add gradients up")
