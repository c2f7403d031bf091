"""Hooks drive units: brackets, scaling, parameters read elsewhere, state dicts, and their removal.

All of this runs autograd, so all of it runs in forked ranks.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from forked import run_ranks
from zeroshard.core.access import gathered
from zeroshard.core.building import build_unit
from zeroshard.core.hooks import Runtime, Site
from zeroshard.core.lifetime import STAGES
from zeroshard.core.mesh import Axis, Mesh, build_mesh
from zeroshard.core.scaling import ScaledLoss
from zeroshard.core.schedule import Schedule
from zeroshard.core.unit import Precision, Unit
from zeroshard.core.wrap import Kind, choose_groups
from zeroshard.errors import UsageError
from zeroshard.optim.sharded import ShardedOptimizer, StepPolicy

CPU = torch.device("cpu")
WIDTH = 6
FP32 = Precision()
BF16 = Precision(compute=torch.bfloat16)
LR = 0.1

every_stage = pytest.mark.parametrize("stage", STAGES)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.down(self.up(h).tanh())


class Net(nn.Module):
    """An embedding and blocks, each a unit, and a norm that belongs to the model's own unit."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(WIDTH)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(torch.randn(param.shape, generator=generator) * 0.5)

    def forward(self, ids: Tensor) -> Any:
        h = self.embedding(ids)
        for block in self.blocks:
            h = block(h)
        return self.norm(h)


def ids(rank: int = 0, step: int = 0) -> Tensor:
    return torch.randint(0, 20, (2, 4), generator=torch.Generator().manual_seed(10 * step + rank))


def alone() -> Mesh:
    """A mesh of one rank, which needs no process group."""
    only = Axis(size=1, rank=0)
    return Mesh(only, only, control=None, device=CPU)  # type: ignore[arg-type]


def make_runtime(
    model: nn.Module,
    stage: int,
    mesh: Mesh | None = None,
    precision: Precision = FP32,
    is_trained: Callable[[nn.Parameter], bool] = lambda param: param.requires_grad,
) -> Runtime:
    """Units, sites and hooks over a model, as the engine makes them."""
    mesh, life = mesh or alone(), STAGES[stage]
    groups = choose_groups(model, kind_of=lambda param: Kind(is_trained(param)))
    users: dict[nn.Module, list[Unit]] = {model: []}
    units: list[Unit] = []
    for group in groups:
        unit = build_unit(
            group.members, trained=group.kind.trained, lifetime=life, mesh=mesh, precision=precision
        )
        units.append(unit)
        for module in group.sites:
            users.setdefault(module, []).append(unit)
    sites = [Site(type(module).__name__, module, used) for module, used in users.items()]
    runtime = Runtime(model, sites, units, Schedule(units, mesh))
    runtime.attach()
    return runtime


def mesh_for(stage: int, world: int) -> Mesh:
    return build_mesh(world if STAGES[stage].sharded else 1, CPU)


def make_sgd(model: nn.Module, runtime: Runtime, mesh: Mesh, lr: float = LR) -> ShardedOptimizer:
    inner = torch.optim.SGD(model.parameters(), lr=lr)
    return ShardedOptimizer(inner, runtime.units, mesh, policy=StepPolicy())


def gradients(runtime: Runtime) -> dict[str, Tensor]:
    """The reduced gradient of every trained parameter, on one rank."""
    found: dict[str, Tensor] = {}
    for unit in runtime.trained:
        unit.settle()
        unit.expose_gradients()
        for member, piece in zip(unit.members, unit.slices, strict=True):
            assert piece.grad is not None
            found[member.name] = piece.grad.clone()
    return found


def plain_gradients(model: nn.Module, loss: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    loss(model(ids())).backward()
    zeros = torch.zeros
    return {n: zeros(p.shape) if p.grad is None else p.grad for n, p in model.named_parameters()}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], by: float = 1.0) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value * by, rtol=1e-5, atol=1e-6, msg=name)


def full_values(model: nn.Module) -> dict[str, Tensor]:
    with gathered(model):
        return {name: param.detach().clone() for name, param in model.named_parameters()}


