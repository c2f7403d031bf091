"""Full parameters outside of forward: who may enter, whose edits last, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from unit.engine.small import (
    LR,
    STAGES,
    InjectedError,
    Net,
    assert_equal_weights,
    batch,
    loss_of,
    make,
    on_ranks,
    train,
    weights_of,
)
from zeroshard import UsageError, zero
from zeroshard.zero import GatheredParameters

BF16 = {"bf16": {"enabled": True}}


def fill(param: Tensor, value: float) -> None:
    with torch.no_grad():
        param.fill_(value)


def nothing_is_full(engine: Any) -> bool:
    return not any(u.is_full and not u.lifetime.params_stay for u in engine.runtime.units)


def step_with(engine: Any, scale: float) -> None:
    """A step so small that it shows whether the master weights were edited, too."""
    dtype = engine.module.head.weight.dtype
    engine.backward(scale * (engine(batch(0, dtype)).float() - 1).square().mean())
    engine.step()


# What may be gathered ---------------------------------------------------------------------------


@on_ranks(2, STAGES)
def test_whatever_holds_parameters_can_be_gathered(stage: int) -> None:
    engine, want = make(stage), dict(Net().named_parameters())
    model = engine.module
    plain = nn.Parameter(torch.ones(2))

    def generator() -> Iterator[Tensor]:
        yield from model.parameters()

    for params in (
        model,
        generator(),
        list(model.parameters()),
        dict(model.named_parameters()),
        [[model.blocks, None], (plain, [torch.ones(1)]), {model.head}],
        [*model.parameters(), *model.parameters()],
    ):
        with GatheredParameters(params):
            assert_equal_weights(dict(model.named_parameters()), want)
        assert nothing_is_full(engine)
    with GatheredParameters(model.head.weight):
        assert torch.equal(model.head.weight, want["head.weight"])
    for params in ([], [None], None, plain, [plain, None], nn.Linear(2, 2)):
        with GatheredParameters(params, modifier_rank=0):
            assert nothing_is_full(engine)
    with GatheredParameters(model, enabled=False):
        assert nothing_is_full(engine)


def test_what_holds_no_parameters_is_refused_by_its_type() -> None:
    with pytest.raises(UsageError, match=r"given as a str\.(.|\n)*hint: pass a module"):
        GatheredParameters("head.weight")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"given as a int\."):
        GatheredParameters([3])


@on_ranks(2, STAGES)
def test_one_object_may_be_entered_again_and_inside_itself(stage: int) -> None:
    engine = make(stage)
    full = GatheredParameters(engine.module)
    for _ in range(2):
        with full:
            with full:
                pass
            assert engine.module.head.weight.shape == (3, 4)
        assert nothing_is_full(engine)


@on_ranks(2, STAGES)
def test_a_forward_module_gathers_the_parameters_from_then_on(stage: int) -> None:
    class Reader(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.blocks[0].up.weight.sum()

    engine = make(stage, Reader())
    with GatheredParameters(engine.module.blocks[0].up.weight, fwd_module=engine.module):
        pass
    train(engine)


# Nesting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("modifier_rank", [None, 0, 1])
@on_ranks(3, STAGES)
def test_what_is_held_already_may_be_gathered_again_on_some_ranks(
    modifier_rank: int | None, stage: int
) -> None:
    engine = make(stage)
    model = engine.module
    with GatheredParameters(model, modifier_rank=modifier_rank):
        if dist.get_rank() == 1:
            with GatheredParameters([model.head.weight, model.blocks[0].up.bias], modifier_rank):
                assert model.head.weight.shape == (3, 4)
            assert model.head.weight.shape == (3, 4)
    assert nothing_is_full(engine)
    train(engine)


@pytest.mark.parametrize("precision", [{}, BF16], ids=["fp32", "bf16"])
@on_ranks(2, STAGES)
def test_weights_loaded_on_one_rank_in_a_nested_gather_last(
    precision: dict[str, Any], stage: int
) -> None:
    engine, other = make(stage, **precision), Net(seed=1)
    model = engine.module
    with GatheredParameters(model.parameters(), modifier_rank=0):
        if dist.get_rank() == 0:
            with GatheredParameters(list(model.blocks.parameters()), modifier_rank=0):
                model.load_state_dict(other.state_dict())
    want = {name: p.detach().to(model.head.weight.dtype) for name, p in other.named_parameters()}
    assert_equal_weights(weights_of(engine), want)
    step_with(engine, 0.0)
    assert_equal_weights(weights_of(engine), want)


@on_ranks(2, STAGES)
def test_data_that_replace_a_parameters_own_are_kept_like_an_edit(stage: int) -> None:
    engine = make(stage, **BF16)
    weight = engine.module.head.weight
    with GatheredParameters(weight, modifier_rank=1):
        weight.data = torch.full_like(weight.data, dist.get_rank() + 2.0)
    with GatheredParameters(weight):
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, torch.full_like(weight, 3))
    step_with(engine, 0)
    with GatheredParameters(weight):
        assert torch.equal(weight, torch.full_like(weight, 3))


@on_ranks(2, STAGES)
def test_data_of_another_shape_are_refused_and_the_parameter_stays(stage: int) -> None:
    engine = make(stage)
    weight, before = engine.module.head.weight, Net().head.weight
    with (
        pytest.raises(
            UsageError, match=r"head.weight: its data was replaced while it was gathered"
        ),
        GatheredParameters(weight, modifier_rank=0),
    ):
        weight.data = torch.ones(2)
    with GatheredParameters(weight):
        assert torch.equal(weight, before)


@on_ranks(3, STAGES)
def test_an_inner_modifier_inside_a_reading_one_keeps_its_edits(stage: int) -> None:
    engine = make(stage)
    head = engine.module.head
    with GatheredParameters(engine.module):
        with GatheredParameters(head.weight, modifier_rank=2):
            fill(head.weight, float(dist.get_rank()))
        assert torch.equal(head.weight, torch.full((3, 4), 2.0))
    step_with(engine, 0.0)
    assert torch.equal(weights_of(engine)["head.weight"], torch.full((3, 4), 2.0))


@on_ranks(2, STAGES)
def test_edits_between_and_after_nested_modifiers_are_kept_too(stage: int) -> None:
    engine = make(stage)
    head = engine.module.head
    with GatheredParameters(engine.module, modifier_rank=1):
        fill(head.weight, 1.0)
        with GatheredParameters(head.bias, modifier_rank=1):
            fill(head.bias, 2.0)
        with GatheredParameters(head.bias):
            fill(engine.module.blocks[0].up.bias, 3.0)
        fill(engine.module.blocks[1].up.bias, 4.0)
    got = weights_of(engine)
    for name, value in (("head.weight", 1), ("head.bias", 2), ("blocks.0.up.bias", 3)):
        assert got[name].unique().tolist() == [value]
    assert got["blocks.1.up.bias"].unique().tolist() == [4]


@on_ranks(2, STAGES)
def test_an_inner_modifier_that_names_another_rank_is_refused(stage: int) -> None:
    engine = make(stage)
    asks = r"modifier_rank=1 inside of another that names rank 0(.|\n)*hint: name the same rank"
    with (
        pytest.raises(UsageError, match=asks),
        GatheredParameters(engine.module, modifier_rank=0),
        GatheredParameters(engine.module.head, modifier_rank=1),
    ):
        raise AssertionError("entered")
    assert nothing_is_full(engine)
    with GatheredParameters(engine.module, modifier_rank=1):
        pass


# Edits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [{}, BF16], ids=["fp32", "bf16"])
@on_ranks(3, STAGES)
def test_an_edit_reaches_the_master_weights(precision: dict[str, Any], stage: int) -> None:
    engine = make(stage, **precision)
    head = engine.module.head
    with GatheredParameters(head.weight, modifier_rank=1):
        fill(head.weight, 0.5 if dist.get_rank() == 1 else 7.0)
    step_with(engine, 0.0)
    assert weights_of(engine)["head.weight"].unique().tolist() == [0.5]
    full = zero.safe_get_full_fp32_param(head.weight)
    assert full is not None
    assert full.unique().tolist() == [0.5]


@pytest.mark.parametrize("rank", [2, -1, 1.5, "0"])
@on_ranks(2, STAGES)
def test_a_modifier_rank_that_does_not_exist_is_refused_on_every_rank(
    rank: Any, stage: int
) -> None:
    engine = make(stage)
    with (
        pytest.raises(UsageError, match=r"modifier_rank is .*, but the ranks .* are 0 to 1\."),
        GatheredParameters(engine.module, modifier_rank=rank),
    ):
        raise AssertionError("entered")
    train(engine)


@on_ranks(2, STAGES)
def test_an_edit_that_nobody_keeps_is_an_error(stage: int) -> None:
    engine = make(stage)
    head = engine.module.head
    asks = r"head\.bias was edited inside gathered(.|\n)*hint: pass modifier_rank=RANK"
    with pytest.raises(UsageError, match=asks), GatheredParameters(engine.module):
        fill(head.bias, 1.0)
    with pytest.raises(UsageError, match="was edited inside"):  # noqa: SIM117
        with GatheredParameters(engine.module):
            with GatheredParameters(engine.module.blocks[0]):
                engine.module.load_state_dict(Net(seed=1).state_dict())
    assert nothing_is_full(engine)
    with pytest.raises(InjectedError), GatheredParameters(engine.module):
        fill(head.bias, 1.0)
        raise InjectedError


@on_ranks(2, STAGES)
def test_an_exception_on_one_rank_leaves_the_ranks_in_step(stage: int) -> None:
    engine = make(stage)
    head = engine.module.head

    def edit() -> None:
        with GatheredParameters(engine.module, modifier_rank=0):
            fill(head.weight, 2.0)
            if dist.get_rank() == 0:
                raise InjectedError

    if dist.get_rank() == 0:
        with pytest.raises(InjectedError):
            edit()
    else:
        edit()
    assert nothing_is_full(engine)
    assert weights_of(engine)["head.weight"].unique().tolist() == [2.0]
    train(engine)


@on_ranks(2, STAGES)
def test_gradients_flow_into_parameters_gathered_inside_a_forward(stage: int) -> None:
    class Fused(Net):
        """Reads a block's weight for a while, as losses fused with an output projection do."""

        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            with GatheredParameters(self.blocks[0].up.weight):
                return x + self.blocks[0].up.weight.square().sum()

    engine, want = make(stage, Fused()), Fused()
    for number in range(2):
        engine.backward(loss_of(engine, number))
        engine.step()
        assert nothing_is_full(engine)
        want.zero_grad()
        loss_of(want, number).backward()
        with torch.no_grad():
            for param in want.parameters():
                param -= LR * param.grad
    assert_equal_weights(weights_of(engine), dict(want.named_parameters()))


@on_ranks(2, STAGES)
def test_each_rank_may_run_an_unwrapped_model_as_often_as_it_likes(stage: int) -> None:
    engine, other = make(stage), make(stage)
    train(engine, 1)
    train(other, 1)
    want = weights_of(engine)
    for model in (engine, engine.module):
        with zero.unwrap_model_for_generation(model) as plain:
            assert plain is engine.module
            for _ in range(1 + 2 * dist.get_rank()):
                assert not plain(batch(0)).requires_grad
            assert_equal_weights(dict(plain.named_parameters()), want)
        assert nothing_is_full(engine)
    with pytest.raises(InjectedError), zero.unwrap_model_for_generation(engine):
        raise InjectedError
    for number in (1, 2):
        for each in (engine, other):
            each.backward(loss_of(each, number))
            each.step()
    assert_equal_weights(weights_of(engine), weights_of(other))
