from __future__ import annotations

import json
import sys

import pytest

from zeroshard.launch import report
from zeroshard.launch.cli import main


def test_the_report_names_versions_devices_limits_and_features(
    capsys: pytest.CaptureFixture[str],
) -> None:
    import torch

    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    sections = found["sections"]
    # A build's own label may be in one of the two only.
    assert sections["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "NCCL", "cuDNN", "NVIDIA driver", "peft"} <= set(sections["versions"])
    assert {"memory", "memory limit", "/dev/shm", "CPUs"} <= set(sections["host"])
    assert "networks" in sections["interconnect"]
    assert sections["GPUs"]
    features = {feature["name"]: feature for feature in found["features"]}
    assert features["safetensors files"]["is_there"]
    assert features["fp16 with a loss scale"]["is_there"]
    assert not any("unknown" in value for facts in sections.values() for value in facts.values())


def test_the_text_has_a_line_per_fact_and_no_colors_outside_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("SECRET_TOKEN", "hidden")
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "\nhost\n  CPUs " in text
    assert "\n  feature " in text
    assert "NCCL_DEBUG" in text
    assert "hidden" not in text


def test_a_torch_that_cannot_be_imported_costs_its_own_lines_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = report.collect()
    assert found.sections["versions"]["cuDNN"].startswith("unknown (ModuleNotFoundError")
    assert found.sections["host"]["memory"]
    features = {feature.name: feature for feature in found.features}
    assert not features["bf16"].is_there
    assert features["bf16"].found.startswith("unknown (ModuleNotFoundError")
    assert features["core binding"].is_there
