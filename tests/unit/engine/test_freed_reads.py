"""Stage 3: code that reads a parameter of a module that is not running."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zeroshard
from unit.engine.small import LR, STAGES, Block, Net, batch, loss_of, make, on_ranks, weights_of
from zeroshard import UsageError, zero


class Reader(Net):
    """Reads a weight of its first block after both blocks have run."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x + F.linear(x, self.blocks[0].up.weight).mean())


class ReadingBlock(Block):
    """Reads the weights of another block."""

    other: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ self.other[0].down.weight @ self.other[0].up.weight


class BlockReader(Net):
    """Its second block reads the first."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1] = ReadingBlock()
        self.blocks[1].load_state_dict(Net(seed=1).blocks[1].state_dict())
        self.blocks[1].other = (self.blocks[0],)  # in a tuple, so not a child of two modules


class SilentReader(Net):
    """Reads a weight that is used elsewhere, in a way that an empty tensor survives."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.blocks[0].up.weight.sum()


class SilentUser(Net):
    """Uses a weight in such a way, and the block that holds it not at all."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks[1](x)) + self.blocks[0].up.weight.sum()


def plain_weights(build: Callable[[], Net], steps: int) -> dict[str, Tensor]:
    model = build()
    for number in range(steps):
        loss_of(model, number).backward()
        with torch.no_grad():
            for param in model.parameters():
                param -= LR * param.grad if param.grad is not None else 0
        model.zero_grad()
    return {name: param.detach() for name, param in model.named_parameters()}


def train_and_compare(engine: Any, build: Callable[[], Net]) -> None:
    for number in range(3):
        engine.backward(loss_of(engine, number))
        engine.step()
    want = plain_weights(build, 3)
    for name, weight in weights_of(engine).items():
        torch.testing.assert_close(weight, want[name], rtol=1e-5, atol=1e-6)


def reader_of(model: nn.Module) -> nn.Module:
    return model.blocks[1] if isinstance(model, BlockReader) else model


def start(build: Callable[[], Net]) -> Any:
    """An engine at stage 3 that gathers whole blocks."""
    return make(3, build(), zeroshard={"units": ["blocks.0", "blocks.1", "head"]})


@pytest.mark.parametrize("build", [Reader, BlockReader])
@pytest.mark.parametrize("train", [True, False])
@on_ranks(2)
def test_reading_a_weight_of_another_block_says_what_to_do(
    build: Callable[[], Net], train: bool
) -> None:
    engine = start(build)
    with torch.set_grad_enabled(train), pytest.raises(UsageError) as raised:
        engine(batch(0))
    fact, hint = str(raised.value).split("\n\nhint: ")
    assert re.match(r"blocks\.0\.(up|down)\.weight was read while its unit is freed", fact)
    assert "its data lives in 2 shards" in fact
    assert "zeroshard.gathered(...)" in hint
    assert "zeroshard.register_external_parameter(module, parameter)" in hint


@pytest.mark.parametrize("build", [Reader, BlockReader])
@on_ranks(2)
def test_a_declared_reader_trains_as_in_plain_pytorch(build: Callable[[], Net]) -> None:
    engine = start(build)
    model = engine.module
    for param in model.blocks[0].parameters():
        zeroshard.register_external_parameter(reader_of(model), param)
    train_and_compare(engine, build)


@pytest.mark.parametrize("build", [Reader, BlockReader])
@on_ranks(2)
def test_a_reader_may_be_declared_after_the_first_failure(build: Callable[[], Net]) -> None:
    engine = start(build)
    model = engine.module
    with pytest.raises(UsageError):
        engine(batch(0))
    for param in model.blocks[0].parameters():
        zeroshard.register_external_parameter(reader_of(model), param)
    train_and_compare(engine, build)


@pytest.mark.parametrize("build", [Reader, BlockReader, SilentReader, SilentUser])
@on_ranks(2, STAGES[:3])
def test_where_parameters_stay_any_module_may_read_them(
    build: Callable[[], Net], stage: int
) -> None:
    train_and_compare(make(stage, build()), build)


@pytest.mark.parametrize("build", [SilentReader, SilentUser])
@on_ranks(2)
def test_a_read_that_an_empty_tensor_would_survive_is_refused_too(build: Callable[[], Net]) -> None:
    asks = r"blocks\.0\.up\.weight was read while its unit is freed(.|\n)*hint: wrap the read"
    with pytest.raises(UsageError, match=asks):
        loss_of(start(build))


@on_ranks(2)
def test_layers_that_are_units_of_their_own_may_be_read_by_any_module() -> None:
    """Such reads are seen, so there is nothing to declare."""
    names = [f"blocks.{block}.{layer}" for block in (0, 1) for layer in ("up", "down")]
    for build in (Reader, BlockReader, SilentReader, SilentUser):
        engine = make(3, build(), zeroshard={"units": [*names, "head"]})
        train_and_compare(engine, build)


@pytest.mark.parametrize("build", [Reader, SilentReader, BlockReader])
@on_ranks(2, STAGES)
def test_a_reader_may_be_declared_before_there_is_an_engine(
    build: Callable[[], Net], stage: int
) -> None:
    def declaring() -> Net:
        model = build()
        for param in model.blocks[0].parameters():
            zeroshard.register_external_parameter(reader_of(model), param)
        return model

    train_and_compare(make(stage, declaring()), declaring)


@on_ranks(2)
def test_a_declaration_that_is_taken_back_counts_no_more() -> None:
    engine = start(Reader)
    model = engine.module
    params = list(model.blocks[0].up.parameters())
    for param in params:
        zeroshard.register_external_parameter(model, param)
    loss_of(engine)
    zero.unregister_external_parameter(model, params[0])
    loss_of(engine)  # the other one is of the same unit
    zero.unregister_external_parameter(model, params[1])
    with pytest.raises(UsageError, match=r"blocks\.0\.up\.weight was read"):
        loss_of(engine)


def test_only_what_was_declared_can_be_taken_back() -> None:
    model = Net()
    with pytest.raises(UsageError, match="is not registered as an external one of the Net"):
        zero.unregister_external_parameter(model, model.head.weight)
    with pytest.raises(UsageError, match="given as a Net and a Tensor"):
        zero.register_external_parameter(model, torch.ones(1))  # type: ignore[arg-type]


def mistaken_shape(engine: Any) -> None:
    engine(torch.ones(2, 5))


def mistaken_dtype(engine: Any) -> None:
    engine(torch.ones(2, 4, dtype=torch.float64))


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))


def one_layer() -> nn.Module:
    return nn.Linear(4, 3)


def sequence_of_blocks() -> nn.Module:
    return nn.Sequential(Block(), Block())


class KeepsALoss(Net):
    """The head keeps a loss that it computes after its output."""

    class Head(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            self.kept = super().forward(torch.tanh(x)).square().mean()
            return out

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.head = self.Head(4, 3)


@on_ranks(2)
def test_a_loss_that_is_kept_instead_of_returned_is_blamed_on_the_parameters_it_needs() -> None:
    engine = make(3, KeepsALoss(), zeroshard={"units": ["Block", "head"]})
    engine(torch.ones(2, 4))
    with pytest.raises(UsageError, match=r"one of: head\.weight\)\.(.|\n)*as an output"):
        engine.backward(engine.module.head.kept)


@on_ranks(2)
def test_a_freed_parameter_in_a_list_is_named() -> None:
    engine = make(3)
    with pytest.raises(UsageError, match=r"blocks\.0\.up\.weight was read"):
        torch.cat([torch.ones(6, 4), engine.module.blocks[0].up.weight])


@pytest.mark.parametrize("mistake", [mistaken_shape, mistaken_dtype])
@pytest.mark.parametrize(
    "build",
    [
        Net,
        sequence_of_blocks,
        one_layer,
        sequential,
    ],
)
@on_ranks(2)
def test_another_mistake_is_not_blamed_on_a_freed_parameter(
    build: Callable[[], nn.Module], mistake: Callable[[Any], None]
) -> None:
    engine = make(3, build())
    with pytest.raises(RuntimeError, match="mat1 and mat2") as raised:
        mistake(engine)
    assert not isinstance(raised.value, UsageError)
