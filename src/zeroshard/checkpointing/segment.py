"""A checkpointed function with its arguments: how it runs first, and how it runs again."""

# torch's trees have no public name in all supported versions.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function
from torch.utils import _pytree as pytree

from zeroshard.checkpointing.rng import RandomStates, RngTracker

__all__ = ["Segment", "is_inside"]

_inside: ContextVar[bool] = ContextVar("inside", default=False)


def is_inside() -> bool:
    """Whether a checkpointed function is running, for the first time or again.

    What it saves then, inputs of checkpointed functions inside it among them, is not kept but
    computed once more.
    """
    return _inside.get()


@dataclass(frozen=True, slots=True)
class _Place:
    """Stands for a tensor among the leaves of the arguments."""

    index: int


class Segment:
    """Runs a function on its arguments, and again on equal ones under equal circumstances.

    The first time the function gets the very objects of the caller. After that only what is not a
    tensor is held here. The tensors, which torch keeps, come back as arguments: each once, however
    often it occurs, so that what was one object is one object again. Lists, tuples and dicts are
    made anew as they were before the function could edit them.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        tracker: RngTracker,
        synchronize: bool,
    ) -> None:
        self._function = function
        self._given: tuple[tuple[Any, ...], Mapping[str, Any]] | None = (args, kwargs)
        leaves, self._form = pytree.tree_flatten((args, kwargs))
        places: dict[int, _Place] = {}
        self._tensors: list[Tensor] = []
        self._leaves: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, Tensor) and id(leaf) not in places:
                places[id(leaf)] = _Place(len(self._tensors))
                self._tensors.append(leaf)
            self._leaves.append(places[id(leaf)] if isinstance(leaf, Tensor) else leaf)
        devices = {tensor.device for tensor in self._tensors}
        self._random = RandomStates.now(tracker, devices)
        self._awaited = devices if synchronize else set[torch.device]()

    def take_tensors(self) -> list[Tensor]:
        """The tensors among the arguments, which the segment then no longer holds."""
        tensors, self._tensors = self._tensors, []
        return tensors

    def __call__(self, *tensors: Tensor) -> Any:
        """Run the function."""
        if self._given is not None:
            (args, kwargs), self._given = self._given, None
            with self._running("zeroshard::checkpoint"):
                return self._function(*args, **kwargs)
        leaves = [
            tensors[leaf.index] if isinstance(leaf, _Place) else leaf for leaf in self._leaves
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self._form)
        with self._running("zeroshard::recompute"), self._random.restored():
            return self._function(*args, **kwargs)

    @contextmanager
    def _running(self, label: str) -> Iterator[None]:
        token = _inside.set(True)
        self._synchronize()
        try:
            with record_function(label):
                yield
        finally:
            self._synchronize()
            _inside.reset(token)

    def _synchronize(self) -> None:
        for device in self._awaited:
            torch.get_device_module(device).synchronize(device)
