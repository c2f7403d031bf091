"""Templates: each loads, means what was asked for, and says no more than it has to."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from zeroshard.config import load
from zeroshard.config.source import decode
from zeroshard.config.template import Choice, render

CHOICES = [
    Choice(stage=stage, offload=offload, precision=precision)  # type: ignore[arg-type]
    for stage, offload, precision in itertools.product(
        (0, 1, 2, 3), ("none", "cpu", "nvme"), ("bf16", "fp16", "fp32")
    )
]


def name(choice: Choice) -> str:
    return f"{choice.stage}-{choice.offload}-{choice.precision}"


@pytest.mark.parametrize("choice", CHOICES, ids=name)
def test_a_template_loads_and_everything_in_it_counts(
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
    assert [record.getMessage() for record in caplog.records] == []
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
    for stage in (0, 2):
        text = render(Choice(stage=stage, offload="cpu"))  # type: ignore[arg-type]
        assert "offload_optimizer" in text
        assert "offload_param" not in text
    assert '"nvme_path": "/fast"' in render(Choice(stage=3, offload="nvme", nvme_path="/fast"))
