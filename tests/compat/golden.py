"""What one small training with Hugging Face's Trainer logs, measured with DeepSpeed 0.19.8.

`tools/measure_golden.py` makes these tables again with whichever package named `deepspeed` the
environment has. The recipe needs no file but the configuration: a Llama of two layers with random
weights, and rows of random tokens that are their own labels.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

__all__ = ["Log", "Recipe", "Tokens", "llama", "run"]

STEPS = 4
_BLOCKS: dict[str, dict[str, Any]] = {
    "optimizer": {
        "type": "AdamW",
        "params": {
            "lr": "auto",
            "betas": "auto",
            "eps": "auto",
            "weight_decay": "auto",
            "torch_adam": True,
        },
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "total_num_steps": "auto",
        },
    },
}


class Tokens(Dataset[dict[str, Tensor]]):
    """Rows of random tokens, each its own label."""

    def __init__(self, rows: int = 32, length: int = 16, vocabulary: int = 64) -> None:
        random = torch.Generator().manual_seed(1234)
        self.rows = torch.randint(0, vocabulary, (rows, length), generator=random)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def llama(**options: Any) -> LlamaForCausalLM:
    """A Llama of two layers, with the same random weights in every process."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            **options,
        )
    )


@dataclass(frozen=True)
class Recipe:
    """Which configuration is trained: the ZeRO stage, the precision, and who makes what.

    ``blocks`` names the blocks that the configuration has: "optimizer", "scheduler".
    """

    stage: int
    dtype: str = "fp32"
    blocks: tuple[str, ...] = ()

    def config(self) -> dict[str, Any]:
        """The configuration, with "auto" wherever the Trainer knows better."""
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "train_batch_size": "auto",
            "gradient_clipping": "auto",
            "fp16": {"enabled": "auto"},
            "bf16": {"enabled": "auto"},
            "zero_optimization": {
                "stage": self.stage,
                "reduce_bucket_size": "auto",
                "stage3_prefetch_bucket_size": "auto",
                "stage3_param_persistence_threshold": "auto",
                "stage3_gather_16bit_weights_on_model_save": True,
            },
        }
        return config | {name: _BLOCKS[name] for name in self.blocks}


@dataclass(frozen=True)
class Log:
    """What the Trainer logs of each step; norms are None where DeepSpeed has none."""

    loss: tuple[float, ...]
    grad_norm: tuple[float | None, ...]
    lr: tuple[float, ...]


def run(recipe: Recipe) -> Log:
    """Train on this rank, and return what the Trainer logged."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            deepspeed=recipe.config(),
            bf16=recipe.dtype == "bf16",
            fp16=recipe.dtype == "fp16",
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            warmup_steps=1,
            max_steps=STEPS,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(model=llama(), args=args, train_dataset=Tokens())
        trainer.train()
    steps = trainer.state.log_history[:STEPS]
    return Log(
        loss=tuple(float(step["loss"]) for step in steps),
        grad_norm=tuple(step.get("grad_norm") for step in steps),
        lr=tuple(step["learning_rate"] for step in steps),
    )
