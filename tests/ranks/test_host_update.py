"""Offloaded state that is stepped on the host: the numbers, the order, what waits, and failure."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from forked import run_ranks
from unit.engine.small import batch, loss_of, make, on_ranks, weights_of
from zeroshard import zero
from zeroshard.core.unit import Unit
from zeroshard.errors import OffloadError, UsageError
from zeroshard.optim.adam import Rule, Shards
from zeroshard.optim.host_update import HostUpdate, Stepper

ADAMW = {"type": "AdamW", "params": {"lr": 0.05, "weight_decay": 0.1}}
BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 24, "hysteresis": 1}}  # skips at first
STEPS = 3


def place(stage: int, where: str, **more: Any) -> dict[str, Any]:
    """Keys of a configuration whose state is stepped on the host, or on the device."""
    offload = {"device": "cpu" if where == "cpu" or more else "none", "cpuadam_cores_perc": 0.5}
    return {
        "zero_optimization": {"stage": stage, "offload_optimizer": offload | more},
        "zeroshard": {"optimizer_step": "fused", "offload_update": where},
    }


def make_offloaded(stage: int = 0, where: str = "cpu", **keys: Any) -> Any:
    more = keys.pop("offload", {})
    return make(stage, **{"optimizer": ADAMW, **place(stage, where, **more), **keys})


def host_of(engine: Any) -> HostUpdate:
    host = engine._sharded._host
    assert isinstance(host, HostUpdate)
    return host


def record(engine: Any, dtype: torch.dtype, rank: int = 0) -> list[str]:
    """Everything that training shows, to the last bit: losses, norms, weights and state."""
    seen: list[object] = []
    for number in range(STEPS):
        for micro in range(engine.gradient_accumulation_steps()):
            x = batch(100 * number + 10 * micro + rank, dtype)
            loss = (engine(x) - 1).square().mean()
            engine.backward(loss)
            engine.step()
            seen.append(loss.item())
        seen.append(engine.get_global_grad_norm())
    # Nothing has waited for the last step so far.
    kept = [unit.read_kept() for unit in engine.runtime.trained]
    moments = [
        state[key].double().tolist()
        for unit in engine.runtime.trained
        for piece in unit.slices
        if (state := engine.basic_optimizer.state.get(piece))
        for key in ("exp_avg", "exp_avg_sq", "step")
    ]
    seen += [sorted(value for each in kept for value in each.tolist()), sorted(map(str, moments))]
    seen += [weight.tolist() for weight in weights_of(engine).values()]
    seen.append(engine.skipped_steps)
    engine.destroy()
    return [str(each) for each in seen]


CASES: Mapping[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "sums": (torch.bfloat16, {**BF16, "gradient_accumulation_steps": 2, "gradient_clipping": 0.1}),
    "skips": (torch.float16, {**FP16, "gradient_clipping": 0.1}),
    "half": (torch.bfloat16, {**BF16, "offload": {"ratio": 0.5}}),  # on either side
}


@pytest.mark.parametrize("world", [1, 2])
def test_training_is_that_of_the_same_kernels_without_offload(world: int) -> None:
    def work(rank: int, world: int) -> list[str]:
        found: list[str] = []
        # Each stage meets each case, on one rank or on two.
        for number, (name, stage) in enumerate(itertools.product(CASES, range(4))):
            if (number + number // 4 + world) % 2:
                continue
            dtype, keys = CASES[name]
            want = record(make_offloaded(stage, "gpu", **keys), dtype, rank)
            engine = make_offloaded(stage, **keys)
            assert host_of(engine).units
            if name == "skips":
                assert want[-1] != "0", "no step was skipped"
            if record(engine, dtype, rank) != want:
                found.append(f"stage {stage}, {name}")
        return found

    assert run_ranks(work, world) == [[]] * world


@on_ranks(1)
def test_parameters_that_are_offloaded_too_get_their_weights_on_the_host() -> None:
    want = record(make_offloaded(3, "gpu", **BF16), torch.bfloat16)
    keys = place(3, "cpu")
    keys["zero_optimization"]["offload_param"] = {"device": "cpu"}
    engine = make(3, optimizer=ADAMW, **BF16, **keys)
    assert not any(unit.is_shard_near for unit in host_of(engine).units)
    assert record(engine, torch.bfloat16) == want


@on_ranks(1)
def test_an_optimizer_that_is_not_adam_is_stepped_on_the_device_and_it_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sgd = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.5}}
    with caplog.at_level(logging.WARNING, "zeroshard"):
        engine = make_offloaded(optimizer=sgd)
    assert [record.message for record in caplog.records] == [
        "the update of offloaded state runs on the device: what is not torch's Adam or AdamW, or "
        "is to be stepped by torch, is stepped there"
    ]
    assert engine._sharded._host is None


# The order --------------------------------------------------------------------------------------


class Gate:
    """Holds the worker at the start of each unit's step, and notes which units pass."""

    def __init__(self) -> None:
        self.opened, self.masters = threading.Event(), list[int]()

    @contextmanager
    def closed(self) -> Iterator[None]:
        step = Stepper.step

        def held(stepper: Stepper, shards: Shards, rule: Rule, factor: Tensor) -> None:
            self.opened.wait()
            self.masters.append(shards.master.data_ptr())
            step(stepper, shards, rule, factor)

        with mock.patch.object(Stepper, "step", held):
            try:
                yield
            finally:
                self.opened.set()


