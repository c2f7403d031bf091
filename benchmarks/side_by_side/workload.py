"""What every engine of a run computes, and how one engine's settings are written in a word."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

__all__ = ["SHAPES", "Shape", "Variant", "Workload"]


@dataclass(frozen=True)
class Shape:
    """Widths of a Llama."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int = 128256

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, whose head is not its embedding."""
        attention = 2 * self.hidden * self.hidden // self.heads * (self.heads + self.kv_heads)
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * layer + (2 * self.vocab + 1) * self.hidden


SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 128, 256),
    "1b": Shape(2048, 16, 32, 8, 8192),
    "3b": Shape(3072, 28, 24, 8, 8192),
    "8b": Shape(4096, 32, 32, 8, 14336),
}

_CHOICES = {
    "model": tuple(SHAPES),
    "checkpointing": ("none", "full"),
    "reduce": ("bf16", "fp32"),
    "dtype": ("bf16", "fp32"),
    "compile": (True, False),
}


@dataclass(frozen=True)
class Workload:
    """A model, its batch on each rank, and how it is computed.

    ``reduce`` is the dtype gradients travel in and ``dtype`` the one computed in; ``warmup`` and
    ``steps`` count steps before and in the measurement.
    """

    model: str
    batch: int
    seq: int
    compile: bool = False
    checkpointing: str = "none"
    reduce: str = "bf16"
    dtype: str = "bf16"
    warmup: int = 4
    steps: int = 8

    def __post_init__(self) -> None:
        """Refuse values that no engine knows."""
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                allowed = ", ".join(str(choice).lower() for choice in choices)
                raise ValueError(f"{name} is {value!r}; it can be {allowed}")
        for name in ("batch", "seq", "warmup", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")

    @property
    def tokens(self) -> int:
        """Tokens that one rank trains on in one step."""
        return self.batch * self.seq

    def describe(self) -> str:
        """Return the workload in words."""
        parts = [
            f"{self.model.upper()} Llama",
            f"{self.batch} x {self.seq:,} tokens per rank",
            "blocks compiled" if self.compile else "eager",
            f"{'full' if self.checkpointing == 'full' else 'no'} activation checkpointing",
            f"{self.reduce} reduction" if self.dtype == "bf16" else self.dtype,
        ]
        return ", ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


_STAGED = {"zeroshard": "0123", "deepspeed": "0123"}
_PLAIN = ("plain", "plain-master", "fsdp2", "fsdp2-root-kept", "fsdp2-kept")
_OF_WORKLOAD = ("compile", "checkpointing", "reduce")
# What leaves the device, and the blocks of the configuration that say so.
_OFFLOADS = {
    "none": (),
    "optimizer": ("offload_optimizer",),
    "all": ("offload_optimizer", "offload_param"),
}
_OFFLOADABLE = {"zeroshard": tuple(_OFFLOADS), "deepspeed": tuple(_OFFLOADS)}
_OFFLOADABLE |= dict.fromkeys(("fsdp2", "fsdp2-root-kept", "fsdp2-kept"), ("none", "all"))


@dataclass(frozen=True)
class Variant:
    """An engine and what is set otherwise for it, written ``ENGINE[:KEY=VALUE]...``.

    A key is a field of the workload (compile, checkpointing, reduce), ``offload`` (none, optimizer
    or all), or the path of a key in the JSON configuration of zeroshard or DeepSpeed, as in
    ``zeroshard-3:zeroshard.gather=nccl``.
    """

    label: str
    engine: str
    changes: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Read the written form.

        Raises:
            ValueError: it names no engine, or a key that the engine does not have.
        """
        engine, *settings = text.split(":")
        family, _, stage = engine.rpartition("-")
        known = engine in _PLAIN or (len(stage) == 1 and stage in _STAGED.get(family, ""))
        if not known:
            staged = ", ".join(f"{name}-N" for name in _STAGED)
            raise ValueError(f"no engine is called {engine!r}; there are {staged}, {_list(_PLAIN)}")
        changes = tuple(_setting(setting) for setting in settings)
        for key, value in changes:
            if key == "offload":
                allowed = _OFFLOADABLE.get(family if family in _STAGED else engine, ("none",))
                if value not in allowed:
                    raise ValueError(f"{engine}: offload can be {_list(allowed)}, not {value!r}")
            elif key not in _OF_WORKLOAD and family not in _STAGED:
                raise ValueError(f"{engine} has no configuration, so {key!r} cannot be set")
        return cls(text, engine, changes)

    @property
    def family(self) -> str:
        """The engine without its stage."""
        return self.engine.rpartition("-")[0] if self.stage is not None else self.engine

    @property
    def stage(self) -> int | None:
        """The ZeRO stage, where the engine has one."""
        return int(self.engine[-1]) if self.engine[-1].isdigit() and "-" in self.engine else None

    @property
    def offload(self) -> str:
        """What is kept in host memory: none, optimizer (state and master weights) or all."""
        return str(dict(self.changes).get("offload", "none"))

    def workload(self, common: Workload) -> Workload:
        """Return the workload with this engine's changes."""
        return replace(common, **{k: v for k, v in self.changes if k in _OF_WORKLOAD})

    def configuration(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """Return a JSON configuration with this engine's changes."""
        result: dict[str, Any] = json.loads(json.dumps(base))
        for name in _OFFLOADS[self.offload]:
            block = {"device": "cpu", "pin_memory": True}
            result.setdefault("zero_optimization", {})[name] = block
        for path, value in self.changes:
            if path in _OF_WORKLOAD or path == "offload":
                continue
            *blocks, key = path.split(".")
            block = result
            for name in blocks:
                block = block.setdefault(name, {})
            block[key] = value
        return result

    def having(self, setting: str) -> Variant:
        """Return the variant with one more setting."""
        return Variant.parse(f"{self.label}:{setting}")


def _setting(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not (key and separator):
        raise ValueError(f"{text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _list(words: tuple[str, ...]) -> str:
    return " and ".join([*([", ".join(words[:-1])] if words[:-1] else []), words[-1]])
