"""The weights of a checkpoint in full, without ranks and without an engine.

Tensors are put together one at a time from the files that hold their ranges, so writing them to
other files needs memory for one of them, or for one file of pickled tensors.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zeroshard.checkpoint import folder as disk
from zeroshard.checkpoint.manifest import WEIGHTS
from zeroshard.checkpoint.reader import Reader
from zeroshard.checkpoint.tensors import write_tensors
from zeroshard.core.access import gathered
from zeroshard.core.slots import slot_of
from zeroshard.errors import CheckpointError, UsageError, compose

__all__ = [
    "LazyTensor",
    "Weights",
    "convert_zero_checkpoint_to_fp32_state_dict",
    "get_fp32_state_dict_from_zero_checkpoint",
    "load_state_dict_from_zero_checkpoint",
    "main",
    "weights_in",
]

_FILE_SUFFIXES = {".bin", ".ckpt", ".pt", ".pth", ".safetensors"}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a checkpoint that is read when it is asked for."""

    reader: Reader
    source: str
    shape: torch.Size
    dtype: torch.dtype

    def numel(self) -> int:
        """Number of elements."""
        return self.shape.numel()

    def element_size(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.numel() * self.element_size()

    def contiguous(self) -> Tensor:
        """The tensor itself, in host memory."""
        manifest = self.reader.manifest
        if self.source in manifest.parameters:
            value = self.reader.whole(WEIGHTS, self.source)
        elif self.source in manifest.extras:
            value = self.reader.common.decode(manifest.extras[self.source])
        else:
            value = self.reader.rank(0).read(f"buffers/{self.source}")
        return value.to(self.dtype)


def weights_in(
    reader: Reader, *, half: torch.dtype | None = torch.float32, with_frozen: bool = True
) -> dict[str, LazyTensor]:
    """What the model's state dict was, to be read one by one; tied names have one tensor.

    Args:
        reader: the checkpoint.
        half: the dtype of floating-point numbers of 16 bits and less; None for the one each
            parameter was computed in. What is quantised stays as it is.
        with_frozen: whether parameters that were not trained are there, too.
    """
    manifest = reader.manifest
    made: dict[str, LazyTensor] = {}

    def tensor_of(source: str) -> LazyTensor:
        if source in manifest.parameters:
            entry = manifest.parameters[source]
            shape, dtype = torch.Size(entry.shape), reader.dtype(WEIGHTS, source)
            if half is None:
                dtype = getattr(torch, entry.dtype)
            if entry.is_opaque:
                return LazyTensor(reader, source, shape, dtype)
        else:
            file, key = reader.rank(0), f"buffers/{source}"
            shape, dtype = file.shape(key), file.dtype(key)
        if half is not None and dtype.is_floating_point and dtype.itemsize <= 2:
            dtype = half
        return LazyTensor(reader, source, shape, dtype)

    for source in dict.fromkeys(manifest.names.values()):
        entry = manifest.parameters.get(source)
        if entry is None or with_frozen or not entry.is_frozen:
            made[source] = tensor_of(source)
    weights = {name: made[source] for name, source in manifest.names.items() if source in made}
    for name, encoded in manifest.extras.items():
        value = reader.common.decode(encoded)
        if isinstance(value, Tensor):
            weights[name] = LazyTensor(reader, name, value.shape, value.dtype)
    return weights


class Weights(Mapping[str, Tensor]):
    """A state dict of which each tensor is read when it is asked for."""

    def __init__(self, weights: Mapping[str, LazyTensor]) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[name].contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _open(checkpoint_dir: str | Path, tag: str | None) -> Reader:
    """The checkpoint of a tag, or the newest, in a folder that may also be that of one itself."""
    root = Path(checkpoint_dir)
    if tag is None and (root / disk.MANIFEST).exists():
        return Reader(root)
    chosen = disk.newest_tag(root) if tag is None else tag
    if chosen is None:
        raise CheckpointError(
            compose(f"{root} has no file {disk.LATEST!r}.", hint="name a tag, a folder in it.")
        )
    return Reader(disk.standing(root / chosen))


def _materialised(weights: Mapping[str, LazyTensor]) -> dict[str, Tensor]:
    """The tensors themselves, one for all names that share it."""
    read: dict[str, Tensor] = {}
    for lazy in weights.values():
        if lazy.source not in read:
            read[lazy.source] = lazy.contiguous()
    return {name: read[lazy.source] for name, lazy in weights.items()}


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | Path,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> dict[str, Any]:
    """The model's state dict with fp32 weights, in host memory.

    Args:
        checkpoint_dir: the folder that ``save_checkpoint`` was given.
        tag: name of the checkpoint; the one saved last by default.
        exclude_frozen_parameters: leave out what was not trained.
        lazy_mode: give a :class:`LazyTensor` for each tensor, read by its ``contiguous()``.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    reader = _open(checkpoint_dir, tag)
    weights = weights_in(reader, with_frozen=not exclude_frozen_parameters)
    if lazy_mode:
        return dict(weights)
    with reader:
        return dict(_materialised(weights))


def load_state_dict_from_zero_checkpoint(
    model: nn.Module, checkpoint_dir: str | Path, tag: str | None = None
) -> nn.Module:
    """Load the fp32 weights of a checkpoint into a model and return it, on the CPU.

    A model that an engine holds stays where it is and with that engine; every rank calls it then.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    with _open(checkpoint_dir, tag) as reader:
        weights = weights_in(reader)
        if any(slot_of(param) is not None for param in model.parameters()):
            with gathered(model, modifier_rank=0):
                model.load_state_dict(_materialised(weights), strict=False)
            return model
        model = model.cpu()
        model.load_state_dict(_materialised(weights), strict=False)
        return model


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | Path,
    output_dir: str | Path,
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Write the fp32 weights of a checkpoint as files that ``from_pretrained`` and torch read.

    Args:
        checkpoint_dir: the folder that ``save_checkpoint`` was given.
        output_dir: a folder, or a file if its name ends in .bin, .pt, .pth, .ckpt or .safetensors.
        max_shard_size: largest size of a file, such as "5GB"; None for one file.
        safe_serialization: whether files in a folder are safetensors.
        tag: name of the checkpoint; the one saved last by default.
        exclude_frozen_parameters: leave out what was not trained.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        UsageError: the size cannot be read.
    """
    output = Path(output_dir)
    most = None if max_shard_size is None else _nbytes(max_shard_size)
    with _open(checkpoint_dir, tag) as reader:
        weights = weights_in(reader, with_frozen=not exclude_frozen_parameters)
        if output.suffix in _FILE_SUFFIXES and not output.is_dir():
            output.parent.mkdir(parents=True, exist_ok=True)
            _write(output, weights)
            return
        output.mkdir(parents=True, exist_ok=True)
        stem, suffix = ("model", "safetensors") if safe_serialization else ("pytorch_model", "bin")
        shards = list(_shards(weights, most))
        if len(shards) == 1:
            _write(output / f"{stem}.{suffix}", shards[0])
            return
        places: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            name = f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}"
            _write(output / name, shard)
            places |= dict.fromkeys(shard, name)
        total = sum(
            lazy.nbytes for lazy in {lazy.source: lazy for lazy in weights.values()}.values()
        )
        index = {"metadata": {"total_size": total}, "weight_map": places}
        disk.write_text(output / f"{stem}.{suffix}.index.json", json.dumps(index, indent=2))


def _write(path: Path, weights: Mapping[str, LazyTensor]) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    if path.suffix == ".safetensors":
        write_tensors(unfinished, weights, {"format": "pt"})
    else:
        torch.save(_materialised(weights), unfinished)
    shutil.move(unfinished, path)


def _shards(weights: Mapping[str, LazyTensor], most: int | None) -> Iterator[dict[str, LazyTensor]]:
    """Divide weights, in order, into parts of at most that many bytes; tied ones stay together."""
    tied: dict[str, list[str]] = {}
    for name, lazy in weights.items():
        tied.setdefault(lazy.source, []).append(name)
    part: dict[str, LazyTensor] = {}
    nbytes = 0
    for names in tied.values():
        lazy = weights[names[0]]
        if part and most is not None and nbytes + lazy.nbytes > most:
            yield part
            part, nbytes = {}, 0
        part |= dict.fromkeys(names, lazy)
        nbytes += lazy.nbytes
    yield part


def _nbytes(size: str | int) -> int:
    found = re.fullmatch(r"([\d.]+)\s*([KMGT]?I?)B?", str(size).strip().upper())
    if found is None or found.group(2) not in _UNITS | _BINARY_UNITS:
        raise UsageError(f'max_shard_size is {size!r}, which is no size such as "5GB" or "500MB".')
    return int(float(found.group(1)) * (_UNITS | _BINARY_UNITS)[found.group(2)])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program that lies beside every checkpoint under the name zero_to_fp32.py."""
    parser = argparse.ArgumentParser(
        prog="zero_to_fp32.py", description="Make plain fp32 weights of a checkpoint."
    )
    parser.add_argument("checkpoint_dir", help="the folder that save_checkpoint was given")
    parser.add_argument("output_dir", help="a folder, or a file such as pytorch_model.bin")
    parser.add_argument("--max_shard_size", default="5GB", help='largest size of a file, as "5GB"')
    parser.add_argument("--safe_serialization", action="store_true", help="write safetensors")
    parser.add_argument("-t", "--tag", help="name of the checkpoint; the newest by default")
    parser.add_argument(
        "--exclude_frozen_parameters", action="store_true", help="leave out what was not trained"
    )
    parser.add_argument("-d", "--debug", action="store_true", help="accepted; changes nothing")
    given = vars(parser.parse_args(argv))
    given.pop("debug")
    convert_zero_checkpoint_to_fp32_state_dict(**given)
