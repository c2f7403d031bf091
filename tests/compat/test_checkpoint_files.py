"""Checkpoint folders as Lightning reads them, and state that bitsandbytes brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zeroshard
from forked import run_ranks

bitsandbytes = pytest.importorskip("bitsandbytes")
lightning_utilities = pytest.importorskip("lightning.pytorch.utilities.deepspeed")

WIDTH = 96  # matrices above bitsandbytes' 4096 elements, slices too


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH, bias=False))


def make(stage: int, model: nn.Module | None = None, kind: Any = None) -> zeroshard.Engine:
    model = build() if model is None else model
    kind = kind or torch.optim.AdamW
    trained = [param for param in model.parameters() if param.requires_grad]
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}}
    optimizer = kind(trained, lr=1e-2)
    return zeroshard.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(engine: zeroshard.Engine, steps: range) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(100 * step + engine.global_rank)
        x = torch.randn(4, WIDTH, generator=generator)
        loss = F.mse_loss(engine(x), x.flip(1))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_lightning_converts_a_folder_and_keeps_its_own_state(stage: int, tmp_path: Path) -> None:
    own = {"epoch": 2, "loops": {"fit": {1: (2, 3)}}, "callbacks": {}}

    def work(rank: int, world: int) -> dict[str, Tensor]:
        engine = make(stage)
        train(engine, range(2))
        engine.save_checkpoint(tmp_path, client_state=own, tag="checkpoint")
        with zeroshard.gathered(engine.module):
            return {name: value.clone() for name, value in engine.module.state_dict().items()}

    want = run_ranks(work, 2)[0]
    output = tmp_path / "plain.ckpt"
    lightning_utilities.convert_zero_checkpoint_to_fp32_state_dict(tmp_path, output)
    got = torch.load(output)
    assert got.items() >= own.items()
    assert got["state_dict"].keys() == want.keys()
    assert all(torch.equal(got["state_dict"][name], want[name]) for name in want)


def test_quantised_optimizer_state_goes_on_exactly_and_is_never_cut_anew(tmp_path: Path) -> None:
    kind = bitsandbytes.optim.AdamW8bit

    def work(rank: int, world: int) -> None:
        engine = make(3, kind=kind)
        train(engine, range(3))
        dtypes = {
            value.dtype
            for state in engine.basic_optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        }
        assert torch.uint8 in dtypes
        engine.save_checkpoint(tmp_path)
        want = train(engine, range(3, 6))
        engine.destroy()
        resumed = make(3, kind=kind)
        resumed.load_checkpoint(tmp_path)
        assert train(resumed, range(3, 6)) == want

    def work_alone(rank: int, world: int) -> None:
        engine = make(3, kind=kind)
        with pytest.raises(zeroshard.CheckpointError, match=r"absmax1.* cannot be cut anew"):
            engine.load_checkpoint(tmp_path)
        engine.load_checkpoint(tmp_path, load_optimizer_states=False)
        assert engine.global_steps == 3

    run_ranks(work, 2)
    run_ranks(work_alone, 1)


class Adapted(nn.Module):
    """A quantised layer that stays as it is, and a small one beside it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        weight = nn.Linear(WIDTH, WIDTH)
        self.base = bitsandbytes.nn.Linear4bit(
            WIDTH, WIDTH, compute_dtype=torch.float32, quant_storage=torch.uint8
        )
        self.base.load_state_dict(weight.state_dict())
        self.base.to("cpu")
        self.base.requires_grad_(False)
        self.adapter = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.adapter(x)


@pytest.mark.parametrize("stage", (2, 3))
def test_a_quantised_base_keeps_its_bytes(stage: int, tmp_path: Path) -> None:
    def work(rank: int, world: int) -> dict[str, Tensor]:
        engine = make(stage, Adapted(0))
        train(engine, range(2))
        engine.save_checkpoint(tmp_path / "whole")
        engine.save_checkpoint(tmp_path / "part", exclude_frozen_parameters=True)
        with zeroshard.gathered(engine.module):
            state = {name: value.clone() for name, value in engine.module.state_dict().items()}
        want = train(engine, range(2, 5))
        engine.destroy()
        for which in ("whole", "part"):
            resumed = make(stage, Adapted(0))
            resumed.load_checkpoint(tmp_path / which, load_module_strict=which == "whole")
            assert train(resumed, range(2, 5)) == want
            resumed.destroy()
        other = make(stage, Adapted(5))
        with pytest.raises(zeroshard.CheckpointError, match=r"statistics.*base.weight.absmax"):
            other.load_checkpoint(tmp_path / "whole")
        return state

    want = run_ranks(work, 2)[0]
    got = zeroshard.checkpoint.get_fp32_state_dict_from_zero_checkpoint(tmp_path / "whole")
    assert got.keys() == want.keys()
    assert {"base.weight.absmax", "base.weight"} <= got.keys()
    assert got["base.weight"].dtype == torch.uint8
    assert all(torch.equal(got[name], want[name]) for name in want)
