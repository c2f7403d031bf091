"""Time and memory of a training step under stages 1-3 over FSDP2, on the ranks it is started with.

    zeroshard --num_gpus 2 benchmarks/against_fsdp2.py [--size toy|small|1b|3b] [--rounds 20]

Same model, data, optimizer kernel, clipping and dtypes (fp32 on CPU; on GPUs bf16 with fp32 master
weights and fp32 reduction). The engines take turns, one step each per round; a figure is the median
over rounds of (engine's step / FSDP2's step of the same round), each step timed until the slowest
rank has finished it. A line of JSON for each engine is appended to DIR/against_fsdp2.jsonl.

Unlike train_step.py it needs no other library, and the engines share one run of the machine.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import zeroshard
from side_by_side import records

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from llama import Llama, LlamaConfig

SIZES = {
    "toy": LlamaConfig(num_layers=4, dim=128, hidden_dim=384, context=64),
    "small": LlamaConfig(num_layers=8, dim=256, hidden_dim=768, context=128, vocab_size=4096),
    "1b": LlamaConfig(32000, 2048, 16, 32, 8, 2048, 8192),
    "3b": LlamaConfig(32000, 4096, 28, 24, 8, 3072, 8192),
}


def adamw(params: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-4, weight_decay=0.1, fused=True)


def loss_of(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1).float(), x.flatten())


def fsdp2_step(model: nn.Module, on_gpu: bool) -> Callable[[Tensor], None]:
    dtypes = (torch.bfloat16, torch.float32)
    policy = MixedPrecisionPolicy(*dtypes, cast_forward_inputs=False) if on_gpu else None
    options = {"mp_policy": policy} if policy else {}
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    optimizer = adamw(model.parameters())

    def step(x: Tensor) -> None:
        loss_of(model, x).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()  # here, so that no engine holds gradients between steps

    return step


def zero_step(model: nn.Module, stage: int, on_gpu: bool, batch: int) -> Callable[[Tensor], None]:
    engine, _, _, _ = zeroshard.initialize(
        model=model,
        optimizer=adamw(model.parameters()),
        config={
            "train_micro_batch_size_per_gpu": batch,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": on_gpu},
            "zero_optimization": {"stage": stage},
        },
    )

    def step(x: Tensor) -> None:
        engine.backward(loss_of(engine, x))
        engine.step()

    return step


def timed(step: Callable[[Tensor], None], x: Tensor, on_gpu: bool) -> tuple[float, float]:
    """Seconds until the slowest rank is done, and peak GiB above what was allocated before."""
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    dist.barrier()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    start = time.perf_counter()
    step(x)
    if on_gpu:
        torch.cuda.synchronize()
    dist.barrier()
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    return time.perf_counter() - start, peak / 2**30


def main() -> None:
    """Measure and print on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    records.add_out(parser)
    args = parser.parse_args()
    zeroshard.init_distributed()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    torch.manual_seed(0)
    config = SIZES[args.size]
    with device:
        model = Llama(config)
    steps = {"fsdp2": fsdp2_step(copy.deepcopy(model), on_gpu)}
    for stage in (1, 2, 3):
        steps[f"zeroshard-{stage}"] = zero_step(copy.deepcopy(model), stage, on_gpu, args.batch)
    numel = sum(p.numel() for p in model.parameters())
    del model
    x = torch.randint(0, config.vocab_size, (args.batch, config.context), device=device)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peaks: dict[str, float] = {}
    for number in range(args.rounds + 3):
        for name, step in steps.items():
            elapsed, peaks[name] = timed(step, x, on_gpu)
            if number >= 3:  # the first rounds warm up
                seconds[name].append(elapsed)
    if dist.get_rank() == 0:
        workload = {
            "size": args.size,
            "parameters": numel,
            "tokens": x.numel(),
            "rounds": args.rounds,
        }
        report(args, workload, seconds, peaks if on_gpu else {})
    dist.destroy_process_group()


def report(
    args: argparse.Namespace,
    workload: dict[str, Any],
    seconds: dict[str, list[float]],
    peaks: dict[str, float],
) -> None:
    """Print a line for each engine, and write its record."""
    source = records.origin(args.commit)
    for name, own in seconds.items():
        result: dict[str, Any] = {
            **records.times(own, seconds["fsdp2"]),
            "tokens_per_s_per_rank": round(workload["tokens"] / statistics.median(own), 1),
            **({"step_peak_gib": round(peaks[name], 3)} if peaks else {}),
        }
        peak = f"   {peaks[name]:6.2f} GiB" if peaks else ""
        ratio = result["time_ratio"]
        print(f"{name:12} {1e3 * result['median_s']:8.2f} ms   x {ratio:.3f}{peak}")
        ranks = dist.get_world_size()
        records.write(
            args.out, [records.record(source, "against_fsdp2", ranks, workload, name, result)]
        )


if __name__ == "__main__":
    main()
