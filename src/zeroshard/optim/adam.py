"""Adam's update of flat tensors in one pass: by a Triton kernel, or by torch's fused one.

Triton's reads the gradient in the dtype it was reduced in, multiplies it by a factor that is on the
device, and writes the weights in the compute dtype beside the master weights: 28 bytes for each
element of bf16 training, beside the 2 that the norm reads. Torch's does the same in three passes.
"""

# Torch's fused updates have no public name.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Rule", "Shards", "Update", "update_"]


@dataclass(frozen=True, slots=True)
class Shards:
    """The tensors of one pass: flat, contiguous and of one length.

    ``out`` takes the stepped master weights in the compute dtype; None where they are the master
    weights themselves.
    """

    grad: Tensor
    master: Tensor
    average: Tensor
    square: Tensor
    out: Tensor | None


@dataclass(frozen=True, slots=True)
class Rule:
    """Adam's numbers at one step; ``step`` counts from 1.

    Weight decay shrinks the weights if it is decoupled, and is a part of the gradient if not.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    decay: float
    decoupled: bool
    step: int

    @property
    def step_size(self) -> float:
        """The learning rate over the bias correction of the average."""
        return self.lr / (1 - self.beta1**self.step)

    @property
    def root2(self) -> float:
        """The square root of the bias correction of the squares."""
        return math.sqrt(1 - self.beta2**self.step)


Update: TypeAlias = Callable[[Shards, Rule, Tensor, "Tensor | None"], None]


def update_(shards: Shards, rule: Rule, factor: Tensor, found_inf: Tensor | None = None) -> None:
    """Make one step with torch's own fused kernel, on any device that has one.

    Args:
        shards: what is read and written; the content of the gradient is undefined afterwards.
        rule: the numbers of the step.
        factor: multiplies the gradient; a scalar in fp32 on the device.
        found_inf: 1 to leave everything as it is, else 0; a scalar in fp32 on the device.
    """
    master = shards.master
    grad = shards.grad.to(master.dtype).mul_(factor)
    step = torch.full((), float(rule.step), dtype=torch.float32, device=master.device)
    kernel = torch._fused_adamw_ if rule.decoupled else torch._fused_adam_
    kernel(
        [master],
        [grad],
        [shards.average],
        [shards.square],
        [],
        [step],
        lr=rule.lr,
        beta1=rule.beta1,
        beta2=rule.beta2,
        weight_decay=rule.decay,
        eps=rule.eps,
        amsgrad=False,
        maximize=False,
        found_inf=found_inf,
    )
    if shards.out is not None:
        shards.out.copy_(master)
