"""The benchmark of training steps at toy size: one command, every engine, the same losses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM  # noqa: F401 - here once, or each rank takes seconds

from forked import RankError, run_ranks

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import train_step
from side_by_side import driver, engines, render, worker
from side_by_side.plan import Plan
from side_by_side.workload import Variant, Workload


@pytest.fixture
def forked_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that are forked from the test instead of started by the launcher."""

    def start(path: Path, ranks: int) -> Any:
        try:
            run_ranks(lambda rank, world: worker.work(Plan.load(path)), ranks)
        except RankError as error:
            print(error)
            return SimpleNamespace(poll=lambda: worker.BROKEN)
        return SimpleNamespace(poll=lambda: 0)

    monkeypatch.setattr(driver, "_start", start)


@pytest.mark.usefixtures("forked_ranks")
def test_every_engine_runs_on_the_same_weights_and_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engines = ["plain", "plain-master", "fsdp2", "fsdp2-root-kept", "fsdp2-kept"]
    ours = [f"zeroshard-{stage}" for stage in (1, 2, 3)]
    other = "zeroshard-3:checkpointing=full:zero_optimization.overlap_comm=false"
    wrong = "zeroshard-3:zero_optimization.stage=7"
    far = ["zeroshard-2:offload=optimizer", "zeroshard-3:offload=all", "fsdp2:offload=all"]
    names = [*engines, wrong, *ours, other, *far, "deepspeed-3"]
    options = ["--dtype", "fp32", "--seq", "32", "--steps", "2", "--profile", "zeroshard-3"]
    status = train_step.main(
        ["--engines", ",".join(names), *options, "--ranks", "2", "--out", str(tmp_path)]
    )
    printed = capsys.readouterr()
    lines = (tmp_path / "train_step.jsonl").read_text(encoding="utf-8").splitlines()
    found = {line["engine"]: line for line in map(json.loads, lines)}
    assert status == 0 and list(found) == names
    assert found[wrong]["status"] == "failed (build)", printed.out
    assert "stage must be" in found[wrong]["detail"]
    reference = found["plain"]
    assert render.reference_of(list(found.values())) is reference
    for name in (*engines, *ours, other, *far):
        assert found[name]["status"] == "ok", found[name]
        assert render.loss_differences(found[name], reference)[1] < 1e-6, name
    losses = reference["result"]["losses"]
    assert losses == sorted(losses, reverse=True) and losses[0] - losses[3] > 1e-3
    for name in names:
        assert name in printed.out
    profile = found["zeroshard-3"]["result"]["profile"]
    assert profile == {"kernels": 0}  # which only GPUs have
    assert (tmp_path / "trace-tiny-zeroshard-3-on-2.json.gz").stat().st_size > 1000
    assert "deepspeed-3" in printed.out and found["deepspeed-3"]["result"] is None


@pytest.mark.usefixtures("forked_ranks")
def test_bf16_engines_agree_as_far_as_bf16_goes(tmp_path: Path) -> None:
    names = ["fsdp2", "zeroshard-3", "plain"]
    options = ["--dtype", "bf16", "--reduce", "fp32", "--seq", "32", "--steps", "1", "--no-plot"]
    train_step.main(["--engines", ",".join(names), *options, "--out", str(tmp_path)])
    lines = (tmp_path / "train_step.jsonl").read_text(encoding="utf-8").splitlines()
    fsdp2, *others = (json.loads(line) for line in lines)
    for each in others:
        first, most = render.loss_differences(each, fsdp2)
        assert first == 0 and most < 2**-9, each["engine"]


def test_memory_that_ranks_read_from_each_other_counts_as_an_engine_s() -> None:
    def check(rank: int, world: int) -> None:
        tiny = Workload("tiny", 1, 8, dtype="fp32")
        for setting, least, most in (("nccl", 0, 0), ("copy_engine", 1.0, 1.1)):
            variant = Variant.parse(f"zeroshard-3:zeroshard.gather={setting}")
            trainer = engines.build(variant, tiny, torch.device("cpu"))
            shard_bytes = 4 * trainer.parameters / world
            assert least * shard_bytes <= trainer.bytes_beside() <= most * shard_bytes
            trainer.close()
            trainer.release()
            assert trainer.bytes_beside() == 0

    run_ranks(check, 2)
