"""Adam over whole shards: the numbers of torch's own, its state, and when torch's own steps."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from forked import run_ranks
from unit.engine.small import batch, make, on_ranks
from unit.optim.test_sharded import alone, give, make_grads, make_params, make_units, mesh_for, read
from zeroshard import zero
from zeroshard.core.unit import Precision, Unit
from zeroshard.optim.adam import Rule, Shards, update_
from zeroshard.optim.scaler import LossScaler, ScalePolicy
from zeroshard.optim.sharded import Kernels, ShardedOptimizer, StepPolicy

BF16 = Precision(torch.bfloat16, reduce=torch.bfloat16)
LOG = "zeroshard.optim.fused"
# What both ways compute in fp32, some in another order of operations.
ROUNDING = {"rtol": 2e-6, "atol": 2e-7}


def make_groups(params: Sequence[nn.Parameter], *, vectors_decay: bool) -> list[dict[str, Any]]:
    """Matrices decay; vectors lie between them, so that a shard holds several runs."""
    rest = {} if vectors_decay else {"weight_decay": 0.0, "lr": 0.05}
    return [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in params if p.dim() < 2], **rest},
    ]


def make_sharded(
    kernels: Kernels,
    kind: type[torch.optim.Optimizer] = torch.optim.AdamW,
    *,
    clip: float = 0.5,
    stage: int = 1,
    world: int = 1,
    precision: Precision | None = None,
    scaler: LossScaler | None = None,
    **options: Any,
) -> tuple[ShardedOptimizer, list[Unit]]:
    params = make_params()
    inner = kind(make_groups(params, vectors_decay=False), lr=0.1, **options)
    mesh = mesh_for(stage, world) if world > 1 else alone()
    units = make_units(params, stage, mesh, precision)
    policy = StepPolicy(clip=clip, skip_on_overflow=scaler is not None, kernels=kernels)
    return ShardedOptimizer(inner, units, mesh, policy=policy, scaler=scaler), units


def step(sharded: ShardedOptimizer, units: Sequence[Unit], number: int, rank: int = 0) -> bool:
    give(units, make_grads(number, rank))
    return sharded.step(divide_by=2)


def state_of(sharded: ShardedOptimizer, units: Sequence[Unit]) -> list[dict[str, Tensor]]:
    pieces = [piece for unit in units for piece in unit.slices if piece.numel()]
    return [dict(sharded.inner.state[piece]) for piece in pieces]


def assert_same(
    one: tuple[ShardedOptimizer, list[Unit]], other: tuple[ShardedOptimizer, list[Unit]]
) -> None:
    """Master weights and state agree up to rounding, and what gathers read is the master's cast."""
    for ours, theirs in zip(one[1], other[1], strict=True):
        assert ours.master is not None
        assert theirs.master is not None
        torch.testing.assert_close(ours.master, theirs.master, **ROUNDING)
        kept = ours.shard_to_write()
        assert kept is None or torch.equal(kept, ours.master.to(kept.dtype))
    for ours, theirs in zip(state_of(*one), state_of(*other), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key].shape == value.shape
            torch.testing.assert_close(ours[key], value, **ROUNDING)


# The numbers ------------------------------------------------------------------------------------


def test_shards_are_stepped_as_torch_steps_slices_of_every_stage_dtype_and_formula() -> None:
    def work(rank: int, world: int) -> None:
        kinds = (torch.optim.Adam, torch.optim.AdamW)
        for kind, stage, precision in itertools.product(kinds, (0, 1, 3), (None, BF16)):
            for clip, fused in ((0.0, False), (0.5, True)):
                fused_one, torch_one = (
                    make_sharded(
                        kernels,
                        kind,
                        clip=clip,
                        stage=stage,
                        world=world,
                        precision=precision,
                        fused=fused,
                    )
                    for kernels in ("fused", "torch")
                )
                for number in range(3):
                    for each in (fused_one, torch_one):
                        step(*each, number, rank)
                assert_same(fused_one, torch_one)

    run_ranks(work, 2)


