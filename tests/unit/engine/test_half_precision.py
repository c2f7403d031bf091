"""fp16 with its loss scale, and bf16: overflow, small gradients, what is cast."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

import zeroshard
from unit.engine.small import STAGES, Net, config_of, make, on_ranks, weights_of
from zeroshard import LossScaleError, UsageError

HALF = torch.float16
INF = float("inf")


class Weight(nn.Module):
    """One weight, whose gradient is the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


def fp16(**block: Any) -> dict[str, Any]:
    return {"fp16": {"enabled": True, "initial_scale_power": 4, "hysteresis": 1, **block}}


def start(stage: int, model: nn.Module | None = None, **more: Any) -> Any:
    """An engine with SGD and a learning rate of one, so gradients can be read off weights."""
    optimizer = {"type": "SGD", "params": {"lr": 1.0}}
    return make(stage, model or Weight(), **{"optimizer": optimizer, **more})


def micro_step(engine: Any, gradient: float) -> None:
    engine.backward(engine(torch.tensor(gradient, dtype=engine.module.weight.dtype)).sum())
    engine.step()


# The loss scale ---------------------------------------------------------------------------------


@on_ranks(2, STAGES)
def test_on_overflow_the_scale_halves_and_neither_weights_nor_schedule_move(stage: int) -> None:
    config = config_of(stage, **fp16(), optimizer={"type": "SGD", "params": {"lr": 1.0}})
    schedule = partial(StepLR, step_size=1, gamma=0.5)
    engine = zeroshard.initialize(model=Weight(), lr_scheduler=schedule, config=config)[0]
    seen = []
    for gradient in (1.0, INF, INF, 1.0):
        micro_step(engine, gradient)
        seen.append((engine.was_step_applied(), engine.loss_scale, engine.get_lr()[0]))
    assert seen == [
        (True, 16.0, 0.5),
        (False, 8.0, 0.5),
        (False, 4.0, 0.5),
        (True, 4.0, 0.25),
    ]
    assert (engine.global_steps, engine.skipped_steps, engine.micro_steps) == (4, 2, 4)
    assert weights_of(engine)["weight"].tolist() == [1 - 1.0 - 0.5] * 3


@on_ranks(2, STAGES)
def test_the_norm_of_a_skipped_step_is_not_finite(stage: int) -> None:
    engine = start(stage, **fp16())
    micro_step(engine, INF)
    assert not torch.isfinite(engine.get_global_grad_norm())
    micro_step(engine, 2.0)
    torch.testing.assert_close(engine.get_global_grad_norm(), torch.tensor(12.0).sqrt())


@on_ranks(2, STAGES)
def test_a_skipped_step_leaves_no_gradient_to_the_next(stage: int) -> None:
    engine = start(stage, gradient_accumulation_steps=2, **fp16())
    for gradient in (1.0, INF, 0.25, 0.25):
        micro_step(engine, gradient)
    assert engine.skipped_steps == 1
    assert weights_of(engine)["weight"].tolist() == [0.75] * 3


@on_ranks(1)
def test_hysteresis_tolerates_overflows_and_a_window_of_good_steps_doubles_the_scale() -> None:
    engine = start(0, **fp16(hysteresis=2, loss_scale_window=2))
    scales = []
    for gradient in (INF, INF, INF, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3):
        micro_step(engine, gradient)
        scales.append(engine.loss_scale)
    assert scales == [16.0, 8.0, 4.0, 4.0, 4.0, 8.0, 8.0, 16.0]


@on_ranks(2, STAGES)
def test_overflow_at_the_smallest_scale_ends_training_with_an_error(stage: int) -> None:
    engine = start(stage, **fp16(initial_scale_power=1, min_loss_scale=1))
    micro_step(engine, INF)
    assert engine.loss_scale == 1.0
    with pytest.raises(LossScaleError, match=r"smallest loss scale, 1(.|\n)*hint: .*bf16"):
        micro_step(engine, INF)
    assert weights_of(engine)["weight"].tolist() == [1.0] * 3


