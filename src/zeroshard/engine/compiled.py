"""Compiling the blocks of a model, each class of them as one graph.

What is compiled is the ``forward`` of a block. A module's hooks run around it, so by then the
parameters are gathered and have their shapes, and no hook is inside a graph: a block whose own call
was compiled would be cut in pieces at each of them. All blocks of a class are calls of one compiled
function, so the graph of the first serves all others: parameters are inputs of a graph.

The loss of a language model of transformers is compiled, too. It is no module, and most of its
memory is what its steps hand on to each other.

A call with a cache of keys and values is not compiled: what a layer does with it depends on the
number of the layer, and on how far the cache is filled.
"""

# The compiler's counters have no public name.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import copy
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

from zeroshard.core.hooks import Site
from zeroshard.engine.standin import StandIn
from zeroshard.errors import compose

__all__ = ["Compiled", "advise", "compile_blocks", "forget", "objection"]

_log = logging.getLogger(__name__)

Function = Callable[..., Any]

# So many different blocks of one class are compiled anew because of their gradients, their inputs
# and the order of recomputation, at most.
_USUAL_STARTS = 3
# What replays kernels on the memory that tensors had when it was recorded, and what does not.
_WITHOUT_RECORDING: Mapping[str, str] = {
    "reduce-overhead": "default",
    "max-autotune": "max-autotune-no-cudagraphs",
}
_RECORDING_OPTION = "triton.cudagraphs"
_RECORDING_BACKEND = "cudagraphs"
# Where a model of transformers keeps a loss that is not the one of its configuration.
_LOSS = "_loss_function"
# What it calls those that are computed from the logits of a vocabulary.
_LOSSES = frozenset({"ForCausalLM", "ForMaskedLM"})


def _is_own(forward: Function, block: nn.Module) -> bool:
    """Whether it is the method of the block's class, not something that was put in its place."""
    return isinstance(forward, MethodType) and forward.__self__ is block


class _Watch:
    """What is said of the blocks of one class, each of it once."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._starts: set[str] = set()  # names of blocks at which something was compiled
        self._has_graph = self._has_told_limit = False
        self._has_told_breaks = self._has_told_starts = self._has_told_cache = False

    def compiled(self, name: str, num_graphs: int, reasons: Sequence[str]) -> None:
        """Take note of what was made of a block, and why it is not one graph, where torch says."""
        self._starts.add(name)
        if self._has_graph and not num_graphs:  # nothing is compiled any more
            self._tell_limit()
        elif num_graphs == 1 and not reasons:
            self._has_graph = True
        elif not self._has_told_breaks:
            self._has_told_breaks = True
            _log.warning(
                "%s (%s) cannot be compiled as one graph, and parts of it run uncompiled%s. "
                'TORCH_LOGS="graph_breaks" shows where.',
                self._kind,
                name,
                f": {reasons[0].splitlines()[0]}" if reasons else "",
            )
        if len(self._starts) > _USUAL_STARTS and not self._has_told_starts:
            self._has_told_starts = True
            _log.warning(
                "%s is compiled anew for block after block (%s so far), which takes long and ends "
                "uncompiled where torch._dynamo.config.recompile_limit is reached. "
                'TORCH_LOGS="recompiles" says what differs between them.',
                self._kind,
                ", ".join(sorted(self._starts)),
            )

    def _tell_limit(self) -> None:
        if not self._has_told_limit:
            self._has_told_limit = True
            _log.warning(
                "%s was compiled for as many kinds of inputs as torch._dynamo.config."
                'recompile_limit allows, and runs uncompiled for others. TORCH_LOGS="recompiles" '
                "says what differs between them.",
                self._kind,
            )

    def has_cache(self) -> None:
        """Take note that training keeps a cache that nobody reads."""
        if not self._has_told_cache:
            self._has_told_cache = True
            _log.warning(
                "%s runs uncompiled, because the model keeps a cache of keys and values while it "
                "trains. Set model.config.use_cache = False.",
                self._kind,
            )


class Compiled(StandIn):
    """A compiled function in the place of a module's own.

    Args:
        owner: the module.
        attribute: where the module looks the function up.
        plain: the function.
        compiled: the same, compiled.
        name: the module's name in the model.
        watch: what is told of its compilation.
    """

    def __init__(
        self,
        owner: nn.Module,
        attribute: str,
        *,
        plain: Function,
        compiled: Function,
        name: str,
        watch: _Watch,
    ) -> None:
        super().__init__(owner, attribute, plain)
        self._run, self._name, self._watch = compiled, name, watch

    def remove(self) -> None:
        """Give the module what it had; where that is not possible, act like it."""
        self._run = self.plain
        super().remove()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run what was compiled, compiling it if nothing fits that was compiled before."""
        if torch.compiler.is_compiling():  # something around the module, and the module with it
            return self.plain(*args, **kwargs)
        if any(map(_is_cache, chain(args, kwargs.values()))):
            if torch.is_grad_enabled() and self.module.training:
                self._watch.has_cache()
            return self.plain(*args, **kwargs)
        tries, num_graphs = counters["frames"]["total"], counters["stats"]["unique_graphs"]
        breaks = dict(counters["graph_break"])
        result = self._run(*args, **kwargs)
        if counters["frames"]["total"] != tries:
            num_graphs = counters["stats"]["unique_graphs"] - num_graphs
            reasons = list(counters["graph_break"] - Counter(breaks))
            self._watch.compiled(self._name, num_graphs, reasons)
        return result


