"""Adam's update of a flat shard as one Triton kernel. Imported only where Triton can be."""

# Triton is no dependency, so nothing is known about its types.
# pyright: basic, reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from zeroshard.optim.adam import Rule, Shards

__all__ = ["update_"]

_BLOCK = 1024
_WARPS = 4


@triton.jit
def _adam(  # noqa: PLR0913, PLR0917 - what it reads and writes, and its numbers
    grad_ptr,
    master_ptr,
    average_ptr,
    square_ptr,
    out_ptr,
    factor_ptr,
    found_inf_ptr,
    numel,
    shrinkage,
    decay,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    step_size,
    root2,
    decoupled: tl.constexpr,
    has_out: tl.constexpr,
    may_skip: tl.constexpr,
    block: tl.constexpr,
):
    # A shard may have more than 2^31 elements.
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block).to(tl.int64)
    inside = at < numel
    master = tl.load(master_ptr + at, mask=inside, other=0.0)
    if may_skip:  # noqa: SIM102 - decided when the kernel is compiled
        if tl.load(found_inf_ptr) != 0.0:
            if has_out:  # which may be memory of this step alone
                tl.store(out_ptr + at, master.to(out_ptr.dtype.element_ty), mask=inside)
            return
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    average = tl.load(average_ptr + at, mask=inside, other=0.0).to(tl.float32)
    square = tl.load(square_ptr + at, mask=inside, other=0.0).to(tl.float32)
    grad = grad * tl.load(factor_ptr)
    if decoupled:
        master = master - shrinkage * master
    else:
        grad = grad + decay * master
    average = beta1 * average + rest1 * grad
    square = beta2 * square + rest2 * grad * grad
    # Rounded as IEEE 754 wants it: Triton's plain operators are approximations.
    spread = tl.div_rn(tl.sqrt_rn(square), root2) + eps
    master = master - tl.div_rn(step_size * average, spread)
    tl.store(master_ptr + at, master, mask=inside)
    tl.store(average_ptr + at, average.to(average_ptr.dtype.element_ty), mask=inside)
    tl.store(square_ptr + at, square.to(square_ptr.dtype.element_ty), mask=inside)
    if has_out:
        tl.store(out_ptr + at, master.to(out_ptr.dtype.element_ty), mask=inside)


def update_(shards: Shards, rule: Rule, factor: Tensor, found_inf: Tensor | None) -> None:
    """Make one step; see :func:`zeroshard.optim.adam.update_`."""
    numel = shards.master.numel()
    out = shards.out
    _adam[(triton.cdiv(numel, _BLOCK),)](
        shards.grad,
        shards.master,
        shards.average,
        shards.square,
        shards.master if out is None else out,
        factor,
        factor if found_inf is None else found_inf,
        numel,
        rule.lr * rule.decay,
        rule.decay,
        rule.beta1,
        1.0 - rule.beta1,
        rule.beta2,
        1.0 - rule.beta2,
        rule.eps,
        rule.step_size,
        rule.root2,
        decoupled=rule.decoupled,
        has_out=out is not None,
        may_skip=found_inf is not None,
        block=_BLOCK,
        num_warps=_WARPS,
    )
