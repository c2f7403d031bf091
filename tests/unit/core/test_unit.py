"""Units: gathering, freeing, averaging and editing flat buffers, on one rank and on two."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from forked import run_ranks
from zeroshard.core.building import build_unit
from zeroshard.core.collectives import broadcast_
from zeroshard.core.freed import FreedParameter
from zeroshard.core.lifetime import STAGES, Lifetime
from zeroshard.core.mesh import Axis, Mesh, build_mesh
from zeroshard.core.slots import slot_of
from zeroshard.core.unit import Member, Precision, Unit
from zeroshard.errors import UsageError

CPU = torch.device("cpu")
SHAPES = [(3, 5), (), (0, 4), (7,), (1,), (2, 2, 2)]
FP32 = Precision()
BF16 = Precision(compute=torch.bfloat16)

every_lifetime = pytest.mark.parametrize(
    "life", STAGES.values(), ids=[f"stage {n}" for n in STAGES]
)
freeing = STAGES[3]
staying = STAGES[1]


def alone() -> Mesh:
    """A mesh of one rank, which needs no process group."""
    only = Axis(size=1, rank=0)
    return Mesh(only, only, control=None, device=CPU)  # type: ignore[arg-type]


def mesh_for(life: Lifetime, world: int) -> Mesh:
    return build_mesh(world if life.sharded else 1, CPU)


def make_params(
    shapes: Sequence[tuple[int, ...]] = SHAPES, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def make_unit(
    params: Sequence[nn.Parameter],
    life: Lifetime,
    mesh: Mesh | None = None,
    precision: Precision = FP32,
    trained: bool = True,
) -> Unit:
    members = [Member(f"p{index}", param) for index, param in enumerate(params)]
    mesh = mesh or alone()
    return build_unit(members, trained=trained, lifetime=life, mesh=mesh, precision=precision)


def values(params: Sequence[Tensor]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


def make_full(unit: Unit) -> None:
    unit.gather()
    unit.wait()


def assert_equal(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    for ours, theirs in zip(got, want, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs), f"{ours} is not {theirs}"


def give(params: Sequence[nn.Parameter], grads: Sequence[Tensor | None]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.clone()


def shard_of(unit: Unit, full: Sequence[Tensor]) -> Tensor:
    """This rank's range of a flat buffer that holds these tensors and zeros between them."""
    flat = torch.zeros(unit.layout.full_numel, dtype=full[0].dtype)
    for index, tensor in enumerate(full):
        flat[unit.layout.full(index).slice()] = tensor.reshape(-1)
    return flat[unit.layout.shard(unit.mesh.shard.rank).slice()]


def assert_reduced(unit: Unit, want: Sequence[Tensor]) -> None:
    unit.settle()
    assert unit.grad_shard is not None
    torch.testing.assert_close(unit.grad_shard, shard_of(unit, want), rtol=1e-6, atol=1e-6)


# Parameters -------------------------------------------------------------------------------------


@every_lifetime
def test_values_and_identity_survive_gathering_and_freeing(life: Lifetime) -> None:
    params = make_params()
    before, ids = values(params), [id(param) for param in params]
    unit = make_unit(params, life)
    for _ in range(3):
        make_full(unit)
        assert_equal(params, before)
        unit.free()
    assert [id(param) for param in params] == ids
    assert all(isinstance(param, nn.Parameter) and param.requires_grad for param in params)


@given(st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=5))
def test_parameters_of_any_shape_come_back_with_it(shapes: list[tuple[int, ...]]) -> None:
    params = make_params(shapes)
    before = values(params)
    unit = make_unit(params, freeing)
    make_full(unit)
    assert_equal(params, before)


def test_a_freed_unit_holds_no_memory_for_full_parameters() -> None:
    params = make_params()
    unit = make_unit(params, freeing)
    make_full(unit)
    storages = [param.untyped_storage() for param in params]
    assert {storage.nbytes() for storage in storages} == {unit.nbytes_full}
    unit.free()
    assert {storage.nbytes() for storage in storages} == {0}
    assert {param.untyped_storage().nbytes() for param in params} == {0}
    assert not unit.is_full
    assert [param.numel() for param in params] == [0] * len(params)


