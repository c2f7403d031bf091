"""Which parameters form a unit, and at which modules it is gathered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from zeroshard.core import wrap
from zeroshard.core.wrap import Group, choose_groups, find_blocks
from zeroshard.errors import ConfigError

WIDTH = 8


class Block(nn.Module):
    """Two layers: a block wherever it repeats."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)


class Net(nn.Module):
    """A large embedding, blocks in a container, a small norm, a head that may be tied."""

    def __init__(self, num_blocks: int = 3, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, WIDTH)
        self.blocks: nn.Module = nn.ModuleList(Block() for _ in range(num_blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 50, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


@dataclass(frozen=True)
class Row:
    """A group in words."""

    sites: list[str]
    members: list[str]


def groups_of(model: nn.Module, units: Sequence[str] = ()) -> list[Group]:
    return choose_groups(model, units=units, is_trained=lambda param: param.requires_grad)


def rows(model: nn.Module, units: Sequence[str] = ()) -> list[Row]:
    names = {module: name for name, module in model.named_modules()}
    return [
        Row([names[site] for site in group.sites], [member.name for member in group.members])
        for group in groups_of(model, units)
    ]


def block_names(model: nn.Module) -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    return [names[block] for block in find_blocks(model)]


def members_of(prefix: str) -> list[str]:
    return [f"{prefix}.{layer}" for layer in ("up.weight", "up.bias", "down.weight", "down.bias")]


# Blocks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("container", "names"),
    [
        (lambda: nn.ModuleList([Block(), Block()]), ["blocks.0", "blocks.1"]),
        (lambda: nn.Sequential(Block(), Block()), ["blocks.0", "blocks.1"]),
        (lambda: nn.ModuleDict({"a": Block(), "b": Block()}), ["blocks.a", "blocks.b"]),
    ],
    ids=["ModuleList", "Sequential", "ModuleDict"],
)
def test_blocks_are_what_repeats_in_a_container(container: object, names: list[str]) -> None:
    net = Net()
    net.blocks = container()  # type: ignore[operator]
    assert block_names(net) == names


def test_a_block_that_does_not_repeat_is_none() -> None:
    assert block_names(Net(num_blocks=1)) == []


def test_blocks_of_several_classes_are_found_side_by_side() -> None:
    class Other(Block):
        pass

    model = nn.Sequential(Block(), Other(), Block(), Other(), nn.Linear(4, 4))
    assert block_names(model) == ["0", "1", "2", "3"]


def test_leaf_layers_are_no_blocks() -> None:
    assert block_names(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))) == []


def test_modules_without_parameters_are_no_blocks() -> None:
    model = nn.Sequential(*[nn.Sequential(nn.ReLU(), nn.Dropout()) for _ in range(3)])
    assert block_names(model) == []


def test_containers_are_no_blocks_but_what_repeats_inside_them_is() -> None:
    model = nn.ModuleList([nn.ModuleList([Block(), Block()]) for _ in range(2)])
    assert block_names(model) == ["0.0", "0.1", "1.0", "1.1"]


def test_blocks_inside_a_block_belong_to_the_outer_one() -> None:
    def outer() -> nn.Module:
        return nn.Sequential(Block(), Block())

    model = nn.ModuleList([outer(), outer()])
    assert block_names(model) == ["0", "1"]


def test_blocks_are_found_however_deep_their_container_lies() -> None:
    model = nn.Sequential(nn.Sequential(Net()))
    assert block_names(model) == [f"0.0.blocks.{index}" for index in range(3)]


# Units ------------------------------------------------------------------------------------------


def test_each_block_and_each_large_layer_is_a_unit_and_the_rest_is_one_more() -> None:
    assert rows(Net()) == [
        Row(["embedding"], ["embedding.weight"]),
        *(Row([f"blocks.{index}"], members_of(f"blocks.{index}")) for index in range(3)),
        Row([""], ["norm.weight", "norm.bias"]),
        Row(["head"], ["head.weight"]),
    ]


def test_a_tied_head_is_a_second_place_where_the_embedding_is_gathered() -> None:
    found = rows(Net(tied=True))
    assert found[0] == Row(["embedding", "head"], ["embedding.weight"])
    assert not any("head.weight" in row.members for row in found)


def test_a_weight_tied_between_blocks_is_gathered_at_both() -> None:
    net = Net(num_blocks=2)
    first, second = net.blocks.children()
    second.up.weight = first.up.weight
    found = rows(net)
    assert found[1] == Row(["blocks.0", "blocks.1"], members_of("blocks.0"))
    assert found[2] == Row(["blocks.1"], members_of("blocks.1")[1:])


def test_a_module_shared_between_blocks_is_gathered_at_both() -> None:
    net = Net(num_blocks=2)
    first, second = net.blocks.children()
    second.up = first.up
    assert rows(net)[1].sites == ["blocks.0", "blocks.1"]


def test_a_weight_tied_inside_one_block_needs_no_second_place() -> None:
    net = Net(num_blocks=2)
    first, _ = net.blocks.children()
    first.extra = nn.Linear(WIDTH, 2 * WIDTH)
    first.extra.weight = first.up.weight
    assert rows(net)[1].sites == ["blocks.0"]