def in_a_child(work: Callable[[], None]) -> None:
    run_ranks(lambda rank, world: work(), 1, process_group=False)


def on_two_ranks(work: Callable[..., Any], *args: Any) -> list[Any]:
    return run_ranks(partial(work, *args), 2)


# Brackets ---------------------------------------------------------------------------------------


@every_stage
def test_gradients_are_those_of_the_plain_model(stage: int) -> None:
    def work() -> None:
        model = Net()
        runtime = make_runtime(model, stage)
        for _ in range(2):
            model(ids()).square().sum().backward()
            want = plain_gradients(Net(), lambda out: out.square().sum())
            assert_close(gradients(runtime), want)
            for unit in runtime.units:
                unit.clear_gradients()

    in_a_child(work)


def test_blocks_are_full_only_while_they_run() -> None:
    def work() -> None:
        model = Net()
        seen: list[list[bool]] = []

        def look(*_: object) -> None:
            seen.append([block.up.weight.numel() > 0 for block in model.blocks])

        for block in model.blocks:
            block.register_forward_hook(look)
        runtime = make_runtime(model, 3)
        out = model(ids())
        assert seen == [[True, False], [False, True]]
        out.sum().backward()
        assert not any(unit.is_full for unit in runtime.units)

    in_a_child(work)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_forward_without_gradients_leaves_nothing_full(mode: Callable[[], Any]) -> None:
    def work() -> None:
        model, want = Net(), Net()(ids())
        runtime = make_runtime(model, 3)
        with mode():
            for _ in range(3):
                torch.testing.assert_close(model(ids()), want.detach())
                assert not any(unit.is_full for unit in runtime.units)

    in_a_child(work)


def test_gradients_that_no_optimizer_wants_are_dropped() -> None:
    def work() -> None:
        model = Net()
        runtime = make_runtime(model, 1, is_trained=lambda param: param is model.embedding.weight)
        assert all(param.requires_grad for param in model.parameters())
        model(ids()).square().sum().backward()
        assert {param.grad for param in model.parameters()} == {None}
        assert gradients(runtime).keys() == {"embedding.weight"}

    in_a_child(work)


@pytest.mark.parametrize("stage", [0, 1])
def test_outside_a_boundary_gradients_stay_full_and_unreduced(stage: int) -> None:
    def work() -> None:
        model = Net()
        runtime = make_runtime(model, stage)
        runtime.boundary = False
        model(ids()).square().sum().backward()
        assert all(unit.has_gradient and unit.grad_shard is None for unit in runtime.trained)
        runtime.flush()
        assert_close(gradients(runtime), plain_gradients(Net(), lambda out: out.square().sum()))

    in_a_child(work)


def test_a_model_works_again_after_an_exception_in_its_forward() -> None:
    def work() -> None:
        model = Net()
        runtime = make_runtime(model, 3)
        handle = model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids())
        handle.remove()
        runtime.reset()
        assert not any(unit.is_full for unit in runtime.units)
        model(ids()).square().sum().backward()
        assert_close(gradients(runtime), plain_gradients(Net(), lambda out: out.square().sum()))

    in_a_child(work)


def test_after_an_exception_in_backward_a_reset_is_due() -> None:
    def work() -> None:
        model = Net()
        runtime = make_runtime(model, 3)

        out = model(ids())
        handle = out.grad_fn.next_functions[0][0].register_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            out.sum().backward()
        handle.remove()
        with pytest.raises(UsageError, match="the last backward ended in an exception"):
            model(ids())
        runtime.reset()
        for unit in runtime.units:
            unit.clear_gradients()
        assert not any(unit.is_full for unit in runtime.units)
        model(ids()).square().sum().backward()
        assert_close(gradients(runtime), plain_gradients(Net(), lambda out: out.square().sum()))

    in_a_child(work)


# Loss scale -------------------------------------------------------------------------------------


class ManyOutputs(Net):
    """Outputs that are computed from one another, in and out of containers."""

    def forward(self, ids: Tensor) -> Any:
        hidden = super().forward(ids)
        logits = hidden @ hidden.transpose(-1, -2)
        return {"hidden": hidden, "nested": (logits, [logits.square().mean()]), "n": 3}


