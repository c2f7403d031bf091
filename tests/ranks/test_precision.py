"""bf16 and fp16: fp32 master weights are trained, and a rounded copy computes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from forked import run_ranks
from reference import (
    SEED,
    TIGHT_CLIP,
    Setting,
    compare,
    config_of,
    differences,
    full_weights,
    make_engine,
    train,
)
from zoo import ZOO, Case, Checkpointing

STAGES = (0, 1, 2, 3)
Half = Literal["bf16", "fp16"]
halves = pytest.mark.parametrize("precision", ["bf16", "fp16"])
every_stage = pytest.mark.parametrize("stage", STAGES)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def rounded(case: Case) -> Case:
    """The case with weights that bf16 and fp16 hold exactly.

    Then it does not matter whether master weights are taken before the first rounding or after.
    """

    def build(seed: int, checkpointing: Checkpointing = "none") -> nn.Module:
        model = case.build(seed, checkpointing)
        with torch.no_grad():
            for param in model.parameters():
                param.copy_((param * 64).round() / 64)
        return model

    return replace(case, build=build)


@halves
@every_stage
@pytest.mark.parametrize(
    "name", ["plain", "tied_head", "frozen_weight_in_each_block", "mixture_of_experts"]
)
def test_half_precision_trains_as_master_weights_in_plain_pytorch_do(
    name: str, stage: int, precision: Half
) -> None:
    """Both sides round at the same places, so they are equal but for a rounding gone the other way.

    World, accumulation and loss scale are powers of two, which multiply without rounding. Sums in
    another order may still tip a rounding, which costs a tensor a fraction of a unit in the last
    place, where the steps move it by several.
    """
    case = rounded(ZOO[name])
    settings = [
        Setting(
            stage,
            world=2,
            accumulation=accumulation,
            clip=clip,
            checkpointing=checkpointing,
            precision=precision,
            optimizer=optimizer,
        )
        for checkpointing, accumulation, clip, optimizer in (
            ("none", 1, 0.0, "adamw"),
            ("non_reentrant", 2, TIGHT_CLIP, "adamw"),
            ("reentrant", 4, 0.0, "sgd"),
        )
    ]
    ulp = torch.finfo(DTYPES[precision]).eps
    for comparison in compare(case, settings, tolerance=0.2 * ulp, keep_records=True):
        assert comparison.differences == []
        start = case.build(SEED)
        moved = [
            (comparison.record.weights[name].float() - param).norm() / param.norm()
            for name, param in start.named_parameters()
            if param.requires_grad
        ]
        assert min(moved) > 1.5 * ulp


@halves
def test_stages_agree_to_the_last_bit_in_half_precision(precision: Half) -> None:
    case = rounded(ZOO["plain"])
    settings = [Setting(stage, clip=TIGHT_CLIP, precision=precision) for stage in (1, 2, 3)]
    first, *others = compare(case, settings, tolerance=1, keep_records=True)
    for other in others:
        assert differences(other.record, first.record, tolerance=0) == []


@halves
@every_stage
def test_steps_too_small_for_the_compute_dtype_add_up_in_the_master_weights(
    precision: Half, stage: int
) -> None:
    """A hundred steps, each a tenth of the spacing of numbers around one, move a weight by ten."""
    ulp = torch.finfo(DTYPES[precision]).eps
    case, setting = ZOO["single_parameter"], Setting(stage, precision=precision)

    def work(rank: int, world: int) -> tuple[float, float]:
        import zeroshard

        model = case.build(SEED)
        with torch.no_grad():
            model.weight.fill_(1.0)
        config = config_of(case, replace(setting, optimizer_from="caller"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * ulp)
        engine = zeroshard.initialize(model=model, optimizer=optimizer, config=config)[0]
        ones = torch.ones(1, dtype=DTYPES[precision])
        seen = []
        for _ in range(100):
            engine.backward(engine(-ones).sum())  # the gradient is -1
            engine.step()
            seen.append(full_weights(engine)["weight"].item())
        return seen[0], seen[-1]

    for first, last in run_ranks(work, world=2):
        assert first == 1.0
        assert last == pytest.approx(1 + 10 * ulp, abs=ulp)


@every_stage
@pytest.mark.parametrize("lucky", [0, 1])
def test_an_overflow_on_one_rank_skips_the_step_on_all(lucky: int, stage: int) -> None:
    case = ZOO["plain"]
    extra = {"fp16": {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}}
    setting = Setting(stage, precision="fp16", extra=extra)

    def work(rank: int, world: int) -> list[dict[str, Tensor]]:
        engine = make_engine(case, setting)
        weights = [full_weights(engine)]
        for step in range(3):
            loss = case.loss(engine, case.batch(step, 0, rank))
            engine.backward(loss * torch.inf if step == 1 and rank != lucky else loss)
            engine.step()
            assert engine.was_step_applied() == (step != 1)
            weights.append(full_weights(engine))
        assert engine.loss_scale == 128
        assert (engine.global_steps, engine.skipped_steps) == (3, 1)
        return weights

    for weights in run_ranks(work, world=2):
        same = [
            all(torch.equal(before[name], after[name]) for name in before)
            for before, after in itertools.pairwise(weights)
        ]
        assert same == [False, True, False]


@halves
@every_stage
def test_outputs_and_weights_have_the_compute_dtype(precision: Half, stage: int) -> None:
    case, setting = ZOO["plain"], Setting(stage, precision=precision)

    def work(rank: int, world: int) -> None:
        engine = make_engine(case, setting)
        train(engine, case, setting, rank)
        assert engine(*case.batch(0, 0, rank)).dtype == DTYPES[precision]
        for weight in full_weights(engine).values():
            assert weight.dtype == DTYPES[precision]

    run_ranks(work, world=2)
