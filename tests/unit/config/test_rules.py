"""What keys demand of each other, and what is said where they do not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from zeroshard.config import load
from zeroshard.errors import ConfigError


def message(source: Mapping[str, object] | Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(source)
    return str(caught.value)


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_autocast_and_a_precision_exclude_each_other(name: str) -> None:
    text = message({name: {"enabled": True}, "torch_autocast": {"enabled": True}})
    assert text.startswith(f"torch_autocast and {name} cannot both be enabled (the config dict).")
    assert 'hint: set "enabled": false in one of the two blocks.' in text


def test_autocast_needs_a_dtype_that_torch_casts_to() -> None:
    text = message({"torch_autocast": {"enabled": True, "dtype": "float32"}})
    assert text.startswith('torch_autocast.dtype cannot be "fp32" while torch_autocast is enabled')
    assert 'hint: set "bf16" or "fp16", or "enabled": false.' in text
    assert load({"torch_autocast": {"enabled": False, "dtype": "fp32"}}).torch_autocast.dtype


def test_gradients_are_divided_in_one_way() -> None:
    text = message({"prescale_gradients": True, "gradient_predivide_factor": 2})
    assert "gradient_predivide_factor cannot be 2.0 while prescale_gradients is true" in text
    assert "hint: remove one of the two keys" in text
    assert load({"prescale_gradients": True}).prescale_gradients
    assert load({"gradient_predivide_factor": 2}).gradient_predivide_factor == 2.0


@pytest.mark.parametrize("value", [0, -1, True, "2", float("nan")])
def test_gradients_are_divided_by_a_positive_number(value: object) -> None:
    text = message({"gradient_predivide_factor": value})
    assert "gradient_predivide_factor must be a finite number greater than 0" in text


def test_the_dtype_of_parameters_is_chosen_once() -> None:
    text = message({"bf16": {"enabled": True}, "data_types": {"param_dtype": "fp16"}})
    assert text.startswith(
        'data_types.param_dtype is "fp16", but the fp16 and bf16 blocks choose "bf16"'
    )
    assert 'hint: remove it, or set "enabled": true in the "fp16" block' in text
    text = message({"bf16": {"enabled": True}, "data_types": {"param_dtype": "fp32"}})
    assert "hint: remove it, or disable the fp16 and bf16 blocks." in text
    same = load({"bf16": {"enabled": True}, "data_types": {"param_dtype": "torch.bfloat16"}})
    assert same.data_types.param_dtype == "bf16"


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(
    "block", ['"offload_param": {"device": "cpu"}', '"cpu_offload_param": true']
)
def test_parameters_are_not_offloaded_below_stage_three(
    stage: int, block: str, tmp_path: Path
) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(f'{{"zero_optimization": {{"stage": {stage}, {block}}}}}', encoding="utf-8")
    text = message(path)
    assert text == (
        f"zero_optimization.offload_param needs stage 3, but stage is {stage} ({path}).\n"
        f"Stage {stage} keeps full parameters on the device, so there is nothing to offload.\n\n"
        'hint: set "stage": 3, or use "offload_optimizer" to move optimizer state only.'
    )


@pytest.mark.parametrize("name", ["offload_param", "offload_optimizer"])
def test_files_need_a_folder(name: str) -> None:
    zero: dict[str, object] = {"stage": 3, name: {"device": "nvme"}}
    text = message({"zero_optimization": zero})
    assert f'zero_optimization.{name}.nvme_path is missing, but the device is "nvme"' in text
    assert 'hint: add "nvme_path"' in text
    zero[name] = {"device": "nvme", "nvme_path": Path("nvme")}
    config = load({"zero_optimization": zero})
    assert getattr(config.zero_optimization, name).nvme_path == "nvme"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("place", [None, False, {"device": "none", "nvme_path": None}])
def test_frameworks_may_say_that_nothing_is_offloaded(stage: int, place: object) -> None:
    zero = {"stage": stage, "offload_param": place, "offload_optimizer": place}
    config = load({"zero_optimization": zero})
    assert config.zero_optimization.offload_param.device == "none"
    assert config.zero_optimization.offload_optimizer.device == "none"


def test_older_switches_of_offloading_are_its_device() -> None:
    zero = load({"zero_optimization": {"stage": 3, "cpu_offload": True, "cpu_offload_param": True}})
    assert zero.zero_optimization.offload_optimizer.device == "cpu"
    assert zero.zero_optimization.offload_param.device == "cpu"
    text = message({"zero_optimization": {"cpu_offload": True, "offload_optimizer": {}}})
    assert (
        '"zero_optimization.offload_optimizer"' in text or '"zero_optimization.cpu_offload"' in text
    )
    assert "are one key, and both are given" in text
    assert 'hint: remove "cpu_offload".' in text
    text = message({"zero_optimization": {"offload_optimizer": {}, "cpu_offload": True}})
    assert 'hint: remove "cpu_offload".' in text


def test_rules_look_past_other_mistakes() -> None:
    text = message(
        {
            "fp16": {"enabled": True, "hysteresis": 0},
            "bf16": {"enabled": True},
            "optimizer": {"params": {}},
            "zero_optimization": {
                "stage": 2,
                "offload_param": {"device": "cpu", "buffer_count": 0},
            },
        }
    )
    assert text.startswith("the config dict has 5 problems.")
    for part in (
        "fp16.hysteresis must be",
        "optimizer.type is missing",
        "offload_param.buffer_count must be",
        "fp16 and bf16 cannot both be enabled",
        "offload_param needs stage 3, but stage is 2",
    ):
        assert text.count(part) == 1


def test_a_rule_does_not_judge_by_a_value_that_is_wrong() -> None:
    text = message({"zero_optimization": {"stage": 7, "offload_param": {"device": "cpu"}}})
    assert "zero_optimization.stage must be 0, 1, 2 or 3, but is 7" in text
    assert "needs stage 3" not in text


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        (
            {"zero_optimization.stage": 3},
            'hint: move "stage" into the block "zero_optimization".',
        ),
        (
            {"zero_optimization.offload_param.device": "cpu"},
            'hint: move "device" into the block "zero_optimization.offload_param".',
        ),
        (
            {"optimizer": {"type": "AdamW", "lr": 1e-3}},
            'hint: move it into the block "optimizer.params", if it is an argument.',
        ),
        (
            {"scheduler": {"type": "WarmupLR", "warmup_num_steps": 10}},
            'hint: move it into the block "scheduler.params", if it is an argument.',
        ),
    ],
)
def test_a_key_in_the_wrong_place_is_told_where_it_belongs(
    values: Mapping[str, object], hint: str
) -> None:
    text = message(values)
    assert text.startswith("unknown key ")
    assert hint in text


@pytest.mark.parametrize(
    ("key", "instead"),
    [("amp", '"torch_autocast", "bf16" or "fp16"'), ("elasticity", '"train_batch_size"')],
)
def test_a_removed_feature_names_the_keys_to_use_instead(key: str, instead: str) -> None:
    assert instead in message({key: {"enabled": True}})


def test_one_key_says_how_much_leaves_the_device() -> None:
    zero = {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}
    text = message({"zero_optimization": zero, "zeroshard": {"gpu_budget": 40}})
    assert "offload_optimizer.ratio cannot be 0.5 beside zeroshard.gpu_budget" in text
    assert "hint: remove one of the two keys." in text
    zero["offload_optimizer"]["ratio"] = 1
    budget = load({"zero_optimization": zero, "zeroshard": {"gpu_budget": 40}}).zeroshard.gpu_budget
    assert budget == 40.0


def test_one_budget_measures_what_is_free() -> None:
    text = message({"zeroshard": {"gpu_budget": "auto", "activation_budget": "auto"}})
    assert 'zeroshard.gpu_budget and zeroshard.activation_budget cannot both be "auto"' in text
    assert "hint: name a number of GiB for one of them." in text
    load({"zeroshard": {"gpu_budget": "auto", "activation_budget": 4}})


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("device", ["cpu", "nvme"])
def test_optimizer_state_may_leave_the_device_at_every_stage(stage: int, device: str) -> None:
    place = {"device": device, "nvme_path": "/fast"}
    config = load({"zero_optimization": {"stage": stage, "offload_optimizer": place}})
    assert config.zero_optimization.offload_optimizer.device == device