def test_small_layers_outside_blocks_share_a_unit_of_the_whole_model() -> None:
    model = nn.Sequential(nn.Linear(40, 40), *[nn.Linear(2, 2) for _ in range(3)])
    large, rest = rows(model)
    assert large == Row(["0"], ["0.weight", "0.bias"])
    assert rest.sites == [""]
    assert len(rest.members) == 6


def test_a_weight_tied_between_small_layers_needs_no_second_place() -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(2, 2), nn.Linear(2, 2))
    model[2].weight = model[1].weight
    assert rows(model)[1] == Row([""], ["1.weight", "1.bias", "2.bias"])


def test_small_layers_of_a_large_model_are_cut_into_several_units(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wrap, "_GROUP_BYTES", 1000)
    model = nn.Sequential(*[nn.Linear(5, 10, bias=False) for _ in range(60)])  # 200 bytes each
    found = rows(model)
    assert [len(row.members) for row in found] == [5] * 12
    assert all(row.sites == [""] for row in found)


def test_a_model_that_is_one_layer_is_one_unit() -> None:
    assert rows(nn.Linear(3, 3)) == [Row([""], ["weight", "bias"])]


def test_a_model_without_parameters_has_no_units() -> None:
    assert rows(nn.Sequential(nn.ReLU())) == []


def test_what_a_module_of_several_layers_holds_itself_is_gathered_at_the_whole_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    model[1].table = nn.Parameter(torch.zeros(100))
    model[1].extra = nn.ParameterList([nn.Parameter(torch.zeros(100))])
    (row,) = (row for row in rows(model) if "1.extra.0" in row.members)
    assert "1.table" in row.members
    assert row.sites == [""]


# Uniform units ----------------------------------------------------------------------------------


def test_a_block_is_split_by_dtype() -> None:
    net = Net(num_blocks=2)
    next(net.blocks.children()).up.double()
    assert [row.members for row in rows(net)[1:3]] == [
        members_of("blocks.0")[:2],
        members_of("blocks.0")[2:],
    ]


def test_a_block_is_split_by_whether_it_is_trained() -> None:
    net = Net(num_blocks=2)
    next(net.blocks.children()).up.requires_grad_(False)
    frozen, trained = groups_of(net)[1:3]
    assert (frozen.trained, trained.trained) == (False, True)
    assert frozen.sites == trained.sites
    assert [member.name for member in frozen.members] == members_of("blocks.0")[:2]


DTYPES = (torch.float32, torch.float64)


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.booleans()), min_size=12, max_size=12))
def test_every_parameter_is_in_one_unit_uniform_in_dtype_and_training(
    kinds: list[tuple[torch.dtype, bool]],
) -> None:
    net = Net(num_blocks=2, tied=True)
    for param, (dtype, trained) in zip(net.parameters(), kinds, strict=False):
        param.data = param.data.to(dtype)
        param.requires_grad = trained
    groups = groups_of(net)
    members = [member for group in groups for member in group.members]
    assert {member.name: member.param for member in members} == dict(net.named_parameters())
    assert len(members) == len(list(net.parameters()))
    for group in groups:
        assert len({member.param.dtype for member in group.members}) == 1
        assert {member.param.requires_grad for member in group.members} == {group.trained}
        assert len(group.sites) == len(set(group.sites)) > 0


def test_units_come_in_the_order_of_the_parameters() -> None:
    net = Net()
    order = [name for name, _ in net.named_parameters()]
    firsts = [order.index(row.members[0]) for row in rows(net)]
    assert firsts == sorted(firsts)


# Named units ------------------------------------------------------------------------------------


def test_units_may_be_named_by_class() -> None:
    found = rows(Net(num_blocks=2), ["Linear"])
    named = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "head"]
    assert [row.sites for row in found if row.sites[0] in named] == [[name] for name in named]


def test_units_may_be_named_by_path() -> None:
    found = rows(Net(num_blocks=2), ["blocks.1"])
    assert Row(["blocks.1"], members_of("blocks.1")) in found
    assert not any(row.sites == ["blocks.0"] for row in found)


def test_of_nested_named_units_the_innermost_holds_a_parameter() -> None:
    found = rows(Net(num_blocks=2), ["Block", "blocks.0.up"])
    assert Row(["blocks.0.up"], members_of("blocks.0")[:2]) in found
    assert Row(["blocks.0"], members_of("blocks.0")[2:]) in found


def test_the_whole_model_may_be_named_as_one_unit() -> None:
    (row,) = rows(Net(), ["Net"])
    assert row.sites == [""]


def test_a_name_that_matches_nothing_is_refused_with_the_classes_there_are() -> None:
    with pytest.raises(ConfigError, match=r'zeroshard\.units names "Layer"') as error:
        groups_of(Net(), ["Layer"])
    assert "hint: " in str(error.value)
    assert "Block, Embedding, LayerNorm, Linear" in str(error.value)


def test_a_container_that_is_never_called_cannot_be_a_unit() -> None:
    with pytest.raises(ConfigError, match="blocks"):
        groups_of(Net(), ["blocks"])
