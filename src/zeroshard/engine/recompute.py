"""Functions that run again in backward, and what they would have kept if they did not."""

# Torch has no public name for the hooks on saved tensors that are active, nor for its trees.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from zeroshard.core.slots import slot_of

__all__ = ["CAN_COUNT", "Buffers", "Counting", "checkpointed", "is_inside_checkpoint", "nbytes_of"]

Forward = Callable[..., Any]

_autograd: Any = vars(torch._C)["_autograd"]
_top_hooks: Any = getattr(_autograd, "_top_saved_tensors_default_hooks", None)  # from 2.8

CAN_COUNT = _top_hooks is not None
"""Whether this torch lets a checkpoint be counted; without that every block is checkpointed."""


def checkpointed(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a function so that it runs again in backward, on the same arguments and random numbers.

    At first it gets the very objects of the caller. For the second time lists and dicts are made
    anew, as they were before it could edit them.
    """
    leaves, form = pytree.tree_flatten((args, kwargs))
    at = {id(leaf): index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    # Of what torch is given by position it notices edits in place, and sets back the generators of
    # the devices; it does so for each tensor anew.
    given = [index for index in at.values() if leaves[index].requires_grad]
    given = given or list(at.values())[:1]
    first: list[Any] = [(args, kwargs)]

    def run(*tensors: Tensor) -> Any:
        if first:
            args, kwargs = first.pop()
            return forward(*args, **kwargs)
        again = dict(zip(given, tensors, strict=True))
        same = [
            again.get(at[id(leaf)], leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves
        ]
        args, kwargs = pytree.tree_unflatten(same, form)
        return forward(*args, **kwargs)

    return checkpoint(run, *(leaves[index] for index in given), use_reentrant=False)


def _active_hooks() -> tuple[Forward, Forward] | None:
    """The hooks that see what autograd saves now, if there are any and torch tells."""
    return None if _top_hooks is None else _top_hooks(False)


def is_inside_checkpoint() -> bool:
    """Whether somebody checkpoints what runs now, as far as torch tells."""
    hooks = _active_hooks()
    return hooks is not None and hooks[0].__module__ == checkpoint.__module__


class Counting:
    """Counts the bytes that autograd saves inside a checkpoint, each piece of memory once.

    Args:
        module: what runs; its parameters and buffers are there anyway.
        inputs: tensors that are there anyway, too.
    """

    def __init__(self, module: nn.Module, inputs: Iterable[Tensor]) -> None:
        self.nbytes = 0
        params = list(module.parameters())
        slots = [slot_of(param) for param in params]
        self._units = {slot.unit for slot in slots if slot is not None}
        there = (each for each in chain(inputs, params, module.buffers()) if _is_plain(each))
        # Weak references, so that what a checkpoint frees meanwhile is not mistaken for others.
        self._known = {StorageWeakRef(each.untyped_storage()) for each in there}
        self.is_over = False
        self._hooks: saved_tensors_hooks | None = None

    def _add(self, tensor: Tensor) -> None:
        if not _is_plain(tensor):
            self.nbytes += tensor.nbytes
            return
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference in self._known:
            return
        self._known.add(reference)
        # Modules inside may have gathered units of their own.
        if not any(unit.is_full and unit.address == storage.data_ptr() for unit in self._units):
            self.nbytes += storage.nbytes()

    def __enter__(self) -> None:
        hooks = _active_hooks()
        assert hooks is not None, "what is counted is checkpointed"
        pack, unpack = hooks

        def count(tensor: Tensor) -> Any:
            self._add(tensor)
            return pack(tensor)

        self._hooks = saved_tensors_hooks(count, unpack)
        self._hooks.__enter__()

    def __exit__(self, *error: object) -> None:
        assert self._hooks is not None, "it was entered"
        self._hooks.__exit__(*error)
        self._hooks = None
        self._known.clear()
        self.is_over = True


class Buffers:
    """The buffers of a block before it ran, if it has edited them."""

    def __init__(self, block: nn.Module) -> None:
        self._before = [(each, each._version, each.clone()) for each in block.buffers()]

    def are_edited(self) -> bool:
        """Whether some were; the others are forgotten."""
        self._before = [entry for entry in self._before if entry[0]._version != entry[1]]
        return bool(self._before)

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """Have the values of then inside, and afterwards those of now."""
        now = [(each, each.clone()) for each, _, _ in self._before]
        with torch.no_grad():
            for each, _, before in self._before:
                each.copy_(before)
        try:
            yield
        finally:
            with torch.no_grad():
                for each, value in now:
                    each.copy_(value)


def _is_plain(tensor: Tensor) -> bool:
    """Whether it has memory of one piece."""
    return tensor.layout == torch.strided


def nbytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory of some tensors, each piece once."""
    storages = [each.untyped_storage() for each in tensors if _is_plain(each)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
