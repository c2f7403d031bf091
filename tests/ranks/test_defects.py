"""Defects that other implementations of ZeRO have had, and that must not appear here."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import zeroshard
from forked import run_ranks

Config = dict[str, Any]
every_stage = pytest.mark.parametrize("stage", [0, 1, 2, 3])
halves = pytest.mark.parametrize("precision", ["bf16", "fp16"])
precisions = pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
BACKWARDS = ("engine", "loss")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TINY = 2.0**-26  # the smallest number that fp16 has is 2**-24

backwards = pytest.mark.parametrize("backward", BACKWARDS)


class Weight(nn.Module):
    """A weight times a number, its gradient, which is rounded to the dtype of the weight."""

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), start))

    def forward(self, gradient: float) -> Tensor:
        return self.weight * torch.tensor(gradient, dtype=self.weight.dtype)


class Weights(nn.Module):
    """Some weights, each a layer of its own; those whose gradient is given are used."""

    def __init__(self, count: int = 2, start: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Weight(start) for _ in range(count)])

    def forward(self, gradients: list[float | None]) -> Tensor:
        terms = [
            layer(gradient).sum()
            for layer, gradient in zip(self.layers, gradients, strict=True)
            if gradient is not None
        ]
        return torch.stack(terms).sum()


def make(model: nn.Module, stage: int, **more: Any) -> Any:
    """An engine with plain SGD and a learning rate of one, so gradients can be read off weights."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
        **more,
    }
    return zeroshard.initialize(model=model, config=config)[0]


def fp16(scale: float = 0, **more: Any) -> Config:
    return {"fp16": {"enabled": True, "loss_scale": scale, **more}}


def block_of(precision: str, scale: float = 64) -> Config:
    if precision == "fp16":
        return fp16(scale)
    return {"bf16": {"enabled": True}} if precision == "bf16" else {}


def weights_of(engine: Any) -> list[Tensor]:
    with zeroshard.gathered(engine.module):
        return [param.detach().clone() for param in engine.module.parameters()]


def values_of(engine: Any) -> list[float]:
    """The value that all elements of each parameter have."""
    values = []
    for weight in weights_of(engine):
        first = weight.flatten()[0]
        assert torch.equal(weight, first.expand_as(weight))
        values.append(first.item())
    return values


def train_step(engine: Any, loss: Tensor, backward: str = "engine") -> None:
    if backward == "engine":
        engine.backward(loss)
    else:
        loss.backward()
    engine.step()


# A parameter that is not used -------------------------------------------------------------------


@every_stage
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_weight_unused_in_one_step_does_not_take_the_last_gradient_again(
    accumulation: int, stage: int
) -> None:
    def work(rank: int, world: int) -> list[list[float]]:
        engine = make(Weights(), stage, gradient_accumulation_steps=accumulation)
        seen = []
        for gradients in ([1.0, 2.0], [1.0, None], [None, 2.0], [1.0, 2.0]):
            for _ in range(accumulation):
                train_step(engine, engine(gradients))
            seen.append(values_of(engine))
        return seen

    want = [[-1.0, -2.0], [-2.0, -2.0], [-2.0, -4.0], [-3.0, -6.0]]
    assert run_ranks(work) == [want, want]


@every_stage
def test_a_weight_unused_in_one_step_of_a_unit_that_is_used_stays(stage: int) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Weights()

        def forward(self, gradients: list[float | None]) -> Tensor:
            return self.inner(gradients)

    def work(rank: int, world: int) -> list[list[float]]:
        engine = make(Outer(), stage, zeroshard={"units": ["Weights"]})
        seen = []
        for gradients in ([1.0, 2.0], [1.0, None], [None, 2.0]):
            train_step(engine, engine(gradients))
            seen.append(values_of(engine))
        return seen

    want = [[-1.0, -2.0], [-2.0, -2.0], [-2.0, -4.0]]
    assert run_ranks(work) == [want, want]


@every_stage
def test_a_weight_unused_on_one_rank_takes_its_share_of_the_gradient_of_the_other(
    stage: int,
) -> None:
    def work(rank: int, world: int) -> list[list[float]]:
        engine = make(Weights(), stage)
        seen = []
        for _ in range(2):
            train_step(engine, engine([1.0, 2.0 if rank == 0 else None]))
            seen.append(values_of(engine))
        train_step(engine, engine([1.0, None]))
        return [*seen, values_of(engine)]

    want = [[-1.0, -1.0], [-2.0, -2.0], [-3.0, -2.0]]
    assert run_ranks(work) == [want, want]


