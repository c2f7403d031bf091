"""What an optimizer step costs on one device: torch's kernels, one pass over each shard, plain.

    python benchmarks/optimizer_step.py [--numel 2e9] [--steps 12] [--only large]

Two workloads: "large" is 34 units of nine parameters, of which two vectors do not decay, with 2e9
elements in all; "small" is 100 units of ten parameters of 4,160 elements. A step is everything from
averaged gradients to weights in bf16: norm, clip, AdamW, cast. Plain is
``torch.nn.utils.clip_grad_norm_`` and ``torch.optim.AdamW(fused=True)`` over fp32 parameters, which
makes no bf16 weights. Prints a table and a JSON line for each row.

GB/s counts the bytes that no way of doing it can avoid, and so is comparable between rows of one
gradient dtype: gradient twice, once for the norm, master weights and two averages read and written,
weights in bf16 written.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import zeroshard
from zeroshard.core.building import build_unit
from zeroshard.core.lifetime import STAGES
from zeroshard.core.mesh import build_mesh
from zeroshard.core.unit import Member, Precision, Unit
from zeroshard.optim.sharded import Kernels, ShardedOptimizer, StepPolicy

OPTIONS: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.1, "fused": True}
CLIP = 1.0
# Shares of the matrices of a block of a Llama.
SHARES = (0.12, 0.03, 0.03, 0.12, 0.23, 0.23, 0.24)
VECTOR = 4096


@dataclass(frozen=True)
class Workload:
    """Sizes of the parameters of each unit."""

    name: str
    units: Sequence[Sequence[int]]

    @property
    def numel(self) -> int:
        """Elements in all."""
        return sum(map(sum, self.units))


def workloads(numel: int) -> list[Workload]:
    """The two workloads."""
    each = max(numel // 34 - 2 * VECTOR, 64)
    block = [*(max(int(each * share) // 64 * 64, 64) for share in SHARES), VECTOR, VECTOR]
    return [Workload("large", [block] * 34), Workload("small", [[4160] * 10] * 100)]


def groups_of(params: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """Vectors do not decay."""
    return [
        {"params": [p for p in params if p.numel() != VECTOR]},
        {"params": [p for p in params if p.numel() == VECTOR], "weight_decay": 0.0},
    ]


def plain(work: Workload, device: torch.device) -> Callable[[], object]:
    """A step of plain PyTorch over fp32 parameters."""
    params = [nn.Parameter(torch.randn(n, device=device)) for unit in work.units for n in unit]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = torch.optim.AdamW(groups_of(params), **OPTIONS)

    def step() -> None:
        nn.utils.clip_grad_norm_(params, CLIP)
        optimizer.step()

    return step


def sharded(
    work: Workload, device: torch.device, kernels: Kernels, wire: torch.dtype
) -> Callable[[], object]:
    """A step over units that hold gradients in the dtype they were reduced in."""
    mesh = build_mesh(1, device)
    precision = Precision(torch.bfloat16, reduce=wire)
    units: list[Unit] = []
    params: list[nn.Parameter] = []
    for number, numels in enumerate(work.units):
        own = [nn.Parameter(torch.randn(n, device=device)) for n in numels]
        members = [Member(f"u{number}.p{index}", param) for index, param in enumerate(own)]
        params += own
        units.append(
            build_unit(members, trained=True, lifetime=STAGES[3], mesh=mesh, precision=precision)
        )
    groups = groups_of_units(units, params)
    inner = torch.optim.AdamW(groups, **OPTIONS)
    policy = StepPolicy(clip=CLIP, kernels=kernels)
    optimizer = ShardedOptimizer(inner, units, mesh, policy=policy)
    grads = [torch.randn_like(unit.master, dtype=wire) for unit in units if unit.master is not None]

    def step() -> None:
        for unit, grad in zip(units, grads, strict=True):
            unit.grad_shard = grad
        optimizer.step(divide_by=1)

    return step


def groups_of_units(units: Sequence[Unit], params: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """As :func:`groups_of`; parameters of a unit are freed and have no elements to be told by."""
    numels = [shape.numel() for unit in units for shape in unit.shapes]
    is_vector = [numel == VECTOR for numel in numels]
    pairs = list(zip(params, is_vector, strict=True))
    return [
        {"params": [param for param, vector in pairs if not vector]},
        {"params": [param for param, vector in pairs if vector], "weight_decay": 0.0},
    ]


def measure(
    step: Callable[[], object], steps: int, synchronize: Callable[[], object]
) -> tuple[float, float]:
    """Median seconds of a step, and of the host's part in it."""
    for _ in range(3):
        step()
    synchronize()
    whole: list[float] = []
    host: list[float] = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        host.append(time.perf_counter() - start)
        synchronize()
        whole.append(time.perf_counter() - start)
    return statistics.median(whole), statistics.median(host)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--numel", type=float, default=2e9 if on_gpu else 2e6)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", choices=("large", "small"))
    args = parser.parse_args()
    zeroshard.init_distributed()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    ways: dict[str, tuple[int, Callable[[Workload], Callable[[], object]]]] = {
        "plain torch, fp32 gradients": (8 + 24, lambda work: plain(work, device))
    }
    wires = {"fp32": torch.float32, "bf16": torch.bfloat16}
    how: Sequence[Kernels] = ("torch", "fused")
    for name, wire in wires.items():
        for kernels in how:
            ways[f"{kernels}, {name} gradients"] = (
                2 * wire.itemsize + 24 + 2,
                lambda work, kernels=kernels, wire=wire: sharded(work, device, kernels, wire),
            )
    print(f"{'workload':9} {'way':29} {'step ms':>9} {'host ms':>9} {'GB/s':>7} {'peak GiB':>9}")
    for work in workloads(int(args.numel)):
        if args.only not in (None, work.name):
            continue
        for name, (nbytes, make) in ways.items():
            line: dict[str, Any] = {
                "benchmark": "optimizer_step",
                "workload": work.name,
                "numel": work.numel,
                "way": name,
                "torch": torch.__version__,
                "device": torch.cuda.get_device_name() if on_gpu else "CPU",
            }
            step: Callable[[], object] | None = None
            try:
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                step = make(work)
                synchronize = torch.cuda.synchronize if on_gpu else lambda: None
                whole, host = measure(step, args.steps, synchronize)
                peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
                rate = work.numel * nbytes / whole / 1e9
                line |= {
                    "step_ms": round(1e3 * whole, 3),
                    "host_ms": round(1e3 * host, 3),
                    "gb_per_s": round(rate, 1),
                    "peak_gib": round(peak, 2),
                }
                print(
                    f"{work.name:9} {name:29} {1e3 * whole:9.2f} {1e3 * host:9.2f} {rate:7.0f} "
                    f"{peak:9.2f}"
                )
            except Exception as error:
                line["error"] = f"{type(error).__name__}: {error}"[:500]
                print(f"{work.name:9} {name:29} failed: {line['error']}")
            print(json.dumps(line), flush=True)
            del step
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
