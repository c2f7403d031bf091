"""Blocks of an engine's model may be compiled, each class of them as one graph."""

from __future__ import annotations

import copy
import functools
import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import zeroshard
from unit.engine.small import Net, assert_equal_weights, batch, make, on_ranks, train, weights_of
from zeroshard import ConfigError, UsageError
from zeroshard.engine.compiled import Compiled

# Tracing looks at the gradient of every input, those that are no leaves included.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

Call = Callable[[nn.Module, Tensor], Tensor]

CALLS: dict[str, Call] = {
    "called": lambda block, x: block(x),
    "reentrant": lambda block, x: checkpoint(block, x, use_reentrant=True),
    "not reentrant": lambda block, x: checkpoint(block, x, use_reentrant=False),
    "zeroshard": zeroshard.checkpointing.checkpoint,
}


class Layer(nn.Module):
    """A block with a number of its own, and room for more to do."""

    def __init__(self, number: int = 0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return x + self.middle(self.down(torch.tanh(self.up(x))))

    def middle(self, x: Tensor) -> Tensor:
        return torch.dropout(x, 0.25, self.training)


class Reading(Layer):
    """Has the compiler read a number that is another in each block."""

    def middle(self, x: Tensor) -> Tensor:
        return x * (1 + self.number / 8)


class Deciding(Layer):
    """Reads a value, which no graph can."""

    def middle(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum().item() > 0 else x


class Looping(Layer):
    """Is given up by the compiler as a whole."""

    def middle(self, x: Tensor) -> Tensor:
        for _ in range(2):
            torch._dynamo.graph_break()
            x = torch.relu(x)
        return x


class Stack(nn.Module):
    """An embedding in front of many blocks, and a head."""

    def __init__(self, kind: type[Layer] = Layer, call: Call = CALLS["called"]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.entry = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([kind(number) for number in range(5)])
        self.head = nn.Linear(4, 3)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        for block in self.blocks:
            x = self.call(block, x) if self.training else block(x)
        return self.head(x)


@contextmanager
def messages() -> Iterator[list[str]]:
    """What is logged meanwhile."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("zeroshard")
    logger.addHandler(handler)
    try:
        yield told
    finally:
        logger.removeHandler(handler)


def steps(engine: Any, number: int = 2) -> None:
    """Steps of two micro-steps with dropout."""
    for step in range(number):
        torch.manual_seed(step)
        for micro in range(2):
            loss = (engine(batch(2 * step + micro)) - 1).square().mean()
            engine.backward(loss)
            engine.step()


RUNS = [(stage, "called") for stage in range(4)] + [
    (stage, name) for stage in (1, 3) for name in ("not reentrant", "zeroshard", "reentrant")
]


@on_ranks(2)
def test_all_blocks_of_all_stages_share_one_graph_also_with_checkpointing() -> None:
    backend = CompileCounterWithBackend("eager")
    graphs: list[int] = []
    for stage, name in sorted(RUNS, key=lambda run: run[1] == "reentrant"):
        accumulation = {"gradient_accumulation_steps": 2}
        eager = make(stage, Stack(call=CALLS[name]), **accumulation)
        engine = make(stage, Stack(call=CALLS[name]), **accumulation)
        engine.compile(backend)
        steps(engine)
        steps(eager)
        graphs.append(backend.frame_count)
        ours, theirs = weights_of(engine), weights_of(eager)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), (stage, name)
    with torch.no_grad():
        assert torch.equal(engine.eval()(batch(0)), eager.eval()(batch(0)))
    # Forward without gradients, as reentrant checkpointing and evaluation run it, is another graph.
    assert graphs == [1] * 8 + [2] * 2
    assert backend.frame_count == 3
    assert not torch._dynamo.utils.counters["graph_break"]


@on_ranks(2, (1, 3))
def test_blocks_are_compiled_by_the_configuration_until_the_engine_ends(stage: int) -> None:
    model, want = Stack(), dict(Stack().state_dict())
    with messages() as told:
        engine = make(stage, model, compile={"enabled": True, "backend": "eager"})
    (line,) = [text for text in told if "compil" in text]
    assert line.startswith("compiling 5 blocks of Layer as one with the backend eager")
    assert engine.is_compiled
    steps(engine)
    assert all(isinstance(block.forward, Compiled) for block in model.blocks)
    assert "forward" not in vars(model) | vars(model.head) | vars(model.entry)
    assert list(engine.module_state_dict() or want) == list(want) == list(model.state_dict())
    engine.destroy()
    assert not engine.is_compiled
    assert not any("forward" in vars(module) for module in model.modules())
    again = make(stage, model)
    assert not again.is_compiled
    steps(again)


@on_ranks(2)
def test_a_new_engine_takes_back_what_one_that_is_gone_has_compiled() -> None:
    model = Stack()
    engine = make(3, model, compile={"enabled": True, "backend": "eager"})
    del engine
    engine = make(3, model)
    assert not any("forward" in vars(module) for module in model.modules())
    engine.compile("eager")
    first = model.blocks[0].forward
    engine.compile("aot_eager")
    assert model.blocks[0].forward is not first
    engine.destroy()
    assert not any("forward" in vars(module) for module in model.modules())
    with pytest.raises(UsageError, match=r"engine.compile\(\) was called after"):
        engine.compile()


@on_ranks(2, (1, 3))
def test_a_compiled_model_is_copied_saved_and_resumed(stage: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "gradient_accumulation_steps": 2,
        "compile": {"enabled": True, "backend": "eager"},
    }
    engine = make(stage, Stack(), **settings)
    steps(engine)
    engine.eval()
    with torch.no_grad(), zeroshard.gathered(engine.module):
        want = engine.module(batch(0))
        twin = copy.deepcopy(engine.module)
        file = io.BytesIO()
        torch.save(engine.module.blocks[1], file)
        file.seek(0)
        block = torch.load(file, weights_only=False)
        assert block.forward.__self__ is block
        assert twin.blocks[1].forward.__self__ is twin.blocks[1]
        assert twin.blocks[1].forward.__func__ is Layer.forward
        assert torch.equal(twin(batch(0)), want)
        for weight in twin.blocks[0].parameters():
            weight.zero_()
        assert not torch.equal(twin(batch(0)), want)
    engine.save_checkpoint(tmp_path)
    engine.train()
    steps(engine)
    want = weights_of(engine)
    other = make(stage, Stack(), **settings)
    other.load_checkpoint(tmp_path)
    steps(other)
    assert_equal_weights(weights_of(other), want)


@on_ranks(2)
def test_a_model_is_compiled_whole_around_compiled_blocks() -> None:
    engine, other = make(3), make(3)
    engine.compile("eager")
    around = CompileCounterWithBackend("eager")
    engine.module.compile(backend=around)
    train(engine, 2)
    num_graphs = around.frame_count
    train(engine, 2)
    assert around.frame_count == num_graphs
    train(other, 2)
    train(other, 2)
    assert_equal_weights(weights_of(engine), weights_of(other))


@pytest.mark.parametrize("kind", [Deciding, Looping])
@on_ranks(1)
def test_blocks_that_are_not_one_graph_train_all_the_same_and_are_named(kind: type[Layer]) -> None:
    engine, other = make(3, Stack(kind)), make(3, Stack(kind))
    engine.compile("eager")
    with messages() as told:
        train(engine, 3)
    train(other, 3)
    assert_equal_weights(weights_of(engine), weights_of(other))
    (text,) = told
    assert text.startswith(f"{kind.__name__} (blocks.0) cannot be compiled as one graph")
    assert ("Tensor.item()" in text) == (kind is Deciding)


@on_ranks(1)
def test_blocks_that_are_compiled_one_by_one_are_named() -> None:
    engine = make(3, Stack(Reading))
    engine.compile("eager")
    with messages() as told:
        train(engine, 2)
    (text,) = told
    assert text.startswith("Reading is compiled anew for block after block (blocks.0, blocks.1,")


@on_ranks(1)
def test_blocks_that_reach_the_limit_of_the_compiler_are_named_and_run_uncompiled() -> None:
    engine, other = make(3, Stack()), make(3, Stack())
    backend = CompileCounterWithBackend("eager")
    engine.compile(backend)
    with messages() as told, torch._dynamo.config.patch(recompile_limit=1):
        for has_gradients in (False, True, True):
            with torch.set_grad_enabled(has_gradients):
                assert torch.equal(engine.eval()(batch(0)), other.eval()(batch(0)))
    (text,) = told
    assert text.startswith("Layer was compiled for as many kinds of inputs as")
    assert backend.frame_count == 1


@on_ranks(1)
def test_a_module_that_is_compiled_with_its_hooks_is_named() -> None:
    engine = make(3)
    for block in engine.module.blocks:
        block.compile(backend="eager")
    with messages() as told:
        train(engine, 2)
    (text,) = told
    assert text.startswith("Block was compiled together with the hooks")


@on_ranks(1)
def test_a_forward_that_was_put_in_place_is_compiled_and_comes_back() -> None:
    model, plain = Net(), Net()
    first, second = model.blocks
    own = first.forward

    def patched(x: Tensor) -> Tensor:
        return 2 * own(x)

    first.forward = patched
    engine = make(3, model)
    backend = CompileCounterWithBackend("eager")
    engine.compile(backend)
    compiled = second.forward
    second.forward = lambda x: 3 * compiled(x)  # put around the compiled one
    want = plain.head(3 * plain.blocks[1](2 * plain.blocks[0](batch(0))))
    assert torch.equal(engine(batch(0)), want)
    assert backend.frame_count == 2
    engine.destroy()
    assert first.forward is patched
    torch._dynamo.reset()
    assert torch.equal(model(batch(0)), want)
    assert backend.frame_count == 2


@on_ranks(2)
def test_what_torch_cannot_compile_with_is_refused_before_the_model_changes() -> None:
    model = Net()
    for block, text in (
        ({"backend": "inductr"}, r"no backend 'inductr'(.|\n)*inductor"),
        ({"kwargs": {"fulgraph": True}}, r"no argument 'fulgraph'(.|\n)*fullgraph"),
        ({"backend": "cudagraphs"}, "a stage below 3"),
    ):
        with pytest.raises(ConfigError, match=text):
            make(3, model, compile={"enabled": True, **block})
        make(3, Net(), compile={"enabled": False, **block}).destroy()
    engine = make(3, model)
    with pytest.raises(UsageError, match="no argument 'mod'"):
        engine.compile(compile_kwargs={"mod": "default"})
    for wrong in ({"schedule": []}, {"compiled_autograd_enabled": True}):
        with pytest.raises(UsageError, match="leave schedule and compiled_autograd"):
            engine.compile(**wrong)
    assert not engine.is_compiled


@on_ranks(2, (2, 3))
def test_nothing_is_recorded_where_parameters_come_and_go(stage: int) -> None:
    modes: list[object] = []

    def backend(graph: Any, _: object, **options: object) -> Any:
        modes.append(options.get("mode") or options.get("options"))
        return graph.forward

    for asked, without in (
        ({"mode": "reduce-overhead"}, None),  # the mode "default" goes without saying
        ({"mode": "max-autotune"}, "max-autotune-no-cudagraphs"),
        ({"options": {"triton.cudagraphs": True, "x": 1}}, {"triton.cudagraphs": False, "x": 1}),
    ):
        torch._dynamo.reset()
        engine = make(stage)
        with messages() as told:
            engine.compile(backend, asked)
        train(engine, 1)
        kept = next(iter(asked.values()))
        assert modes.pop() == (without if stage == 3 else kept)
        assert sum("without CUDA graphs" in text for text in told) == (stage == 3)
        assert asked in ({"mode": kept}, {"options": kept})


@on_ranks(1)
def test_a_model_without_blocks_is_compiled_itself() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    engine = make(3, model)
    with messages() as told:
        engine.compile("eager")
    assert told[0].startswith("compiling one Sequential with")
    engine.backward(engine(batch(0)).square().mean())
    engine.step()
    assert engine.global_steps == 1


def mean_square(outputs: Tensor, *, scale: float) -> Tensor:
    """A loss."""
    return scale * outputs.square().mean()


class Model(Stack):
    """Computes its loss by itself, as models of transformers do."""

    loss_type = "ForCausalLM"

    @property
    def loss_function(self) -> Callable[[Tensor], Tensor]:
        own = vars(self).get("_loss_function")
        return functools.partial(mean_square, scale=0.5) if own is None else own

    def forward(self, x: Tensor) -> Tensor:
        return self.loss_function(super().forward(x))


@on_ranks(1)
def test_a_loss_is_compiled_also_if_it_has_no_name_and_left_to_a_model_that_was_given_one() -> None:
    results: list[Tensor] = []
    for number in range(3):
        model, backend = Model(), CompileCounterWithBackend("eager")
        if number == 2:
            vars(model)["_loss_function"] = functools.partial(mean_square, scale=0.5)
        engine = make(3, model)
        if number:
            engine.compile(backend)
        torch.manual_seed(0)
        engine.backward(engine(batch(0)))
        engine.step()
        results.append(engine(batch(1)).detach())
        assert backend.frame_count == (0, 2, 1)[number]
        engine.destroy()
        assert ("_loss_function" in vars(model)) == (number == 2)
    assert all(torch.equal(result, results[0]) for result in results)
