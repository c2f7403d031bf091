"""Activation checkpointing on a GPU: equal bits, less memory, and transfers that never race.

The checks run in a process of their own, because tests hide GPUs from themselves. Without a GPU
they run at toy size, where what only a GPU has is left out:

    python tests/gpu/test_activation_checkpointing.py [--toy]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zeroshard import checkpointing
from zeroshard.checkpointing import checkpoint

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "host": {"checkpoint_in_cpu": True},
    "host, one buffer": {
        "checkpoint_in_cpu": True,
        "contiguous_checkpointing": True,
        "num_checkpoints": 12,
    },
    "host, small buffer": {
        "checkpoint_in_cpu": True,
        "contiguous_checkpointing": True,
        "num_checkpoints": 3,
    },
}


class Layer(nn.Module):
    """Holds several times its input for backward, and draws random numbers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        return h + F.dropout(self.down(F.dropout(F.gelu(self.up(h)), 0.2)), 0.1)


class Thin(nn.Module):
    """Computes so little that its input is still on the way when the next layer begins."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, h: Tensor) -> Tensor:
        return F.dropout(h * self.scale, 0.1).tanh()


class Context:
    """The device, and sizes for it."""

    def __init__(self, toy: bool) -> None:
        self.on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.on_gpu else "cpu")
        self.rows, self.width = (64, 32) if toy else (16384, 1024)

    def layers(self, kind: type[Layer] | type[Thin], number: int = 12) -> nn.ModuleList:
        torch.manual_seed(0)
        with self.device:
            return nn.ModuleList(kind(self.width) for _ in range(number))

    def input(self, seed: int) -> Tensor:
        torch.manual_seed(seed)
        x = torch.randn(self.rows, self.width, device=self.device, requires_grad=True)
        return F.dropout(x, 0.1)

    def forward(self, layers: nn.ModuleList, seed: int, how: Callable[..., Any]) -> Tensor:
        h = self.input(seed)
        for layer in layers:
            h = how(layer, h)
        return h.square().mean()

    def grads(self, layers: nn.ModuleList, seed: int, how: Callable[..., Any]) -> list[Tensor]:
        layers.zero_grad()
        self.forward(layers, seed, how).backward()
        return [param.grad.clone() for param in layers.parameters() if param.grad is not None]

    def allocated(self) -> int:
        gc.collect()
        return torch.cuda.memory_allocated() if self.on_gpu else 0


def direct(layer: nn.Module, h: Tensor) -> Tensor:
    return layer(h)


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def check_bits(ctx: Context) -> dict[str, Any]:
    """Gradients with dropout are equal in every bit, step after step."""
    result: dict[str, Any] = {}
    for kind in (Layer, Thin):
        layers = ctx.layers(kind)
        want = [ctx.grads(layers, seed, direct) for seed in range(3)]
        for mode, settings in MODES.items():
            checkpointing.configure(**settings)
            result[f"{kind.__name__}, {mode}"] = all(
                same(ctx.grads(layers, seed, checkpoint), want[seed]) for seed in range(3)
            )
    return {"ok": all(result.values()), **result}


def check_streams(ctx: Context) -> dict[str, Any]:
    """Named streams of the device's random numbers are drawn again, too."""
    tracker = checkpointing.get_cuda_rng_tracker()

    def function(h: Tensor) -> Tensor:
        with tracker.fork():
            return F.dropout(F.dropout(h, 0.3), 0.3) ** 2

    def train(how: Callable[..., Any]) -> list[Tensor]:
        checkpointing.model_parallel_cuda_manual_seed(3)
        x = torch.ones(ctx.rows, ctx.width, device=ctx.device, requires_grad=True)
        h = how(function, how(function, x * 2))
        (grad,) = torch.autograd.grad(h.sum(), x)
        return [grad, torch.rand(3, device=ctx.device), *tracker.get_states().values()]

    checkpointing.configure(checkpoint_in_cpu=True)
    want = train(lambda function, h: function(h))
    return {"ok": same(train(checkpoint), want)}


def check_dropped(ctx: Context) -> dict[str, Any]:
    """Graphs that are dropped, kept and interleaved leave the others' numbers alone.

    The memory of a dropped graph is handed out and overwritten at once, so a transfer that still
    used it would be seen.
    """
    layers = ctx.layers(Thin)
    want = [ctx.grads(layers, seed, direct) for seed in range(3)]
    ok: dict[str, bool] = {}
    for mode, settings in MODES.items():
        checkpointing.configure(**settings)
        found = []
        for turn in range(4):
            ctx.forward(layers, 9, checkpoint)  # dropped before its inputs have left
            junk = [torch.full_like(ctx.input(5), turn) for _ in range(4)]
            found.append(same(ctx.grads(layers, 0, checkpoint), want[0]))

            graphs = [ctx.forward(layers, seed, checkpoint) for seed in range(3)]
            for seed in (1, 0, 2):
                layers.zero_grad()
                graphs[seed].backward(retain_graph=seed == 0)
                grads = [p.grad.clone() for p in layers.parameters() if p.grad is not None]
                found.append(same(grads, want[seed]))
            layers.zero_grad()
            graphs[0].backward()
            grads = [p.grad.clone() for p in layers.parameters() if p.grad is not None]
            found.append(same(grads, want[0]))
            del graphs, junk

            # A backward that ends on the way: what was coming back is no longer wanted.
            def stop(grad: Tensor) -> None:
                raise KeyError

            half = ctx.forward(layers[:6], 1, checkpoint)
            handle = layers[3].scale.register_hook(stop)
            try:
                half.backward()
            except KeyError:
                pass
            else:
                found.append(False)
            handle.remove()
            del half
            junk = [torch.full_like(ctx.input(5), -turn) for _ in range(4)]
            found.append(same(ctx.grads(layers, 2, checkpoint), want[2]))
            del junk
        ok[mode] = all(found)
    return {"ok": all(ok.values()), **ok}


