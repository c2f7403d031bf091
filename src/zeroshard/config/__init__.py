"""The configuration: DeepSpeed's JSON, typed, and checked as a whole before anything is built.

`load` takes a dict, a file or base64 and returns a `Config`, or raises one `ConfigError` that lists
all problems. `Facts` are what the caller of `initialize` knows and "auto" stands for. `explain`
lists the same values with where each comes from. `Config.batch` resolves the batch numbers for a
number of ranks. `table.TABLE` holds every known key with its treatment, for the reference page.
"""

from __future__ import annotations

from zeroshard.config.auto import Facts, Given
from zeroshard.config.batch import Batch, resolve
from zeroshard.config.explain import Entry, explain
from zeroshard.config.parse import ConfigSource, load, peek
from zeroshard.config.schema import (
    ActivationCheckpointing,
    AioConfig,
    Bf16Config,
    CompileConfig,
    Config,
    DataTypes,
    ExtensionConfig,
    Fp16Config,
    LeafModule,
    OffloadOptimizer,
    OffloadParam,
    OptimizerConfig,
    SchedulerConfig,
    TorchAutocast,
    ZeroConfig,
)

__all__ = [
    "ActivationCheckpointing",
    "AioConfig",
    "Batch",
    "Bf16Config",
    "CompileConfig",
    "Config",
    "ConfigSource",
    "DataTypes",
    "Entry",
    "ExtensionConfig",
    "Facts",
    "Fp16Config",
    "Given",
    "LeafModule",
    "OffloadOptimizer",
    "OffloadParam",
    "OptimizerConfig",
    "SchedulerConfig",
    "TorchAutocast",
    "ZeroConfig",
    "explain",
    "load",
    "peek",
    "resolve",
]
