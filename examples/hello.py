"""The smallest complete script: run it with `zeroshard --num_gpus 2 examples/hello.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import zeroshard

config = {
    "train_micro_batch_size_per_gpu": 32,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    "zero_optimization": {"stage": 2},
}
torch.manual_seed(0)  # every rank builds the same data and the same model
inputs = torch.randn(2048, 4)
dataset = TensorDataset(inputs, inputs.sin().sum(1, keepdim=True))
model = nn.Sequential(nn.Linear(4, 64), nn.GELU(), nn.Linear(64, 1))

engine, _, loader, _ = zeroshard.initialize(model=model, training_data=dataset, config=config)
for epoch in range(5):
    for x, y in loader:
        loss = F.mse_loss(engine(x.to(engine.device)), y.to(engine.device))
        engine.backward(loss)
        engine.step()
    if engine.global_rank == 0:
        print(f"epoch {epoch}: loss {loss.item():.3f} after {engine.global_steps} steps")