def sum_of_many(out: Any) -> Tensor:
    logits, (loss,) = out["nested"]
    return loss + logits.sum() * 0.1 + out["hidden"].square().sum()


@every_stage
def test_gradients_are_scaled_once_through_outputs_derived_from_one_another(stage: int) -> None:
    def work() -> None:
        model = ManyOutputs()
        runtime = make_runtime(model, stage)
        runtime.loss_scale = torch.tensor(8.0)
        sum_of_many(model(ids())).backward()
        assert runtime.scaled
        assert_close(gradients(runtime), plain_gradients(ManyOutputs(), sum_of_many), by=8)

    in_a_child(work)


@every_stage
def test_a_loss_that_is_scaled_already_is_only_brought_to_the_scale_of_the_model(
    stage: int,
) -> None:
    def work() -> None:
        model = ManyOutputs()
        runtime = make_runtime(model, stage)
        runtime.loss_scale = torch.tensor(8.0)
        loss = sum_of_many(model(ids()))
        with ScaledLoss.by(4.0):
            (loss * 4).backward()
        assert_close(gradients(runtime), plain_gradients(ManyOutputs(), sum_of_many), by=8)

    in_a_child(work)


def test_gradients_that_leave_through_the_inputs_are_not_scaled() -> None:
    def work() -> None:
        model = nn.Linear(3, 2)
        runtime = make_runtime(model, 1)
        weight = model.weight.detach().clone()
        runtime.loss_scale = torch.tensor(8.0)
        given = torch.ones(1, 3, requires_grad=True)
        model(given).sum().backward()
        torch.testing.assert_close(given.grad, weight.sum(0, keepdim=True))
        assert gradients(runtime)["bias"].tolist() == [8.0, 8.0]

    in_a_child(work)


def test_a_loss_that_avoids_the_outputs_is_noticed_as_unscaled() -> None:
    def work() -> None:
        model = Net()
        runtime = make_runtime(model, 1)
        runtime.loss_scale = torch.tensor(8.0)
        model.embedding(ids()).sum().backward()
        assert not runtime.scaled

    in_a_child(work)


def test_a_scaled_output_is_never_edited_in_place_without_a_word() -> None:
    class Loss(Net):
        def forward(self, ids: Tensor) -> Any:
            hidden = super().forward(ids)
            return hidden, hidden.square().sum()

    def work() -> None:
        model = Loss()
        runtime = make_runtime(model, 1)
        runtime.loss_scale = torch.tensor(8.0)
        hidden, loss = model(ids())
        with pytest.raises(RuntimeError, match="modified inplace"):
            hidden *= 2
        loss += 1
        loss.backward()
        assert_close(gradients(runtime), plain_gradients(Loss(), lambda out: out[1]), by=8)

    in_a_child(work)


def test_a_scale_beyond_the_largest_half_does_not_overflow_by_itself() -> None:
    def work() -> None:
        model = nn.Linear(4, 4)
        runtime = make_runtime(model, 1, precision=Precision(compute=torch.float16))
        runtime.loss_scale = torch.tensor(2.0**17)
        (model(torch.ones(1, 4).half()).float() * 2.0**-10).sum().backward()
        assert gradients(runtime)["bias"].tolist() == [2.0**7] * 4

    in_a_child(work)


# Removal ----------------------------------------------------------------------------------------


@every_stage
def test_detaching_leaves_an_ordinary_model(stage: int) -> None:
    def work() -> None:
        model, untouched = Net(), Net()
        runtime = make_runtime(model, stage)
        kinds = [name for name in vars(untouched) if name.endswith("_hooks")]
        assert any(getattr(model, kind) for kind in kinds)
        runtime.add_use(model.blocks[0].up, runtime.units[0])
        runtime.detach()
        for module in model.modules():
            assert [kind for kind in kinds if getattr(module, kind)] == []
            assert type(vars(module)["_parameters"]) is type(vars(untouched)["_parameters"])
        if STAGES[stage].params_stay:
            torch.testing.assert_close(model(ids()), untouched(ids()))
            assert model.state_dict().keys() == untouched.state_dict().keys()

    in_a_child(work)


