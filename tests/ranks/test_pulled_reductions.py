"""Reductions that read gradients in other ranks' memory: fp32 sums of what collectives reduce."""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import zeroshard
from forked import run_ranks
from reference import SEED, TOLERANCE, Setting, compare, config_of, engine_run, relative_difference
from reference import train as train_case
from zeroshard.core.layout import Layout
from zeroshard.core.mesh import build_mesh
from zeroshard.core.pulled import map_slab
from zeroshard.core.reductions import PulledReduction, Ring, reduce_by_pulls
from zeroshard.engine import build
from zoo import ZOO, Case


def make_engine(case: Case, setting: Setting, how: str = "copy_engine", direct: bool = False) -> Any:
    config = config_of(case, setting)
    config["zeroshard"]["reduce"] = how
    model = case.build(SEED, setting.checkpointing)
    with mock.patch.object(build, "reduce_by_pulls", partial(reduce_by_pulls, direct=direct)):
        return zeroshard.initialize(model=model, config=config)[0]


def is_pulled(engine: Any) -> bool:
    return all(unit.reducer.in_turn for unit in engine.runtime.trained)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one | other)


CASES: dict[str, dict[str, Any]] = {
    "plain": {"accumulation": 2, "clip": 0.1},
    "tied_head_with_own_units": {"accumulation": 2},
    "low_rank_adapters": {},
    "zero_sized_parameters": {},
    "gradient_penalty": {},
    "depth_varies_by_rank": {"accumulation": 2, "clip": 0.3},
    "mixture_of_experts": {},
}


def test_training_in_fp32_is_that_of_plain_pytorch() -> None:
    for name, options in CASES.items():
        settings = [Setting(stage, 3, **options) for stage in (2, 3)]
        for compared in compare(ZOO[name], settings, make_engine=make_engine):
            assert compared.differences == [], name


def test_bits_repeat_and_do_not_depend_on_the_stage_or_on_how_rows_are_read() -> None:
    case = ZOO["plain"]
    kinds = {
        "fp32": {},
        "bf16": {"communication_data_type": "bf16"},
        "fp16": {"communication_data_type": "fp16"},
    }

    def work(rank: int, world: int) -> dict[str, bool]:
        found: dict[str, bool] = {}
        for precision, extra in kinds.items():
            first, *others = (
                engine_run(
                    case,
                    Setting(stage, world, 2, precision=precision, steps=2, extra=extra),  # type: ignore[arg-type]
                    rank,
                    make_engine=partial(make_engine, direct=direct),
                )
                for stage, direct in ((3, False), (3, False), (3, True), (2, False))
            )
            found[precision] = all(
                same(first.weights, other.weights) and first.norms == other.norms
                for other in others
            )
        return found

    for found in run_ranks(work, 3):
        assert found == dict.fromkeys(kinds, True)
