"""A checkpointed function gives what it gives without checkpointing, and holds less meanwhile.

All of this runs autograd, so all of it runs in forked ranks.
"""

from __future__ import annotations

import gc
import weakref
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from unit.checkpointing.blocks import (
    BATCH,
    INPUT_BYTES,
    MODES,
    WIDTH,
    Block,
    Saved,
    assert_same,
    blocks,
    configure,
    held_on_host,
    run,
)
from unit.engine.small import on_ranks
from zeroshard import UsageError, checkpointing
from zeroshard.checkpointing import checkpoint
from zeroshard.checkpointing.segment import is_inside

every_mode = pytest.mark.parametrize("mode", MODES)
Pair = namedtuple("Pair", "left right")


def activation(*size: int, seed: int = 0) -> Tensor:
    """A result of some function, as inputs of inner blocks are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(size or (BATCH, WIDTH)), generator=generator, requires_grad=True) * 1.0


# Gradients


@every_mode
@on_ranks(1)
def test_gradients_with_dropout_are_those_without_checkpointing(mode: str) -> None:
    want = run(blocks())
    configure(mode)
    for _ in range(3):  # buffers are used again
        layers = blocks()
        assert_same(run(layers, checkpoint), want)
        assert [layer.num_runs for layer in layers] == [2] * 4


@every_mode
@on_ranks(1)
def test_several_blocks_are_checkpointed_at_once(mode: str) -> None:
    want = run(blocks())
    configure(mode)
    layers = blocks()
    halves = [nn.Sequential(*layers[:2]), nn.Sequential(*layers[2:])]
    assert_same(run(halves, checkpoint), want)


@every_mode
@pytest.mark.parametrize("inner", [checkpoint, torch_checkpoint])
@pytest.mark.parametrize("outer", [checkpoint, torch_checkpoint])
@on_ranks(1)
def test_checkpoints_nest(mode: str, inner: Any, outer: Any) -> None:
    want = run(blocks())
    configure(mode)
    layers = blocks()

    def call(how: Any, function: Any, *args: Any) -> Any:
        return how(function, *args, **({} if how is checkpoint else {"use_reentrant": False}))

    def half(first: int, h: Tensor) -> Tensor:
        for layer in layers[first : first + 2]:
            h = call(inner, layer, h)
        return h

    class Half(nn.Module):
        def __init__(self, first: int) -> None:
            super().__init__()
            self.first, self.layers = first, layers[first : first + 2]

        def forward(self, h: Tensor) -> Tensor:
            return half(self.first, h)

    assert_same(run([Half(0), Half(2)], lambda *args: call(outer, *args)), want)
    assert not held_on_host()


@every_mode
@on_ranks(1)
def test_named_random_numbers_are_drawn_again(mode: str) -> None:
    def train(how: Any) -> list[Tensor]:
        checkpointing.model_parallel_cuda_manual_seed(7)
        tracker = checkpointing.get_cuda_rng_tracker()

        def function(h: Tensor) -> Tensor:
            with tracker.fork():
                h = F.dropout(h, 0.5)
            return F.dropout(h, 0.5) ** 2

        x = activation()
        y = how(function, how(function, x))
        (grad,) = torch.autograd.grad(y.sum(), x)
        with tracker.fork():
            return [grad, torch.rand(2), *tracker.get_states().values()]

    want = train(lambda function, *args: function(*args))
    configure(mode)
    assert_same(train(checkpoint), want)


@every_mode
@on_ranks(1)
def test_autocast_is_as_it_was(mode: str) -> None:
    configure(mode)
    linear, seen = nn.Linear(WIDTH, WIDTH), []

    def function(h: Tensor) -> Tensor:
        y = linear(h)
        seen.append(y.dtype)
        return y.float() ** 2

    x = activation()
    with torch.autocast("cpu", torch.bfloat16):
        loss = checkpoint(function, x).sum()
    loss.backward()
    assert seen == [torch.bfloat16, torch.bfloat16]
    assert linear.weight.grad is not None and linear.weight.grad.dtype == torch.float32


@every_mode
@on_ranks(1)
def test_a_graph_that_is_kept_runs_backward_again(mode: str) -> None:
    configure(mode)
    layers = blocks()
    x = activation()
    h = x
    for layer in layers:
        h = checkpoint(layer, h)
    params = [*layers.parameters(), x]
    first, second = (torch.autograd.grad(h.sum(), params, retain_graph=True) for _ in range(2))
    assert_same(first, second)


@every_mode
@on_ranks(1)
def test_graphs_may_overlap(mode: str) -> None:
    """Several forwards, then their backwards in any order, some not at all."""
    configure(mode)
    layers = blocks()

    def forward(seed: int, how: Any) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        x = h = activation(seed=seed)
        for layer in layers:
            h = how(layer, h)
        return h.sum(), x

    def backward(graph: tuple[Tensor, Tensor]) -> list[Tensor]:
        loss, x = graph
        return list(torch.autograd.grad(loss, [*layers.parameters(), x]))

    want = [backward(forward(seed, lambda layer, h: layer(h))) for seed in range(4)]
    graphs = [forward(seed, checkpoint) for seed in range(4)]
    for index in (1, 0, 3):
        assert_same(backward(graphs[index]), want[index])
    graphs.clear()
    assert_same(backward(forward(2, checkpoint)), want[2])
    assert not held_on_host()


@on_ranks(1)
def test_the_gradient_of_a_gradient_is_right() -> None:
    for mode in MODES:
        configure(mode)
        x = activation()
        (grad,) = torch.autograd.grad(checkpoint(torch.tanh, x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.sum(), x)
        torch.testing.assert_close(second, -2 * torch.tanh(x) * (1 - torch.tanh(x) ** 2))


# Arguments and results


@every_mode
@on_ranks(1)
def test_anything_goes_in_and_out(mode: str) -> None:
    configure(mode)
    box = object()
    seen: list[Any] = []

    def function(
        a: Tensor, pair: Pair, *, scale: float, more: dict[str, Any], function: str
    ) -> Any:
        seen.append((pair.right, scale, more["none"], more["box"], function))
        y = a * pair.left * scale + more["list"][0]
        return {"y": y, "nothing": None, "both": (y * 2, [y.detach(), "text"])}

    a, b, c = (activation(seed=seed) for seed in range(3))
    arguments = {"scale": 3.0, "more": {"list": [c], "none": None, "box": box}, "function": "name"}
    result = checkpoint(function, a, Pair(b, 5), **arguments)
    assert result["nothing"] is None and result["both"][1][1] == "text"
    got = torch.autograd.grad((result["y"] + result["both"][0]).sum(), (a, b, c))
    assert_same(got, [9 * b, 9 * a, torch.full_like(c, 3.0)])
    assert seen == [(5, 3.0, None, box, "name")] * 2


@every_mode
@on_ranks(1)
def test_inputs_need_no_gradient_and_need_not_exist(mode: str) -> None:
    configure(mode)
    weight = torch.ones(3, requires_grad=True)
    (grad,) = torch.autograd.grad(checkpoint(lambda: weight**2).sum(), weight)
    assert_same([grad], [2 * weight])
    ids = torch.tensor([0, 2, 2])
    (grad,) = torch.autograd.grad(checkpoint(lambda index: weight[index] ** 2, ids).sum(), weight)
    assert_same([grad], [torch.tensor([2.0, 0.0, 4.0])])


@every_mode
@on_ranks(1)
def test_without_gradients_the_function_is_merely_called(mode: str) -> None:
    configure(mode)
    block = Block()
    with torch.no_grad():
        assert not checkpoint(block, activation()).requires_grad
    with torch.inference_mode():
        checkpoint(block, torch.ones(BATCH, WIDTH))
    assert block.num_runs == 2
    assert not held_on_host()


@every_mode
@on_ranks(1)
def test_one_object_stays_one_object(mode: str) -> None:
    """Attention asks whether query and key are the same tensor."""
    configure(mode)
    seen: list[tuple[bool, bool]] = []

    def function(q: Tensor, k: Tensor, v: list[Tensor]) -> Tensor:
        seen.append((q is k, q is v[0]))
        return q * k * v[0]

    x = activation()
    checkpoint(function, x, x, [x]).sum().backward()
    assert seen == [(True, True)] * 2


@every_mode
@on_ranks(1)
def test_a_container_that_the_function_edits_is_edited_once(mode: str) -> None:
    configure(mode)
    seen: list[int] = []

    def function(h: Tensor, states: list[Tensor]) -> Tensor:
        seen.append(len(states))
        states.append(h * 2)
        return (h**2).sum()

    states: list[Tensor] = [activation(seed=1)]
    checkpoint(function, activation(), states).backward()
    assert seen == [1, 1]
    assert len(states) == 2


@every_mode
@on_ranks(1)
def test_layouts_are_kept(mode: str) -> None:
    configure(mode)
    base = activation(2, 6, 4, 4)
    inputs = [
        base,
        base.transpose(0, 2),
        base.contiguous(memory_format=torch.channels_last),
        base[:, ::2],
        base[:1].expand(3, 6, 4, 4),
        base[:0],
        base.to(torch.bfloat16),
        base.to(torch.complex64),
    ]
    for tensor in inputs:
        seen: list[Tensor] = []

        def function(h: Tensor, seen: list[Any]) -> Tensor:
            seen.append(h.detach())
            return (h * h).abs().sum()

        def call(h: Tensor, function: Any = function, seen: list[Any] = seen) -> Tensor:
            return function(h, seen)

        checkpoint(call, tensor).backward(retain_graph=True)
        first, again = seen
        assert torch.equal(first, again) and first.dtype == again.dtype
        if torch.empty_like(first).stride() == first.stride():
            assert again.stride() == first.stride()


@every_mode
@on_ranks(1)
def test_an_input_that_was_edited_since_is_an_error(mode: str) -> None:
    """As with torch's own: what would run again would not be what ran."""
    configure(mode)

    def edited_inside(h: Tensor) -> Tensor:
        return (h.mul_(2) ** 2).sum()

    with pytest.raises(RuntimeError, match=r"in.?place"):
        checkpoint(edited_inside, activation()).backward()

    def square(h: Tensor, mask: Tensor) -> Tensor:
        return (h * mask) ** 2

    for index in range(2):
        inputs = [activation(), torch.ones(BATCH, WIDTH)]
        loss = checkpoint(square, *inputs).sum()
        with torch.no_grad():
            inputs[index].add_(1)
        with pytest.raises(RuntimeError, match=r"in.?place"):
            loss.backward()
    # The same where another input was kept since, so that this one has left the device.
    x = activation()
    loss = checkpoint(square, x, torch.ones_like(x)).sum()
    with torch.no_grad():
        x.add_(1)
    loss = loss + checkpoint(square, x, torch.ones_like(x)).sum()
    with pytest.raises(RuntimeError, match=r"in.?place"):
        loss.backward()


