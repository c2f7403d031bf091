"""The largest Llama that trains with each engine: how many layers of one width.

    python benchmarks/largest.py
    python benchmarks/largest.py --engines zeroshard-2 --first 29 --limit 120

Every size is tried by ranks of its own, which a size that is too large ends: the model is built
under ``zero.Init`` and trained for some steps, with full activation checkpointing. The first guess
for an engine is arithmetic: the bytes that the machine has over those that a parameter takes. From
there the search goes up or down, and by halves once a size has trained and one has not, until the
two are ``--resolution`` layers apart or the time is over. What ended the smaller of those that did
not train is what bounds the largest. What an engine keeps on the device, where it can choose, is
what gradients and activations leave.

A line of JSON for each engine is appended to DIR/largest.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from side_by_side import records, render
from side_by_side.claims import CLAIMS
from side_by_side.workload import Shape, Variant
from zeroshard.launch.gpus import visible_gpus

SHAPE = Shape(5120, 0, 40, 8, 13824, 32000)
TOY = Shape(64, 0, 4, 2, 128, 256)
STATE_BYTES = 2 + 4 + 12  # of a parameter: weight in bf16; gradient and AdamW's in fp32
NARROW_BYTES = 2  # that a gradient takes less on one rank whose state leaves, which keeps its bf16
SPARED_GIB = 6.0  # of a device, for activations, logits and what CUDA takes
SPARED_OF_HOST = 0.08
_GIB = 2**30


@dataclass(frozen=True)
class Trial:
    """A size to try: an engine, a shape, a batch, and for how many steps it has to train.

    ``budget_gib`` is what may stay on the device between steps of an engine whose state can leave.
    """

    engine: str
    shape: Shape
    batch: int
    seq: int
    steps: int
    budget_gib: float | None = None


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: what it took, or why it failed, in a few words."""

    layers: int
    parameters: int
    reason: str = ""
    figures: Mapping[str, Any] | None = None
    took_s: float = 0.0

    @property
    def trains(self) -> bool:
        """Whether all steps were made."""
        return self.figures is not None


def guess(shape: Shape, variant: Variant, device_bytes: int, host_bytes: int, ranks: int) -> int:
    """Return how many layers should just fit, with state divided over the ranks."""
    room = max(device_bytes - SPARED_GIB * _GIB, 0.0) * ranks
    of_parameter = STATE_BYTES
    if variant.offload != "none":
        room += host_bytes * (1 - SPARED_OF_HOST)
        of_parameter -= NARROW_BYTES * (ranks == 1)
    of_layer = replace(shape, layers=1).parameters - shape.parameters
    return max(1, int((room / of_parameter - shape.parameters) / of_layer))


def budget(variant: Variant, device_bytes: int) -> float | None:
    """Return the GiB of a device that model state may take, gradients and buffers with it.

    None where nothing can leave the device, or the engine has a budget of its own.
    """
    if variant.offload == "none" or not device_bytes or "gpu_budget" in variant.label:
        return None
    return max(device_bytes / _GIB - SPARED_GIB, 0.0)


def search(
    attempt: Callable[[int], Outcome],
    first: int,
    *,
    step: int,
    resolution: int,
    most: int | None,
    time_left_s: Callable[[], float],
) -> list[Outcome]:
    """Try numbers of layers until the largest that trains is known, or the time is too short.

    Args:
        attempt: tries a number of layers.
        first: where to begin.
        step: how far the second attempt is from the first; later ones go half as far once one has
            trained and one has failed.
        resolution: what two sizes may differ by at the end.
        most: the largest number that is tried at all.
        time_left_s: seconds that are left; no trial starts that may take longer, as one before.
    """
    found: list[Outcome] = []
    best, worst = 0, (most + 1 if most else None)
    at = min(first, most) if most else first
    while at > best and (worst is None or at < worst):
        if found and time_left_s() < 1.2 * max(each.took_s for each in found):
            break
        found.append(attempt(at))
        if found[-1].trains:
            best = at
        else:
            worst = at
        if worst is None:
            at = best + step
        elif best == 0:
            at = max(worst - step, 1)
        else:
            at = (best + worst) // 2
            if worst - best <= resolution:
                break
        if most:
            at = min(at, most)
    return found


