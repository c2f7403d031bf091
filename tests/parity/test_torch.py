"""A second opinion: torch's own DistributedDataParallel and FSDP2 on the same ranks and data."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from forked import run_ranks
from reference import SEED, TIGHT_CLIP, Record, Setting, differences, engine_run, make_optimizer
from zoo import ZOO, Case

STAGES = (0, 1, 2, 3)

# FSDP2 wants the parameters of a module to agree in dtype, and ranks that agree on what they use.
FSDP_CASES = (
    "attention",
    "block_called_twice",
    "forward_without_gradient",
    "frozen_weight_in_each_block",
    "low_rank_adapters",
    "nested_units",
    "order_varies_by_step",
    "plain",
    "tied_head",
    "two_backwards",
)
# The other way round, for what FSDP2 cannot take; where both could, one of them is enough.
DDP_CASES = (
    "block_called_twice",
    "plain",
    "tied_head",
    "mixed_dtypes",
    "mixture_of_experts",
    "never_used",
    "odd_shapes",
    "used_on_some_ranks",
)


def ddp_run(case: Case, setting: Setting, rank: int) -> Record:
    """Train under DistributedDataParallel."""
    model = DistributedDataParallel(
        case.build(SEED, setting.checkpointing), find_unused_parameters=True
    )
    record = Record([], [], {}, [])
    train_with_torch(model, case, setting, rank, record)
    weights = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    return Record(record.losses, record.norms, weights, [])


def fsdp_run(case: Case, setting: Setting, rank: int) -> Record:
    """Train under FSDP2 with the blocks of the case as its groups."""
    mesh = init_device_mesh("cpu", (setting.world,))
    model = case.build(SEED, setting.checkpointing)
    for module in reversed(list(model.modules())):
        if type(module).__name__ in case.units:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    record = Record([], [], {}, [])
    train_with_torch(model, case, setting, rank, record)
    weights = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
    return Record(record.losses, record.norms, weights, [])


def train_with_torch(
    model: nn.Module, case: Case, setting: Setting, rank: int, record: Record
) -> None:
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(setting.optimizer, trainable)
    for step in range(setting.steps):
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for micro in range(setting.accumulation):
            for loss in case.losses(model, case.batch(step, micro, rank)):
                total += loss.detach().double()
                (loss / setting.accumulation).backward()
        dist.all_reduce(total)
        for param in trainable:
            # Torch leaves parameters alone that no rank used; here their gradient is zero.
            if param.grad is None:
                param.grad = torch.zeros_like(param)
        norm = nn.utils.clip_grad_norm_(trainable, setting.clip or torch.inf)
        optimizer.step()
        record.losses.append(total.item() / (setting.world * setting.accumulation))
        record.norms.append(whole(norm).item())


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def failures(oracle: Callable[[Case, Setting, int], Record], name: str, world: int) -> list[str]:
    case = ZOO[name]

    def work(rank: int, world: int) -> list[str]:
        found = []
        for accumulation, clip, mode in ((1, 0.0, "none"), (2, TIGHT_CLIP, "non_reentrant")):
            settings = [Setting(stage, world, accumulation, clip, mode) for stage in STAGES]
            want = oracle(case, settings[0], rank)
            for setting in settings:
                got = engine_run(case, setting, rank)
                found.extend(f"[{setting}] {text}" for text in differences(got, want))
        return found

    return list(itertools.chain(*run_ranks(work, world)))


@pytest.mark.parametrize("name", DDP_CASES)
def test_every_stage_trains_as_torch_ddp_does(name: str) -> None:
    assert failures(ddp_run, name, world=2) == []


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view:UserWarning")
@pytest.mark.parametrize("name", FSDP_CASES)
def test_every_stage_trains_as_torch_fsdp2_does(name: str) -> None:
    assert failures(fsdp_run, name, world=3) == []
