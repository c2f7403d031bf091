"""Activation checkpointing inside engines, and inputs in parts over model-parallel ranks."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import zeroshard
from forked import run_ranks
from unit.checkpointing.blocks import assert_same, held_on_host
from unit.engine.small import config_of
from zeroshard import checkpointing
from zeroshard.checkpointing import checkpoint
from zeroshard.checkpointing.inputs import _Part

STAGES = (0, 1, 2, 3)
NUM_BLOCKS, WIDTH, BATCH, VOCABULARY = 5, 7, 3, 11

WAYS = ["each block", "two blocks", "all blocks", "nested", "keywords"]
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "host": {"checkpoint_in_cpu": True},
    "host, one buffer": {
        "checkpoint_in_cpu": True,
        "contiguous_checkpointing": True,
        "num_checkpoints": NUM_BLOCKS,
    },
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, h: Tensor, *, scale: float = 1.0, extra: Any = None) -> Tensor:
        y = F.dropout(F.gelu(self.up(self.norm(h))), 0.2)
        y = F.dropout(self.down(y), 0.1) * scale
        return h + y if extra is None else h + y * extra["mask"][0]


class Net(nn.Module):
    """Blocks that are checkpointed in one of several ways, or not at all."""

    def __init__(self, way: str | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_BLOCKS))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def several(self, first: int, last: int, h: Tensor, *, nested: bool = False) -> Tensor:
        for block in self.blocks[first:last]:
            h = checkpoint(block, h) if nested else block(h)
        return h

    def forward(self, ids: Tensor) -> Tensor:
        h = F.dropout(self.embedding(ids), 0.1)
        extra = {"mask": (torch.ones(WIDTH), None)}
        match self.way:
            case None:
                h = self.several(0, NUM_BLOCKS, h)
            case "each block":
                h = self.several(0, NUM_BLOCKS, h, nested=True)
            case "two blocks":
                for first in range(0, NUM_BLOCKS, 2):
                    h = checkpoint(self.several, first, first + 2, h)
            case "all blocks":
                h = checkpoint(self.several, 0, NUM_BLOCKS, h)
            case "nested":
                h = checkpoint(self.several, 0, NUM_BLOCKS, h, nested=True)
            case _:
                for block in self.blocks:
                    h = checkpoint(block, h=h, scale=1.0, extra=extra)
        return self.head(h)


def train(way: str | None, stage: int, *, seed: int, most_full: list[int] | None = None) -> Any:
    """Three steps of two micro-steps with dropout; all weights, and the next random number."""
    engine = zeroshard.initialize(
        model=Net(way),
        config=config_of(
            stage,
            gradient_accumulation_steps=2,
            gradient_clipping=1.0,
            optimizer={"type": "AdamW", "params": {"lr": 1e-2}},
            zeroshard={"units": ["Block"]},
        ),
    )[0]
    if most_full is not None:
        for param in engine.module.parameters():
            param.register_hook(
                lambda _: most_full.append(sum(unit.is_full for unit in engine.runtime.units))
            )
    torch.manual_seed(seed)
    for _ in range(3):
        for _ in range(2):
            ids = torch.randint(VOCABULARY, (BATCH,))
            engine.backward(F.cross_entropy(engine(ids), ids))
            engine.step()
    with zeroshard.gathered(engine.module):
        weights = [param.detach().clone() for param in engine.module.parameters()]
    engine.destroy()
    return [*weights, torch.rand(1)]


@pytest.mark.parametrize(
    ("mode", "stage"),
    [*((mode, stage) for mode in ("plain", "host") for stage in STAGES), ("host, one buffer", 3)],
)
def test_engines_train_to_the_bits_they_have_without_checkpointing(mode: str, stage: int) -> None:
    def work(rank: int, world: int) -> None:
        want = train(None, stage, seed=rank)
        checkpointing.configure(**MODES[mode])
        for way in WAYS:
            assert_same(train(way, stage, seed=rank), want)
            assert not held_on_host()

    run_ranks(work, world=2)


@pytest.mark.parametrize("mode", MODES)
def test_blocks_are_freed_while_others_run_again(mode: str) -> None:
    """At most the root's unit, the block in use and the one gathered ahead are full."""

    def work(rank: int, world: int) -> int:
        checkpointing.configure(**MODES[mode])
        counts: list[int] = []
        train("each block", 3, seed=rank, most_full=counts)
        return max(counts)

    assert all(1 <= most <= 3 for most in run_ranks(work, world=2))