def try_in_new_ranks(trial: Trial, ranks: int, limit_s: float) -> Outcome:
    """Let ranks of its own try a size; whatever ends them is what it is bound by."""
    layers, parameters = trial.shape.layers, trial.shape.parameters
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="largest-") as name:
        path = Path(name) / "trial.json"
        path.write_text(json.dumps(asdict(trial)), encoding="utf-8")
        launcher = [sys.executable, "-m", "zeroshard", "--quiet", "--num_gpus", str(ranks)]
        command = [*launcher, __file__, "--trial", str(path)]
        job = subprocess.Popen(command)
        try:
            status = job.wait(limit_s)
            reason = f"ended with status {status}, as a host without memory ends processes"
        except subprocess.TimeoutExpired:
            job.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(30)
            job.kill()
            reason = f"not done after {limit_s:.0f} s"
        took_s = time.monotonic() - began
        said = sorted(Path(name).glob("said-*.json"))
        each = [json.loads(one.read_text(encoding="utf-8")) for one in said]
    failed = [one["reason"] for one in each if "reason" in one]
    if failed or len(each) < ranks:
        return Outcome(layers, parameters, failed[0] if failed else reason, took_s=took_s)
    return Outcome(layers, parameters, figures=each[0], took_s=took_s)


def be_tried(path: Path) -> None:
    """Build and train as one of the ranks of a trial, and write down how it went."""
    content = json.loads(path.read_text(encoding="utf-8"))
    trial = Trial(**{**content, "shape": Shape(**content["shape"])})
    out = path.with_name(f"said-{os.environ['RANK']}.json")
    try:
        said = trained(trial)
    except Exception as error:
        first = " ".join(str(error).split("\n\n", maxsplit=1)[0].split())[:300]
        said = {"reason": f"{type(error).__name__}: {first}"}
        out.write_text(json.dumps(said), encoding="utf-8")
        os._exit(1)  # others may wait in a collective
    out.write_text(json.dumps(said), encoding="utf-8")


