"""Optimizers by name: what each name means, and what is refused."""

from __future__ import annotations

import logging
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

from zeroshard.errors import ConfigError
from zeroshard.optim import Lamb, Lion, Muon, UncorrectedAdam
from zeroshard.optim.factory import make_optimizer
from zeroshard.optim.packages import is_quantized_elementwise

OF_TORCH = sorted(
    name
    for name, value in vars(torch.optim).items()
    if isinstance(value, type) and value is not torch.optim.Optimizer and name != "Muon"
)


def make(name: str, **options: Any) -> torch.optim.Optimizer:
    return make_optimizer(name, [nn.Parameter(torch.ones(2))], options)


@pytest.mark.parametrize("name", [name for name in OF_TORCH if name != "Adam"])
def test_a_name_makes_the_optimizer_of_that_name_however_it_is_written(name: str) -> None:
    for written in (name, name.lower(), name.upper()):
        assert type(make(written, lr=0.5)) is getattr(torch.optim, name)
    assert make(name, lr=0.5).param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("Lion", Lion),
        ("lamb", Lamb),
        ("MUON", Muon),
        ("FusedAdam", torch.optim.AdamW),
        ("DeepSpeedCPUAdam", torch.optim.AdamW),
        ("CPUAdam", torch.optim.AdamW),
        ("DeepSpeedCPUAdagrad", torch.optim.Adagrad),
        ("DeepSpeedCPULion", Lion),
        ("FusedLion", Lion),
        ("FusedLamb", Lamb),
        ("MuonWithAuxAdam", Muon),
    ],
)
def test_a_name_of_deepspeeds_means_the_same_optimizer(
    name: str, cls: type[torch.optim.Optimizer]
) -> None:
    assert type(make(name, lr=0.5)) is cls


def test_adam_decays_weights_the_decoupled_way_unless_told_otherwise() -> None:
    assert type(make("Adam")) is torch.optim.AdamW
    assert type(make("Adam", adam_w_mode=True)) is torch.optim.AdamW
    assert type(make("Adam", adam_w_mode=False)) is torch.optim.Adam


def test_adamw_decays_the_decoupled_way_whatever_adam_w_mode_says(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert type(make("AdamW", adam_w_mode=False)) is torch.optim.AdamW
    assert 'adam_w_mode false has no effect on "AdamW"' in caplog.text


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


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("key", ["torch_adam", "fp32_optimizer_states"])
def test_choices_of_kernel_are_accepted_and_change_nothing(key: str, value: bool) -> None:
    assert make("AdamW", **{key: value}).defaults == make("AdamW").defaults


def test_state_that_cannot_be_kept_in_bf16_is_said(caplog: pytest.LogCaptureFixture) -> None:
    make("Lion", fp32_optimizer_states=False)
    assert "state is always fp32" in caplog.text


@pytest.mark.parametrize(
    ("name", "options", "decoupled"),
    [("Adam", {}, True), ("AdamW", {}, True), ("Adam", {"adam_w_mode": False}, False)],
)
def test_adam_without_bias_correction_is_a_class_of_its_own(
    name: str, options: dict[str, Any], decoupled: bool
) -> None:
    made = make(name, lr=0.5, bias_correction=False, **options)
    assert type(made) is UncorrectedAdam
    group = made.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["decoupled"]) == (0.5, 0.0, decoupled)
    with pytest.raises(ConfigError, match="UncorrectedAdam does not take decoupled"):
        make(name, bias_correction=False, decoupled=True)


def test_the_options_that_are_given_are_not_edited() -> None:
    options = {"lr": 1.0, "adam_w_mode": False, "betas": [0.9, 0.9]}
    make_optimizer("Adam", [nn.Parameter(torch.ones(1))], options)
    assert options == {"lr": 1.0, "adam_w_mode": False, "betas": [0.9, 0.9]}


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_one_fused_kernel_makes_the_step_unless_another_is_chosen(name: str) -> None:
    assert make(name, lr=1.0).param_groups[0]["fused"] is True
    assert make(name, lr=1.0, foreach=True).param_groups[0]["fused"] is None
    assert make(name, lr=1.0, fused=False).param_groups[0]["fused"] is False