# Inputs in parts


def world_as_model_parallel_group() -> object:
    return SimpleNamespace(
        get_model_parallel_world_size=dist.get_world_size,
        get_model_parallel_rank=dist.get_rank,
        get_model_parallel_group=lambda: dist.group.WORLD,
    )


PARTITIONS: Mapping[str, dict[str, Any]] = {
    "parts": {},
    "parts in one buffer": {"contiguous_checkpointing": True, "num_checkpoints": NUM_BLOCKS},
    "parts on the host": {"checkpoint_in_cpu": True},
    "parts in one buffer on the host": {
        "checkpoint_in_cpu": True,
        "contiguous_checkpointing": True,
        "num_checkpoints": NUM_BLOCKS,
    },
}


@pytest.mark.parametrize(
    ("mode", "stage", "world"),  # no number of ranks divides 3 x 7 elements
    [*((mode, stage, 2) for mode in PARTITIONS for stage in (0, 3)), ("parts", 0, 4)],
)
def test_gradients_from_parts_of_inputs_are_those_from_whole_ones(
    mode: str, stage: int, world: int
) -> None:
    """Model-parallel ranks see the same data and draw the same numbers."""

    def work(rank: int, world: int) -> None:
        want = train(None, stage, seed=5)
        checkpointing.configure(
            world_as_model_parallel_group(), partition_activations=True, **PARTITIONS[mode]
        )
        for way in ("each block", "two blocks", "keywords"):
            assert_same(train(way, stage, seed=5), want)

    run_ranks(work, world)


def parts_held() -> list[Tensor]:
    """The parts that graphs hold on the device now."""
    gc.collect()
    parts = [thing for thing in gc.get_objects() if type(thing) is _Part]
    return [part._kept.take() for part in parts]


@pytest.mark.parametrize("mode", ["parts", "parts in one buffer"])
@pytest.mark.parametrize("world", [2, 4])
def test_each_rank_keeps_its_part_only(mode: str, world: int) -> None:
    def work(rank: int, world: int) -> tuple[list[int], int]:
        checkpointing.configure(
            world_as_model_parallel_group(), partition_activations=True, **PARTITIONS[mode]
        )
        net = Net("each block")
        loss = net(torch.arange(BATCH)).sum()
        parts = parts_held()
        storages = {part.untyped_storage().data_ptr() for part in parts}
        loss.backward()
        return [part.numel() for part in parts], len(storages)

    for sizes, num_storages in run_ranks(work, world):
        assert sizes == [-(-BATCH * WIDTH // world)] * NUM_BLOCKS
        assert num_storages == (1 if "buffer" in mode else NUM_BLOCKS)


def test_an_input_with_fewer_elements_than_ranks_is_kept_whole() -> None:
    def work(rank: int, world: int) -> float:
        checkpointing.configure(world_as_model_parallel_group(), partition_activations=True)
        x = torch.full((), 3.0, requires_grad=True)
        loss = checkpoint(lambda h: h**2, x * 1)
        assert parts_held() == []
        grad = torch.autograd.grad(loss, x)[0].item()
        h = x * 1
        loss = checkpoint(lambda h: h**2, h)
        with torch.no_grad():
            h.add_(1)
        with pytest.raises(zeroshard.UsageError, match="edited in place"):
            loss.backward()
        return grad

    assert run_ranks(work, world=2) == [6.0, 6.0]
