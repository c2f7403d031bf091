"""Templates: each loads, means what was asked for, and says no more than it has to."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from zeroshard.config import load
from zeroshard.config.source import decode
from zeroshard.config.template import Choice, render
from zeroshard.errors import ConfigError

CHOICES = [
    Choice(stage=stage, offload=offload, precision=precision)  # type: ignore[arg-type]
    for stage, offload, precision in itertools.product(
        (0, 1, 2, 3), ("none", "cpu", "nvme"), ("bf16", "fp16", "fp32")
    )
    if offload == "none" or (stage > 0 and (offload == "cpu" or stage == 3))
]


def name(choice: Choice) -> str:
    return f"{choice.stage}-{choice.offload}-{choice.precision}"


@pytest.mark.parametrize("choice", CHOICES, ids=name)
def test_a_template_loads_and_only_offloading_is_warned_of(
    choice: Choice, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(render(choice), encoding="utf-8")
    config = load(path)
    assert config.zero_optimization.stage == choice.stage
    assert config.zero_optimization.offload_optimizer.device == choice.offload
    assert (config.fp16.enabled, config.bf16.enabled) == (
        choice.precision == "fp16",
        choice.precision == "bf16",
    )
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == (choice.offload != "none")
    assert all("Offloading is not built yet" in text for text in warned)
    assert config.batch(4).train == 4


@pytest.mark.parametrize("choice", CHOICES, ids=name)
def test_without_comments_a_template_is_strict_json_of_the_same_values(choice: Choice) -> None:
    plain = render(choice, comments=False)
    assert json.loads(plain) == decode(render(choice), "text").values
    assert "//" not in plain


@pytest.mark.parametrize("choice", CHOICES, ids=name)
def test_lines_of_a_template_fit_a_screen(choice: Choice) -> None:
    assert max(map(len, render(choice).splitlines())) <= 120


def test_parameters_are_moved_at_stage_three_only() -> None:
    assert "offload_param" in render(Choice(stage=3, offload="cpu"))
    assert "offload_param" not in render(Choice(stage=2, offload="cpu"))
    assert '"nvme_path": "/fast"' in render(Choice(stage=3, offload="nvme", nvme_path="/fast"))


def test_there_is_nothing_to_offload_without_shards() -> None:
    with pytest.raises(ConfigError, match="stage 0 has no shard to offload") as caught:
        render(Choice(stage=0, offload="cpu"))
    assert "hint: choose stage 1, 2 or 3" in str(caught.value)
    with pytest.raises(ConfigError, match="files are for stage 3, but the stage is 2") as caught:
        render(Choice(stage=2, offload="nvme"))
    assert 'hint: choose stage 3, or offload to "cpu"' in str(caught.value)
