"""Train a small Llama on Python's standard library, then measure what each ZeRO stage holds.

    zeroshard --num_gpus 2 examples/train_lm.py --deepspeed_config examples/ds_config.json

The text is the source code that came with your Python. Two CPU cores need about two minutes; where
GPUs are visible, the same command uses them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from llama import Llama, LlamaConfig, sample
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from stdlib_text import load_text, random_windows, spread_windows, unigram_entropy
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import zeroshard
from zeroshard.core.lifetime import state_bytes

MODEL = LlamaConfig()
SEED = 1
WARMUP_STEPS = 50
REPORT_EVERY = 10
LINE_EVERY = 50
HELD_OUT_WINDOWS_PER_RANK = 64


def main() -> None:
    args = parse_arguments()
    zeroshard.init_distributed()
    rank, world = dist.get_rank(), dist.get_world_size()
    console = Console(quiet=rank != 0, highlight=False, soft_wrap=True)
    config = read_config(args)

    train, held_out = load_text()
    entropy = unigram_entropy(train, held_out)
    console.print(
        f"text: {len(train):,} bytes to train on, {len(held_out):,} held out\n"
        f"unigram entropy: {entropy:.3f} nats, {entropy / math.log(2):.3f} bits per held-out byte"
    )

    engine = build_engine(config, args.steps)
    console.print(
        f"model: {count_parameters():,} parameters, {number_of(world, 'rank')}, "
        f"ZeRO stage {config.get('zero_optimization', {}).get('stage', 0)}, "
        f"{'bf16' if is_on(config, 'bf16') else 'fp16' if is_on(config, 'fp16') else 'fp32'}, "
        f"{number_of(engine.train_micro_batch_size_per_gpu(), 'sequence')} per rank"
    )
    console.print(f"held-out loss before: {held_out_loss(engine, held_out):.3f} nats per byte")

    generator = torch.Generator().manual_seed(SEED + rank)
    micro_batch = engine.train_micro_batch_size_per_gpu()
    num_micro_steps = args.steps * engine.gradient_accumulation_steps()
    since = time.perf_counter()
    with progress_bar(console) as bar:
        task = bar.add_task("train", total=num_micro_steps, status="")
        for micro_step in range(1, num_micro_steps + 1):
            x, y = random_windows(train, micro_batch, MODEL.context, generator)
            loss = engine(x.to(engine.device), y.to(engine.device))
            engine.backward(loss)
            engine.step()

            bar.advance(task)
            if micro_step % REPORT_EVERY == 0:
                # Reading the loss waits for the device, so it is read now and then only.
                mean, now = mean_over_ranks(loss), time.perf_counter()
                num_tokens = REPORT_EVERY * world * micro_batch * MODEL.context
                status = (
                    f"loss {mean:.3f}  {num_tokens / (now - since):,.0f} tokens/s  "
                    f"{engine.memory().total_bytes / 1e6:.1f} MB of state per rank"
                )
                since = now
                bar.update(task, status=status)
                if micro_step % LINE_EVERY == 0 and not console.is_terminal:
                    console.print(f"step {micro_step:>4}/{num_micro_steps}  {status}")

    after = held_out_loss(engine, held_out)
    console.print(f"held-out loss after: {after:.3f} nats, {after / math.log(2):.3f} bits per byte")

    console.print("\nsample:")
    console.print(continue_text(engine, b"def ", num_bytes=400), markup=False)
    engine.destroy()

    console.print()
    console.print(stage_table(config))
    dist.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=800, help="optimizer steps, at least 1")
    parser.add_argument(
        "--batch", type=int, help="sequences per rank (default: the JSON's, or 64 on GPUs)"
    )
    zeroshard.add_config_arguments(parser)
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    return args


def read_config(args: argparse.Namespace) -> dict[str, Any]:
    """Read the JSON; on GPUs train in bf16, with a batch that keeps them busy."""
    path = Path(args.deepspeed_config or Path(__file__).with_name("ds_config.json"))
    config = json.loads(path.read_text())
    if torch.cuda.is_available():
        if "fp16" not in config:
            config.setdefault("bf16", {"enabled": True})
        config["train_micro_batch_size_per_gpu"] = 64
    if args.batch:
        config["train_micro_batch_size_per_gpu"] = args.batch
    return config


def build_engine(config: dict[str, Any], num_steps: int) -> zeroshard.Engine:
    torch.manual_seed(SEED)
    engine, _, _, _ = zeroshard.initialize(
        model=Llama(MODEL),
        config=config,
        lr_scheduler=lambda optimizer: LambdaLR(
            optimizer, partial(warmup_then_cosine, num_steps=num_steps)
        ),
    )
    return engine


def warmup_then_cosine(step: int, num_steps: int) -> float:
    """Share of the learning rate: up in a line, down in half a cosine to a twentieth."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / num_steps))
    return min(1.0, (step + 1) / WARMUP_STEPS) * (0.05 + 0.95 * cosine)