@on_ranks(2, STAGES)
def test_a_static_scale_stays_whatever_happens(stage: int) -> None:
    engine = start(stage, **fp16(loss_scale=64, loss_scale_window=1))
    for gradient in (0.25, INF, INF, 0.25, 0.25):
        micro_step(engine, gradient)
        assert engine.loss_scale == 64.0
    assert engine.skipped_steps == 2
    assert weights_of(engine)["weight"].tolist() == [0.25] * 3


def directly(engine: Any, x: Tensor) -> Tensor:
    return engine.module.head(x)


def by_a_function(engine: Any, x: Tensor) -> Tensor:
    return torch.func.functional_call(engine.module.head, {}, (x,))


@pytest.mark.parametrize("forward", [directly, by_a_function])
@on_ranks(1)
def test_a_plain_backward_that_bypasses_the_outputs_of_the_engine_is_refused(
    forward: Callable[[Any, Tensor], Tensor],
) -> None:
    engine = start(0, Net(), **fp16())
    loss = forward(engine, torch.ones(2, 4, dtype=HALF)).float().sum()
    loss.backward()
    asks = r"without loss scaling(.|\n)*hint: compute the loss from the result of engine"
    with pytest.raises(UsageError, match=asks):
        engine.step()
    before = weights_of(engine)
    engine.backward(engine(torch.ones(2, 4, dtype=HALF)).float().sum())
    engine.step()
    assert not torch.equal(weights_of(engine)["head.bias"], before["head.bias"])


@pytest.mark.parametrize("backward", ["engine", "loss"])
@on_ranks(2, STAGES)
def test_the_gradient_is_the_same_at_every_scale(backward: str, stage: int) -> None:
    for scale in (1, 64, 1024):
        engine = start(stage, gradient_accumulation_steps=2, **fp16(loss_scale=scale))
        for gradient in (0.25, 0.75):
            loss = engine(torch.tensor(gradient, dtype=HALF)).sum()
            if backward == "engine":
                engine.backward(loss)
            else:
                loss.backward()
            engine.step()
        assert weights_of(engine)["weight"].tolist() == [0.5] * 3


# Overflow elsewhere -----------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [INF, float("nan")])
@on_ranks(2, STAGES)
def test_bf16_skips_a_step_whose_gradient_is_not_finite(gradient: float, stage: int) -> None:
    engine = start(stage, bf16={"enabled": True})
    for each in (0.25, gradient, 0.25):
        micro_step(engine, each)
    assert (engine.global_steps, engine.skipped_steps, engine.loss_scale) == (3, 1, 1.0)
    assert weights_of(engine)["weight"].tolist() == [0.5] * 3


@on_ranks(1)
def test_bf16_without_check_grad_overflow_makes_every_step() -> None:
    engine = start(0, bf16={"enabled": True, "check_grad_overflow": False})
    micro_step(engine, INF)
    assert engine.was_step_applied()
    assert engine.skipped_steps == 0
    assert not torch.isfinite(weights_of(engine)["weight"]).any()


# What is cast -----------------------------------------------------------------------------------


@on_ranks(2, STAGES)
def test_auto_cast_casts_floating_point_inputs_wherever_they_are(stage: int) -> None:
    class Nested(Weight):
        def forward(self, batch: dict[str, Any], *, scale: Tensor) -> Tensor:
            x, ids = batch["pair"]
            assert (x.dtype, scale.dtype, ids.dtype) == (HALF, HALF, torch.int64)
            return self.weight * x * scale * ids

    engine = start(stage, Nested(), **fp16(auto_cast=True))
    ids = torch.ones((), dtype=torch.int64)
    engine.backward(engine({"pair": (torch.ones(()), ids)}, scale=torch.tensor(0.5)).sum())
    engine.step()
    assert weights_of(engine)["weight"].tolist() == [0.5] * 3


@pytest.mark.parametrize(
    ("block", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)], ids=["fp16", "bf16"]
)
@on_ranks(1)
def test_parameters_are_cast_and_buffers_and_master_weights_are_not(
    block: str, dtype: torch.dtype
) -> None:
    class WithBuffer(Weight):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.ones(3))

    engine = start(0, WithBuffer(), **{block: {"enabled": True}})
    assert engine.module.weight.dtype == dtype
    assert engine.module.mean.dtype == torch.float32
    slices = [p for group in engine.optimizer.param_groups for p in group["params"]]
    assert [piece.dtype for piece in slices] == [torch.float32]
