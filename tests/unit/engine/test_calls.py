"""Calls in a wrong order or with wrong arguments: what errors say, and that training goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from unit.engine.small import (
    LR,
    STAGES,
    Bomb,
    InjectedError,
    Net,
    batch,
    loss_of,
    make,
    on_ranks,
    weights_of,
)
from zeroshard import UsageError


def plain_weights(numbers: list[int], micro_steps: int = 1) -> dict[str, Tensor]:
    """What SGD makes of the batches, of which so many form a step."""
    model = Net()
    for at, number in enumerate(numbers, 1):
        (loss_of(model, number) / micro_steps).backward()
        if at % micro_steps == 0:
            with torch.no_grad():
                for param in model.parameters():
                    param -= LR * param.grad
            model.zero_grad()
    return {name: param.detach() for name, param in model.named_parameters()}


def assert_weights(engine: Any, want: dict[str, Tensor]) -> None:
    for name, weight in weights_of(engine).items():
        torch.testing.assert_close(weight, want[name], rtol=1e-6, atol=1e-7)


# Errors name the call to make -------------------------------------------------------------------


@on_ranks(2, STAGES)
def test_a_step_without_a_backward_asks_for_one(stage: int) -> None:
    engine = make(stage)
    asks = r"number {} came without a backward(.|\n)*hint: call engine\.backward\(loss\)"
    with pytest.raises(UsageError, match=asks.format(1)):
        engine.step()
    loss_of(engine)
    with pytest.raises(UsageError, match=asks.format(1)):
        engine.step()
    engine.backward(loss_of(engine, 0))
    engine.step()
    with pytest.raises(UsageError, match=asks.format(2)):
        engine.step()
    assert (engine.micro_steps, engine.global_steps) == (1, 1)
    engine.backward(loss_of(engine, 1))
    engine.step()
    assert_weights(engine, plain_weights([0, 1]))


@on_ranks(2, STAGES)
def test_a_second_backward_of_one_graph_asks_for_a_new_one_or_retain_graph(stage: int) -> None:
    engine = make(stage)
    loss = loss_of(engine)
    engine.backward(loss)
    asks = r"used up(.|\n)*hint: call engine\(\.\.\.\) again(.|\n)*retain_graph=True"
    with pytest.raises(UsageError, match=asks):
        engine.backward(loss)
    engine.backward(loss_of(engine))
    engine.step()
    assert_weights(engine, plain_weights([0]))


@pytest.mark.parametrize(
    "stage",
    [
        0,
        1,
        2,
        3,
    ],
)
@on_ranks(2)
def test_a_graph_that_is_retained_may_be_used_twice(stage: int) -> None:
    engine = make(stage, gradient_accumulation_steps=2)
    for _ in range(2):
        loss = loss_of(engine)
        engine.backward(loss, retain_graph=True)
        engine.step()
        engine.backward(loss)
        engine.step()
    assert_weights(engine, plain_weights([0, 0, 0, 0], micro_steps=2))


@pytest.mark.parametrize(
    ("make_loss", "names"),
    [
        (lambda engine: engine(batch(0)), r"not \(2, 3\)"),
        (lambda engine: 1.5, "not float"),
        (lambda engine: None, "not NoneType"),
        (lambda engine: (loss_of(engine),), "not tuple"),
    ],
    ids=["matrix", "number", "none", "tuple"],
)
@on_ranks(1)
def test_a_loss_that_is_no_scalar_asks_for_a_mean(
    make_loss: Callable[[Any], Any], names: str
) -> None:
    engine = make()
    with pytest.raises(UsageError, match=rf"scalar loss, {names}(.|\n)*hint: .*\.mean\(\)"):
        engine.backward(make_loss(engine))
    engine.backward(loss_of(engine))
    engine.step()
    assert_weights(engine, plain_weights([0]))


@on_ranks(1)
def test_a_loss_of_one_element_is_a_scalar() -> None:
    engine = make()
    engine.backward(loss_of(engine).reshape(1, 1))
    engine.step()
    assert_weights(engine, plain_weights([0]))


def without_gradients(engine: Any) -> Tensor:
    with torch.no_grad():
        return loss_of(engine)


def detached(engine: Any) -> Tensor:
    return loss_of(engine).detach()


@pytest.mark.parametrize("make_loss", [without_gradients, detached])
@on_ranks(1)
def test_a_loss_without_a_graph_asks_for_one_outside_no_grad(
    make_loss: Callable[[Any], Tensor],
) -> None:
    engine = make()
    asks = r"loss without a graph(.|\n)*hint: compute it from engine\(\.\.\.\) outside of torch\.no"
    with pytest.raises(UsageError, match=asks):
        engine.backward(make_loss(engine))


@on_ranks(2, STAGES)
def test_a_loss_that_has_nothing_to_do_with_the_model_is_no_step(stage: int) -> None:
    engine = make(stage)
    engine.backward(torch.ones((), requires_grad=True) * 2)
    with pytest.raises(UsageError, match="came without a backward"):
        engine.step()
    engine.backward(loss_of(engine))
    engine.step()
    assert_weights(engine, plain_weights([0]))


@on_ranks(2, STAGES)
def test_a_step_after_zero_grad_asks_for_a_backward(stage: int) -> None:
    engine = make(stage)
    engine.backward(loss_of(engine, 5))
    engine.zero_grad()
    with pytest.raises(UsageError, match=r"hint: call engine\.backward\(loss\)"):
        engine.step()
    engine.backward(loss_of(engine, 0))
    engine.step()
    assert_weights(engine, plain_weights([0]))


# Exceptions in between --------------------------------------------------------------------------


@on_ranks(2, STAGES)
def test_an_exception_in_backward_arrives_as_it_is_and_drops_the_accumulation(stage: int) -> None:
    engine = make(stage, gradient_accumulation_steps=2)
    engine.backward(loss_of(engine, 5))
    engine.step()
    assert engine.micro_steps == 1
    with pytest.raises(InjectedError, match=r"^boom$"):
        engine.backward(loss_of(lambda x: Bomb.apply(engine(x)), 6))
    assert engine.micro_steps == 0
    for number in (0, 1):
        engine.backward(loss_of(engine, number))
        engine.step()
    assert engine.global_steps == 1
    assert_weights(engine, plain_weights([0, 1], micro_steps=2))


@on_ranks(2, STAGES)
def test_reset_after_an_exception_in_a_plain_backward_starts_anew(stage: int) -> None:
    engine = make(stage, gradient_accumulation_steps=2)
    loss_of(engine, 5).backward()
    engine.step()
    with pytest.raises(InjectedError):
        loss_of(lambda x: engine.head(Bomb.apply(engine.blocks[0](x))), 6).backward()
    engine.reset()
    for number in (0, 1):
        loss_of(engine, number).backward()
        engine.step()
    assert_weights(engine, plain_weights([0, 1], micro_steps=2))


@on_ranks(2, STAGES)
def test_reset_between_steps_changes_nothing(stage: int) -> None:
    engine = make(stage)
    for number in (0, 1):
        engine.reset()
        engine.backward(loss_of(engine, number))
        engine.step()
        engine.reset()
    assert (engine.micro_steps, engine.global_steps) == (2, 2)
    assert_weights(engine, plain_weights([0, 1]))


@on_ranks(2, STAGES)
def test_an_exception_in_forward_arrives_as_it_is_and_keeps_the_accumulation(stage: int) -> None:
    engine = make(stage, gradient_accumulation_steps=2)
    engine.backward(loss_of(engine, 0))
    engine.step()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as raised:
        engine(torch.ones(2, 5))
    assert not isinstance(raised.value, UsageError)
    engine.backward(loss_of(engine, 1))
    engine.step()
    assert_weights(engine, plain_weights([0, 1], micro_steps=2))
