"""What the optimizers and schedules of this package read from param groups."""

# Torch's list operations have no public name.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["adam_moments_", "decay_", "evaluate", "moments", "momentum_of", "with_gradients"]

Group = Mapping[str, Any]


def momentum_of(group: Group) -> float | None:
    """Give the share of the past in a group's steps: beta1 or momentum; None if it has neither."""
    if "betas" in group:
        return float(group["betas"][0])
    return float(group["momentum"]) if "momentum" in group else None


def evaluate(closure: Callable[[], float] | None) -> float | None:
    """Run the closure that a torch optimizer may be given, and return its loss."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def with_gradients(group: Group) -> tuple[list[Tensor], list[Tensor]]:
    """Give the parameters of a group that have gradients, and those gradients."""
    params = [param for param in group["params"] if param.grad is not None]
    return params, [param.grad for param in params]


def moments(
    state: MutableMapping[Any, dict[str, Any]], params: list[Tensor], *names: str
) -> tuple[list[Tensor], ...]:
    """Give running averages of these parameters by name, new ones as zeros."""
    for param in params:
        own = state[param]
        for name in names:
            if name not in own:
                own[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
    return tuple([state[param][name] for param in params] for name in names)


def adam_moments_(
    state: MutableMapping[Any, dict[str, Any]],
    params: list[Tensor],
    grads: list[Tensor],
    betas: tuple[float, float],
) -> tuple[list[Tensor], list[Tensor]]:
    """Advance and give Adam's running averages of the gradients and of their squares."""
    averages, squares = moments(state, params, "exp_avg", "exp_avg_sq")
    torch._foreach_lerp_(averages, grads, 1 - betas[0])
    torch._foreach_mul_(squares, betas[1])
    torch._foreach_addcmul_(squares, grads, grads, 1 - betas[1])
    return averages, squares


def decay_(params: list[Tensor], group: Group) -> None:
    """Shrink weights by the group's decoupled decay."""
    if group["weight_decay"] != 0:
        torch._foreach_mul_(params, 1 - float(group["lr"]) * group["weight_decay"])
