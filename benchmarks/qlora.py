"""Time and memory of a QLoRA step under stages 2 and 3 over plain DDP, on the ranks it is given.

    zeroshard --num_gpus 2 benchmarks/qlora.py [--size toy|1b|8b] [--engines ddp zeroshard-3]

A Hugging Face Llama whose linear layers are NF4 with double quantisation, LoRA of rank 16 on all of
them, activation checkpointing, AdamW, clipping. Weights are random and are quantised on the device,
one layer at a time. The engines run one after another, each with a model of its own. Needs
transformers, peft and bitsandbytes, and for the engines of its name DeepSpeed.

Of each engine: the median step, timed until the slowest rank has finished it; the bytes of the
frozen base that a rank holds after ``initialize``, weights and statistics; and the peak in a step,
with the memory that other ranks read.
A line of JSON for each engine is appended to DIR/qlora.jsonl as soon as it is measured.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import zeroshard
from side_by_side import records, render
from side_by_side.engines import (
    bytes_beside,
    deepspeed_configuration,
    llama_config,
    unavailable,
)
from side_by_side.workload import SHAPES, Shape, Variant

Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """Widths of a model, and the tokens that a rank trains on in one step."""

    shape: Shape
    batch: int
    context: int


SIZES = {
    "toy": Size(Shape(256, 4, 8, 4, 768, 512), 2, 32),
    "1b": Size(SHAPES["1b"], 4, 2048),
    "8b": Size(SHAPES["8b"], 4, 2048),
}
ENGINES = ("ddp", "zeroshard-2", "zeroshard-3", "deepspeed-2", "deepspeed-3")
CLAIMED = ("ddp", "zeroshard-2", "zeroshard-3", "deepspeed-3")


@dataclass(frozen=True)
class Result:
    """What one engine took; memory is in GiB, and None on CPUs."""

    median_s: float
    min_s: float
    max_s: float
    tokens_per_s_per_rank: float
    base_bytes: int | None  # of the frozen base, on this rank after initialize, where it is known
    whole_base_bytes: int
    built_gib: float | None  # on this rank after initialize, all in all
    allocated_gib: float | None  # at the peak of the timed steps, as the next
    reserved_gib: float | None
    build_s: float
    losses: list[float]


def build(size: Size, storage: torch.dtype, device: torch.device) -> nn.Module:
    """A quantised Llama with adapters; no more than one of its layers is ever whole."""
    config = llama_config(size.shape, dtype=torch.bfloat16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.model.rotary_emb = LlamaRotaryEmbedding(config, device=device)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            model.set_submodule(path, quantised(module, storage, device))
        else:
            fill(module, device)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    adapters = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    with device:
        return get_peft_model(model, adapters).train()


def quantised(layer: nn.Linear, storage: torch.dtype, device: torch.device) -> Linear4bit:
    with torch.device("meta"):
        packed = Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            quant_storage=storage,
        )
    values = torch.randn(layer.weight.shape, dtype=torch.bfloat16, device=device).mul_(0.02)
    weight = Params4bit(
        values, requires_grad=False, quant_type="nf4", quant_storage=storage, module=packed
    )
    packed.weight = weight.to(device)  # which quantises it
    return packed


def fill(module: nn.Module, device: torch.device) -> None:
    for name, param in list(module.named_parameters(recurse=False)):
        values = torch.empty(param.shape, dtype=torch.bfloat16, device=device)
        values.normal_(0, 0.02) if values.dim() > 1 else values.fill_(1)
        setattr(module, name, nn.Parameter(values))


def base_tensors(model: nn.Module) -> Iterator[Tensor]:
    """The frozen weights of a model and the statistics of the quantised ones."""
    for param in model.parameters():
        if not param.requires_grad:
            yield param
            if isinstance(param, Params4bit):
                yield param.quant_state.absmax
                yield param.quant_state.state2.absmax


def adamw(model: nn.Module, on_gpu: bool) -> torch.optim.Optimizer:
    trained = [param for param in model.parameters() if param.requires_grad]
    return torch.optim.AdamW(trained, lr=2e-4, fused=on_gpu)


def ddp(model: nn.Module, device: torch.device) -> Step:
    on_gpu = device.type == "cuda"
    optimizer = adamw(model, on_gpu)
    net = nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if on_gpu else None)
    trained = [param for param in model.parameters() if param.requires_grad]

    def step(x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss = net(input_ids=x, labels=x).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def steps_of(engine: Any) -> Step:
    """A step through the calls that DeepSpeed's engine and ours share."""

    def step(x: Tensor) -> Tensor:
        loss = engine(input_ids=x, labels=x).loss
        engine.backward(loss)
        engine.step()
        return loss

    return step


def zero(model: nn.Module, stage: int, size: Size, on_gpu: bool) -> tuple[Any, Step]:
    engine, _, _, _ = zeroshard.initialize(
        model=model,
        optimizer=adamw(model, on_gpu),
        config={
            "train_micro_batch_size_per_gpu": size.batch,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": True},
            # What the Trainer of Hugging Face fills in for "auto".
            "zero_optimization": {
                "stage": stage,
                "reduce_bucket_size": size.shape.hidden**2,
                "stage3_prefetch_bucket_size": int(0.9 * size.shape.hidden**2),
                "stage3_param_persistence_threshold": 10 * size.shape.hidden,
            }
            if stage == 3
            else {"stage": stage, "reduce_bucket_size": size.shape.hidden**2},
        },
    )
    return engine, steps_of(engine)


