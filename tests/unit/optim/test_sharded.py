"""Any elementwise optimizer over slices: its groups, state, clipping, scaling and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from forked import run_ranks
from zeroshard.core.building import build_unit
from zeroshard.core.lifetime import STAGES
from zeroshard.core.mesh import Axis, Mesh, build_mesh
from zeroshard.core.norm import row_norms, squared
from zeroshard.core.unit import Member, Precision, Unit
from zeroshard.errors import LossScaleError, UsageError
from zeroshard.optim import Lamb, Muon
from zeroshard.optim.factory import ELEMENTWISE
from zeroshard.optim.scaler import LossScaler, ScalePolicy
from zeroshard.optim.sharded import (
    ShardedOptimizer,
    StepPolicy,
    check_optimizer,
    optimizer_parameters,
)

CPU = torch.device("cpu")
# Two units; the small parameters lie on one of two ranks only.
SHAPES = [[(1,), (3, 5), (7,)], [(0, 2), (4,), (1,)]]
PLAIN = StepPolicy()

every_stage = pytest.mark.parametrize("stage", STAGES)


def alone() -> Mesh:
    """A mesh of one rank, which needs no process group."""
    only = Axis(size=1, rank=0)
    return Mesh(only, only, control=None, device=CPU)  # type: ignore[arg-type]


def make_params(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(shape, generator=generator)) for unit in SHAPES for shape in unit
    ]


def make_grads(step: int, rank: int = 0) -> list[Tensor]:
    return [param.detach() for param in make_params(1000 + 10 * step + rank)]


def make_units(
    params: Sequence[nn.Parameter],
    stage: int = 1,
    mesh: Mesh | None = None,
    precision: Precision | None = None,
    frozen: int | None = None,
) -> list[Unit]:
    units: list[Unit] = []
    start = 0
    for number, shapes in enumerate(SHAPES):
        own = params[start : start + len(shapes)]
        start += len(shapes)
        unit = build_unit(
            [Member(f"u{number}.p{index}", param) for index, param in enumerate(own)],
            trained=number != frozen,
            lifetime=STAGES[stage],
            mesh=mesh or alone(),
            precision=precision or Precision(),
        )
        units.append(unit)
    return units


def give(units: Iterable[Unit], grads: Sequence[Tensor]) -> None:
    """What backward does: full gradients arrive and are reduced."""
    left = iter(grads)
    for unit in units:
        unit.gather()
        unit.wait()
        for member in unit.members:
            member.param.grad = next(left).to(member.param.dtype)
        unit.collect()
        unit.free()
        unit.reduce()


def read(units: Iterable[Unit]) -> list[Tensor]:
    values: list[Tensor] = []
    for unit in units:
        unit.gather()
        unit.wait()
        values += [member.param.detach().clone() for member in unit.members]
        unit.free()
    return values


def plain_step(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], grads: Any) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    optimizer.step()


def assert_close(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


def on_two_ranks(work: Callable[..., Any], *args: Any) -> list[Any]:
    return run_ranks(partial(work, *args), 2)


def mesh_for(stage: int, world: int) -> Mesh:
    return build_mesh(world if STAGES[stage].sharded else 1, CPU)


# Groups and state -------------------------------------------------------------------------------


def test_the_optimizer_given_keeps_its_groups_and_their_hyper_parameters() -> None:
    params = make_params()
    inner = torch.optim.AdamW(
        [
            {"params": params[:2], "lr": 0.5, "name": "first", "weight_decay": 0.0},
            {"params": params[2:4]},
            {"params": params[4:], "betas": (0.1, 0.2)},
        ],
        lr=0.25,
    )
    before = [{k: v for k, v in group.items() if k != "params"} for group in inner.param_groups]
    units = make_units(params)
    sharded = ShardedOptimizer(inner, units, alone(), policy=PLAIN)
    assert sharded.inner is inner
    after = [{k: v for k, v in group.items() if k != "params"} for group in inner.param_groups]
    assert after == before
    slices = [piece for unit in units for piece in unit.slices]
    held = [piece.numel() for piece in optimizer_parameters(inner)]
    assert held == [piece.numel() for piece in slices if piece.numel()]
    assert {id(piece) for piece in optimizer_parameters(inner)} <= {id(piece) for piece in slices}


def test_each_group_steps_its_own_parameters_with_its_own_rate() -> None:
    params, grads = make_params(), make_grads(0)
    before = [param.detach().clone() for param in params]
    inner = torch.optim.SGD([{"params": params[:2], "lr": 3.0}, {"params": params[2:]}], lr=0.5)
    units = make_units(params)
    sharded = ShardedOptimizer(inner, units, alone(), policy=PLAIN)
    give(units, grads)
    sharded.step(divide_by=1)
    rates = [3.0] * 2 + [0.5] * 4
    want = [b - rate * g for b, g, rate in zip(before, grads, rates, strict=True)]
    assert_close(read(units), want)


def test_a_scheduler_made_before_still_moves_the_rate() -> None:
    params = make_params()
    inner = torch.optim.SGD(params, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(inner, step_size=1, gamma=0.5)
    units = make_units(params)
    sharded = ShardedOptimizer(inner, units, alone(), policy=PLAIN)
    for rate in (1.0, 0.5, 0.25):
        before = read(units)
        give(units, make_grads(0))
        sharded.step(divide_by=1)
        scheduler.step()
        want = [b - rate * g for b, g in zip(before, make_grads(0), strict=True)]
        assert_close(read(units), want)


OPTIMIZERS = {cls.__name__: cls for cls in ELEMENTWISE}


def train_by_every_optimizer(stage: int, resumed: bool, rank: int, world: int) -> None:
    """Two steps on slices, if resumed after one on whole parameters, compared with plain ones."""
    mesh = mesh_for(stage, world)
    for _, cls in sorted(OPTIMIZERS.items()):
        plain, params = make_params(), make_params()
        reference, inner = cls(plain, lr=0.1), cls(params, lr=0.1)
        if resumed:
            for optimizer, own in ((reference, plain), (inner, params)):
                plain_step(optimizer, own, make_grads(99))
        units = make_units(params, stage, mesh)
        sharded = ShardedOptimizer(inner, units, mesh, policy=PLAIN)
        for step in range(2):
            give(units, make_grads(step, rank))
            sharded.step(divide_by=1)
            each = zip(*(make_grads(step, other) for other in range(world)), strict=True)
            plain_step(reference, plain, [sum(grads) / world for grads in each])
        assert_close(read(units), plain)


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("resumed", [False, True], ids=["fresh", "with state"])
def test_every_elementwise_optimizer_makes_the_steps_it_makes_on_whole_parameters(
    stage: int, resumed: bool
) -> None:
    on_two_ranks(train_by_every_optimizer, stage, resumed)


def step_a_scalar(cls: type[torch.optim.Optimizer], rank: int, world: int) -> None:
    plain, param = (nn.Parameter(torch.tensor(2.0)) for _ in range(2))
    reference, inner = cls([plain], lr=0.1), cls([param], lr=0.1)
    plain_step(reference, [plain], [torch.tensor(1.0)])
    plain_step(inner, [param], [torch.tensor(1.0)])
    mesh = build_mesh(world, CPU)
    unit = build_unit(
        [Member("p", param)],
        trained=True,
        lifetime=STAGES[1],
        mesh=mesh,
        precision=Precision(),
    )
    sharded = ShardedOptimizer(inner, [unit], mesh, policy=PLAIN)
    give([unit], [torch.tensor(3.0)])
    sharded.step(divide_by=1)
    plain_step(reference, [plain], [torch.tensor(3.0)])
    assert_close(read([unit]), [plain])


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.Adagrad])
def test_the_state_of_a_scalar_parameter_is_used_too(cls: type[torch.optim.Optimizer]) -> None:
    on_two_ranks(step_a_scalar, cls)


def slice_states(rank: int, world: int) -> list[dict[str, list[float]]]:
    params = make_params()
    inner = torch.optim.Adam(params, lr=0.1)
    plain_step(inner, params, make_grads(0))
    mesh = build_mesh(world, CPU)
    units = make_units(params, 3, mesh)
    ShardedOptimizer(inner, units, mesh, policy=PLAIN)
    assert {state["step"].shape for state in inner.state.values()} == {torch.Size([])}
    return [
        {
            key: value.tolist()
            for key, value in inner.state[piece].items()
            if isinstance(value, Tensor) and value.dim()
        }
        for unit in units
        for piece in unit.slices
    ]


def test_state_the_optimizer_has_already_is_cut_like_the_parameters() -> None:
    ranks = on_two_ranks(slice_states)
    params = make_params()
    whole = torch.optim.Adam(params, lr=0.1)
    plain_step(whole, params, make_grads(0))
    for index, param in enumerate(params):
        for key in ("exp_avg", "exp_avg_sq"):
            parts = [part for rank in ranks for part in rank[index].get(key, [])]
            want = whole.state[param][key].reshape(-1).tolist() if param.numel() else []
            assert parts == want, f"{key} of parameter {index}"


def test_optimizer_state_counts_moments_and_separate_master_weights() -> None:
    for precision, per_element in ((Precision(), 8), (Precision(torch.bfloat16), 12)):
        params = make_params()
        inner = torch.optim.Adam(params, lr=0.1)
        units = make_units(params, precision=precision)
        sharded = ShardedOptimizer(inner, units, alone(), policy=PLAIN)
        give(units, make_grads(0))
        sharded.step(divide_by=1)
        # Moments have no padding, master weights have that of the flat buffer.
        moments = 8 * sum(math.prod(shape) for shapes in SHAPES for shape in shapes)
        masters = (per_element - 8) * sum(unit.layout.shard_numel for unit in units)
        assert sharded.state_bytes() == moments + masters


def test_state_that_consists_of_other_tensors_counts_as_these() -> None:
    params = make_params()
    inner = torch.optim.SGD(params, lr=0.1)
    sharded = ShardedOptimizer(inner, make_units(params), alone(), policy=PLAIN)
    piece = next(iter(optimizer_parameters(inner)))
    codes, scales = torch.zeros(4, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8)
    inner.state[piece] = {"momentum_buffer": TwoTensor(codes, scales)}
    assert sharded.state_bytes() == 8


# Refusals ---------------------------------------------------------------------------------------


def test_stepping_the_optimizer_directly_is_refused() -> None:
    params = make_params()
    inner = torch.optim.SGD(params, lr=1.0)
    units = make_units(params)
    ShardedOptimizer(inner, units, alone(), policy=PLAIN)
    give(units, make_grads(0))
    before = read(units)
    with pytest.raises(UsageError, match="stepped directly") as error:
        inner.step()
    assert "engine.step()" in str(error.value)
    assert_close(read(units), before)


def test_it_is_refused_after_a_step_of_ours_that_failed_too() -> None:
    params = make_params()
    inner = torch.optim.SGD(params, lr=1.0)
    units = make_units(params)
    sharded = ShardedOptimizer(inner, units, alone(), policy=PLAIN)
    handle = inner.register_step_post_hook(lambda *_: 1 / 0)
    give(units, make_grads(0))
    with pytest.raises(ZeroDivisionError):
        sharded.step(divide_by=1)
    handle.remove()
    with pytest.raises(UsageError, match="stepped directly"):
        inner.step()


def test_a_parameter_of_another_model_is_refused_with_its_group() -> None:
    model = nn.Linear(2, 2)
    stranger = nn.Parameter(torch.ones(2, 3))
    inner = torch.optim.SGD([{"params": model.parameters()}, {"params": [stranger]}], lr=1.0)
    with pytest.raises(UsageError, match=r"param group 1 .* shape \(2, 3\)"):
        check_optimizer(inner, model, 1)


def test_a_frozen_parameter_in_a_param_group_is_never_stepped() -> None:
    params = make_params()
    before = [param.detach().clone() for param in params]
    inner = torch.optim.SGD(params, lr=1.0, weight_decay=0.5)
    units = make_units(params, frozen=1)
    sharded = ShardedOptimizer(inner, units, alone(), policy=PLAIN)
    give(units[:1], make_grads(0)[:3])
    sharded.step(divide_by=1)
    after = read(units)
    assert not any(torch.equal(a, b) for a, b in zip(after[:3], before[:3], strict=True))
    assert_close(after[3:], before[3:])


class MyAdam(torch.optim.Adam):
    """A subclass may do anything."""


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (torch.optim.Adafactor, "Adafactor keeps averages over the rows and columns"),
        (MyAdam, "MyAdam is not known to update each element on its own"),
    ],
)
def test_an_optimizer_that_may_look_at_whole_matrices_is_refused_on_shards_or_warned_about(
    cls: type[torch.optim.Optimizer], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Linear(2, 2)
    inner = cls(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match=rf"{reason}.* 1/2 of each") as error:
        check_optimizer(inner, model, 2)
    assert '"zero_allow_untested_optimizer": true' in str(error.value)
    check_optimizer(inner, model, 1)
    assert caplog.messages == []
    check_optimizer(inner, model, 2, allow_untested=True)
    (message,) = caplog.messages
    assert message.startswith(reason)
    assert message.endswith('"zero_allow_untested_optimizer" lets it train all the same.')


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (torch.optim.LBFGS, "LBFGS computes the loss several times in one step"),
        (torch.optim.SparseAdam, "SparseAdam takes sparse gradients only"),
    ],
)
def test_an_optimizer_that_no_engine_can_step_is_always_refused(
    cls: type[torch.optim.Optimizer], reason: str
) -> None:
    model = nn.Linear(2, 2)
    inner = cls(list(model.parameters()), lr=0.1)
    for num_shards in (1, 2):
        with pytest.raises(UsageError, match=reason):
            check_optimizer(inner, model, num_shards, allow_untested=True)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon since 2.9")
def test_torchs_own_muon_is_refused_on_shards_for_ours() -> None:
    model = nn.Linear(2, 2, bias=False)
    inner = torch.optim.Muon(model.parameters())
    with pytest.raises(UsageError, match=r'hint: name it(.|\n)*"Muon"(.|\n)*zeroshard.optim.Muon'):
        check_optimizer(inner, model, 2, allow_untested=True)
    check_optimizer(inner, model, 1)


@pytest.mark.parametrize("cls", [Lamb, Muon])
def test_an_optimizer_that_asks_for_whole_parameters_is_accepted_on_shards(
    cls: type[torch.optim.Optimizer],
) -> None:
    model = nn.Linear(2, 2, bias=False)
    check_optimizer(cls(model.parameters()), model, 2)


def cut_state_that_does_not_fit(rank: int, world: int) -> None:
    params = make_params()
    inner = torch.optim.Adafactor(params[1:2], lr=0.1)
    plain_step(inner, params[1:2], make_grads(0)[1:2])
    mesh = build_mesh(world, CPU)
    with pytest.raises(UsageError, match=r"u0\.p1: .* state 'row_var' has 3 elements(.|\n)*hint: "):
        ShardedOptimizer(inner, make_units(params, 1, mesh), mesh, policy=PLAIN)


def test_state_that_cannot_be_cut_like_its_parameter_is_refused() -> None:
    on_two_ranks(cut_state_that_does_not_fit)


@pytest.mark.parametrize("cls", sorted(ELEMENTWISE, key=lambda cls: cls.__name__))
def test_an_elementwise_optimizer_is_accepted_on_shards(cls: type[torch.optim.Optimizer]) -> None:
    model = nn.Linear(2, 2)
    check_optimizer(cls(model.parameters(), lr=0.1), model, 2)


def test_an_optimizer_that_looks_at_whole_matrices_is_right_on_one_rank() -> None:
    params, plain = make_params()[1:2], make_params()[1:2]
    unit = build_unit(
        [Member("p", params[0])],
        trained=True,
        lifetime=STAGES[3],
        mesh=alone(),
        precision=Precision(),
    )
    inner = torch.optim.Adafactor(params, lr=0.1)
    sharded = ShardedOptimizer(inner, [unit], alone(), policy=PLAIN)
    reference = torch.optim.Adafactor(plain, lr=0.1)
    for step in range(3):
        give([unit], make_grads(step)[1:2])
        sharded.step(divide_by=1)
        plain_step(reference, plain, make_grads(step)[1:2])
    assert_close(read([unit]), plain)


# Clipping, scaling, skipping --------------------------------------------------------------------


def one_step(
    grads: Sequence[Tensor], policy: StepPolicy, divide_by: float = 1, scale: float | None = None
) -> tuple[list[Tensor], ShardedOptimizer, bool]:
    """Minus what one step of SGD with rate 1 adds to the weights: the gradients it was given."""
    params = make_params()
    units = make_units(params)
    inner = torch.optim.SGD(params, lr=1.0)
    scaler = None
    if scale is not None:
        scaler = LossScaler(ScalePolicy(initial=scale, hysteresis=1))
    sharded = ShardedOptimizer(inner, units, alone(), policy=policy, scaler=scaler)
    before = read(units)
    give(units, grads)
    stepped = sharded.step(divide_by)
    return [b - a for a, b in zip(read(units), before, strict=True)], sharded, stepped


@given(
    st.integers(0, 50),
    st.floats(1e-3, 1e3),
    st.sampled_from((0.01, 1.0, 3.0, 1e4)),
    st.sampled_from((1, 3)),
    st.sampled_from((None, 2.0**12)),
)
def test_clipping_is_that_of_torch(
    seed: int, size: float, clip: float, divide_by: int, scale: float | None
) -> None:
    grads = [grad * size for grad in make_grads(seed)]
    plain = make_params()
    for param, grad in zip(plain, grads, strict=True):
        param.grad = grad / divide_by
    norm = nn.utils.clip_grad_norm_(plain, clip)
    by = divide_by * (scale or 1) / divide_by
    got, sharded, _ = one_step(
        [grad * by for grad in grads], StepPolicy(clip=clip), divide_by, scale
    )
    for ours, param in zip(got, plain, strict=True):
        # What the step took off the weights is exact up to the rounding of the weights.
        torch.testing.assert_close(ours, param.grad, rtol=1e-4, atol=1e-6 + size * 1e-6)
    assert sharded.norm is not None
    torch.testing.assert_close(sharded.norm, norm, rtol=1e-5, atol=0)


def test_without_clipping_gradients_are_divided_and_no_more() -> None:
    grads = [grad * 100 for grad in make_grads(0)]
    got, sharded, stepped = one_step(grads, PLAIN, divide_by=4)
    assert stepped
    for ours, grad in zip(got, grads, strict=True):
        torch.testing.assert_close(ours, grad / 4, rtol=1e-5, atol=1e-5)
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads)) / 4
    assert float(sharded.norm or 0) == pytest.approx(norm, rel=1e-5)


def norm_over_ranks(stage: int, rank: int, world: int) -> float:
    params = make_params()
    mesh = mesh_for(stage, world)
    units = make_units(params, stage, mesh)
    inner = torch.optim.SGD(params, lr=1.0)
    sharded = ShardedOptimizer(inner, units, mesh, policy=StepPolicy(clip=1.0))
    give(units, make_grads(0, rank))
    sharded.step(divide_by=2)
    assert sharded.norm is not None
    return float(sharded.norm)


@every_stage
def test_the_norm_is_that_of_the_averaged_gradients_of_all_ranks(stage: int) -> None:
    both = zip(make_grads(0, 0), make_grads(0, 1), strict=True)
    want = math.sqrt(sum(float(((a + b) / 2).square().sum()) for a, b in both)) / 2
    assert on_two_ranks(norm_over_ranks, stage) == pytest.approx([want, want], rel=1e-5)


@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_a_step_with_an_overflow_is_skipped_and_leaves_no_trace(poison: float) -> None:
    grads = make_grads(0)
    grads[1][0, 0] = poison
    policy = StepPolicy(clip=1.0, skip_on_overflow=True)
    got, sharded, stepped = one_step(grads, policy, scale=8.0)
    assert not stepped
    assert all(torch.equal(change, torch.zeros_like(change)) for change in got)
    assert sharded.scaler is not None
    assert sharded.scaler.scale == 4.0
    assert not sharded.inner.state
    assert all(unit.gradient_bytes == 0 for unit in sharded.units)
    # The next step is an ordinary one.
    give(sharded.units, [torch.zeros_like(grad) for grad in grads])
    assert sharded.step(divide_by=1)


def test_an_overflow_is_stepped_with_where_steps_are_not_to_be_skipped() -> None:
    grads = make_grads(0)
    grads[1][0, 0] = math.nan
    got, _, stepped = one_step(grads, PLAIN)
    assert stepped
    assert got[1].isnan().any()


def test_the_last_possible_overflow_is_an_error() -> None:
    grads = [torch.full_like(grad, math.inf) for grad in make_grads(0)]
    with pytest.raises(LossScaleError):
        one_step(grads, StepPolicy(skip_on_overflow=True), scale=1.0)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_are_gone_after_a_step(stage: int) -> None:
    params = make_params()
    units = make_units(params, stage)
    sharded = ShardedOptimizer(torch.optim.SGD(params, lr=1.0), units, alone(), policy=PLAIN)
    give(units, make_grads(0))
    sharded.step(divide_by=1)
    assert [unit.gradient_bytes for unit in units] == [0, 0]
    assert all(piece.grad is None for unit in units for piece in unit.slices)
    assert [unit.is_full for unit in units] == [STAGES[stage].params_stay] * 2


def test_gradients_may_be_cleared_between_two_micro_steps() -> None:
    params = make_params()
    before = [param.detach().clone() for param in params]
    units = make_units(params)
    sharded = ShardedOptimizer(torch.optim.SGD(params, lr=1.0), units, alone(), policy=PLAIN)
    give(units, make_grads(0))
    sharded.clear_gradients()
    give(units, make_grads(1))
    sharded.step(divide_by=1)
    assert_close(read(units), [b - g for b, g in zip(before, make_grads(1), strict=True)])


def test_the_norm_of_a_large_shard_is_exact() -> None:
    shard = torch.randn(3_000_001, generator=torch.Generator().manual_seed(0))
    want = shard.double().square().sum()
    assert abs(squared(row_norms(shard)) - want) / want < 1e-7
