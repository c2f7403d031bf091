"""Checks that need real GPUs; started on every rank by the launcher, one JSON object per check.

    zeroshard --num_gpus 2 tests/gpu/checks.py [--toy]

Runs on CPU ranks too, at toy size, where the figures that only a GPU has are left out.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
import torch._dynamo.utils
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _get_default_store
from torch.utils.checkpoint import checkpoint

import zeroshard
from zeroshard.core.layout import Layout
from zeroshard.core.lifetime import state_bytes
from zeroshard.core.mesh import build_mesh
from zeroshard.core.pulled import StreamCopies
from zeroshard.core.reductions import PulledReduction, Ring, map_slots, reduce_by_pulls
from zeroshard.core.slots import full_nbytes
from zeroshard.zero import state

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))
from llama import Llama, LlamaConfig

from side_by_side.engines import bytes_beside, off_device
from side_by_side.profiles import Activity, computes, hidden, kind_of, length, profiled, summarize

STAGES = (0, 1, 2, 3)
# Beside a small eps, the rounding of a gradient near zero would be a part of a whole step.
ADAM = {"lr": 1e-3, "eps": 1e-3}
SMALL = LlamaConfig(512, 64, 6, 4, 2, 128, 384)
TOY = LlamaConfig(64, 16, 2, 2, 1, 16, 32)
LARGE = LlamaConfig(8192, 1024, 12, 16, 8, 2048, 8192, tied_head=False)
BUDGETED = LlamaConfig(32768, 2048, 16, 16, 8, 2048, 5632, tied_head=False)
# Pinning host memory for a larger one takes most of the time of the check.
MEDIUM = LlamaConfig(8192, 512, 4, 8, 4, 1024, 4096, tied_head=False)


class Routed(nn.Module):
    """Blocks of which each rank runs others, in another order, some twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
            for _ in range(5)
        )

    def forward(self, x: Tensor, route: list[int]) -> Tensor:
        h = self.embedding(x)
        for index in route:
            h = h + self.blocks[index](h)
        return F.linear(h, self.embedding.weight)


class Recomputed(Llama):
    """Runs its blocks again in backward, in one of the two ways or not at all."""

    reentrant: bool | None = None

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        h = self.embedding(tokens)
        for block in self.blocks:
            if self.reentrant is None:
                h = block(h, cos, sin)
            else:
                h = checkpoint(block, h, cos, sin, use_reentrant=self.reentrant)
        return self.head(self.norm(h))


def route_of(step: int, rank: int) -> list[int]:
    generator = torch.Generator().manual_seed(97 * step + rank)
    order = torch.randperm(5, generator=generator).tolist()
    return [*order[: 2 + (step + rank) % 4], order[0]]


class Context:
    """This rank's place and sizes."""

    def __init__(self, toy: bool) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if self.on_gpu else "cpu"
        self.config = TOY if toy else SMALL
        self.medium = SMALL if toy else MEDIUM
        self.large = SMALL if toy else LARGE

    def tokens(self, step: int, micro: int, rank: int, config: LlamaConfig | None = None) -> Tensor:
        config = config or self.config
        generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
        x = torch.randint(0, config.vocab_size, (2, config.context), generator=generator)
        return x.to(self.device)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build()


def loss_of(logits: Tensor, x: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), x.flatten())


def make_engine(
    model: nn.Module, stage: int, *, fused: bool = False, **config: Any
) -> zeroshard.Engine:
    engine, _, _, _ = zeroshard.initialize(
        model=model,
        optimizer=lambda params: torch.optim.AdamW(params, fused=fused or None, **ADAM),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": stage},
            **config,
        },
    )
    return engine


def full_weights(engine: zeroshard.Engine) -> dict[str, Tensor]:
    with zeroshard.gathered(engine.module):
        return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    return max(((got[k] - want[k]).norm() / want[k].norm()).item() for k in want)


def reference(
    model: nn.Module, ctx: Context, call: Callable[..., Tensor], steps: int, micros: int
) -> dict[str, Tensor]:
    """Weights of plain PyTorch trained on the batches of all ranks."""
    model.to(ctx.device)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(micros):
            for rank in range(ctx.world):
                (call(model, step, micro, rank) / ctx.world / micros).backward()
        for param in model.parameters():
            param.grad = torch.zeros_like(param) if param.grad is None else param.grad
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def parity(
    ctx: Context,
    build: Callable[[], nn.Module],
    call: Callable[..., Tensor],
    stages: Sequence[int] = STAGES,
    **config: Any,
) -> dict[str, Any]:
    steps, micros = 4, 2
    want = reference(seeded(build), ctx, call, steps, micros)
    difference: dict[str, float] = {}
    for stage in stages:
        engine = make_engine(seeded(build), stage, gradient_accumulation_steps=micros, **config)
        for step in range(steps):
            for micro in range(micros):
                engine.backward(call(engine, step, micro, ctx.rank))
                engine.step()
        difference[str(stage)] = worst(full_weights(engine), want)
        engine.destroy()
    return {"difference": difference, "ok": max(difference.values()) <= 1e-6}


def check_parity(ctx: Context) -> dict[str, Any]:
    """fp32 weights after 4 steps of 2 micro-steps equal plain PyTorch's on the global batch."""

    def call(model: Callable[..., Tensor], step: int, micro: int, rank: int) -> Tensor:
        x = ctx.tokens(step, micro, rank)
        return loss_of(model(x), x)

    return parity(ctx, lambda: Llama(ctx.config), call)


def check_routed(ctx: Context) -> dict[str, Any]:
    """The same where every rank runs other blocks in another order."""
    return parity(ctx, Routed, routed_call(ctx))


def routed_call(ctx: Context) -> Callable[..., Tensor]:
    def call(model: Callable[..., Tensor], step: int, micro: int, rank: int) -> Tensor:
        x = ctx.tokens(step, micro, rank) % 64
        return loss_of(model(x, route_of(2 * step + micro, rank)), x)

    return call


