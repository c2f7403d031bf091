"""Checks of the Triton kernel that steps Adam; one process, one JSON object per check.

    python tests/gpu/adam_checks.py                            on a GPU
    TRITON_INTERPRET=1 python tests/gpu/adam_checks.py --toy   anywhere, by Triton's interpreter

The kernel is compared with torch.optim on the same gradients, then inside an engine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zeroshard
from zeroshard.core.lifetime import STAGES
from zeroshard.engine import build
from zeroshard.optim import fused, kernels, sharded
from zeroshard.optim.adam import Rule, Shards

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")
# A gradient as small as eps turns its rounding into a part of a whole step; of millions, some are.
LR, BETAS, EPS = 1e-2, (0.9, 0.999), 1e-3
WEIGHTS = {"rtol": 2e-6, "atol": 1e-6}  # a step moves a weight by about LR; rounding is 1e-7 of it
AVERAGES = {"rtol": 1e-5, "atol": 5e-7}  # of numbers up to 5 that may cancel
MANY = 2**31 + 5000


def rule(step: int, *, decay: float, decoupled: bool) -> Rule:
    """The numbers that torch is given here, too."""
    return Rule(LR, *BETAS, EPS, decay, decoupled, step)


def check_cast(out: Tensor, master: Tensor) -> None:
    """What gathers read is the rounded master weight; the interpreter cuts bf16 off instead."""
    if IS_INTERPRETED and out.dtype == torch.bfloat16:
        torch.testing.assert_close(out.float(), master, rtol=2**-7, atol=0)
    else:
        assert torch.equal(out, master.to(out.dtype)), "the compute dtype is not the master's cast"


def interpreted_update(
    shards: Shards, rule: Rule, factor: Tensor, found_inf: Tensor | None
) -> None:
    """The kernel, with the cast that GPUs do: the engine checks that it is the master's."""
    kernels.update_(shards, rule, factor, found_inf)
    if shards.out is not None:
        shards.out.copy_(shards.master)


def check_kernel(sizes: list[int]) -> None:
    """All dtypes, formulas and sizes, a few steps each; a step that is skipped changes nothing."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    formulas = ((torch.optim.AdamW, 0.1), (torch.optim.Adam, 0.1), (torch.optim.Adam, 0.0))
    found_inf = torch.ones((), device=DEVICE)
    for numel, dtype, (kind, decay) in itertools.product(sizes, dtypes, formulas):
        master = torch.randn(numel, device=DEVICE)
        param = nn.Parameter(master.clone())
        optimizer = kind([param], lr=LR, betas=BETAS, eps=EPS, weight_decay=decay, fused=True)
        average, square = torch.zeros_like(master), torch.zeros_like(master)
        out = None if dtype == torch.float32 else torch.empty_like(master, dtype=dtype)
        for step in range(1, 5):
            grad, factor = torch.randn_like(master).to(dtype), torch.rand((), device=DEVICE)
            param.grad = grad.float() * factor
            optimizer.step()
            shards = Shards(grad, master, average, square, out)
            now = rule(step, decay=decay, decoupled=kind is torch.optim.AdamW)
            kernels.update_(shards, now, factor, None)
            before = [tensor.clone() for tensor in (master, average, square)]
            kernels.update_(shards, now, factor, found_inf)
            for one, other in zip(before, (master, average, square), strict=True):
                assert torch.equal(one, other), "a skipped step changed something"
        torch.testing.assert_close(master, param.detach(), **WEIGHTS)
        torch.testing.assert_close(average, optimizer.state[param]["exp_avg"], **AVERAGES)
        torch.testing.assert_close(square, optimizer.state[param]["exp_avg_sq"], **AVERAGES)
        if out is not None:
            check_cast(out, master)


def check_unaligned() -> None:
    """A run that begins and ends anywhere leaves its neighbours alone."""
    numel, start, stop = 5000, 3, 4097
    whole = [torch.randn(numel, device=DEVICE).abs() for _ in range(4)]
    out = torch.zeros(numel, dtype=torch.bfloat16, device=DEVICE)
    before = [tensor.clone() for tensor in whole]
    grad, master, average, square = (tensor[start:stop] for tensor in whole)
    factor = torch.ones((), device=DEVICE)
    shards = Shards(grad, master, average, square, out[start:stop])
    kernels.update_(shards, rule(1, decay=0.1, decoupled=True), factor, None)
    for tensor, old in zip(whole[1:], before[1:], strict=True):
        assert torch.equal(tensor[:start], old[:start])
        assert torch.equal(tensor[stop:], old[stop:])
        assert not torch.equal(tensor[start:stop], old[start:stop])
    assert not out[:start].any()
    assert not out[stop:].any()
    check_cast(out[start:stop], master)


def check_many_elements() -> None:
    """Elements beyond 2^31 are stepped like the first ones."""
    few = [torch.randn(5000, device=DEVICE) for _ in range(2)]
    out = torch.zeros(MANY, dtype=torch.bfloat16, device=DEVICE)
    grad, master = torch.zeros_like(out), torch.zeros(MANY, device=DEVICE)
    average, square = torch.zeros_like(master), torch.zeros_like(master)
    for part in (slice(0, 5000), slice(MANY - 5000, MANY)):
        grad[part], master[part] = few[0].bfloat16(), few[1]
    factor = torch.ones((), device=DEVICE)
    shards = Shards(grad, master, average, square, out)
    kernels.update_(shards, rule(1, decay=0.1, decoupled=True), factor, None)
    assert not torch.equal(master[:5000], few[1])
    for tensor in (master, average, square, out):
        assert torch.equal(tensor[:5000], tensor[-5000:]), "the ends differ"
        assert not tensor[5000:-5000].any(), "padding became a number"


class Net(nn.Module):
    """Blocks of matrices and vectors, some of odd size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 37), nn.Linear(37, width))
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def make_engine(how: str, stage: int, width: int, config: dict[str, Any]) -> Any:
    """An engine of two param groups: vectors do not decay."""
    torch.manual_seed(1)
    model = Net(width).to(DEVICE)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    # A large eps passes rounding on as it is, where a small one makes whole steps of it.
    optimizer = torch.optim.AdamW(groups, lr=LR, eps=0.1, fused=True)
    full = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage},
        "zeroshard": {"optimizer_step": how},
        **config,
    }
    return zeroshard.initialize(model=model, optimizer=optimizer, config=full)[0]


