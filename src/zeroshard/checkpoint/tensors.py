"""Files of tensors in the safetensors format, written as a stream and read by ranges.

The format is a length, a header of JSON and the bytes of the tensors, so both ways are short. The
library's own writer wants all tensors in memory at once, and its reader maps files, where one that
is cut short while it is read ends the process. Here at most one tensor is copied at a time, and
whatever is wrong with a file is an error that names it.
"""

from __future__ import annotations

import ctypes
import json
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from zeroshard.errors import CheckpointError, compose

__all__ = ["TensorFile", "dtype_named", "memory_of", "name_of_dtype", "on_host", "write_tensors"]

_NAMES: Mapping[str, str] = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
_DTYPES: Mapping[str, torch.dtype] = {code: getattr(torch, name) for code, name in _NAMES.items()}
_CODES: Mapping[torch.dtype, str] = {dtype: code for code, dtype in _DTYPES.items()}
_LENGTH_BYTES = 8
_ALIGN_BYTES = 8


def name_of_dtype(dtype: torch.dtype) -> str:
    """The name of a dtype, such as ``float32``."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """The dtype of a name."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"there is no dtype {name!r} in this version of torch.")
    return dtype


def on_host(tensor: Tensor) -> Tensor:
    """A tensor in dense host memory; itself where it is there already."""
    return tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()


def memory_of(tensor: Tensor) -> memoryview:
    """The memory of a dense tensor on the host, valid as long as the tensor is.

    Not through numpy: what numpy has seen can never be resized again, and storages of units are.
    """
    if not tensor.nbytes:
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


class Storable(Protocol):
    """A tensor that is there, or one that is read when it is asked for."""

    @property
    def shape(self) -> torch.Size:
        """Its shape."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        ...

    def numel(self) -> int:
        """Number of elements."""
        ...

    def element_size(self) -> int:
        """Bytes of an element."""
        ...

    def contiguous(self) -> Tensor:
        """The tensor itself."""
        ...


def write_tensors(
    path: Path, tensors: Mapping[str, Storable], metadata: Mapping[str, str] | None = None
) -> int:
    """Write tensors to a file, one after another, and wait until it is on the disk.

    Returns:
        The size of the file in bytes.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    # Large elements first, so that each tensor starts at a multiple of its element's size.
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _CODES:
            raise CheckpointError(
                f"{name} is of dtype {tensor.dtype}, which no file here can hold."
            )
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGN_BYTES)
    with path.open("wb", buffering=0) as file:
        _write(file, memoryview(len(text).to_bytes(_LENGTH_BYTES, "little") + text))
        for name in order:
            host = on_host(tensors[name].contiguous())
            _write(file, memory_of(host))
        os.fsync(file.fileno())
    return _LENGTH_BYTES + len(text) + end


def _write(file: Any, data: memoryview) -> None:
    while len(data):
        data = data[file.write(data) :]


class TensorFile:
    """A file of tensors, of which ranges are read; its header has been checked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise _damaged(path, f"cannot be opened: {error.strerror}") from error
        # Without it, a file that is read tensor by tensor would have to be closed by whoever reads.
        self._closing = weakref.finalize(self, os.close, self._file)
        self.nbytes = os.fstat(self._file).st_size
        self._start, self._entries, self.metadata = self._read_header()

    def close(self) -> None:
        """Give the file back."""
        self._closing()
        self._file = -1  # the system gives the old number to the next file that is opened

    def _read_header(self) -> tuple[int, dict[str, Any], dict[str, str]]:
        length = int.from_bytes(os.pread(self._file, _LENGTH_BYTES, 0), "little")
        start = _LENGTH_BYTES + length
        if self.nbytes < start:
            raise _damaged(self.path, f"is cut short: it has {self.nbytes} bytes")
        try:
            header: Any = json.loads(os.pread(self._file, length, _LENGTH_BYTES))
            metadata = header.pop("__metadata__", {})
            end = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
            for entry in header.values():
                numel = torch.Size(entry["shape"]).numel()
                first, last = entry["data_offsets"]
                assert 0 <= first <= last, "offsets are in order"
                assert last - first == numel * _DTYPES[entry["dtype"]].itemsize, "a size is right"
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise _damaged(self.path, "has a header that cannot be read") from error
        if self.nbytes != end:
            raise _damaged(self.path, f"has {self.nbytes} bytes, and should have {end}")
        return start, header, metadata

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._entries)

    def shape(self, name: str) -> torch.Size:
        """The shape of a tensor."""
        return torch.Size(self._entry(name)["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""
        return _DTYPES[self._entry(name)["dtype"]]

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self._entries:
            raise _damaged(self.path, f"does not hold {name}")
        return self._entries[name]

    def read(self, name: str) -> Tensor:
        """A whole tensor, in host memory."""
        out = torch.empty(self.shape(name), dtype=self.dtype(name), device="cpu")
        self.read_range(name, 0, out.view(-1))
        return out

    def read_range(self, name: str, start: int, out: Tensor) -> None:
        """Fill a flat tensor with the elements from ``start`` on, cast to its dtype if need be."""
        dtype = self.dtype(name)
        first, last = self._entry(name)["data_offsets"]
        offset = first + start * dtype.itemsize
        if start < 0 or offset + out.numel() * dtype.itemsize > last:
            raise _damaged(self.path, f"holds less of {name} than its manifest says")
        is_direct = out.device.type == "cpu" and out.dtype == dtype and out.is_contiguous()
        host = out if is_direct else torch.empty(out.numel(), dtype=dtype, device="cpu")
        view, at = memory_of(host), self._start + offset
        while len(view):
            num_read = os.preadv(self._file, [view], at)
            if not num_read:
                raise _damaged(self.path, "ended while it was read")
            view, at = view[num_read:], at + num_read
        if not is_direct:
            out.copy_(host)


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        compose(f"{path} {what}.", hint="use another checkpoint, or copy this one again.")
    )
