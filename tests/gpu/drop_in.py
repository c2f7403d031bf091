"""Hugging Face programs on real GPUs; started on every rank by the launcher, JSON on rank 0.

    zeroshard --num_gpus 2 tests/gpu/drop_in.py [--toy] [--only NAME ...]

Runs on CPU ranks too, at toy size. Needs transformers, accelerate and peft; bitsandbytes for qlora.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.deepspeed import HfDeepSpeedConfig

import deepspeed
import zeroshard

STAGES = (0, 1, 2, 3)
TOY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
REAL = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "vocab_size": 8192}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}


@dataclass(frozen=True)
class Context:
    """This rank's place, the size of things, and a folder that all ranks share."""

    rank: int
    device: torch.device
    model: dict[str, int]
    context: int
    folder: Path

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def config(self) -> LlamaConfig:
        return LlamaConfig(**self.model, **HEADS, use_cache=False, tie_word_embeddings=True)

    def data(self, rows: int = 32) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(7)
        shape = (rows, self.context)
        ids = torch.randint(0, self.model["vocab_size"], shape, generator=generator)
        return [{"input_ids": row, "labels": row} for row in ids]


def deepspeed_config(stage: int, **more: Any) -> dict[str, Any]:
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        **more,
    }


def arguments(context: Context, name: str, stage: int, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(context.folder / name),
        deepspeed=deepspeed_config(stage),
        use_cpu=not context.on_gpu,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        **{"save_strategy": "no", **more},
    )


