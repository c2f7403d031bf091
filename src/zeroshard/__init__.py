"""ZeRO training for PyTorch: DeepSpeed's configuration, launcher and engine on one small core.

The public names are imported when they are first used, so that the launcher, which shares this
package, starts without waiting for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zeroshard import checkpoint, checkpointing, zero
    from zeroshard.core.access import gathered
    from zeroshard.core.external import register_external_parameter
    from zeroshard.core.world import init_distributed
    from zeroshard.engine.arguments import add_config_arguments
    from zeroshard.engine.build import initialize
    from zeroshard.engine.engine import Engine, MemoryReport
    from zeroshard.errors import (
        CheckpointError,
        ConfigError,
        DistributedError,
        Error,
        LossScaleError,
        UsageError,
    )

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DistributedError",
    "Engine",
    "Error",
    "LossScaleError",
    "MemoryReport",
    "UsageError",
    "add_config_arguments",
    "checkpoint",
    "checkpointing",
    "gathered",
    "init_distributed",
    "initialize",
    "register_external_parameter",
    "zero",
]
__version__ = "0.1.0.dev0"

_HOMES = {
    "Engine": "engine.engine",
    "MemoryReport": "engine.engine",
    "add_config_arguments": "engine.arguments",
    "gathered": "core.access",
    "init_distributed": "core.world",
    "initialize": "engine.build",
    "register_external_parameter": "core.external",
}


_MODULES = frozenset({"checkpoint", "checkpointing", "zero"})


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    value = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
