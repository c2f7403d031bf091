"""Scripts as a user would write them, from the documents and from habit."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import zeroshard
from forked import run_ranks
from unit.engine.small import STAGES, on_ranks

ROOT = next(folder for folder in Path(__file__).parents if (folder / "README.md").exists())
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def scripts() -> list[Any]:
    """The Python blocks of all documents that make an engine."""
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [
        pytest.param(block, id=f"{document.relative_to(ROOT)}-{number}")
        for document in documents
        for number, block in enumerate(FENCE.findall(document.read_text(encoding="utf-8")), 1)
        if "zeroshard.initialize(" in block
    ]


# The compiler looks at the gradient of every input, those that are no leaves included.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("script", scripts())
@on_ranks(2)
def test_a_script_in_the_documents_runs(script: str) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(script, "a document", "exec"), names)
    assert names["engine"].global_steps > 0


def test_the_script_in_the_readme_learns() -> None:
    (first, *_) = FENCE.findall((ROOT / "README.md").read_text(encoding="utf-8"))

    def work(rank: int, world: int) -> tuple[float, float]:
        torch.manual_seed(0)
        losses: list[float] = []
        plain = F.cross_entropy

        def recorded(*args: Any, **options: Any) -> torch.Tensor:
            loss = plain(*args, **options)
            losses.append(loss.item())
            return loss

        F.cross_entropy = recorded
        exec(compile(first, "README.md", "exec"), {"__name__": "__main__"})
        return losses[0], losses[-1]

    for before, after in run_ranks(work, 2):
        assert after < 0.8 * before


@on_ranks(2, STAGES)
def test_a_script_written_for_deepspeed_runs(stage: int, tmp_path: Path) -> None:
    config = {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "Adam", "params": {"lr": 0.03, "betas": [0.8, 0.999]}},
        "scheduler": {"type": "StepLR", "params": {"step_size": 4, "gamma": 0.5}},
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "overlap_comm": True, "reduce_bucket_size": 5e8},
    }
    path = tmp_path / f"ds_config_{dist.get_rank()}.json"
    path.write_text(json.dumps(config))
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser = zeroshard.add_config_arguments(parser)
    args = parser.parse_args(["--deepspeed", "--deepspeed_config", str(path)])
    zeroshard.init_distributed()
    torch.manual_seed(0)
    inputs = torch.randn(64, 8)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    engine, _, loader, scheduler = zeroshard.initialize(
        args=args,
        model=model,
        model_parameters=model.parameters(),
        training_data=TensorDataset(inputs, inputs.sum(1, keepdim=True)),
    )
    assert loader is not None

    def evaluate() -> float:
        with torch.no_grad():
            return F.mse_loss(engine(inputs.bfloat16()).float(), inputs.sum(1, keepdim=True)).item()

    before = evaluate()
    for _ in range(3):
        for x, y in loader:
            x, y = x.to(engine.device).bfloat16(), y.to(engine.device)
            loss = F.mse_loss(engine(x).float(), y)
            engine.backward(loss)
            engine.step()
    assert engine.global_steps == 12
    assert engine.global_samples == 12 * 16
    assert scheduler.last_epoch == 12
    assert engine.get_lr() == [0.03 * 0.5**3]
    assert evaluate() < 0.8 * before
