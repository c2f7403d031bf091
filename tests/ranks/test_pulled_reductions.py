"""Reductions that read gradients in other ranks' memory: fp32 sums of what collectives reduce."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import zeroshard
from forked import run_ranks
from reference import (
    SEED,
    TOLERANCE,
    Setting,
    compare,
    config_of,
    engine_run,
    full_weights,
    relative_difference,
    train,
)
from zeroshard.core import reductions
from zeroshard.core.collectives import reduce_mean
from zeroshard.core.layout import Layout
from zeroshard.core.mesh import Aside, Mesh, build_mesh
from zeroshard.core.reductions import PulledReduction, Ring, _HostTurns, map_slots, reduce_by_pulls
from zeroshard.core.rows import mean_of
from zeroshard.core.unit import Unit
from zeroshard.engine import build
from zoo import ZOO, Case


def make_engine(
    case: Case,
    setting: Setting,
    how: str = "copy_engine",
    *,
    gather: str = "auto",
    direct: bool = False,
) -> Any:
    config = config_of(case, setting)
    config["zeroshard"] |= {"reduce": how, "gather": gather}
    model = case.build(SEED, setting.checkpointing)
    with mock.patch.object(build, "reduce_by_pulls", partial(reduce_by_pulls, direct=direct)):
        return zeroshard.initialize(model=model, config=config)[0]


def is_pulled(engine: Any) -> bool:
    return all(unit.reducer.in_turn for unit in engine.runtime.trained)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one | other)


def near(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(relative_difference(one[name], other[name]) <= TOLERANCE for name in one | other)


@contextmanager
def told() -> Iterator[list[str]]:
    """What the log says about reductions."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("zeroshard")
    logger.addHandler(handler)
    found: list[str] = []
    yield found
    logger.removeHandler(handler)
    found += [text for text in messages if "zeroshard.reduce" in text]


# Sums -------------------------------------------------------------------------------------------


def pulled_mean(rows: list[Tensor], mesh: Mesh, *, copies: bool) -> list[Tensor]:
    """This rank's parts of the means over ranks of some rows, each in a turn of its own."""
    numel, dtype = rows[0].numel(), rows[0].dtype
    slab = map_slots(numel * dtype.itemsize, mesh)
    ring = Ring(slab, mesh, slab.copy if copies else None)
    layout = Layout(numels=(numel,), world=mesh.shard.size)
    reducer = PulledReduction(ring, layout, [torch.Size([numel])], dtype)
    outs: list[Tensor] = []
    for row in rows:
        room = reducer.room()
        room.views[0].copy_(row)
        outs.append(torch.empty(layout.shard_numel))
        ticket = reducer.start(outs[-1], room.tensor)
        if len(outs) % 3:  # else the next turn comes while this one is under way
            ticket.wait()
    ticket.wait()
    return outs


def rows_of(rank: int, numel: int, dtype: torch.dtype, turns: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(numel, generator=generator).to(dtype) for _ in range(turns)]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_mean_is_the_fp32_sum_in_the_order_of_ranks_and_nearer_to_the_truth(
    dtype: torch.dtype, world: int
) -> None:
    """Whatever the wire's dtype, over turns that follow each other as fast as they can."""
    numel, turns = world * 8 * 40, 8

    def work(rank: int, world: int) -> list[tuple[bool, float, float, float]]:
        mesh = build_mesh(world, torch.device("cpu"))
        mine = rows_of(rank, numel, dtype, turns)
        found = [pulled_mean(mine, mesh, copies=copies) for copies in (True, False)]
        part = Layout(numels=(numel,), world=world).shard(rank).slice()
        of_all = [rows_of(each, numel, dtype, turns) for each in range(world)]
        seen: list[tuple[bool, float, float, float]] = []
        for turn in range(turns):
            rows = [of_all[each][turn][part] for each in range(world)]
            in_order = rows[0].float()
            for row in rows[1:]:
                in_order = in_order + row.float()
            is_right = all(torch.equal(outs[turn], in_order * (1 / world)) for outs in found)
            sent = torch.empty_like(rows[0])
            reduce_mean(sent, mine[turn].clone(), mesh).wait()
            truth = torch.stack(rows).double().mean(0)
            results = (found[0][turn], found[0][turn].to(dtype), sent)
            errors = ((result.double() - truth).norm().item() for result in results)
            seen.append((is_right, *errors))
        return seen

    for seen in run_ranks(work, world):
        for is_right, error, error_rounded, error_sent in seen:
            assert is_right
            if dtype == torch.float32:
                assert max(error, error_sent) < 1e-5
            else:
                assert error < error_sent / 1000
                assert error_rounded < error_sent or world == 2


