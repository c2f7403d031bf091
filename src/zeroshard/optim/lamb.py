"""LAMB: Adam's direction at a length that fits each parameter.

You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes" (2020). The
step of a parameter is as long as its weights are, times the rate, within bounds. So a step needs
two norms for each whole parameter, all of which ranks add up in one all-reduce.
"""

# Torch's list operations have no public name, and its step is two overloads.
# pyright: reportPrivateUsage=false, reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zeroshard.optim.groups import Group, adam_moments_, evaluate, with_gradients
from zeroshard.optim.whole import WholeOptimizer

__all__ = ["Lamb"]


class Lamb(WholeOptimizer):
    """LAMB, on whole parameters or on slices of them.

    Args:
        params: parameters or param groups.
        lr: the rate.
        bias_correction: whether the averages are corrected for their start at zero.
        betas: how slowly the averages of gradients and of their squares move.
        eps: added to the root of the average square.
        eps_inside_sqrt: whether it is added below the root.
        weight_decay: weights' share of the direction.
        max_coeff: largest ratio of the norms of weights and direction.
        min_coeff: smallest one.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
    ) -> None:
        if not min(lr, eps, weight_decay, min_coeff) >= 0:
            raise ValueError("Invalid lr, eps, weight_decay or min_coeff: one is negative")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"Invalid betas: {betas}")
        if not min_coeff <= max_coeff:
            raise ValueError(f"Invalid min_coeff: {min_coeff} is above max_coeff, {max_coeff}")
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "eps_inside_sqrt": eps_inside_sqrt,
            "weight_decay": weight_decay,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make one step; a collective where parameters are sharded."""
        loss = evaluate(closure)
        stepped: list[tuple[Group, list[Tensor], list[Tensor]]] = []
        for group in self.param_groups:
            params, grads = with_gradients(group)
            if params:
                stepped.append((group, params, self._directions(group, params, grads)))
        if not stepped:
            return loss
        weights = [param for _, params, _ in stepped for param in params]
        directions = [one for _, _, several in stepped for one in several]
        of_weights, of_directions = self.whole.norms([*weights, *directions]).chunk(2)
        # A parameter without weights or without direction moves at the plain rate.
        is_plain = (of_weights == 0) | (of_directions == 0)
        ratios = of_weights / of_directions
        start = 0
        for group, params, directions in stepped:
            own = slice(start, start + len(params))
            start = own.stop
            bounded = ratios[own].clamp(group["min_coeff"], group["max_coeff"])
            lengths = bounded.masked_fill(is_plain[own], 1.0) * -float(group["lr"])
            for param, direction, length in zip(params, directions, lengths, strict=True):
                param.addcmul_(direction, length.to(param.dtype))
        return loss

    def _directions(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        averages, squares = adam_moments_(self.state, params, grads, group["betas"])
        first, second = self._corrections(group, params)
        roots = torch._foreach_div(squares, second)
        if group["eps_inside_sqrt"]:
            torch._foreach_add_(roots, group["eps"])
            torch._foreach_sqrt_(roots)
        else:
            torch._foreach_sqrt_(roots)
            torch._foreach_add_(roots, group["eps"])
        directions = list(torch._foreach_div(averages, first))
        torch._foreach_div_(directions, roots)
        if group["weight_decay"] != 0:
            torch._foreach_add_(directions, params, alpha=group["weight_decay"])
        return directions

    def _corrections(self, group: Group, params: list[Tensor]) -> tuple[list[float], list[float]]:
        """Count a step of each parameter, and say what its two averages lack by it."""
        steps: list[float] = []
        for param in params:
            own = self.state[param]
            own["step"] = own.get("step", torch.zeros((), device="cpu")) + 1
            steps.append(float(own["step"]))
        if not group["bias_correction"]:
            return [1.0] * len(steps), [1.0] * len(steps)
        first, second = ([1 - beta**step for step in steps] for beta in group["betas"])
        return first, second