def train(ctx: Context, stage: int, steps: int = 4, **config: Any) -> dict[str, Tensor]:
    engine = make_engine(seeded(lambda: Llama(ctx.config)), stage, **config)
    losses: list[Tensor] = []
    for step in range(steps):
        x = ctx.tokens(step, 0, ctx.rank)
        loss = loss_of(engine(x), x)
        losses.append(loss.detach())
        engine.backward(loss)
        engine.step()
    weights = full_weights(engine)
    engine.destroy()
    return {**weights, "losses": torch.stack(losses)}


def check_bits(ctx: Context) -> dict[str, Any]:
    """Two runs give the same bits, and so do stages 1, 2 and 3, in every precision."""
    result: dict[str, Any] = {"ok": True}
    for name, config in {
        "fp32": {},
        "bf16": {"bf16": {"enabled": True}},
        "fp16": {"fp16": {"enabled": True, "initial_scale_power": 10}},
    }.items():
        runs = {stage: train(ctx, stage, **config) for stage in (1, 2, 3)}
        again = train(ctx, 3, **config)
        same = all(torch.equal(again[k], runs[3][k]) for k in again)
        across = all(torch.equal(runs[s][k], runs[1][k]) for s in (2, 3) for k in again)
        result[name] = {"repeats": same, "equal_across_stages": across}
        result[name]["losses"] = [round(v, 5) for v in again["losses"].tolist()]
        result["ok"] &= same and across
    return result


def check_pulls(ctx: Context) -> dict[str, Any]:
    """Gathers out of other ranks' memory train to the bits of NCCL's, and need no collective."""
    if ctx.world == 1:
        return {"ok": True, "skipped": "one rank gathers nothing"}
    result: dict[str, Any] = {"ok": True}
    pulls = {"zeroshard": {"gather": "copy_engine", "lookahead_bytes": 1 << 20}}
    collectives = {"zeroshard": {"gather": "nccl"}}
    for name, config in {"fp32": {}, "bf16": {"bf16": {"enabled": True}}}.items():
        sent, pulled = (train(ctx, 3, **config, **how) for how in (collectives, pulls))
        result[name] = all(torch.equal(sent[key], pulled[key]) for key in sent)
    engine = make_engine(seeded(lambda: Llama(ctx.config)), 3, bf16={"enabled": True}, **pulls)
    units = engine.runtime.units
    result["pulled"] = all(unit.gathers_alone for unit in units)
    if not result["pulled"]:
        engine.destroy()
        return {**result, "ok": False}

    def steps(number: int) -> list[Tensor]:
        losses: list[Tensor] = []
        for step in range(number):
            x = ctx.tokens(step, 0, ctx.rank)
            losses.append(loss_of(engine(x), x))
            engine.backward(losses[-1])
            engine.step()
        return losses

    steps(2)
    engine.offload_states()
    engine.reload_states()
    result["pulled_after_reload"] = all(unit.gathers_alone for unit in units)
    steps(1)
    if ctx.on_gpu:
        slab: Any = units[0].transport.memory
        result["multicast"] = slab._owner[1].multicast_ptr != 0
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            steps(1)
            torch.cuda.synchronize()
        events = [
            e for e in profile.events() or [] if e.device_type == torch.autograd.DeviceType.CUDA
        ]
        result["nccl_gathers"] = sum("AllGather" in event.name for event in events)
        result["peer_copies"] = sum("PtoP" in event.name for event in events)
        result["ok"] &= not result["multicast"] and not result["nccl_gathers"]
        result["ok"] &= result["peer_copies"] > 0
        result["copier"] = type(slab.copy).__name__
        slab.copy.join()
        slab.copy = StreamCopies(torch.device(ctx.device))
        result["by_streams"] = all(bool(loss.isfinite()) for loss in steps(2))
        result["ok"] &= result["by_streams"]
    engine.destroy()
    orders = parity(ctx, Routed, routed_call(ctx), stages=(3,), **pulls)
    result["routed"] = orders["difference"]
    result["ok"] &= result["fp32"] and result["bf16"] and result["pulled_after_reload"]
    return {**result, "ok": result["ok"] and orders["ok"]}


