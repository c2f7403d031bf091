"""Keys: honoured, without effect, refused or unknown, and what the user hears of each."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import pytest

from zeroshard.config import load
from zeroshard.config.keys import ALIASES, ROWS, Honoured, NoEffect, Refused
from zeroshard.config.schema import BLOCKS
from zeroshard.config.table import TABLE
from zeroshard.errors import ConfigError


def message(values: Mapping[str, object]) -> str:
    with pytest.raises(ConfigError) as caught:
        load(values)
    return str(caught.value)


def nested(path: str, value: object) -> dict[str, object]:
    first, _, rest = path.partition(".")
    return {first: nested(rest, value) if rest else value}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    assert all(record.name == "zeroshard" for record in caplog.records)
    assert all(record.levelno == logging.WARNING for record in caplog.records)
    return [record.getMessage() for record in caplog.records]


def test_an_unknown_key_is_refused_with_its_path_and_the_nearest_key() -> None:
    assert message({"zero_optimization": {"overlap_com": True}}) == (
        'unknown key "zero_optimization.overlap_com" (the config dict). '
        'Did you mean "overlap_comm"?'
    )
    assert 'Did you mean "gradient_clipping"?' in message({"gradient_cliping": 1.0})
    assert 'Did you mean "wall_clock_breakdown"?' in message({"Wall_Clock_Breakdown": True})
    assert 'Did you mean "hysteresis"?' in message({"fp16": {"hysterisis": 2}})
    assert 'Did you mean "train_micro_batch_size_per_gpu"?' in message({"micro_batch_size": 2})


def test_a_key_that_would_be_refused_is_not_proposed() -> None:
    text = message({"max_grad_norm": 1.0})
    assert "Did you mean" not in text
    assert 'hint: move the number to the top-level key "gradient_clipping"' in text
    assert '"cpu_offload"' not in message({"zero_optimization": {"offload": True}})


def test_a_name_that_nobody_resolves_cannot_be_auto() -> None:
    text = message({"optimizer": {"type": "auto", "params": {}}})
    assert text.startswith('optimizer.type cannot be "auto"')
    assert "hint: write the name that is meant" in text


def test_a_key_at_the_wrong_level_is_sent_to_its_block() -> None:
    assert 'Did you mean "zero_optimization.stage"?' in message({"stage": 3})
    assert 'Did you mean "fp16.loss_scale"?' in message({"loss_scale": 0})


def test_a_key_like_no_other_is_refused_without_a_guess() -> None:
    text = message({"xyzzy": 1})
    assert text.startswith('unknown key "xyzzy" (the config dict).')
    assert "Did you mean" not in text
    assert "hint: remove it" in text


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(
        '{"steps_per_print": 1, "steps_per_print": 2, "fp16": {"hysteresis": 0},'
        ' "zero_optimization": {"overlap_com": 1, "stage": 7}, "sparse_gradients": true}',
        encoding="utf-8",
    )
    with pytest.raises(ConfigError) as caught:
        load(path)
    text = str(caught.value)
    assert text.startswith(f"{path} has 5 problems.\n\n1. ")
    for part in (
        'duplicate key "steps_per_print"',
        'unknown key "zero_optimization.overlap_com"',
        "sparse_gradients cannot be true",
        "fp16.hysteresis must be",
        "zero_optimization.stage must be 0, 1, 2 or 3, but is 7",
    ):
        assert text.count(part) == 1
    assert text.count("hint: ") == 4  # An unknown key says "Did you mean" instead.


IGNORED: list[tuple[str, object]] = [
    ("wall_clock_breakdown", False),
    ("memory_breakdown", True),
    ("flops_profiler", {"enabled": True}),
    ("tensorboard", {"enabled": True, "output_path": "runs"}),
    ("wandb", {"enabled": False}),
    ("csv_monitor", {}),
    ("comet", {"enabled": False}),
    ("comms_logger", {"enabled": True}),
    ("aio", {"thread_count": 1}),
    ("checkpoint", {"tag_validation": "Warn"}),
    ("dump_state", True),
    ("timers", {"throughput": {"enabled": False}}),
    ("zero_optimization.leaf_module", {"classes": []}),
    ("zero_optimization.overlap_comm", True),
    ("bf16.immediate_grad_update", True),
    ("amp", {"enabled": False}),
    ("elasticity", {"enabled": False, "version": 0.2}),
    ("curriculum_learning", {"enabled": False}),
    ("compression_training", {"layer_reduction": {"enabled": False}, "x": {"y": [1]}}),
    ("graph_harvesting", False),
    ("data_efficiency", {"enabled": False}),
    ("progressive_layer_drop", {"enabled": False}),
]


@pytest.mark.parametrize(("path", "value"), IGNORED)
def test_a_known_key_that_does_nothing_is_told_once(
    path: str, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    load(nested(path, value))
    assert warnings(caplog) == [f"the config dict: accepted, no effect in this version: {path}"]


def test_all_keys_that_do_nothing_share_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    load({"dump_state": True, "zero_optimization": {"sub_group_size": 1e9}, "wandb": {}})
    (text,) = warnings(caplog)
    assert text.endswith(": dump_state, zero_optimization.sub_group_size, wandb")


HARMFUL: list[tuple[str, object]] = [
    ("gradient_predivide_factor", 2.0),
    ("prescale_gradients", True),
    ("gradient_allreduce_op", "sum"),
    ("sparse_gradients", True),
    ("managed_gradient_accumulation", False),
    ("sequence_parallel_size", 2),
    ("tensor_parallel", {"autotp_size": 2}),
    ("tensor_parallel", {"tp": {"tp_size": 4}}),
    ("torch_autocast", {"enabled": True, "dtype": "bfloat16"}),
    ("data_efficiency", {"enabled": True}),
    ("hybrid_engine", {"enabled": True}),
    ("expert_parallel", {"enabled": True}),
    ("amp", {"enabled": True}),
    ("amp", True),
    ("elasticity", {"enabled": True}),
    ("compression_training", {"weight_quantization": {"shared_parameters": {"enabled": True}}}),
    ("sparse_attention", {"mode": "fixed"}),
    ("fp16.fp16_master_weights_and_grads", True),
    ("bf16.bf16_master_weights_and_grads", True),
    ("bf16.bf16_optimizer_states", True),
    ("data_types.param_dtype", "bf16"),
    ("data_types.buffer_dtype", "fp32"),
    ("data_types.keep_in_fp32_modules", ["norm"]),
    ("zero_optimization.offload_optimizer", {"device": "cpu", "pin_memory": True}),
    ("zero_optimization.offload_optimizer", {"device": "nvme"}),
    ("zero_optimization.cpu_offload", True),
    ("zero_optimization.zero_quantized_weights", True),
    ("zero_optimization.zero_quantized_gradients", True),
    ("zero_optimization.zero_quantized_nontrainable_weights", True),
    ("zero_optimization.zero_hpz_partition_size", 8),
    ("zero_optimization.mics_shard_size", 4),
    ("zero_optimization.zenflow", {}),
    ("zero_optimization.legacy_stage1", True),
]


@pytest.mark.parametrize(("path", "value"), HARMFUL)
def test_a_key_that_would_change_the_run_is_refused_with_a_reason(path: str, value: object) -> None:
    text = message(nested(path, value))
    assert text.startswith(path)
    assert " cannot be " in text
    assert "not built yet" in text
    assert "\n\nhint: " in text


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("gradient_predivide_factor", 1.0),
        ("gradient_predivide_factor", 1),
        ("prescale_gradients", False),
        ("gradient_allreduce_op", "mean"),
        ("managed_gradient_accumulation", True),
        ("sequence_parallel_size", 1),
        ("tensor_parallel", {"autotp_size": 0}),
        ("torch_autocast", {"enabled": False}),
        ("fp16.fp16_master_weights_and_grads", False),
        ("data_types.keep_in_fp32_modules", "auto"),
        ("data_types.keep_in_fp32_modules", []),
        ("zero_optimization.offload_optimizer", {"device": "none", "nvme_path": None}),
        ("zero_optimization.offload_param", {"device": "none", "nvme_path": None}),
        ("zero_optimization.offload_param", None),
        ("zero_optimization.zero_hpz_partition_size", 1),
        ("zero_optimization.zero_quantized_weights", False),
        ("zero_optimization.mics_shard_size", -1),
        ("zero_optimization.zenflow", None),
        ("zero_optimization.zero_hpz_partition_size", "auto"),
    ],
)
def test_a_refused_key_that_asks_for_nothing_is_accepted_without_a_word(
    path: str, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    load(nested(path, value))
    assert warnings(caplog) == []


@pytest.mark.parametrize("value", [True, "2.0", [1], float("nan")])
def test_a_harmless_number_is_a_number(value: object) -> None:
    assert "gradient_predivide_factor cannot be" in message({"gradient_predivide_factor": value})


def test_an_optimizer_does_not_clip() -> None:
    text = message({"optimizer": {"type": "Adam", "params": {"max_grad_norm": 1.0}}})
    assert text.startswith("optimizer.params.max_grad_norm cannot be 1.0")
    assert 'move the number to the top-level key "gradient_clipping"' in text


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_parameters_are_not_offloaded_below_stage_three(stage: int, tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(
        f'{{"zero_optimization": {{"stage": {stage}, "offload_param": {{"device": "cpu"}}}}}}',
        encoding="utf-8",
    )
    with pytest.raises(ConfigError) as caught:
        load(path)
    text = str(caught.value)
    assert f"zero_optimization.offload_param needs stage 3, but stage is {stage}" in text
    assert f"Stage {stage} keeps full parameters on the device" in text
    assert 'hint: set "stage": 3, or remove "offload_param"' in text
    assert "Moving parameters off the device is not built yet" in text


def test_parameters_are_not_offloaded_at_stage_three_yet() -> None:
    text = message({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}})
    assert text.startswith('zero_optimization.offload_param.device cannot be "nvme"')
    assert "needs stage 3" not in text


def test_auto_is_resolved_in_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    config = load(
        {
            "train_batch_size": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "eps": 1e-6}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
            "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
        }
    )
    assert config.gradient_clipping == 1.0
    assert config.optimizer is not None
    assert config.optimizer.params == {"eps": 1e-6}
    assert config.scheduler is not None
    assert config.scheduler.params == {}
    assert config.zero_optimization.reduce_bucket_size is None
    assert warnings(caplog) == [
        'the config dict: "auto" is resolved to: gradient_clipping = 1.0, bf16.enabled = false, '
        "optimizer.params.lr = the optimizer's own default, "
        "scheduler.params.warmup_num_steps = the scheduler's own default"
    ]


def test_nothing_is_said_of_a_config_that_is_taken_whole(caplog: pytest.LogCaptureFixture) -> None:
    load(
        {
            "train_batch_size": "auto",
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
            "zero_optimization": {"stage": 3},
            "zeroshard": {"units": ["Block"]},
        }
    )
    assert warnings(caplog) == []


def test_older_and_shorter_names_are_aliases() -> None:
    config = load(
        {
            "zero_optimization": {
                "max_live_parameters": 1e9,
                "stage3_gather_fp16_weights_on_model_save": True,
            }
        }
    )
    assert config.zero_optimization.stage3_max_live_parameters == 1_000_000_000
    assert config.zero_optimization.stage3_gather_16bit_weights_on_model_save is True
    text = message(
        {"zero_optimization": {"max_live_parameters": 1, "stage3_max_live_parameters": 1}}
    )
    assert '"stage3_max_live_parameters" are one key, and both are given' in text


def test_a_usual_framework_config_is_accepted() -> None:
    config = load(
        {
            "bf16": {"enabled": True},
            "fp16": {"enabled": False},
            "zero_optimization": {
                "stage": 3,
                "overlap_comm": True,
                "contiguous_gradients": True,
                "sub_group_size": 1e9,
                "reduce_bucket_size": "auto",
                "stage3_prefetch_bucket_size": "auto",
                "stage3_param_persistence_threshold": "auto",
                "stage3_max_live_parameters": 1e9,
                "stage3_max_reuse_distance": 1e9,
                "stage3_gather_16bit_weights_on_model_save": True,
                "offload_param": {"device": "none", "nvme_path": None},
            },
            "zero_optimization.reduce_bucket_size": 1024,
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "steps_per_print": float("inf"),
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": 2,
            "wall_clock_breakdown": False,
            "zero_allow_untested_optimizer": True,
        }
    )
    assert config.zero_optimization.stage == 3
    assert config.batch(4).train == 8


def test_every_key_is_in_one_class_with_a_reason() -> None:
    fields = {(*block, name) for block, model in BLOCKS.items() for name in model.model_fields}
    assert not fields & set(ROWS)
    assert set(TABLE) == fields | set(ROWS)
    assert not set(ALIASES) & set(TABLE)
    assert set(ALIASES.values()) <= set(TABLE)
    for path, key in TABLE.items():
        assert key.path == path
        match key.treatment:
            case Honoured():
                assert key.has_field
                assert key.doc
            case NoEffect(reason):
                assert reason.endswith(".")
            case Refused() as row:
                assert not key.has_field
                assert row.reason.endswith(".")
                assert row.instead.endswith(".")
                assert row.harmless(None)


# Every key of DeepSpeed, so that a row lost in an edit is noticed.
DEEPSPEED = {
    "": "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps "
    "managed_gradient_accumulation steps_per_print gradient_clipping communication_data_type "
    "seq_parallel_communication_data_type prescale_gradients gradient_predivide_factor "
    "gradient_allreduce_op sparse_gradients disable_allgather dump_state disable_python_gc "
    "wall_clock_breakdown memory_breakdown zero_allow_untested_optimizer "
    "zero_force_ds_cpu_optimizer vocabulary_size dataloader_drop_last log_level "
    "use_data_before_expert_parallelism sequence_parallel_size data_parallel_size optimizer "
    "scheduler fp16 bf16 bfloat16 torch_autocast data_types amp zero_optimization nebula "
    "compression_training quantize_training eigenvalue sparse_attention elasticity "
    "graph_harvesting curriculum_learning progressive_layer_drop aio activation_checkpointing "
    "tensorboard csv_monitor wandb comet comms_logger flops_profiler timers checkpoint "
    "autotuning compile tensor_parallel expert_parallel data_efficiency pipeline hybrid_engine",
    "optimizer": "type params legacy_fusion",
    "scheduler": "type params",
    "fp16": "enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis "
    "consecutive_hysteresis min_loss_scale fp16_master_weights_and_grads",
    "bf16": "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads "
    "bf16_optimizer_states",
    "data_types": "grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules",
    "zero_optimization": "stage contiguous_gradients reduce_scatter reduce_bucket_size "
    "use_multi_rank_bucket_allreduce allgather_partitions allgather_bucket_size overlap_comm "
    "compute_grad_norm load_from_fp32_weights elastic_checkpoint sub_group_size "
    "round_robin_gradients parameter_alignment ignore_unused_parameters legacy_stage1 "
    "stage3_prefetch_bucket_size stage3_param_persistence_threshold "
    "stage3_model_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance "
    "stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save "
    "stage3_module_granularity_threshold stage3_use_all_reduce_for_fetch_params "
    "stage3_allgather_sequential memory_efficient_linear pipeline_loading_checkpoint "
    "override_module_apply log_trace_cache_warnings enable_sanity_checks "
    "zero_hpz_partition_size zero_quantized_weights zero_quantized_nontrainable_weights "
    "zero_quantized_gradients save_muon_momentum_buffer_in_memory leaf_module zenflow "
    "cpu_offload cpu_offload_param cpu_offload_use_pin_memory mics_shard_size "
    "mics_hierarchical_params_gather zeropp_loco_param offload_param offload_optimizer",
}


@pytest.mark.parametrize("block", DEEPSPEED)
def test_no_key_of_deepspeed_is_unknown(block: str) -> None:
    for name in DEEPSPEED[block].split():
        path = (block, name) if block else (name,)
        assert path in TABLE or path in ALIASES, path
