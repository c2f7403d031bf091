"""The training loop on deepspeed.initialize, as the tutorial prints it.

    deepspeed --num_gpus=2 seed_standalone.py

`python seed_standalone.py` is a world of one rank.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from small import Windows, byte_tokenizer, small_llama
from torch.utils.data import DataLoader, DistributedSampler

import deepspeed

YourModel = small_llama

parser = argparse.ArgumentParser(description="Train a small Llama with deepspeed.initialize.")
parser.add_argument("--steps", type=int, default=16, help="optimizer steps")
parser.add_argument("--stage", type=int, default=2, help="ZeRO stage; 2 is printed")
parser.add_argument("--lr", type=float, default=3e-5, help="learning rate; 3e-5 is printed")
parser.add_argument("--fp16", action="store_true", help="the printed block instead of bf16")
options = parser.parse_args()

model = YourModel()

ds_config = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "optimizer": {
        "type": "AdamW",
        "params": {
            "lr": 3e-5,
            "betas": [0.9, 0.999],
            "eps": 1e-8,
            "weight_decay": 0.01,
        },
    },
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
}

# 32 is printed for four ranks: 4 samples x 2 micro-batches x 4 ranks.
world_size = int(os.environ.get("WORLD_SIZE", "1"))
ds_config["train_batch_size"] = 4 * 2 * world_size
ds_config["zero_optimization"] = {"stage": options.stage}
ds_config["optimizer"]["params"]["lr"] = options.lr
if options.fp16:
    del ds_config["bf16"]
    ds_config |= json.loads(Path(__file__).with_name("fp16.json").read_text())

torch.manual_seed(0)
dataset = Windows(byte_tokenizer())
rank = int(os.environ.get("RANK", "0"))
sampler = DistributedSampler(dataset, num_replicas=world_size, rank=rank, seed=0)
dataloader = DataLoader(dataset, batch_size=4, sampler=sampler, drop_last=True)

model_engine, optimizer, _, _ = deepspeed.initialize(
    model=model,
    config=ds_config,
)

for batch in dataloader:
    inputs = batch["input_ids"].to(model_engine.local_rank)
    labels = batch["labels"].to(model_engine.local_rank)

    outputs = model_engine(inputs, labels=labels)
    loss = outputs.loss

    model_engine.backward(loss)
    model_engine.step()

    if model_engine.was_step_applied() and model_engine.global_rank == 0:
        print(f"step {model_engine.global_steps}: loss {loss.item():.3f}")
    if model_engine.global_steps == options.steps:
        break
