"""Blocks with dropout, and what a run with them leaves behind."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from zeroshard import checkpointing
from zeroshard.checkpointing.host import _Moved

__all__ = [
    "BATCH",
    "MODES",
    "WIDTH",
    "Block",
    "Saved",
    "assert_same",
    "blocks",
    "configure",
    "held_on_host",
    "run",
]

BATCH, WIDTH = 8, 16
INPUT_BYTES = BATCH * WIDTH * 4

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "host": {"checkpoint_in_cpu": True},
    "host, one buffer": {
        "checkpoint_in_cpu": True,
        "contiguous_checkpointing": True,
        "num_checkpoints": 4,
    },
}
"""Ways to keep inputs on one rank."""


def configure(mode: str) -> None:
    checkpointing.configure(**MODES[mode])


class Block(nn.Module):
    """Keeps several times its input for backward, and draws random numbers twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.num_runs = 0

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.num_runs += 1
        return x + scale * F.dropout(self.down(F.dropout(F.gelu(self.up(x)), 0.2)), 0.1)


def blocks(number: int = 4) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Block() for _ in range(number))


def run(
    layers: Sequence[nn.Module] | nn.ModuleList,
    call: Callable[..., Any] = lambda layer, *args: layer(*args),
) -> list[Tensor]:
    """One forward and backward; all gradients, and a random number drawn after them."""
    torch.manual_seed(1)
    x = torch.randn(BATCH, WIDTH, requires_grad=True)
    h = F.dropout(x, 0.1)
    for layer in layers:
        h = call(layer, h)
    h.square().mean().backward()
    params = [param for layer in layers for param in layer.parameters()]
    assert all(param.grad is not None for param in params)
    return [*(param.grad for param in params), x.grad, torch.rand(1)]


def assert_same(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """Every bit is equal."""
    for index, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(ours, theirs), index


@dataclass
class Saved:
    """Bytes that autograd saves beside parameters, inside the block; each storage counts once."""

    module: nn.Module
    storages: dict[int, int] = field(default_factory=dict)

    def __enter__(self) -> Saved:
        params = {param.untyped_storage().data_ptr() for param in self.module.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in params:
                self.storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        self._hooks = saved_tensors_hooks(pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.__exit__()

    @property
    def nbytes(self) -> int:
        return sum(self.storages.values())


def held_on_host() -> list[_Moved]:
    """The inputs that wait on the host now."""
    gc.collect()
    # isinstance() would ask every object for its class, and some warn about being asked.
    return [thing for thing in gc.get_objects() if type(thing) is _Moved]