def check_memory(ctx: Context) -> dict[str, Any]:
    """Peaks: all intermediates, then one input a layer, then three inputs, plus one layer's own."""
    if not ctx.on_gpu:
        return {"ok": True, "skipped": "only a GPU counts its memory"}
    layers = ctx.layers(Layer)
    one_input = ctx.rows * ctx.width * 4
    peaks: dict[str, float] = {}
    for mode, settings in {"none": {}, **MODES}.items():
        checkpointing.configure(**settings)
        how = direct if mode == "none" else checkpoint
        ctx.forward(layers, 0, how).backward()
        before = ctx.allocated()
        torch.cuda.reset_peak_memory_stats()
        ctx.forward(layers, 0, how).backward()
        peaks[mode] = round((torch.cuda.max_memory_allocated() - before) / one_input, 2)
    # What one layer needs while it runs backward, in inputs.
    alone = ctx.layers(Layer, 1)
    ctx.forward(alone, 0, direct).backward()
    before = ctx.allocated()
    torch.cuda.reset_peak_memory_stats()
    ctx.forward(alone, 0, direct).backward()
    working = (torch.cuda.max_memory_allocated() - before) / one_input
    ok = peaks["plain"] <= 12 + working + 2
    ok &= all(peaks[mode] <= 3 + working + 2 for mode in MODES if mode != "plain")
    ok &= peaks["none"] > 2 * peaks["plain"]
    return {"ok": ok, "inputs_of_one_layer_alone": round(working, 2), **peaks}


def check_nothing_grows(ctx: Context) -> dict[str, Any]:
    """Steps, with graphs dropped between them, leave device and host memory as they were."""
    layers = ctx.layers(Thin)
    ok: dict[str, bool] = {}
    for mode, settings in MODES.items():
        checkpointing.configure(**settings)
        sizes = []
        for step in range(8):
            ctx.grads(layers, step, checkpoint)
            ctx.forward(layers, step, checkpoint)
            sizes.append(ctx.allocated())
        ok[mode] = len(set(sizes[2:])) == 1
    return {"ok": all(ok.values()), **ok}


def check_overlap(ctx: Context) -> dict[str, Any]:
    """Some of the time of transfers lies under kernels, both ways."""
    if not ctx.on_gpu:
        return {"ok": True, "skipped": "only on a GPU"}
    layers = ctx.layers(Layer)
    checkpointing.configure(checkpoint_in_cpu=True)
    for _ in range(3):
        ctx.grads(layers, 0, checkpoint)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        ctx.grads(layers, 0, checkpoint)
        torch.cuda.synchronize()
    spans: dict[str, list[tuple[float, float]]] = {"DtoH": [], "HtoD": [], "kernels": []}
    for event in profile.events() or []:
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        kind = next((kind for kind in ("DtoH", "HtoD") if kind in event.name), "kernels")
        if kind == "kernels" and ("zeroshard::" in event.name or "Memcpy" in event.name):
            continue
        spans[kind].append((event.time_range.start, event.time_range.end))
    result: dict[str, Any] = {"ok": True}
    for kind in ("DtoH", "HtoD"):
        long = [span for span in spans[kind] if span[1] - span[0] > 20]  # microseconds
        hidden = sum(any(a < end and b > start for a, b in spans["kernels"]) for start, end in long)
        result[kind] = {"transfers": len(long), "beside_kernels": hidden}
        result["ok"] &= len(long) >= 10 and hidden >= len(long) // 2
    return result


CHECKS = (
    check_bits,
    check_streams,
    check_dropped,
    check_memory,
    check_nothing_grows,
    check_overlap,
)


def main() -> None:
    """Run all checks and print a JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="sizes for a CPU")
    ctx = Context(parser.parse_args().toy)
    torch.use_deterministic_algorithms(True)
    for check in CHECKS:
        print(json.dumps({"check": check.__name__, **check(ctx)}), flush=True)


def run_checks(*options: str, env: dict[str, str] | None = None) -> dict[str, dict[str, Any]]:
    command = [sys.executable, str(Path(__file__)), *options]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=env
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["check"]: line for line in lines}


def test_the_checks_for_gpus_pass_at_toy_size_on_a_cpu() -> None:
    results = run_checks("--toy")
    assert len(results) == len(CHECKS)
    assert {name: line for name, line in results.items() if not line["ok"]} == {}


@pytest.mark.gpu
@pytest.mark.timeout(400)
def test_a_gpu_has_equal_bits_less_memory_and_no_races() -> None:
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    visible = os.environ["TEST_GPUS_VISIBLE"]
    results = run_checks(env=env | ({"CUDA_VISIBLE_DEVICES": visible} if visible else {}))
    assert len(results) == len(CHECKS)
    assert {name: line for name, line in results.items() if not line["ok"]} == {}


if __name__ == "__main__":
    main()
