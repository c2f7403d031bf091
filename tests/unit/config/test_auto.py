"""What "auto" stands for, where that is said to come from, and what nobody knows."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import pytest

from zeroshard.config import Config, Facts, Given, load
from zeroshard.errors import ConfigError

Path = tuple[str, ...]
LR: Path = ("optimizer", "params", "lr")


def given(values: Mapping[Path, object]) -> Facts:
    return Facts(given={path: Given(value, f"args.{path[-1]}") for path, value in values.items()})


def message(values: Mapping[str, object], facts: Facts) -> str:
    with pytest.raises(ConfigError) as caught:
        load(values, facts)
    return str(caught.value)


def adamw(**params: object) -> dict[str, object]:
    return {"optimizer": {"type": "AdamW", "params": params}}


def params_of(config: Config) -> dict[str, object]:
    assert config.optimizer is not None
    return config.optimizer.params


def test_each_resolved_value_is_told_with_its_source_in_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    config = load(
        {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            **adamw(lr="auto", eps=1e-6),
            "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}},
            "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": "auto"},
        },
        Facts(
            dtype="bf16",
            hidden_size=64,
            given={
                LR: Given(3e-4, "args.learning_rate"),
                ("train_micro_batch_size_per_gpu",): Given(2, "args.per_device_train_batch_size"),
            },
        ),
    )
    assert config.bf16.enabled
    assert config.train_batch_size is None
    assert config.train_micro_batch_size_per_gpu == 2
    assert params_of(config) == {"lr": 3e-4, "eps": 1e-6}
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.getMessage() == (
        'the config dict: "auto" is resolved to: '
        "train_micro_batch_size_per_gpu = 2 (args.per_device_train_batch_size), "
        "gradient_clipping = 1.0 (default), "
        "bf16.enabled = true (the model's bf16 parameters), "
        "optimizer.params.lr = 0.0003 (args.learning_rate), "
        "scheduler.params.warmup_max_lr = 0.0003 (optimizer.params.lr), "
        "zero_optimization.reduce_bucket_size = 4096 (hidden^2 with the model's hidden size 64), "
        "zero_optimization.overlap_comm = null (default)"
    )


def test_what_a_list_is_resolved_to_is_told_item_by_item(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="zeroshard")
    load(adamw(betas="auto"), given({("optimizer", "params", "betas"): (0.9, 0.95)}))
    assert "optimizer.params.betas = [0.9, 0.95] (args.betas)" in caplog.text


@pytest.mark.parametrize(
    ("dtype", "fp16", "bf16"),
    [("fp16", True, False), ("bf16", False, True), ("fp32", False, False), (None, False, False)],
)
def test_precision_follows_the_models_parameters(dtype: object, fp16: bool, bf16: bool) -> None:
    values = {"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}}
    config = load(values, Facts(dtype=dtype))  # type: ignore[arg-type]  # one of its words
    assert (config.fp16.enabled, config.bf16.enabled) == (fp16, bf16)


def test_precision_follows_the_arguments_before_the_model() -> None:
    facts = Facts(dtype="fp16", given={("fp16", "enabled"): Given(False, "args.fp16")})
    config = load({"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}}, facts)
    assert not config.fp16.enabled
    assert not config.bf16.enabled


@pytest.mark.parametrize("other", ["fp16", "torch_autocast"])
def test_auto_never_adds_a_second_precision(other: str) -> None:
    config = load({other: {"enabled": True}, "bf16": {"enabled": "auto"}}, Facts(dtype="bf16"))
    assert not config.bf16.enabled


def test_without_a_hidden_size_the_engine_chooses_the_sizes() -> None:
    keys = ("reduce_bucket_size", "stage3_prefetch_bucket_size")
    zero = load({"zero_optimization": dict.fromkeys(keys, "auto")}, Facts()).zero_optimization
    assert zero.reduce_bucket_size is zero.stage3_prefetch_bucket_size is None


@pytest.mark.parametrize("hidden", [1, 64, 768, 4096, 12288])
def test_sizes_follow_the_hidden_size_as_hugging_face_has_them(hidden: int) -> None:
    keys = (
        "reduce_bucket_size",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
    )
    values = {"zero_optimization": {"stage": 3, **dict.fromkeys(keys, "auto")}}
    zero = load(values, Facts(hidden_size=hidden)).zero_optimization
    assert zero.reduce_bucket_size == hidden * hidden
    assert zero.stage3_prefetch_bucket_size == int(0.9 * hidden * hidden)
    assert zero.stage3_param_persistence_threshold == 10 * hidden


def test_a_learning_rate_that_nobody_gives_is_named_with_what_to_set() -> None:
    assert message(adamw(lr="auto"), Facts()) == (
        'optimizer.params.lr is "auto", but nobody gives its value (the config dict).\n\n'
        'hint: set "optimizer.params.lr", or pass it to initialize() as args.learning_rate, or as '
        '"lr" of every group in model_parameters.'
    )


def test_all_values_that_nobody_gives_are_named_at_once() -> None:
    scheduler = {"warmup_max_lr": "auto", "warmup_num_steps": "auto", "total_num_steps": "auto"}
    text = message(
        {
            **adamw(lr="auto", betas="auto", momentum="auto"),
            "scheduler": {"type": "WarmupDecayLR", "params": scheduler},
        },
        Facts(),
    )
    assert "6 problems" in text
    assert "args.adam_beta1 and args.adam_beta2" in text
    assert 'set "optimizer.params.momentum", or remove it for the default of the optimizer' in text
    assert 'scheduler.params.total_num_steps is "auto"' in text
    assert "args.max_steps" in text
    assert "args.warmup_steps" in text


def test_without_a_caller_nothing_is_missed() -> None:
    config = load({**adamw(lr="auto", eps=1e-6), "bf16": {"enabled": "auto"}})
    assert params_of(config) == {"eps": 1e-6}
    assert not config.bf16.enabled


def test_a_block_that_the_caller_replaces_may_stay_open() -> None:
    config = load(adamw(lr="auto"), Facts(replaced=frozenset({"optimizer"})))
    assert params_of(config) == {}


def test_a_warm_up_starts_at_zero_and_ends_at_the_optimizers_rate() -> None:
    scheduler = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}
    config = load(
        {**adamw(lr=5e-4), "scheduler": {"type": "WarmupLR", "params": scheduler}},
        given({("scheduler", "params", "warmup_num_steps"): 10}),
    )
    assert config.scheduler is not None
    assert config.scheduler.params == {
        "warmup_min_lr": 0,
        "warmup_max_lr": 5e-4,
        "warmup_num_steps": 10,
    }


def test_a_given_value_that_does_not_fit_is_refused_with_its_source() -> None:
    text = message(
        {"train_micro_batch_size_per_gpu": "auto"}, given({("train_micro_batch_size_per_gpu",): 0})
    )
    assert "must be a whole number of at least 1 or null, but is 0, from args." in text


def test_what_the_file_says_stays() -> None:
    facts = given({("gradient_clipping",): 0.1, LR: 1.0, ("fp16", "enabled"): True})
    config = load({"gradient_clipping": 0.7, **adamw(lr=0.2), "fp16": {"enabled": False}}, facts)
    assert config.gradient_clipping == 0.7
    assert params_of(config) == {"lr": 0.2}
    assert not config.fp16.enabled


@pytest.mark.parametrize("block", ["optimizer", "scheduler"])
def test_a_name_is_never_auto(block: str) -> None:
    text = message({block: {"type": "auto"}}, Facts())
    assert text.startswith(f'{block}.type cannot be "auto", as nothing resolves it')
    assert "hint: write the value that is meant" in text
