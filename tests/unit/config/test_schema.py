"""Values: their types, defaults and ranges, and what an error says of a wrong one."""

from __future__ import annotations

import inspect
import math
from typing import Literal

import pytest
from pydantic import ValidationError

import zeroshard.config
from zeroshard.config import Bf16Config, Config, Fp16Config, ZeroConfig, load
from zeroshard.config.schema import BLOCKS
from zeroshard.errors import ConfigError


def message(values: dict[str, object]) -> str:
    with pytest.raises(ConfigError) as caught:
        load(values)
    return str(caught.value)


def test_an_empty_file_gives_the_defaults_of_deepspeed() -> None:
    config = load({})
    assert config == Config()
    assert config.train_batch_size is None
    assert config.gradient_clipping == 1.0
    assert config.steps_per_print is None
    assert config.optimizer is None
    assert config.scheduler is None
    assert config.communication_data_type is None
    assert config.data_types.grad_accum_dtype is None
    assert config.zero_optimization.stage == 0
    assert config.zeroshard.units == ()
    assert config.zeroshard.lookahead_bytes is None
    assert not config.zero_allow_untested_optimizer
    assert not config.dataloader_drop_last
    assert config.bf16 == Bf16Config(enabled=False, check_grad_overflow=True)
    assert config.fp16 == Fp16Config(
        enabled=False,
        auto_cast=False,
        loss_scale=0.0,
        initial_scale_power=16,
        loss_scale_window=1000,
        hysteresis=2,
        consecutive_hysteresis=False,
        min_loss_scale=1.0,
    )


def test_a_config_cannot_be_changed() -> None:
    config = load({})
    with pytest.raises(ValidationError, match="frozen"):
        config.gradient_clipping = 2.0
    with pytest.raises(ValidationError, match="frozen"):
        config.zero_optimization.stage = 3


def test_every_field_has_a_docstring() -> None:
    for model in BLOCKS.values():
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
            assert field.description.isascii()


def test_public_names_are_sorted_and_exist() -> None:
    names = zeroshard.config.__all__
    assert names == sorted(names)
    assert all(hasattr(zeroshard.config, name) for name in names)
    public = {
        name
        for name, value in vars(zeroshard.config).items()
        if not name.startswith("_") and not inspect.ismodule(value) and name != "annotations"
    }
    assert public == set(names)


@pytest.mark.parametrize(
    ("given", "stage"),
    [(0, 0), (1, 1), (2, 2), (3, 3), (3.0, 3)],
)
def test_stages_zero_to_three_are_known(given: object, stage: int) -> None:
    assert load({"zero_optimization": {"stage": given}}).zero_optimization.stage == stage


@pytest.mark.parametrize("stage", [4, -1, 1.5, True, "2", None, [3], math.nan])
def test_other_stages_are_refused(stage: object) -> None:
    text = message({"zero_optimization": {"stage": stage}})
    assert "zero_optimization.stage must be 0, 1, 2 or 3, but is" in text


@pytest.mark.parametrize(("given", "stage"), [(True, 1), (False, 0), ({}, 0), (None, 0)])
def test_the_old_switch_and_an_empty_block_are_stages(given: object, stage: Literal[0, 1]) -> None:
    assert load({"zero_optimization": given}).zero_optimization == ZeroConfig(stage=stage)


def test_whole_numbers_may_be_written_as_floats() -> None:
    config = load({"zero_optimization": {"reduce_bucket_size": 5e8}, "train_batch_size": 8.0})
    assert config.zero_optimization.reduce_bucket_size == 500_000_000
    assert isinstance(config.zero_optimization.reduce_bucket_size, int)
    assert isinstance(config.train_batch_size, int)


@pytest.mark.parametrize(
    "name", ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"]
)
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8", math.inf, math.nan, [], {}])
def test_batch_numbers_are_whole_and_positive(name: str, value: object) -> None:
    assert f"{name} must be a whole number of at least 1 or null, but is" in message({name: value})


