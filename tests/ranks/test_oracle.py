"""The test tools themselves: ranks are forked cleanly, and the oracle tells right from wrong."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from forked import RankError, run_ranks
from reference import (
    SEED,
    TIGHT_CLIP,
    Setting,
    compare,
    make_optimizer,
    pairwise,
    reference_run,
    relative_difference,
)
from zoo import ZOO, Case


class Replicas:
    """The least engine there can be: full copies, one all-reduce per parameter and step."""

    def __init__(self, case: Case, setting: Setting) -> None:
        self.module = case.build(SEED, setting.checkpointing)
        self.setting = setting
        self.trainable = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(setting.optimizer, self.trainable)
        self.micro_steps = 0
        self.norm = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        (loss / self.setting.accumulation).backward(retain_graph=retain_graph)

    def step(self) -> None:
        self.micro_steps += 1
        if self.micro_steps % self.setting.accumulation:
            return
        for param in self.trainable:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            self.average(param.grad)
        clip = self.setting.clip or torch.inf
        self.norm = nn.utils.clip_grad_norm_(self.trainable, clip).item()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def average(self, gradient: Tensor) -> None:
        dist.all_reduce(gradient)
        gradient /= self.setting.world

    def get_global_grad_norm(self) -> float:
        return self.norm

    def destroy(self) -> None:
        """Nothing to release."""


class ForgetsTheWorld(Replicas):
    """Adds where it should average."""

    def average(self, gradient: Tensor) -> None:
        dist.all_reduce(gradient)


class ForgetsTheOthers(Replicas):
    """Never communicates."""

    def average(self, gradient: Tensor) -> None:
        pass


class ForgetsAccumulation(Replicas):
    """Adds micro-steps up where it should average."""

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        loss.backward(retain_graph=retain_graph)


class ForgetsTheClip(Replicas):
    """Reports the norm and does not clip."""

    def step(self) -> None:
        clip, self.setting.__dict__["clip"] = self.setting.clip, 0.0
        super().step()
        self.setting.__dict__["clip"] = clip


class DecaysFrozenWeights(Replicas):
    """Treats frozen parameters as if they had gradients of zeros."""

    def step(self) -> None:
        super().step()
        with torch.no_grad():
            for param in self.module.parameters():
                if not param.requires_grad:
                    param.mul_(1 - 1e-3)


class SkipsUnusedParameters(Replicas):
    """Leaves parameters without gradient alone."""

    def average(self, gradient: Tensor) -> None:
        super().average(gradient)
        if not gradient.any():
            gradient.fill_(torch.nan)

    def step(self) -> None:
        before = [p.detach().clone() for p in self.trainable]
        super().step()
        with torch.no_grad():
            for param, old in zip(self.trainable, before, strict=True):
                param.copy_(torch.where(param.isnan(), old, param))


def weights_of(engine: Replicas) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def failures_of(engine: type[Replicas], case: Case, setting: Setting) -> list[str]:
    (comparison,) = compare(case, [setting], make_engine=engine, weights_of=weights_of)
    return comparison.differences


@pytest.mark.parametrize("case", list(ZOO.values())[::3], ids=lambda case: case.name)
def test_averaging_replicas_pass_the_oracle_on_a_third_of_the_zoo(case: Case) -> None:
    settings = [
        Setting(world=3, accumulation=2, clip=TIGHT_CLIP, checkpointing=mode, steps=2)
        for mode in case.checkpointing
    ]
    for comparison in compare(case, settings, make_engine=Replicas, weights_of=weights_of):
        assert comparison.differences == []


@pytest.mark.parametrize(
    ("wrong", "name", "clip"),
    [
        (ForgetsTheWorld, "plain", 0.0),
        (ForgetsTheOthers, "plain", 0.0),
        (ForgetsAccumulation, "plain", 0.0),
        (ForgetsTheClip, "plain", TIGHT_CLIP),
        (DecaysFrozenWeights, "frozen_block_between", 0.0),
        (SkipsUnusedParameters, "never_used", 0.0),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_oracle_catches_an_engine_that(
    wrong: type[Replicas], name: str, clip: float, optimizer: Any
) -> None:
    setting = Setting(world=2, accumulation=2, clip=clip, optimizer=optimizer)
    assert failures_of(wrong, ZOO[name], setting)


def test_every_trainable_parameter_in_the_zoo_moves_and_no_frozen_one_does() -> None:
    def work(rank: int, world: int) -> list[str]:
        wrong = []
        for case in ZOO.values():
            start = case.build(SEED)
            weights = reference_run(case, Setting(world=1)).weights
            for name, param in start.named_parameters():
                moved = relative_difference(weights[name], param.detach()) > 1e-5
                if moved != (param.requires_grad and param.numel() > 0):
                    wrong.append(f"{case.name}: {name}")
        return wrong

    assert run_ranks(work, world=1, process_group=False) == [[]]


def test_a_pairwise_selection_holds_every_pair_and_is_short() -> None:
    factors = {"a": range(4), "b": range(4), "c": range(3), "d": range(2), "e": range(2)}
    rows = pairwise(factors)
    for first, second in itertools.combinations(factors, 2):
        met = {(row[first], row[second]) for row in rows}
        assert met == set(itertools.product(factors[first], factors[second]))
    assert len(rows) <= 20
    assert rows == pairwise(factors)


def test_ranks_answer_in_their_order() -> None:
    def work(rank: int, world: int) -> tuple[int, int, float, str]:
        ones = torch.ones(3)
        dist.all_reduce(ones)
        return rank, world, ones.sum().item(), os.environ["LOCAL_RANK"]

    assert run_ranks(work, world=3) == [(rank, 3, 9.0, str(rank)) for rank in range(3)]


def test_an_exception_of_one_rank_ends_the_others_and_names_the_rank() -> None:
    def work(rank: int, world: int) -> None:
        if rank == 1:
            raise ValueError("one rank fails")
        dist.barrier()

    with pytest.raises(RankError, match=r"rank 1 raised(?s:.*)one rank fails") as caught:
        run_ranks(work, world=3)
    assert caught.value.rank == 1
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_crash_of_one_rank_is_an_error() -> None:
    def work(rank: int, world: int) -> None:
        if rank == 1:
            os._exit(3)
        dist.barrier()

    with pytest.raises(RankError, match="rank 1 ended without an answer"):
        run_ranks(work, world=2)


def test_a_hanging_rank_is_ended_and_its_stack_is_shown() -> None:
    def work(rank: int, world: int) -> None:
        if rank == 0:
            dist.barrier()

    with pytest.raises(RankError, match=r"ranks \[0\] gave no answer(?s:.*)barrier"):
        run_ranks(work, world=2, timeout=2)


def open_files() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process table")
def test_no_child_and_no_open_file_is_left_behind() -> None:
    before = open_files()
    run_ranks(lambda rank, world: rank, world=2)
    with pytest.raises(RankError):
        run_ranks(lambda rank, world: 1 / rank, world=2)
    assert open_files() == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