def test_views_of_full_parameters_become_valid_again_with_the_next_gather() -> None:
    params = make_params()
    unit = make_unit(params, freeing)
    make_full(unit)
    saved = [param.detach() for param in params]
    before = values(saved)
    unit.free()
    make_full(unit)
    assert_equal(saved, before)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_parameters_that_stay_are_never_freed(stage: int) -> None:
    params = make_params()
    before = values(params)
    unit = make_unit(params, STAGES[stage])
    assert unit.is_full
    unit.free()
    assert unit.is_full
    assert_equal(params, before)


def test_gathering_and_freeing_twice_is_as_good_as_once() -> None:
    params = make_params()
    before = values(params)
    unit = make_unit(params, freeing)
    unit.free()
    unit.gather()
    unit.gather()
    unit.wait()
    unit.wait()
    assert_equal(params, before)
    unit.free()
    unit.free()
    assert not unit.is_full


def test_an_outlined_parameter_has_a_shape_but_no_values_and_no_memory() -> None:
    params = make_params([(300, 20)])
    before = values(params)
    unit = make_unit(params, freeing)
    unit.outline()
    assert params[0].shape == (300, 20)
    assert params[0].isnan().all()
    assert params[0].untyped_storage().nbytes() < 100
    assert not unit.is_full
    unit.free()
    assert params[0].numel() == 0
    unit.outline()
    make_full(unit)
    assert_equal(params, before)
    unit.outline()  # of a full unit there is nothing to outline
    assert_equal(params, before)


