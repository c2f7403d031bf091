"""Optimizers by name: what each name means, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from zeroshard.errors import ConfigError
from zeroshard.optim.factory import ELEMENTWISE, make_optimizer

NAMES = sorted(cls.__name__ for cls in ELEMENTWISE)


def make(name: str, **options: Any) -> torch.optim.Optimizer:
    return make_optimizer(name, [nn.Parameter(torch.ones(2))], options)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "Adam"])
def test_a_name_makes_the_optimizer_of_that_name_however_it_is_written(name: str) -> None:
    for written in (name, name.lower(), name.upper()):
        assert type(make(written, lr=0.5)) is getattr(torch.optim, name)
    assert make(name, lr=0.5).param_groups[0]["lr"] == 0.5


def test_adam_decays_weights_the_decoupled_way_unless_told_otherwise() -> None:
    assert type(make("Adam")) is torch.optim.AdamW
    assert type(make("Adam", adam_w_mode=True)) is torch.optim.AdamW
    assert type(make("Adam", adam_w_mode=False)) is torch.optim.Adam


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_weights_decay_only_where_it_is_asked_for(name: str) -> None:
    assert make(name).param_groups[0]["weight_decay"] == 0
    assert make(name, weight_decay=0.1).param_groups[0]["weight_decay"] == 0.1


def test_options_reach_the_optimizer() -> None:
    group = make("AdamW", lr=1e-4, betas=[0.8, 0.9], eps=1e-6).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (1e-4, (0.8, 0.9), 1e-6)


def test_param_groups_keep_their_own_options() -> None:
    one, two = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    made = make_optimizer("SGD", [{"params": [one], "lr": 3.0}, {"params": [two]}], {"lr": 1.0})
    assert [group["lr"] for group in made.param_groups] == [3.0, 1.0]


@pytest.mark.parametrize("key", ["torch_adam", "fp32_optimizer_states", "bias_correction"])
def test_choices_of_kernel_are_accepted_and_change_nothing(key: str) -> None:
    assert make("AdamW", **{key: True}).defaults == make("AdamW").defaults


def test_the_options_that_are_given_are_not_edited() -> None:
    options = {"lr": 1.0, "adam_w_mode": False, "betas": [0.9, 0.9]}
    make_optimizer("Adam", [nn.Parameter(torch.ones(1))], options)
    assert options == {"lr": 1.0, "adam_w_mode": False, "betas": [0.9, 0.9]}


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_one_fused_kernel_makes_the_step_unless_another_is_chosen(name: str) -> None:
    assert make(name, lr=1.0).param_groups[0]["fused"] is True
    assert make(name, lr=1.0, foreach=True).param_groups[0]["fused"] is None
    assert make(name, lr=1.0, fused=False).param_groups[0]["fused"] is False


@pytest.mark.parametrize("name", ["Adafactor", "LBFGS", "Lamb", "adm", ""])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=rf'optimizer\.type "{name}" is not one') as error:
        make(name)
    for known in NAMES:
        assert known in str(error.value)


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="AdamW does not take beta, learning_rate") as error:
        make("AdamW", learning_rate=1.0, beta=0.9, eps=1e-8)
    assert "betas" in str(error.value)
    assert "params" not in str(error.value).split("hint:")[1]


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("lr", "1e-3", "a number"),
        ("lr", None, "a number"),
        ("eps", True, "a number"),
        ("betas", 0.9, "two numbers"),
        ("betas", [0.9], "two numbers"),
        ("fused", "x", "true or false"),
        ("adam_w_mode", "yes", "true or false"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_with_its_key(
    key: str, value: object, wanted: str
) -> None:
    with pytest.raises(ConfigError, match=rf"optimizer\.params\.{key} must be {wanted}, but is"):
        make("Adam", **{key: value})


def test_a_value_that_torch_refuses_is_refused_with_its_block() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.params do not fit AdamW: .*-1"):
        make("AdamW", lr=-1)


def test_adam_without_bias_correction_is_refused() -> None:
    with pytest.raises(ConfigError, match="bias_correction"):
        make("Adam", bias_correction=False)