# Training ---------------------------------------------------------------------------------------


CASES: dict[str, dict[str, Any]] = {
    "plain": {"accumulation": 2, "clip": 0.1},
    "zero_sized_parameters": {},
    "depth_varies_by_rank": {"accumulation": 2, "clip": 0.3},
    "mixture_of_experts": {},
}


def test_training_in_fp32_is_that_of_plain_pytorch() -> None:
    for name, options in CASES.items():
        settings = [Setting(stage, 3, steps=2, **options) for stage in (2, 3)]
        for compared in compare(ZOO[name], settings, make_engine=make_engine):
            assert compared.differences == [], name


def test_bits_repeat_and_do_not_depend_on_the_stage_or_how_memory_is_read() -> None:
    case = ZOO["plain"]
    kinds: dict[str, dict[str, Any]] = {
        "fp32": {},
        "bf16": {"communication_data_type": "bf16"},
        "fp16": {"communication_data_type": "fp16"},
    }
    runs: list[tuple[int, dict[str, Any]]] = [
        (3, {}),
        (3, {"gather": "copy_engine"}),
        (3, {"direct": True}),
        (2, {}),
    ]

    def work(rank: int, world: int) -> dict[str, bool]:
        found: dict[str, bool] = {}
        for precision, extra in kinds.items():
            options: dict[str, Any] = {"accumulation": 2, "precision": precision, "extra": extra}
            first, *others = (
                engine_run(
                    case,
                    Setting(stage, world, steps=2, **options),
                    rank,
                    make_engine=partial(make_engine, **how),
                )
                for stage, how in runs
            )
            found[precision] = all(
                same(first.weights, other.weights) and first.norms == other.norms
                for other in others
            )
        return found

    for found in run_ranks(work, 3):
        assert found == dict.fromkeys(kinds, True)


@pytest.mark.parametrize("beside", [False, True])
def test_gradients_are_copied_once_and_into_memory_that_others_read(beside: bool) -> None:
    """They live until they are reduced where that is done beside the computation; sums are fp32."""
    case = ZOO["plain"]

    def work(rank: int, world: int) -> tuple[bool, list[str], list[int], set[torch.dtype], int]:
        extra = {"communication_data_type": "bf16"}
        engine = make_engine(case, Setting(3, world, precision="bf16", extra=extra))
        own: list[str] = []
        alive: list[int] = []
        grads: list[weakref.ref[Tensor]] = []
        for param in engine.module.parameters():
            param.register_post_accumulate_grad_hook(
                lambda param: grads.append(weakref.ref(param.grad))
            )
        read = _HostTurns.read

        def watched(turns: _HostTurns, *args: Any) -> Any:
            alive.append(sum(grad() is not None for grad in grads))
            return read(turns, *args)

        with (
            mock.patch.object(Unit, "_fresh_gradient", lambda unit: own.append(unit.name)),
            mock.patch.object(_HostTurns, "read", watched),
            mock.patch.object(Aside, "exists", beside),
        ):
            engine.backward(case.loss(engine, case.batch(0, 0, rank)))
        units = engine.runtime.trained
        kept = {unit.grad_shard.dtype for unit in units if unit.grad_shard is not None}
        shards = sum(unit.grad_shard.nbytes for unit in units if unit.grad_shard is not None)
        alive.append(sum(grad() is not None for grad in grads))
        # Two slots, and half a one for the rows of the other rank.
        expected = shards + max(unit.nbytes_full for unit in units) * 5 // 2
        return is_pulled(engine), own, alive, kept, engine.memory().gradients_bytes - expected

    for was_pulled, own, (*under_way, after), kept, excess in run_ranks(work, 2):
        assert was_pulled and own == [] and kept == {torch.float32}
        assert (min(under_way) > 0) == beside and max(under_way) <= 6 and after == 0
        assert 0 <= excess <= 3 * 512


