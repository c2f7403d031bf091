"""Modules are sharded as they are built, in whatever way, and nothing stays patched."""

from __future__ import annotations

import copy
import gc
import math
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import zeroshard
from forked import run_ranks
from zeroshard import UsageError
from zeroshard.core.freed import FreedParameter
from zeroshard.core.init import Sharding, shard_module, sharded_construction, suspended
from zeroshard.core.lifetime import lifetime
from zeroshard.core.mesh import default_mesh
from zeroshard.core.slots import full_nbytes, full_shape, is_waiting, slot_of

CPU = torch.device("cpu")


def sharding(dtype: torch.dtype | None = None) -> Sharding:
    mesh = default_mesh(CPU)
    return Sharding(mesh, lifetime(3, mesh.world), lambda own: dtype or own)


@contextmanager
def building(dtype: torch.dtype | None = None) -> Iterator[None]:
    with sharded_construction(sharding(dtype)):
        yield


# Ways to make a module ----------------------------------------------------------------------------


class Child(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.own = nn.Parameter(torch.randn(3, 5))


class Parent(nn.Module):
    """Holds a parameter that it makes before its children, and one that it makes after them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(7))
        self.child = Child()
        self.last = nn.Parameter(torch.randn(()))


class Grandchild(Child):
    """Makes parameters before and after the constructor of its base class, which makes some too."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Parameter(torch.randn(2, 2))


class Unnamed(nn.Module):
    """Has no constructor."""


class Mixin:
    """Adds a parameter after the constructor of the module class."""

    def __init__(self) -> None:
        super().__init__()
        self.added = nn.Parameter(torch.randn(6))


class Mixed(Mixin, nn.Module):
    pass


def defined_inside() -> nn.Module:
    class Late(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(size))

    class Later(Late):
        def __init__(self) -> None:
            super().__init__(5)
            self.bias = nn.Parameter(torch.randn(5))

    return nn.Sequential(Late(3), Later())


def from_factories() -> nn.Module:
    make = {"up": partial(nn.Linear, 4, 8), "down": lambda: nn.Linear(8, 4, bias=False)}
    return nn.Sequential(*(factory() for factory in make.values()))


def filled_afterwards() -> nn.Module:
    model = Unnamed()
    model.weight = nn.Parameter(torch.randn(4))
    model.list = nn.ParameterList([torch.randn(2), torch.randn(3)])
    model.list.append(nn.Parameter(torch.randn(4)))
    model.dict = nn.ParameterDict({"a": nn.Parameter(torch.randn(2, 2))})
    return model


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 9)
        self.head.weight = self.embedding.weight
        self.child = Child()
        self.child.linear.extra = nn.Parameter(torch.randn(8))


class Initialized(nn.Module):
    """Reads and edits parameters of modules that are finished, in every way there is."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.conv = nn.Conv1d(4, 6, 3)
        self.lstm = nn.LSTM(4, 6, num_layers=2)
        self.num_params = sum(param.numel() for param in self.parameters())
        for param in self.parameters():
            if param.dim() > 1:
                nn.init.xavier_uniform_(param)
        nn.init.trunc_normal_(self.blocks[0].weight, std=1 / math.sqrt(len(self.blocks[0].weight)))
        nn.init.orthogonal_(self.blocks[1].weight)
        self.blocks[2].weight.data.normal_()
        self.blocks[2].bias.data = torch.arange(6.0)
        self.blocks[3].weight.data.copy_(self.blocks[2].weight.data)
        with torch.no_grad():
            self.blocks[3].bias[1:4] = 5.0
            self.conv.weight.mul_(self.blocks[2].weight.mean() + self.conv.bias.abs().max())
        self.apply(self._edit)

    @staticmethod
    def _edit(module: nn.Module) -> None:
        if isinstance(module, nn.Conv1d):
            nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
            nn.init.zeros_(module.bias)


class ReadLater(nn.Module):
    """Edits parameters through views that were made long before."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        row = self.a.weight.data[1]
        self.b.weight.data.fill_(2.0)
        self.c = nn.Linear(3, 3)
        self.c.weight.data.fill_(3.0)
        row.fill_(1.0)


def reparametrised() -> nn.Module:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = parametrizations.weight_norm(nn.Conv1d(3, 4, 2))
            self.linear = parametrizations.orthogonal(nn.Linear(4, 4))

    return Model()


def copied() -> nn.Module:
    layer = Child()
    clones = nn.ModuleList(copy.deepcopy(layer) for _ in range(3))
    norm = nn.LayerNorm(4)
    return nn.Sequential(clones, nn.TransformerEncoder(encoder_layer(), 2, norm, False))


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)


def loaded() -> nn.Module:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child = Child()
            self.load_state_dict({name: torch.ones(p.shape) for name, p in self.named_parameters()})

    return Model()


