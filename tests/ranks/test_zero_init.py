"""Models built under ``zero.Init``: they train like any other, and no rank ever holds one whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zeroshard
from forked import run_ranks
from reference import SEED, Setting, compare, config_of, make_optimizer
from zeroshard.core.slots import full_nbytes, full_shape, is_waiting
from zoo import ZOO, Case

MIB = 2**20


def make_engine_under_init(case: Case, setting: Setting) -> Any:
    config = config_of(case, setting)
    # Master weights of the reference are those of an fp32 model.
    dtype = None if setting.precision == "fp32" else torch.float32
    with zeroshard.zero.Init(config_dict_or_path=config, dtype=dtype):
        model = case.build(SEED, setting.checkpointing)
    if setting.world > 1:  # else there is nothing to shard
        assert all(is_waiting(param) for param in model.parameters())
    optimizer = None
    if setting.optimizer_from == "caller":
        trainable = [param for param in model.parameters() if param.requires_grad]
        optimizer = make_optimizer(setting.optimizer, trainable)
    return zeroshard.initialize(model=model, optimizer=optimizer, config=config)[0]


@pytest.mark.parametrize("case", list(ZOO.values())[::2], ids=lambda case: case.name)
def test_awkward_models_built_in_shards_train_as_in_plain_pytorch(case: Case) -> None:
    settings = [Setting(3, 2, steps=1)]
    found = [c.differences for c in compare(case, settings, make_engine=make_engine_under_init)]
    assert found == [[]]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("name", ["plain", "frozen_weight_in_each_block"])
def test_the_stage_is_chosen_after_the_model_is_built(name: str, world: int) -> None:
    settings = [
        Setting(stage, world, accumulation=2, steps=2, optimizer_from=source)
        for stage in (0, 1, 2, 3)
        for source in ("config", "caller")
    ]
    comparisons = compare(ZOO[name], settings, make_engine=make_engine_under_init)
    assert [text for each in comparisons for text in each.differences] == []


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_fp32_shards_become_master_weights_without_rounding(precision: Any) -> None:
    settings = [Setting(stage, 2, precision=precision, steps=1) for stage in (1, 3)]
    plain = compare(ZOO["plain"], settings, keep_records=True)
    built = compare(ZOO["plain"], settings, keep_records=True, make_engine=make_engine_under_init)
    for without, under in zip(plain, built, strict=True):
        assert without.record is not None
        assert under.record is not None
        assert under.record.losses == without.record.losses
        assert under.record.norms == without.record.norms
        for name, weight in without.record.weights.items():
            assert torch.equal(under.record.weights[name], weight)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_initialize_finds_the_very_bits_of_rank_0(stage: int) -> None:
    case = ZOO["plain"]
    config = config_of(case, Setting(stage, 3))

    def work(rank: int, world: int) -> bool:
        wanted = dict(case.build(SEED).named_parameters())
        with zeroshard.zero.Init(config_dict_or_path=config):
            model = case.build(SEED + rank)
        params = dict(model.named_parameters())
        engine = zeroshard.initialize(model=model, config=config)[0]
        assert all(params[name] is param for name, param in engine.module.named_parameters())
        with zeroshard.gathered(model):
            return all(torch.equal(param, wanted[name]) for name, param in params.items())

    assert run_ranks(work, 3) == [True] * 3


def test_parameters_built_outside_mix_with_those_built_inside() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with zeroshard.zero.Init():
                self.inside = nn.Linear(6, 5)
                self.other = nn.Linear(5, 5, bias=False)
            self.outside = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.outside(self.other(self.inside(x)).relu())

    def work(rank: int, world: int) -> list[Tensor]:
        torch.manual_seed(0)
        inside, other, outside = nn.Linear(6, 5), nn.Linear(5, 5, bias=False), nn.Linear(5, 3)
        plain = nn.Sequential(inside, other, nn.ReLU(), outside)
        torch.manual_seed(rank)
        model = Mixed()
        model.inside.bias.requires_grad_(False)
        inside.bias.requires_grad_(False)
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": 3},
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        }
        engine = zeroshard.initialize(model=model, config=config)[0]
        x = torch.linspace(-1, 1, 24).view(4, 6)
        for _ in range(2):
            engine.backward(engine(x).square().mean())
            engine.step()
            loss = plain(x).square().mean()
            loss.backward()
            with torch.no_grad():
                for param in plain.parameters():
                    if param.grad is not None:
                        param -= 0.1 * param.grad
                        param.grad = None
        with zeroshard.gathered(model):
            return [
                (ours - theirs).abs().max()
                for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True)
            ]

    for differences in run_ranks(work, 2):
        assert all(difference < 1e-6 for difference in differences)


# Memory -------------------------------------------------------------------------------------------


def status(key: str) -> int:
    """Bytes of an entry of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


@dataclass
class Growth:
    """How far the resident memory of a block rose above its beginning, and where it ended."""

    peak: int = 0
    left: int = 0


@contextlib.contextmanager
def growth() -> Iterator[Growth]:
    found = Growth()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    before = status("VmRSS")
    yield found
    found.peak, found.left = status("VmHWM") - before, status("VmRSS") - before


def quickly(module: nn.Linear | nn.Embedding) -> None:
    with torch.no_grad():
        module.weight.fill_(0.01)  # touches all of the memory; random numbers would be slow


class Linear(nn.Linear):
    reset_parameters = quickly


class Embedding(nn.Embedding):
    reset_parameters = quickly


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.queries = Linear(width, 3 * width, bias=False)
        self.out = Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.up = Linear(width, 4 * width, bias=False)
        self.down = Linear(4 * width, width, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.out(self.queries(self.attention_norm(h))[..., : h.shape[-1]])
        return h + self.down(self.up(self.norm(h)).relu())


class Transformer(nn.Module):
    def __init__(self, width: int, depth: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


def test_a_model_of_1_5_billion_parameters_peaks_at_shards_and_its_largest_module() -> None:
    def work(rank: int, world: int) -> tuple[int, Growth]:
        with growth() as found, zeroshard.zero.Init(dtype=torch.bfloat16):
            model = Transformer(1600, 48, 50257)
        numel = sum(full_shape(param).numel() for param in model.parameters())
        return numel, found

    world = 4
    largest_module = 1600 * 50257 * 4  # fp32, as it is built
    for numel, found in run_ranks(work, world, timeout=110):
        assert numel > 1.5e9
        shards = numel * 2 // world
        assert found.peak <= shards + largest_module + 200 * MIB
        assert found.left <= shards + 100 * MIB


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_initialize_peaks_at_shards_masters_and_one_unit(precision: str) -> None:
    world = 4
    half = precision == "bf16"
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": half},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    }

    def work(rank: int, world: int) -> tuple[int, int, Growth, Growth]:
        with growth() as building, zeroshard.zero.Init(config_dict_or_path=config):
            model = Transformer(1024, 16, 8192)
        nbytes = sum(full_nbytes(param) for param in model.parameters())
        with growth() as initializing:
            engine = zeroshard.initialize(model=model, config=config)[0]
        largest = max(unit.nbytes_full for unit in engine.runtime.units)
        return nbytes, largest, building, initializing

    for nbytes, largest, building, initializing in run_ranks(work, world):
        shards = nbytes // world
        masters = 2 * shards if half else 0
        # Shards that are waiting are given back as those of the engine are made.
        assert building.left + initializing.peak <= shards + masters + largest + 200 * MIB
        assert building.left + initializing.left <= shards + masters + 120 * MIB
