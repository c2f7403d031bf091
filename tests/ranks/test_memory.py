"""How much a rank holds: the formulas of ZeRO, ceilings inside a step, and nothing that grows."""

from __future__ import annotations

import gc
import re
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from forked import run_ranks
from reference import Setting, make_engine, train
from zeroshard.core.lifetime import state_bytes
from zoo import EVERY_CHECKPOINTING, ZOO, Awkward, Block, Case, Checkpointing

WIDTH = 64
NUM_BLOCKS = 6
VOCABULARY = 31


class Wide(Awkward):
    """Large enough that padding is less than the tolerance, small enough for milliseconds."""

    num_blocks = NUM_BLOCKS

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH, 2 * WIDTH) for _ in range(NUM_BLOCKS))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        for block in self.blocks:
            h = self.run(block, h)
        return self.head(h)


class Segmented(Wide):
    """Checkpoints several blocks at a time."""

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        for start in range(0, NUM_BLOCKS, 3):
            h = self.run(nn.Sequential(*self.blocks[start : start + 3]), h)
        return self.head(h)


def build(model: type[Wide], seed: int, checkpointing: Checkpointing = "none") -> Wide:
    torch.manual_seed(seed)
    built = model()
    built.checkpointing = checkpointing
    return built


WIDE = replace(ZOO["plain"], name="wide", build=partial(build, Wide), num_blocks=NUM_BLOCKS)
SEGMENTED = replace(WIDE, name="segmented", build=partial(build, Segmented))


@dataclass(frozen=True)
class Held:
    """Bytes between steps: what the engine says, and what the process has."""

    parameters: int
    gradients: int
    optimizer: int
    numel: int
    largest_unit: int
    live: int


def live_storages() -> dict[int, int]:
    """Bytes of every tensor memory that Python can reach, by address."""
    storages = [tensor.untyped_storage() for tensor in live_tensors()]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def live_tensors() -> list[Tensor]:
    gc.collect()
    # isinstance() would ask every object for its class, and some warn about being asked.
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(
    ("precision", "bytes_per_element"),
    [("fp32", (4, 4, 8)), ("bf16", (2, 4, 12)), ("fp16", (2, 4, 12))],
)
def test_a_rank_holds_what_the_zero_formulas_say(
    stage: int,
    world: int,
    precision: Literal["fp32", "bf16", "fp16"],
    bytes_per_element: tuple[int, int, int],
) -> None:
    def work(rank: int, world: int) -> Held:
        before = sum(live_storages().values())
        setting = Setting(stage, world, accumulation=2, precision=precision)
        model = build(Wide, 0)
        numel = sum(param.numel() for param in model.parameters())
        del model
        engine = make_engine(WIDE, setting)
        train(engine, WIDE, setting, rank, steps=range(2))
        report = engine.memory()
        return Held(
            report.parameters_bytes,
            report.gradients_bytes,
            report.optimizer_bytes,
            numel,
            max(unit.nbytes_full for unit in engine.runtime.units),
            sum(live_storages().values()) - before,
        )

    for held in run_ranks(work, world):
        formula = state_bytes(stage, held.numel, world, *bytes_per_element)
        for ours, theirs in (
            (held.parameters, formula.parameters),
            (held.gradients, formula.gradients),
            (held.optimizer, formula.optimizer),
        ):
            assert theirs * 0.999 <= ours <= theirs * 1.03 + 2 * held.largest_unit
        # Between steps there are no gradients; the accounts and the process must agree on the rest.
        assert held.live <= 1.03 * (formula.parameters + formula.optimizer) + held.largest_unit
        assert held.live >= 0.99 * (held.parameters + held.optimizer)


class Peak:
    """The largest number of full units, sampled at every boundary of a block and every gradient."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.units: set[str] = set()
        self.blocks: set[str] = set()

    def sample(self, *_: object) -> None:
        full = {unit.name for unit in self.engine.runtime.units if unit.is_full}
        self.units = max(self.units, full, key=len)
        self.blocks = max(self.blocks, {owner(name) for name in full}, key=len)

    def watch(self) -> None:
        for module in self.engine.module.modules():
            if isinstance(module, nn.ModuleList):
                continue
            module.register_forward_pre_hook(self.sample)
            module.register_forward_hook(self._watch_output)
        for param in self.engine.module.parameters():
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(self.sample)

    def _watch_output(self, module: nn.Module, args: Any, output: Any) -> None:
        self.sample()
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(self.sample)


def owner(name: str) -> str:
    """The block that a parameter belongs to, or else the parameter's own module."""
    block = re.match(r"blocks\.\d+", name)
    return block.group() if block else name.rpartition(".")[0]


