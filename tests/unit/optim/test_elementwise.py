"""Lion and Adam without bias correction against their formulas, one number at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from zeroshard.optim import Lion, UncorrectedAdam, momentum_of

Step = Callable[[float, float], float]
GRADS = [[0.5, -2.0, 0.25], [-1.0, -3.0, 0.0], [-1.0, 4.0, 0.125], [0.5, 1.0, -1.0]]
START = [1.0, -2.0, 0.5]


def lion(lr: float, beta1: float, beta2: float, decay: float) -> Step:
    average = 0.0

    def step(weight: float, grad: float) -> float:
        nonlocal average
        direction = beta1 * average + (1 - beta1) * grad
        average = beta2 * average + (1 - beta2) * grad
        sign = 0.0 if direction == 0 else math.copysign(1, direction)
        return weight - lr * (sign + decay * weight)

    return step


def adam(lr: float, beta1: float, beta2: float, eps: float, decay: float, decoupled: bool) -> Step:
    average = square = 0.0

    def step(weight: float, grad: float) -> float:
        nonlocal average, square
        if not decoupled:
            grad += decay * weight
        average = beta1 * average + (1 - beta1) * grad
        square = beta2 * square + (1 - beta2) * grad * grad
        shrunk = weight * (1 - lr * decay) if decoupled else weight
        return shrunk - lr * average / (math.sqrt(square) + eps)

    return step


def check(optimizer: torch.optim.Optimizer, param: nn.Parameter, make: Callable[[], Step]) -> None:
    steps, want = [make() for _ in START], START
    for grads in GRADS:
        param.grad = torch.tensor(grads, dtype=torch.float64)
        optimizer.step()
        want = [step(w, g) for step, w, g in zip(steps, want, grads, strict=True)]
        torch.testing.assert_close(param.detach(), torch.tensor(want, dtype=torch.float64))


def start() -> nn.Parameter:
    return nn.Parameter(torch.tensor(START, dtype=torch.float64))


def test_lion_follows_its_formula() -> None:
    param = start()
    optimizer = Lion([param], lr=0.25, betas=(0.5, 0.75), weight_decay=0.125)
    check(optimizer, param, lambda: lion(0.25, 0.5, 0.75, 0.125))


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_without_bias_correction_follows_its_formula(decoupled: bool) -> None:
    param = start()
    options: dict[str, Any] = {"weight_decay": 0.125, "decoupled": decoupled}
    optimizer = UncorrectedAdam([param], lr=0.25, betas=(0.5, 0.75), eps=0.01, **options)
    check(optimizer, param, lambda: adam(0.25, 0.5, 0.75, 0.01, 0.125, decoupled))


@pytest.mark.parametrize("cls", [Lion, UncorrectedAdam])
def test_a_parameter_without_gradient_is_passed_over(cls: type[torch.optim.Optimizer]) -> None:
    param = start()
    optimizer = cls([param], weight_decay=0.5)
    optimizer.step()
    assert param.tolist() == START
    assert not optimizer.state


@pytest.mark.parametrize("cls", [Lion, UncorrectedAdam])
def test_a_closure_is_run_with_gradients_and_its_loss_returned(
    cls: type[torch.optim.Optimizer],
) -> None:
    param = start()

    def closure() -> float:
        loss = param.square().sum()
        loss.backward()
        return loss.item()

    assert cls([param]).step(closure) == 5.25
    assert param.grad is not None


@pytest.mark.parametrize("options", [{"lr": -1}, {"betas": (0.9, 1.0)}, {"weight_decay": -0.1}])
@pytest.mark.parametrize("cls", [Lion, UncorrectedAdam])
def test_what_no_step_can_be_made_with_is_refused(
    cls: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=f"Invalid {next(iter(options))}"):
        cls([start()], **options)


def test_the_momentum_of_a_group_is_its_first_beta_or_its_momentum() -> None:
    assert momentum_of(Lion([start()], betas=(0.5, 0.75)).param_groups[0]) == 0.5
    assert momentum_of(torch.optim.SGD([start()], momentum=0.25).param_groups[0]) == 0.25
    assert momentum_of(torch.optim.Adagrad([start()]).param_groups[0]) is None