def turns_are_right(ctx: Context, *, direct: bool) -> bool:
    """Whether each of many turns, none waited for before the next, has the sum of its own rows."""
    mesh = build_mesh(ctx.world, torch.device(ctx.device))
    numel = ctx.world * (1 << 20 if ctx.on_gpu else 64)
    slab = map_slots(2 * numel, mesh)
    ring = Ring(slab, mesh, None if direct else slab.copy)
    shape = torch.Size([numel])
    reducer = PulledReduction(ring, Layout((numel,), ctx.world), [shape], torch.bfloat16)
    generators = [torch.Generator(ctx.device).manual_seed(rank) for rank in range(ctx.world)]
    right = torch.ones((), dtype=torch.bool, device=ctx.device)
    for _ in range(20):
        rows = [torch.randn(numel, device=ctx.device, generator=each) for each in generators]
        rows = [row.bfloat16() for row in rows]
        reducer.room().tensor.copy_(rows[ctx.rank])
        out = torch.empty(numel // ctx.world, device=ctx.device)
        ticket = reducer.start(out, rows[0])
        parts = [row.view(ctx.world, -1)[ctx.rank].float() for row in rows]
        want = parts[0]
        for part in parts[1:]:
            want = want + part
        ticket.wait()
        right &= (out == want * (1.0 / ctx.world)).all()
    is_right = bool(right)
    del ring, reducer, slab
    mesh.destroy()
    return is_right


def check_pulled_reductions(ctx: Context) -> dict[str, Any]:
    """Gradients out of other ranks' memory train as NCCL's do, with bits that repeat."""
    if ctx.world == 1:
        return {"ok": True, "skipped": "one rank reduces nothing"}
    result: dict[str, Any] = {"ok": True}
    pulls, collectives = ({"zeroshard": {"reduce": how}} for how in ("copy_engine", "nccl"))
    result["sums"] = [turns_are_right(ctx, direct=direct) for direct in (False, True)]
    result["ok"] &= all(result["sums"])
    for name, config, most in (
        ("fp32", {}, 1e-5),
        ("bf16", {"bf16": {"enabled": True}, "communication_data_type": "bf16"}, 1e-2),
        ("fp32 sent as bf16", {"communication_data_type": "bf16"}, 1e-2),
    ):
        sent = train(ctx, 3, **config, **collectives)
        runs = [train(ctx, stage, **config, **pulls) for stage in (3, 3, 2)]
        at_once = partial(reduce_by_pulls, direct=True)
        with mock.patch("zeroshard.engine.build.reduce_by_pulls", at_once):
            runs.append(train(ctx, 3, **config, **pulls))
        difference = worst(runs[0], sent)
        same = all(torch.equal(run[key], runs[0][key]) for run in runs for key in sent)
        result[name] = {"difference": difference, "same_bits": same}
        result["ok"] &= difference <= most and same
    engine = make_engine(seeded(lambda: Llama(ctx.config)), 3, bf16={"enabled": True}, **pulls)

    def step() -> None:
        x = ctx.tokens(0, 0, ctx.rank)
        engine.backward(loss_of(engine(x), x))
        engine.step()

    step()
    engine.offload_states()
    engine.reload_states()
    step()
    result["pulled"] = all(unit.reducer.in_turn for unit in engine.runtime.trained)
    result["ok"] &= result["pulled"]
    if ctx.on_gpu:
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            step()
            torch.cuda.synchronize()
        events = [
            e for e in profile.events() or [] if e.device_type == torch.autograd.DeviceType.CUDA
        ]
        result["nccl_reductions"] = sum("ReduceScatter" in event.name for event in events)
        result["peer_copies"] = sum("PtoP" in event.name for event in events)
        result["ok"] &= not result["nccl_reductions"] and result["peer_copies"] > 0
    engine.destroy()
    orders = parity(ctx, Routed, routed_call(ctx), stages=(2, 3), **pulls)
    result["routed"] = orders["difference"]
    return {**result, "ok": result["ok"] and orders["ok"]}


def check_memory(ctx: Context) -> dict[str, Any]:
    """Bytes between steps and at the end of backward follow the ZeRO formulas."""
    result: dict[str, Any] = {"ok": True}
    numel = sum(p.numel() for p in Llama(ctx.large).parameters())
    for stage in STAGES:
        gc.collect()
        model = seeded(lambda: Llama(ctx.large))
        base = torch.cuda.memory_allocated() if ctx.on_gpu else 0
        engine = make_engine(model, stage, bf16={"enabled": True})
        for step in range(2):
            x = ctx.tokens(step, 0, ctx.rank, ctx.large)
            loss = loss_of(engine(x), x)
            engine.backward(loss)
            del loss
            at_backward = allocated(ctx) + bytes_beside(engine) - base
            engine.step()
        between = allocated(ctx) + bytes_beside(engine) - base
        want = state_bytes(stage, numel, ctx.world, 2, 4, 12)
        two_units = 2 * 4 * max(u.layout.full_numel for u in engine.runtime.units)
        report = engine.memory()
        close = abs(report.total_bytes - want.total) <= 0.03 * want.total + two_units
        if ctx.on_gpu:
            close &= between <= 1.03 * (want.parameters + want.optimizer) + two_units
            close &= at_backward <= 1.03 * want.total + two_units
        result[str(stage)] = {
            "reported": report.total_bytes,
            "formula": want.total,
            "allocated_between_steps": between,
            "allocated_after_backward": at_backward,
            "ok": bool(close),
        }
        result["ok"] &= bool(close)
        engine.destroy()
        del engine, model
    return result


def check_init(ctx: Context) -> dict[str, Any]:
    """A model is built in shards on the device, one layer at a time, and trains like any other."""
    trained: list[dict[str, Tensor]] = []
    for sharded in (False, True):
        with zeroshard.zero.Init(enabled=sharded), torch.device(ctx.device):
            model = seeded(lambda: Llama(ctx.config))
        engine = make_engine(model, 3)
        for step in range(2):
            x = ctx.tokens(step, 0, ctx.rank)
            engine.backward(loss_of(engine(x), x))
            engine.step()
        trained.append(full_weights(engine))
        engine.destroy()
        del engine, model
    same = all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    gc.collect()
    base = torch.cuda.memory_allocated() if ctx.on_gpu else 0
    if ctx.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with zeroshard.zero.Init(dtype=torch.bfloat16):
        model = Llama(ctx.large)
    nbytes = [full_nbytes(param) for param in model.parameters()]
    # In fp32, as it is built, and then the buffer for all of it in bf16; 8 MiB are under way.
    most = sum(nbytes) / ctx.world + 3 * max(nbytes) + 2 * 2**23
    peak = (torch.cuda.max_memory_allocated() if ctx.on_gpu else 0) - base
    fits = ctx.world == 1 or peak <= most
    return {"ok": same and fits, "same": same, "peak": peak, "ceiling": most}


# Keys that may not change what is computed, and those that may only round otherwise.
SAME_BITS = {
    "no overlap": {"overlap_comm": False},
    "no prefetch": {"stage3_prefetch_bucket_size": 0},
    "long prefetch": {"stage3_prefetch_bucket_size": 5e7},
    "reuse": {"stage3_max_reuse_distance": 1e9, "stage3_max_live_parameters": 1e9},
    "some reuse": {"stage3_max_reuse_distance": 3e4, "stage3_max_live_parameters": 1e5},
}
OTHER_ROUNDING = {
    "all-reduce": {"zero_optimization": {"reduce_scatter": False}},
    "persistent": {"zero_optimization": {"stage3_param_persistence_threshold": 1000}},
    "prescale": {"prescale_gradients": True},
    "predivide": {"gradient_predivide_factor": 4.0},
}


def check_settings(ctx: Context) -> dict[str, Any]:
    """Keys about communication and memory leave the numbers what they are."""
    result: dict[str, Any] = {"ok": True}
    want = train(ctx, 3)
    for name, zero in SAME_BITS.items():
        got = train(ctx, 3, zero_optimization={"stage": 3, **zero})
        result[name] = all(torch.equal(got[key], want[key]) for key in want)
        result["ok"] &= result[name]
    for name, config in OTHER_ROUNDING.items():
        zero = {"stage": 3, **config.get("zero_optimization", {})}
        result[name] = worst(train(ctx, 3, **{**config, "zero_optimization": zero}), want)
        result["ok"] &= result[name] <= 1e-5
    return result


def check_checkpointing(ctx: Context) -> dict[str, Any]:
    """Stage 3 with recomputation, both kinds, gives the bits it gives without."""
    weights: list[dict[str, Tensor]] = []
    peaks: list[int] = []

    def count_full(engine: zeroshard.Engine) -> None:
        peaks.append(sum(unit.is_full for unit in engine.runtime.units))

    for reentrant in (None, False, True):
        model = seeded(lambda: Recomputed(ctx.config))
        model.reentrant = reentrant
        engine = make_engine(model, 3)
        for param in model.parameters():
            param.register_hook(lambda grad, engine=engine: count_full(engine))
        for step in range(3):
            x = ctx.tokens(step, 0, ctx.rank)
            engine.backward(loss_of(engine(x), x))
            engine.step()
        weights.append(full_weights(engine))
        engine.destroy()
    peak = max(peaks)
    same = all(torch.equal(w[k], weights[0][k]) for w in weights for k in w)
    within = peak <= 3 or ctx.world == 1  # one rank keeps all units full
    return {"ok": same and within, "same": same, "most_units_full": peak}


def check_budget(ctx: Context) -> dict[str, Any]:
    """Blocks keep what a device with too little memory for all has left, and the same bits."""
    size = BUDGETED if ctx.on_gpu else SMALL
    most_steps = 7 if ctx.on_gpu else 3

    def run(budget: object, steps: int = most_steps) -> tuple[dict[str, Tensor], Any, int, float]:
        with torch.device(ctx.device):
            model = seeded(lambda: Llama(size))
        kind = {"bf16": {"enabled": True}} if ctx.on_gpu else {}
        engine = make_engine(model, 3, zeroshard={"activation_budget": budget}, **kind)
        times: list[float] = []
        for step in range(steps):
            x = ctx.tokens(step, 0, ctx.rank, size)
            if ctx.on_gpu:
                torch.cuda.synchronize()
                if step == 4:  # nobody else begins a new peak from here on
                    torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            engine.backward(loss_of(engine(x), x))
            engine.step()
            if ctx.on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        plan, peak = engine.activation_plan, torch.cuda.max_memory_allocated() if ctx.on_gpu else 0
        weights = {name: weight.cpu() for name, weight in full_weights(engine).items()}
        engine.destroy()
        del engine, model, x
        gc.collect()
        return weights, plan, peak, min(times)

    want, nothing, least, slow = run(0)
    _, everything, _, _ = run(1000, steps=2)
    half = everything.kept_bytes // 2
    if not ctx.on_gpu:
        inputs = 1000 * 2**30 - everything.most_bytes
        got, some, _, _ = run((inputs + half) / 2**30)
        within = some.kept_bytes <= half
        figures: dict[str, Any] = {}
    else:
        total = torch.cuda.get_device_properties(ctx.device).total_memory
        capacity = int((least + half) / 0.9)  # a tenth stays free
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(capacity / total)
        try:
            got, some, peak, fast = run("auto")
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        within = peak <= capacity
        figures = {
            "peak_gib": [round(bytes_ / 2**30, 2) for bytes_ in (least, peak, capacity)],
            "speedup": round(slow / fast, 3),
        }
    same = all(torch.equal(got[key], want[key]) for key in want)
    between = 0 == nothing.num_kept < some.num_kept < some.num_blocks == size.num_layers
    return {
        "ok": same and within and between,
        "same": same,
        "within": within,
        "kept": [some.num_kept, some.num_blocks],
        "kept_gib_of": [round(plan.kept_bytes / 2**30, 3) for plan in (some, everything)],
        **figures,
    }


def check_compile(ctx: Context) -> dict[str, Any]:
    """Blocks are one graph at all stages and with recomputation, and train as uncompiled ones do.

    Within the rounding of fused kernels, that is.
    """
    want = train(ctx, 3)
    backend = "inductor" if ctx.on_gpu else "eager"
    torch._dynamo.utils.counters.clear()
    difference: dict[str, float] = {}
    runs = tuple((stage, kind) for stage in (3, 2, 1, 0) for kind in (None, False, True))
    for stage, reentrant in runs:
        model = seeded(lambda: Recomputed(ctx.config))
        model.reentrant = reentrant
        engine = make_engine(model, stage, compile={"enabled": True, "backend": backend})
        for step in range(4):
            x = ctx.tokens(step, 0, ctx.rank)
            engine.backward(loss_of(engine(x), x))
            engine.step()
        weights = full_weights(engine)
        difference[f"stage {stage}, reentrant {reentrant}"] = worst(
            weights, {name: want[name] for name in weights}
        )
        engine.destroy()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    breaks = list(torch._dynamo.utils.counters["graph_break"])
    # One for training, and one without gradients, which reentrant checkpointing runs first.
    ok = max(difference.values()) < 1e-3 and graphs == 2 and not breaks
    return {"difference": difference, "graphs": graphs, "breaks": breaks, "ok": ok}


def check_overlap(ctx: Context) -> dict[str, Any]:
    """Of the time that collectives of a stage-3 step take, the share in which kernels compute."""
    if not ctx.on_gpu or ctx.world == 1:
        return {"ok": True, "skipped": "needs two GPUs"}
    model = seeded(lambda: Llama(ctx.large))
    engine = make_engine(model, 3, bf16={"enabled": True})
    x = torch.cat([ctx.tokens(0, micro, ctx.rank, ctx.large) for micro in range(4)])

    def step() -> None:
        engine.backward(loss_of(engine(x), x))
        engine.step()

    for _ in range(3):
        step()
    result: dict[str, Any] = summarize(profiled(step))
    engine.destroy()
    # How much lies under computation depends on what else the host does; that some does, does not.
    result["ok"] = all(share is not None and share > 0.1 for share in result["hidden"].values())
    return result


def check_steady(ctx: Context) -> dict[str, Any]:
    """A step that repeats others neither waits for the GPU nor asks it for memory."""
    if not ctx.on_gpu:
        return {"ok": True, "skipped": "only on GPUs"}
    result: dict[str, Any] = {}
    for stage, step_by in ((1, "auto"), (2, "auto"), (3, "auto"), (3, "torch")):
        model = seeded(lambda: Llama(ctx.large))
        how = {"bf16": {"enabled": True}, "zeroshard": {"optimizer_step": step_by}}
        engine = make_engine(model, stage, fused=True, **how)
        x = ctx.tokens(0, 0, ctx.rank, ctx.large)

        def step(engine: zeroshard.Engine = engine, x: Tensor = x) -> None:
            engine.backward(loss_of(engine(x), x))
            engine.step()

        for _ in range(4):
            step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["num_device_alloc"]
        waited = ""
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                step()
        except RuntimeError:
            waited = traceback.format_exc()[-1000:]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        stats = torch.cuda.memory_stats()
        result[f"stage {stage}, {step_by}"] = {
            "waited": waited,
            "allocations": stats["num_device_alloc"] - before,
            "reserved_over_allocated": round(
                stats["reserved_bytes.all.peak"] / stats["allocated_bytes.all.peak"], 3
            ),
        }
        engine.destroy()
        del engine, model, step
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    result["ok"] = not any(each["waited"] or each["allocations"] for each in result.values())
    return result


def check_access(ctx: Context) -> dict[str, Any]:
    """State goes to the host and back bit by bit, and the GPU's memory with it; edits last."""
    result: dict[str, Any] = {}
    for stage in STAGES:
        engines = []
        for offloads in (False, True):
            gc.collect()
            base = allocated(ctx)
            engine = make_engine(seeded(lambda: Llama(ctx.medium)), stage, bf16={"enabled": True})
            head = engine.module.head.weight
            for step in range(2):
                x = ctx.tokens(step, 0, ctx.rank, ctx.medium)
                engine.backward(loss_of(engine(x), x))
                if offloads:
                    before = allocated(ctx) - base
                    engine.offload_states()
                    left = allocated(ctx) - base
                    engine.reload_states()
                grad = state.safe_get_full_grad(head)
                state.safe_set_full_grad(head, grad * 0.5)
                engine.step()
                moment = state.safe_get_full_optimizer_state(head, "exp_avg")
                state.safe_set_full_optimizer_state(head, moment * 2, "exp_avg")
                with zeroshard.gathered(head, modifier_rank=0):
                    if ctx.rank == 0:
                        head.data[0].zero_()
            master = state.safe_get_full_fp32_param(head)
            engines.append((full_weights(engine), master, engine.module_state_dict()))
            engine.destroy()
        (plain, plain_master, _), (moved, moved_master, saved) = engines
        result[f"stage {stage}"] = {
            "same": all(torch.equal(plain[k], moved[k]) for k in plain)
            and torch.equal(plain_master, moved_master),
            "edited": bool((moved_master[0] == 0).all()) and bool((moved_master[1] != 0).any()),
            "saved": all(torch.equal(saved[k], moved[k].cpu()) for k in moved if saved),
            "left": left / before if ctx.on_gpu else 0.0,
        }
        del engine, head, engines, plain, moved, grad, moment, master
        gc.collect()
    result["ok"] = all(
        each["same"] and each["edited"] and each["saved"] and each["left"] < 0.1
        for each in result.values()
    )
    return result


def allocated(ctx: Context) -> int:
    return torch.cuda.memory_allocated() if ctx.on_gpu else 0


def check_resume(ctx: Context) -> dict[str, Any]:
    """A run that is saved and loaded goes on with the same bits, dropout and fp16 included."""
    folder = [tempfile.mkdtemp() if ctx.rank == 0 else ""]
    dist.broadcast_object_list(folder, device=torch.device(ctx.device))
    differ: list[str] = []

    def call(engine: zeroshard.Engine, step: int) -> Tensor:
        x = ctx.tokens(step, 0, ctx.rank)
        loss = loss_of(F.dropout(engine(x), 0.1), x)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    for stage in STAGES:
        for name, config in {
            "fp32": {},
            "bf16": {"bf16": {"enabled": True}},
            "fp16": {"fp16": {"enabled": True, "initial_scale_power": 20}},
        }.items():

            def build(stage: int = stage, config: dict[str, Any] = config) -> zeroshard.Engine:
                more = {"gradient_accumulation_steps": 2, **config}
                return make_engine(seeded(lambda: Llama(ctx.config)), stage, **more)

            tag, engine = f"{stage}-{name}", build()
            for step in range(3):
                call(engine, step)
            engine.save_checkpoint(folder[0], tag=tag)
            want = [call(engine, step) for step in range(3, 7)]
            weights = full_weights(engine)
            engine.destroy()
            engine = build()
            torch.manual_seed(99)
            engine.load_checkpoint(folder[0], tag=tag)
            got = [call(engine, step) for step in range(3, 7)]
            again = full_weights(engine)
            engine.destroy()
            if not (
                torch.equal(torch.stack(got), torch.stack(want)) and worst(again, weights) == 0
            ):
                differ.append(tag)
    dist.barrier()
    if ctx.rank == 0:
        shutil.rmtree(folder[0])
    return {"differ": differ, "ok": not differ}


def offloading(optimizer: str, param: str = "none", **more: Any) -> dict[str, Any]:
    """A zero_optimization block that moves state and, at stage 3, parameters; files need a path."""
    blocks = {"offload_optimizer": {"device": optimizer, **more}}
    return blocks | ({"offload_param": {"device": param}} if param != "none" else {})


def with_files(zero: dict[str, Any], folder: str) -> dict[str, Any]:
    """The same with a folder for the files of what goes to "nvme"."""
    return {
        name: {**block, "nvme_path": folder} if block["device"] == "nvme" else block
        for name, block in zero.items()
    }


HOST, FILES = offloading("cpu"), offloading("nvme")
BF16 = {"bf16": {"enabled": True}}
# Of which the first steps overflow.
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 21, "hysteresis": 1}}
# What trains alike with state off the device: a stage, what else is set, and what leaves.
OFFLOADED: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    **{f"bf16, stage {stage}, host": (stage, BF16, HOST) for stage in (1, 2, 3)},
    **{f"bf16, stage {stage}, files": (stage, BF16, FILES) for stage in (1, 2, 3)},
    "bf16, stage 3, all on the host": (3, BF16, offloading("cpu", "cpu")),
    "bf16, stage 3, all in files": (3, BF16, offloading("nvme", "nvme")),
    "bf16, stage 3, shards on the host": (3, BF16, {"offload_param": {"device": "cpu"}}),
    "bf16, stage 2, half": (2, BF16, offloading("cpu", ratio=0.5)),
    "bf16, stage 3, half": (3, BF16, offloading("cpu", ratio=0.5)),
    "bf16, stage 2, not page-locked": (2, BF16, offloading("cpu", pin_memory=False)),
    "fp32, stage 3, host": (3, {}, HOST),
    "fp16, stage 2, host": (2, FP16, HOST),
    "fp16, stage 3, all on the host": (3, FP16, offloading("cpu", "cpu")),
    "two micro-steps, stage 1, host": (1, {**BF16, "gradient_accumulation_steps": 2}, HOST),
    "two micro-steps, stage 3, host": (3, {**BF16, "gradient_accumulation_steps": 2}, HOST),
    "torch's step, stage 2, host": (2, {**BF16, "zeroshard": {"optimizer_step": "torch"}}, HOST),
}


