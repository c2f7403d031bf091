"""What sharding costs on one rank: time of a step under stages 0-3 over plain PyTorch.

    python benchmarks/overhead.py [--model small|blocks] [--rounds 40] [--as-sharded]

The model has 1,000 small parameters, so per-parameter work shows. All engines take turns, one step
each per round, so that a change of the machine's speed hits all alike; the figure is the median
over rounds of (engine's step / plain step of the same round). Prints one line per engine and
appends a line of JSON for each to DIR/overhead.jsonl.

On one rank nothing is sharded, so all stages run alike. ``--as-sharded`` makes the units live as
they do on several ranks, which frees, gathers and reduces them without anybody to communicate with.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import zeroshard
from side_by_side import records, render
from zeroshard.core.lifetime import STAGES
from zeroshard.engine import build


class Small(nn.Module):
    """500 linear layers in a row: 1,000 small parameters, and nothing that repeats as a block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(500))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


class Blocks(nn.Module):
    """100 residual blocks of 10 parameters each, found as units."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), *(nn.Linear(width, width) for _ in range(4)))
            for _ in range(100)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean()


MODELS = {"small": Small, "blocks": Blocks}


def plain_step(model: nn.Module) -> Callable[[Tensor], None]:
    """A step of plain PyTorch with the optimizer kernel that zeroshard uses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        model(x).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def zero_step(model: nn.Module, stage: int, batch: int) -> Callable[[Tensor], None]:
    """A step of the engine."""
    engine, _, _, _ = zeroshard.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": batch,
            "gradient_clipping": 1.0,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
            "zero_optimization": {"stage": stage},
        },
    )

    def step(x: Tensor) -> None:
        engine.backward(engine(x))
        engine.step()

    return step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="small")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--as-sharded", action="store_true")
    records.add_out(parser)
    args = parser.parse_args()
    if args.as_sharded:
        build.lifetime = lambda stage, world: STAGES[stage]
    torch.manual_seed(0)
    zeroshard.init_distributed()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    model = MODELS[args.model](args.width).to(device)
    steps = {"plain": plain_step(copy.deepcopy(model))}
    for stage in range(4):
        steps[f"zeroshard-{stage}"] = zero_step(copy.deepcopy(model), stage, args.batch)
    x = torch.randn(args.batch, args.width, device=device)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(args.rounds + 3):
        for name, step in steps.items():
            start = time.perf_counter()
            step(x)
            if on_gpu:
                torch.cuda.synchronize()
            if number >= 3:  # the first rounds warm up
                seconds[name].append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        report(args, seconds)
    dist.destroy_process_group()


def report(args: argparse.Namespace, seconds: dict[str, list[float]]) -> None:
    """Print a line for each engine, and write its record."""
    source = records.origin(args.commit)
    workload = {
        "model": args.model,
        "width": args.width,
        "batch": args.batch,
        "as_sharded": args.as_sharded,
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
    }
    is_claimed = args.model == "small" and not args.as_sharded and args.rounds >= 8
    found: list[dict[str, Any]] = []
    for name, own in seconds.items():
        result = records.times(own, seconds["plain"])
        print(f"{name:12} {1e3 * result['median_s']:8.2f} ms   x {result['time_ratio']:.3f}")
        one = records.record(
            source,
            "overhead",
            dist.get_world_size(),
            workload,
            name,
            result,
            claim="overhead" if is_claimed else None,
        )
        found.append(one)
    records.write(args.out, found)
    for verdict in render.verdicts(found):
        print(verdict.describe())


if __name__ == "__main__":
    main()
