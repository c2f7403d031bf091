"""``deepspeed.runtime.zero.parameter_offload``: the hooks of a model, for taking them off."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from deepspeed._names import names

if TYPE_CHECKING:
    from zeroshard.core.hooks import Runtime

__all__ = ["DeepSpeedZeRoOffload"]


class DeepSpeedZeRoOffload:
    """The hooks of one engine's model, as libraries take them off to run gathered parameters.

    Those of all modules are one here: its ``remove`` makes them do nothing, until
    ``_register_deepspeed_module`` puts them to work again.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.module = runtime.root
        self.forward_hooks: list[_Hooks] = [_Hooks(runtime)]
        self.backward_hooks: list[_Hooks] = []  # backward needs none that outlive its forward

    def _register_deepspeed_module(self, module: nn.Module) -> None:
        del module  # they never left it
        self._runtime.unmute()
        self.forward_hooks = [_Hooks(self._runtime)]


class _Hooks:
    """What registering the hooks returned."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def remove(self) -> None:
        """Let the model run as in plain PyTorch."""
        self._runtime.mute()


__getattr__, __dir__ = names(__name__)
