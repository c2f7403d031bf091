"""Units of bytes: frozen parameters of any dtype that are kept as they are, with companions."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from forked import run_ranks
from unit.core.test_unit import BF16, STAGES, alone, every_lifetime, make_full, mesh_for
from zeroshard.core.access import gathered
from zeroshard.core.building import build_unit, hand_back
from zeroshard.core.freed import FreedParameter
from zeroshard.core.lifetime import Lifetime
from zeroshard.core.mesh import Mesh
from zeroshard.core.unit import Companion, Member, Unit
from zeroshard.core.waiting import Waiting
from zeroshard.core.wrap import Kind, choose_groups
from zeroshard.errors import UsageError

DTYPES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.int8)
freeing = STAGES[3]


class Packed(nn.Parameter):
    """A parameter whose values mean something only with scales that it holds."""

    scales: Tensor
    nested: Any
    alias: Tensor

    def refuse(self, *args: object, **kwargs: object) -> Any:
        raise AssertionError("a method of the class was called")

    detach = to = cpu = refuse  # type: ignore[assignment]


def packed(dtype: torch.dtype, numel: int = 12, seed: int = 0) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    # Any bytes at all, so that many are no numbers where they are seen as floats.
    data = torch.randint(0, 256, (numel * dtype.itemsize,), generator=generator).to(torch.uint8)
    param = Packed(data.view(dtype).view(-1, 1), requires_grad=False)
    param.scales = torch.rand(5, generator=generator)
    param.nested = SimpleNamespace(scales=torch.rand(1, generator=generator).double())
    param.alias = param.data
    return param


def accessors(label: str, owner: object, name: str) -> Companion:
    return Companion(label, partial(getattr, owner, name), partial(setattr, owner, name))


def member(param: Packed, name: str = "packed") -> Member:
    return Member(
        name,
        param,
        (
            accessors("scales", param, "scales"),
            accessors("nested", param.nested, "scales"),
            accessors("alias", param, "alias"),
        ),
    )


def contents(param: Packed) -> list[Tensor]:
    tensors = [param.data, param.scales, param.nested.scales, param.alias]
    return [tensor.as_subclass(Tensor).reshape(-1).view(torch.uint8).clone() for tensor in tensors]


def make(params: list[Packed], life: Lifetime, mesh: Mesh | None = None) -> Unit:
    members = [member(param, f"p{at}") for at, param in enumerate(params)]
    return build_unit(
        members, trained=False, lifetime=life, mesh=mesh or alone(), precision=BF16, as_bytes=True
    )


def assert_same(params: list[Packed], want: list[list[Tensor]]) -> None:
    for param, expected in zip(params, want, strict=True):
        for ours, theirs in zip(contents(param), expected, strict=True):
            assert torch.equal(ours, theirs)


@every_lifetime
def test_parameters_of_all_dtypes_share_a_unit_and_keep_every_byte(life: Lifetime) -> None:
    params = [packed(dtype, seed=at) for at, dtype in enumerate(DTYPES)]
    before, shapes = [contents(param) for param in params], [param.shape for param in params]
    unit = make(params, life)
    for _ in range(2):
        make_full(unit)
        assert_same(params, before)
        assert [param.shape for param in params] == shapes
        assert [param.dtype for param in params] == list(DTYPES)
        unit.free()


def test_a_freed_unit_hides_companions_in_their_dtypes() -> None:
    param = packed(torch.bfloat16)
    unit = make([param], freeing)
    shown = (param.scales, param.nested.scales, param.alias)
    assert [tensor.numel() for tensor in shown] == [0, 0, 0]
    assert [t.dtype for t in shown] == [torch.float32, torch.float64, torch.bfloat16]
    make_full(unit)
    storages = {
        tensor.untyped_storage().data_ptr()
        for tensor in (param.data, param.scales, param.nested.scales, param.alias)
    }
    assert len(storages) == 1  # one memory, so one gather


def test_a_companion_that_is_the_parameter_costs_nothing() -> None:
    param = packed(torch.uint8, numel=4096)
    unit = make([param], freeing)
    assert unit.nbytes_full < 4096 + 256
    make_full(unit)
    assert param.alias.data_ptr() == param.data.data_ptr()


def test_a_freed_parameter_is_of_its_class_and_refuses_to_be_read() -> None:
    param = packed(torch.uint8)
    unit = make([param], freeing)
    assert isinstance(param, Packed)
    assert isinstance(param, FreedParameter)
    assert type(param).__name__ == "Packed"
    with pytest.raises(UsageError, match="p0 was read while its unit is freed"):
        _ = param + 1
    make_full(unit)
    assert type(param) is Packed
    unit.outline()
    unit.free()
    unit.outline()
    assert param.shape == (12, 1)


def test_a_unit_that_is_taken_over_brings_the_companions_along() -> None:
    def on_rank(rank: int, world: int) -> None:
        params = [packed(torch.float32, seed=1), packed(torch.uint8, seed=2)]
        before = [contents(param) for param in params]
        mesh = mesh_for(freeing, world)
        first = make(params, freeing, mesh)
        waiting = Waiting(mesh)
        waiting.add(first)
        second = make(params, freeing, mesh)
        with gathered(params):
            assert_same(params, before)
        hand_back(second, waiting)
        third = make(params[:1], freeing, mesh)
        with gathered(params):
            assert_same(params, before)
        assert third.nbytes_full < second.nbytes_full

    run_ranks(on_rank, 2)


def test_ranks_share_weights_and_companions_of_rank_0() -> None:
    def on_rank(rank: int, world: int) -> tuple[int, int]:
        params = [packed(torch.float16, numel=999, seed=rank), packed(torch.int8, seed=rank + 9)]
        want = [contents(packed(torch.float16, 999, 0)), contents(packed(torch.int8, seed=9))]
        unit = make(params, freeing, mesh_for(freeing, world))
        held = unit.parameter_bytes
        with gathered(params):
            assert_same(params, want)
        with gathered(params, modifier_rank=1):
            params[0].scales.fill_(rank + 5)
        with gathered(params):
            assert params[0].scales.tolist() == [6.0] * 5
        return held, unit.nbytes_full

    for held, whole in run_ranks(on_rank, 3):
        assert 3 * held == whole


def test_quantised_parameters_of_a_block_are_one_group_whatever_their_dtypes() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for at, dtype in enumerate(DTYPES):
                layer = nn.Module()
                layer.weight = packed(dtype)
                self.add_module(f"layer{at}", layer)
            self.norm = nn.LayerNorm(4)

    model = nn.Sequential(Block(), Block())
    companions = {p: member(p).companions for p in model.parameters() if isinstance(p, Packed)}
    kind = Kind(trained=False)
    groups = choose_groups(
        model,
        kind_of=lambda param: replace(kind, as_bytes=param in companions),
        companions=companions,
    )
    sizes = [(group.kind.as_bytes, len(group.members)) for group in groups]
    assert sizes == [(True, len(DTYPES)), (False, 2)] * 2
    assert all(len(each.companions) == 3 for g in groups for each in g.members if g.kind.as_bytes)