def test_a_step_over_shards_is_made_in_runs_and_not_by_slices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths: list[int] = []

    def counted(shards: Shards, rule: Rule, factor: Tensor, found_inf: Tensor | None) -> None:
        lengths.append(shards.master.numel())
        update_(shards, rule, factor, found_inf)

    monkeypatch.setattr("zeroshard.optim.adam.update_", counted)
    sharded, units = make_sharded("fused")
    step(sharded, units, 0)
    assert lengths == [1, 15, 7, 5]  # vector, matrix and vector; two vectors in one


def test_a_single_micro_step_keeps_its_gradient_in_the_dtype_it_was_reduced_in() -> None:
    sharded, units = make_sharded("fused", precision=BF16, stage=2)
    give(units, make_grads(0))
    for unit in units:
        unit.settle()
    assert {unit.grad_shard.dtype for unit in units if unit.grad_shard is not None} == {
        torch.bfloat16
    }
    give(units, make_grads(1))
    for unit in units:
        unit.settle()
    assert {unit.grad_shard.dtype for unit in units if unit.grad_shard is not None} == {
        torch.float32
    }
    assert sharded.step(divide_by=1)


# Skipped steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("kernels", ["fused", "torch"])
def test_a_step_that_overflows_changes_nothing_and_is_not_counted(
    kernels: Kernels, fused: bool
) -> None:
    def make() -> tuple[ShardedOptimizer, list[Unit]]:
        scaler = LossScaler(ScalePolicy(initial=8.0, hysteresis=1))
        return make_sharded(kernels, precision=BF16, scaler=scaler, fused=fused)

    (sharded, units), other = make(), make()
    for number in range(2):
        step(sharded, units, number)
        step(*other, number)
    before = copy.deepcopy(state_of(sharded, units))
    weights = read(units)
    grads = make_grads(5)
    grads[1][0, 0] = torch.inf
    give(units, grads)
    assert not sharded.step(divide_by=2)
    assert sharded.overflow
    assert sharded.scaler is not None
    assert sharded.scaler.scale == 4.0
    assert all(torch.equal(a, b) for a, b in zip(weights, read(units), strict=True))
    for then, now in zip(before, state_of(sharded, units), strict=True):
        assert all(torch.equal(then[key], now[key]) for key in then)
    assert other[0].scaler is not None
    other[0].scaler.scale = 4.0
    for each in ((sharded, units), other):
        assert step(*each, 7)
    assert_same((sharded, units), other)
    assert state_of(sharded, units)[0]["step"] == 3


def test_a_first_step_of_sgd_that_overflows_leaves_its_momentum_undone() -> None:
    scaler = LossScaler(ScalePolicy(initial=1.0, hysteresis=2))
    both = [
        make_sharded("auto", torch.optim.SGD, momentum=0.9, fused=True, scaler=scaler)
        for _ in range(2)
    ]
    give(both[0][1], [grad * torch.inf for grad in make_grads(0)])
    assert not both[0][0].step(divide_by=2)
    for each in both:
        step(*each, 1)
    assert_same(both[0], both[1])


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_clipping_inside_torchs_fused_kernels_is_clipping_before_them(kind: str) -> None:
    if kind == "Adagrad":
        options: dict[str, Any] = {}
    else:
        options = {"momentum": 0.9} if kind == "SGD" else {"eps": 1e-3}
    cls = getattr(torch.optim, kind)
    inside, before = (make_sharded("torch", cls, fused=fused, **options) for fused in (True, False))
    for number in range(3):
        step(*inside, number)
        step(*before, number)
    assert not hasattr(inside[0].inner, "grad_scale")
    assert_same(inside, before)


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_ranks_with_hooks_and_without_step_replicas_alike_to_the_bit(
    kind: type[torch.optim.Optimizer], clip: float
) -> None:
    both = [make_sharded("torch", kind, clip=clip, fused=True) for _ in range(2)]
    both[0][0].inner.register_step_pre_hook(lambda *_: None)
    for number in range(3):
        for sharded, units in both:
            give(units, make_grads(number))
            sharded.step(divide_by=3)
    for one, other in zip(read(both[0][1]), read(both[1][1]), strict=True):
        assert torch.equal(one, other)


