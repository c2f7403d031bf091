"""The guide's code runs as written, and the benchmark runs at toy size."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from unit.checkpointing.blocks import held_on_host
from unit.engine.small import on_ranks

ROOT = Path(__file__).resolve().parents[3]
GUIDE = ROOT / "docs" / "guides" / "activation-checkpointing.md"
BENCHMARK = ROOT / "benchmarks" / "activation_memory.py"


@on_ranks(1)
def test_the_code_of_the_guide_runs() -> None:
    names: dict[str, Any] = {"__name__": "guide"}
    code = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    for block in code:
        exec(block, names)
    assert names["engine"].global_steps == 1
    assert set(names["hidden"].tolist()) <= {0.0, 2.0}
    assert not held_on_host()


def test_the_benchmark_finds_less_memory_in_each_way(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARK), "--layers", "3", "--turns", "1", "--steps", "1"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "activation_memory.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    memory = {each["engine"]: each["result"]["activation_mib"] for each in found}
    assert list(memory) == ["none", "torch", "checkpoint", "cpu", "cpu, contiguous"]
    assert len(done.stdout.splitlines()) == 5
    assert memory["none"] > 4 * memory["checkpoint"]
    assert memory["checkpoint"] == memory["torch"]
    inputs = memory["checkpoint"] - memory["cpu"]
    assert inputs == pytest.approx(3 * 2 * 128 * 128 * 4 / 2**20, abs=0.02)
