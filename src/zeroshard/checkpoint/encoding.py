"""Python values as JSON and tensors, and back, without pickle.

JSON has strings, numbers, lists and objects with string keys; what is more than that becomes an
object with the key ``"#"``, which names its kind. Tensors go beside it by name. What no kind fits
is an object of its own class: it is handed out to be pickled, for whoever wants that.
"""

from __future__ import annotations

import argparse
import base64
import enum
import math
import pathlib
import sys
import types
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from datetime import date, datetime, timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zeroshard.checkpoint.tensors import dtype_named, name_of_dtype
from zeroshard.errors import CheckpointError, UsageError

__all__ = ["Decoder", "Encoder"]

_TAG = "#"
_PLAIN = (type(None), bool, int, str)
_Json = Any


def _is_dense(tensor: Tensor) -> bool:
    return (
        type(tensor) in {Tensor, torch.nn.Parameter}
        and tensor.layout == torch.strided
        and not tensor.is_quantized
        and not tensor.is_meta
        and not (tensor.is_complex() and tensor.dtype != torch.complex64)
    )


def _is_plain_array(value: Any) -> bool:
    """Whether an array or scalar of numpy is its bytes, with a dtype that has a name."""
    is_array = type(value) is np.ndarray or isinstance(value, np.generic)
    return is_array and not value.dtype.hasobject and value.dtype.names is None


class Encoder:
    """Turns values into JSON; collects their ``tensors`` and the ``objects`` that are no data.

    Args:
        prefix: of the names of the tensors.
    """

    def __init__(self, prefix: str) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.objects: dict[str, Any] = {}
        self._prefix = prefix
        self._open: list[int] = []
        self._stored: dict[tuple[Any, ...], str] = {}

    def encode(self, value: Any) -> _Json:
        """The value in JSON; tensors and objects by reference."""
        kind = type(value)
        if kind in _PLAIN or (kind is float and math.isfinite(value)):
            return value
        if id(value) in self._open:
            raise UsageError(f"a {kind.__name__} to be saved contains itself.")
        self._open.append(id(value))
        try:
            return self._encode_more(value, kind)
        finally:
            self._open.pop()

    def _encode_more(self, value: Any, kind: type) -> _Json:  # noqa: PLR0911 - one for each kind
        if kind is list:
            return [self.encode(item) for item in value]
        if kind is dict and all(type(key) is str for key in value) and _TAG not in value:
            return {key: self.encode(item) for key, item in value.items()}
        if isinstance(value, Tensor):
            return self._encode_tensor(value)
        if kind in _ENCODERS:
            return {_TAG: _KIND_NAMES[kind], "v": _ENCODERS[kind](self, value)}
        if isinstance(value, pathlib.PurePath):
            return {_TAG: "path", "v": str(value)}
        if _is_plain_array(value):
            return self._encode_array(np.asarray(value), isinstance(value, np.generic))
        if _is_importable(kind):
            name = f"{kind.__module__}:{kind.__qualname__}"
            if isinstance(value, enum.Enum) and value.name in type(value).__members__:
                return {_TAG: "enum", "class": name, "v": value.name}
            if isinstance(value, dict) and _is_only_a_dict(value):
                return {_TAG: "mapping", "class": name, "v": self.pairs(value)}
        key = str(len(self.objects))
        self.objects[key] = value
        return {_TAG: "object", "v": key}

    def pairs(self, mapping: Mapping[Any, Any]) -> _Json:
        """Keys and values of a mapping, in order."""
        return [[self.encode(key), self.encode(item)] for key, item in mapping.items()]

    def items(self, values: Any) -> _Json:
        """The items of a collection, in its order."""
        return [self.encode(item) for item in values]

    def _encode_tensor(self, value: Tensor) -> _Json:
        if not _is_dense(value):
            key = str(len(self.objects))
            self.objects[key] = value
            return {_TAG: "object", "v": key}
        if not value.dim() and not value.is_complex():
            number = self.encode(value.item())
            return {_TAG: "scalar", "dtype": name_of_dtype(value.dtype), "v": number}
        value = value.resolve_conj().resolve_neg()
        # The same memory is stored once, and is the same tensor when it is read.
        place = (value.data_ptr(), value.dtype, tuple(value.shape), tuple(value.stride()))
        key = self._stored.get(place) if value.numel() else None
        if key is None:
            key = f"{self._prefix}{len(self.tensors)}"
            self.tensors[key] = value.detach()
            self._stored[place] = key
        return {_TAG: "tensor", "v": key}

    def _encode_array(self, value: Any, is_scalar: bool) -> _Json:
        buffer = bytearray(value.tobytes() or b"-")  # torch makes no tensor of an empty one
        raw = torch.frombuffer(buffer, dtype=torch.uint8)[: value.nbytes]
        key = f"{self._prefix}{len(self.tensors)}"
        self.tensors[key] = raw
        shape = None if is_scalar else list(value.shape)
        return {_TAG: "array", "dtype": value.dtype.str, "shape": shape, "v": key}


def _is_importable(kind: type) -> bool:
    return _imported(f"{kind.__module__}:{kind.__qualname__}") is kind


def _is_only_a_dict(value: dict[Any, Any]) -> bool:
    """Whether it is all there is to know of a dict of another class what it contains."""
    try:
        same = type(value)(dict(value))
    except Exception:
        return False
    return same == value and getattr(same, "__dict__", None) == getattr(value, "__dict__", None)