# Those that CPU ranks try, which the tests of each part have tried before.
FEW_OFFLOADED = {
    *("bf16, stage 2, half", "bf16, stage 3, all in files", "fp16, stage 2, host"),
}


def train_far(
    ctx: Context,
    stage: int,
    config: dict[str, Any],
    zero: dict[str, Any],
    clip: float,
    steps: int,
    where: str = "gpu",
) -> dict[str, Any]:
    """Losses, norms, weights, master weights and moments of some steps."""
    update = {"zeroshard": {**config.get("zeroshard", {}), "offload_update": where}}
    engine = make_engine(
        seeded(lambda: Llama(ctx.config)),
        stage,
        **{**config, **update, "gradient_clipping": clip},
        zero_optimization={"stage": stage, **zero},
    )
    losses: list[Tensor] = []
    norms: list[float] = []
    for step in range(steps):
        for micro in range(config.get("gradient_accumulation_steps", 1)):
            x = ctx.tokens(step, micro, ctx.rank)
            loss = loss_of(engine(x), x)
            losses.append(loss.detach())
            engine.backward(loss)
            engine.step()
        norm = engine.get_global_grad_norm()
        norms.append(0.0 if norm is None else float(norm))
    named = list(engine.module.named_parameters())
    found = {f"weight of {name}": weight for name, weight in full_weights(engine).items()}
    for name, param in named:
        found[f"master weight of {name}"] = state.safe_get_full_fp32_param(param)
        for moment in ("exp_avg", "exp_avg_sq"):
            found[f"{moment} of {name}"] = state.safe_get_full_optimizer_state(param, moment)
    skipped, moved = engine.skipped_steps, off_device(engine)
    engine.destroy()
    tensors = {"losses": torch.stack(losses), **found}
    return {"tensors": tensors, "norms": norms, "skipped": skipped, "moved": moved}


