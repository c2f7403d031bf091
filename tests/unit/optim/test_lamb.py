"""LAMB against its paper, as plain loops over whole parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from zeroshard.optim import Lamb

Options = dict[str, Any]
DEFAULTS: Options = {
    "lr": 0.25,
    "bias_correction": True,
    "betas": (0.5, 0.75),
    "eps": 0.01,
    "eps_inside_sqrt": False,
    "weight_decay": 0.125,
    "max_coeff": 10.0,
    "min_coeff": 0.01,
}


class Reference:
    """One parameter of LAMB, as a list of numbers."""

    def __init__(self, weights: Sequence[float], **options: Any) -> None:
        self.options = {**DEFAULTS, **options}
        self.weights = list(weights)
        self.average = [0.0] * len(weights)
        self.square = [0.0] * len(weights)
        self.count = 0

    def step(self, grads: Sequence[float]) -> None:
        o, (beta1, beta2) = self.options, self.options["betas"]
        self.count += 1
        directions = []
        for i, grad in enumerate(grads):
            self.average[i] = beta1 * self.average[i] + (1 - beta1) * grad
            self.square[i] = beta2 * self.square[i] + (1 - beta2) * grad**2
            average, square = self.average[i], self.square[i]
            if o["bias_correction"]:
                average /= 1 - beta1**self.count
                square /= 1 - beta2**self.count
            if o["eps_inside_sqrt"]:
                root = math.sqrt(square + o["eps"])
            else:
                root = math.sqrt(square) + o["eps"]
            directions.append(average / root + o["weight_decay"] * self.weights[i])
        of_weights, of_directions = math.hypot(*self.weights), math.hypot(*directions)
        trust = 1.0
        if of_weights > 0 and of_directions > 0:
            trust = min(max(of_weights / of_directions, o["min_coeff"]), o["max_coeff"])
        self.weights = [
            w - o["lr"] * trust * d for w, d in zip(self.weights, directions, strict=True)
        ]


GRADS = [[[0.5, -2.0, 0.25], [4.0]], [[-1.0, -3.0, 0.0], [1.0]], [[-1.0, 4.0, 0.125], [-2.0]]]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias_correction": False},
        {"eps_inside_sqrt": True},
        {"weight_decay": 0.0},
        {"max_coeff": 0.5},
        {"min_coeff": 5.0},
    ],
    ids=str,
)
def test_lamb_follows_its_paper(options: Options) -> None:
    starts = [[1.0, -2.0, 0.5], [3.0]]
    params = [nn.Parameter(torch.tensor(start, dtype=torch.float64)) for start in starts]
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.5, "min_coeff": 0.02}]
    optimizer = Lamb(groups, **{**DEFAULTS, **options})
    references = [
        Reference(starts[0], **options),
        Reference(starts[1], **{**options, "lr": 0.5, "min_coeff": 0.02}),
    ]
    for grads in GRADS:
        for param, reference, grad in zip(params, references, grads, strict=True):
            param.grad = torch.tensor(grad, dtype=torch.float64)
            reference.step(grad)
        optimizer.step()
        for param, reference in zip(params, references, strict=True):
            want = torch.tensor(reference.weights, dtype=torch.float64)
            torch.testing.assert_close(param.detach(), want)


def test_parameters_of_zeros_and_parameters_without_direction_move_at_the_plain_rate() -> None:
    zeros, still, empty = (
        nn.Parameter(torch.zeros(2)),
        nn.Parameter(torch.ones(2)),
        nn.Parameter(torch.zeros(0, 2)),
    )
    optimizer = Lamb([zeros, still, empty], lr=0.25)
    zeros.grad, still.grad, empty.grad = torch.ones(2), torch.zeros(2), torch.zeros(0, 2)
    optimizer.step()
    assert zeros.tolist() == [-0.25] * 2
    assert still.tolist() == [1.0] * 2


def test_a_parameter_without_gradient_is_passed_over() -> None:
    param = nn.Parameter(torch.ones(2))
    optimizer = Lamb([param], weight_decay=0.5)
    optimizer.step()
    assert param.tolist() == [1.0, 1.0]


def test_the_gradients_are_left_as_they_are() -> None:
    param = nn.Parameter(torch.ones(2))
    param.grad = torch.tensor([1.0, 2.0])
    Lamb([param]).step()
    assert param.grad.tolist() == [1.0, 2.0]


def test_a_saved_state_goes_on_exactly() -> None:
    def make() -> tuple[nn.Parameter, Lamb]:
        param = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
        return param, Lamb([param], lr=0.1)

    def go(param: nn.Parameter, optimizer: Lamb) -> None:
        for grads in GRADS:
            param.grad = torch.tensor(grads[0])
            optimizer.step()

    first, one = make()
    go(first, one)
    second, two = make()
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    with torch.no_grad():
        second.copy_(first)
    go(first, one)
    go(second, two)
    assert torch.equal(first, second)


@pytest.mark.parametrize("options", [{"lr": -1}, {"betas": (0.9, 1.0)}, {"min_coeff": 11.0}])
def test_what_no_step_can_be_made_with_is_refused(options: Options) -> None:
    with pytest.raises(ValueError, match=f"Invalid .*{next(iter(options))}"):
        Lamb([nn.Parameter(torch.ones(1))], **options)