@on_ranks(1)
def test_the_error_about_an_edited_input_says_what_to_do() -> None:
    configure("host")
    x = activation()
    loss = checkpoint(torch.tanh, x).sum()
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(UsageError, match="hint: clone the tensor"):
        loss.backward()


# Exceptions, compilers and waiting


@every_mode
@on_ranks(1)
def test_a_function_that_raises_leaves_nothing_behind(mode: str) -> None:
    want = run(blocks())
    configure(mode)
    calls: list[None] = []

    def fails_at(number: int) -> Any:
        def function(h: Tensor) -> Tensor:
            calls.append(None)
            if len(calls) == number:
                raise KeyError("no")
            return torch.tanh(torch.tanh(h))

        return function

    with pytest.raises(KeyError):
        checkpoint(fails_at(1), checkpoint(torch.tanh, activation()))
    calls.clear()
    loss = checkpoint(fails_at(2), checkpoint(torch.tanh, activation())).sum()
    with pytest.raises(KeyError):
        loss.backward()
    del loss
    assert not is_inside() and not held_on_host()
    assert_same(run(blocks(), checkpoint), want)


# Tracing looks at the gradient of every input, those that are no leaves included.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("whole", [False, True])
@on_ranks(1)
def test_models_may_be_compiled(whole: bool) -> None:
    configure("host")
    layers = blocks(2)
    for layer in layers:
        layer.forward = torch.compile(layer.forward, backend="aot_eager")

    def model(h: Tensor, how: Any) -> Tensor:
        for layer in layers:
            h = how(layer, h)
        return h.square().sum()

    def grads(how: Any, model: Any) -> list[Tensor]:
        torch.manual_seed(3)
        x = activation()
        return list(torch.autograd.grad(model(x, how), [*layers.parameters(), x]))

    want = grads(lambda layer, h: layer(h), model)
    compiled = torch.compile(model, backend="aot_eager") if whole else model
    torch.testing.assert_close(grads(checkpoint, compiled), want)


