"""A checkpoint that is open for reading: its manifest, and ranges of its tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from zeroshard.checkpoint import folder as disk
from zeroshard.checkpoint.encoding import Decoder
from zeroshard.checkpoint.manifest import Manifest
from zeroshard.checkpoint.objects import load_objects
from zeroshard.checkpoint.tensors import TensorFile
from zeroshard.core.layout import Range
from zeroshard.errors import CheckpointError, compose

__all__ = ["Reader"]

_MOST_OPEN = 128


class Reader:
    """A checkpoint in a folder; close it after use.

    Args:
        folder: the one that its tag names.
        rank: the sizes of all files are compared with those in the manifest by ``world`` readers
            together, of which this is one.
        world: how many they are.

    Raises:
        CheckpointError: there is none, or files of it are missing or have another size.
    """

    def __init__(self, folder: Path, rank: int = 0, world: int = 1) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self._files: OrderedDict[str, TensorFile] = OrderedDict()
        self._decoders: dict[int, Decoder] = {}
        self._objects: dict[str, Any] | None = None
        for name, nbytes in list(self.manifest.files.items())[rank::world]:
            path = folder / name
            if not path.exists():
                raise CheckpointError(
                    compose(f"{path} is missing.", hint="use another checkpoint, or copy it again.")
                )
            if (size := path.stat().st_size) != nbytes:
                raise CheckpointError(
                    compose(
                        f"{path} has {size} bytes, and had {nbytes} when it was written.",
                        hint="use another checkpoint, or copy this one again.",
                    )
                )
        self.file(disk.COMMON)  # its header is looked at now
        self.common = Decoder(self._reads(disk.COMMON), self._unpickle)

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        while self._files:
            self._files.popitem()[1].close()

    def file(self, name: str) -> TensorFile:
        """A file of tensors by its name."""
        if name not in self._files:
            if name not in self.manifest.files:
                raise CheckpointError(f"{self.folder / disk.MANIFEST} does not name {name}.")
            if len(self._files) >= _MOST_OPEN:
                self._files.popitem(last=False)[1].close()
            self._files[name] = TensorFile(self.folder / name)
        self._files.move_to_end(name)
        return self._files[name]

    def rank(self, rank: int) -> TensorFile:
        """The file of a rank."""
        return self.file(disk.rank_file(rank))

    def decoder(self, rank: int) -> Decoder:
        """Reads values that a rank has encoded; a tensor that several share is one again."""
        if rank not in self._decoders:
            self._decoders[rank] = Decoder(self._reads(disk.rank_file(rank)))
        return self._decoders[rank]

    def read_range(self, kind: str, name: str, wanted: Range, out: Tensor) -> None:
        """Fill a flat tensor with a range of a parameter's tensor of some kind.

        Raises:
            CheckpointError: files hold less than that.
        """
        found = 0
        for piece in self.manifest.parameters[name].pieces:
            start = max(wanted.start, piece.range.start)
            stop = min(wanted.stop, piece.range.stop)
            if start < stop:
                part = out[start - wanted.start : stop - wanted.start]
                file = self.rank(piece.rank)
                file.read_range(f"{kind}/{name}", start - piece.range.start, part)
                found += stop - start
        if found != wanted.numel:
            raise CheckpointError(f"{self.folder} holds only a part of {name}.")

    def has(self, kind: str, name: str) -> bool:
        """Whether a tensor of some kind was saved of a parameter."""
        pieces = self.manifest.parameters[name].pieces
        return any(f"{kind}/{name}" in self.rank(piece.rank) for piece in pieces[:1])

    def dtype(self, kind: str, name: str) -> torch.dtype:
        """The dtype that a parameter's tensor of some kind was saved in."""
        first, *_ = self.manifest.parameters[name].pieces
        return self.rank(first.rank).dtype(f"{kind}/{name}")

    def whole(self, kind: str, name: str) -> Tensor:
        """A parameter's whole tensor of some kind, in host memory."""
        shape = self.manifest.parameters[name].shape
        out = torch.empty(shape, dtype=self.dtype(kind, name), device="cpu")
        self.read_range(kind, name, Range(0, out.numel()), out.view(-1))
        return out

    def _reads(self, name: str) -> Callable[[str], Tensor]:
        # Through file(), which opens it anew if it was closed to make room for others.
        return lambda key: self.file(name).read(key)

    def _unpickle(self, key: str) -> Any:
        if self._objects is None:
            self._objects = load_objects(self.folder / disk.OBJECTS)
        return self._objects[key]
