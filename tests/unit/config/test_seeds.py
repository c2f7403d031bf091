"""Configurations as people have them load, explain and mean what they say."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from zeroshard.config import Facts, Given, explain, load

FILES = sorted((Path(__file__).parent / "seeds").glob("*.json"))
TRAINER = Facts(
    dtype="bf16",
    hidden_size=4096,
    given={
        ("train_micro_batch_size_per_gpu",): Given(2, "args.per_device_train_batch_size"),
        ("gradient_accumulation_steps",): Given(4, "args.gradient_accumulation_steps"),
        ("gradient_clipping",): Given(0.5, "args.max_grad_norm"),
    },
)


def test_no_file_is_missing() -> None:
    assert [path.stem for path in FILES] == [
        "fp16",
        "offload_7b",
        "offload_nvme",
        "standalone_zero2",
        "trainer_zero3_auto",
        "zero1",
        "zero2",
        "zero3",
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("facts", [None, TRAINER], ids=["alone", "with facts"])
def test_every_file_loads_and_explains(path: Path, facts: Facts | None) -> None:
    config = load(path, facts)
    entries = {".".join(entry.path): entry for entry in explain(path, facts=facts)}
    assert entries["zero_optimization.stage"].value == config.zero_optimization.stage
    assert entries["fp16.enabled"].value in (config.fp16.enabled, "auto")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_only_a_slow_start_is_not_to_be_had(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(path, TRAINER)
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == (path.stem == "offload_nvme")
    assert all("offload_optimizer.fast_init. Files are preallocated" in text for text in warned)


def test_the_trainers_file_is_filled_from_the_trainer(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (path,) = (path for path in FILES if path.stem == "trainer_zero3_auto")
    config = load(path, TRAINER)
    zero = config.zero_optimization
    assert zero.reduce_bucket_size == 4096 * 4096
    assert zero.stage3_prefetch_bucket_size == int(0.9 * 4096 * 4096)
    assert zero.stage3_param_persistence_threshold == 10 * 4096
    assert config.gradient_clipping == 0.5
    assert config.batch(8).train == 2 * 4 * 8
    (line,) = [record.getMessage() for record in caplog.records]
    assert "gradient_clipping = 0.5 (args.max_grad_norm)" in line
    assert "reduce_bucket_size = 16777216 (hidden^2 with the model's hidden size 4096)" in line
