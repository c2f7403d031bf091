"""ZeRO training for PyTorch: DeepSpeed's configuration, launcher and engine on one small core."""

from __future__ import annotations

from zeroshard.core.access import gathered
from zeroshard.core.world import init_distributed
from zeroshard.engine.arguments import add_config_arguments
from zeroshard.engine.build import initialize, register_external_parameter
from zeroshard.engine.engine import Engine, MemoryReport
from zeroshard.errors import ConfigError, DistributedError, Error, LossScaleError, UsageError

__all__ = [
    "ConfigError",
    "DistributedError",
    "Engine",
    "Error",
    "LossScaleError",
    "MemoryReport",
    "UsageError",
    "add_config_arguments",
    "gathered",
    "init_distributed",
    "initialize",
    "register_external_parameter",
]
__version__ = "0.1.0.dev0"
