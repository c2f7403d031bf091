from __future__ import annotations

import enum
import json
import math
from collections import OrderedDict, defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zeroshard.checkpoint.encoding import Decoder, Encoder
from zeroshard.errors import CheckpointError, UsageError


class Colour(enum.Enum):
    RED = 1


class Settings(dict[str, Any]):
    """A dict of a class of its own, as libraries have."""


class Odd:
    pass


def returned(value: Any) -> Any:
    """The value after a way through JSON."""
    encoder = Encoder("x/")
    text = json.dumps(encoder.encode(value), allow_nan=False)
    return Decoder(encoder.tensors.__getitem__, encoder.objects.__getitem__).decode(
        json.loads(text)
    )


def typed(value: Any) -> Any:
    """A value in words, in which 1 is neither True nor 1.0, and sets have an order."""
    if isinstance(value, dict):
        return [typed(item) for item in value.items()]
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *map(typed, value)]
    if isinstance(value, frozenset):
        return sorted(repr(typed(item)) for item in value)
    return f"{type(value).__name__} {value!r}"


hashable = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=5,
)
values = st.recursive(
    hashable,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(hashable, inner, max_size=3)
        | st.dictionaries(st.text() | st.just("#"), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(values)
def test_data_comes_back_as_it_was(value: Any) -> None:
    back = returned(value)
    assert back == value and typed(back) == typed(value)


def test_numbers_that_json_lacks_come_back() -> None:
    infinite, undefined, negative = returned([math.inf, math.nan, -0.0])
    assert infinite == math.inf and math.isnan(undefined) and math.copysign(1, negative) == -1


def test_members_and_dicts_of_imported_classes_come_back_as_such() -> None:
    settings = returned(Settings(lr=0.1))
    assert type(settings) is Settings and settings == {"lr": 0.1}
    assert returned(Colour.RED) is Colour.RED
    assert list(returned(OrderedDict(b=1, a=2))) == ["b", "a"]


def test_a_dict_of_a_class_that_is_gone_is_a_plain_one() -> None:
    encoded = Encoder("x/").encode(Settings(lr=0.1)) | {"class": "gone.module:Settings"}
    assert Decoder(dict[str, Any]().__getitem__).decode(encoded) == {"lr": 0.1}
    with pytest.raises(CheckpointError, match="gone:Colour cannot be read"):
        Decoder(dict[str, Any]().__getitem__).decode(
            {"#": "enum", "class": "gone:Colour", "v": "A"}
        )


def test_arrays_and_scalars_of_numpy_keep_their_dtype() -> None:
    for value in (np.float32(0.5), np.uint32([1, 2]), np.zeros((2, 0)), np.array("text")):
        back = returned(value)
        assert type(back) is type(value) and back.dtype == value.dtype
        assert np.array_equal(back, value) and back.shape == value.shape


def test_one_tensor_under_two_names_stays_one() -> None:
    tensor = torch.ones(2)
    encoder = Encoder("x/")
    encoder.encode([tensor, {"again": tensor}])
    assert len(encoder.tensors) == 1
    first, rest = returned([tensor, {"again": tensor}])
    assert rest["again"] is first
    parts = tensor[:1], tensor[1:]
    assert len({id(part) for part in returned(parts)}) == 2


def test_what_is_no_data_is_handed_out() -> None:
    odd, factory = Odd(), defaultdict(list, a=[1])
    encoder = Encoder("x/")
    encoder.encode({"odd": odd, "lists": factory, "sparse": torch.eye(2).to_sparse()})
    assert [type(each).__name__ for each in encoder.objects.values()] == [
        "Odd",
        "defaultdict",
        "Tensor",
    ]


def test_a_value_that_contains_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(UsageError, match="contains itself"):
        Encoder("x/").encode(endless)


def test_a_kind_that_nobody_knows_is_refused() -> None:
    with pytest.raises(CheckpointError, match="newer zeroshard"):
        Decoder(dict[str, Any]().__getitem__).decode({"#": "hologram", "v": 1})
