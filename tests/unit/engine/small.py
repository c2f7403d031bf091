"""A model of two blocks and a head, engines around it, and whole tests that run on forked ranks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import zeroshard
from forked import run_ranks

__all__ = [
    "LR",
    "STAGES",
    "Block",
    "Bomb",
    "InjectedError",
    "Net",
    "assert_equal_weights",
    "batch",
    "config_of",
    "config_without",
    "loss_of",
    "make",
    "on_ranks",
    "plain_weights",
    "train",
    "weights_of",
]

Test = Callable[..., None]

LR = 0.125
STAGES = (0, 1, 2, 3)


def on_ranks(world: int, stages: Sequence[int] = ()) -> Callable[[Test], Test]:
    """Run a test on so many forked ranks; fixtures and parameters arrive there too.

    A test that takes a ``stage`` runs for one after another in the same ranks.
    """

    def decorate(test: Test) -> Test:
        def run_all(*args: Any, **kwargs: Any) -> None:
            for stage in stages:
                try:
                    test(*args, stage=stage, **kwargs)
                except Exception as error:
                    raise AssertionError(f"at stage {stage}: {error}") from error

        def run(*args: Any, **kwargs: Any) -> None:
            run_ranks(lambda *_: (run_all if stages else test)(*args, **kwargs), world)

        functools.update_wrapper(run, test)
        # What pytest has to supply.
        given = dict(inspect.signature(test).parameters)
        if stages:
            del given["stage"]
        run.__signature__ = inspect.Signature(list(given.values()))
        return run

    return decorate


class Block(nn.Module):
    """Two layers and a shortcut."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 6), nn.Linear(6, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Two blocks, which are units of their own, and a head. Equal seeds make equal weights."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.blocks = nn.ModuleList([Block(), Block()])
            self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class InjectedError(Exception):
    """What a test makes a backward raise."""


class Bomb(torch.autograd.Function):
    """Identity that raises in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise InjectedError("boom")


def batch(number: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Two samples for :class:`Net`, others for each number."""
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(number)).to(dtype)


def loss_of(model: Callable[[Tensor], Tensor], number: int = 0) -> Tensor:
    """A loss that depends on all weights."""
    return (model(batch(number)) - 1).square().mean()


def config_of(stage: int = 0, **more: Any) -> dict[str, Any]:
    """A configuration with plain SGD, no clipping and one micro-step per step, unless told so."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "SGD", "params": {"lr": LR}},
        **more,
    }


def make(stage: int = 0, model: nn.Module | None = None, **more: Any) -> Any:
    """Make an engine; ``more`` are keys of the configuration."""
    config = config_of(stage, **more)
    return zeroshard.initialize(model=Net() if model is None else model, config=config)[0]


def weights_of(model: nn.Module) -> Mapping[str, Tensor]:
    """Copies of all parameters in full; every rank calls it."""
    module = model.module if isinstance(model, zeroshard.Engine) else model
    with zeroshard.gathered(module):
        return {name: param.detach().clone() for name, param in module.named_parameters()}


def config_without(key: str, stage: int = 0) -> dict[str, Any]:
    """The configuration of :func:`config_of` without one of its keys."""
    return {name: value for name, value in config_of(stage).items() if name != key}


def train(engine: Any, steps: int = 2) -> None:
    """Take the first so many steps."""
    for number in range(steps):
        engine.backward(loss_of(engine, number))
        engine.step()


def plain_weights(make_optimizer: Callable[[Net], torch.optim.Optimizer]) -> dict[str, Tensor]:
    """What the first two steps make of a new model in plain PyTorch."""
    model = Net()
    optimizer = make_optimizer(model)
    for number in range(2):
        optimizer.zero_grad()
        loss_of(model, number).backward()
        optimizer.step()
    return {name: param.detach() for name, param in model.named_parameters()}


def assert_equal_weights(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Weights may differ by rounding."""
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-6, atol=1e-7)