def test_gradients_that_come_in_parts_are_added_up_before_their_turn() -> None:
    case = ZOO["plain"]

    def grads_of(unit: Unit, rank: int, part: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(10 * rank + part)
        return [torch.randint(-9, 9, s, generator=generator).float() for s in unit.shapes]

    def work(rank: int, world: int) -> list[bool]:
        engine = make_engine(case, Setting(2, world))
        found = []
        for unit in engine.runtime.trained:
            for part in range(2):
                for member, grad in zip(unit.members, grads_of(unit, rank, part), strict=True):
                    member.param.grad = grad
                unit.collect()
            alone = unit.unreduced(0)
            assert alone is not None
            both = [grads_of(unit, rank, part)[0] for part in range(2)]
            found.append(torch.equal(alone, both[0] + both[1]))
            unit.reduce()
            unit.settle()
            assert unit.grad_shard is not None
            every = [grads_of(unit, each, part) for each in range(world) for part in range(2)]
            for index in range(len(unit.members)):
                mean = sum(grads[index] for grads in every).flatten() / world
                own = unit.part_of(unit.grad_shard, index)
                found.append(torch.equal(own, mean[unit.layout.owned(index, rank).slice()]))
        return found

    assert all(map(all, run_ranks(work, 2)))


class InjectedError(Exception):
    pass


def test_ranks_go_on_together_whatever_comes_between_two_steps() -> None:
    """A backward that failed on one of them, another engine, state that was offloaded."""
    case, setting = ZOO["plain"], Setting(3, 3)

    def fail(grad: Tensor) -> None:
        raise InjectedError

    def work(rank: int, world: int) -> tuple[list[bool], bool]:
        pulled: list[bool] = []
        weights: list[dict[str, Tensor]] = []
        for how in ("nccl", "copy_engine"):
            engines = [make_engine(case, setting, how) for _ in range(2)]
            for step in range(4):
                for engine in engines:
                    train(engine, case, setting, rank, steps=[step])
                logits = engines[0](*case.batch(9, 0, rank))
                if rank == step % world:
                    logits.register_hook(fail)
                    errors: Any = InjectedError
                else:
                    errors = zeroshard.DistributedError
                with pytest.raises(errors):
                    engines[0].backward(logits.square().mean())
                engines[0].reset()
                if step == 2:
                    engines[1].offload_states()
                    pulled.append(is_pulled(engines[1]))
                    engines[1].reload_states()
                pulled += [is_pulled(engine) for engine in engines]
            weights += [full_weights(engine) for engine in engines]
            for engine in engines:
                engine.destroy()
                pulled.append(is_pulled(engine))
        return pulled, all(near(weights[0], other) for other in weights[1:])

    whole = [True] * 4 + [False] + [True] * 4 + [False] * 2
    for pulled, is_near in run_ranks(work, 3):
        assert pulled == [False] * 11 + whole
        assert is_near


def test_overflow_in_fp16_comes_through_the_sum() -> None:
    """What is infinite on one rank makes all of them skip the step, as with collectives."""
    case = ZOO["plain"]

    def work(rank: int, world: int) -> list[tuple[int, bool]]:
        found = []
        for value in (torch.inf, -torch.inf, torch.nan, 1.0):
            engine = make_engine(case, Setting(3, world, precision="fp16"))
            before = full_weights(engine)
            logits = engine(*case.batch(0, 0, rank))
            engine.backward(logits.float().square().mean() * (value if rank == 1 else 1.0))
            engine.step()
            found.append((engine.skipped_steps, same(before, full_weights(engine))))
            engine.destroy()
        return found

    assert run_ranks(work, 2) == [[(1, True)] * 3 + [(0, False)]] * 2


@pytest.mark.parametrize(
    ("stage", "keys", "reason"),
    [
        (3, {"prescale_gradients": True}, "prescale_gradients"),
        (2, {"gradient_predivide_factor": 2.0}, "gradient_predivide_factor"),
        (2, {"zero_optimization": {"stage": 2, "reduce_scatter": False}}, "reduce_scatter"),
        (1, {}, "no gradients are reduced in every backward"),
        (3, {"no": "memory"}, "rank 1: no room is left"),
        (3, {"no": "staging"}, "rank 1: no room is left"),
    ],
    ids=lambda value: next(iter(value), "plain") if isinstance(value, dict) else None,
)
def test_where_collectives_are_needed_they_are_used_and_one_line_says_why(
    stage: int, keys: dict[str, Any], reason: str
) -> None:
    case = ZOO["plain"]
    reserve = os.posix_fallocate

    def full(*args: Any) -> None:
        raise OSError("no room is left")

    def work(rank: int, world: int) -> tuple[list[str], bool, float]:
        extra = dict(keys)
        lacking = extra.pop("no", None)
        lacks = lacking if rank == 1 else None
        setting = Setting(stage, world, steps=1, extra=extra)
        with (
            told() as lines,
            mock.patch.object(os, "posix_fallocate", full if lacks == "memory" else reserve),
            mock.patch.object(reductions, "mean_of", full if lacks == "staging" else mean_of),
        ):
            engine = make_engine(case, setting)
        losses, _ = train(engine, case, setting, rank)
        return lines, is_pulled(engine), losses[0]

    for lines, was_pulled, _ in run_ranks(work, 2):
        assert len(lines) == 1 and reason in lines[0]
        assert not was_pulled