@on_ranks(1)
def test_a_step_returns_before_the_worker_begins_and_units_go_in_the_order_of_forward() -> None:
    for stage, reads in itertools.product((1, 3), (True, False)):
        plain, engine = make_offloaded(stage, "gpu"), make_offloaded(stage)
        for each in (plain, engine):
            each.backward(loss_of(each))
        plain.step()
        gate = Gate()
        with gate.closed():
            engine.step()
            assert not gate.masters
            assert engine.global_steps == 1
            gate.opened.set()
            if reads:
                assert torch.equal(loss_of(engine, 1), loss_of(plain, 1))
            else:
                got, want = weights_of(engine), weights_of(plain)
                assert all(torch.equal(got[name], weight) for name, weight in want.items())
        units = [unit.master.data_ptr() for unit in engine.runtime.units if unit.master is not None]
        assert gate.masters == units


@on_ranks(2)
def test_ranks_that_gather_what_was_stepped_wait_for_the_worker_and_replicas_do_not() -> None:
    for stage, waits in ((0, False), (2, True), (3, False)):
        engine = make_offloaded(stage)
        engine.backward(loss_of(engine))
        gate = Gate()
        with gate.closed():
            if waits:
                threading.Timer(0.05, gate.opened.set).start()
            engine.step()
            assert gate.opened.is_set() == waits
            gate.opened.set()
            weights_of(engine)
        assert len(gate.masters) == len(engine.runtime.units)


# Gradients --------------------------------------------------------------------------------------


@on_ranks(2)
def test_gradients_leave_in_backward_and_come_back_for_whoever_asks() -> None:
    for stage in (1, 2, 3):
        plain, engine = make_offloaded(stage, "gpu"), make_offloaded(stage)
        for each in (plain, engine):
            each.backward(loss_of(each))
        units: list[Unit] = list(host_of(engine).units)
        # The first one that is reduced tells that a step is near.
        assert sum(unit.away_gradient is not None for unit in units) >= len(units) - 1
        gone = [unit for unit in units if unit.away_gradient is not None]
        assert sum(unit.gradient_bytes for unit in gone) == 0
        for ours, theirs in zip(engine.module.parameters(), plain.module.parameters(), strict=True):
            got, want = zero.safe_get_full_grad(ours), zero.safe_get_full_grad(theirs)
            assert got is not None
            assert want is not None
            assert torch.equal(got, want)
            for param in (ours, theirs):
                zero.safe_set_full_grad(param, want + 1)
        for each in (plain, engine):
            each.step()
        assert engine.get_global_grad_norm() == plain.get_global_grad_norm()
        for got, want in zip(weights_of(engine).values(), weights_of(plain).values(), strict=True):
            assert torch.equal(got, want)


@on_ranks(1)
def test_a_hook_that_wants_gradients_is_served_on_the_device() -> None:
    def train(engine: Any) -> dict[str, Tensor]:
        engine.backward(loss_of(engine, 0))
        engine.step()
        handle = engine.optimizer.optimizer.register_step_post_hook(lambda *_: None)
        for number in (1, 2):
            engine.backward(loss_of(engine, number))
            engine.step()
        handle.remove()
        engine.backward(loss_of(engine, 3))
        engine.step()
        return dict(weights_of(engine))

    want, got = train(make_offloaded(3, "gpu")), train(make_offloaded(3))
    assert all(torch.equal(got[name], weight) for name, weight in want.items())


# Failure ----------------------------------------------------------------------------------------


@on_ranks(1)
def test_what_fails_in_the_worker_is_raised_by_the_next_forward_and_by_every_later_step() -> None:
    step, calls = Stepper.step, itertools.count()

    def fails(stepper: Stepper, shards: Shards, rule: Rule, factor: Tensor) -> None:
        if next(calls) == 1:
            raise RuntimeError("boom")
        step(stepper, shards, rule, factor)

    engine = make_offloaded(3)
    engine.backward(loss_of(engine))
    with mock.patch.object(Stepper, "step", fails):
        engine.step()
        with pytest.raises(OffloadError, match=r"rank 0: the step of blocks\.1.*boom"):
            loss_of(engine)
    with pytest.raises(OffloadError, match="boom"):
        host_of(engine).units[0].read_kept()
    engine.reset()
    for call in (lambda: loss_of(engine), engine.step):
        with pytest.raises(OffloadError, match=r"ended this engine's training(.|\n)*boom"):
            call()
    for unit in host_of(engine).units:
        with contextlib.suppress(OffloadError):
            unit.end_step()
    for unit in host_of(engine).units:
        unit.grad_shard = torch.zeros(unit.layout.shard_numel)
    with pytest.raises(OffloadError, match="boom"):  # whoever asks it
        engine._sharded.step(1.0)

    engine.destroy()


class InterruptError(Exception):
    pass


@on_ranks(1)
def test_a_step_that_is_interrupted_leaves_no_worker_behind_and_no_gradient_it_has_used_up() -> (
    None
):
    engine = make_offloaded(3)
    engine.backward(loss_of(engine))
    units = host_of(engine).units
    gate = Gate()
    with gate.closed(), mock.patch.object(units[1], "publish", side_effect=InterruptError):
        threading.Timer(0.05, gate.opened.set).start()
        with pytest.raises(InterruptError):
            engine.step()
        assert len(gate.masters) == len(units)
    assert all(unit.grad_shard is None for unit in units)
    engine.reset()
    engine.backward(loss_of(engine))
    engine.step()
    assert all(weight.isfinite().all() for weight in weights_of(engine).values())


@on_ranks(1)
def test_a_failure_that_nothing_else_has_met_is_raised_by_the_end_of_the_engine() -> None:
    engine = make_offloaded(3)
    engine.backward(loss_of(engine))
    with mock.patch.object(Stepper, "step", side_effect=RuntimeError("boom")):
        engine.step()
        with pytest.raises(OffloadError, match="boom"):
            engine.destroy()
    engine.destroy()  # is over
    with pytest.raises(UsageError, match="destroy"):
        loss_of(engine)
