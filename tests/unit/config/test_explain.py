"""Explaining: every value that counts, its source and its class; and values set from outside."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from zeroshard.config import Entry, Facts, Given, explain
from zeroshard.config.keys import Honoured
from zeroshard.config.override import override
from zeroshard.config.schema import OPEN_BLOCKS
from zeroshard.config.source import read
from zeroshard.config.table import TABLE
from zeroshard.errors import ConfigError


def entries(
    values: Mapping[str, object],
    *assignments: str,
    world: int | None = None,
    facts: Facts | None = None,
) -> dict[str, Entry]:
    found = explain(values, assignments=assignments, world=world, facts=facts)
    by_path = {".".join(entry.path): entry for entry in found}
    assert len(by_path) == len(found)
    return by_path


def told(entry: Entry) -> tuple[object, str, str]:
    return entry.value, entry.source, entry.treatment


def test_every_honoured_key_is_listed_with_its_default() -> None:
    found = entries({"optimizer": {"type": "SGD"}, "scheduler": {"type": "StepLR"}})
    blocks = {path[:-1] for path in TABLE}
    honoured = {
        ".".join(path)
        for path, key in TABLE.items()
        if isinstance(key.treatment, Honoured) and path not in blocks | OPEN_BLOCKS
    }
    assert set(found) == honoured
    assert told(found["gradient_clipping"]) == (1.0, "default", "honoured")


def test_a_block_that_is_not_there_is_one_value() -> None:
    found = entries({})
    assert told(found["optimizer"]) == (None, "default", "honoured")
    assert "optimizer.type" not in found


def test_each_source_is_named() -> None:
    found = entries(
        {
            "train_batch_size": 32,
            "bfloat16": {"enabled": "auto"},
            "gradient_clipping": "auto",
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "eps": 1e-6}},
            "fp16": {"loss_scale_window": "auto"},
            "zero_optimization": {"stage": 3, "max_live_parameters": 1e9, "cpu_offload": True},
        },
        "zero_optimization.stage=2",
        world=4,
    )
    assert told(found["train_batch_size"]) == (32, "file", "honoured")
    assert found["train_micro_batch_size_per_gpu"].value == 8
    assert found["train_micro_batch_size_per_gpu"].source.startswith("derived: ")
    assert told(found["bf16.enabled"])[:2] == ("auto", "auto (resolved from the caller)")
    assert told(found["optimizer.params.lr"])[:2] == ("auto", "auto (resolved from the caller)")
    assert told(found["optimizer.params.eps"]) == (1e-6, "file", "honoured")
    assert told(found["fp16.loss_scale_window"])[:2] == (1000, '"auto": default')
    assert told(found["zero_optimization.stage"]) == (2, "--set", "honoured")
    live = found["zero_optimization.stage3_max_live_parameters"]
    assert told(live)[:2] == (10**9, "file, as zero_optimization.max_live_parameters")
    offload = found["zero_optimization.offload_optimizer.device"]
    assert told(offload) == (
        "cpu",
        "file, as zero_optimization.cpu_offload.device",
        "honoured",
    )


def test_the_old_switch_is_a_source_too() -> None:
    found = entries({"zero_optimization": True})
    assert told(found["zero_optimization.stage"])[:2] == (1, "file")


def test_with_facts_auto_is_explained_by_them() -> None:
    facts = Facts(dtype="bf16", given={("gradient_clipping",): Given(0.5, "args.max_grad_norm")})
    found = entries({"bf16": {"enabled": "auto"}, "gradient_clipping": "auto"}, facts=facts)
    assert told(found["gradient_clipping"])[:2] == (0.5, '"auto" from args.max_grad_norm')
    assert told(found["bf16.enabled"])[:2] == (
        True,
        '"auto" from the model\'s bf16 parameters',
    )


def test_keys_without_effect_are_listed_if_the_file_has_them() -> None:
    found = entries(
        {
            "wandb": {"enabled": True, "group": "x"},
            "dump_state": False,
            "amp": {"enabled": False},
            "zero_optimization": {"contiguous_gradients": False},
        }
    )
    assert told(found["wandb.group"]) == ("x", "file", "no effect")
    assert found["wandb.enabled"].reason == "Monitoring and profiling are not built yet."
    assert found["dump_state"].treatment == "no effect"
    always = found["zero_optimization.contiguous_gradients"]
    assert told(always) == (False, "file", "no effect")
    assert always.reason == "The gradients of a unit always lie in one buffer."


@pytest.mark.parametrize(
    "values",
    [
        {"train_batch_size": "auto", "gradient_accumulation_steps": "auto"},
        {"train_micro_batch_size_per_gpu": "auto"},
    ],
)
def test_a_batch_that_the_caller_gives_stays_open(values: dict[str, object]) -> None:
    found = entries(values, world=8)
    for key in values:
        assert found[key].value == "auto"


def test_batch_numbers_that_do_not_multiply_out_are_an_error() -> None:
    values = {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
    }
    entries(values, world=4)
    with pytest.raises(ConfigError, match=r"32 != 4 \(micro\) x 2 \(accumulation\) x 3 \(ranks\)"):
        entries(values, world=3)
    with pytest.raises(ConfigError, match="the batch size is unknown"):
        entries({}, world=3)


def test_entries_can_be_written_as_json() -> None:
    for entry in entries({"zeroshard": {"units": ["Block"]}, "steps_per_print": "inf"}).values():
        json.dumps(entry.value)


def test_assignments_reach_every_level_and_the_last_one_counts() -> None:
    source, changed = override(
        read({"fp16": {"enabled": True}}),
        ["fp16.enabled=false", "bf16.enabled=true", "a.b.c=[1, 2]", "x=1", "x=bf16", "e="],
    )
    assert source.values == {
        "fp16": {"enabled": False},
        "bf16": {"enabled": True},
        "a": {"b": {"c": [1, 2]}},
        "x": "bf16",
        "e": "",
    }
    assert ("bf16", "enabled") in changed


def test_an_assignment_replaces_a_key_under_its_other_name() -> None:
    values = {
        "bfloat16": {"enabled": False},
        "zero_optimization": {"stage3_max_live_parameters": 1, "cpu_offload": True, "stage": 3},
    }
    source, _ = override(
        read(values),
        [
            "bf16.enabled=true",
            "zero_optimization.max_live_parameters=2",
            'zero_optimization.offload_optimizer={"device": "none"}',
        ],
    )
    assert source.values == {
        "bfloat16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "max_live_parameters": 2,
            "offload_optimizer": {"device": "none"},
        },
    }
    assert values["bfloat16"] == {"enabled": False}
    found = entries(values, "bf16.enabled=true")
    assert told(found["bf16.enabled"])[:2] == (True, "--set")


def test_an_assignment_goes_through_the_old_switch() -> None:
    source, _ = override(read({"zero_optimization": True}), ["zero_optimization.overlap_comm=true"])
    assert source.values == {"zero_optimization": {"stage": 1, "overlap_comm": True}}


@pytest.mark.parametrize("assignment", ["", "x", "=1", "a.=1", ".a=1", "a..b=1"])
def test_what_is_no_assignment_is_refused(assignment: str) -> None:
    with pytest.raises(ConfigError, match="is not of the form KEY=VALUE") as caught:
        override(read({}), [assignment])
    assert "hint: write the path of a key and a JSON value" in str(caught.value)


def test_an_assignment_does_not_go_through_a_value() -> None:
    with pytest.raises(ConfigError) as caught:
        override(read({"fp16": 3}), ["fp16.enabled=true"])
    assert str(caught.value).startswith("fp16.enabled cannot be set: fp16 is 3, not an object.")


def test_accumulation_that_nothing_gives_is_not_said_to_follow_from_a_derived_number() -> None:
    found = entries({"train_micro_batch_size_per_gpu": 2}, world=4)
    assert told(found["train_batch_size"])[:2] == (
        8,
        "derived: micro-batch x accumulation x ranks",
    )
    assert told(found["gradient_accumulation_steps"])[:2] == (1, "derived: 1, as it is not given")
    both = entries({"train_micro_batch_size_per_gpu": 2, "train_batch_size": 16}, world=4)
    assert told(both["gradient_accumulation_steps"])[:2] == (
        2,
        "derived: batch / micro-batch / ranks",
    )