def test_a_hook_on_some_of_the_replicas_lets_all_of_them_be_stepped_by_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A kernel that rounds in its own way must not step replicas of what torch steps."""
    steps: list[int] = []

    def otherwise(shards: Shards, rule: Rule, factor: Tensor, found_inf: Tensor | None) -> None:
        update_(shards, rule, factor, found_inf)
        shards.master.mul_(1 + 1e-6)
        steps.append(rule.step)

    monkeypatch.setattr("zeroshard.optim.sharded.triton_update", lambda device: otherwise)

    def work(rank: int, world: int) -> tuple[set[int], list[Tensor]]:
        sharded, units = make_sharded("auto", stage=0, world=world)
        step(sharded, units, 0)
        if rank == 1:
            hook = sharded.inner.register_step_pre_hook(lambda *_: None)
        step(sharded, units, 1)
        if rank == 1:
            hook.remove()
        step(sharded, units, 2)
        return set(steps), read(units)

    (made, weights), (others_made, others_weights) = run_ranks(work, 2)
    assert made == others_made == {1, 3}
    assert all(torch.equal(a, b) for a, b in zip(weights, others_weights, strict=True))


@pytest.mark.parametrize("kernels", ["fused", "torch"])
def test_scalars_for_kernels_are_fp32_whatever_dtype_new_tensors_have(kernels: Kernels) -> None:
    scaler = LossScaler(ScalePolicy(initial=3.0))
    changed, usual = (
        make_sharded(kernels, clip=0.0, scaler=copy.copy(scaler), fused=True) for _ in range(2)
    )
    step(*usual, 0)
    grads = make_grads(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        give(changed[1], grads)
        changed[0].step(divide_by=2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(changed, usual)


class Operations(TorchDispatchMode):
    """Notes what is computed inside, by name; reading a number is ``_local_scalar_dense``."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@on_ranks(2, (1, 3))
def test_the_host_reads_the_norm_after_the_update_in_fp16_and_a_step_later_in_bf16(
    stage: int,
) -> None:
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    for kernels, (precision, dtype) in itertools.product(("fused", "torch"), dtypes.items()):
        engine = make(
            stage,
            gradient_clipping=1.0,
            optimizer={"type": "AdamW", "params": {"lr": 0.01}},
            zeroshard={"optimizer_step": kernels},
            **({} if precision == "fp32" else {precision: {"enabled": True}}),
        )
        operations = Operations()
        for number in range(4):
            engine.backward((engine(batch(number, dtype)).float() - 1).square().mean())
            with operations:
                operations.names.clear()
                engine.step()
        names = operations.names
        reads = [index for index, name in enumerate(names) if name == "_local_scalar_dense"]
        norm, update = names.index("linalg_vector_norm"), names.index("_fused_adamw_")
        assert len(reads) == (precision != "fp32"), (kernels, precision, names)
        if precision == "bf16":
            assert reads[0] < norm, (kernels, names)  # it is the norm of the step before
        if precision == "fp16":
            assert reads[0] > update, (kernels, names)


