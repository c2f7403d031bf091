"""What offload does to memory, and that it changes no loss.

    zeroshard --num_gpus 2 examples/offload.py

Trains one model four times: with everything on the device, with a GPU memory budget, with the
optimizer's state in host memory, and with parameters there, too. With `--nvme PATH` a fifth run
keeps all of it in files of that folder.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import zeroshard

STEPS = 5
WIDTH = 256
BUDGET_GIB = 0.008  # of model state on all devices together


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nvme", metavar="PATH", help="an existing folder, to keep state in files")
    path = parser.parse_args().nvme

    zeroshard.init_distributed()
    budget = BUDGET_GIB / dist.get_world_size()
    cpu: dict[str, Any] = {"device": "cpu"}
    nvme: dict[str, Any] = {"device": "nvme", "nvme_path": path}
    choices: dict[str, dict[str, Any]] = {
        "all on the device": {},
        "a budget": {"zeroshard": {"gpu_budget": budget}},
        "state on the host": {"zero_optimization": {"stage": 3, "offload_optimizer": cpu}},
        "all on the host": {
            "zero_optimization": {"stage": 3, "offload_optimizer": cpu, "offload_param": cpu}
        },
    }
    if path:
        choices["all in files"] = {
            "zero_optimization": {"stage": 3, "offload_optimizer": nvme, "offload_param": nvme}
        }
    for name, choice in choices.items():
        train(name, choice)
    dist.destroy_process_group()


def train(name: str, choice: dict[str, Any]) -> None:
    """Train a model and say what it held where, and how it ended."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 16,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": 3},
        **choice,
    }
    if choice:  # where state is stepped is measured otherwise, and the host rounds in another way
        config["zeroshard"] = {"offload_update": "gpu", **choice.get("zeroshard", {})}
    torch.manual_seed(0)  # every rank builds the same model
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(8)]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 1))
    engine, _, _, _ = zeroshard.initialize(model=model, config=config)
    inputs = torch.randn(16, WIDTH, device=engine.device, dtype=torch.bfloat16)
    for _ in range(STEPS):
        loss = F.mse_loss(engine(inputs).float(), inputs[:, :1].float())
        engine.backward(loss)
        engine.step()
    held = engine.memory()
    if engine.global_rank == 0:
        here = (held.parameters_bytes + held.optimizer_bytes) / 1e6
        host, files = held.host_bytes / 1e6, held.file_bytes / 1e6
        print(
            f"{name:<20} loss {loss.item():.6f}   on the device {here:6.2f} MB   "
            f"on the host {host:6.2f} MB   in files {files:6.2f} MB",
            flush=True,
        )
    engine.destroy()


if __name__ == "__main__":
    main()