def deepspeed(model: nn.Module, stage: int, size: Size, on_gpu: bool) -> tuple[Any, Step]:
    from deepspeed import initialize  # noqa: PLC0415 - seconds to import, and it is optional

    trained = [param for param in model.parameters() if param.requires_grad]
    config = deepspeed_configuration(stage, size.batch, size.shape.hidden)
    config["zero_optimization"]["reduce_bucket_size"] = size.shape.hidden**2
    engine, _, _, _ = initialize(
        model=model,
        config=config | {"bf16": {"enabled": True}},
        model_parameters=trained,
        optimizer=adamw(model, on_gpu),
    )
    return engine, steps_of(engine)


def timed(step: Step, x: Tensor, on_gpu: bool) -> tuple[float, float]:
    """Seconds until the slowest rank is done, and the loss."""
    if on_gpu:
        torch.cuda.synchronize()
    dist.barrier()
    start = time.perf_counter()
    loss = step(x)
    if on_gpu:
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - start, round(float(loss.detach()), 4)


def start(
    name: str, model: nn.Module, size: Size, device: torch.device
) -> tuple[Any, Step, int | None]:
    """Return what has `destroy`, or None; a step; and the bytes of the base, where known."""
    on_gpu = device.type == "cuda"
    if name == "ddp":
        return None, ddp(model, device), sum(tensor.nbytes for tensor in base_tensors(model))
    if name.startswith("deepspeed"):
        return *deepspeed(model, int(name[-1]), size, on_gpu), None
    engine, step = zero(model, int(name[-1]), size, on_gpu)
    frozen = (unit for unit in engine.runtime.units if not unit.is_trained)
    return engine, step, sum(unit.parameter_bytes for unit in frozen)


def measure(name: str, args: argparse.Namespace, device: torch.device) -> Result:
    """Build, train and forget one model."""
    size, on_gpu = SIZES[args.size], device.type == "cuda"
    began = time.perf_counter()
    torch.manual_seed(0)
    model = build(size, getattr(torch, args.storage), device)
    whole = sum(tensor.nbytes for tensor in base_tensors(model))
    engine, step, base = start(name, model, size, device)
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    beside = bytes_beside(engine) if name.startswith("zeroshard") else 0
    built_gib = gib(torch.cuda.memory_allocated() + beside) if on_gpu else None
    build_s = time.perf_counter() - began
    generator = torch.Generator(device=device).manual_seed(5 + dist.get_rank())
    shape = (size.batch, size.context)
    x = torch.randint(0, size.shape.vocab, shape, device=device, generator=generator)
    seconds: list[float] = []
    losses: list[float] = []
    for number in range(args.warmup + args.steps):
        if on_gpu and number == args.warmup:
            torch.cuda.reset_peak_memory_stats()
        elapsed, loss = timed(step, x, on_gpu)
        losses.append(loss)
        if number >= args.warmup:
            seconds.append(elapsed)
    median = statistics.median(seconds)
    result = Result(
        round(median, 5),
        round(min(seconds), 5),
        round(max(seconds), 5),
        round(x.numel() / median, 1),
        base,
        whole,
        built_gib,
        gib(torch.cuda.max_memory_allocated() + beside) if on_gpu else None,
        gib(torch.cuda.max_memory_reserved() + beside) if on_gpu else None,
        round(build_s, 2),
        losses,
    )
    if engine is not None:
        engine.destroy()
    del engine, step, model
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return result


def gib(nbytes: int) -> float:
    return round(nbytes / 2**30, 3)


def main() -> None:
    """Measure, and write and print on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=sorted(SIZES), default="8b")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(CLAIMED))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--storage", default="bfloat16", help="dtype that 4-bit weights lie in")
    records.add_out(parser)
    args = parser.parse_args()
    zeroshard.init_distributed()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    source, found = records.origin(args.commit), []
    for name in args.engines:
        missing = None if name == "ddp" else unavailable(Variant.parse(name))
        result, failure = None, None
        try:
            result = None if missing else asdict(measure(name, args, device))
        except Exception as error:
            failure = error
        status = records.OK if failure is None else status_of(failure)
        one = as_record(source, args, name, result, missing or status, str(failure or "")[:400])
        found.append(one)
        if dist.get_rank() == 0:
            records.write(args.out, [one])
        if failure is not None:  # the ranks may be out of step
            report(found)
            raise failure
    report(found)
    dist.destroy_process_group()


def status_of(error: Exception) -> str:
    return "out of memory" if isinstance(error, torch.OutOfMemoryError) else "failed"


def as_record(
    source: records.Origin,
    args: argparse.Namespace,
    engine: str,
    result: dict[str, Any] | None,
    status: str,
    detail: str,
) -> dict[str, Any]:
    """Return the line of JSON of one engine."""
    size = SIZES[args.size]
    workload = {
        "size": args.size,
        "batch": size.batch,
        "seq": size.context,
        "storage": args.storage,
        "warmup": args.warmup,
        "steps": args.steps,
    }
    is_claimed = args.size == "8b" and args.steps >= 8
    return records.record(
        source,
        "qlora",
        dist.get_world_size(),
        workload,
        engine,
        result,
        status=status,
        detail=detail,
        claim="qlora" if is_claimed else None,
    )


def report(found: list[dict[str, Any]]) -> None:
    """Print a table, and how much of the base each engine holds, on rank 0."""
    if dist.get_rank() != 0:
        return
    print(render.terminal(found))
    for each in found:
        result = each["result"]
        if result is not None and result["base_bytes"] is not None:
            share = result["base_bytes"] / result["whole_base_bytes"]
            mib = result["base_bytes"] / 2**20
            print(f"{each['engine']}: {mib:,.0f} MiB of the base, {share:.2f} of all of it")


if __name__ == "__main__":
    main()
