"""Muon: its orthogonalisation against singular values, its steps against torch's Muon."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zeroshard.optim import Muon, muon_groups
from zeroshard.optim.muon import orthogonalize

BF16 = 2.0**-8  # the relative rounding of one number


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(8, 8), (4, 16), (16, 4), (1, 5), (5, 1), (1, 1)])
def test_the_polynomial_is_applied_to_the_singular_values(shape: tuple[int, int]) -> None:
    """In fp64, and to those values alone, it is what the iteration should have done in bf16."""
    matrix = random(*shape)
    u, values, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    want = u @ torch.diag(values) @ vh
    got = orthogonalize(matrix).double()
    # The fifth power and five rounds pass the rounding of the first matrix on several times over.
    assert (got - want).norm() <= 8 * BF16 * want.norm()


def test_a_matrix_of_zeros_has_no_direction() -> None:
    assert not orthogonalize(torch.zeros(3, 2)).any()


needs_torchs = pytest.mark.skipif(
    not hasattr(torch.optim, "Muon"), reason="torch has Muon since 2.9"
)


@needs_torchs
@pytest.mark.parametrize("options", [{}, {"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw"}])
def test_matrices_are_stepped_as_torchs_muon_steps_them(options: dict[str, Any]) -> None:
    shapes = [(5, 3), (3, 5), (4, 4)]
    common = {"lr": 0.25, "momentum": 0.5, "weight_decay": 0.125, "ns_steps": 3, **options}
    ours = [nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(shapes)]
    theirs = [nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(shapes)]
    optimizers = Muon(ours, **common), torch.optim.Muon(theirs, **common)
    for step in range(3):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            for i, param in enumerate(params):
                param.grad = random(*param.shape, seed=100 + 10 * step + i)
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_everything_else_is_stepped_as_torchs_adamw_steps_it() -> None:
    options: dict[str, Any] = {"betas": (0.5, 0.75), "eps": 0.01, "weight_decay": 0.125}
    ours, theirs = nn.Parameter(random(7)), nn.Parameter(random(7))
    optimizers = (
        Muon(muon_groups([ours]), adam_lr=0.25, **options),
        torch.optim.AdamW([theirs], lr=0.25, **options),
    )
    for step in range(3):
        for param, optimizer in zip((ours, theirs), optimizers, strict=True):
            param.grad = random(7, seed=step)
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_a_tensor_of_more_dimensions_is_a_matrix_with_a_row_for_each_first_index() -> None:
    tensor, matrix = nn.Parameter(random(4, 2, 3)), nn.Parameter(random(4, 2, 3).view(4, 6))
    for param in (tensor, matrix):
        param.grad = random(4, 2, 3, seed=1).view(param.shape)
        Muon([param], lr=0.5).step()
    assert torch.equal(tensor.view(4, 6), matrix)


def test_a_saved_state_goes_on_exactly() -> None:
    def make() -> tuple[list[nn.Parameter], Muon]:
        params = [nn.Parameter(random(4, 3)), nn.Parameter(random(3))]
        return params, Muon(muon_groups(params), lr=0.1)

    def go(params: list[nn.Parameter], optimizer: Muon) -> None:
        for step in range(2):
            for param in params:
                param.grad = random(*param.shape, seed=step)
            optimizer.step()

    first, one = make()
    go(first, one)
    second, two = make()
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    with torch.no_grad():
        for a, b in zip(first, second, strict=True):
            b.copy_(a)
    go(first, one)
    go(second, two)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_vector_in_a_group_for_muon_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\) is in a group for it; .* muon_groups\(\)"):
        Muon([nn.Parameter(torch.ones(3))])


@pytest.mark.parametrize(
    "options", [{"lr": -1}, {"momentum": 1.0}, {"betas": (1.0, 0.5)}, {"adjust_lr_fn": "other"}]
)
def test_what_no_step_can_be_made_with_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Invalid|adjust_lr_fn is 'other'"):
        Muon([nn.Parameter(torch.ones(1, 1))], **options)


def test_groups_hold_what_their_rule_needs_and_no_more() -> None:
    model = nn.Linear(2, 2)
    muon, adam = Muon(muon_groups(model.parameters())).param_groups
    assert "betas" not in muon
    assert "momentum" not in adam
    assert not {"muon_lr", "adam_lr"} & {*muon, *adam}