def check_offload_equal(ctx: Context) -> dict[str, Any]:
    """Training with state off the device has the bits of training with all of it there."""
    result: dict[str, Any] = {"ok": True}
    folder = [tempfile.mkdtemp() if ctx.rank == 0 else ""]
    dist.broadcast_object_list(folder, device=torch.device(ctx.device))
    steps = 20 if ctx.on_gpu else 8
    near: dict[str, dict[str, Any]] = {}
    for name in OFFLOADED if ctx.on_gpu else sorted(FEW_OFFLOADED):
        stage, config, zero = OFFLOADED[name]
        key = json.dumps([stage, config])
        if key not in near:
            free = train_far(ctx, stage, config, {}, 1e9, steps)
            norms = [norm for norm in free["norms"] if 0 < norm < math.inf]
            # So that some steps are clipped and some are not.
            near[key] = {"clip": sorted(norms)[len(norms) // 2]}
            near[key] |= train_far(ctx, stage, config, {}, near[key]["clip"], steps)
        want = near[key]
        got = train_far(ctx, stage, config, with_files(zero, folder[0]), want["clip"], steps)
        differ = [
            each
            for each, tensor in want["tensors"].items()
            if not torch.equal(got["tensors"][each].cpu(), tensor.cpu())
        ]
        clipped = {norm > want["clip"] for norm in got["norms"] if 0 < norm < math.inf}
        fine = not differ and got["moved"] is not None and len(clipped) == 2
        fine &= got["skipped"] == want["skipped"] and ("fp16" in name) == (got["skipped"] > 0)
        result[name] = (
            "equal"
            if fine
            else {
                "differ": differ[:6],
                "of": len(want["tensors"]),
                "losses": [each["tensors"]["losses"].tolist()[-1] for each in (got, want)],
                "clipped": sorted(clipped),
                "skipped": [got["skipped"], want["skipped"]],
                "moved": str(got["moved"]),
            }
        )
        result["ok"] &= fine
    dist.barrier()
    if ctx.rank == 0:
        result["files left"] = [path.name for path in Path(folder[0]).iterdir()]
        result["ok"] &= not result["files left"]
        shutil.rmtree(folder[0])
    return result


def check_host_update(ctx: Context) -> dict[str, Any]:
    """Steps on the host round as the host does; no call waits for the device, gradients leave it.

    In bf16 a difference of rounding may become one of weights, which losses show to be small.
    """
    result: dict[str, Any] = {"ok": True}
    steps = 8 if ctx.on_gpu else 3
    for stage, config in itertools.product((1, 2, 3), ({}, BF16, FP16)):
        near = train_far(ctx, stage, config, {}, 1.0, steps)
        far = train_far(ctx, stage, config, HOST, 1.0, steps, "cpu")
        got, want = (each["tensors"]["losses"].float().cpu() for each in (far, near))
        worst = float(((got - want).abs() / want.abs()).max())
        name = f"stage {stage}, {next(iter(config), 'fp32')}"
        fine = worst < (2e-2 if config else 1e-4) and far["skipped"] == near["skipped"]
        result[name] = {"worst": worst, "ok": fine}
        result["ok"] &= fine
    if not ctx.on_gpu:
        return result
    engine = make_engine(
        seeded(lambda: Llama(ctx.large)),
        2,
        **BF16,
        zeroshard={"offload_update": "cpu"},
        zero_optimization={"stage": 2, **HOST},
    )
    x = ctx.tokens(0, 0, ctx.rank, ctx.large)
    for number in range(4):
        if number == 2:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if ctx.world == 1 else "default")
        engine.backward(loss_of(engine(x), x))
        held = sum(unit.gradient_bytes for unit in engine.runtime.trained)
        engine.step()
    torch.cuda.set_sync_debug_mode("default")
    largest = max(unit.layout.full_numel for unit in engine.runtime.trained)
    result["gradient bytes left after backward"] = held
    result["ok"] &= held <= 4 * largest  # of the unit that was reduced before a step was near
    engine.destroy()
    return result


def check_automatic_budget(ctx: Context) -> dict[str, Any]:
    """State comes back where there is room for all of it, and no bit of training shows it."""
    result: dict[str, Any] = {"ok": True}
    cases = itertools.product((1, 2, 3), ({}, BF16), ("auto", "torch"))
    for stage, config, kernels in cases if ctx.on_gpu else [(2, BF16, "auto")]:
        step = {"optimizer_step": kernels}
        auto = {**step, "gpu_budget": "auto"}
        near = train_far(ctx, stage, {**config, "zeroshard": step}, {}, 1.0, 6)
        back = train_far(ctx, stage, {**config, "zeroshard": auto}, HOST, 1.0, 6)
        wanted, got = (each["tensors"] for each in (near, back))
        differ = [name for name in wanted if not torch.equal(got[name].cpu(), wanted[name].cpu())]
        # Memory of the host is not measured, so nothing comes back to it.
        fine = not differ and (back["moved"] is None) == ctx.on_gpu
        name = f"stage {stage}, {next(iter(config), 'fp32')}, {kernels}"
        result[name] = {"differ": differ[:6], "off the device": str(back["moved"]), "ok": fine}
        result["ok"] &= fine
    return result


def check_offload_memory(ctx: Context) -> dict[str, Any]:
    """What leaves the device leaves it whole, is page-locked to the byte, and nothing grows."""
    result: dict[str, Any] = {"ok": True}
    config = replace(ctx.large, num_layers=4)
    numel = sum(p.numel() for p in Llama(config).parameters())
    part = numel / ctx.world
    # Buffers stay from step to step: a number of them that does not depend on what is free.
    four = {"buffer_count": 4}
    quarter = offloading("cpu", ratio=0.25, **four)
    wanted = {
        # Bytes of each parameter that stay on the device between steps, and that are elsewhere.
        "stage 1, state": (1, offloading("cpu", **four), 2 * numel, 12 * part),
        "stage 3, state": (3, offloading("cpu", **four), 2 * part, 12 * part),
        "stage 3, all": (3, offloading("cpu", "cpu", **four), 0, 14 * part),
        "stage 2, a quarter": (2, quarter, 2 * numel + 9 * part, 3 * part),
    }
    for name, (stage, zero, near, far) in wanted.items():
        gc.collect()
        base = allocated(ctx)
        engine = make_engine(
            seeded(lambda: Llama(config)),
            stage,
            **BF16,
            zeroshard={"offload_update": "gpu"},
            zero_optimization={"stage": stage, **zero},
        )
        x = ctx.tokens(0, 0, ctx.rank, config)
        seen: list[tuple[int, ...]] = []
        last = 4 if ctx.on_gpu else 2
        for step in range(last + 1):
            engine.backward(loss_of(engine(x), x))
            engine.step()
            with torch.no_grad():
                engine(x)  # which waits for all that the step left under way
            if ctx.on_gpu:
                torch.cuda.synchronize()
            if step in (last // 2, last):
                reserved = torch.cuda.memory_reserved() if ctx.on_gpu else 0
                moved = off_device(engine)
                seen.append((allocated(ctx) + bytes_beside(engine) - base, reserved))
        assert engine._sharded is not None
        buffers = engine._sharded.buffer_bytes
        biggest = max(full_nbytes(param) // param.itemsize for param in engine.parameters())
        # A parameter's state stays or leaves whole, and units are padded.
        slack = 0.01 * 14 * part + 14 * biggest / ctx.world
        largest = max(unit.layout.full_numel for unit in engine.runtime.units)
        two_units = 2 * 4 * largest
        state_bytes_, pinned = (moved.state_bytes, moved.pinned_bytes) if moved else (0, 0)
        fine = abs(state_bytes_ - far) <= slack and pinned <= 1.02 * state_bytes_
        # Four of a unit at most, as nothing is larger, with what makes it divisible.
        fine &= 0 < buffers <= 1.01 * 4 * 12 * largest / ctx.world
        if ctx.on_gpu:
            near += buffers
            fine &= pinned >= state_bytes_ and abs(seen[-1][0] - near) <= slack + two_units
            fine &= seen[0] == seen[-1]
        result[name] = {
            "far": [state_bytes_, far],
            "pinned": pinned,
            "near": [seen[-1][0], near],
            "buffers": buffers,
            "reserved": [each[1] for each in seen],
            "ok": bool(fine),
        }
        result["ok"] &= bool(fine)
        engine.destroy()
        del engine, moved, x
        if ctx.on_gpu:
            torch.cuda.empty_cache()
    return result


def check_offload_overlap(ctx: Context) -> dict[str, Any]:
    """State travels both ways beside the computation; the next forward does not wait for all."""
    if not ctx.on_gpu:
        return {"ok": True, "skipped": "only on GPUs"}
    result: dict[str, Any] = {}
    for stage in (2, 3):
        zero = {"stage": stage, **offloading("cpu", "cpu" if stage == 3 else "none")}
        engine = make_engine(
            seeded(lambda: Llama(ctx.large)),
            stage,
            **BF16,
            fused=True,
            zeroshard={"offload_update": "gpu"},
            zero_optimization=zero,
        )
        x = torch.cat([ctx.tokens(0, micro, ctx.rank, ctx.large) for micro in range(4)])

        def step(engine: zeroshard.Engine = engine, x: Tensor = x) -> None:
            engine.backward(loss_of(engine(x), x))
            engine.step()

        for _ in range(4):
            step()
        torch.cuda.synchronize()
        waited = ""
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                step()
        except RuntimeError:
            waited = traceback.format_exc()[-1000:]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found = profiled(lambda step=step: (step(), step()))
        result[f"stage {stage}"] = {"waited": waited, **travels(found)}
        engine.destroy()
        del engine, step
        gc.collect()
    result["ok"] = all(
        not each["waited"]
        and each["apart"]
        and each["pageable_ms"] < 1
        and each["started_before_the_end"] > 0
        and each["in_under_computation"] > 0.1
        and each["both_ways"] > 0.1
        for each in result.values()
    )
    return result


def travels(found: Sequence[Activity]) -> dict[str, Any]:
    """What a profile of two steps says of copies from and to the host."""
    inwards = [each for each in found if "HtoD" in each.name]
    outwards = [each for each in found if "DtoH" in each.name]
    updates = sorted((e for e in found if kind_of(e.name) == "optimizer"), key=lambda e: e.start)
    first = updates[: len(updates) // 2]  # of the two steps
    products = [each for each in found if kind_of(each.name) in ("matmul", "attention")]
    spans_in, spans_out = ([each.span for each in group] for group in (inwards, outwards))
    computing = [e.span for e in found if computes(e.name) and kind_of(e.name) != "optimizer"]
    streams = [
        {each.stream for each in group if each.end - each.start > 50}  # of state, not of numbers
        for group in (products, inwards, outwards)
    ]
    return {
        "in_ms": round(length(spans_in) / 1e3, 2),
        "out_ms": round(length(spans_out) / 1e3, 2),
        "pageable_ms": round(
            length(e.span for e in (*inwards, *outwards) if "Pageable" in e.name) / 1e3, 2
        ),
        "apart": not any(one & other for one, other in combinations(streams, 2)),
        "in_under_computation": hidden(spans_in, computing) or 0.0,
        "out_under_computation": hidden(spans_out, computing) or 0.0,
        "both_ways": max(hidden(spans_in, spans_out) or 0.0, hidden(spans_out, spans_in) or 0.0),
        # Products of the second forward that began while the first step was still being made.
        "started_before_the_end": sum(
            first[0].start < each.start < first[-1].end for each in products if first
        ),
    }


CHECKS = {
    check.__name__.removeprefix("check_"): check
    for check in (
        check_parity,
        check_routed,
        check_bits,
        check_memory,
        check_init,
        check_settings,
        check_access,
        check_checkpointing,
        check_resume,
        check_overlap,
        check_offload_equal,
        check_host_update,
        check_automatic_budget,
        check_offload_memory,
        check_offload_overlap,
        check_steady,
        check_budget,
        check_compile,
        check_pulled_reductions,
        check_pulls,  # last: what it asks of the driver may break the process
    )
}


def have_ended(ctx: Context, name: str, is_fine: bool) -> bool:
    """Whether every rank has ended a check soon after this one, all of them well or all badly.

    Over the store, because collectives are of no use if a rank has left them.
    """
    store = dist.PrefixStore("checks", _get_default_store())
    keys = [f"{name}/{rank}" for rank in range(ctx.world)]
    store.set(keys[ctx.rank], str(is_fine))
    try:
        # Of those that wait in a collective for one that has failed, nobody comes.
        store.wait(keys, timedelta(seconds=300 if is_fine else 30))
    except Exception:
        return False
    return len({store.get(key) for key in keys}) == 1


def main() -> None:
    """Run all checks; rank 0 prints one JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="sizes for a CPU")
    parser.add_argument("--only", nargs="*", default=list(CHECKS), choices=list(CHECKS))
    args = parser.parse_args()
    zeroshard.init_distributed()
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.matmul.allow_tf32 = False
    ctx = Context(args.toy)
    for name in args.only:
        began = time.perf_counter()
        try:
            result = CHECKS[name](ctx)
        except Exception:
            result = {"ok": False, "error": traceback.format_exc()[-1500:]}
        if ctx.rank == 0 or "error" in result:
            seconds = round(time.perf_counter() - began, 1)
            line = {"check": name, "world": ctx.world, "rank": ctx.rank, "s": seconds, **result}
            print(json.dumps(line), flush=True)
        if not have_ended(ctx, name, "error" not in result):
            os._exit(1)  # the ranks are out of step, and the interpreter's exit would wait for them
        gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
