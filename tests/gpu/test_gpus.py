"""Runs tests/gpu/checks.py through the launcher: on GPUs, and at toy size on two CPU ranks."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).with_name("checks.py")
DROP_IN = Path(__file__).with_name("drop_in.py")
HUGGING_FACE = ("deepspeed", "transformers", "accelerate", "peft")
TRAIN_STEP = Path(__file__).resolve().parents[2] / "benchmarks" / "train_step.py"


def with_gpus() -> dict[str, str]:
    """The environment that shows the GPUs which the tests hide from themselves."""
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    visible = os.environ["TEST_GPUS_VISIBLE"]
    return env | ({"CUDA_VISIBLE_DEVICES": visible} if visible else {})


def run_checks(
    ranks: int, *options: str, env: dict[str, str] | None = None
) -> dict[str, dict[str, object]]:
    command = [sys.executable, "-m", "zeroshard", "--num_gpus", str(ranks), str(CHECKS), *options]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=700, check=False, env=env
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return {line["check"]: line for line in lines}


@pytest.mark.timeout(300)
def test_the_checks_for_gpus_pass_at_toy_size_on_two_cpu_ranks() -> None:
    # The others ask what tests of ranks ask, too.
    names = ("parity", "pulls", "pulled_reductions", "memory", "init", "budget")
    names += ("offload_equal", "automatic_budget")
    results = run_checks(2, "--toy", "--only", *names)
    assert len(results) == len(names)
    assert {name: line for name, line in results.items() if not line["ok"]} == {}


@pytest.mark.gpu
@pytest.mark.timeout(1500)
def test_gpus_match_plain_torch_repeat_their_bits_and_keep_to_the_formulas() -> None:
    """On one GPU, then on two: not at the same time, as two tests might be."""
    for ranks in range(1, min(int(os.environ["TEST_GPUS"]), 2) + 1):
        results = run_checks(ranks, env=with_gpus())
        assert {name: line for name, line in results.items() if not line["ok"]} == {}, ranks


@pytest.mark.gpu
@pytest.mark.timeout(420)
@pytest.mark.skipif(int(os.environ["TEST_GPUS"]) < 2, reason="one GPU gathers nothing")
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="no transformers")
def test_gathers_and_reductions_of_an_8b_step_lie_under_computation(tmp_path: Path) -> None:
    ranks = min(int(os.environ["TEST_GPUS"]), 4)
    options = ["--claim", "long", "--engines", "zeroshard-3", "--ranks", str(ranks), "--no-plot"]
    command = [sys.executable, str(TRAIN_STEP), *options, "--steps", "2", "--out", str(tmp_path)]
    subprocess.run(command, timeout=400, check=True, env=with_gpus())
    (line,) = (tmp_path / "train_step.jsonl").read_text(encoding="utf-8").splitlines()
    record = json.loads(line)
    assert record["status"] == "ok", record
    assert record["result"]["profile"]["hidden"]["both"] >= 0.9, record["result"]["profile"]


@pytest.mark.gpu
@pytest.mark.timeout(700)
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in HUGGING_FACE),
    reason=f"needs {', '.join(HUGGING_FACE)}",
)
def test_programs_of_hugging_face_train_alike_at_all_stages() -> None:
    ranks = min(int(os.environ["TEST_GPUS"]), 2)
    checks = ["trainer", "resume", "loading", "generation"]
    checks += ["qlora"] if importlib.util.find_spec("bitsandbytes") else []
    command = [sys.executable, "-m", "zeroshard", "--num_gpus", str(ranks), str(DROP_IN)]
    done = subprocess.run(
        [*command, "--only", *checks],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=with_gpus(),
    )
    found = [line for line in done.stdout.splitlines() if line.startswith('{"ok"')]
    assert done.returncode == 0, f"{found}\n{done.stderr[-3000:]}"
    assert len(found) == len(checks)
