"""Full parameters outside of forward, by DeepSpeed's name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType

from torch import nn

from zeroshard.core.access import Gatherable, gathered, parameters_in
from zeroshard.core.external import register_external_parameter
from zeroshard.core.hooks import Runtime
from zeroshard.core.slots import slot_of
from zeroshard.engine.engine import Engine

__all__ = ["GatheredParameters", "unwrap_model_for_generation"]


class GatheredParameters:
    """A block in which parameters are full: :func:`zeroshard.gathered` with DeepSpeed's arguments.

    How blocks nest and what becomes of edits is said there.

    Args:
        params: a module, a parameter, or an iterable of these, however nested. None, tensors and
            parameters that no engine manages may be among them.
        modifier_rank: the rank whose edits are kept.
        fwd_module: a module that reads the parameters in its forward without holding them.
        enabled: false to do nothing at all.
    """

    def __init__(
        self,
        params: Gatherable,
        modifier_rank: int | None = None,
        fwd_module: nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        self._params = parameters_in(params) if enabled else []
        self._modifier_rank = modifier_rank
        self._entered: list[AbstractContextManager[None]] = []
        if fwd_module is not None:
            for param in self._params:
                if isinstance(param, nn.Parameter) and slot_of(param) is not None:
                    register_external_parameter(fwd_module, param)

    def __enter__(self) -> None:
        context = gathered(self._params, self._modifier_rank)
        context.__enter__()
        self._entered.append(context)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._entered.pop().__exit__(kind, error, traceback)


@contextmanager
def unwrap_model_for_generation(model: nn.Module) -> Iterator[nn.Module]:
    """A block in which a model is full and runs as in plain PyTorch; a collective at its start.

    Inside, ranks run the model as often as each of them likes, since no rank waits for another, and
    gradients are off. The block gives the model without its engine.

    Args:
        model: an engine, or its model.
    """
    module = model.module if isinstance(model, Engine) else model
    with ExitStack() as inside:
        inside.enter_context(gathered(module))
        for runtime in _runtimes(module):
            inside.enter_context(runtime.quiet())
        yield module


def _runtimes(module: nn.Module) -> list[Runtime]:
    """Those of the engines that hold the module's parameters."""
    slots = (slot_of(param) for param in module.parameters())
    engines = (slot.unit.engine() for slot in slots if slot is not None and slot.unit.engine)
    return list(dict.fromkeys(engine.runtime for engine in engines if engine is not None))