@on_ranks(1)
def test_the_host_waits_for_the_device_only_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []
    monkeypatch.setattr(torch.cpu, "synchronize", lambda device: events.append("wait"))

    def function(h: Tensor) -> Tensor:
        events.append("run")
        return h**2

    checkpointing.configure()
    checkpoint(function, activation()).sum().backward()
    assert events == ["run", "run"]
    events.clear()
    checkpointing.configure(synchronize=True)
    checkpoint(function, activation()).sum().backward()
    assert events == ["wait", "run", "wait"] * 2


@on_ranks(1)
def test_traces_show_where_functions_run_and_run_again() -> None:
    checkpointing.configure()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        checkpoint(torch.tanh, activation()).sum().backward()
    names = [event.name for event in profile.events() or []]
    assert names.count("zeroshard::checkpoint") == names.count("zeroshard::recompute") == 1


# Memory


@on_ranks(1)
def test_autograd_saves_one_input_for_each_function() -> None:
    checkpointing.configure()
    layers = blocks(6)

    def forward(how: Any) -> int:
        with Saved(layers) as saved:
            h = F.dropout(activation(), 0.1)
            start = saved.nbytes
            for layer in layers:
                h = how(layer, h)
        return saved.nbytes - start

    without, with_checkpoints = forward(lambda layer, h: layer(h)), forward(checkpoint)
    assert with_checkpoints == 6 * INPUT_BYTES
    assert without > 10 * with_checkpoints


