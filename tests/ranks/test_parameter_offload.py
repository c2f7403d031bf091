"""Shards of parameters off the device: the same training to the last bit, nothing left there."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import zeroshard
from forked import run_ranks
from reference import Setting, engine_run, make_engine, train
from zeroshard.core.building import build_unit
from zeroshard.core.lifetime import STAGES
from zeroshard.core.slots import full_shape, is_waiting
from zeroshard.core.unit import Unit
from zeroshard.engine import build
from zoo import ZOO

CASES = [
    "tied_head",
    "nested_units",
    "block_called_twice_apart",
    "low_rank_adapters",
    "order_varies_by_rank",
    "checkpointed_segments",
]


def offloaded(device: str, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3, "offload_param": {"device": device, **more}}}


HOST = offloaded("cpu")
EVERYTHING = {
    "zero_optimization": {**HOST["zero_optimization"], "offload_optimizer": {"device": "cpu"}}
}


def in_files(folder: Path) -> dict[str, Any]:
    """Through so few and small buffers that some shards take several, and not all fit in them."""
    few = {"buffer_count": 3, "buffer_size": 2048, "max_in_cpu": 0}
    return offloaded("nvme", nvme_path=str(folder), **few)


def live_storages() -> dict[int, int]:
    """Bytes of every tensor memory that Python can reach, by address."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors if not tensor.is_meta]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def setting_of(name: str, world: int, extra: Mapping[str, Any]) -> Setting:
    mode = ZOO[name].checkpointing[-1]
    return Setting(3, world, 2, 0.1, mode, precision="bf16", steps=2, extra=extra)


@pytest.mark.parametrize("world", [1, 2])
def test_training_is_the_same_to_the_last_bit_wherever_shards_are(
    world: int, tmp_path: Path
) -> None:
    def work(rank: int, world: int) -> list[str]:
        found: list[str] = []
        for number, name in enumerate(CASES):
            plain = engine_run(ZOO[name], setting_of(name, world, {}), rank)
            # Each meets both, one of them on one rank and the other one on two.
            where, extra = ("host", HOST) if (number + world) % 2 else ("files", in_files(tmp_path))
            record = engine_run(ZOO[name], setting_of(name, world, extra), rank)
            same = record.losses == plain.losses and record.norms == plain.norms
            same = same and all(
                torch.equal(record.weights[key], weight) for key, weight in plain.weights.items()
            )
            found += [] if same else [f"{name}, shards in {where}"]
        return found

    assert run_ranks(work, world) == [[]] * world


def test_the_device_holds_what_is_in_use_and_no_more() -> None:
    def work(rank: int, world: int) -> tuple[int, int, int, int]:
        case = ZOO["checkpointed_segments"]
        setting = setting_of(case.name, world, HOST)
        engine = make_engine(case, setting)
        units, peak, full = engine.runtime.units, 0, 0

        def sample(*_: object) -> None:
            nonlocal peak, full
            peak = max(peak, sum(unit.parameter_bytes for unit in units))
            full = max(full, sum(unit.is_full for unit in units))

        for module in engine.module.modules():
            module.register_forward_pre_hook(sample)
        train(engine, case, setting, rank, steps=range(2))
        assert all(not unit.is_shard_near for unit in units)
        nbytes = sorted((unit.nbytes_full for unit in units), reverse=True)
        return peak, full, sum(nbytes[:4]), engine.memory().parameters_bytes

    for world in (1, 2):
        for peak, full, ceiling, left in run_ranks(work, world):
            assert 0 < peak <= ceiling  # one in use, the one around it, and two on their way
            assert full <= 4
            assert left == 0


def test_shards_off_the_device_are_edited_saved_loaded_and_run_as_any_other(tmp_path: Path) -> None:
    def work(rank: int, world: int) -> None:
        case = ZOO["frozen_block_between"]
        extras = ({}, HOST, in_files(tmp_path), EVERYTHING)
        settings = [Setting(3, world, precision="bf16", extra=extra) for extra in extras]
        plain = settings[0]
        engines = [make_engine(case, setting) for setting in settings]
        weights: list[list[Tensor]] = []
        for engine in engines:
            params = list(engine.module.parameters())
            with zeroshard.gathered(params[:3], modifier_rank=0), torch.no_grad():
                params[0].mul_(1 + rank)
                params[0].data[0] = 0.5
            train(engine, case, plain, rank, steps=range(1))
            kept = zeroshard.zero.safe_get_full_fp32_param(params[0])
            assert kept is not None
            zeroshard.zero.safe_set_full_fp32_param(params[0], kept * 2)
            engine.offload_states()  # some have nothing to move, and nothing of theirs is lost
            engine.reload_states()
            engine.eval()
            with torch.no_grad():
                (outputs,) = case.losses(engine, case.batch(0, 0, rank))
            engine.train()
            with zeroshard.gathered(engine.module):
                weights.append([*(param.detach().clone() for param in params), outputs])
        for others in weights[1:]:
            assert all(torch.equal(a, b) for a, b in zip(weights[0], others, strict=True))
        engines[2].save_checkpoint(str(tmp_path / str(world)))
        losses = [train(engines[2], case, plain, rank, steps=range(1, 3))]
        for setting in settings:
            engine = make_engine(case, setting)
            engine.load_checkpoint(str(tmp_path / str(world)))
            losses.append(train(engine, case, plain, rank, steps=range(1, 3)))
        assert all(each == losses[0] for each in losses)

    for world in (1, 2):
        run_ranks(work, world)


class Wide(nn.Module):
    """Large enough that a unit shows in what the process has."""

    def __init__(self, width: int = 512, depth: int = 12) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
            for _ in range(depth)
        )

    def forward(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            h = h + block(h)
        return h


@pytest.mark.parametrize("built", ["in shards", "as an ordinary model"])
def test_building_holds_one_unit_beside_the_shards(built: str) -> None:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        **HOST,
    }

    def work(rank: int, world: int) -> None:
        context = (
            zeroshard.zero.Init(config_dict_or_path=config)
            if built == "in shards"
            else contextlib.nullcontext()
        )
        with context:
            model = Wide()
        numel = sum(full_shape(param).numel() for param in model.parameters())
        sizes: list[int] = []

        def build_and_measure(*args: Any, **kwargs: Any) -> Unit:
            unit = build_unit(*args, **kwargs)
            sizes.append(sum(live_storages().values()))
            return unit

        if built == "in shards":
            assert all(is_waiting(param) for param in model.parameters())
            waiting = sum(live_storages().values())
            assert waiting <= numel * 2 / world * 1.05
        before = sum(live_storages().values())
        with mock.patch.object(build, "build_unit", build_and_measure):
            engine = zeroshard.initialize(model=model, config=config)[0]
        # What a unit had before is gone when it stands: what is left falls as what is new grows.
        # Gloo may hold on to what it has sent, of one unit at most.
        fp32_unit, per_unit = 4 * numel / len(sizes), (2 + 4) * numel / world / len(sizes)
        for number, live in enumerate(sizes, 1):
            old = before * (1 - number / len(sizes))
            assert live <= old + number * per_unit + 1.01 * fp32_unit
        assert all(unit.lifetime is STAGES[3] for unit in engine.runtime.units)

    for world in (1, 2):
        run_ranks(work, world)
