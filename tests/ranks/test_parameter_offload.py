"""Shards of parameters off the device: the same training to the last bit, nothing left there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import pytest
import torch

from forked import run_ranks
from places import ThreadedFiles
from reference import Setting, engine_run
from zeroshard.core.depot import PlainDepot
from zeroshard.core.staging import InFiles, Staging
from zeroshard.engine import build
from zoo import ZOO

CASES = [
    "tied_head",
    "nested_units",
    "block_called_twice_apart",
    "weight_read_by_sibling",
    "frozen_block_between",
    "low_rank_adapters",
    "mixture_of_experts",
    "order_varies_by_rank",
    "odd_shapes",
    "checkpointed_segments",
]
HOST: Mapping[str, Any] = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
FILES: Mapping[str, Any] = {
    "zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/tmp"}}
}
BUFFER_BYTES = 4096


@contextlib.contextmanager
def files_in_memory() -> Iterator[list[Staging]]:
    """Files that are none, behind a few small buffers."""
    made: list[Staging] = []

    def place(settings: Any) -> InFiles:
        made.append(Staging(ThreadedFiles(), PlainDepot(), count=3, nbytes=BUFFER_BYTES))
        return InFiles(made[-1])

    with mock.patch.object(build, "_place_of_shards", place):
        yield made


def setting_of(name: str, world: int, extra: Mapping[str, Any]) -> Setting:
    checkpointing = ZOO[name].checkpointing[-1]
    precision = "bf16"
    return Setting(3, world, 2, 0.1, checkpointing, precision=precision, steps=2, extra=extra)


@pytest.mark.parametrize("world", [1, 2])
def test_training_is_the_same_to_the_last_bit_wherever_shards_are(world: int) -> None:
    def work(rank: int, world: int) -> list[str]:
        found: list[str] = []
        for name in CASES:
            plain = engine_run(ZOO[name], setting_of(name, world, {}), rank)
            host = engine_run(ZOO[name], setting_of(name, world, HOST), rank)
            with files_in_memory():
                files = engine_run(ZOO[name], setting_of(name, world, FILES), rank)
            for where, record in (("host", host), ("files", files)):
                same = record.losses == plain.losses and record.norms == plain.norms
                same = same and all(
                    torch.equal(record.weights[key], weight)
                    for key, weight in plain.weights.items()
                )
                found += [] if same else [f"{name}, shards in {where}"]
        return found

    assert run_ranks(work, world) == [[]] * world
