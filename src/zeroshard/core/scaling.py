"""Where the fp16 loss scale enters and leaves the gradients of a model.

Inside a model all gradients are multiplied by its loss scale, whoever started the backward:

* ``engine.backward`` multiplies the loss itself, before anything can vanish in fp16, and says so
  here; the outputs of the model then only change from the scale of that loss to the model's own;
* a plain ``loss.backward()`` knows no scale, so it enters at the outputs.

What leaves through the inputs, for another model or a tensor of the user's, is changed back.
Outputs and inputs are handled outside of the model's graph, so an output that is computed from
another one is scaled once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["ScaledLoss", "rescale"]


class ScaledLoss:
    """What the loss of the backward under way is multiplied by; 1 unless an engine started it.

    One value for the process, as autograd runs hooks on threads of its own.
    """

    factor = 1.0

    @classmethod
    @contextmanager
    def by(cls, factor: float) -> Iterator[None]:
        """Run a backward whose loss is multiplied by ``factor``."""
        before, cls.factor = cls.factor, factor
        try:
            yield
        finally:
            cls.factor = before


def rescale(tensor: Tensor, factor: Callable[[], Tensor]) -> Tensor:
    """The same tensor, whose gradient is multiplied by ``factor()`` during backward.

    One that is edited in place afterwards would lose the factor silently; autograd refuses that for
    results of a custom function. A scalar is copied instead, so ``loss += ...`` works.
    """
    return _Rescale.apply(tensor, factor) if tensor.requires_grad else tensor


class _Rescale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: Callable[[], Tensor]) -> Tensor:
        ctx.factor = factor
        return tensor.clone() if tensor.numel() == 1 else tensor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0]
        # In fp32, because the scale itself may be larger than fp16 can hold.
        return (grad.float() * ctx.factor()).to(grad.dtype), None