@every_stage
def test_a_weight_unused_in_one_micro_step_keeps_the_gradient_of_the_others(stage: int) -> None:
    def work(rank: int, world: int) -> list[float]:
        engine = make(Weights(), stage, gradient_accumulation_steps=4)
        for _ in range(2):
            for gradients in ([1.0, 8.0], [1.0, None], [1.0, 4.0], [1.0, None]):
                train_step(engine, engine(gradients))
        return values_of(engine)

    assert run_ranks(work) == [[-2.0, -6.0]] * 2


# The loss scale ---------------------------------------------------------------------------------


@every_stage
@pytest.mark.parametrize("clip", [0, 0.5])
def test_a_step_that_doubles_the_loss_scale_is_as_long_as_any_other(
    clip: float, stage: int
) -> None:
    """The scale that gradients are divided by is the one they were computed with."""

    def work(rank: int, world: int) -> tuple[list[float], list[float], list[float]]:
        scaler = fp16(initial_scale_power=3, loss_scale_window=1)
        engine = make(Weights(1), stage, gradient_clipping=clip, **scaler)
        scales, norms, positions = [], [], [0.0]
        for _ in range(6):
            train_step(engine, engine([0.25]))
            scales.append(engine.loss_scale)
            norms.append(engine.get_global_grad_norm().item())
            positions += values_of(engine)
        steps = [before - after for before, after in itertools.pairwise(positions)]
        return scales, norms, steps

    for scales, norms, steps in run_ranks(work):
        assert scales == [8.0, 16.0, 32.0, 64.0, 128.0, 256.0]
        assert norms == pytest.approx([0.25 * 3**0.5] * 6)
        # A norm below the limit is not clipped, whatever the scale.
        assert steps == [0.25] * 6


@every_stage
def test_the_loss_is_scaled_at_every_stage(stage: int) -> None:
    def work(rank: int, world: int) -> list[list[float]]:
        seen = []
        for scale, backward in itertools.product((1, 1024), BACKWARDS):
            engine = make(Weights(1), stage, **fp16(scale))
            for _ in range(2):
                train_step(engine, engine([0.125]), backward)
            seen.append(values_of(engine))
        return seen

    assert run_ranks(work) == [[[-0.25]] * 4] * 2


class Square(Weights):
    """The gradient of its weight is the square of a number that fp16 can hold."""

    def forward(self, gradients: list[float | None]) -> Tensor:
        return super().forward(gradients) * gradients[0]


@every_stage
def test_gradients_too_small_for_fp16_inside_the_model_reach_the_weights(stage: int) -> None:
    def work(rank: int, world: int) -> list[list[float]]:
        # The learning rate brings what arrives into the range of fp16.
        sgd = {"type": "SGD", "params": {"lr": 1 / TINY}}
        seen = []
        for backward in BACKWARDS:
            engine = make(Square(1), stage, optimizer=sgd, **fp16(2.0**15))
            train_step(engine, engine([TINY**0.5]), backward)
            seen.append(values_of(engine))
        return seen

    assert run_ranks(work) == [[[-1.0]] * 2] * 2


@every_stage
def test_gradients_too_small_for_fp16_outside_the_model_reach_the_weights(stage: int) -> None:
    """The gradient of a mean over many tokens is that small where it enters the model."""

    def work(rank: int, world: int) -> list[float]:
        sgd = {"type": "SGD", "params": {"lr": 1 / TINY}}
        engine = make(Weights(1), stage, optimizer=sgd, **fp16(2.0**15))
        train_step(engine, engine([1.0]).float() * TINY)
        return values_of(engine)

    assert run_ranks(work) == [[-1.0], [-1.0]]


@every_stage
@backwards
def test_a_loss_scale_beyond_the_range_of_fp16_works_where_the_gradient_is_within(
    backward: str, stage: int
) -> None:
    def work(rank: int, world: int) -> list[float]:
        engine = make(Weights(1), stage, **fp16(initial_scale_power=18))
        train_step(engine, engine([1.0]).float() * 2.0**-4, backward)
        assert engine.loss_scale == 2.0**18
        return values_of(engine)

    assert run_ranks(work) == [[-(2.0**-4)]] * 2


class Penalised(Weights):
    """Keeps a second loss where the training loop finds it, as mixtures of experts do."""

    penalty: Tensor

    def forward(self, gradients: list[float | None]) -> Tensor:
        self.penalty = self.layers[1](2.0).sum()
        return self.layers[0](1.0).sum()


