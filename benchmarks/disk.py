"""Bytes per second to and from a disk in steps whose optimizer state is in files.

    zeroshard --num_gpus 1 benchmarks/disk.py --path /mnt/nvme
    zeroshard --num_gpus 1 benchmarks/disk.py --path /mnt/nvme --engines zeroshard-2

A Llama of 1.1 billion parameters trains with 12 bytes of state for each in files of the folder.
What the kernel says that the ranks have read and written in the timed steps, over their time, is
compared with what the bare disk does in the same run, before and after: threads that read and write
blocks past the page cache, both at once or one after the other, whichever is faster.

A line of JSON for each engine is appended to DIR/disk.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM

import zeroshard
from side_by_side import bare_disk, records, render
from side_by_side.bare_disk import Rates
from side_by_side.claims import CLAIMS
from side_by_side.engines import adamw, llama_config, zeroshard_configuration
from side_by_side.workload import Shape, Variant

SHAPE = Shape(2048, 16, 32, 8, 8192, 32000)
TOY = Shape(64, 2, 4, 2, 128, 256)
_GIB, _GB = 2**30, 10**9


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    engines = ",".join(CLAIMS["offload-nvme"].engines)
    add("--engines", default=engines, help="names, separated by commas, of zeroshard engines")
    add("--path", type=Path, default=Path(), help="a folder on the disk; default the current one")
    add("--batch", type=int, default=1)
    add("--seq", type=int, default=2048)
    add("--steps", type=int, default=3, help="steps in the measurement, after two that warm up")
    add("--file-gib", type=float, default=4.0, help="of the file that the bare disk is tried with")
    add("--toy", action="store_true", help="sizes for a CPU")
    records.add_out(parser)
    args = parser.parse_args()
    if args.toy:
        args.seq, args.file_gib = 32, 1 / 32
    return args


def io_bytes() -> tuple[int, int]:
    """Bytes that the ranks have read from disks and written to them so far. A collective."""
    own = psutil.Process().io_counters()
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, (own.read_bytes, own.write_bytes))
    read, written = (sum(each) for each in zip(*every, strict=True))
    return read, written


def bare(args: argparse.Namespace) -> Rates:
    """What the disk does when nobody else uses it. A collective."""
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        found = [bare_disk.measure(args.path, int(args.file_gib * _GIB))]
    dist.broadcast_object_list(found, device=device())
    return found[0]


def device() -> torch.device:
    """The device of this rank."""
    on_gpu = torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def build(variant: Variant, shape: Shape, args: argparse.Namespace) -> zeroshard.Engine:
    """Build a model on the device, and the engine whose state is in files."""
    configuration = variant.configuration(zeroshard_configuration(variant.stage or 0, args.batch))
    files = {"device": "nvme", "nvme_path": str(args.path.resolve()), "pin_memory": True}
    configuration["zero_optimization"]["offload_optimizer"] = files
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device():
            model = LlamaForCausalLM(llama_config(shape, attn_implementation="sdpa"))
    finally:
        torch.set_default_dtype(before)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    engine, _, _, _ = zeroshard.initialize(
        model=model.train(), optimizer=adamw(model.parameters()), config=configuration
    )
    return engine


def trained(
    variant: Variant, shape: Shape, args: argparse.Namespace
) -> tuple[list[float], tuple[int, int]]:
    """Seconds of steps in a row, and the bytes read and written meanwhile. A collective.

    What the last step leaves to be written under the next one is not waited for, as what the first
    one finds to be written was not counted. Two steps warm up; in the first one, state is made.
    """
    engine = build(variant, shape, args)
    generator = torch.Generator().manual_seed(dist.get_rank())
    size = (args.batch, args.seq)
    x = torch.randint(0, shape.vocab, size, generator=generator).to(engine.device)

    def step() -> None:
        loss = engine(input_ids=x, labels=x).loss
        engine.backward(loss)
        engine.step()
        float(loss.detach())

    for _ in range(2):
        step()
    seconds: list[float] = []
    before = io_bytes()
    for _ in range(args.steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    read, written = (after - then for after, then in zip(io_bytes(), before, strict=True))
    engine.destroy()
    return seconds, (read, written)


def measure(
    variant: Variant, shape: Shape, first: Rates, args: argparse.Namespace
) -> tuple[dict[str, Any], Rates]:
    """Train with one engine, and look at the bare disk again. A collective."""
    seconds, (read, written) = trained(variant, shape, args)
    gc.collect()
    last = bare(args)
    raw = statistics.mean(rates.of(read, written) for rates in (first, last)) if read else None
    rate = (read + written) / sum(seconds)
    notes = [_io(read / args.steps, written / args.steps, rate, raw)]
    notes += [_bare("before", first), _bare("after", last)]
    median = statistics.median(seconds)
    result = {
        "parameters": shape.parameters,
        "median_s": round(median, 4),
        "min_s": round(min(seconds), 4),
        "max_s": round(max(seconds), 4),
        "tokens_per_s_per_rank": round(args.batch * args.seq / median, 1),
        "read_bytes": read,
        "written_bytes": written,
        "bytes_per_s": round(rate),
        "disk_ratio": None if raw is None else round(rate / raw, 4),
        "bare_disk": [asdict(first), asdict(last)],
        "notes": notes,
    }
    return result, last


def _io(read: float, written: float, rate: float, raw: float | None) -> str:
    if raw is None:
        return "nothing was read or written"
    return (
        f"in a step, {read / _GB:.1f} GB read and {written / _GB:.1f} GB written, "
        f"{rate / _GB:.2f} GB/s; the bare disk {raw / _GB:.2f} GB/s"
    )


def _bare(when: str, rates: Rates) -> str:
    write, read, both = (each / _GB for each in (rates.write, rates.read, rates.both))
    cached = "" if rates.is_direct else ", with the page cache"
    figures = f"{write:.2f} GB/s written, {read:.2f} read, {both:.2f} both at once"
    return f"the bare disk {when}: {figures}{cached}"


def main() -> None:
    """Measure each engine and print."""
    args = arguments()
    zeroshard.init_distributed()
    shape = TOY if args.toy else SHAPE
    source = records.origin(args.commit)
    workload = {**asdict(shape), "batch": args.batch, "seq": args.seq, "steps": args.steps}
    found: list[dict[str, Any]] = []
    rates = bare(args)
    for name in args.engines.split(","):
        result, rates = measure(Variant.parse(name), shape, rates, args)
        ranks = dist.get_world_size()
        one = records.record(source, "disk", ranks, workload, name, result, claim="offload-nvme")
        found.append(one)
        if dist.get_rank() == 0:
            records.write(args.out, [one])
    if dist.get_rank() == 0:
        print(f"\n{render.terminal(found)}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