def run_inside() -> nn.Module:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 2))
            width = self.features(torch.ones(1, 4)).shape[1]
            self.head = nn.Linear(width, 3)

    return Model()


def survived() -> nn.Module:
    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            raise ValueError

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            try:
                self.part: nn.Module = Fragile()
            except ValueError:
                self.part = nn.Linear(3, 3)
            self.weight = nn.Parameter(torch.randn(3))

    return Model()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(5, 3),
    "own and inner parameters": Parent,
    "derived": Grandchild,
    "mixin": Mixed,
    "defined inside": defined_inside,
    "factories": from_factories,
    "filled afterwards": filled_afterwards,
    "tied": Tied,
    "initialized": Initialized,
    "read later": ReadLater,
    "reparametrised": reparametrised,
    "copied": copied,
    "loaded": loaded,
    "run inside": run_inside,
    "an exception inside": survived,
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "transformer": lambda: nn.Transformer(4, 2, 1, 1, 8, batch_first=True),
}


def patched() -> list[Any]:
    """What a context replaces."""
    kinds = [nn.Module, nn.Linear, nn.LSTM, Child, Parent, Mixed, Mixin, FreedParameter]
    return [dict(vars(kind)) for kind in kinds]


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_every_parameter_is_sharded_with_the_value_that_rank_0_gave_it(
    make: Callable[[], nn.Module],
) -> None:
    def work(rank: int, world: int) -> list[str]:
        torch.manual_seed(0)
        wanted = dict(make().named_parameters())
        torch.manual_seed(rank)
        before = patched()
        with building():
            model = make()
        assert patched() == before
        params = dict(model.named_parameters())
        assert list(params) == list(wanted)
        for name, param in params.items():
            assert is_waiting(param), f"{name} is not sharded"
            assert param.shape == (0,), f"{name} is full"
            assert full_shape(param) == wanted[name].shape
            assert full_nbytes(param) == wanted[name].nbytes
        with zeroshard.gathered(model):
            return [name for name, param in params.items() if not torch.equal(param, wanted[name])]

    assert run_ranks(work, 3) == [[]] * 3


def test_constructors_see_the_true_sizes() -> None:
    def work(rank: int, world: int) -> int:
        with building():
            return Initialized().num_params

    wanted = sum(param.numel() for param in Initialized().parameters())
    assert run_ranks(work, 2) == [wanted] * 2