def _imported(name: str) -> Any:
    """A class of a module that the program has imported; None if there is none."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _float(_: Encoder, value: float) -> _Json:
    return repr(value)


def _isoformat(_: Encoder, value: Any) -> _Json:
    return value.isoformat()


def _members(encoder: Encoder, value: Any) -> _Json:
    return encoder.encode(dict(vars(value)))


# What is said of each kind, and how it is read back.
_ENCODERS: Mapping[type, Callable[[Encoder, Any], _Json]] = {
    float: _float,
    dict: Encoder.pairs,
    OrderedDict: Encoder.pairs,
    Counter: Encoder.pairs,
    tuple: Encoder.items,
    set: Encoder.items,
    frozenset: Encoder.items,
    torch.Size: lambda _, value: list(value),
    bytes: lambda _, value: base64.b64encode(value).decode(),
    complex: lambda encoder, value: [encoder.encode(value.real), encoder.encode(value.imag)],
    range: lambda _, value: [value.start, value.stop, value.step],
    torch.dtype: lambda _, value: name_of_dtype(value),
    torch.device: lambda _, value: str(value),
    datetime: _isoformat,
    date: _isoformat,
    timedelta: lambda _, value: [value.days, value.seconds, value.microseconds],
    argparse.Namespace: _members,
    types.SimpleNamespace: _members,
}
_KIND_NAMES: Mapping[type, str] = {
    kind: kind.__name__ if kind.__module__ != "torch" else f"torch.{kind.__name__}"
    for kind in _ENCODERS
}


class Decoder:
    """Turns JSON back into values.

    Args:
        tensor: gives the tensor of a name.
        unpickle: gives the object of a key.
    """

    def __init__(
        self, tensor: Callable[[str], Tensor], unpickle: Callable[[str], Any] | None = None
    ) -> None:
        self._tensor, self._unpickle = tensor, unpickle
        self._tensors: dict[str, Tensor] = {}

    def decode(self, json: _Json) -> Any:
        """The value of some JSON."""
        if isinstance(json, list):
            return [self.decode(item) for item in json]
        if not isinstance(json, dict):
            return json
        if _TAG not in json:
            return {key: self.decode(item) for key, item in json.items()}
        reader = _DECODERS.get(json[_TAG])
        if reader is None:
            raise CheckpointError(
                f"a value of kind {json[_TAG]!r} cannot be read: a newer zeroshard wrote it."
            )
        return reader(self, json)

    def tensor(self, name: str) -> Tensor:
        """A tensor by its name; the same one whenever it is asked for."""
        if name not in self._tensors:
            self._tensors[name] = self._tensor(name)
        return self._tensors[name]

    def pairs(self, json: _Json) -> dict[Any, Any]:
        """A dict of keys and values in a list."""
        return {self.decode(key): self.decode(item) for key, item in json["v"]}

    def items(self, json: _Json) -> list[Any]:
        """The items of a collection."""
        return [self.decode(item) for item in json["v"]]

    def array(self, json: _Json) -> Any:
        """An array of numpy, or one of its scalars."""
        flat = np.frombuffer(self.tensor(json["v"]).numpy().tobytes(), np.dtype(json["dtype"]))
        return flat[0] if json["shape"] is None else flat.reshape(json["shape"]).copy()

    def mapping(self, json: _Json) -> dict[Any, Any]:
        """A dict of a class that the program has imported, else a plain one."""
        kind, content = _imported(json["class"]), self.pairs(json)
        is_dict = isinstance(kind, type) and issubclass(kind, dict)
        return kind(content) if is_dict else content

    def member(self, json: _Json) -> Any:
        """A member of an enumeration that the program has imported."""
        kind = _imported(json["class"])
        if not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
            raise CheckpointError(f"a saved {json['class']} cannot be read before it is imported.")
        return kind[json["v"]]

    def unpickled(self, json: _Json) -> Any:
        """An object that only its class can read."""
        if self._unpickle is None:
            raise CheckpointError("an object was saved where only data is expected.")
        return self._unpickle(json["v"])


_DECODERS: Mapping[str, Callable[[Decoder, Any], Any]] = {
    "float": lambda _, json: float(json["v"]),
    "dict": Decoder.pairs,
    "OrderedDict": lambda decoder, json: OrderedDict(decoder.pairs(json)),
    "Counter": lambda decoder, json: Counter(decoder.pairs(json)),
    "tuple": lambda decoder, json: tuple(decoder.items(json)),
    "set": lambda decoder, json: set(decoder.items(json)),
    "frozenset": lambda decoder, json: frozenset(decoder.items(json)),
    "torch.Size": lambda _, json: torch.Size(json["v"]),
    "bytes": lambda _, json: base64.b64decode(json["v"]),
    "complex": lambda decoder, json: complex(*decoder.items(json)),
    "range": lambda _, json: range(*json["v"]),
    "torch.dtype": lambda _, json: dtype_named(json["v"]),
    "torch.device": lambda _, json: torch.device(json["v"]),
    "datetime": lambda _, json: datetime.fromisoformat(json["v"]),
    "date": lambda _, json: date.fromisoformat(json["v"]),
    "timedelta": lambda _, json: timedelta(*json["v"]),
    "Namespace": lambda decoder, json: argparse.Namespace(**decoder.decode(json["v"])),
    "SimpleNamespace": lambda decoder, json: types.SimpleNamespace(**decoder.decode(json["v"])),
    "path": lambda _, json: pathlib.Path(json["v"]),
    "scalar": lambda decoder, json: torch.tensor(
        decoder.decode(json["v"]), dtype=dtype_named(json["dtype"]), device="cpu"
    ),
    "tensor": lambda decoder, json: decoder.tensor(json["v"]),
    "array": Decoder.array,
    "mapping": Decoder.mapping,
    "enum": Decoder.member,
    "object": Decoder.unpickled,
}