@pytest.mark.parametrize(
    ("name", "meant"),
    [("adm", "Adam"), ("Lyon", "Lion"), ("Adamw2", "AdamW"), ("Ranger", ""), ("", "")],
)
def test_an_unknown_name_is_refused_with_the_nearest_and_the_known_ones(
    name: str, meant: str
) -> None:
    with pytest.raises(ConfigError, match=rf'optimizer\.type "{name}" is not one') as error:
        make(name)
    assert ("Did you mean" in str(error.value)) == bool(meant)
    assert f'Did you mean "{meant}"?' in str(error.value) or not meant
    for known in (*OF_TORCH, "Lamb", "Lion", "Muon"):
        assert known in str(error.value)


@pytest.mark.parametrize(
    ("name", "instead"), [("OneBitAdam", "Adam"), ("ZeroOneAdam", "Adam"), ("OneBitLamb", "Lamb")]
)
def test_compressed_optimizers_are_refused_with_what_to_use(name: str, instead: str) -> None:
    with pytest.raises(ConfigError, match=rf'one bit, which is not built(.|\n)*use "{instead}"'):
        make(name)


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
        ("torch_adam", 1, "true or false"),
        ("lr", float("nan"), "a number"),
        ("betas", [0.9, "x"], "two numbers"),
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


def test_muon_iterates_a_whole_number_of_times() -> None:
    assert make("Muon", ns_steps=5.0).defaults["ns_steps"] == 5
    with pytest.raises(ConfigError, match=r"optimizer\.params do not fit Muon: .*2\.5"):
        make("Muon", ns_steps=2.5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Adafactor", {"eps": [None, 1e-3]}),
        ("LBFGS", {"line_search_fn": "strong_wolfe"}),
        ("Muon", {"adjust_lr_fn": "match_rms_adamw"}),
    ],
)
def test_values_that_are_no_numbers_reach_the_optimizers_that_take_them(
    name: str, options: dict[str, Any]
) -> None:
    matrix = nn.Parameter(torch.ones(2, 2))
    group = make_optimizer(name, [matrix], options).param_groups[0]
    for key, value in options.items():
        assert group[key] == (tuple(value) if isinstance(value, list) else value)


def test_an_option_close_to_a_known_one_is_refused_with_it() -> None:
    with pytest.raises(ConfigError, match=r'does not take weigth_decay. Did you mean "weight_dec'):
        make("Lion", weigth_decay=0.1)


# Muon -------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(3, 2)
        self.position_embedding = nn.Parameter(torch.ones(3, 2))
        self.linear = nn.Linear(2, 2)
        self.convolution = nn.Conv1d(2, 2, 3)
        self.lm_head = nn.Linear(2, 3, bias=False)


def rules(model: nn.Module, made: torch.optim.Optimizer) -> dict[str, str]:
    names = {param: name for name, param in model.named_parameters()}
    return {
        names[param]: "muon" if group["use_muon"] else "adam"
        for group in made.param_groups
        for param in group["params"]
    }


def test_muon_steps_the_matrices_that_are_no_embedding_and_no_head() -> None:
    model = Small()
    made = make_optimizer("Muon", model.parameters(), {"lr": 0.5}, model)
    assert rules(model, made) == {
        "wte.weight": "adam",
        "position_embedding": "adam",
        "linear.weight": "muon",
        "linear.bias": "adam",
        "convolution.weight": "muon",
        "convolution.bias": "adam",
        "lm_head.weight": "adam",
    }
    assert {group["lr"] for group in made.param_groups} == {0.5}


def test_a_parameter_or_a_group_says_itself_whether_it_is_for_muon() -> None:
    model = Small()
    model.lm_head.weight.use_muon = True  # type: ignore[assignment]
    model.linear.weight.use_muon = False  # type: ignore[assignment]
    groups = [
        {"params": list(model.wte.parameters()), "use_muon": True},
        {"params": [*model.linear.parameters(), *model.lm_head.parameters()]},
    ]
    made = make_optimizer("Muon", groups, {}, model)
    assert rules(model, made) == {
        "wte.weight": "muon",
        "linear.weight": "adam",
        "linear.bias": "adam",
        "lm_head.weight": "muon",
    }