@every_stage
def test_a_loss_kept_on_a_module_is_scaled_like_the_one_returned(stage: int) -> None:
    def work(rank: int, world: int) -> list[float]:
        engine = make(Penalised(), stage, **fp16(16))
        train_step(engine, engine([]) + engine.module.penalty)
        return values_of(engine)

    assert run_ranks(work) == [[-1.0, -2.0]] * 2


# Outputs that depend on other outputs -----------------------------------------------------------


class Derived(Weights):
    """Returns an output, one computed from it, and one computed from both."""

    def forward(self, gradients: list[float | None]) -> dict[str, Tensor]:
        first = self.layers[0](1.0)
        second = first + self.layers[1](1.0)
        return {"first": first, "second": second, "loss": (first + second).sum()}


@every_stage
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_outputs_derived_from_other_outputs_are_scaled_once(precision: str, stage: int) -> None:
    def work(rank: int, world: int) -> list[list[float]]:
        seen = []
        for accumulation, backward in itertools.product((1, 2, 4), BACKWARDS):
            steps = {"gradient_accumulation_steps": accumulation}
            engine = make(Derived(), stage, **steps, **block_of(precision))
            for _ in range(accumulation):
                out = engine([])
                loss = out["first"].sum() + out["second"].sum() + out["loss"]
                train_step(engine, loss, backward)
            seen.append(values_of(engine))
        return seen

    assert run_ranks(work) == [[[-4.0, -2.0]] * 6] * 2


class Affine(nn.Module):
    """Adds a weight to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


@every_stage
@backwards
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_result_that_is_the_next_input_is_scaled_once(
    precision: str, backward: str, stage: int
) -> None:
    """A model that is called on its own result, as recurrent ones are."""

    def work(rank: int, world: int) -> list[float]:
        engine = make(Affine(), stage, **block_of(precision, scale=16))
        x = torch.zeros(3, dtype=DTYPES[precision])
        for _ in range(3):
            x = engine(x)
        train_step(engine, x.sum(), backward)
        return values_of(engine)

    assert run_ranks(work) == [[-3.0], [-3.0]]


@every_stage
@backwards
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_result_that_is_the_input_of_another_engine_is_scaled_once(
    precision: str, backward: str, stage: int
) -> None:
    """A generator and its critic, each with a loss scale of its own."""

    def work(rank: int, world: int) -> list[float]:
        generator, critic = (make(Affine(), stage, **block_of(precision, s)) for s in (16, 64))
        x = torch.zeros(3, dtype=DTYPES[precision])
        train_step(critic, critic(generator(x)).sum(), backward)
        generator.step()
        return values_of(generator) + values_of(critic)

    assert run_ranks(work) == [[-1.0, -1.0]] * 2


# The start --------------------------------------------------------------------------------------


@every_stage
@precisions
def test_initialize_neither_moves_weights_nor_counts_as_a_step(precision: str, stage: int) -> None:
    options = {"lr": 0.125, "weight_decay": 1.0, "betas": [0.5, 0.5]}

    def plain() -> Tensor:
        weight = nn.Parameter(torch.ones(()))
        optimizer = torch.optim.AdamW([weight], **options)
        (weight * 0.5).backward()
        optimizer.step()
        return weight.detach()

    def work(rank: int, world: int) -> None:
        adamw = {"optimizer": {"type": "AdamW", "params": options}}
        engine = make(Weights(2, start=1.0), stage, **adamw, **block_of(precision))
        masters = [p for group in engine.optimizer.param_groups for p in group["params"]]
        assert values_of(engine) == [1.0, 1.0]
        assert not engine.optimizer.state
        assert all(torch.equal(master, torch.ones_like(master)) for master in masters)
        train_step(engine, engine([0.5, 0.5]))
        for master in masters:
            torch.testing.assert_close(master.detach(), plain().expand_as(master))
            assert int(engine.optimizer.state[master]["step"]) == 1

    run_ranks(work)


@every_stage
@halves
def test_master_weights_keep_the_digits_that_the_compute_dtype_cannot_hold(
    precision: str, stage: int
) -> None:
    ulp = torch.finfo(DTYPES[precision]).eps

    def work(rank: int, world: int) -> list[list[float]]:
        # Each of the two is rounded away on its own; together they are rounded up.
        engine = make(Weights(1, start=1 + 0.375 * ulp), stage, **block_of(precision))
        seen = [values_of(engine)]
        train_step(engine, engine([-0.25 * ulp]))
        return [*seen, values_of(engine)]

    assert run_ranks(work) == [[[1.0], [1 + ulp]]] * 2


# Accumulation -----------------------------------------------------------------------------------


@every_stage
@halves
def test_small_gradients_are_not_lost_beside_a_large_one(precision: str, stage: int) -> None:
    """Added up in half precision, all but the first would vanish."""
    count, small = 65, torch.finfo(DTYPES[precision]).eps / 4

    def work(rank: int, world: int) -> float:
        steps = {"gradient_accumulation_steps": count}
        engine = make(Weights(1), stage, **steps, **block_of(precision))
        for micro in range(count):
            train_step(engine, engine([1.0 if micro == 0 else small]))
        return engine.get_global_grad_norm().item()

    want = (1 + (count - 1) * small) / count * 3**0.5
    assert run_ranks(work) == pytest.approx([want] * 2, rel=1e-6)


@every_stage
@halves
def test_small_gradients_of_one_rank_are_not_lost_beside_large_ones_of_another(
    precision: str, stage: int
) -> None:
    small = torch.finfo(DTYPES[precision]).eps / 4

    def work(rank: int, world: int) -> float:
        engine = make(Weights(1), stage, **block_of(precision))
        train_step(engine, engine([1.0 if rank == 0 else small]))
        return engine.get_global_grad_norm().item()

    want = (1 + small) / 2 * 3**0.5
    assert run_ranks(work) == pytest.approx([want] * 2, rel=1e-6)


# Several engines, and the rest of the process ---------------------------------------------------


def test_engines_in_one_process_do_not_interfere() -> None:
    """Their steps take turns, in the middle of each other's accumulation."""
    kinds: list[tuple[int, float, Config]] = [
        (3, 0.5, fp16(initial_scale_power=3, loss_scale_window=1)),
        (3, 0.25, {"gradient_accumulation_steps": 3}),
        (2, 0.125, {"bf16": {"enabled": True}, "gradient_clipping": 0.25}),
        (0, 1.0, {"gradient_accumulation_steps": 2, **fp16(64)}),
    ]

    def start(stage: int, value: float, more: Config) -> Any:
        return make(Weights(2, value), stage, **more)

    def micro_step(engine: Any, number: int, rank: int) -> None:
        train_step(engine, engine([0.125 * (number % 4), 0.25 + 0.5 * rank]))

    def state(engine: Any) -> tuple[list[Tensor], float, int, int]:
        return weights_of(engine), engine.loss_scale, engine.global_steps, engine.skipped_steps

    def work(rank: int, world: int) -> None:
        alone = []
        for kind in kinds:
            engine = start(*kind)
            for number in range(6):
                micro_step(engine, number, rank)
            alone.append(state(engine))
        engines = [start(*kind) for kind in kinds]
        for number in range(6):
            for engine in engines:
                micro_step(engine, number, rank)
        for engine, (weights, *rest) in zip(engines, alone, strict=True):
            ours, *others = state(engine)
            assert others == rest
            assert all(torch.equal(a, b) for a, b in zip(ours, weights, strict=True))

    run_ranks(work)


