"""Tensors are found and replaced inside containers; containers without a change stay the same."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zeroshard.core import tree


class Pair(NamedTuple):
    left: Any
    right: Any


Untyped = namedtuple("Untyped", "left right")


@dataclass
class Record:
    first: Any
    second: Any = None
    note: str = "kept"


@dataclass(frozen=True, slots=True)
class Frozen:
    value: Any
    made: list[str] = field(default_factory=list, compare=False)


@dataclass
class Checked:
    """A dataclass whose constructor must not run again."""

    value: Any
    runs: int = 0

    def __post_init__(self) -> None:
        self.runs += 1


class Output(OrderedDict[str, Any]):
    """A mapping with attributes and a constructor of its own, as model outputs often are."""

    def __init__(self, tag: str, **items: Any) -> None:
        super().__init__(items)
        self.tag = tag

    def __reduce__(self) -> Any:
        return _remade, (self.tag, dict(self))


def _remade(tag: str, items: dict[str, Any]) -> Output:
    return Output(tag, **items)


class Unknown:
    """Something that may hide a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


T = torch.ones(2)
SHAPES: dict[str, Callable[[Any], Any]] = {
    "tensor": lambda x: x,
    "list": lambda x: [1, x],
    "tuple": lambda x: (x, "a"),
    "nested": lambda x: [({"k": [x]},), None],
    "dict": lambda x: {"a": x, "b": 2},
    "defaultdict": lambda x: defaultdict(list, a=x),
    "user dict": lambda x: UserDict(a=x),
    "mapping with a constructor": lambda x: Output("tag", loss=x),
    "typed named tuple": lambda x: Pair(x, 3),
    "named tuple": lambda x: Untyped(3, x),
    "dataclass": lambda x: Record(1, [x]),
    "frozen dataclass": Frozen,
    "dataclass with a constructor": Checked,
}
each_shape = pytest.mark.parametrize("wrap", SHAPES.values(), ids=SHAPES)


@each_shape
def test_a_tensor_is_found_in_every_known_container(wrap: Callable[[Any], Any]) -> None:
    found = tree.find(wrap(T))
    assert [tensor is T for tensor in found.tensors] == [True]
    assert not found.opaque


@each_shape
def test_a_replaced_tensor_is_found_in_a_container_of_the_same_type(
    wrap: Callable[[Any], Any],
) -> None:
    before, other = wrap(T), torch.zeros(3)
    after = tree.replace(before, lambda tensor: other)
    assert type(after) is type(before)
    assert [tensor is other for tensor in tree.find(after).tensors] == [True]
    # What was given is not edited: the caller may go on with it.
    assert [tensor is T for tensor in tree.find(before).tensors] == [True]


@each_shape
def test_a_container_whose_tensors_stay_is_returned_as_it_is(wrap: Callable[[Any], Any]) -> None:
    before = wrap(T)
    assert tree.replace(before, lambda tensor: tensor) is before


def test_only_the_containers_around_a_change_are_new() -> None:
    one, two = torch.ones(1), torch.ones(1)
    before = {"same": [one], "changed": [two]}
    after = tree.replace(before, lambda tensor: tensor + 1 if tensor is two else tensor)
    assert after["same"] is before["same"]
    assert after["changed"] is not before["changed"]


def test_what_is_no_tensor_survives_a_replacement() -> None:
    before = Record(Output("tag", loss=T, other=7), note="note")
    after = tree.replace(before, lambda tensor: tensor + 1)
    assert (after.note, after.first.tag, after.first["other"]) == ("note", "tag", 7)
    assert list(after.first) == ["loss", "other"]


def test_a_dataclass_is_copied_without_running_its_constructor() -> None:
    assert tree.replace(Checked(T), lambda tensor: tensor + 1).runs == 1


def test_results_of_torch_functions_are_looked_into() -> None:
    before = torch.ones(2, 3).max(dim=1)
    after = tree.replace(before, lambda tensor: tensor + 1)
    assert after.values.tolist() == [2.0, 2.0]
    assert len(tree.find(before).tensors) == 2


def test_tensors_are_found_in_the_order_in_which_they_stand() -> None:
    a, b, c, d = (torch.full((), float(number)) for number in range(4))
    found = tree.find([a, {"x": b, "y": (c,)}, Record(d)])
    assert [int(tensor) for tensor in found.tensors] == [0, 1, 2, 3]


def test_a_tensor_that_stands_twice_is_found_twice() -> None:
    assert len(tree.find([T, T]).tensors) == 2


@pytest.mark.parametrize(
    "plain",
    [1, 1.5, "text", b"bytes", True, None, 1j, torch.float32, torch.device("cpu"), torch.Size([2])],
    ids=repr,
)
def test_plain_values_hide_no_tensor(plain: object) -> None:
    found = tree.find([plain, {"k": plain}])
    assert not found.opaque
    assert not found.tensors
    assert tree.replace(plain, torch.neg) is plain


@pytest.mark.parametrize(
    "opaque", [Unknown(T), {T}, object(), lambda: T, Record], ids=lambda x: type(x).__name__
)
def test_anything_else_may_hide_a_tensor_however_deep_it_lies(opaque: object) -> None:
    for around in (opaque, [opaque], {"k": (opaque,)}, Record(opaque)):
        assert tree.find(around).opaque


def test_what_may_hide_a_tensor_is_left_alone() -> None:
    unknown = Unknown(T)
    assert tree.replace([unknown, T], lambda tensor: tensor + 1)[0] is unknown


structures = st.recursive(
    st.one_of(st.integers(), st.none(), st.builds(lambda: torch.zeros(1))),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=2), inner, max_size=3),
        st.builds(Pair, inner, inner),
        st.builds(Record, inner, inner),
    ),
    max_leaves=12,
)


@given(structures)
def test_replacing_visits_the_same_tensors_as_finding(structure: Any) -> None:
    seen: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor + 1

    before = tree.find(structure).tensors
    after = tree.find(tree.replace(structure, note)).tensors
    assert [id(tensor) for tensor in seen] == [id(tensor) for tensor in before]
    assert [float(tensor) for tensor in after] == [1.0] * len(before)