def test_what_became_of_a_step_is_known_to_whoever_asks_and_counted_by_all() -> None:
    def run(*askers: str, is_watched: bool = False) -> tuple[list[Any], float]:
        made = []
        engine = make(
            2,
            optimizer={"type": "AdamW", "params": {"lr": 0.01}},
            zeroshard={"optimizer_step": "fused"},
            bf16={"enabled": True},
        )
        if is_watched:  # which makes the host wait before it steps
            engine.optimizer.register_step_pre_hook(lambda *_: None)
        for number in range(4):
            scale = torch.inf if number in (1, 3) else 1.0
            loss = (engine(batch(number, torch.bfloat16)).float() - 1).square().mean()
            engine.backward(loss * scale)
            engine.step()
            if "applied" in askers:
                made.append(engine.was_step_applied())
            if "overflow" in askers:
                made.append(engine.optimizer.overflow)
            if "skipped" in askers:
                made.append(engine.skipped_steps)
        state = next(iter(engine.optimizer.state.values()))
        return [*made, engine.skipped_steps, engine.was_step_applied()], float(state["step"])

    def work(rank: int, world: int) -> None:
        assert run() == ([2, False], 2)
        assert run("applied") == ([True, False, True, False, 2, False], 2)
        assert run("overflow") == ([False, True, False, True, 2, False], 2)
        assert run("skipped") == ([0, 1, 1, 2, 2, False], 2)
        assert run(is_watched=rank == 0) == ([2, False], 2)

    run_ranks(work, 2)


# State ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_state_that_somebody_replaces_or_edits_is_gone_on_with(fused: bool) -> None:
    shard_wise, slice_wise = (make_sharded(k, fused=fused) for k in ("fused", "torch"))
    for each in (shard_wise, slice_wise):
        sharded, units = each
        step(*each, 0)
        saved = copy.deepcopy(sharded.inner.state_dict())
        step(*each, 1)
        sharded.inner.load_state_dict(saved)
        step(*each, 2)
        for unit in units:
            for piece in unit.slices:
                if piece.numel():
                    sharded.inner.state[piece]["exp_avg"].mul_(0.5)
                    sharded.inner.state[piece]["step"].add_(3)
                    own = sharded.inner.state[piece]["exp_avg_sq"]
                    sharded.inner.state[piece]["exp_avg_sq"] = own * 2
        step(*each, 3)
        sharded.inner.state.clear()
        step(*each, 4)
    assert_same(shard_wise, slice_wise)
    assert state_of(*shard_wise)[0]["step"] == 1


def test_slices_that_have_made_different_numbers_of_steps_are_torchs_to_step() -> None:
    shard_wise, slice_wise = (make_sharded(k) for k in ("fused", "torch"))
    for each in (shard_wise, slice_wise):
        step(*each, 0)
        piece = each[1][0].slices[0]
        each[0].inner.state[piece]["step"].add_(5)
        for number in range(1, 3):
            step(*each, number)
    assert_same(shard_wise, slice_wise)


@on_ranks(2, (1, 3))
def test_training_goes_on_from_a_checkpoint_and_from_the_host_as_if_nothing_had_been(
    tmp_path: Path, stage: int
) -> None:
    config = {
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}},
    }

    def run(engine: Any, numbers: range) -> None:
        for number in numbers:
            half = batch(number, torch.bfloat16)
            engine.backward((engine(half).float() - 1).square().mean())
            engine.step()

    def make_one(kernels: Kernels, gather: str = "nccl") -> Any:
        return make(stage, **config, zeroshard={"optimizer_step": kernels, "gather": gather})

    straight, resumed, other = (
        make_one("fused", "copy_engine"),
        make_one("fused"),
        make_one("torch"),
    )
    run(straight, range(4))
    run(resumed, range(2))
    flat = next(iter(resumed.optimizer.state.values()))["exp_avg"].untyped_storage()
    resumed.offload_states()
    assert torch._C._storage_Use_Count(flat._cdata) == 1  # its memory is this test's alone
    resumed.reload_states()
    folder = tmp_path / str(stage)
    resumed.save_checkpoint(folder)
    run(resumed, range(7, 9))
    flat = next(iter(resumed.optimizer.state.values()))["exp_avg"].untyped_storage()
    for engine in (resumed, other):
        engine.load_checkpoint(folder)
        assert torch._C._storage_Use_Count(flat._cdata) == 1  # what was before is let go of
        run(engine, range(2, 4))
    trained = (list(engine.module.parameters()) for engine in (straight, resumed, other))
    for one, two, three in zip(*trained, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            ours, same, theirs = (
                zero.safe_get_full_optimizer_state(param, key) for param in (one, two, three)
            )
            assert torch.equal(ours, same)
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4)
        ours, same, theirs = (zero.safe_get_full_fp32_param(param) for param in (one, two, three))
        assert torch.equal(ours, same)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    state = next(iter(straight.optimizer.state.values()))
    assert state["exp_avg"].untyped_storage().nbytes() > state["exp_avg"].nbytes  # is flat


