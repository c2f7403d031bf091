"""The picture of a run is drawn whatever has failed, and left out where nothing can be drawn."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

from side_by_side import plots, records
from side_by_side.claims import CLAIMS

PNG = b"\x89PNG\r\n\x1a\n"


def run(allocated_gib: float | None) -> list[dict[str, Any]]:
    source = records.Origin("run", "2026-01-02 03:04", None, False, {"device": "H"}, {"torch": "2"})
    workload = CLAIMS["short"].workload
    assert workload is not None
    result = {
        "median_s": 1.0,
        "min_s": 0.9,
        "max_s": 1.5,
        "tokens_per_s_per_rank": 1024.0,
        "allocated_gib": allocated_gib,
        "reserved_gib": allocated_gib,
    }
    common = (source, "train_step", 2, workload.as_dict())
    engines = ("zeroshard-3", "zeroshard-3:zeroshard.gather=nccl")
    failed = records.record(*common, "fsdp2", None, status="out of memory", claim="short")
    return [*(records.record(*common, e, result, claim="short") for e in engines), failed]


@pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)
def test_a_run_is_drawn_with_and_without_memory(tmp_path: Path) -> None:
    for memory in (50.0, None):
        path = plots.draw(run(memory), tmp_path)
        assert path is not None and path.read_bytes().startswith(PNG)


def test_without_matplotlib_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert plots.draw(run(1.0), tmp_path) is None
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
