"""The mean of rows anywhere in memory as one Triton kernel. Imported only where Triton can be."""

# Triton is no dependency, so nothing is known about its types.
# pyright: basic, reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["mean_of"]

# Elements and warps of a block of threads. Few blocks that wait for other GPUs' memory must each
# have much on its way.
_MANY = 2048, 8
_FEW = 16384, 16
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit(do_not_specialize=["num_pieces"])
def _mean_of_rows(
    rows_ptr,
    out_ptr,
    num_pieces,
    factor,
    num_rows: tl.constexpr,
    dtype: tl.constexpr,
    align_bytes: tl.constexpr,
    piece: tl.constexpr,
    block: tl.constexpr,
):
    # What addresses and sizes are known to be multiples of decides how much is read at a time.
    numel = num_pieces.to(tl.int64) * piece
    first = tl.program_id(0).to(tl.int64) * block
    for start in range(first, numel, tl.num_programs(0).to(tl.int64) * block):
        at = start + tl.arange(0, block)
        inside = at < numel
        total = tl.zeros((block,), dtype=tl.float32)
        for rank in tl.static_range(num_rows):
            row = tl.load(rows_ptr + rank).to(tl.pointer_type(dtype))
            values = tl.load(tl.multiple_of(row, align_bytes) + at, mask=inside, other=0.0)
            total = values.to(tl.float32) if rank == 0 else total + values.to(tl.float32)
        tl.store(out_ptr + at, (total * factor).to(out_ptr.dtype.element_ty), mask=inside)


def mean_of(rows: Sequence[Tensor], num_programs: int | None) -> Callable[[Tensor], object]:
    """See :func:`zeroshard.core.rows.mean_of`."""
    addresses = [row.data_ptr() for row in rows]
    table = torch.tensor(addresses, dtype=torch.int64, device=rows[0].device)
    numel = rows[0].numel()
    piece = math.gcd(16, numel)
    block, num_warps = _MANY if num_programs is None else _FEW
    num_blocks = triton.cdiv(numel, block)
    grid = (num_blocks if num_programs is None else min(num_blocks, num_programs),)

    def write(out: Tensor) -> None:
        _mean_of_rows[grid](
            table,
            out,
            numel // piece,
            1.0 / len(rows),
            num_rows=len(rows),
            dtype=_DTYPES[rows[0].dtype],
            align_bytes=math.gcd(16, *addresses),
            piece=piece,
            block=block,
            num_warps=num_warps,
        )

    return write
