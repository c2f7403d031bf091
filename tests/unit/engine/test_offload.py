"""Model state that is moved to host memory for a while."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import zeroshard
from unit.engine.small import STAGES, Net, batch, loss_of, make, on_ranks, train, weights_of
from zeroshard import UsageError, zero
from zeroshard.zero import OffloadStateTypeEnum

ADAM = {"optimizer": {"type": "Adam", "params": {"lr": 0.01}}}
PRECISIONS = [{}, {"bf16": {"enabled": True}}, {"fp16": {"enabled": True}}]
KINDS = [None, *([kind.value] for kind in OffloadStateTypeEnum), ["hp_params", "optim_states"]]

every_precision = pytest.mark.parametrize("precision", PRECISIONS, ids=["fp32", "bf16", "fp16"])


def half_train(engine: Any, numbers: range) -> None:
    for number in numbers:
        half = batch(number, engine.module.blocks[0].up.weight.dtype)
        engine.backward((engine(half).float() - 1).square().mean())
        engine.step()


def device_bytes(engine: Any) -> int:
    """Bytes of the storages that hold model state, shared ones once."""
    sizes: dict[int, int] = {}
    for unit in engine.runtime.units:
        held = unit.holdings
        for tensor in (*held.parameters, held.master, held.grad_shard, held.full_gradient):
            if tensor is not None:
                storage = tensor.untyped_storage()
                sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


@pytest.mark.parametrize("include", KINDS, ids=lambda kinds: "+".join(kinds or ["all"]))
@every_precision
@on_ranks(2, STAGES)
def test_training_goes_on_as_if_nothing_had_been_away(
    precision: dict[str, Any], include: list[str] | None, stage: int
) -> None:
    engine, other = (make(stage, **ADAM, **precision) for _ in range(2))
    half_train(other, range(3))
    for number in range(3):
        engine.offload_states(include)
        engine.reload_states()
        half_train(engine, range(number, number + 1))
    got, want = weights_of(engine), weights_of(other)
    assert all(torch.equal(got[name], want[name]) for name in want)
    for one, two in zip(engine.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(zero.safe_get_full_fp32_param(one), zero.safe_get_full_fp32_param(two))
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(
                zero.safe_get_full_optimizer_state(one, key),
                zero.safe_get_full_optimizer_state(two, key),
            )


@every_precision
@on_ranks(3, STAGES)
def test_no_memory_of_the_device_is_left_and_all_of_it_comes_back(
    precision: dict[str, Any], stage: int
) -> None:
    engine = make(stage, gradient_accumulation_steps=2, **ADAM, **precision)
    half_train(engine, range(3))
    before = device_bytes(engine)
    engine.offload_states()
    assert device_bytes(engine) == 0
    engine.reload_states()
    engine.reload_states()
    assert device_bytes(engine) == before
    half_train(engine, range(3, 4))


@on_ranks(2, STAGES)
def test_the_gradients_of_an_accumulation_under_way_survive(stage: int) -> None:
    engine, other = (make(stage, gradient_accumulation_steps=2) for _ in range(2))
    for number in range(2):
        for each in (engine, other):
            each.backward(loss_of(each, number))
        engine.offload_states()
        engine.reload_states()
        engine.step()
        other.step()
    got, want = weights_of(engine), weights_of(other)
    assert all(torch.equal(got[name], want[name]) for name in want)


@every_precision
@on_ranks(2, STAGES)
def test_shared_memory_is_shared_afterwards_too(precision: dict[str, Any], stage: int) -> None:
    engine = make(stage, **precision)

    def sharing() -> list[tuple[int, ...]]:
        def at(tensor: Tensor) -> tuple[int, int]:
            return tensor.untyped_storage()._cdata, tensor.storage_offset()

        found: list[tuple[int, ...]] = []
        for unit in engine.runtime.units:
            held = unit.holdings
            owned = [piece for piece in unit.slices if piece.numel()]
            params = [m.param for m in unit.members] if unit.lifetime.params_stay else []
            found += [at(tensor) for tensor in (*held.parameters, held.master, *owned, *params)]
        return found

    before = sharing()
    engine.offload_states()
    engine.reload_states()
    assert sharing() == before


@on_ranks(2, STAGES)
def test_what_needs_the_state_asks_to_reload_it(stage: int) -> None:
    engine = make(stage, **ADAM)
    train(engine, 1)
    loss = loss_of(engine)
    engine.offload_states()
    weight = engine.module.head.weight
    for call in (
        lambda: engine(batch(0)),
        lambda: engine.module(batch(0)),
        engine.offload_states,
        lambda: zero.safe_get_full_fp32_param(weight),
        lambda: zero.GatheredParameters(weight).__enter__(),
    ):
        with pytest.raises(UsageError, match=r"hint: call engine\.reload_states\(\) first"):
            call()
    with pytest.raises(UsageError, match=r"hint: call engine\.reload_states"):
        engine.backward(loss)
    with pytest.raises(UsageError, match="was read while its unit is freed"):
        weight.sum()
    with pytest.raises(UsageError, match="was read while its unit is freed"):
        copy.deepcopy(engine.module.state_dict())
    engine.reload_states()
    train(engine, 1)
    engine.backward(loss_of(engine))
    engine.offload_states(["optim_states"])
    with pytest.raises(UsageError, match=r"engine\.step\(\) was called while state is offloaded"):
        engine.step()
    engine.reload_states()
    engine.step()


@on_ranks(2, STAGES)
def test_the_model_runs_while_only_other_state_is_away(stage: int) -> None:
    engine = make(stage, bf16={"enabled": True}, **ADAM)
    half_train(engine, range(1))
    with torch.no_grad():
        want = engine(batch(0, torch.bfloat16))
        engine.offload_states(["optim_states", OffloadStateTypeEnum.hp_params])
        assert torch.equal(engine(batch(0, torch.bfloat16)), want)
    assert all(torch.isfinite(piece).all() for piece in slices_of(engine))
    engine.reload_states()
    half_train(engine, range(1, 2))


def slices_of(engine: Any) -> list[Tensor]:
    return [piece for group in engine.optimizer.param_groups for piece in group["params"]]


@on_ranks(2, (0, 3))
def test_gradients_may_be_dropped_and_the_engine_destroyed_meanwhile(stage: int) -> None:
    engine = make(stage)
    engine.backward(loss_of(engine))
    engine.offload_states()
    engine.zero_grad()
    engine.reload_states()
    train(engine, 1)
    engine.offload_states()
    engine.destroy()


@on_ranks(1)
def test_other_devices_and_unknown_kinds_are_refused() -> None:
    engine = make()
    with pytest.raises(UsageError, match=r"cannot move state to 'nvme'(.|\n)*hint: pass device="):
        engine.offload_states(device="nvme")
    with pytest.raises(UsageError, match=r"no state 'moments'(.|\n)*optim_states, hp_params"):
        engine.offload_states(["moments"])
    with (
        zeroshard.gathered(engine.module),
        pytest.raises(UsageError, match="is gathered"),
    ):
        engine.offload_states()
    assert engine.module.head.weight.equal(Net().head.weight)