def test_muon_has_a_rate_for_each_of_its_rules() -> None:
    def rates(**options: float) -> list[float]:
        model = nn.Linear(2, 2)
        made = make_optimizer("Muon", model.parameters(), options, model)
        return [group["lr"] for group in made.param_groups]

    assert rates() == [0.02, 3e-4]
    assert rates(lr=0.5) == [0.5, 0.5]
    assert rates(lr=0.5, adam_lr=0.25) == [0.5, 0.25]
    assert rates(lr=0.5, muon_lr=0.75) == [0.75, 0.5]


def test_the_groups_of_muon_keep_their_own_options() -> None:
    model = nn.Linear(2, 2)
    groups = [{"params": model.named_parameters(), "lr": 0.125, "weight_decay": 0.25}]
    made = make_optimizer("Muon", groups, {"lr": 0.5, "momentum": 0.5}, model)
    assert [(group["lr"], group["weight_decay"]) for group in made.param_groups] == [
        (0.125, 0.25)
    ] * 2
    assert made.param_groups[0]["momentum"] == 0.5


def test_what_deepspeeds_muon_takes_beyond_ours_is_ignored_or_refused() -> None:
    make("Muon", ns_method="gram", per_head_muon=False)
    with pytest.raises(ConfigError, match="per_head_muon true is not built"):
        make("Muon", per_head_muon=True)


# Other packages ---------------------------------------------------------------------------------


def install(monkeypatch: pytest.MonkeyPatch, package: str, *names: str) -> None:
    """Pretend that a package with these optimizers is installed, and no other."""
    for other in ("bitsandbytes", "torchao"):
        monkeypatch.setitem(sys.modules, f"{other}.optim", None)
    module = types.ModuleType(f"{package}.optim")
    for name in names:
        cls = type(name, (torch.optim.SGD,), {"__module__": f"{package}.optim.kinds"})
        setattr(module, name, cls)
    monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    monkeypatch.setitem(sys.modules, f"{package}.optim", module)


@pytest.mark.parametrize("package", ["bitsandbytes", "torchao"])
def test_an_8_bit_optimizer_is_taken_from_the_package_that_is_installed_which_is_said(
    package: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, package, "AdamW8bit")
    with caplog.at_level(logging.INFO):
        made = make("adamw8bit", lr=0.5)
    assert type(made).__name__ == "AdamW8bit"
    assert made.param_groups[0]["lr"] == 0.5
    assert f"AdamW8bit is that of {package}" in caplog.text
    assert is_quantized_elementwise(type(made))


def test_a_quantised_optimizer_that_looks_at_norms_is_not_taken_for_an_elementwise_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, "bitsandbytes", "LAMB8bit")
    assert not is_quantized_elementwise(type(make("LAMB8bit", lr=0.5)))
    assert not is_quantized_elementwise(torch.optim.AdamW)


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW", "AdamW4bit", "AdamWFp8"])
def test_a_quantised_optimizer_without_its_package_is_refused_with_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("bitsandbytes", "torchao"):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setitem(sys.modules, f"{package}.optim", None)  # imported by another test
    with pytest.raises(ConfigError, match=rf'"{name}" is not in (.|\n)*`pip install bitsandbytes`'):
        make(name)


def test_a_quantised_optimizer_no_package_has_is_refused_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, "torchao", "AdamW8bit", "AdamW4bit")
    with pytest.raises(ConfigError, match=r'Did you mean "AdamW8bit"(.|\n)*AdamW4bit, AdamW8bit'):
        make("AdmW8bit")


def test_mup_is_asked_for_its_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    def make_mup(params: Any, **options: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, **options)

    module = types.ModuleType("mup")
    module.MuAdamW = make_mup  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mup", module)
    made = make("MUADAMW", lr=0.5, betas=[0.5, 0.75])
    assert made.param_groups[0]["betas"] == (0.5, 0.75)
    with pytest.raises(ConfigError, match="does not take momentum"):
        make("MuAdamW", lr=0.5, momentum=0.5)


@pytest.mark.parametrize("name", ["MuAdam", "MuAdamW", "MuSGD"])
def test_an_optimizer_of_mup_is_refused_without_mup(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mup", None)
    with pytest.raises(ConfigError, match=rf'"{name}" (.|\n)*`pip install mup`'):
        make(name, lr=0.5)
