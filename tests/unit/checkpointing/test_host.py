"""When inputs go to the host and when they come back.

All of this runs autograd, so all of it runs in forked ranks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from unit.checkpointing.blocks import blocks, configure, held_on_host
from unit.engine.small import on_ranks
from zeroshard.checkpointing import checkpoint
from zeroshard.checkpointing.host import _Link

NUM_FUNCTIONS = 4


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What happens: copies by number of elements, and functions by their names."""
    found: list[Any] = []
    copy = _Link.copy

    def recorded(link: _Link, into: Tensor, source: Tensor) -> Any:
        found.append(source.numel())
        return copy(link, into, source)

    monkeypatch.setattr(_Link, "copy", recorded)
    return found


def functions(events: list[Any]) -> list[Callable[[Tensor], Tensor]]:
    """The n-th takes n elements."""

    def make(number: int) -> Callable[[Tensor], Tensor]:
        def function(h: Tensor, extra: Tensor | None = None) -> Tensor:
            events.append(f"f{number}")
            y = (h**2).sum() + (0 if extra is None else (extra**2).sum())
            return y * torch.ones(number + 1)

        return function

    return [make(number) for number in range(1, NUM_FUNCTIONS + 1)]


def forward(events: list[Any]) -> Tensor:
    h = torch.ones(1, requires_grad=True) * 0.5
    for function in functions(events):
        h = checkpoint(function, h)
    return h.sum()


@on_ranks(1)
def test_an_input_leaves_before_its_function_runs(events: list[Any]) -> None:
    configure("host")
    forward(events)
    assert events == [1, "f1", 2, "f2", 3, "f3", 4, "f4"]


@on_ranks(1)
def test_the_next_input_is_on_its_way_while_a_function_runs_again(events: list[Any]) -> None:
    configure("host")
    loss = forward(events)
    events.clear()
    loss.backward()
    assert events == [3, "f4", 2, "f3", 1, "f2", "f1"], "the newest was never away"


@on_ranks(1)
def test_backward_that_begins_in_the_middle_fetches_what_it_needs(events: list[Any]) -> None:
    configure("host")
    first, second, *_ = functions(events)
    h = checkpoint(first, torch.ones(1, requires_grad=True) * 0.5)
    middle = checkpoint(second, h).sum()
    rest = forward(events)
    events.clear()
    middle.backward()
    assert events == [2, 1, "f2", "f1"]
    events.clear()
    rest.backward()
    assert events == [3, "f4", 2, "f3", 1, "f2", "f1"]


@on_ranks(1)
def test_all_inputs_of_a_function_come_before_those_of_the_one_before(events: list[Any]) -> None:
    configure("host")
    first, second, *_ = functions(events)
    x = torch.ones(1, requires_grad=True) * 0.5
    extras = [torch.ones(number, requires_grad=True) * 2 for number in (10, 20)]
    h = checkpoint(first, x, extras[0])
    h = checkpoint(second, h, extras[1])
    loss = h.sum()
    forward(events)  # so that neither is the newest
    events.clear()
    loss.backward()
    assert events == [2, 20, 1, 10, "f2", "f1"]


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Device memory that was freed before the compute stream had waited for its transfer."""
    found: list[str] = []
    hosts: set[int] = set()
    copy = _Link.copy

    class Recorded:
        def __init__(self, what: str, ticket: Any) -> None:
            self.what, self.ticket, self.is_awaited = what, ticket, False

        def wait(self) -> None:
            self.ticket.wait()
            self.is_awaited = True

        def freed(self) -> None:
            if not self.is_awaited:
                found.append(self.what)

    def recorded(link: _Link, into: Tensor, source: Tensor) -> Any:
        returns = source.data_ptr() in hosts
        if not returns:
            hosts.add(into.data_ptr())
        transfer = Recorded("return" if returns else "departure", copy(link, into, source))
        device_memory = (into if returns else source).untyped_storage()
        weakref.finalize(device_memory, transfer.freed)
        return transfer

    monkeypatch.setattr(_Link, "copy", recorded)
    return found


@on_ranks(1)
def test_device_memory_goes_only_after_its_transfers(early: list[str]) -> None:
    configure("host")
    layers = blocks()

    def forward() -> Tensor:
        h = torch.ones(3, layers[0].up.in_features, requires_grad=True) * 0.5
        for layer in layers:
            h = checkpoint(layer, h)
        return h.sum()

    forward().backward()
    kept = forward()
    kept.backward(retain_graph=True)
    kept.backward()
    first, second = forward(), forward()
    first.backward()
    second.backward()

    def stop(grad: Tensor) -> None:
        raise KeyError

    # A backward that ends while an input is on its way back, and whose graph is dropped then.
    loss = forward()
    handle = layers[2].up.weight.register_hook(stop)
    with pytest.raises(KeyError):
        loss.backward()
    handle.remove()
    del loss
    forward()  # and one that is dropped before its inputs have left
    forward().backward()  # torch keeps a graph whose backward failed until the next
    assert not held_on_host()
    assert early == []


@on_ranks(1)
def test_what_came_back_in_vain_leaves_when_the_next_function_is_called(events: list[Any]) -> None:
    configure("host")
    inputs = [torch.ones(1, requires_grad=True) * 0.5]
    for function in functions(events):
        inputs.append(checkpoint(function, inputs[-1]))
    torch.autograd.grad(inputs[-1].sum(), inputs[2])  # the last two functions only

    def on_device() -> list[int]:
        return sorted(m._host.numel() for m in held_on_host() if m._here is not None)

    assert on_device() == [2]
    h = checkpoint(functions(events)[2], inputs[2])
    assert on_device() == [3]
    del h