def train(engine: Any, steps: range, width: int) -> None:
    """Steps on data of their own numbers."""
    dtype = next(engine.module.parameters()).dtype
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = (torch.randn(4, width, generator=generator).to(DEVICE, dtype) for _ in range(2))
        engine.backward(F.mse_loss(engine(x).float(), y.float()))
        engine.step()


def compare(one: Any, other: Any, what: str) -> None:
    """Master weights and state of two engines agree up to rounding."""
    for ours, theirs in zip(one.runtime.units, other.runtime.units, strict=True):
        # Weights in a half precision may fall on either side of a rounding.
        atol = 1e-5 if ours.shard_to_write() is None else 5e-5
        torch.testing.assert_close(
            ours.master, theirs.master, rtol=1e-5, atol=atol, msg=lambda m: f"{what}: {m}"
        )
        out = ours.shard_to_write()
        if out is not None:
            check_cast(out, ours.master)


def check_engine(width: int) -> None:
    """Every stage and precision, saved in the middle and gone on with by the other kind of step."""
    half: dict[str, Any] = {"communication_data_type": "bf16"}
    precisions: dict[str, dict[str, Any]] = {
        "fp32": {},
        "bf16": {"bf16": {"enabled": True}, **half},
        "bf16 x 2": {"bf16": {"enabled": True}, "gradient_accumulation_steps": 2, **half},
        "fp16": {"fp16": {"enabled": True, "initial_scale_power": 10}},
    }
    for stage, (name, config) in itertools.product((1, 3), precisions.items()):
        what = f"stage {stage}, {name}"
        engines = [make_engine(how, stage, width, config) for how in ("fused", "torch")]
        with tempfile.TemporaryDirectory() as folder:
            for engine, tag in zip(engines, ("fused", "torch"), strict=True):
                train(engine, range(4), width)
                engine.save_checkpoint(folder, tag=tag)
                train(engine, range(4, 6), width)
            compare(*engines, what)
            for engine, tag in zip(engines, ("torch", "fused"), strict=True):
                engine.load_checkpoint(folder, tag=tag)
                train(engine, range(4, 6), width)
            compare(*engines, f"{what}, resumed")
        assert engines[0].optimizer._sharded._fused._triton is not None, "Triton did not step"
        for engine in engines:
            engine.destroy()


def check_no_wait(width: int) -> None:
    """A step in bf16 makes the host wait for nothing."""
    engine = make_engine("fused", 3, width, {"bf16": {"enabled": True}})
    train(engine, range(3), width)
    x = torch.randn(4, width, device=DEVICE, dtype=torch.bfloat16)
    for _ in range(2):
        engine.backward(engine(x).float().square().mean())
        torch.cuda.set_sync_debug_mode("error")
        try:
            engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    engine.destroy()


def main() -> int:
    """Run the checks; say how each went."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="small sizes")
    args = parser.parse_args()
    torch.manual_seed(0)
    zeroshard.init_distributed()
    build.lifetime = lambda stage, world: STAGES[stage]  # one rank that lives as several do
    if IS_INTERPRETED:
        sharded.triton_update = lambda device: interpreted_update
    else:
        assert fused.triton_update(DEVICE) is not None, "Triton does not run here"
    sizes = [1, 7, 1024, 1025, 4096] if args.toy else [1, 7, 1025, 4096, 1_000_003, 2**24]
    width = 24 if args.toy else 256
    checks: dict[str, Callable[[], None]] = {
        "adam kernel": lambda: check_kernel(sizes),
        "adam kernel, unaligned": check_unaligned,
        "adam in an engine": lambda: check_engine(width),
    }
    if not IS_INTERPRETED:
        checks["adam without a wait"] = lambda: check_no_wait(width)
        if torch.cuda.mem_get_info()[1] > 60 * 2**30:
            checks["adam kernel, many elements"] = check_many_elements
    is_ok = True
    for name, check in checks.items():
        line: dict[str, Any] = {"check": name, "ok": True}
        try:
            check()
        except Exception as error:
            line |= {"ok": False, "error": f"{error}"[:2000], "at": traceback.format_exc()[-1500:]}
        is_ok = is_ok and line["ok"]
        print(json.dumps(line), flush=True)
    return 0 if is_ok else 1


if __name__ == "__main__":
    sys.exit(main())