# Who steps --------------------------------------------------------------------------------------


def test_a_hook_sees_the_gradients_of_slices_as_torch_shows_them() -> None:
    shard_wise, slice_wise = (make_sharded(k, fused=True) for k in ("fused", "torch"))
    seen: list[list[Tensor]] = []

    def look(inner: torch.optim.Optimizer, *_: object) -> None:
        pieces = [p for group in inner.param_groups for p in group["params"]]
        seen.append([p.grad.clone() for p in pieces if p.grad is not None])

    for each in (shard_wise, slice_wise):
        step(*each, 0)
        handle = each[0].inner.register_step_pre_hook(look)
        step(*each, 1)
        handle.remove()
        step(*each, 2)
    assert len(seen) == 2 and len(seen[0]) == 5
    for one, two in zip(*seen, strict=True):
        torch.testing.assert_close(one, two, **ROUNDING)
    assert_same(shard_wise, slice_wise)


def test_a_schedule_finds_that_the_optimizer_was_stepped_and_moves_its_rate() -> None:
    both = [make_sharded(k) for k in ("fused", "torch")]
    for sharded, units in both:
        schedule = torch.optim.lr_scheduler.StepLR(sharded.inner, step_size=1, gamma=0.5)
        for number in range(3):
            step(sharded, units, number)
            schedule.step()  # warns, which is an error here, where no step was seen
    assert_same(both[0], both[1])


def test_a_wrapper_around_the_step_is_called_with_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sharded, units = make_sharded("fused")
    inner, seen = sharded.inner, []

    def wrapper() -> Any:
        seen.append(units[0].slices[0].grad is not None)
        return type(inner).step(inner)

    monkeypatch.setattr(inner, "step", wrapper)
    step(sharded, units, 0)
    assert seen == [True]


class MyAdam(torch.optim.Adam):
    """A subclass may do anything."""


class Descent(torch.optim.Optimizer):
    """Has none of the usual hyper-parameters."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"size": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(param.grad, alpha=group["size"])


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        (torch.optim.SGD, {"momentum": 0.9}, "is not torch's Adam or AdamW"),
        (MyAdam, {}, "is not torch's Adam or AdamW"),
        (Descent, {}, "is not torch's Adam or AdamW"),
        (torch.optim.AdamW, {"amsgrad": True}, "amsgrad"),
        (torch.optim.Adam, {"maximize": True}, "maximize"),
    ],
)
def test_what_is_not_plain_adam_is_stepped_by_torch_which_is_said_once(
    kind: type[torch.optim.Optimizer],
    options: dict[str, Any],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, LOG)
    both = [make_sharded(k, kind, **options) for k in ("fused", "torch")]
    for number in range(2):
        for each in both:
            step(*each, number)
    (message,) = (record.getMessage() for record in caplog.records if record.name == LOG)
    assert reason in message
    assert_same(both[0], both[1])


def test_the_default_leaves_the_step_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zeroshard.optim.adam.update_", lambda *_: 1 / 0)
    sharded, units = make_sharded("auto")
    assert step(sharded, units, 0)


# The Triton kernel ------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.timeout(300)
def test_the_triton_kernel_computes_in_its_interpreter_what_torch_computes() -> None:
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    script = Path(__file__).parents[2] / "gpu" / "adam_checks.py"
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(script), "--toy"], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_rule_corrects_the_bias_of_its_step() -> None:
    rule = Rule(0.5, 0.9, 0.99, 1e-8, 0.0, True, 1)
    assert rule.step_size == pytest.approx(5.0)
    assert rule.root2 == pytest.approx(0.1)
    assert replace(rule, step=10**6).step_size == pytest.approx(0.5)
