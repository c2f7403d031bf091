"""What one small training with Hugging Face's Trainer logs, measured with DeepSpeed 0.19.8.

`tools/measure_golden.py` makes these tables again with whichever package named `deepspeed` the
environment has. The recipe needs no file but the configuration: a Llama of two layers with random
weights, and rows of random tokens that are their own labels.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

__all__ = ["MEASURED", "Log", "Recipe", "Tokens", "arguments", "llama", "logged", "run"]

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
        return config | {name: copy.deepcopy(_BLOCKS[name]) for name in self.blocks}


@dataclass(frozen=True)
class Log:
    """What the Trainer logs of each step; norms are None where DeepSpeed has none."""

    loss: tuple[float, ...]
    grad_norm: tuple[float | None, ...]
    lr: tuple[float, ...]


def arguments(
    folder: str | Path, config: Recipe | dict[str, Any] | str | None, **changes: Any
) -> TrainingArguments:
    """The arguments of the recipe, some of them changed; without a configuration, plain torch's."""
    is_recipe = isinstance(config, Recipe)
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "deepspeed": config.config() if is_recipe else config,
        "bf16": is_recipe and config.dtype == "bf16",
        "fp16": is_recipe and config.dtype == "fp16",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 1,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    return TrainingArguments(**options | changes)


def logged(trainer: Trainer) -> Log:
    """What a trainer has logged of its steps."""
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Log(
        loss=tuple(step["loss"] for step in steps),
        grad_norm=tuple(step.get("grad_norm") for step in steps),
        lr=tuple(step["learning_rate"] for step in steps),
    )


def run(recipe: Recipe) -> Log:
    """Train on this rank, and return what the Trainer logged."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model=llama(), args=arguments(folder, recipe), train_dataset=Tokens())
        trainer.train()
    return logged(trainer)


_THIRDS = (0.0, 0.01, 0.02 / 3, 0.01 / 3)

# By ranks, precision and blocks of the configuration. DeepSpeed's stages 1 to 3 agree on all digits
# in fp32; its stage 0 trains alike and has no norms. In bf16 these are stages 2 and 3, from which
# its stages 0 and 1 are up to 2.3e-3 away.
MEASURED: dict[tuple[int, str, tuple[str, ...]], Log] = {
    (1, "fp32", ()): Log(
        loss=(4.160579, 4.169819, 4.130436, 4.137970),
        grad_norm=(1.125322, 1.156493, 1.103768, 1.100746),
        lr=_THIRDS,
    ),
    (1, "fp32", ("scheduler",)): Log(
        loss=(4.160579, 4.169819, 4.154791, 4.142856),
        grad_norm=(1.125322, 1.156493, 1.089311, 1.119346),
        lr=(0.0, 0.01, 0.01, 0.005),
    ),
    (2, "fp32", ()): Log(
        loss=(4.165199, 4.156200, 4.193757, 4.173137),
        grad_norm=(0.807194, 0.793412, 0.786758, 0.752990),
        lr=_THIRDS,
    ),
    (2, "fp32", ("optimizer",)): Log(
        loss=(4.165199, 4.156200, 4.193757, 4.173137),
        grad_norm=(0.807194, 0.793412, 0.786758, 0.752990),
        lr=(*_THIRDS[1:], 0.0),
    ),
    (2, "fp32", ("scheduler",)): Log(
        loss=(4.165199, 4.156200, 4.183418, 4.174455),
        grad_norm=(0.807194, 0.793412, 0.792720, 0.776741),
        lr=(0.0, 0.01, 0.01, 0.005),
    ),
    (2, "fp32", ("optimizer", "scheduler")): Log(
        loss=(4.165199, 4.156200, 4.183418, 4.174455),
        grad_norm=(0.807194, 0.793412, 0.792720, 0.776741),
        lr=(0.0, 0.01, 0.01, 0.005),
    ),
    (2, "bf16", ()): Log(
        loss=(4.165225, 4.156190, 4.193747, 4.172989),
        grad_norm=(0.806642, 0.793258, 0.786429, 0.753091),
        lr=_THIRDS,
    ),
}