def test_auto_tuning_is_left_to_the_engine() -> None:
    blocks = {"leaf_module", "offload_param", "offload_optimizer"}
    keys = {name: "auto" for name in ZeroConfig.model_fields if name not in blocks | {"stage"}}
    zero = load({"zero_optimization": {"stage": 3, **keys}}).zero_optimization
    assert zero == ZeroConfig(stage=3)
    assert zero.reduce_bucket_size is zero.stage3_prefetch_bucket_size is None


def test_of_a_largest_number_of_elements_the_whole_part_counts() -> None:
    zero = load({"zero_optimization": {"stage3_prefetch_bucket_size": 0.9 * 4097**2}})
    assert zero.zero_optimization.stage3_prefetch_bucket_size == int(0.9 * 4097**2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("overlap_comm", 1),
        ("contiguous_gradients", "true"),
        ("reduce_bucket_size", 0),
        ("reduce_bucket_size", math.inf),
        ("reduce_bucket_size", "5e8"),
        ("reduce_bucket_size", True),
        ("stage3_prefetch_bucket_size", -1),
        ("stage3_max_live_parameters", "1e9"),
    ],
)
def test_tuning_keys_are_checked(name: str, value: object) -> None:
    assert f"zero_optimization.{name} must be" in message({"zero_optimization": {name: value}})


@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan, True, "1", None, 10**400])
def test_gradient_clipping_is_finite_and_not_negative(value: object) -> None:
    text = message({"gradient_clipping": value})
    assert "gradient_clipping must be a finite number of at least 0, but is" in text
    assert "remove the key for the default, 1.0" in text


@pytest.mark.parametrize("value", [0, 0.0, 2, 0.5])
def test_gradient_clipping_takes_numbers(value: float) -> None:
    assert load({"gradient_clipping": value}).gradient_clipping == value


@pytest.mark.parametrize("value", [None, "Infinity", "inf", math.inf, "auto"])
def test_endless_steps_per_print_print_nothing(value: object) -> None:
    assert load({"steps_per_print": value}).steps_per_print is None


def test_steps_per_print_is_a_count() -> None:
    assert load({"steps_per_print": 1e1}).steps_per_print == 10
    for value in (0, True, "10", -math.inf):
        assert "steps_per_print must be a whole number" in message({"steps_per_print": value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loss_scale", -1),
        ("loss_scale", math.inf),
        ("loss_scale", math.nan),
        ("loss_scale", True),
        ("initial_scale_power", -1),
        ("initial_scale_power", 128),
        ("initial_scale_power", 1.5),
        ("loss_scale_window", 0),
        ("loss_scale_window", math.inf),
        ("hysteresis", 0),
        ("hysteresis", True),
        ("min_loss_scale", -1),
        ("min_loss_scale", 0),
        ("consecutive_hysteresis", 1),
        ("auto_cast", "yes"),
        ("enabled", 1),
    ],
)
def test_loss_scale_settings_are_checked(name: str, value: object) -> None:
    assert f"fp16.{name} must be " in message({"fp16": {"enabled": True, name: value}})


def test_a_fixed_loss_scale_has_no_least_value() -> None:
    config = load({"fp16": {"enabled": True, "loss_scale": 128, "min_loss_scale": 0}})
    assert config.fp16.loss_scale == 128.0
    assert config.fp16.min_loss_scale == 0.0