def test_about_one_module_is_full_at_a_time() -> None:
    size, depth = 64, 8

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList()
            self.most = 0
            for _ in range(depth):
                self.layers.append(nn.Linear(size, size, bias=False))
                self.count()
            for param in self.parameters():
                nn.init.normal_(param)
                self.count()
            self.apply(self.edit)
            self.layers.extend(copy.deepcopy(self.layers[0]) for _ in range(depth))
            self.count()

        def edit(self, module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                module.weight.data.zero_()
            self.count()

        def count(self) -> None:
            weights = [layer.weight for layer in self.layers]
            full = sum(type(weight) is nn.Parameter for weight in weights)
            self.most = max(self.most, full)

    def work(rank: int, world: int) -> int:
        with building():
            return Model().most

    assert run_ranks(work, 2) == [1, 1]


def test_buffers_and_modules_from_outside_stay_as_they_are() -> None:
    def work(rank: int, world: int) -> None:
        outside = nn.Linear(3, 3)
        with building(torch.bfloat16):
            model = nn.Sequential(outside, nn.BatchNorm1d(3))
        assert slot_of(outside.weight) is None
        assert outside.weight.dtype == torch.float32
        assert model[1].running_mean.dtype == torch.float32
        assert model[1].running_mean.shape == (3,)
        assert model[1].weight.dtype == torch.bfloat16

    run_ranks(work, 2)


def test_the_innermost_context_decides_and_all_are_undone_with_the_outermost() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with building(torch.bfloat16):
                self.inner = nn.Linear(2, 2)
            with suspended():
                self.plain = nn.Linear(2, 2)
            self.outer = nn.Linear(2, 2)
            self.own = nn.Parameter(torch.ones(3))

    def work(rank: int, world: int) -> dict[str, Any]:
        before = patched()
        with building(torch.float64), building(torch.float16):
            pass
        with building(torch.float64):
            model = Model()
            assert patched() != before
        assert patched() == before
        return {name: (p.dtype, is_waiting(p)) for name, p in model.named_parameters()}

    wanted = {
        "own": (torch.float64, True),
        "inner.weight": (torch.bfloat16, True),
        "inner.bias": (torch.bfloat16, True),
        "plain.weight": (torch.float32, False),
        "plain.bias": (torch.float32, False),
        "outer.weight": (torch.float64, True),
        "outer.bias": (torch.float64, True),
    }
    assert run_ranks(work, 2) == [wanted] * 2


def test_an_exception_leaves_nothing_patched_and_asks_no_other_rank() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            nn.init.zeros_(self.linear.weight)
            self.linear.extra = nn.Parameter(torch.ones(2))
            raise ValueError("broken")

    def work(rank: int, world: int) -> None:
        before = patched()
        with pytest.raises(ValueError, match="broken"), building():
            Broken()
        assert patched() == before
        assert slot_of(nn.Linear(2, 2).weight) is None

    run_ranks(work, 2)


def test_a_patch_of_somebody_else_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(rank: int, world: int) -> None:
        with monkeypatch.context() as patch:
            with building():
                ours = Child.__init__

                def theirs(child: Child) -> None:
                    ours(child)

                patch.setattr(Child, "__init__", theirs)
                assert is_waiting(Child().own)
            assert slot_of(Child().own) is None

    run_ranks(work, 2)


def test_outside_of_the_context_reads_of_parameters_and_casts_are_refused() -> None:
    def work(rank: int, world: int) -> None:
        with building():
            model = Parent()
        for read in (
            lambda: model.child.linear(torch.ones(4)),
            lambda: model.child.linear.weight + 1,
            lambda: torch.save(model.state_dict(), os.devnull),
            lambda: copy.deepcopy(model.state_dict()),
            lambda: copy.deepcopy(model),
            model.half,
        ):
            with pytest.raises(UsageError, match=r"(?s)was read while .*\.initialize\(\)"):
                read()
        with pytest.raises(UsageError, match=r"Linear#\d+.weight .* shape is \(3, 4\)"):
            model.child.linear.weight.sum()
        assert model.to("cpu") is model
        data = model.child.linear.weight.data + 1  # of no parameter: nothing could flow back
        with zeroshard.gathered(model):
            assert torch.equal(data, model.child.linear.weight + 1)

    run_ranks(work, 2)


def test_gathered_keeps_the_edits_of_the_rank_it_names() -> None:
    def work(rank: int, world: int) -> Tensor:
        with building():
            model = Parent()
        with zeroshard.gathered(model.child.own, modifier_rank=1), torch.no_grad():
            model.child.own.fill_(rank)
        assert model.child.own.shape == (0,)
        with zeroshard.gathered(model):
            return model.child.own.detach().clone()

    for own in run_ranks(work, 2):
        assert torch.equal(own, torch.ones(3, 5))


def test_an_existing_module_is_sharded_in_place() -> None:
    def work(rank: int, world: int) -> list[bool]:
        torch.manual_seed(rank)
        model = Tied()
        params = list(model.parameters())
        wanted = [param.detach().clone() for param in params]
        for value in wanted:
            dist.broadcast(value, 0)
        shard_module(model, sharding())
        assert all(a is b for a, b in zip(params, model.parameters(), strict=True))
        assert all(is_waiting(param) for param in params)
        with zeroshard.gathered(model):
            return [torch.equal(a, b) for a, b in zip(params, wanted, strict=True)]

    for equal in run_ranks(work, 3):
        assert all(equal)


def test_shards_live_as_long_as_their_parameters() -> None:
    def work(rank: int, world: int) -> None:
        with building():
            model = Tied()
        slots = [slot_of(param) for param in model.parameters()]
        units = [weakref.ref(slot.unit) for slot in slots if slot is not None]
        del slots
        gc.collect()
        assert all(unit() is not None for unit in units)
        del model
        gc.collect()
        assert all(unit() is None for unit in units)

    run_ranks(work, 2)


def test_parameters_of_other_kinds_wait_for_the_engine() -> None:
    class Special(nn.Parameter):
        pass

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.special = Special(torch.ones(3))
            self.lazy = nn.LazyLinear(3)
            self.counts = nn.Parameter(torch.arange(3), requires_grad=False)
            self.meta = nn.Linear(2, 2, device="meta")

    def work(rank: int, world: int) -> dict[str, bool]:
        with building(torch.bfloat16):
            model = Model()
        assert model.counts.dtype == torch.int64
        return {name: is_waiting(param) for name, param in model.named_parameters()}

    wanted = {
        "special": False,
        "counts": True,
        "lazy.weight": False,
        "lazy.bias": False,
        "meta.weight": False,
        "meta.bias": False,
    }
    assert run_ranks(work, 2) == [wanted] * 2


def test_on_one_rank_the_model_stays_ordinary() -> None:
    def work(rank: int, world: int) -> None:
        with building(torch.bfloat16):
            model = Parent()
        assert all(slot_of(param) is None for param in model.parameters())
        assert all(param.dtype == torch.bfloat16 for param in model.parameters())
        assert model.child.linear.weight.shape == (3, 4)
        assert len(copy.deepcopy(model).state_dict()) == 5

    run_ranks(work, 1)