# Parameters read by a module that does not hold them --------------------------------------------


class ReadsElsewhere(Net):
    """The model multiplies with the weight of its embedding, in some steps or in all."""

    def __init__(self, read_from_step: int = 0) -> None:
        super().__init__()
        self.step, self.read_from_step = 0, read_from_step

    def forward(self, ids: Tensor) -> Tensor:
        h = self.blocks[0](self.embedding(ids))
        if self.step >= self.read_from_step:
            h = h + F.linear(h, self.embedding.weight).tanh() @ self.embedding.weight
        self.step += 1
        return self.norm(self.blocks[1](h + self.embedding(ids.flip(0))))


def loss_of(out: Tensor) -> Tensor:
    return out.square().mean() + out[..., 0].sum() * 0.1


def train_plain(model: nn.Module, world: int, num_steps: int) -> dict[str, Tensor]:
    sgd = torch.optim.SGD(model.parameters(), lr=LR)
    for step in range(num_steps):
        for rank in range(world):
            (loss_of(model(ids(rank, step))) / world).backward()
            model.step -= rank < world - 1  # all ranks are at the same step
        sgd.step()
        sgd.zero_grad()
    return {name: param.detach() for name, param in model.named_parameters()}


def train_reading(read_from_step: int, rank: int, world: int) -> tuple[Any, Any, list[int]]:
    model = ReadsElsewhere(read_from_step)
    mesh = mesh_for(3, world)
    runtime = make_runtime(model, 3, mesh)
    optimizer = make_sgd(model, runtime, mesh)
    num_sites = []
    for step in range(4):
        loss_of(model(ids(rank, step))).backward()
        optimizer.step(divide_by=1)
        num_sites.append(sum(runtime.units[0] in site.units for site in runtime.sites))
    return full_values(model), train_plain(ReadsElsewhere(read_from_step), world, 4), num_sites


@pytest.mark.parametrize("read_from_step", [0, 2])
def test_a_parameter_read_outside_its_module_is_right_in_every_step(read_from_step: int) -> None:
    for got, want, num_sites in on_two_ranks(train_reading, read_from_step):
        assert_close(got, want)
        # The embedding alone, and from the first read on the model that reads it too.
        assert num_sites == [1] * read_from_step + [2] * (4 - read_from_step)


def test_a_copy_of_a_model_made_of_full_parameters_is_an_ordinary_one() -> None:
    def work() -> None:
        model, want = Net(), Net()
        runtime = make_runtime(model, 3)
        with gathered(model):
            clone = copy.deepcopy(model)
        assert type(vars(clone.embedding)["_parameters"]) is dict
        torch.testing.assert_close(clone(ids()), want(ids()))
        assert not any(unit.is_full for unit in runtime.units)
        clone(ids()).square().sum().backward()
        want(ids()).square().sum().backward()
        torch.testing.assert_close(clone.norm.weight.grad, want.norm.weight.grad)
        assert clone.state_dict().keys() == want.state_dict().keys()

    in_a_child(work)


def test_a_graph_that_is_kept_may_be_used_again() -> None:
    def work() -> None:
        model, want = Net(), Net()
        runtime = make_runtime(model, 3)
        for each in (model, want):
            out = each(ids())
            out.square().sum().backward(retain_graph=True)
            out[..., 0].sum().backward()
        named = want.named_parameters()
        assert_close(gradients(runtime), {n: p.grad for n, p in named if p.grad is not None})

    in_a_child(work)


# Reading and editing full parameters ------------------------------------------------------------


def test_parameters_are_full_inside_gathered_and_freed_after_it() -> None:
    def work() -> None:
        model, want = Net(), Net()
        runtime = make_runtime(model, 3)
        norm = model.norm
        for params, num_units in ((model, 4), (model.parameters(), 4), (norm.weight, 1), (norm, 1)):
            with gathered(params):
                assert sum(unit.is_full for unit in runtime.units) == num_units
                assert torch.equal(norm.weight, want.norm.weight)
                assert torch.equal(norm.bias, want.norm.bias)  # of the same unit
            assert not any(unit.is_full for unit in runtime.units)

    in_a_child(work)


