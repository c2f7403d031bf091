"""The manifest: what a checkpoint holds, and which file has which range of it, as JSON.

Tensors of the model and its optimizer are stored flat, in ranges. A range of a parameter is in the
file of one rank, under the kind of tensor and the name of the parameter, such as
``weights/head.weight`` or ``state.exp_avg/head.weight``. What was a unit, and where its shards were
cut, is of no importance any more: whoever reads asks for ranges of parameters.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from zeroshard.checkpoint.folder import MANIFEST
from zeroshard.core.layout import Range
from zeroshard.errors import CheckpointError, compose

__all__ = ["GRADIENTS", "STATE", "UNREDUCED", "WEIGHTS", "Entry", "Manifest", "Piece", "Writer"]

_FORMAT = "zeroshard checkpoint"
_VERSION = 1

WEIGHTS = "weights"
"""Weights with all digits that are kept: master weights, or those of a frozen parameter."""
GRADIENTS = "gradients"
"""Averaged gradients of an accumulation that was under way."""
UNREDUCED = "unreduced"
"""A rank's own gradients, whole, of an accumulation that was under way."""
STATE = "state."
"""State of the optimizer, by its key."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of a parameter's elements, and the rank whose file holds it."""

    rank: int
    range: Range


@dataclass(frozen=True, slots=True)
class Entry:
    """A parameter.

    ``dtype`` is the one it is computed in. If it ``is_opaque``, its bits are no plain numbers, as
    when it is quantised. ``group`` is its param group, if it is trained. Of the
    optimizer's state ``slices`` are in ranges like the weights, ``numbers`` belong to all of them,
    and ``blocks`` are what cannot be cut anew, by the rank whose slice they belong to.
    """

    shape: tuple[int, ...]
    dtype: str
    is_frozen: bool
    is_opaque: bool = False
    pieces: tuple[Piece, ...] = ()
    group: int | None = None
    slices: tuple[str, ...] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)
    blocks: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_state(self) -> bool:
        """Whether the optimizer had stepped it."""
        return bool(self.slices or self.numbers or self.blocks)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@dataclass(frozen=True, slots=True)
class Writer:
    """Who wrote a checkpoint."""

    world: int
    stage: int
    precision: str
    zeroshard: str = field(default_factory=lambda: _version("zeroshard"))
    torch: str = field(default_factory=lambda: _version("torch"))


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint holds.

    Args:
        writer: who wrote it.
        files: sizes in bytes, by name.
        parameters: by name, each once.
        names: names in the order of the model's state dict, each with the parameter or buffer it
            stands for; tied names stand for one.
        buffers: names of those that are saved.
        extras: entries of the model's state dict that are neither, encoded.
        without_frozen: whether frozen parameters were left out.
        progress: counters of the engine.
        has_gradients: whether a step was under way, whose gradients so far are there.
        scaler: state of the loss scale.
        schedule: state of the learning rate schedule, encoded.
        optimizer: class and param groups, encoded.
        client: the caller's own state, encoded.
    """

    writer: Writer
    files: Mapping[str, int]
    parameters: Mapping[str, Entry]
    names: Mapping[str, str]
    buffers: tuple[str, ...]
    extras: Mapping[str, Any]
    without_frozen: bool
    progress: Mapping[str, Any]
    has_gradients: bool
    scaler: Mapping[str, Any] | None
    schedule: Any
    optimizer: Mapping[str, Any] | None
    client: Any

    def to_json(self) -> str:
        """The text of the file."""
        content = {item.name: getattr(self, item.name) for item in fields(self)}
        content["writer"] = asdict(self.writer)
        content["parameters"] = {name: _of(entry) for name, entry in self.parameters.items()}
        content = {"format": _FORMAT, "version": _VERSION, **content}
        return json.dumps(content, separators=(",", ":"))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest in a folder.

        Raises:
            CheckpointError: there is none, or it is none of this version.
        """
        path = folder / MANIFEST
        try:
            content: Any = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(_missing(folder)) from error
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        is_ours = isinstance(content, dict) and content.pop("format", None) == _FORMAT
        if not is_ours or content.pop("version", None) != _VERSION:
            raise CheckpointError(
                compose(
                    f"{path} is no manifest of a zeroshard checkpoint of version {_VERSION}.",
                    hint="use the zeroshard that wrote it, or a newer one.",
                )
            )
        try:
            content["writer"] = Writer(**content["writer"])
            content["parameters"] = {
                name: _entry(entry) for name, entry in content["parameters"].items()
            }
            content["buffers"] = tuple(content["buffers"])
            return cls(**content)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: {error!r}") from error


def _missing(folder: Path) -> str:
    if not folder.exists():
        parent = folder.parent
        found = [p.parent.name for p in sorted(parent.glob(f"*/{MANIFEST}"))]
        there = f"it has {', '.join(found)}." if found else "there is no checkpoint in it."
        return compose(f"there is no checkpoint {folder}.", hint=f"look into {parent}: {there}")
    of_deepspeed = any(folder.glob("*_states.pt"))
    return compose(
        f"{folder} holds no {MANIFEST}, so it is no checkpoint of zeroshard"
        + (" but one of DeepSpeed." if of_deepspeed else "."),
        hint="make plain weights of it with DeepSpeed's zero_to_fp32.py, and load them by "
        "engine.load_module_state_dict(state)."
        if of_deepspeed
        else "name the folder that was given to save_checkpoint().",
    )


def _of(entry: Entry) -> dict[str, Any]:
    content: dict[str, Any] = {
        "shape": list(entry.shape),
        "dtype": entry.dtype,
        "is_frozen": entry.is_frozen,
        **({"is_opaque": True} if entry.is_opaque else {}),
        "pieces": [[piece.rank, *piece.range] for piece in entry.pieces],
    }
    if entry.group is not None:
        content["group"] = entry.group
    for name in ("slices", "numbers", "blocks"):
        if getattr(entry, name):
            content[name] = getattr(entry, name)
    return content


def _entry(content: dict[str, Any]) -> Entry:
    pieces = [Piece(rank, Range(start, stop)) for rank, start, stop in content["pieces"]]
    given: dict[str, Any] = {
        **content,
        "shape": tuple(content["shape"]),
        "pieces": tuple(pieces),
        "slices": tuple(content.get("slices", ())),
    }
    return Entry(**given)
