"""Master weights, optimizer state and gradients of single parameters, against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from unit.engine.small import (
    LR,
    STAGES,
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

ADAM = {"optimizer": {"type": "Adam", "params": {"lr": 0.01, "weight_decay": 0.1}}}
BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 10}}
PRECISIONS = [{}, BF16, FP16]
NAMES = ["fp32", "bf16", "fp16"]

every_precision = pytest.mark.parametrize("precision", PRECISIONS, ids=NAMES)


def named(engine: Any) -> Iterable[tuple[str, nn.Parameter]]:
    return engine.module.named_parameters()


def half_loss(engine: Any, number: int = 0) -> Tensor:
    """The loss in whatever dtype the model computes in."""
    return (engine(batch(number, dtype_of(engine))).float() - 1).square().mean()


def dtype_of(engine: Any) -> torch.dtype:
    return engine.module.head.weight.dtype


def half_train(engine: Any, steps: int = 1) -> None:
    for number in range(steps):
        engine.backward(half_loss(engine, number))
        engine.step()


def plain_adam(steps: int) -> tuple[Net, torch.optim.Adam]:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for number in range(steps):
        optimizer.zero_grad()
        loss_of(model, number).backward()
        optimizer.step()
    return model, optimizer


def everywhere_equal(value: Tensor) -> bool:
    """Whether all ranks have the same tensor."""
    others = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(others, value.contiguous())
    return all(torch.equal(value, other) for other in others)


# Reading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3])
def test_full_weights_and_state_are_those_of_plain_training(world: int) -> None:
    @on_ranks(world, STAGES)
    def check(stage: int) -> None:
        engine = make(stage, **ADAM)
        train(engine, 2)
        want, optimizer = plain_adam(2)
        for (_, param), plain in zip(named(engine), want.parameters(), strict=True):
            weight = zero.safe_get_full_fp32_param(param)
            assert everywhere_equal(weight)
            torch.testing.assert_close(weight, plain.detach(), rtol=1e-5, atol=1e-7)
            for key in ("exp_avg", "exp_avg_sq"):
                value = zero.safe_get_full_optimizer_state(param, key)
                assert value.shape == plain.shape
                assert everywhere_equal(value)
                torch.testing.assert_close(value, optimizer.state[plain][key], rtol=1e-5, atol=1e-8)
            assert zero.safe_get_full_optimizer_state(param, "step").item() == 2

    check()


@every_precision
@on_ranks(3, STAGES)
def test_full_master_weights_keep_what_the_compute_dtype_rounds_away(
    precision: dict[str, Any], stage: int
) -> None:
    engine, want = make(stage, **precision), dict(Net().named_parameters())
    got = {name: zero.safe_get_full_fp32_param(param) for name, param in named(engine)}
    assert all(torch.equal(got[name], want[name]) for name in want)


@every_precision
@pytest.mark.parametrize("steps", [1, 3])
@on_ranks(2, STAGES)
def test_a_full_gradient_is_what_the_optimizer_gets_before_clipping(
    precision: dict[str, Any], steps: int, stage: int
) -> None:
    engine = make(stage, gradient_accumulation_steps=steps, gradient_clipping=1e-3, **precision)
    for number in range(steps - 1):
        engine.backward(half_loss(engine, number))
        engine.step()
    engine.backward(half_loss(engine, steps - 1))
    got = {name: zero.safe_get_full_grad(param) for name, param in named(engine)}
    squares = torch.stack([grad.double().square().sum() for grad in got.values()])
    assert all(everywhere_equal(grad) for grad in got.values())
    assert all(grad.dtype == torch.float32 for grad in got.values())
    engine.step()
    torch.testing.assert_close(
        squares.sum().sqrt().float(), engine.get_global_grad_norm(), rtol=1e-6, atol=0
    )
    assert all(zero.safe_get_full_grad(param) is None for _, param in named(engine))
    if not precision:
        model = Net()
        for number in range(steps):
            (loss_of(model, number) / steps).backward()
        assert_equal_weights(got, {name: p.grad for name, p in model.named_parameters()})


@on_ranks(3, STAGES)
def test_between_micro_steps_a_full_gradient_is_their_share_averaged_over_ranks(
    stage: int,
) -> None:
    engine, model = make(stage, gradient_accumulation_steps=3), Net()
    assert zero.safe_get_full_grad(engine.module.head.weight) is None
    engine.backward(loss_of(engine, dist.get_rank()))
    for number in range(3):
        (loss_of(model, number) / 9).backward()
    want = {name: param.grad for name, param in model.named_parameters()}
    assert_equal_weights({n: zero.safe_get_full_grad(p) for n, p in named(engine)}, want)
    for _ in range(2):
        engine.step()
        engine.backward(loss_of(engine, dist.get_rank()))
    want = {name: 3 * grad for name, grad in want.items()}
    assert_equal_weights({n: zero.safe_get_full_grad(p) for n, p in named(engine)}, want)
    engine.step()
    plain = {n: p.detach() - LR * want[n] for n, p in Net().named_parameters()}
    assert_equal_weights(weights_of(engine), plain)


@on_ranks(2, STAGES)
def test_a_gradient_that_one_rank_alone_has_is_averaged_with_zeros(stage: int) -> None:
    class Sometimes(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(x if dist.get_rank() else self.blocks[0](x))

    engine = make(stage, Sometimes(), gradient_accumulation_steps=2)
    model = Net()
    (model.head(model.blocks[0](batch(0))) - 1).square().mean().backward()
    for _ in range(2):
        engine.backward(loss_of(engine))
        got = zero.safe_get_full_grad(engine.module.blocks[0].up.weight)
        want = model.blocks[0].up.weight.grad / 4 * (engine.micro_steps + 1)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
        engine.step()


@on_ranks(3, STAGES)
def test_local_slices_put_together_are_the_full_tensors(stage: int) -> None:
    engine = make(stage, **ADAM)
    train(engine, 1)
    engine.backward(loss_of(engine, 1))
    sharded = engine.mesh.shard.size > 1
    for _, param in named(engine):
        for local, full in (
            (zero.safe_get_local_fp32_param(param), zero.safe_get_full_fp32_param(param)),
            (zero.safe_get_local_grad(param), zero.safe_get_full_grad(param)),
            (
                zero.safe_get_local_optimizer_state(param, "exp_avg"),
                zero.safe_get_full_optimizer_state(param, "exp_avg"),
            ),
        ):
            assert local.ndim == 1
            pieces: list[Any] = [None] * 3
            dist.all_gather_object(pieces, local)
            together = torch.cat(pieces) if sharded else pieces[0]
            assert torch.equal(together, full.flatten())


@on_ranks(2, STAGES)
def test_parameters_that_nobody_trains_have_no_state(stage: int) -> None:
    model = Net()
    model.head.weight.requires_grad_(False)
    engine = make(stage, model, **ADAM)
    train(engine, 1)
    engine.backward(loss_of(engine))
    for param in (engine.module.head.weight, nn.Parameter(torch.ones(2)), torch.ones(2)):
        assert zero.safe_get_full_fp32_param(param) is None
        assert zero.safe_get_full_grad(param) is None
        assert zero.safe_get_full_optimizer_state(param, "exp_avg") is None
        assert zero.safe_get_local_fp32_param(param) is None
        assert zero.safe_get_local_grad(param) is None
        assert zero.safe_get_local_optimizer_state(param, "exp_avg") is None
        zero.safe_set_full_fp32_param(param, torch.ones(2))
        zero.safe_set_full_grad(param, torch.ones(2))
        zero.safe_set_full_optimizer_state(param, torch.ones(2), "exp_avg")


# Writing ----------------------------------------------------------------------------------------


@every_precision
@pytest.mark.parametrize("local", [False, True], ids=["full", "local"])
@on_ranks(3, STAGES)
def test_set_weights_are_in_the_next_forward_and_survive_the_next_step(
    precision: dict[str, Any], local: bool, stage: int
) -> None:
    engine = make(stage, **precision)
    want = {name: param.detach() for name, param in Net(seed=1).named_parameters()}
    for name, param in named(engine):
        if local:
            mine = zero.safe_get_local_fp32_param(param)
            zero.safe_set_full_fp32_param(param, want[name])
            part = zero.safe_get_local_fp32_param(param)
            zero.safe_set_local_fp32_param(param, mine)
            zero.safe_set_local_fp32_param(param, part)
        else:
            zero.safe_set_full_fp32_param(param, want[name])
    seen = Net(seed=1).to(dtype_of(engine))
    torch.testing.assert_close(engine(batch(0, dtype_of(engine))), seen(batch(0, dtype_of(engine))))
    engine.backward(0 * half_loss(engine))
    engine.step()
    for name, param in named(engine):
        assert torch.equal(zero.safe_get_full_fp32_param(param), want[name])
    assert_equal_weights(weights_of(engine), dict(seen.named_parameters()))


@on_ranks(2, STAGES)
def test_weights_may_be_set_between_forward_and_backward(stage: int) -> None:
    """The graph was made with other weights, so its backward is refused; training goes on."""
    engine = make(stage)
    train(engine, 1)
    loss = loss_of(engine)
    zero.safe_set_full_fp32_param(engine.module.head.weight, torch.zeros(3, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        engine.backward(loss)
    assert weights_of(engine)["head.weight"].count_nonzero() == 0
    train(engine, 1)


@on_ranks(2, STAGES)
def test_rank_0_decides_where_ranks_set_different_values(stage: int) -> None:
    engine = make(stage)
    weight = engine.module.head.weight
    zero.safe_set_full_fp32_param(weight, torch.full((3, 4), float(dist.get_rank() + 1)))
    assert weights_of(engine)["head.weight"].unique().tolist() == [1.0]


@on_ranks(2, STAGES)
def test_rank_0_decides_where_ranks_set_different_counts(stage: int) -> None:
    engine = make(stage, **ADAM)
    train(engine, 1)
    weight = engine.module.head.weight
    zero.safe_set_full_optimizer_state(weight, torch.tensor(5.0 + dist.get_rank()), "step")
    local = zero.safe_get_local_optimizer_state(weight, "step")
    assert local is None or not local.numel() or local.item() == 5


@on_ranks(2, STAGES)
def test_a_destroyed_engine_has_no_state_to_give(stage: int) -> None:
    engine = make(stage)
    engine.destroy()
    assert zero.safe_get_full_fp32_param(engine.module.head.weight) is None


@pytest.mark.parametrize("world", [1, 3])
def test_set_state_is_what_the_next_step_uses(world: int) -> None:
    @on_ranks(world, STAGES)
    def check(stage: int) -> None:
        engine = make(stage, **ADAM)
        train(engine, 1)
        model, optimizer = plain_adam(1)
        for (_, param), plain in zip(named(engine), model.parameters(), strict=True):
            value = torch.arange(plain.numel(), dtype=torch.float32).view(plain.shape) / 100
            zero.safe_set_full_optimizer_state(param, value, "exp_avg")
            zero.safe_set_full_optimizer_state(param, torch.tensor(9.0), "step")
            optimizer.state[plain]["exp_avg"].copy_(value)
            optimizer.state[plain]["step"].fill_(9)
            local = zero.safe_get_local_optimizer_state(param, "exp_avg_sq")
            zero.safe_set_local_optimizer_state(param, local * 4, "exp_avg_sq")
            optimizer.state[plain]["exp_avg_sq"].mul_(4)
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        train(engine, 1)
        got, want = weights_of(engine), dict(model.named_parameters())
        for name, weight in want.items():
            torch.testing.assert_close(got[name], weight.detach(), rtol=1e-5, atol=1e-6)

    check()


@every_precision
@pytest.mark.parametrize("local", [False, True], ids=["full", "local"])
@on_ranks(3, STAGES)
def test_a_set_gradient_is_the_one_that_the_step_uses(
    precision: dict[str, Any], local: bool, stage: int
) -> None:
    engine = make(stage, gradient_accumulation_steps=2, **precision)
    half_train(engine, 1)
    engine.backward(half_loss(engine, 1))
    want: dict[str, Tensor] = {}
    for name, param in named(engine):
        before = zero.safe_get_full_fp32_param(param)
        value = torch.linspace(-1, 1, before.numel()).view(before.shape)
        want[name] = before - LR * value
        zero.safe_set_full_grad(param, value)
        if local:
            part = zero.safe_get_local_grad(param)
            zero.safe_set_local_grad(param, part * 2)
            zero.safe_set_local_grad(param, part)
        torch.testing.assert_close(zero.safe_get_full_grad(param), value, rtol=1e-6, atol=0)
    engine.step()
    assert_equal_weights({n: zero.safe_get_full_fp32_param(p) for n, p in named(engine)}, want)


@on_ranks(2, STAGES)
def test_a_gradient_that_some_ranks_have_set_their_slice_of_is_read_by_all(stage: int) -> None:
    engine = make(stage, communication_data_type="bf16", **BF16)
    engine.backward(half_loss(engine))
    for _, param in named(engine):
        before = zero.safe_get_full_grad(param)
        if engine.global_rank == 0:
            zero.safe_set_local_grad(param, zero.safe_get_local_grad(param))
        assert torch.equal(zero.safe_get_full_grad(param), before)


@on_ranks(2, STAGES)
def test_gradients_are_updated_one_after_another_by_a_function(stage: int) -> None:
    engine = make(stage)
    engine.backward(loss_of(engine))
    seen: list[Tensor] = []

    def double(grad: Tensor, param: Tensor) -> Tensor:
        seen.append(param)
        return 2 * grad

    zero.safe_update_full_grad_vectorized(engine.module.parameters(), double)
    engine.step()
    assert [id(param) for param in seen] == [id(param) for param in engine.module.parameters()]
    model = Net()
    loss_of(model).backward()
    want = {name: p.detach() - 2 * LR * p.grad for name, p in model.named_parameters()}
    assert_equal_weights(weights_of(engine), want)


# Refusals ---------------------------------------------------------------------------------------


@on_ranks(3, STAGES)
def test_an_unknown_key_is_answered_with_the_known_ones_on_every_rank(stage: int) -> None:
    engine = make(stage, **ADAM)
    weight, bias = engine.module.head.weight, engine.module.head.bias
    for param in (weight, bias):
        assert zero.safe_get_full_optimizer_state(param, "momentum") is None
    train(engine, 1)
    asks = r"keeps no 'momentum' for head(.|\n)*it keeps exp_avg, exp_avg_sq, step"
    for param in (weight, bias):
        for call in (
            lambda param: zero.safe_get_full_optimizer_state(param, "momentum"),
            lambda param: zero.safe_set_full_optimizer_state(param, param, "momentum"),
        ):
            with pytest.raises(UsageError, match=asks):
                call(param)
    if zero.safe_get_local_fp32_param(weight).numel():
        with pytest.raises(UsageError, match=asks):
            zero.safe_get_local_optimizer_state(weight, "momentum")


@pytest.mark.parametrize(
    "call",
    [
        lambda param: zero.safe_set_full_fp32_param(param, torch.ones(4, 3)),
        lambda param: zero.safe_set_full_fp32_param(param, 1.0),  # type: ignore[arg-type]
        lambda param: zero.safe_set_full_grad(param, torch.ones(12)),
        lambda param: zero.safe_set_full_optimizer_state(param, torch.ones(1), "exp_avg"),
        lambda param: zero.safe_set_local_fp32_param(param, torch.ones(13)),
        lambda param: zero.safe_set_local_grad(param, torch.ones(13)),
    ],
)
@on_ranks(2, STAGES)
def test_a_value_of_another_shape_is_refused_on_every_rank(
    call: Callable[[Tensor], None], stage: int
) -> None:
    engine = make(stage, **ADAM)
    train(engine, 1)
    engine.backward(loss_of(engine))
    with pytest.raises(UsageError, match=r"to be set where (.|\n)*hint: pass a tensor of that"):
        call(engine.module.head.weight)


@on_ranks(2, STAGES)
def test_what_does_not_exist_yet_cannot_be_set(stage: int) -> None:
    engine = make(stage, **ADAM)
    weight = engine.module.head.weight
    with pytest.raises(UsageError, match=r"no state for head\.weight yet(.|\n)*first engine"):
        zero.safe_set_full_optimizer_state(weight, torch.ones(3, 4), "exp_avg")
    with pytest.raises(UsageError, match=r"head\.weight has no gradient(.|\n)*boundary"):
        zero.safe_set_full_grad(weight, torch.ones(3, 4))
