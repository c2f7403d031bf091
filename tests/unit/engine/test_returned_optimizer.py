"""The optimizer that initialize() returns: a torch optimizer whose step is the engine's."""

from __future__ import annotations

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

import zeroshard
from unit.engine.small import (
    LR,
    STAGES,
    Net,
    assert_equal_weights,
    batch,
    config_of,
    loss_of,
    make,
    on_ranks,
    train,
    weights_of,
)
from zeroshard import UsageError

FP16 = {"fp16": {"enabled": True, "hysteresis": 1, "initial_scale_power": 20}}


@on_ranks(2, STAGES)
def test_its_step_is_a_step_of_the_engine(stage: int) -> None:
    stepped, other = make(stage, gradient_clipping=0.5), make(stage, gradient_clipping=0.5)
    for number in range(3):
        stepped.optimizer.zero_grad()
        stepped.backward(loss_of(stepped, number))
        stepped.optimizer.step()
    train(other, steps=3)
    assert_equal_weights(weights_of(stepped), weights_of(other))
    assert (stepped.global_steps, stepped.skipped_steps) == (3, 0)
    assert stepped.get_global_grad_norm() == other.get_global_grad_norm()


@on_ranks(2, STAGES)
def test_its_step_ends_an_accumulation_early(stage: int) -> None:
    engine = make(stage, gradient_accumulation_steps=4)
    for _ in range(2):
        engine.backward(loss_of(engine))
        engine.optimizer.step()
    assert engine.global_steps == 2
    for _ in range(4):
        engine.backward(loss_of(engine))
        engine.step()
    assert engine.global_steps == 3


@on_ranks(2, STAGES)
def test_its_step_wants_a_backward_of_its_own(stage: int) -> None:
    engine = make(stage)
    engine.backward(loss_of(engine))
    engine.step()
    with pytest.raises(UsageError, match="came without a backward"):
        engine.optimizer.step()


@on_ranks(2)
def test_its_step_calls_a_closure_once_and_returns_its_loss() -> None:
    engine, other = make(2), make(2)

    def closure() -> float:
        loss = loss_of(engine, 0)
        engine.backward(loss)
        return loss.item()

    loss = engine.optimizer.step(closure)
    assert loss == loss_of(other, 0).item()
    train(other, steps=1)
    assert_equal_weights(weights_of(engine), weights_of(other))


@on_ranks(2, (0, 3))
def test_a_schedule_over_it_moves_the_learning_rate_of_the_next_step(stage: int) -> None:
    engine = make(stage)
    schedule = LambdaLR(engine.optimizer, lambda step: 1 / (1 + step))
    for step in range(3):
        assert engine.get_lr() == [LR / (1 + step)]
        engine.backward(loss_of(engine, step))
        engine.step()
        schedule.step()  # torch would warn of an optimizer that has not stepped yet


@on_ranks(2, STAGES)
def test_it_says_whether_the_last_step_overflowed(stage: int) -> None:
    engine = make(stage, **FP16)
    optimizer = engine.optimizer
    assert optimizer.overflow is False
    assert (optimizer.loss_scale, optimizer.dynamic_loss_scale) == (2.0**20, True)
    seen: list[bool] = []
    while optimizer.overflow or not seen:
        engine.backward(engine(batch(0, torch.float16)).float().square().mean())
        engine.step()
        assert optimizer.overflow is not engine.was_step_applied()
        seen.append(optimizer.overflow)
        assert optimizer.cur_scale == 2.0 ** (20 - sum(seen))
    assert seen[0]


@on_ranks(2, STAGES)
def test_it_shows_the_groups_and_the_state_of_the_optimizer_inside(stage: int) -> None:
    model = Net()
    mine = torch.optim.Adam(model.parameters(), lr=LR)
    engine, optimizer, *_ = zeroshard.initialize(
        model=model, optimizer=mine, config=config_of(stage, bf16={"enabled": True})
    )
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is mine.param_groups
    assert optimizer.defaults is mine.defaults
    optimizer.param_groups[0]["lr"] = 0.5
    assert engine.get_lr() == [0.5]
    engine.backward(engine(batch(0, torch.bfloat16)).float().square().mean())
    engine.step()
    assert optimizer.state is mine.state
    pieces = optimizer.single_partition_of_fp32_groups
    assert pieces == [p for group in optimizer.fp32_partitioned_groups_flat for p in group]
    assert {piece.dtype for piece in pieces} == {torch.float32}
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert [s["step"] for s in optimizer.state.values()] == [1] * len(pieces)


@on_ranks(1)
def test_parameters_cannot_join_it() -> None:
    engine = make(2)
    with pytest.raises(UsageError, match=r"hint: give all groups to initialize\(\)"):
        engine.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})


@on_ranks(1)
def test_its_class_can_be_mixed_with_a_wrapper_at_run_time() -> None:
    engine = make(2)

    class Wrapper:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.__dict__ = {k: v for k, v in vars(optimizer).items() if k != "step"}
            kind = type(optimizer)
            self.__class__ = type("Wrapped" + kind.__name__, (type(self), kind), {})

    wrapped = Wrapper(engine.optimizer)
    assert isinstance(wrapped, torch.optim.Optimizer)
    assert wrapped.param_groups is engine.optimizer.param_groups
    assert wrapped.overflow is False
    assert not hasattr(wrapped, "absent")