def peak_of(case: Case, setting: Setting, world: int) -> Peak:
    def work(rank: int, world: int) -> tuple[set[str], set[str]]:
        engine = make_engine(case, setting)
        train(engine, case, setting, rank, steps=range(2))
        peak = Peak(engine)
        peak.watch()
        # The first watched step runs in an order that the schedule knows already.
        train(engine, case, setting, rank, steps=range(2, 4))
        assert not any(unit.is_full for unit in engine.runtime.units), "a unit outlived its step"
        return peak.units, peak.blocks

    peak = Peak(None)
    for units, blocks in run_ranks(work, world):
        peak.units = max(peak.units, units, key=len)
        peak.blocks = max(peak.blocks, blocks, key=len)
    return peak


@pytest.mark.parametrize("checkpointing", EVERY_CHECKPOINTING)
@pytest.mark.parametrize("units", ["named", "chosen"])
def test_at_most_three_units_are_full_at_once(
    checkpointing: Checkpointing, units: Literal["named", "chosen"]
) -> None:
    """The root's own, the block in use, and the one gathered ahead."""
    setting = Setting(checkpointing=checkpointing, units=units, accumulation=2)
    assert 1 <= len(peak_of(WIDE, setting, world=2).units) <= 3


@pytest.mark.parametrize(
    ("checkpointing", "limit"), [("none", 3), ("reentrant", 3), ("non_reentrant", 4)]
)
@pytest.mark.parametrize("units", ["named", "chosen"])
def test_recomputing_several_blocks_at_once_frees_each_after_its_use(
    checkpointing: Checkpointing, limit: int, units: Literal["named", "chosen"]
) -> None:
    """Non-reentrant recomputation starts inside the backward of the last of the blocks."""
    setting = Setting(checkpointing=checkpointing, units=units, accumulation=2)
    assert 1 <= len(peak_of(SEGMENTED, setting, world=2).units) <= limit


@pytest.mark.parametrize(
    "name",
    [
        "block_called_twice",
        "block_called_twice_apart",
        "frozen_block_between",
        "frozen_front",
        "frozen_weight_in_each_block",
        "low_rank_adapters",
        "never_used",
        "one_of_two_outputs_used",
        "used_in_some_steps",
        "dict_outputs",
        "keyword_inputs",
    ],
)
def test_odd_use_of_parameters_does_not_keep_the_model_full(name: str) -> None:
    """One frozen or unused parameter must not hold its block, nor a second call the others.

    The count is of modules, since a block with frozen parameters is two units: the block in use,
    the one gathered ahead and the root's own. Each of the models has five such modules.
    """
    case = ZOO[name]
    for checkpointing in case.checkpointing:
        peak = peak_of(case, Setting(checkpointing=checkpointing), world=2)
        assert len(peak.blocks) <= 3, f"{sorted(peak.blocks)} [{checkpointing}]"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["block_called_twice", "depth_varies_by_rank", "two_backwards"])
def test_nothing_grows_from_step_to_step(name: str, stage: int) -> None:
    case = ZOO[name]
    setting = Setting(stage, accumulation=2)

    def work(rank: int, world: int) -> tuple[list[int], list[int]]:
        engine = make_engine(case, setting)
        counts, sizes = [], []
        # Each block of four steps does the same, since the cases' patterns have period four.
        for start in (0, 4, 8, 12, 16, 44):
            train(engine, case, setting, rank, steps=range(start, start + 4))
            counts.append(len(live_tensors()))
            sizes.append(sum(live_storages().values()))
        return counts, sizes

    for counts, sizes in run_ranks(work, world=2):
        # gloo's threads may still hold what the last collective worked on; a leak of one tensor
        # per step would add 28 to these counts.
        assert max(counts[1:]) - min(counts[1:]) <= 2
        assert max(sizes[1:]) - min(sizes[1:]) <= 4096


def test_a_destroyed_engine_gives_its_memory_back() -> None:
    def work(rank: int, world: int) -> tuple[int, int]:
        setting = Setting(3)
        before = sum(live_storages().values())
        engine = make_engine(WIDE, setting)
        train(engine, WIDE, setting, rank, steps=range(2))
        engine.destroy()
        del engine
        return before, sum(live_storages().values())

    for before, after in run_ranks(work, world=2):
        assert after <= before + 1024