def test_gathered_frees_after_an_exception_and_only_what_it_has_gathered() -> None:
    def work() -> None:
        model = Net()
        runtime = make_runtime(model, 3)
        with gathered(model.embedding):
            with pytest.raises(ZeroDivisionError), gathered(model):
                _ = 1 / 0
            assert [unit.is_full for unit in runtime.units] == [True, False, False, False]
        assert not any(unit.is_full for unit in runtime.units)

    in_a_child(work)


def test_gathered_leaves_parameters_of_no_engine_alone() -> None:
    param = nn.Parameter(torch.ones(2))
    with gathered(param), gathered([param]), gathered(nn.Linear(2, 2)):
        assert param.tolist() == [1.0, 1.0]


# State dicts ------------------------------------------------------------------------------------


def test_a_state_dict_of_freed_parameters_shows_names_and_is_not_to_be_saved() -> None:
    def work() -> None:
        model = Net()
        make_runtime(model, 3)
        for module in (model, model.blocks, model.norm):
            state = module.state_dict()
            assert [*state] == [name for name, _ in module.named_parameters()]
            assert all(value.nelement() == 0 for value in state.values())
        value = model.state_dict()["norm.weight"]
        assert value.dtype == torch.float32
        for use in (
            *(Tensor.clone, Tensor.sum, Tensor.tolist, Tensor.data_ptr, Tensor.untyped_storage),
            *(copy.deepcopy, lambda value: value.detach() + 1, lambda value: value.cpu() + 1),
            lambda value: torch.save(value, io.BytesIO()),
        ):
            with pytest.raises(UsageError, match=r"norm\.weight was read while its unit is freed"):
                use(value)
        themselves = model.norm.state_dict(keep_vars=True)
        assert themselves == dict(model.norm.named_parameters())
        with pytest.raises(UsageError, match=r"read while its unit is freed"):
            torch.save(themselves, io.BytesIO())
        with pytest.raises(UsageError, match=r"needs full parameters.*weight is freed") as error:
            model.norm.load_state_dict({"weight": torch.ones(6), "bias": torch.ones(6)})
        assert "modifier_rank=0" in str(error.value)

    in_a_child(work)


def save(stage: int, rank: int, world: int) -> dict[str, Tensor]:
    model = Net(seed=rank)
    make_runtime(model, stage, mesh_for(stage, world))
    if STAGES[stage].params_stay:
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with gathered(model):
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@every_stage
def test_a_state_dict_holds_full_parameters_on_every_rank(stage: int) -> None:
    for got in on_two_ranks(save, stage):
        assert_close(got, dict(Net(seed=0).named_parameters()))


def load(
    stage: int, precision: Precision, part: str, rank: int, world: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Load other weights into a part of the model, then step once with a learning rate of zero."""
    model, other = Net(seed=0), Net(seed=1)
    mesh = mesh_for(stage, world)
    runtime = make_runtime(model, stage, mesh, precision)
    optimizer = make_sgd(model, runtime, mesh, lr=0.0)
    weights = other.get_submodule(part).state_dict()
    if STAGES[stage].params_stay:
        model.get_submodule(part).load_state_dict(weights)
    else:
        with gathered(model, modifier_rank=0):
            if rank == 0:
                model.get_submodule(part).load_state_dict(weights)
    model(ids(rank)).square().sum().backward()
    optimizer.step(divide_by=1)
    want = Net(seed=0)
    want.get_submodule(part).load_state_dict(weights)
    rounded = {
        name: param.detach().to(precision.compute or param.dtype)
        for name, param in want.named_parameters()
    }
    return full_values(model), rounded


@every_stage
@pytest.mark.parametrize("part", ["", "blocks.0"], ids=["model", "submodule"])
@pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"])
def test_loaded_weights_survive_the_next_step(stage: int, precision: Precision, part: str) -> None:
    for got, want in on_two_ranks(load, stage, precision, part):
        assert_close(got, want)