def trained(trial: Trial) -> dict[str, Any]:
    """Build a model in shards, train it, and return what that took on this rank. A collective."""
    import torch  # noqa: PLC0415 - only ranks need it, and it takes seconds
    from transformers import LlamaForCausalLM  # noqa: PLC0415

    import zeroshard  # noqa: PLC0415
    from side_by_side.engines import (  # noqa: PLC0415
        adamw,
        llama_config,
        off_device,
        zeroshard_configuration,
    )

    zeroshard.init_distributed()
    on_gpu = torch.cuda.is_available()
    variant = Variant.parse(trial.engine)
    configuration = variant.configuration(zeroshard_configuration(variant.stage or 0, trial.batch))
    if trial.budget_gib is not None:
        configuration.setdefault("zeroshard", {})["gpu_budget"] = trial.budget_gib
    began = time.perf_counter()
    with zeroshard.zero.Init(config_dict_or_path=configuration, dtype=torch.bfloat16):
        model = LlamaForCausalLM(llama_config(trial.shape, attn_implementation="sdpa"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    engine, _, _, _ = zeroshard.initialize(
        model=model.train(), optimizer=adamw(model.parameters()), config=configuration
    )
    built_s = time.perf_counter() - began
    device = engine.device
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    size = (trial.batch, trial.seq)
    x = torch.randint(0, trial.shape.vocab, size, generator=generator).to(device)
    seconds: list[float] = []
    losses: list[float] = []
    for _ in range(trial.steps):
        start = time.perf_counter()
        loss = engine(input_ids=x, labels=x).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - start)
    if on_gpu:
        torch.cuda.synchronize()
    moved = off_device(engine)
    figures = {
        "seconds": seconds,
        "losses": losses,
        "build_s": built_s,
        "allocated_gib": torch.cuda.max_memory_allocated() / _GIB if on_gpu else None,
        "reserved_gib": torch.cuda.max_memory_reserved() / _GIB if on_gpu else None,
        "host_gib": psutil.Process().memory_info().rss / _GIB,
        "off_device": None if moved is None else asdict(moved),
    }
    engine.destroy()
    torch.distributed.destroy_process_group()
    return figures


def machine_bytes(ranks: int) -> tuple[int, int]:
    """Return the bytes of one device and those of the host. Imports torch in another process."""
    if not ranks:
        return 0, psutil.virtual_memory().total
    code = "import torch; print(torch.cuda.get_device_properties(0).total_memory)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout), psutil.virtual_memory().total


def summarize(found: Sequence[Outcome], tokens: int) -> tuple[dict[str, Any] | None, str]:
    """Return the figures of the largest size that trained, and what was found, in words."""
    good = max((each for each in found if each.trains), key=lambda each: each.layers, default=None)
    bad = min(
        (each for each in found if not each.trains), key=lambda each: each.layers, default=None
    )
    bound = (
        f"{bad.parameters / 1e9:.2f} billion parameters do not train: {bad.reason}"
        if bad
        else "no size that was tried failed"
    )
    if good is None or good.figures is None:
        return None, bound
    later = good.figures["seconds"][1:] or good.figures["seconds"]
    median = statistics.median(later)
    result = {
        "parameters": good.parameters,
        "layers": good.layers,
        "median_s": round(median, 4),
        "min_s": round(min(later), 4),
        "max_s": round(max(later), 4),
        "tokens_per_s_per_rank": round(tokens / median, 1),
        **{name: good.figures[name] for name in ("allocated_gib", "reserved_gib", "host_gib")},
        "off_device": [good.figures["off_device"]] if good.figures["off_device"] else [],
        "build_s": round(good.figures["build_s"], 1),
        "tried": [{**asdict(each), "figures": each.trains} for each in found],
        "notes": [bound],
    }
    return result, bound


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    default = ",".join(CLAIMS["offload-largest"].engines)
    add("--engines", default=default, help="names, separated by commas, of zeroshard engines")
    add("--first", default="", help="layers to begin with, one number for each engine, or a guess")
    add("--step", type=int, default=6, help="layers from the first size to the second")
    add("--resolution", type=int, default=1, help="layers that the result may be off by")
    add("--most", type=int, help="layers that are tried at most")
    add("--batch", type=int, default=1)
    add("--seq", type=int, default=2048)
    add("--steps", type=int, default=3, help="that a size has to train for")
    add("--ranks", type=int, help="ranks; default one")
    add("--host-gib", type=float, help="host memory, where it grows as it is used")
    add("--limit", type=float, default=900.0, help="seconds for all engines together")
    add("--trial-limit", type=float, default=240.0, help="seconds that one size may take")
    add("--toy", action="store_true", help="sizes for a CPU")
    records.add_out(parser)
    add("--trial", type=Path, help=argparse.SUPPRESS)  # ranks are started with it
    args = parser.parse_args(argv)
    if args.toy:
        args.seq, args.steps, args.step = 32, 2, 1
        args.most, args.first = args.most or 3, args.first or "2"
    return args


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Search for every engine; each record is yielded as soon as it is known."""
    gpus = len(visible_gpus(os.environ))
    ranks = args.ranks or 1
    device_bytes, host_bytes = machine_bytes(gpus)
    host_bytes = int(args.host_gib * _GIB) if args.host_gib else host_bytes
    engines, ends = args.engines.split(","), time.monotonic() + args.limit
    shape = TOY if args.toy else SHAPE
    given = [int(each) for each in args.first.split(",") if each]
    source = records.origin(args.commit)
    workload = {
        **{name: value for name, value in asdict(shape).items() if name != "layers"},
        "batch": args.batch,
        "seq": args.seq,
        "steps": args.steps,
    }
    for number, engine in enumerate(engines):
        variant = Variant.parse(engine)
        # Of the time that is left, each engine may take its share.
        now = time.monotonic()
        until = now + (ends - now) / (len(engines) - number)
        first = given[min(number, len(given) - 1)] if given else 0
        first = first or guess(shape, variant, device_bytes, host_bytes, ranks)

        def attempt(layers: int, engine: str = engine, until: float = until) -> Outcome:
            sized = replace(shape, layers=layers)
            room = budget(Variant.parse(engine), device_bytes)
            trial = Trial(engine, sized, args.batch, args.seq, args.steps, room)
            limit_s = min(args.trial_limit, max(until - time.monotonic(), 1.0))
            outcome = try_in_new_ranks(trial, ranks, limit_s)
            ended = "trains" if outcome.trains else outcome.reason
            size = f"{layers} layers, {outcome.parameters / 1e9:.2f} billion parameters"
            print(f"{engine}: {size}: {ended} ({outcome.took_s:.0f} s)", flush=True)
            return outcome

        found = search(
            attempt,
            first,
            step=args.step,
            resolution=args.resolution,
            most=args.most,
            time_left_s=lambda until=until: until - time.monotonic(),
        )
        result, bound = summarize(found, args.batch * args.seq)
        yield records.record(
            source,
            "largest",
            ranks,
            workload,
            engine,
            result,
            status=records.OK if result else "none trains",
            detail="" if result else bound,
            claim="offload-largest",
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Search, or be one of the ranks that are tried."""
    args = arguments(argv)
    if args.trial:
        be_tried(args.trial)
        return 0
    found: list[dict[str, Any]] = []
    for one in measure(args):
        found.append(one)
        records.write(args.out, [one])
    print(f"\n{render.terminal(found)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
