"""Gradient checkpointing in all the ways that the tutorial prints.

    deepspeed --num_gpus=2 seed_checkpointing.py

It changes no loss: each way is run with it and without.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace

import torch
from small import Windows, byte_tokenizer, small_llama
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import deepspeed

NUM_STEPS = 4
dataset = Windows(byte_tokenizer())


def with_the_trainer(**gradient_checkpointing: object) -> float:
    training_args = TrainingArguments(
        output_dir="./output",
        per_device_train_batch_size=2,
        max_steps=NUM_STEPS,
        learning_rate=1e-3,
        deepspeed="ds_config.json",
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        disable_tqdm=True,
        **gradient_checkpointing,
    )
    trainer = Trainer(model=small_llama(), args=training_args, train_dataset=dataset)
    return trainer.train().training_loss


def standalone(model: nn.Module) -> float:
    ds_config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 3},
    }
    model_engine, _, _, _ = deepspeed.initialize(model=model, config=ds_config)
    total = 0.0
    for batch, _ in zip(DataLoader(dataset, batch_size=2), range(NUM_STEPS), strict=False):
        inputs = batch["input_ids"].to(model_engine.device)
        loss = model_engine(inputs, labels=inputs).loss
        model_engine.backward(loss)
        model_engine.step()
        total += loss.item()
    model_engine.destroy()
    return total / NUM_STEPS


class YourModel(nn.Module):
    """A custom model, each layer of which `run` calls."""

    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(num_hidden_layers=3)
        self.embedding = nn.Embedding(258, 64)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, 64))
            for _ in range(self.config.num_hidden_layers)
        )
        self.head = nn.Linear(64, 258)
        self.run = run

    def forward(self, tokens: Tensor, labels: Tensor) -> SimpleNamespace:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + self.run(layer, x)
        logits = self.head(x[:, :-1]).flatten(0, 1)
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels[:, 1:].flatten()))


def say(what: str, loss: float) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{what}: mean loss {loss:.4f}")


say("Trainer, without", with_the_trainer())
say(
    "Trainer, with",
    with_the_trainer(
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    ),
)

say("Hugging Face's model, without", standalone(small_llama()))
model = small_llama()
model.gradient_checkpointing_enable()
say("Hugging Face's model, with", standalone(model))

say("custom model, without", standalone(YourModel(run=lambda layer, x: layer(x))))
model = YourModel(run=deepspeed.checkpointing.checkpoint)
# or for custom models:
deepspeed.checkpointing.configure(
    num_checkpoints=model.config.num_hidden_layers,
)
say("custom model, with", standalone(model))