def _is_cache(value: object) -> bool:
    """Whether an argument is a cache of keys and values, as transformers has them."""
    return hasattr(value, "get_seq_length") and hasattr(value, "update")


def objection(backend: object, options: Mapping[str, Any], *, frees: bool) -> str | None:
    """What is wrong with arguments of torch.compile, if anything.

    Args:
        backend: a name, or a function.
        options: the other arguments.
        frees: whether parameters are freed after use.
    """
    known = set(inspect.signature(torch.compile).parameters) - {"model", "backend"}
    if unknown := sorted(set(options) - known):
        return compose(
            f"torch.compile has no argument {', '.join(map(repr, unknown))}.",
            hint=f"its arguments are {', '.join(sorted(known))}.",
        )
    names = torch.compiler.list_backends(())
    if isinstance(backend, str) and backend not in names:
        return compose(
            f"torch.compile has no backend {backend!r}.",
            hint=f"those installed are {', '.join(names)}.",
        )
    if frees and backend == _RECORDING_BACKEND:
        return compose(
            f"the backend {backend!r} replays kernels on the memory that parameters had when they "
            "were recorded, but at this stage parameters are freed after use.",
            hint='use the backend "inductor", or a stage below 3.',
        )
    return None


def _without_recording(options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of torch.compile that make no CUDA graphs, for parameters that come and go."""
    chosen = dict(options)
    special: Mapping[str, Any] = chosen.get("options") or {}
    if (mode := _WITHOUT_RECORDING.get(str(chosen.get("mode")))) is not None:
        chosen["mode"] = mode
    elif special.get(_RECORDING_OPTION):
        chosen["options"] = {**special, _RECORDING_OPTION: False}
    else:
        return chosen
    _log.warning(
        "blocks are compiled without CUDA graphs, which replay kernels on the memory that "
        "parameters had when they were recorded: at this stage parameters are freed after use."
    )
    return chosen


def _is_single(module: nn.Module) -> bool:
    """Whether a module is one of torch's own layers, or of a class derived from one."""
    kinds = (kind.__module__ for kind in type(module).__mro__ if kind is not nn.Module)
    is_torchs = any(name.startswith("torch.nn.modules.") for name in kinds)
    return is_torchs and not any(True for _ in module.children())


def _blocks(root: nn.Module, sites: Iterable[Site]) -> dict[nn.Module, str]:
    """The modules to compile with their names; nothing is gathered inside them.

    A single layer of torch's own is one kernel already.
    """
    names = {site.module: site.name for site in sites if site.module is not root}

    return {
        module: name
        for module, name in names.items()
        if not _is_single(module)
        and not any(inner in names for inner in module.modules() if inner is not module)
    }


def _loss_of(root: nn.Module) -> nn.Module | None:
    """The language model of transformers inside a model that computes its loss by itself, if any.

    It casts the logits of a whole vocabulary to fp32 and keeps a tensor of that size for backward;
    compiled, it keeps the logits themselves.
    """
    for module in root.modules():
        if isinstance(getattr(type(module), "loss_function", None), property):
            is_own = _LOSS not in vars(module) and getattr(module, "loss_type", None) in _LOSSES
            return module if is_own else None
    return None


def compile_blocks(
    root: nn.Module,
    sites: Sequence[Site],
    backend: str | Callable[..., Any],
    options: Mapping[str, Any],
) -> tuple[Compiled, ...]:
    """Compile the blocks of a model and its loss, or the model itself if it has no blocks.

    Args:
        root: the model.
        sites: where units are gathered.
        backend: of ``torch.compile``.
        options: further arguments of ``torch.compile``.
    """
    if any(site.frees for site in sites):
        options = _without_recording(options)

    def compile_(function: Function) -> Function:
        # The compiler takes some out of the dict that it is given as "options".
        return torch.compile(function, backend=backend, **copy.deepcopy(dict(options)))

    blocks = _blocks(root, sites)
    functions: dict[int, Function] = {}
    watches: dict[type[nn.Module], _Watch] = {}
    made: list[Compiled] = []
    for block, name in (blocks or {root: type(root).__name__}).items():
        plain: Any = block.forward
        is_own = _is_own(plain, block)
        function = plain.__func__ if is_own else plain
        if id(function) not in functions:
            functions[id(function)] = compile_(function)
        compiled = functions[id(function)]
        made.append(
            Compiled(
                block,
                "forward",
                plain=plain,
                compiled=MethodType(compiled, block) if is_own else compiled,
                name=name,
                watch=watches.setdefault(type(block), _Watch(type(block).__name__)),
            )
        )
    counts = Counter(type(block).__name__ for block in blocks or (root,))
    parts = [
        f"{count} blocks of {kind} as one" if count > 1 else f"one {kind}"
        for kind, count in counts.items()
    ]
    loss = _loss_of(root) if blocks else None
    if loss is not None:
        plain = loss.loss_function
        name = getattr(plain, "__name__", type(plain).__name__)
        watch = _Watch(name)
        made.append(
            Compiled(loss, _LOSS, plain=plain, compiled=compile_(plain), name=name, watch=watch)
        )
        parts.append(name)
    for each in made:
        each.install()
    is_named = isinstance(backend, str)
    _log.info(
        "compiling %s with the backend %s; the first steps take longer.",
        " and ".join(parts),
        backend if is_named else getattr(backend, "__name__", type(backend).__name__),
    )
    return tuple(made)


def advise(sites: Iterable[Site]) -> None:
    """Say which modules somebody else has compiled in a way that cuts them in pieces."""
    modules = [site.module for site in sites if site.module._compiled_call_impl is not None]
    if modules:
        _log.warning(
            "%s was compiled together with the hooks that gather its parameters, which cuts it in "
            "pieces that are compiled anew for each module. Leave its compile() out and call "
            'engine.compile(), or set "enabled": true in the "compile" block.',
            ", ".join(dict.fromkeys(type(module).__name__ for module in modules)),
        )


def forget(model: nn.Module) -> None:
    """Remove what an engine that is gone has compiled."""
    for module in model.modules():
        for value in list(vars(module).values()):
            if isinstance(value, Compiled) and value.is_installed_in(module):
                value.remove()
