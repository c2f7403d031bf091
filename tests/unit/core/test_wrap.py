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
from zeroshard.core.wrap import Group, Kind, choose_groups, find_blocks
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


class Stack(nn.Module):
    """Blocks held as attributes."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        for index in range(num_blocks):
            setattr(self, f"layer{index}", Block())


class Stage(nn.Module):
    """Blocks in a container, and a small layer after them."""

    def __init__(self, num_blocks: int, width: int = WIDTH) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(num_blocks))
        self.out = nn.Linear(width, 1)


@dataclass(frozen=True)
class Row:
    """A group in words."""

    sites: list[str]
    members: list[str]


def groups_of(model: nn.Module, units: Sequence[str] = ()) -> list[Group]:
    return choose_groups(model, units=units, kind_of=lambda param: Kind(param.requires_grad))


def rows(model: nn.Module, units: Sequence[str] = ()) -> list[Row]:
    names = {module: name for name, module in model.named_modules()}
    return [
        Row([names[site] for site in group.sites], [member.name for member in group.members])
        for group in groups_of(model, units)
    ]


def block_names(model: nn.Module) -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    return [names[block] for block in find_blocks(model)]


def set_budgets(patch: pytest.MonkeyPatch, group: int = 0, layer: int = 0) -> None:
    """Make small models large: what stays full, and what is gathered together, in bytes."""
    patch.setattr(wrap, "_GROUP_BYTES", group)
    patch.setattr(wrap, "_LAYER_BYTES", layer or group)


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


def test_large_blocks_may_be_attributes_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    set_budgets(monkeypatch, group=2000)
    assert block_names(Stack(60)) == [f"layer{index}" for index in range(60)]


def test_small_blocks_as_attributes_are_none() -> None:
    assert block_names(Stack(60)) == []
    assert [row.sites for row in rows(Stack(60))] == [[""]]


def test_two_attributes_of_a_class_are_no_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    set_budgets(monkeypatch, group=100)
    assert block_names(Stack(2)) == []


def test_attributes_that_are_sequential_are_searched_instead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_budgets(monkeypatch, group=100)
    model = nn.Module()
    model.layer1, model.layer2, model.layer3 = (nn.Sequential(Block(), Block()) for _ in range(3))
    assert block_names(model) == [f"layer{i}.{j}" for i in (1, 2, 3) for j in (0, 1)]


# Stages -----------------------------------------------------------------------------------------


def stages(small: int = 1) -> nn.Module:
    """Two small stages around one that is most of the model."""
    return nn.ModuleList([Stage(small), Stage(18, 2 * WIDTH), Stage(small)])


def test_a_repeated_module_that_is_most_of_the_model_is_divided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_budgets(monkeypatch, group=4000)
    assert block_names(stages()) == ["0", *(f"1.blocks.{i}" for i in range(18)), "2"]


def test_a_small_repeated_module_is_not_divided_whatever_its_share() -> None:
    assert block_names(stages()) == ["0", "1", "2"]


def test_stages_are_divided_at_every_level(monkeypatch: pytest.MonkeyPatch) -> None:
    set_budgets(monkeypatch, group=1000)
    model = nn.ModuleList(nn.Sequential(Stage(4), Stage(4)) for _ in range(2))
    names = [f"{i}.{j}.blocks.{k}" for i in range(2) for j in range(2) for k in range(4)]
    assert block_names(model) == names


def test_what_is_left_of_a_stage_is_gathered_there(monkeypatch: pytest.MonkeyPatch) -> None:
    set_budgets(monkeypatch, group=4000)
    found = rows(stages())
    assert Row(["1"], ["1.out.weight", "1.out.bias"]) in found
    assert len(found) == 2 + 18 + 1


def test_experts_inside_a_layer_are_no_units(monkeypatch: pytest.MonkeyPatch) -> None:
    set_budgets(monkeypatch, group=1000)
    layers = 12
    assert block_names(nn.ModuleList(Stage(8) for _ in range(layers))) == [
        str(index) for index in range(layers)
    ]


def test_a_large_layer_with_small_repeated_parts_is_not_divided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_budgets(monkeypatch, group=1000)
    model = nn.ModuleList(Stage(2) for _ in range(2))
    for stage in model:
        stage.mixer = nn.Linear(100, 100)
    assert block_names(model) == ["0", "1"]


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


def test_a_thousand_small_parameters_are_one_unit_of_the_whole_model() -> None:
    (row,) = rows(nn.Sequential(*[nn.Linear(4, 4) for _ in range(500)]))
    assert row.sites == [""]
    assert len(row.members) == 1000


def plain_layers(num_layers: int = 60) -> nn.Sequential:
    """Layers of 200 bytes each."""
    return nn.Sequential(*[nn.Linear(5, 10, bias=False) for _ in range(num_layers)])


def test_many_layers_are_gathered_in_runs_at_the_layers_that_use_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_budgets(monkeypatch, group=11_000, layer=1000)
    found = rows(plain_layers())
    assert [row.sites for row in found] == [
        [str(first + i) for i in range(5)] for first in range(0, 60, 5)
    ]
    assert all(row.members == [f"{site}.weight" for site in row.sites] for row in found)


def test_a_layer_of_many_bytes_is_a_unit_whatever_its_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_budgets(monkeypatch, group=10**6, layer=199)
    assert [row.sites for row in rows(plain_layers())] == [[str(index)] for index in range(60)]


def test_a_run_ends_at_a_block_or_a_large_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    set_budgets(monkeypatch, group=1000, layer=10_000)
    few = [nn.Linear(5, 10, bias=False) for _ in range(6)]
    model = nn.Sequential(*few[:3], nn.Linear(60, 60), *few[3:5], Block(), Block(), few[5])
    sites = [row.sites for row in rows(model)]
    assert sites == [["0", "1", "2"], ["3"], ["4", "5"], ["6"], ["7"], ["8"]]


def test_the_parameters_of_a_layer_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    set_budgets(monkeypatch, group=1000, layer=250)
    model = nn.Sequential(*[nn.Linear(5, 5) for _ in range(60)])  # 120 bytes each
    for row in rows(model):
        assert row.members == [
            f"{site}.{kind}" for site in row.sites for kind in ("weight", "bias")
        ]


def test_what_the_model_holds_itself_stays_with_it_when_its_layers_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_budgets(monkeypatch, group=1000)
    model = plain_layers()
    model.table = nn.Parameter(torch.zeros(100))
    found = rows(model)
    assert found[0] == Row([""], ["table"])
    assert not any("" in row.sites for row in found[1:])


def test_what_a_module_of_many_layers_holds_itself_is_gathered_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_budgets(monkeypatch, group=1000)
    model = nn.Sequential(plain_layers())
    model[0].extra = nn.ParameterList([nn.Parameter(torch.zeros(9))])
    (row,) = (row for row in rows(model) if "0.extra.0" in row.members)
    assert "0" in row.sites


def test_what_a_list_of_parameters_holds_counts_as_its_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Adapted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(5, 10, bias=False)
            self.extra = nn.ParameterList([nn.Parameter(torch.zeros(150))])  # 600 bytes

    set_budgets(monkeypatch, group=1000)
    model = plain_layers()
    model[1] = Adapted()
    first, second = rows(model)[:2]
    assert first == Row(["0", "1"], ["0.weight", "1.weight", "1.extra.0"])
    assert second.sites == ["2", "3", "4", "5", "6"]


def test_a_weight_tied_between_runs_is_gathered_at_both(monkeypatch: pytest.MonkeyPatch) -> None:
    set_budgets(monkeypatch, group=1000)
    model = plain_layers()
    model[33].weight = model[2].weight
    found = rows(model)
    assert found[0].sites == ["0", "1", "2", "33", "3", "4"]
    assert not any("33" in row.sites for row in found[1:])


def test_layers_outside_named_units_are_gathered_in_runs_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_budgets(monkeypatch, group=1000)
    found = rows(nn.Sequential(Block(), plain_layers()), ["Block"])
    assert found[0] == Row(["0"], members_of("0"))
    assert not any("" in row.sites for row in found)


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
    assert (frozen.kind.trained, trained.kind.trained) == (False, True)
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
        assert {member.param.requires_grad for member in group.members} == {group.kind.trained}
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


def test_nothing_inside_a_leaf_is_a_unit_even_if_it_is_named() -> None:
    net = Net(num_blocks=2)
    leaves = [block for block in net.blocks.children() if isinstance(block, Block)]
    groups = choose_groups(
        net,
        kind_of=lambda param: Kind(trained=True),
        units=["Linear"],
        leaves=[*leaves, *(block.up for block in leaves)],
    )
    found = [[member.name for member in group.members] for group in groups]
    assert members_of("blocks.0") in found
    assert members_of("blocks.1") in found
    assert ["head.weight"] in found
