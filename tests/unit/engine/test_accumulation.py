"""Micro-steps, boundaries and what adds up between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unit.engine.small import LR, STAGES, make, on_ranks, weights_of
from zeroshard import UsageError


class Weight(nn.Module):
    """One weight, whose gradient is the mean of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


def start(stage: int, accumulation: int = 1, **more: Any) -> Any:
    return make(stage, Weight(), gradient_accumulation_steps=accumulation, **more)


def backward(engine: Any, gradient: float, **options: Any) -> Tensor:
    return engine.backward(engine(torch.tensor(gradient)).sum(), **options)


def moved(engine: Any) -> float:
    """By how much the weights have moved, in units of the learning rate."""
    first, *others = (-weights_of(engine)["weight"] / LR).tolist()
    assert others == [first, first]
    return first


@on_ranks(2, STAGES)
def test_counters_and_boundaries_follow_the_micro_steps(stage: int) -> None:
    engine = start(stage, accumulation=3)
    seen = []
    for _ in range(7):
        at_forward = engine.is_gradient_accumulation_boundary()
        backward(engine, 1.0)
        assert engine.is_gradient_accumulation_boundary() == at_forward
        engine.step()
        seen.append(
            (
                at_forward,
                engine.micro_steps,
                engine.global_steps,
                engine.global_samples,
                moved(engine),
            )
        )
    assert engine.skipped_steps == 0
    assert seen == [
        (False, 1, 0, 0, 0.0),
        (False, 2, 0, 0, 0.0),
        (True, 3, 1, 6, 1.0),
        (False, 4, 1, 6, 1.0),
        (False, 5, 1, 6, 1.0),
        (True, 6, 2, 12, 2.0),
        (False, 7, 2, 12, 2.0),
    ]


@pytest.mark.parametrize("micro_steps", [1, 2, 5])
@on_ranks(2, STAGES)
def test_a_boundary_set_by_hand_comes_when_it_is_set(micro_steps: int, stage: int) -> None:
    """The divisor stays the configured number of micro-steps, here two."""
    engine = start(stage, accumulation=2)
    for step in range(2):
        for micro in range(1, micro_steps + 1):
            engine.set_gradient_accumulation_boundary(micro == micro_steps)
            backward(engine, 4.0)
            engine.step()
        assert engine.global_steps == step + 1
    assert moved(engine) == 2 * micro_steps * 4.0 / 2


@on_ranks(2, STAGES)
def test_a_boundary_may_be_declared_after_the_backward_that_it_ends(stage: int) -> None:
    engine = start(stage, accumulation=4)
    for _ in range(2):
        backward(engine, 4.0)
        engine.step()
    backward(engine, 8.0)
    engine.set_gradient_accumulation_boundary(True)
    engine.step()
    assert engine.global_steps == 1
    assert moved(engine) == (4.0 + 4.0 + 8.0) / 4


@on_ranks(1)
def test_a_boundary_set_by_hand_stays_until_none_is_set() -> None:
    engine = start(0, accumulation=2)
    assert not engine.is_gradient_accumulation_boundary()
    engine.set_gradient_accumulation_boundary(True)
    for number in range(3):
        assert engine.is_gradient_accumulation_boundary()
        backward(engine, 1.0)
        engine.step()
        assert engine.global_steps == number + 1
    engine.set_gradient_accumulation_boundary(None)
    assert engine.is_gradient_accumulation_boundary() == (engine.micro_steps % 2 == 1)


@on_ranks(2, STAGES)
def test_backwards_inside_no_sync_add_up_with_the_one_after_it(stage: int) -> None:
    engine = start(stage)
    for step in range(1, 3):
        with engine.no_sync():
            assert not engine.is_gradient_accumulation_boundary()
            backward(engine, 1.0)
            backward(engine, 2.0)
        assert engine.is_gradient_accumulation_boundary()
        backward(engine, 4.0)
        engine.step()
        assert moved(engine) == step * 7.0
    assert (engine.micro_steps, engine.global_steps) == (2, 2)


@on_ranks(2, STAGES)
def test_the_last_backward_may_be_inside_no_sync_too(stage: int) -> None:
    engine = start(stage)
    for step in range(1, 3):
        with engine.no_sync():
            backward(engine, 1.0)
            backward(engine, 2.0)
        engine.step()
        assert moved(engine) == step * 3.0


@on_ranks(1)
def test_a_step_inside_no_sync_is_refused() -> None:
    engine = start(0)
    with engine.no_sync():
        backward(engine, 1.0)
        with pytest.raises(UsageError, match=r"inside no_sync(.|\n)*hint: leave the no_sync"):
            engine.step()
    engine.step()
    assert moved(engine) == 1.0


@on_ranks(1)
def test_no_sync_cannot_be_nested_and_ends_with_its_block() -> None:
    engine = start(0)
    with engine.no_sync(), pytest.raises(UsageError, match="nested"), engine.no_sync():
        pass
    assert engine.is_gradient_accumulation_boundary()

    with pytest.raises(KeyError), engine.no_sync():
        raise KeyError
    assert engine.is_gradient_accumulation_boundary()
    with engine.no_sync():
        backward(engine, 1.0)


@pytest.mark.parametrize(("scale_wrt_gas", "want"), [(True, 3.0), (False, 12.0)])
@on_ranks(2, STAGES)
def test_micro_steps_are_averaged_or_with_scale_wrt_gas_false_summed(
    scale_wrt_gas: bool, want: float, stage: int
) -> None:
    engine = start(stage, accumulation=4)
    for gradient in (1.0, 2.0, 4.0, 5.0):
        backward(engine, gradient, scale_wrt_gas=scale_wrt_gas)
        engine.step()
    assert moved(engine) == want


@on_ranks(2, STAGES)
def test_several_backwards_in_one_micro_step_add_up(stage: int) -> None:
    engine = start(stage, accumulation=2)
    for _ in range(2):
        backward(engine, 1.0)
        backward(engine, 2.0)
        engine.step()
    assert engine.global_steps == 1
    assert moved(engine) == 3.0


def by_engine(engine: Any) -> None:
    engine.zero_grad()


def by_reset(engine: Any) -> None:
    engine.reset()


@pytest.mark.parametrize("forget", [by_engine, by_reset])
@on_ranks(2, STAGES)
def test_what_was_accumulated_may_be_forgotten(forget: Callable[[Any], None], stage: int) -> None:
    engine = start(stage, accumulation=2)
    backward(engine, 64.0)
    forget(engine)
    for _ in range(2):
        backward(engine, 3.0)
        engine.step()
    assert engine.global_steps == 1
    assert moved(engine) == 3.0


@on_ranks(2, STAGES)
def test_evaluation_between_micro_steps_adds_nothing(stage: int) -> None:
    engine = start(stage, accumulation=2)
    for gradient in (1.0, 3.0):
        backward(engine, gradient)
        engine.step()
        engine.eval()
        with torch.no_grad():
            engine(torch.ones(()))
        engine(torch.ones(()))
        engine.train()
    assert moved(engine) == 2.0
