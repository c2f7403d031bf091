"""Being told when the gradient of a tensor arrives.

The place is the *edge* into the tensor's node in the autograd graph, so nothing is put in front of
the tensor: modules get the very objects that their caller passed, alone or in containers.

A node runs when all nodes that use its results have run, and ready nodes run in the reverse order
of their creation. So when the gradient of a call's input arrives, every node that the call created
has run.
"""

# The dispatch modes of a thread have no public name.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["apart", "on_gradient"]

P = ParamSpec("P")
Result = TypeVar("Result")
# Autograd also tells of gradients that are undefined, as those of results that no loss depends on.
Act = Callable[[Tensor | None], object]

_KEY = "zeroshard"


def apart(hook: Callable[P, Result]) -> Callable[P, Result]:
    """Keep what a hook does out of compiled regions and out of the caller's dispatch modes.

    Selective activation checkpointing, for one, records the operations of a block in such a mode.
    """

    @functools.wraps(hook)
    def run(*args: P.args, **kwargs: P.kwargs) -> Result:
        if torch._C._len_torch_dispatch_stack() == 0:
            return hook(*args, **kwargs)
        with _disable_current_modes():
            return hook(*args, **kwargs)

    outside: Any = torch._dynamo.disable(run)
    return outside


class _Edge:
    """What happens when a gradient arrives: calls that took the tensor end, then its maker begins.

    In this order, so that the units of those are freed before the units of this one are gathered.
    """

    def __init__(self) -> None:
        self.ends: list[Act] = []
        self.begins: list[Act] = []

    def arrived(self, grad: Tensor | None) -> None:
        # Gradients are enabled in a backward that is itself to be differentiated.
        with torch.no_grad():
            for act in (*self.ends, *self.begins):
                act(grad)


def _edge(tensor: Tensor) -> _Edge:
    """The edge of a tensor that has a node; it lives as long as the node does."""
    node: Any = tensor.grad_fn
    edges: dict[int, _Edge] = node.metadata.setdefault(_KEY, {})
    edge = edges.get(tensor.output_nr)
    if edge is None:
        edge = edges[tensor.output_nr] = _Edge()
        tensor.register_hook(apart(edge.arrived))
    return edge


def on_gradient(tensor: Tensor, *, end: Act | None = None, begin: Act | None = None) -> None:
    """Call ``end`` and ``begin`` with the gradient of a tensor that is no leaf, when it arrives.

    An operation in place on a view, or on another view of its base, gives the view a new node and
    leaves the old one, hooks and all, out of the graph. The node of the base stays in it; its
    gradient arrives somewhat later. So both are watched, and an act may be called twice.
    """
    base = tensor._base
    for place in (tensor, base):
        if place is None or place.grad_fn is None:
            continue
        edge = _edge(place)
        if end is not None:
            edge.ends.append(end)
        if begin is not None:
            edge.begins.append(begin)