READS: dict[str, Callable[[nn.Parameter], object]] = {
    "arithmetic": lambda param: param + 1,
    "arithmetic from the right": lambda param: torch.ones(3) @ param,
    "a function": lambda param: F.linear(torch.ones(2), param),
    "a keyword": lambda param: F.linear(torch.ones(2), weight=param),
    "a method": lambda param: param.sum(),
    "an index": lambda param: param[0],
    "a comparison": lambda param: torch.equal(param, param),
    "an edit": lambda param: param.add_(1),
    "a copy": copy.deepcopy,
    "a pickle": pickle.dumps,
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_reading_a_freed_parameter_is_refused_with_its_name_and_shape(
    read: Callable[[nn.Parameter], object],
) -> None:
    params = make_params([(4,), (3, 2)])
    unit = make_unit(params, freeing)
    with pytest.raises(UsageError, match=r"p1 was read while .* shape is \(3, 2\)") as error:
        read(params[1])
    assert "zeroshard.gathered(...)" in str(error.value)
    make_full(unit)
    read(params[1].detach().requires_grad_(False))


def test_reading_a_freed_parameter_among_others_is_refused() -> None:
    params = make_params([(4,), (4,)])
    make_unit(params, freeing)
    with pytest.raises(UsageError, match="was read while its unit is freed"):
        torch.cat(params)


def test_a_freed_parameter_can_be_looked_at_without_being_read() -> None:
    params = make_params([(3, 2)])
    make_unit(params, freeing)
    (param,) = params
    assert isinstance(param, nn.Parameter)
    assert param in {param: 1}
    assert (param.shape, param.numel(), param.ndim, param.dtype) == ((0,), 0, 1, torch.float32)
    assert (param.requires_grad, param.is_leaf, param.grad, param.device) == (True, True, None, CPU)
    assert "FreedParameter" in repr(param)


def test_a_gathered_parameter_has_the_class_it_had() -> None:
    class Own(nn.Parameter):
        pass

    params = [*make_params([(2,)]), Own(torch.ones(3))]
    unit = make_unit(params, freeing)
    for _ in range(2):
        make_full(unit)
        assert [type(param) for param in params] == [nn.Parameter, Own]
        unit.free()
        assert [isinstance(param, FreedParameter) for param in params] == [True, True]
        assert [type(param).__name__ for param in params] == ["FreedParameter", "Own"]
        assert isinstance(params[1], Own)
        with pytest.raises(UsageError, match="p1 was read while its unit is freed"):
            params[1].sum()


@every_lifetime
def test_parameters_that_are_left_alone_count_as_untouched(life: Lifetime) -> None:
    params = make_params()
    unit = make_unit(params, life, precision=BF16)
    for verb in (unit.gather, unit.wait, unit.check_untouched, unit.free, unit.outline):
        verb()
        unit.check_untouched()


@every_lifetime
def test_freezing_a_parameter_behind_the_back_of_its_unit_is_noticed(life: Lifetime) -> None:
    params = make_params()
    unit = make_unit(params, life)
    params[2].requires_grad_(False)
    with pytest.raises(UsageError, match=r"requires_grad was changed after initialize\(\)"):
        unit.check_untouched()


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_moving_parameters_behind_the_back_of_their_unit_is_noticed(stage: int) -> None:
    params = make_params()
    unit = make_unit(params, STAGES[stage])
    params[0].data = params[0].data.half()
    with pytest.raises(UsageError, match=r"data was replaced after initialize\(\)") as error:
        unit.check_untouched()
    assert "hint: " in str(error.value)


# Gradients --------------------------------------------------------------------------------------


@every_lifetime
def test_collecting_takes_the_gradients_away_from_the_parameters(life: Lifetime) -> None:
    params = make_params()
    unit = make_unit(params, life)
    assert not unit.collect()
    make_full(unit)
    give(params, values(params))
    assert unit.collect()
    assert unit.has_gradient
    assert [param.grad for param in params] == [None] * len(params)
    assert not unit.collect()


@every_lifetime
def test_gradients_of_several_backwards_add_up_before_they_are_reduced(life: Lifetime) -> None:
    params, first, second = (make_params(seed=seed) for seed in range(3))
    unit = make_unit(params, life)
    make_full(unit)
    give(params, values(first))
    unit.collect()
    give(params, [None, *values(second)[1:]])
    unit.collect()
    unit.reduce()
    sums = [a + b for a, b in zip(values(first), values(second), strict=True)]
    assert_reduced(unit, [first[0].detach(), *sums[1:]])


@every_lifetime
@pytest.mark.parametrize("settled", [True, False], ids=["settled", "under way"])
def test_a_second_reduction_in_one_step_adds_to_the_first(life: Lifetime, settled: bool) -> None:
    params, first, second = (make_params(seed=seed) for seed in range(3))
    unit = make_unit(params, life)
    make_full(unit)
    for grads in (first, second):
        give(params, values(grads))
        unit.collect()
        unit.reduce()
        if settled:
            unit.settle()
    assert_reduced(unit, [(a + b).detach() for a, b in zip(first, second, strict=True)])


@every_lifetime
def test_a_reduction_without_a_gradient_adds_nothing(life: Lifetime) -> None:
    params, grads = make_params(), values(make_params(seed=1))
    unit = make_unit(params, life)
    make_full(unit)
    unit.reduce()
    assert_reduced(unit, [torch.zeros_like(grad) for grad in grads])
    give(params, grads)
    unit.collect()
    unit.reduce()
    unit.reduce()
    assert_reduced(unit, grads)


@every_lifetime
def test_gradients_of_the_last_step_do_not_leak_into_the_next(life: Lifetime) -> None:
    params, grads = make_params(), values(make_params(seed=1))
    unit = make_unit(params, life)
    make_full(unit)
    give(params, [torch.full_like(grad, torch.nan) for grad in grads])
    unit.collect()
    unit.reduce()
    unit.clear_gradients()
    assert unit.gradient_bytes == 0
    assert unit.grad_shard is None
    give(params, [grads[0], *[None] * (len(grads) - 1)])
    unit.collect()
    unit.reduce()
    assert_reduced(unit, [grads[0], *(torch.zeros_like(grad) for grad in grads[1:])])


@every_lifetime
def test_clearing_forgets_gradients_at_every_stage_of_their_way(life: Lifetime) -> None:
    params, grads = make_params(), values(make_params(seed=1))
    unit = make_unit(params, life)
    make_full(unit)
    give(params, grads)
    unit.collect()
    unit.reduce()
    unit.settle()
    unit.expose_gradients()
    give(params, grads)
    unit.clear_gradients()
    assert not unit.has_gradient
    assert not unit.collect()
    assert all(piece.grad is None for piece in unit.slices)


@every_lifetime
def test_each_slice_shows_the_optimizer_its_part_of_the_gradient(life: Lifetime) -> None:
    params, grads = make_params(), values(make_params(seed=1))
    unit = make_unit(params, life)
    make_full(unit)
    give(params, grads)
    unit.collect()
    unit.reduce()
    unit.settle()
    unit.expose_gradients()
    assert_equal([piece.grad for piece in unit.slices if piece.grad is not None], grads)


def test_on_one_rank_a_gradient_that_arrives_once_keeps_its_narrow_dtype() -> None:
    def reduced(times: int, looks: bool = False) -> Tensor:
        params = make_params([(4, 4)], dtype=torch.bfloat16)
        unit = make_unit(params, freeing, precision=BF16)
        make_full(unit)
        for _ in range(times):
            give(params, [torch.full((4, 4), 1.0, dtype=torch.bfloat16)])
            unit.collect()
        if looks:
            view = unit.unreduced(0)
            assert view is not None
            view += 2**-20  # as a hook of the user's may
        unit.reduce()
        unit.settle()
        assert unit.grad_shard is not None
        return unit.grad_shard

    assert reduced(1).dtype == torch.bfloat16
    assert torch.equal(reduced(1).float(), torch.ones(16))
    for grad, wanted in ((reduced(257), 257.0), (reduced(1, looks=True), 1 + 2**-20)):
        assert torch.equal(grad, torch.full((16,), wanted))  # which bf16 does not have


def test_full_gradients_exist_only_while_their_lifetime_lasts() -> None:
    for stage, life in STAGES.items():
        params = make_params([(4, 4)])
        unit = make_unit(params, life, precision=Precision(reduce=torch.bfloat16))
        make_full(unit)
        assert unit.gradient_bytes == 0
        give(params, [torch.ones(4, 4)])
        unit.collect()
        full = unit.gradient_bytes
        assert full == (64 if life.grads_stay else 32), f"stage {stage}"
        unit.reduce()
        unit.settle()
        # On one rank the shard is as large as the whole; a single addend stays as it is.
        assert unit.gradient_bytes == (64 if life.grads_stay else 32), f"stage {stage}"
        unit.clear_gradients()
        assert unit.gradient_bytes == 0, f"stage {stage}"


def test_sparse_gradients_are_added_up_as_dense_ones() -> None:
    params = make_params([(4, 2)])
    unit = make_unit(params, staying)
    dense = torch.tensor([[0.0, 0], [1, 2], [0, 0], [3, 4]])
    params[0].grad = dense.to_sparse()
    unit.collect()
    unit.reduce()
    assert_reduced(unit, [dense])


def test_gradients_are_added_up_in_the_dtype_for_that_and_not_in_that_of_the_wire() -> None:
    precision = Precision(torch.bfloat16, reduce=torch.bfloat16, accumulate=torch.float32)
    params = make_params([(4,)])
    unit = make_unit(params, STAGES[2], precision=precision)
    for value in (256.0, 1.0):  # their sum has no bf16
        params[0].grad = torch.full((4,), value, dtype=torch.bfloat16)
        unit.collect()
        unit.reduce()
    assert_reduced(unit, [torch.full((4,), 257.0)])


# Master weights ---------------------------------------------------------------------------------


@every_lifetime
def test_master_weights_keep_the_digits_that_the_compute_dtype_rounds_away(life: Lifetime) -> None:
    params = make_params()
    before = values(params)
    unit = make_unit(params, life, precision=BF16)
    make_full(unit)
    assert_equal([piece.detach() for piece in unit.slices], before)
    assert_equal(params, [value.bfloat16() for value in before])


@every_lifetime
@pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"])
def test_stepped_master_weights_are_what_the_next_gather_reads(
    life: Lifetime, precision: Precision
) -> None:
    params = make_params()
    unit = make_unit(params, life, precision=precision)
    with torch.no_grad():
        for piece in unit.slices:
            piece.add_(1)
        unit.publish()
    make_full(unit)
    assert_equal(params, [piece.detach().to(params[0].dtype) for piece in unit.slices])


def test_master_weights_of_the_same_dtype_take_no_memory_of_their_own() -> None:
    params = make_params()
    unit = make_unit(params, staying)
    assert unit.master_bytes == 0
    full = params[0].untyped_storage().data_ptr()
    memory = {piece.untyped_storage().data_ptr() for piece in unit.slices if piece.numel()}
    assert memory == {full}
    assert make_unit(make_params(), staying, precision=BF16).master_bytes > 0


@every_lifetime
def test_parameters_of_double_precision_stay_so_in_every_part(life: Lifetime) -> None:
    params = make_params([(3,)], dtype=torch.float64)
    before = values(params)
    unit = make_unit(params, life)
    make_full(unit)
    give(params, before)
    unit.collect()
    unit.reduce()
    unit.settle()
    unit.expose_gradients()
    assert_equal([*params, unit.slices[0], unit.slices[0].grad], [before[0]] * 3)  # type: ignore[list-item]


def test_parameters_that_are_no_floats_keep_their_dtype() -> None:
    param = nn.Parameter(torch.arange(5), requires_grad=False)
    unit = make_unit([param], freeing, precision=BF16, trained=False)
    make_full(unit)
    assert_equal([param], [torch.arange(5)])


@every_lifetime
def test_a_frozen_unit_has_nothing_to_step(life: Lifetime) -> None:
    params = make_params()
    before = values(params)
    unit = make_unit(params, life, precision=BF16, trained=False)
    assert not unit.is_trained
    assert unit.slices == ()
    assert unit.master_bytes == 0
    make_full(unit)
    assert_equal(params, [value.bfloat16() for value in before])


@every_lifetime
def test_slices_of_unsharded_parameters_keep_their_shapes(life: Lifetime) -> None:
    unit = make_unit(make_params(), life)
    assert [tuple(piece.shape) for piece in unit.slices] == SHAPES


@every_lifetime
def test_an_edit_keeps_the_digits_of_what_was_not_edited(life: Lifetime) -> None:
    params = make_params([(4, 3), (5,)])
    before = values(params)
    unit = make_unit(params, life, precision=BF16)
    make_full(unit)

    def edit(_: Tensor) -> None:
        params[0].data[1] = 0.5

    with torch.no_grad():
        unit.adopt(edit)
    want = values(before)
    want[0][1] = 0.5
    assert_equal([piece.detach() for piece in unit.slices], want)
    unit.free()
    make_full(unit)
    assert_equal(params, [value.bfloat16() for value in want])


@every_lifetime
def test_an_edit_lasts_in_shard_and_master_weights(life: Lifetime) -> None:
    params = make_params()
    unit = make_unit(params, life)
    make_full(unit)
    with torch.no_grad():
        unit.adopt(lambda full: full.fill_(7))
        unit.publish()
    unit.free()
    make_full(unit)
    assert_equal(params, [torch.full(shape, 7.0) for shape in SHAPES])
    assert_equal([piece.detach() for piece in unit.slices], params)


def test_a_freed_unit_cannot_be_edited() -> None:
    unit = make_unit(make_params(), freeing)
    with pytest.raises(AssertionError, match="edited while freed"):
        unit.adopt(lambda full: full)


# The registry -----------------------------------------------------------------------------------


def test_a_parameter_knows_its_unit_and_its_place_there() -> None:
    params = make_params()
    unit = make_unit(params, freeing)
    slots = [slot_of(param) for param in params]
    assert [slot.index for slot in slots if slot] == list(range(len(params)))
    assert {slot.unit for slot in slots if slot} == {unit}
    assert slot_of(nn.Parameter(torch.zeros(1))) is None


def test_the_registry_keeps_neither_model_nor_unit_alive() -> None:
    model = nn.Linear(2, 2)
    unit = make_unit(list(model.parameters()), freeing)
    gone = [weakref.ref(model), weakref.ref(unit), weakref.ref(model.weight)]
    del model, unit
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3


def test_a_parameter_whose_unit_is_gone_belongs_to_none() -> None:
    params = make_params()
    unit = make_unit(params, freeing)
    del unit
    gc.collect()
    assert slot_of(params[0]) is None


# Two ranks --------------------------------------------------------------------------------------


def on_two_ranks(work: Callable[..., Any], *args: Any) -> list[Any]:
    return run_ranks(partial(work, *args), 2)


def start_everywhere_alike(life: Lifetime, rank: int, world: int) -> tuple[Any, ...]:
    want = values(make_params(seed=0))
    params = make_params(seed=rank)
    ids = [id(param) for param in params]
    unit = make_unit(params, life, mesh_for(life, world))
    for _ in range(2):
        make_full(unit)
        assert_equal(params, want)
        unit.free()
        assert unit.is_full == life.params_stay
    assert [id(param) for param in params] == ids
    return tuple(piece.detach().clone() for piece in unit.slices)


@every_lifetime
def test_ranks_start_from_the_values_of_rank_0_and_own_parts_of_them(life: Lifetime) -> None:
    slices = on_two_ranks(start_everywhere_alike, life)
    want = values(make_params(seed=0))
    if life.sharded:
        slices = [
            [torch.cat([part.reshape(-1) for part in parts]).view(full.shape)]
            for *parts, full in zip(*slices, want, strict=True)
        ]
        assert_equal([part for (part,) in slices], want)
    else:
        for own in slices:
            assert_equal(own, want)


def average_over_ranks(life: Lifetime, rank: int, world: int) -> None:
    params = make_params(seed=0)
    unit = make_unit(params, life, mesh_for(life, world))
    make_full(unit)
    grads = [values(make_params(seed=10 + other)) for other in range(world)]
    # Even parameters get a gradient on rank 0 only, odd ones on rank 1 only; the last on both.
    last = len(params) - 1
    give(params, [g if i % 2 == rank or i == last else None for i, g in enumerate(grads[rank])])
    unit.collect()
    unit.free()
    unit.reduce()
    want = [grads[index % 2][index] / 2 for index in range(last)]
    want.append((grads[0][last] + grads[1][last]) / 2)
    assert_reduced(unit, want)
    # A second reduction to which only rank 1 has something to add.
    make_full(unit)
    if rank == 1:
        give(params, grads[1])
        unit.collect()
    unit.reduce()
    assert_reduced(unit, [a + b / 2 for a, b in zip(want, grads[1], strict=True)])
    unit.clear_gradients()
    # The next step starts from nothing.
    give(params, grads[rank])
    unit.collect()
    unit.reduce()
    assert_reduced(unit, [(a + b) / 2 for a, b in zip(*grads, strict=True)])


@every_lifetime
def test_gradients_are_averaged_over_ranks_and_missing_ones_count_as_zero(life: Lifetime) -> None:
    on_two_ranks(average_over_ranks, life)


def edit_on_rank_1(life: Lifetime, rank: int, world: int) -> None:
    params = make_params([(4, 3), (5,)])
    before = values(params)
    mesh = mesh_for(life, world)
    unit = make_unit(params, life, mesh, BF16)
    make_full(unit)
    with torch.no_grad():
        params[1].fill_(rank + 1)
        unit.adopt(partial(broadcast_, mesh=mesh, src=1))
    unit.free()
    want = [before[0], torch.full((5,), 2.0)]
    assert unit.master is not None
    assert torch.equal(unit.master, shard_of(unit, want))
    make_full(unit)
    assert_equal(params, [value.bfloat16() for value in want])


@every_lifetime
def test_an_edit_of_one_rank_reaches_shards_and_master_weights_of_all(life: Lifetime) -> None:
    on_two_ranks(edit_on_rank_1, life)


def hold_a_part(rank: int, world: int) -> tuple[int, ...]:
    unit = make_unit(make_params([(64, 64)]), freeing, mesh_for(freeing, world))
    freed = unit.parameter_bytes
    make_full(unit)
    return freed, unit.parameter_bytes, unit.nbytes_full


def test_a_freed_unit_costs_each_rank_its_shard() -> None:
    assert on_two_ranks(hold_a_part) == [(64 * 64 * 2, 64 * 64 * 6, 64 * 64 * 4)] * 2
