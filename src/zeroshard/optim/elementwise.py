"""Optimizers torch does not have that update each element on its own, so any slice of a parameter.

Lion is that of Chen et al., "Symbolic Discovery of Optimization Algorithms" (2023). Adam without
bias correction is the one BERT was trained with.
"""

# Torch's list operations have no public name, and its step is two overloads.
# pyright: reportPrivateUsage=false, reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from zeroshard.optim.groups import adam_moments_, decay_, evaluate, moments, with_gradients

__all__ = ["Lion", "UncorrectedAdam"]


class Lion(torch.optim.Optimizer):
    """Steps of one size in the direction of the sign of an interpolated momentum.

    The defaults are those a configuration for DeepSpeed relies on; the paper's are a rate of 1e-4
    and betas of (0.9, 0.99).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        _check(lr=lr, weight_decay=weight_decay, betas=betas)
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make one step."""
        loss = evaluate(closure)
        for group in self.param_groups:
            params, grads = with_gradients(group)
            if not params:
                continue
            (averages,) = moments(self.state, params, "exp_avg")
            directions = torch._foreach_lerp(averages, grads, 1 - group["betas"][0])
            torch._foreach_sign_(directions)
            decay_(params, group)
            torch._foreach_add_(params, directions, alpha=-float(group["lr"]))
            torch._foreach_lerp_(averages, grads, 1 - group["betas"][1])
        return loss


class UncorrectedAdam(torch.optim.Optimizer):
    """Adam whose running averages start at zero and are used as they are.

    Args:
        params: parameters or param groups.
        lr: the rate.
        betas: how slowly the averages of gradients and of their squares move.
        eps: added to the root of the average square.
        weight_decay: strength of the decay.
        decoupled: whether decay acts on the weights (AdamW) or is added to the gradients (Adam).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled: bool = True,
    ) -> None:
        _check(lr=lr, eps=eps, weight_decay=weight_decay, betas=betas)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "decoupled": decoupled})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make one step."""
        loss = evaluate(closure)
        for group in self.param_groups:
            params, grads = with_gradients(group)
            if not params:
                continue
            if group["decoupled"]:
                decay_(params, group)
            elif group["weight_decay"] != 0:
                grads = [*torch._foreach_add(grads, params, alpha=group["weight_decay"])]
            averages, squares = adam_moments_(self.state, params, grads, group["betas"])
            roots = torch._foreach_sqrt(squares)
            torch._foreach_add_(roots, group["eps"])
            torch._foreach_addcdiv_(params, averages, roots, -float(group["lr"]))
        return loss


def _check(*, betas: tuple[float, float], **not_negative: float) -> None:
    """Refuse what no step can be made with, in torch's kind of error."""
    for name, value in not_negative.items():
        if not value >= 0:
            raise ValueError(f"Invalid {name}: {value}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"Invalid betas: {betas}")