def test_an_engine_patches_nothing_that_others_use() -> None:
    owners = (torch, Tensor, F, nn.Module, nn.Linear, torch.optim.Optimizer)

    def everything() -> dict[tuple[Any, str], Any]:
        return {(owner, name): value for owner in owners for name, value in vars(owner).items()}

    def work(rank: int, world: int) -> None:
        before = everything()
        engine = make(Weights(), 3, **fp16(16))
        train_step(engine, engine([1.0, 1.0]))
        after = everything()
        assert [key for key in before if after.get(key) is not before[key]] == []

    run_ranks(work)


# Data and backward ------------------------------------------------------------------------------


def test_every_epoch_of_the_loader_has_a_new_order() -> None:
    def work(rank: int, world: int) -> list[list[float]]:
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "SGD", "params": {"lr": 0.0}},
        }
        data = TensorDataset(torch.arange(16.0))
        loader = zeroshard.initialize(model=Weights(), training_data=data, config=config)[2]
        assert loader is not None
        return [[x.item() for (batch,) in loader for x in batch] for _ in range(3)]

    first, second = run_ranks(work)
    for ours, theirs in zip(first, second, strict=True):
        assert sorted(ours + theirs) == list(range(16))
    assert len({tuple(order) for order in first}) == 3


@every_stage
@precisions
def test_loss_backward_works_at_every_stage(precision: str, stage: int) -> None:
    def work(rank: int, world: int) -> list[float]:
        steps = {"gradient_accumulation_steps": 2}
        engine = make(Weights(), stage, **steps, **block_of(precision))
        for gradients in ([1.0, 2.0], [3.0, 4.0 + 4.0 * rank]):
            engine(gradients).backward()
            engine.step()
        return values_of(engine)

    assert run_ranks(work) == [[-2.0, -4.0]] * 2