def trained(context: Context, name: str, stage: int, model: Any = None, **more: Any) -> Trainer:
    resume = more.pop("resume", None)
    args = arguments(context, name, stage, **more)
    set_seed(1)
    trainer = Trainer(
        model or LlamaForCausalLM(context.config()), args, train_dataset=context.data()
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def column(trainer: Trainer, key: str) -> list[float]:
    return [row[key] for row in trainer.state.log_history if key in row]


def furthest(series: list[list[float]]) -> float:
    return max(
        abs(a - b) / abs(b) for other in series for a, b in zip(other, series[0], strict=True)
    )


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_trainer(context: Context) -> dict[str, Any]:
    """Losses and norms are those of stage 0, in fp32 and bf16; fp16 trains."""
    result: dict[str, Any] = {}
    for dtype in ("fp32", "bf16"):
        losses, norms, seconds = [], [], []
        for stage in STAGES:
            flags = {} if dtype == "fp32" else {dtype: True}
            start = time.perf_counter()
            trainer = trained(context, f"{dtype}-{stage}", stage, **flags)
            seconds.append(round(time.perf_counter() - start, 2))
            losses.append(column(trainer, "loss"))
            norms.append(column(trainer, "grad_norm"))
            trainer.evaluate(context.data(8))
            del trainer
            free_memory()
        result[dtype] = {
            "losses": losses[0],
            "apart": furthest(losses),
            "norms_apart": furthest(norms),
            "seconds": seconds,
        }
    trainer = trained(context, "fp16", 2, fp16=True)
    result["fp16"] = {"losses": column(trainer, "loss")}
    assert len(result["fp16"]["losses"]) == 4
    assert result["fp32"]["apart"] < 2e-5, result
    assert result["bf16"]["apart"] < 2e-3, result
    return result


def check_resume(context: Context) -> dict[str, Any]:
    """A run that is resumed gives the log of the run that was not ended."""
    result = {}
    for stage in STAGES:
        whole = trained(context, f"whole-{stage}", stage, bf16=True)
        want = column(whole, "loss")
        del whole
        first = trained(
            context,
            f"part-{stage}",
            stage,
            bf16=True,
            save_strategy="steps",
            save_steps=2,
        )
        del first
        free_memory()
        checkpoint = str(context.folder / f"part-{stage}" / "checkpoint-2")
        again = trained(context, f"part-{stage}", stage, bf16=True, resume=checkpoint)
        result[stage] = column(again, "loss")[-2:] == want[-2:]
        del again
        free_memory()
    assert all(result.values()), result
    return {str(stage): ok for stage, ok in result.items()}


def check_loading(context: Context) -> dict[str, Any]:
    """from_pretrained under ZeRO-3 gives the weights of the file, and never holds the model."""
    path = context.folder / "pretrained"
    set_seed(3)
    plain = LlamaForCausalLM(context.config())
    if context.rank == 0:
        plain.save_pretrained(path)
    dist.barrier()
    whole = sum(p.numel() * p.element_size() for p in plain.parameters())
    config = deepspeed_config(3)
    config["train_micro_batch_size_per_gpu"] = 1
    for key in ("train_batch_size", "gradient_accumulation_steps", "gradient_clipping"):
        del config[key]
    config["bf16"] = config["fp16"] = {"enabled": False}
    keep = HfDeepSpeedConfig(config)
    free_memory()
    base = torch.cuda.memory_allocated() if context.on_gpu else 0
    if context.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    peak = (torch.cuda.max_memory_allocated() - base) if context.on_gpu else 0
    held = (torch.cuda.memory_allocated() - base) if context.on_gpu else 0
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        same = all(
            torch.equal(a.detach().cpu(), b.detach())
            for a, b in zip(model.parameters(), plain.parameters(), strict=True)
        )
    del keep
    assert same
    return {"whole_mib": whole >> 20, "held_mib": held >> 20, "peak_mib": peak >> 20}


def check_generation(context: Context) -> dict[str, Any]:
    """The model that was trained at stage 3 generates what it generates at stage 0."""
    texts = []
    for stage in (0, 3):
        trainer = trained(context, f"generate-{stage}", stage)
        model = trainer.model.eval()
        prompt = context.data(1)[0]["input_ids"][None, :8].to(context.device)
        out = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
        texts.append(out.tolist())
        del trainer, model
        free_memory()
    assert texts[0] == texts[1], texts
    return {"tokens": len(texts[0][0])}


def _quantised(context: Context) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig

    path = context.folder / "base"
    if context.rank == 0 and not path.exists():
        set_seed(3)
        LlamaForCausalLM(context.config()).to(torch.bfloat16).save_pretrained(path)
    dist.barrier()
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=how, dtype=torch.bfloat16
    )
    set_seed(4)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def check_qlora(context: Context) -> dict[str, Any]:
    """A 4-bit base trains alike at all stages, both ways of checkpointing."""
    losses = {}
    for stage in (1, 2, 3):
        for reentrant in (None, False, True):
            flags: dict[str, Any] = {}
            if reentrant is not None:
                flags = {
                    "gradient_checkpointing": True,
                    "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
                }
            name = f"qlora-{stage}-{reentrant}"
            trainer = trained(context, name, stage, _quantised(context), bf16=True, **flags)
            losses[f"{stage} {reentrant}"] = column(trainer, "loss")
            del trainer
            free_memory()
    apart = furthest(list(losses.values()))
    assert apart < 2e-3, losses
    return {"losses": next(iter(losses.values())), "apart": apart}


CHECKS: dict[str, Callable[[Context], dict[str, Any]]] = {
    "trainer": check_trainer,
    "resume": check_resume,
    "loading": check_loading,
    "generation": check_generation,
    "qlora": check_qlora,
}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS))
    options = parser.parse_args()
    logging.getLogger("zeroshard").setLevel(logging.WARNING)
    torch.backends.cuda.matmul.allow_tf32 = False
    zeroshard.init_distributed()
    rank = dist.get_rank()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    where = [tempfile.mkdtemp(prefix="zeroshard-drop-in-")]
    dist.broadcast_object_list(where, src=0)
    size, length = (TOY, 16) if options.toy else (REAL, 256)
    context = Context(rank, device, size, length, Path(where[0]))
    failed = 0
    for name in options.only:
        start = time.perf_counter()
        try:
            line = {"ok": True, **CHECKS[name](context)}
        except Exception as error:
            failed += 1
            line = {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}
            traceback.print_exc()
        if rank == 0:
            line |= {"check": name, "wall_s": round(time.perf_counter() - start, 1)}
            print(json.dumps(line), flush=True)
        dist.barrier()
    return failed


if __name__ == "__main__":
    sys.exit(main())
