"""Optimizers that look beyond one element, and Lion, on parameters cut at odd places.

The gradients of the model are whole numbers that the batches hold, all multiples of six. So the
mean over up to three ranks and two micro-steps is exact in any order, and a sharded run may differ
from plain torch by the rounding of the optimizer's own arithmetic only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import zeroshard
from forked import run_ranks
from zeroshard.core import collectives
from zeroshard.optim import Lamb, Lion, Muon, muon_groups

Config = dict[str, Any]
Weights = dict[str, Tensor]

STAGES = (0, 1, 2, 3)
STEPS, ACCUMULATION = 4, 2
NUMEL = 40  # elements of a batch; as many as the largest parameter has


class Part(nn.Module):
    """Parameters of awkward sizes, each multiplied with a piece of the batch."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)

    def forward(self, batch: Tensor) -> Tensor:
        total = batch.new_zeros(())
        for index, weight in enumerate(self.weights):
            total = total + (weight * batch[index : index + weight.numel()].view_as(weight)).sum()
        return total


class Model(nn.Module):
    """Units with several matrices, with one, with none, and with frozen weights; an embedding."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.embedding = nn.Embedding(3, 5)
            self.parts = nn.ModuleList(
                [
                    Part((5, 3), (7,), (3, 5), (1,), (2, 3, 2)),
                    Part((8, 5)),
                    Part((3,), (1, 1), (0, 4)),
                    Part((4, 4), (4,)),
                    Part((), (3, 3)),
                ]
            )
        self.parts[3].requires_grad_(False)

    def forward(self, batch: Tensor) -> Tensor:
        total = (self.embedding.weight * batch[:15].view(3, 5)).sum()
        for part in self.parts:
            total = total + part(batch)
        return total


def batch_of(step: int, micro: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    return 6.0 * torch.randint(-8, 9, (NUMEL,), generator=generator)


def groups(model: Model) -> list[dict[str, Any]]:
    """Two groups that share a unit; frozen weights are in one of them, where they stay still."""
    first = [*model.parts[0].weights][:3]
    rest = [param for param in model.parameters() if all(param is not other for other in first)]
    return [{"params": first, "lr": 0.05, "weight_decay": 0.25}, {"params": rest}]


def config_of(stage: int, **more: Any) -> Config:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 0,
        "zero_optimization": {"stage": stage},
        "zeroshard": {"units": ["Part"]},
        **more,
    }


def weights_of(engine: Any) -> Weights:
    with zeroshard.gathered(engine.module):
        return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def train(engine: Any, rank: int, steps: Iterable[int] = range(STEPS)) -> None:
    for step in steps:
        for micro in range(ACCUMULATION):
            engine.backward(engine(batch_of(step, micro, rank)))
            engine.step()


def plain_train(
    model: Model, optimizers: list[torch.optim.Optimizer], world: int, clip: float = 0.0
) -> Weights:
    for step in range(STEPS):
        for param in model.parameters():
            param.grad = torch.zeros_like(param) if param.requires_grad else None
        for micro in range(ACCUMULATION):
            for rank in range(world):
                (model(batch_of(step, micro, rank)) / (world * ACCUMULATION)).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        for optimizer in optimizers:
            optimizer.step()
    return {name: param.detach() for name, param in model.named_parameters()}


def assert_equal(got: Weights, want: Weights, tolerance: float = 1e-6) -> None:
    assert got.keys() == want.keys()
    for name, weight in want.items():
        torch.testing.assert_close(
            got[name],
            weight,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, n=name: f"{n}: {text}",
        )


OPTIONS: dict[str, dict[str, Any]] = {
    "Lion": {"lr": 0.01, "betas": [0.5, 0.75], "weight_decay": 0.125},
    "Lamb": {"lr": 0.01, "betas": [0.5, 0.75], "weight_decay": 0.125, "max_coeff": 1.5},
    "Muon": {"lr": 0.02, "adam_lr": 0.01, "momentum": 0.5, "weight_decay": 0.125, "eps": 1e-3},
}
PLAIN: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Lion": lambda model, **options: Lion(groups(model), **options),
    "Lamb": lambda model, **options: Lamb(groups(model), **options),
    "Muon": lambda model, **options: Muon(muon_groups(groups(model), model), **options),
}


def make_plain(name: str, model: Model) -> torch.optim.Optimizer:
    return PLAIN[name](model, **OPTIONS[name])


def make_engine(name: str, stage: int, given: str = "by name", **more: Any) -> Any:
    model = Model()
    if given == "by name":
        config = config_of(stage, optimizer={"type": name, "params": OPTIONS[name]}, **more)
        return zeroshard.initialize(model=model, model_parameters=groups(model), config=config)[0]
    optimizer = make_plain(name, model)
    return zeroshard.initialize(model=model, optimizer=optimizer, config=config_of(stage, **more))[
        0
    ]


# Numbers ----------------------------------------------------------------------------------------


def compare_with_plain(name: str, rank: int, world: int) -> None:
    reference = Model()
    want = plain_train(reference, [make_plain(name, reference)], world)
    for stage in STAGES:
        engine = make_engine(name, stage, "by name" if stage % 3 == 0 else "as an object")
        train(engine, rank)
        assert_equal(weights_of(engine), want)
        engine.destroy()


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_steps_on_shards_are_those_on_whole_parameters(name: str, world: int) -> None:
    run_ranks(partial(compare_with_plain, name), world)


def lamb_by_hand(model: Model, world: int) -> Weights:
    """LAMB as its paper states it, on one whole tensor after another, in fp64."""
    beta1, beta2 = OPTIONS["Lamb"]["betas"]
    of_first = {id(param) for param in groups(model)[0]["params"]}
    weights: Weights = {}
    for name, param in model.named_parameters():
        weight = param.detach().double()
        average, square = torch.zeros_like(weight), torch.zeros_like(weight)
        lr, decay = (0.05, 0.25) if id(param) in of_first else (0.01, 0.125)
        for step in range(STEPS if param.requires_grad else 0):
            grad = mean_gradient(model, name, step, world)
            average = beta1 * average + (1 - beta1) * grad
            square = beta2 * square + (1 - beta2) * grad**2
            direction = average / (1 - beta1 ** (step + 1))
            direction = direction / ((square / (1 - beta2 ** (step + 1))).sqrt() + 1e-8)
            direction = direction + decay * weight
            trust = 1.0
            if weight.norm() > 0 and direction.norm() > 0:
                trust = min(max(float(weight.norm() / direction.norm()), 0.01), 1.5)
            weight = weight - lr * trust * direction
        weights[name] = weight.float()
    return weights


def mean_gradient(model: Model, name: str, step: int, world: int) -> Tensor:
    """The gradient, read off the batches: they hold it."""
    param = model.get_parameter(name)
    start = int(name.rpartition(".")[2]) if name.startswith("parts") else 0
    pieces = [
        batch_of(step, micro, rank)[start : start + param.numel()]
        for micro in range(ACCUMULATION)
        for rank in range(world)
    ]
    return (torch.stack(pieces).double().sum(0) / len(pieces)).view(param.shape)


def compare_lamb_with_its_paper(rank: int, world: int) -> None:
    want = lamb_by_hand(Model(), world)
    for stage in STAGES:
        engine = make_engine("Lamb", stage)
        train(engine, rank)
        assert_equal(weights_of(engine), want, 1e-5)  # fp32 against fp64, over four steps
        engine.destroy()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_lamb_on_shards_follows_its_paper(world: int) -> None:
    run_ranks(compare_lamb_with_its_paper, world)


def compare_muon_with_torchs(rank: int, world: int) -> None:
    """Torch's Muon on the matrices and torch's AdamW on the rest, group by group."""
    model = Model()
    optimizers: list[torch.optim.Optimizer] = []
    for group in muon_groups(groups(model), model):
        params = [param for param in group["params"] if param.requires_grad]
        decay = group.get("weight_decay", 0.125)
        if not group["use_muon"]:
            lr = group.get("lr", 0.01)
            adamw = torch.optim.AdamW(
                params, lr=lr, betas=(0.9, 0.95), eps=1e-3, weight_decay=decay
            )
            optimizers.append(adamw)
            continue
        # It takes matrices only, and sees a tensor of more dimensions as one.
        flat = [param for param in params if param.dim() == 2 and param.numel()]
        lr = group.get("lr", 0.02)
        optimizers.append(torch.optim.Muon(flat, lr=lr, momentum=0.5, weight_decay=decay))
    want = plain_train(model, optimizers, world)
    for stage in STAGES:
        engine = make_engine("Muon", stage)
        train(engine, rank)
        got = weights_of(engine)
        del got["parts.0.weights.4"]
        assert_equal(got, {name: weight for name, weight in want.items() if name in got})
        engine.destroy()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon since 2.9")
@pytest.mark.parametrize("world", [2, 3])
def test_muon_on_shards_makes_the_steps_of_torchs_muon_and_adamw(world: int) -> None:
    run_ranks(compare_muon_with_torchs, world)


def clip_and_compare(name: str, rank: int, world: int) -> None:
    reference = Model()
    want = plain_train(reference, [make_plain(name, reference)], world, clip=1.0)
    engine = make_engine(name, 3, gradient_clipping=1.0)
    train(engine, rank)
    # Clipped gradients are no whole numbers any more, and Muon looks at them in bf16.
    assert_equal(weights_of(engine), want, 1e-6 if name != "Muon" else 2.0**-8)


@pytest.mark.parametrize("name", OPTIONS)
def test_clipping_comes_before_the_step(name: str) -> None:
    run_ranks(partial(clip_and_compare, name), 2)


def check_ranks_agree(name: str, rank: int, world: int) -> None:
    engine = make_engine(name, 2)
    train(engine, rank)
    for key, weight in weights_of(engine).items():
        least, most = weight.clone(), weight.clone()
        dist.all_reduce(least, dist.ReduceOp.MIN)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        assert torch.equal(least, most), key


@pytest.mark.parametrize("name", OPTIONS)
def test_all_ranks_hold_the_same_bits_afterwards(name: str) -> None:
    run_ranks(partial(check_ranks_agree, name), 3)


def train_with_state(name: str, rank: int, world: int) -> None:
    def warm_up() -> tuple[Model, torch.optim.Optimizer]:
        model = Model()
        optimizer = make_plain(name, model)
        model(batch_of(99, 0, 0)).backward()
        optimizer.step()
        return model, optimizer

    reference, plain = warm_up()
    want = plain_train(reference, [plain], world)
    for stage in (1, 3):
        model, optimizer = warm_up()
        config = config_of(stage)
        engine = zeroshard.initialize(model=model, optimizer=optimizer, config=config)[0]
        train(engine, rank)
        assert_equal(weights_of(engine), want)
        engine.destroy()


@pytest.mark.parametrize("name", OPTIONS)
def test_an_optimizer_that_has_stepped_before_goes_on(name: str) -> None:
    run_ranks(partial(train_with_state, name), 2)


# Communication ----------------------------------------------------------------------------------


class Counts:
    """How many collectives of each kind were started."""

    def __init__(self) -> None:
        self.reduced = self.gathered = 0
        self._all_reduce, self._gather = dist.all_reduce, collectives._gather_op
        dist.all_reduce = self.all_reduce
        collectives._gather_op = self.gather

    def all_reduce(self, *args: Any, **kwargs: Any) -> Any:
        self.reduced += 1
        return self._all_reduce(*args, **kwargs)

    def gather(self, *args: Any, **kwargs: Any) -> Any:
        self.gathered += 1
        return self._gather(*args, **kwargs)


def count_collectives(stage: int, rank: int, world: int) -> dict[str, tuple[int, int]]:
    counts = Counts()  # the process ends with the test
    found = {}
    for name in OPTIONS:
        engine = make_engine(name, stage)
        before = counts.reduced, counts.gathered
        train(engine, rank)
        found[name] = counts.reduced - before[0], counts.gathered - before[1]
        engine.destroy()
    return found


@pytest.mark.parametrize("stage", [1, 3])
def test_a_step_adds_one_all_reduce_for_lamb_and_one_gather_per_unit_of_matrices_for_muon(
    stage: int,
) -> None:
    for found in run_ranks(partial(count_collectives, stage), 3):
        reduced, gathered = found["Lion"]
        assert found["Lamb"] == (reduced + STEPS, gathered)
        # Four of the five trained units have matrices for Muon; the embedding is none of them.
        assert found["Muon"] == (reduced, gathered + 4 * STEPS)


# Overflow ---------------------------------------------------------------------------------------


def skip_a_step(name: str, rank: int, world: int) -> None:
    fp16 = {"enabled": True, "initial_scale_power": 2, "hysteresis": 1, "auto_cast": True}
    engines = [make_engine(name, 3, fp16=fp16) for _ in range(2)]
    train(engines[0], rank, [0])
    for micro in range(ACCUMULATION):
        batch = batch_of(7, micro, rank)
        if rank == 1 and micro == 0:
            batch[0] = math.inf  # on one rank, in one micro-step, in a parameter of one unit
        engines[0].backward(engines[0](batch))
        engines[0].step()
    assert engines[0].skipped_steps == 1
    assert engines[0].loss_scale == 2
    train(engines[0], rank, [1])
    train(engines[1], rank, [0, 1])
    assert engines[1].skipped_steps == 0
    assert_equal(weights_of(engines[0]), weights_of(engines[1]), 0.0)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_skipped_for_an_overflow_on_one_rank_leaves_no_trace_on_any(name: str) -> None:
    run_ranks(partial(skip_a_step, name), 3)