def mean_over_ranks(value: Tensor) -> float:
    total = value.detach().float().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def held_out_loss(engine: zeroshard.Engine, held_out: Tensor) -> float:
    """Nats per byte on windows spread over the held-out files, each rank reading its share."""
    rank, world = dist.get_rank(), dist.get_world_size()
    x, y = spread_windows(held_out, HELD_OUT_WINDOWS_PER_RANK * world, MODEL.context)
    engine.eval()
    with torch.no_grad():
        loss = engine(x[rank::world].to(engine.device), y[rank::world].to(engine.device))
    engine.train()
    return mean_over_ranks(loss)


def continue_text(engine: zeroshard.Engine, prompt: bytes, num_bytes: int) -> str:
    """Let the model write. All ranks take part, since each holds a piece of every layer."""
    start = torch.tensor([list(prompt)], device=engine.device)
    engine.eval()
    tokens = sample(engine.module, start, num_bytes, context=MODEL.context, temperature=0.8)
    # A terminal should not get control bytes from a model that has not learnt to avoid them.
    written = tokens[0].tolist()
    return "".join(chr(byte) if 32 <= byte < 127 or byte == 10 else "?" for byte in written)


def stage_table(config: dict[str, Any]) -> Table:
    """Train one step under each stage and put the bytes held next to the ZeRO formulas."""
    world = dist.get_world_size()
    numel = count_parameters()
    # Gradients are summed in fp32. Adam keeps two moments, and fp32 weights beside 16-bit ones.
    is_16_bit = is_on(config, "bf16") or is_on(config, "fp16")
    widths = (2, 4, 12) if is_16_bit else (4, 4, 8)
    table = Table(title=f"MB per rank on {number_of(world, 'rank')}: measured (formula)")
    for heading in ("stage", "parameters", "gradients", "optimizer", "total"):
        table.add_column(heading, justify="right")
    for stage in (0, 1, 2, 3):
        engine = build_engine({**config, "zero_optimization": {"stage": stage}}, num_steps=1)
        x = torch.zeros(1, 64, dtype=torch.long, device=engine.device)
        for _ in range(engine.gradient_accumulation_steps()):
            engine.backward(engine(x, x))
            engine.step()
        held = engine.memory()
        engine.destroy()
        formula = state_bytes(stage, numel, world, *widths)
        pairs = [
            (held.parameters_bytes, formula.parameters),
            (held.gradients_bytes, formula.gradients),
            (held.optimizer_bytes, formula.optimizer),
            (held.total_bytes, formula.total),
        ]
        cells = [f"{measured / 1e6:.2f} ({ideal / 1e6:.2f})" for measured, ideal in pairs]
        table.add_row(str(stage), *cells)
    return table


def is_on(config: dict[str, Any], block: str) -> bool:
    return bool(config.get(block, {}).get("enabled"))


def number_of(count: int, thing: str) -> str:
    return f"{count} {thing}" + ("" if count == 1 else "s")


def count_parameters() -> int:
    with torch.device("meta"):
        return sum(param.numel() for param in Llama(MODEL).parameters())


def progress_bar(console: Console) -> Progress:
    """A live bar on rank 0's terminal; where output goes to a file, nothing."""
    columns = BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[status]}")
    return Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        disable=console.quiet or not console.is_terminal,
    )


if __name__ == "__main__":
    main()
