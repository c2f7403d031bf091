"""Time and memory of a QLoRA step under stages 2 and 3 over plain DDP, on the ranks it is given.

    zeroshard --num_gpus 2 benchmarks/qlora.py [--size toy|1b|8b] [--engines "stage 3"] [--steps 10]

A Hugging Face Llama whose linear layers are NF4 with double quantisation, LoRA of rank 16 on all of
them, activation checkpointing, AdamW, clipping. Weights are random and are quantised on the device,
one layer at a time. The engines run one after another, each with a model of its own. Needs
transformers, peft and bitsandbytes.

Of each engine: the median step, timed until the slowest rank has finished it; the bytes of the
frozen base that a rank holds after ``initialize``, weights and statistics; and the peak in a step.
A line of JSON for each engine follows the table.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import bitsandbytes
import peft
import torch
import torch.distributed as dist
import transformers
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import zeroshard

Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """Widths of a model, and the tokens that a rank trains on in one step."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    batch: int
    context: int


SIZES = {
    "toy": Size(256, 4, 8, 4, 768, 512, 2, 32),
    "1b": Size(2048, 16, 32, 8, 8192, 128256, 4, 2048),
    "8b": Size(4096, 32, 32, 8, 14336, 128256, 4, 2048),
}
ENGINES = ("ddp", "stage 2", "stage 3")


@dataclass(frozen=True)
class Result:
    """What one engine took."""

    engine: str
    step_s: float
    base_bytes: int  # of the frozen base, on this rank after initialize
    whole_base_bytes: int
    allocated_gib: float  # on this rank after initialize, all in all
    peak_gib: float  # in a step
    build_s: float
    losses: list[float]


def build(size: Size, storage: torch.dtype, device: torch.device) -> nn.Module:
    """A quantised Llama with adapters; no more than one of its layers is ever whole."""
    config = LlamaConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        intermediate_size=size.intermediate,
        vocab_size=size.vocab,
        max_position_embeddings=8192,
        use_cache=False,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
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
                "reduce_bucket_size": size.hidden**2,
                "stage3_prefetch_bucket_size": int(0.9 * size.hidden**2),
                "stage3_param_persistence_threshold": 10 * size.hidden,
            }
            if stage == 3
            else {"stage": stage, "reduce_bucket_size": size.hidden**2},
        },
    )

    def step(x: Tensor) -> Tensor:
        loss = engine(input_ids=x, labels=x).loss
        engine.backward(loss)
        engine.step()
        return loss

    return engine, step


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


def measure(name: str, args: argparse.Namespace, device: torch.device) -> Result:
    """Build, train and forget one model."""
    size, on_gpu = SIZES[args.size], device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    torch.manual_seed(0)
    model = build(size, getattr(torch, args.storage), device)
    whole = sum(tensor.nbytes for tensor in base_tensors(model))
    if name == "ddp":
        engine, step, base = None, ddp(model, device), whole
    else:
        engine, step = zero(model, int(name[-1]), size, on_gpu)
        frozen = (unit for unit in engine.runtime.units if not unit.is_trained)
        base = sum(unit.parameter_bytes for unit in frozen)
    gc.collect()
    allocated = torch.cuda.memory_allocated() if on_gpu else 0
    built = time.perf_counter() - began
    generator = torch.Generator(device=device).manual_seed(5 + dist.get_rank())
    shape = (size.batch, size.context)
    x = torch.randint(0, size.vocab, shape, device=device, generator=generator)
    seconds: list[float] = []
    losses: list[float] = []
    for number in range(args.warmup + args.steps):
        if on_gpu and number == args.warmup:
            torch.cuda.reset_peak_memory_stats()
        elapsed, loss = timed(step, x, on_gpu)
        losses.append(loss)
        if number >= args.warmup:
            seconds.append(elapsed)
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    result = Result(
        name,
        round(statistics.median(seconds), 4),
        base,
        whole,
        round(allocated / 2**30, 3),
        round(peak / 2**30, 3),
        round(built, 1),
        losses,
    )
    if engine is not None:
        engine.destroy()
    del engine, step, model
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return result


def main() -> None:
    """Measure and print on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=sorted(SIZES), default="8b")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--storage", default="bfloat16", help="dtype that 4-bit weights lie in")
    args = parser.parse_args()
    zeroshard.init_distributed()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    results = [measure(name, args, device) for name in args.engines]
    if dist.get_rank() == 0:
        report(results, args, torch.cuda.get_device_name() if on_gpu else "CPU")
    dist.destroy_process_group()


def report(results: list[Result], args: argparse.Namespace, device: str) -> None:
    """Print a table, and each result as a line of JSON."""
    first = results[0]
    print(
        f"{'engine':9}{'s a step':>10}{'ratio':>7}{'base':>10}{'of all':>7}{'peak':>8}  last loss"
    )
    for each in results:
        print(
            f"{each.engine:9}{each.step_s:10.3f}{each.step_s / first.step_s:7.2f}"
            f"{each.base_bytes / 2**20:6.0f} MiB{each.base_bytes / each.whole_base_bytes:7.2f}"
            f"{each.peak_gib:8.2f}  {each.losses[-1]:.4f}"
        )
    size = SIZES[args.size]
    common = {
        "benchmark": "qlora",
        "size": args.size,
        "tokens_per_rank": size.batch * size.context,
        "storage": args.storage,
        "ranks": dist.get_world_size(),
        "device": device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "bitsandbytes": bitsandbytes.__version__,
    }
    for each in results:
        print(json.dumps(common | asdict(each)))


if __name__ == "__main__":
    main()