def test_auto_precision_is_off() -> None:
    config = load({"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}})
    assert not config.fp16.enabled
    assert not config.bf16.enabled


@pytest.mark.parametrize("name", ["bf16", "bfloat16"])
def test_two_precisions_are_refused(name: str) -> None:
    text = message({"fp16": {"enabled": True}, name: {"enabled": True}})
    assert text.startswith("fp16 and bf16 cannot both be enabled (the config dict).")
    assert "hint: " in text


def test_two_precisions_are_refused_beside_other_mistakes_in_their_blocks() -> None:
    text = message({"fp16": {"enabled": True, "hysteresis": 0}, "bf16": {"enabled": True}})
    assert "fp16 and bf16 cannot both be enabled" in text
    assert "fp16.hysteresis" in text


def test_bfloat16_is_a_second_name_of_bf16() -> None:
    assert load({"bfloat16": {"enabled": True}}).bf16.enabled
    assert '"bf16" and "bfloat16" are one key' in message({"bf16": {}, "bfloat16": {}})
    assert "bfloat16.enabled must be true or false" in message({"bfloat16": {"enabled": 1}})


@pytest.mark.parametrize(
    ("given", "dtype"),
    [("fp32", "fp32"), ("bf16", "bf16"), ("torch.float16", "fp16"), (None, None), ("auto", None)],
)
def test_dtypes_have_three_names(given: object, dtype: str | None) -> None:
    config = load({"communication_data_type": given, "data_types": {"grad_accum_dtype": given}})
    assert config.communication_data_type == dtype
    assert config.data_types.grad_accum_dtype == dtype


@pytest.mark.parametrize("value", ["int8", "", 16, True])
def test_other_dtypes_are_refused(value: object) -> None:
    assert 'communication_data_type must be "fp32", "fp16", "bf16" or null' in message(
        {"communication_data_type": value}
    )
    assert "data_types.grad_accum_dtype must be" in message(
        {"data_types": {"grad_accum_dtype": value}}
    )


def test_an_optimizer_and_a_scheduler_have_a_type_and_any_arguments() -> None:
    config = load(
        {
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95]}},
            "scheduler": {"type": "WarmupLR"},
        }
    )
    assert config.optimizer is not None
    assert config.optimizer.type == "AdamW"
    assert config.optimizer.params == {"lr": 1e-3, "betas": [0.9, 0.95]}
    assert config.scheduler is not None
    assert config.scheduler.params == {}
    assert load({"optimizer": None}).optimizer is None
    assert load({"optimizer": {"type": "SGD", "params": None}}).optimizer is not None


@pytest.mark.parametrize("block", ["optimizer", "scheduler"])
def test_an_optimizer_or_scheduler_without_a_type_is_refused(block: str) -> None:
    assert f"{block}.type is missing" in message({block: {"params": {}}})
    assert f"{block}.type must be a name" in message({block: {"type": ""}})
    assert f"{block}.type must be a name" in message({block: {"type": 3}})
    assert f"{block}.params must be an object" in message({block: {"type": "X", "params": []}})
    assert f"{block}.params must be an object" in message({block: {"type": "X", "params": "auto"}})


@pytest.mark.parametrize("block", sorted(path[0] for path in BLOCKS if len(path) == 1))
@pytest.mark.parametrize("value", [3, "text", [], "auto"])
def test_a_block_is_an_object(block: str, value: object) -> None:
    assert f"{block} must be an object, but is" in message({block: value})


def test_the_extension_block_names_units() -> None:
    config = load({"zeroshard": {"units": ["Block", "model.head"], "lookahead_bytes": 1e6}})
    assert config.zeroshard.units == ("Block", "model.head")
    assert config.zeroshard.lookahead_bytes == 1_000_000
    assert load({"zeroshard": {"units": ("Block",)}}).zeroshard.units == ("Block",)
    assert load({"zeroshard": {"lookahead_bytes": 0}}).zeroshard.lookahead_bytes == 0


def test_the_extension_block_chooses_how_to_gather() -> None:
    assert load({}).zeroshard.gather == load({"zeroshard": {"gather": None}}).zeroshard.gather
    for how in ("auto", "nccl", "copy_engine"):
        assert load({"zeroshard": {"gather": how}}).zeroshard.gather == how


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ({"units": "Block"}, "zeroshard.units must be a list"),
        ({"units": {}}, "zeroshard.units must be a list"),
        ({"units": ["Block", 3]}, "zeroshard.units.1 must be a name"),
        ({"units": [""]}, "zeroshard.units.0 must be a name"),
        ({"lookahead_bytes": -1}, "zeroshard.lookahead_bytes must be a whole number"),
        ({"lookahead_bytes": True}, "zeroshard.lookahead_bytes must be a whole number"),
        ({"gather": "nvls"}, 'zeroshard.gather must be "auto", "nccl" or "copy_engine"'),
    ],
)
def test_the_extension_block_is_checked(values: dict[str, object], path: str) -> None:
    assert path in message({"zeroshard": values})
