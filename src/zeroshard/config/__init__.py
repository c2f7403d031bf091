"""The configuration: DeepSpeed's JSON, typed, and checked as a whole before anything is built.

`load` takes a dict, a file or base64 and returns a `Config`, or raises one `ConfigError` that lists
all problems. `Config.batch` resolves the batch numbers for a number of ranks. `table.TABLE` holds
every known key with its treatment, for the reference page.
"""

from __future__ import annotations

from zeroshard.config.batch import Batch, resolve
from zeroshard.config.parse import load
from zeroshard.config.schema import (
    ActivationCheckpointing,
    Bf16Config,
    Config,
    DataTypes,
    ExtensionConfig,
    Fp16Config,
    OptimizerConfig,
    SchedulerConfig,
    ZeroConfig,
)

__all__ = [
    "ActivationCheckpointing",
    "Batch",
    "Bf16Config",
    "Config",
    "DataTypes",
    "ExtensionConfig",
    "Fp16Config",
    "OptimizerConfig",
    "SchedulerConfig",
    "ZeroConfig",
    "load",
    "resolve",
]
