"""Keys: honoured, without effect, refused or unknown, and what the user hears of each."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from zeroshard.config import load
from zeroshard.config.contents import KINDS
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
    assert "hint: write the value that is meant" in text


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
    ("wall_clock_breakdown", True),
    ("memory_breakdown", True),
    ("flops_profiler", {"enabled": True}),
    ("tensorboard", {"enabled": True, "output_path": "runs"}),
    ("wandb", {"enabled": True, "group": None}),
    ("csv_monitor", {"enabled": True}),
    ("comet", {"enabled": True}),
    ("comms_logger", {"enabled": True, "prof_ops": ["all_reduce"]}),
    ("aio.use_gds", True),
    ("aio.overlap_events", False),
    ("checkpoint", {"tag_validation": "Warn", "writer": {"type": "fast"}}),
    ("compile.deepcompile", True),
    ("compile.passes", ["z3"]),
    ("dump_state", True),
    ("timers", {"throughput": {"enabled": False}}),
    ("zero_optimization.contiguous_gradients", False),
    ("zero_optimization.allgather_partitions", False),
    ("zero_optimization.memory_efficient_linear", False),
    ("zero_optimization.offload_optimizer.pipeline_read", False),
    ("zero_optimization.offload_optimizer.super_offload", True),
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
def test_a_known_key_that_does_nothing_is_told_once_with_the_reason(
    path: str, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    load(nested(path, value))
    (text,) = warnings(caplog)
    start = f"the config dict: accepted, no effect: {path}. "
    assert text.startswith(start)
    assert len(text) > len(start) + 10
    assert text.endswith(".")


def test_keys_that_do_nothing_for_one_reason_share_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    load({"dump_state": True, "wandb": {"enabled": True}, "wall_clock_breakdown": True})
    assert warnings(caplog) == [
        "the config dict: accepted, no effect: dump_state. "
        "`zeroshard config explain` prints the configuration.",
        "the config dict: accepted, no effect: wandb, wall_clock_breakdown. "
        "Monitoring and profiling are not built yet.",
    ]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("wall_clock_breakdown", False),
        ("dump_state", None),
        ("tensorboard", {"enabled": False, "job_name": "x", "output_path": ""}),
        ("aio", {"block_size": 1048576, "queue_depth": 8, "thread_count": 1, "use_gds": False}),
        ("aio.overlap_events", True),
        ("compile", {"deepcompile": False}),
        ("zero_optimization.contiguous_gradients", True),
        ("zero_optimization.offload_optimizer", {"device": "cpu", "pin_memory": True}),
        ("zero_optimization.offload_optimizer", {"device": "cpu", "pipeline_write": True}),
        ("zero_optimization.cpu_offload", True),
        ("zero_optimization.compute_grad_norm", True),
    ],
)
def test_nothing_is_said_of_a_key_that_asks_for_what_happens_anyway(
    path: str, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    load(nested(path, value))
    assert warnings(caplog) == []


@pytest.mark.parametrize(
    ("path", "value", "wanted"),
    [
        ("wall_clock_breakdown", "yes", "true or false"),
        ("tensorboard", True, "an object"),
        ("aio.block_size", 0, "a whole number of at least 1"),
        ("compile.enabled", 1, "true or false"),
        ("compile.free_activation_threshold", 0, "a whole number of at least 1"),
        ("aio.single_submit", 1, "true or false"),
        ("checkpoint.tag_validation", "Sometimes", '"Ignore", "Warn" or "Fail"'),
        ("checkpoint.writer.io_buffer_size", -1, "a whole number of at least 1"),
        ("flops_profiler.module_depth", 1.5, "a whole number"),
        ("comms_logger.prof_ops", "all_reduce", "a list of names"),
        ("wandb.group", 3, "text"),
        ("zero_optimization.offload_optimizer.device", "disk", '"none", "cpu" or "nvme"'),
        ("zero_optimization.offload_optimizer.ratio", 1.5, "a number from 0 to 1"),
        (
            "zero_optimization.offload_optimizer.cpuadam_cores_perc",
            -0.1,
            "a number from 0 to 1 or null",
        ),
        ("zeroshard.gpu_budget", -1, '"auto", a number of GiB of at least 0 or null'),
        ("zeroshard.offload_update", "nvme", '"auto", "gpu" or "cpu"'),
        ("zero_optimization.offload_param.buffer_size", 0, "a number of elements of at least 1"),
        ("zero_optimization.cpu_offload", "cpu", "true or false"),
        ("data_efficiency.seed", "x", "a whole number"),
    ],
)
def test_keys_that_do_nothing_are_checked_too(path: str, value: object, wanted: str) -> None:
    text = message(nested(path, value))
    assert text.startswith(f"{path} must be {wanted}")


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("aio.block_siz", "block_size"),
        ("tensorboard.outputpath", "output_path"),
        ("checkpoint.writer.io_multiplyer", "io_multiplier"),
        ("timers.throughput.synchronised", "synchronized"),
        ("tensor_parallel.tp.tp_siz", "tp_size"),
        ("zero_optimization.offload_optimizer.pin_memori", "pin_memory"),
        ("zero_optimization.leaf_module.class", "classes"),
        ("zero_optimization.zenflow.topk_ration", "topk_ratio"),
        ("elasticity.min_gpu", "min_gpus"),
        ("torch_autocast.dtyp", "dtype"),
        ("compile.enable", "enabled"),
        ("activation_checkpointing.partition_activation", "partition_activations"),
    ],
)
def test_a_typo_is_found_inside_every_block(path: str, near: str) -> None:
    text = message(nested(path, True))
    assert f'unknown key "{path}"' in text
    assert f'Did you mean "{near}"?' in text


HARMFUL: list[tuple[str, object]] = [
    ("gradient_allreduce_op", "sum"),
    ("sparse_gradients", True),
    ("managed_gradient_accumulation", False),
    ("sequence_parallel_size", 2),
    ("tensor_parallel", {"autotp_size": 2}),
    ("tensor_parallel", {"tp": {"tp_size": 4}}),
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


@pytest.mark.parametrize("value", [True, "2", [1], float("nan")])
def test_a_harmless_number_is_a_number(value: object) -> None:
    assert "sequence_parallel_size cannot be" in message({"sequence_parallel_size": value})


def test_an_optimizer_does_not_clip() -> None:
    text = message({"optimizer": {"type": "Adam", "params": {"max_grad_norm": 1.0}}})
    assert text.startswith("optimizer.params.max_grad_norm cannot be 1.0")
    assert 'move the number to the top-level key "gradient_clipping"' in text


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


def test_arguments_of_the_compiler_have_two_names_and_are_its_own() -> None:
    options = {"mode": "default", "options": {"max_autotune": True}}
    for name in ("kwargs", "compile_kwargs"):
        config = load({"compile": {"enabled": True, "backend": "eager", name: options}})
        assert config.compile.kwargs == options
    assert not load({"compile": {"deepcompile": True}}).compile.enabled


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
    assert set(TABLE) == fields | set(ROWS) | set(KINDS)
    assert not set(ALIASES) & set(TABLE)
    assert set(ALIASES.values()) <= set(TABLE)
    for path, key in TABLE.items():
        assert key.path == path
        match key.treatment:
            case Honoured():
                assert key.has_field
                assert key.doc
            case NoEffect() as ignored:
                assert ignored.reason.endswith(".")
            case Refused() as row:
                assert not key.has_field
                assert row.reason.endswith(".")
                assert row.instead.endswith(".")
                assert row.asks_for_nothing(None)


def deepspeed_keys() -> Iterator[str]:
    """Yield the paths of DeepSpeed's own keys."""
    text = (Path(__file__).parent / "deepspeed_keys.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        if not line.startswith("#"):
            block, names = line.split(":")
            yield from (f"{block}.{name}" if block else name for name in names.split())


CANDIDATES: tuple[object, ...] = (
    *(True, False, 0, 3, 0.5, "bf16", "fp16", "cpu", "x", "auto", None, ["x"], {}),
    *({"enabled": True}, {"tp_size": 2}, {"device": "cpu"}),
    *({"tag_validation": "Warn"}, {"block_size": 1}, {"stages": 2}, {"throughput": {}}),
    *("Warn", "fast", "throughput", "random", "step", "REPLICA", {"x": {"enabled": True}}),
)
# What has to be there for a key of a block to count.
SETTINGS: dict[str, dict[str, object]] = {
    "zero_optimization.offload_optimizer": {"device": "cpu"},
    "zero_optimization.offload_param": {"device": "cpu"},
    "optimizer": {"type": "AdamW"},
    "scheduler": {"type": "LinearLR"},
}
SWITCHES = frozenset(
    {"autotuning", "comet", "comms_logger", "csv_monitor", "flops_profiler", "tensorboard", "wandb"}
)


def what_happens(path: str, value: object, caplog: pytest.LogCaptureFixture) -> str:
    """Load a file that has a key, and tell what is heard of it."""
    block, _, name = path.rpartition(".")
    value = copy.deepcopy(value)
    values = nested(block, {**SETTINGS.get(block, {}), name: value}) if block else {name: value}
    if path.startswith("optimizer.params."):
        values = {"optimizer": {"type": "AdamW", "params": {name: value}}}
    for top, inside in values.items():
        if top == "zero_optimization" and isinstance(inside, dict):
            inside.setdefault("stage", 3)
        if top in SWITCHES and isinstance(inside, dict) and block:
            inside.setdefault("enabled", True)
    caplog.clear()
    try:
        load(values)
    except ConfigError as error:
        is_refused = " cannot be " in str(error) and 'cannot be "auto"' not in str(error)
        return "refused" if is_refused else "wrong"
    told = [text for text in warnings(caplog) if "no effect" in text]
    assert len(told) <= 1
    if not told:
        return "silent"
    key = told[0].split("no effect: ")[1].split(". ")[0]
    assert path == key or path.startswith(f"{key}.")
    return "told"


@pytest.mark.parametrize("dotted", sorted(set(deepspeed_keys())))
def test_every_key_of_deepspeed_behaves_as_its_one_class_says(
    dotted: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tuple(dotted.split("."))
    key = TABLE[ALIASES.get(path, path)]
    seen = {what_happens(dotted, value, caplog) for value in CANDIDATES}
    match key.treatment:
        case Honoured():
            assert "silent" in seen
            assert "refused" not in seen
            assert ("told" in seen) == (key.always is not None)
        case NoEffect():
            assert "told" in seen
            assert "refused" not in seen
        case Refused():
            assert seen & {"refused", "silent", "told"}
            assert path not in ROWS or ("refused" in seen and seen & {"silent", "told"})


def test_the_list_of_deepspeed_is_whole() -> None:
    keys = list(deepspeed_keys())
    assert len(keys) == len(set(keys)) > 280
    blocks = {key.rpartition(".")[0] for key in keys}
    assert {"aio", "checkpoint.writer", "zero_optimization.zenflow", "compile"} <= blocks


@pytest.mark.parametrize("mark", ["_comment", "$schema", "//", "# learning rate"])
def test_a_key_that_is_marked_as_a_remark_is_ignored_and_told(
    mark: str, caplog: pytest.LogCaptureFixture
) -> None:
    load({mark: "three days of trying", "zero_optimization": {"stage": 2, mark: [1, 2]}})
    (text,) = warnings(caplog)
    assert mark in text and f"zero_optimization.{mark}" in text and "read as a remark" in text


def test_a_stage_is_never_left_open() -> None:
    text = message({"zero_optimization": {"stage": "auto"}})
    assert text.startswith('zero_optimization.stage cannot be "auto", as nothing resolves it (')
