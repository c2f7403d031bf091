"""Accelerate's portable loop, as the tutorial prints it; DeepSpeed is chosen when it is launched.

    accelerate launch --config_file accelerate.yaml --num_processes=2 seed_accelerate.py

Without the option, `accelerate launch` reads what `accelerate config` has written.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from small import Windows, byte_tokenizer, small_llama
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader

parser = argparse.ArgumentParser(description="Train a small Llama with Accelerate.")
parser.add_argument("--lr", type=float, default=1e-3, help="learning rate")
options = parser.parse_args()

model = small_llama()
optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
dataloader = DataLoader(Windows(byte_tokenizer()), batch_size=8, shuffle=True)
scheduler = LinearLR(optimizer, start_factor=1.0, end_factor=0.1, total_iters=len(dataloader))

accelerator = Accelerator()
model, optimizer, dataloader, scheduler = accelerator.prepare(
    model, optimizer, dataloader, scheduler
)

for batch in dataloader:
    outputs = model(**batch)
    loss = outputs.loss
    accelerator.backward(loss)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    accelerator.print(f"loss {loss.item():.3f}")
