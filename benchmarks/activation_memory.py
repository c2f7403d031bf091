"""What activation checkpointing saves and costs: memory and time of forward and backward.

    python benchmarks/activation_memory.py [--layers 4] [--hidden 128] [--context 128] [--batch 2]
    python benchmarks/activation_memory.py --layers 32 --hidden 4096 --context 4096 --batch 2

One process, plain PyTorch, each layer of a Llama checkpointed; bf16 on a GPU, fp32 on a CPU. The
ways take turns, so that a change of the machine's speed hits all alike. A way that does not fit
into memory is left out. Figures:

* activations: on a GPU, the peak of allocated memory over weights and gradients; on a CPU, where
  host and device are one, what autograd holds outside the host's copies;
* reserved: on a GPU, the peak of memory taken from the driver over weights and gradients, which
  shows fragmentation;
* time: the median over turns of (step of this way / step without checkpointing of the same turn).

A line of JSON for each way is appended to DIR/activation_memory.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from side_by_side import records
from zeroshard import checkpointing

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from llama import Llama, LlamaConfig

HEAD_DIM = 128


class Layers(Llama):
    """A Llama that calls its layers the way it is told."""

    call: Callable[..., Any]

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        h = self.embedding(tokens)
        for block in self.blocks:
            h = self.call(block, h, cos, sin)
        return self.head(self.norm(h)).float().square().mean()


def plain(block: Callable[..., Tensor], *args: Any) -> Tensor:
    return block(*args)


def torchs_own(block: Callable[..., Tensor], *args: Any) -> Tensor:
    return torch_checkpoint(block, *args, use_reentrant=False)


@dataclass
class Way:
    """How layers are called, what is configured for that, and what was measured."""

    call: Callable[..., Any]
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    activation_bytes: int = 0
    reserved_bytes: int = 0
    is_too_large: bool = False


def ways(layers: int) -> dict[str, Way]:
    host: dict[str, Any] = {"checkpoint_in_cpu": True}
    buffer = {"contiguous_checkpointing": True, "num_checkpoints": layers}
    return {
        "none": Way(plain),
        "torch": Way(torchs_own),
        "checkpoint": Way(checkpointing.checkpoint),
        "cpu": Way(checkpointing.checkpoint, host),
        "cpu, contiguous": Way(checkpointing.checkpoint, host | buffer),
    }


def on_gpu_bytes(step: Callable[[], None]) -> tuple[int, int]:
    """Peaks of allocated and of reserved memory in a step, over what there is before it."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    step()
    torch.cuda.synchronize()
    return (
        torch.cuda.max_memory_allocated() - allocated,
        torch.cuda.max_memory_reserved() - reserved,
    )


def saved_bytes(model: Layers, step: Callable[[], None]) -> int:
    """Bytes that autograd saves in a step, each storage once, those of the model left out."""
    own = [*model.parameters(), *model.buffers()]
    addresses = {tensor.untyped_storage().data_ptr() for tensor in own}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in addresses:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storages.values())


def turn(way: Way, model: Layers, tokens: Tensor, steps: int) -> None:
    """Some steps of one way; the first is not timed, and its memory is measured."""
    checkpointing.configure(**way.settings)
    model.call = way.call

    def step() -> None:
        for param in model.parameters():
            if param.grad is not None:
                param.grad.zero_()
        model(tokens).backward()

    if tokens.is_cuda:
        step()  # pinned memory and kernels are there from now on
        way.activation_bytes, way.reserved_bytes = on_gpu_bytes(step)
    else:
        way.activation_bytes = saved_bytes(model, step)
    for _ in range(steps):
        start = time.perf_counter()
        step()
        if tokens.is_cuda:
            torch.cuda.synchronize()
        way.seconds.append(time.perf_counter() - start)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128, help="a multiple of 128")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps in a turn")
    records.add_out(parser)
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.manual_seed(0)
    heads = max(args.hidden // HEAD_DIM, 1)
    sizes = LlamaConfig(256, args.context, args.layers, heads, heads, args.hidden, 3 * args.hidden)
    with device:
        model = Layers(sizes)
        tokens = torch.randint(256, (args.batch, args.context))
    if on_gpu:
        model.bfloat16()
    measured = ways(args.layers)
    for _ in range(args.turns):
        for way in measured.values():
            if way.is_too_large:
                continue
            try:
                turn(way, model, tokens, args.steps)
            except torch.OutOfMemoryError:
                way.is_too_large = True
            if way.is_too_large:
                gc.collect()  # the graph of the step that failed
                torch.cuda.empty_cache()
    report(args, measured)


def report(args: argparse.Namespace, measured: dict[str, Way]) -> None:
    """Print a line for each way, and write its record."""
    source = records.origin(args.commit)
    first = next(way for way in measured.values() if not way.is_too_large)
    names = ("layers", "hidden", "context", "batch", "turns", "steps")
    workload = {name: getattr(args, name) for name in names}
    for name, way in measured.items():
        if way.is_too_large:
            print(f"{name:16} does not fit")
            one = records.record(
                source, "activation_memory", 1, workload, name, None, status="out of memory"
            )
            records.write(args.out, [one])
            continue
        ratios = [a / b for a, b in zip(way.seconds, first.seconds, strict=True)]
        result: dict[str, Any] = {
            "median_s": round(statistics.median(way.seconds), 6),
            "min_s": round(min(way.seconds), 6),
            "max_s": round(max(way.seconds), 6),
            "time_ratio": round(statistics.median(ratios), 3),
            "activation_mib": round(way.activation_bytes / 2**20, 2),
            "reserved_mib": round(way.reserved_bytes / 2**20, 2),
        }
        share = way.activation_bytes / first.activation_bytes
        print(
            f"{name:16} {result['activation_mib']:10.2f} MiB x {share:.3f}"
            f"   {1e3 * result['median_s']:8.2f} ms x {result['time_ratio']:.3f}"
            f"   {result['reserved_mib']:10.2f} MiB reserved"
        )
        one = records.record(source, "activation_memory", 1, workload, name, result)
        records.write(args.out, [one])


if __name__ == "__main__":
    main()