@on_ranks(1)
def test_inputs_of_functions_inside_another_are_not_kept() -> None:
    layers = blocks(4)

    def inner(h: Tensor) -> Tensor:
        for layer in layers:
            h = checkpoint(layer, h)
        return h

    checkpointing.configure()
    with Saved(layers) as saved:
        checkpoint(inner, activation())
    assert saved.nbytes == INPUT_BYTES

    configure("host")
    loss = checkpoint(inner, activation()).sum()
    assert len(held_on_host()) == 1
    loss.backward()


@pytest.mark.parametrize("mode", ["host", "host, one buffer"])
@on_ranks(1)
def test_inputs_wait_on_the_host_and_only_the_newest_on_the_device_too(mode: str) -> None:
    configure(mode)
    layers = blocks(4)
    inputs: list[weakref.ref[Any]] = []

    def watch(layer: nn.Module, h: Tensor) -> Tensor:
        inputs.append(weakref.ref(h.untyped_storage()))
        return checkpoint(layer, h)

    with Saved(layers) as saved:
        h = activation()
        start = saved.nbytes
        for layer in layers:
            h = watch(layer, h)
    assert saved.nbytes == start, "an input went past the hooks"
    moved = held_on_host()
    assert [m._host.nbytes for m in moved] == [INPUT_BYTES] * 4
    assert [m._here is not None for m in moved].count(True) == 1
    loss = h.sum()
    del h, moved
    gc.collect()
    assert [storage() is not None for storage in inputs] == [False, False, False, True]
    loss.backward()
    assert not held_on_host()


@every_mode
@on_ranks(1)
def test_masks_leaves_and_parameters_stay_where_they_are(mode: str) -> None:
    configure(mode)
    mask, leaf = torch.ones(BATCH, WIDTH), torch.ones(BATCH, WIDTH, requires_grad=True)
    weight = nn.Parameter(torch.ones(BATCH, WIDTH))
    seen: list[list[int]] = []

    def function(*tensors: Tensor) -> Tensor:
        seen.append([tensor.data_ptr() for tensor in tensors])
        return (tensors[0] * tensors[1] * tensors[2]) ** 2

    loss = checkpoint(function, mask, leaf, weight).sum()
    assert not held_on_host()
    loss.backward()
    assert seen[0] == seen[1]


@on_ranks(1)
def test_dropping_a_graph_gives_its_inputs_back() -> None:
    configure("host, one buffer")
    layers = blocks(4)
    h = activation()
    for layer in layers:
        h = checkpoint(layer, h)
    assert len(held_on_host()) == 4
    addresses = {moved._host.data_ptr() for moved in held_on_host()}
    del h
    assert not held_on_host()
    h = activation()
    for layer in layers:
        h = checkpoint(layer, h)
    assert {moved._host.data_ptr() for moved in held_on_host()} == addresses
    checkpointing.reset()
    h.sum().backward()  # inputs that were kept before a reset are kept still
    assert not held_on_host()
