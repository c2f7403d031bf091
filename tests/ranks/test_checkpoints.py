"""Checkpoints: what a resumed run must equal, what fits where, and what is refused."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter, OrderedDict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import zeroshard
from forked import run_ranks
from zeroshard import checkpoint
from zeroshard.checkpoint import reader
from zeroshard.checkpoint import tensors as files
from zeroshard.errors import CheckpointError, DistributedError, UsageError

STAGES = (0, 1, 2, 3)
WIDTH, VOCABULARY, ROWS = 12, 31, 12


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 20)
        self.gate = nn.Parameter(torch.full((), 0.5))
        self.down = nn.Linear(20, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.dropout(self.down(F.gelu(self.up(self.frozen(x)))))


class Net(nn.Module):
    """Tied, frozen, without dimensions, without elements, with buffers: all that is to be kept."""

    def __init__(self, dropout: float = 0.0, blocks: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(blocks))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.head.weight = self.embedding.weight
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.keeps_mean = dropout > 0  # of this rank's rows, so it differs between ranks
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("cache", torch.ones(2), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        if self.keeps_mean:
            self.mean.lerp_(h.detach().float().mean(0), 0.1)
            h = h - self.mean.to(h.dtype)
        for block in self.blocks:
            h = block(h)
        self.steps += 1
        return self.head(h)


ADAM = {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1}}


def make(
    stage: int,
    world: int,
    *,
    accumulation: int = 1,
    model: nn.Module | None = None,
    given: Any = None,
    **more: Any,
) -> zeroshard.Engine:
    if model is None:
        torch.manual_seed(0)
        model = Net()
    config = {
        "train_batch_size": ROWS * accumulation,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": stage},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 6}},
        **more,
    }
    if given is None:
        config.setdefault("optimizer", ADAM)
    return zeroshard.initialize(model=model, config=config, optimizer=given)[0]


def batch(number: int, rank: int, world: int) -> Tensor:
    """This rank's rows of a batch that is the same for any number of ranks."""
    ids = torch.randint(0, VOCABULARY, (ROWS,), generator=torch.Generator().manual_seed(number))
    return ids.view(world, -1)[rank]


def train(engine: zeroshard.Engine, micro_steps: range) -> list[float]:
    """Losses of some micro-steps, averaged over ranks."""
    losses = []
    for number in micro_steps:
        ids = batch(number, engine.global_rank, engine.world_size)
        loss = F.cross_entropy(engine(ids).float(), (ids + 1) % VOCABULARY)
        engine.backward(loss)
        engine.step()
        total = loss.detach().double()
        torch.distributed.all_reduce(total)
        losses.append(total.item() / engine.world_size)
    return losses


def everything(engine: zeroshard.Engine) -> dict[str, Any]:
    """All state there is, this rank's part of it where it is sharded."""
    with zeroshard.gathered(engine.module):
        state = {name: value.clone() for name, value in engine.module.state_dict().items()}
    for unit in engine.runtime.units:
        for index, piece in enumerate(unit.slices):
            name = unit.members[index].name
            state[f"master {name}"] = piece.detach().clone()
            # What an optimizer keeps for a slice without elements has no effect.
            kept = engine.basic_optimizer.state.get(piece, {}) if piece.numel() else {}
            for key, value in kept.items():
                state[f"{key} {name}"] = torch.as_tensor(value).clone()
    counters = ("micro_steps", "global_steps", "global_samples", "skipped_steps", "loss_scale")
    state |= {name: torch.tensor(getattr(engine, name)) for name in counters}
    state["lr"] = torch.tensor(engine.get_lr())
    return state


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return sorted(
        [*(a.keys() ^ b.keys()), *(n for n in a.keys() & b.keys() if not torch.equal(a[n], b[n]))]
    )


# Exact resume -----------------------------------------------------------------------------------

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 20, "loss_scale_window": 3}},
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_equals_one_that_never_stopped_bit_by_bit(stage: int, tmp_path: Path) -> None:
    def work(rank: int, world: int) -> None:
        for name, precision in PRECISIONS.items():
            folder = tmp_path / name

            def fresh(more: dict[str, Any] = precision) -> zeroshard.Engine:
                torch.manual_seed(0)
                net = Net(dropout=0.3)
                return make(stage, world, accumulation=3, model=net, **more)

            engine = fresh()
            torch.manual_seed(rank)
            train(engine, range(8))  # two steps, and two micro-steps of the third
            if name == "fp16":
                assert engine.loss_scale < 2**20
            engine.save_checkpoint(folder)
            want = train(engine, range(8, 14))
            drawn = (random.random(), np.random.rand(), torch.rand(()).item())
            state = everything(engine)
            engine.destroy()
            torch.manual_seed(99)
            random.seed(99)
            np.random.seed(99)
            resumed = fresh()
            assert resumed.load_checkpoint(folder) == (str(folder / "global_step2"), {})
            assert train(resumed, range(8, 14)) == want
            assert (random.random(), np.random.rand(), torch.rand(()).item()) == drawn
            assert differing(everything(resumed), state) == []
            resumed.destroy()

    run_ranks(work, world=2, timeout=100)


def test_a_resumed_run_goes_on_with_each_kind_of_optimizer(tmp_path: Path) -> None:
    kinds: dict[str, Any] = {
        "sgd": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
        "lamb": {"type": "Lamb", "params": {"lr": 1e-2}},
        "muon": {"type": "Muon", "params": {"lr": 1e-2}},
        "lion": {"type": "Lion", "params": {"lr": 1e-3}},
        "adagrad": {"type": "Adagrad", "params": {"lr": 1e-2}},
    }

    def work(rank: int, world: int) -> None:
        for name, kind in kinds.items():
            folder = tmp_path / name
            engine = make(3, world, optimizer=kind)
            train(engine, range(3))
            engine.save_checkpoint(folder)
            want, state = train(engine, range(3, 6)), everything(engine)
            engine.destroy()
            resumed = make(3, world, optimizer=kind)
            resumed.load_checkpoint(folder)
            assert train(resumed, range(3, 6)) == want
            assert differing(everything(resumed), state) == []
            resumed.destroy()

    run_ranks(work, world=2, timeout=100)


# Any stage and number of ranks ------------------------------------------------------------------


def test_any_stage_and_number_of_ranks_goes_on_from_any_other(tmp_path: Path) -> None:
    """In the middle of an accumulation, and divided into other units."""
    written = {1: (0,), 2: (0, 1, 3), 3: (0, 1, 2, 3)}
    read = {1: (3,), 2: STAGES, 4: STAGES}

    def save(rank: int, world: int) -> list[float]:
        want: list[float] = []
        for stage in written[world]:
            engine = make(stage, world, accumulation=2, zeroshard={"units": ["Block"]})
            train(engine, range(3))
            engine.save_checkpoint(tmp_path / f"stage {stage} of {world}")
            want = want or train(engine, range(3, 8))
            engine.destroy()
        return want

    def load(rank: int, world: int) -> None:
        sources = sorted(tmp_path.iterdir())
        for stage in read[world]:
            for source in sources[(world // 2 + stage) % 2 :: 2]:
                engine = make(stage, world, accumulation=2)
                engine.load_checkpoint(source)
                assert (engine.micro_steps, engine.global_steps) == (3, 1)
                got = train(engine, range(3, 8))
                assert got == pytest.approx(want, rel=1e-6), f"stage {stage} from {source.name}"
                engine.destroy()

    for world in written:
        want = run_ranks(save, world)[0]
    for world in read:
        run_ranks(load, world, timeout=100)


def test_a_run_goes_on_in_another_precision(tmp_path: Path) -> None:
    def work(rank: int, world: int) -> None:
        kinds: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
            "fp32": (torch.float32, {}),
            "bf16": (torch.float32, PRECISIONS["bf16"]),
            "fp16": (torch.float32, {"fp16": {"enabled": True, "initial_scale_power": 6}}),
            "fp64": (torch.float64, {}),
        }

        def fresh(name: str) -> zeroshard.Engine:
            torch.manual_seed(0)
            dtype, precision = kinds[name]
            return make(3, world, model=Net().to(dtype), **precision)

        for source in kinds:
            engine = fresh(source)
            train(engine, range(8))
            engine.save_checkpoint(tmp_path / source)
            want = train(engine, range(8, 11))
            before = engine.global_steps
            engine.destroy()
            for target in kinds:
                resumed = fresh(target)
                resumed.load_checkpoint(tmp_path / source)
                got = train(resumed, range(8, 11))
                assert got == pytest.approx(want, rel=2e-2), (source, target)
                assert resumed.global_steps == before
                resumed.destroy()

    run_ranks(work, 2, timeout=60)


def test_an_accumulation_of_another_length_starts_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def work(rank: int, world: int) -> None:
        engine = make(1, world, accumulation=2)
        train(engine, range(3))
        engine.save_checkpoint(tmp_path)
        engine.destroy()
        resumed = make(1, world, accumulation=4)
        with caplog.at_level(logging.WARNING, logger="zeroshard"):
            resumed.load_checkpoint(tmp_path)
        assert "after 1 of 2 micro-steps of a step, which now has 4" in caplog.text
        assert resumed.micro_steps == 2
        train(resumed, range(3))
        assert resumed.global_steps == 1
        train(resumed, range(1))
        assert resumed.global_steps == 2

    run_ranks(work, 2)


def test_an_accumulation_under_way_ends_where_its_gradients_mean_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the optimizer is not loaded, and where gradients were scaled otherwise."""

    def work(rank: int, world: int) -> None:
        engine = make(3, world, accumulation=2)
        train(engine, range(3))
        engine.save_checkpoint(tmp_path / "fp32")
        engine.destroy()

        runs = []
        for before in (range(0), range(20, 21)):
            fresh = make(3, world, accumulation=2)
            train(fresh, before)
            fresh.load_checkpoint(tmp_path / "fp32", load_optimizer_states=False)
            assert fresh.micro_steps == 2
            runs.append((train(fresh, range(5, 9)), everything(fresh)))
            fresh.destroy()
        assert runs[0][0] == runs[1][0]
        assert differing(runs[0][1], runs[1][1]) == []

        half = make(3, world, accumulation=2, **PRECISIONS["fp16"])
        train(half, range(11))
        half.save_checkpoint(tmp_path / "fp16")
        half.destroy()
        pairs: tuple[tuple[str, dict[str, Any]], ...] = (
            ("fp16", {}),
            ("fp32", {"fp16": {"enabled": True, "loss_scale": 64}}),
            ("fp16", {"fp16": {"enabled": True, "loss_scale": 64}}),
        )
        for source, precision in pairs:
            caplog.clear()
            resumed = make(3, world, accumulation=2, **precision)
            with caplog.at_level(logging.WARNING, logger="zeroshard"):
                resumed.load_checkpoint(tmp_path / source)
            assert "a loss scale of" in caplog.text
            assert resumed.micro_steps % 2 == 0
            assert not any(unit.has_gradient for unit in resumed.runtime.units)
            resumed.destroy()

    run_ranks(work, 2)


def test_what_a_rank_reads_is_what_it_owns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, int]] = []
    read_range = files.TensorFile.read_range

    def counted(self: Any, name: str, start: int, out: Tensor) -> None:
        read.append((name, out.numel() * self.dtype(name).itemsize))
        read_range(self, name, start, out)

    monkeypatch.setattr(files.TensorFile, "read_range", counted)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return Net(blocks=8)

    def save(rank: int, world: int) -> None:
        engine = make(3, world, model=build())
        train(engine, range(1))
        engine.save_checkpoint(tmp_path)

    def load(rank: int, world: int) -> None:
        engine = make(3, world, model=build())
        engine.load_checkpoint(tmp_path)
        units = engine.runtime.units
        owned = sum(u.read_kept().nbytes * (3 if u.is_trained else 1) for u in units)
        of_parameters = [nbytes for name, nbytes in read if not name.startswith("buffers/")]
        assert owned / 2 < sum(of_parameters) <= owned
        largest = max(unit.nbytes_full for unit in units)
        assert max(nbytes for _, nbytes in read) <= largest

    run_ranks(save, 2)
    run_ranks(load, 4)


def test_a_checkpoint_of_more_files_than_are_kept_open_is_read_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_MOST_OPEN", 1)

    def work(rank: int, world: int) -> None:
        engine = make(3, world)
        train(engine, range(2))
        engine.save_checkpoint(tmp_path, client_state={"numbers": torch.arange(5)})
        want, state = train(engine, range(2, 4)), everything(engine)
        _, client = engine.load_checkpoint(tmp_path)
        assert client["numbers"].tolist() == [0, 1, 2, 3, 4]
        assert train(engine, range(2, 4)) == want
        assert differing(everything(engine), state) == []

    run_ranks(work, 2)


# What is written --------------------------------------------------------------------------------


def test_tensors_lie_in_safetensors_files_and_everything_else_in_json(tmp_path: Path) -> None:
    def work(rank: int, world: int) -> dict[str, Tensor]:
        engine = make(2, world)
        train(engine, range(2))
        engine.save_checkpoint(tmp_path, tag="a", client_state={"epoch": 3})
        return everything(engine)

    want = run_ranks(work, 2)[0]
    folder = tmp_path / "a"
    manifest = json.loads((folder / "manifest.json").read_text())
    parts = {rank: load_file(folder / f"rank_{rank:05d}.safetensors") for rank in range(2)}
    assert not [path for path in folder.iterdir() if path.name == "objects.pt"]
    for name, entry in manifest["parameters"].items():
        whole = torch.cat([parts[rank][f"weights/{name}"] for rank, *_ in entry["pieces"]])
        assert torch.equal(whole.view(entry["shape"]), want[name])
        if "slices" in entry:
            assert set(entry["slices"]) == {"exp_avg", "exp_avg_sq"}
    assert manifest["client"] == {"epoch": 3}
    assert manifest["names"]["head.weight"] == "embedding.weight"
    assert manifest["buffers"] == ["mean", "steps"]
    assert (tmp_path / "latest").read_text() == "a"


def test_ranks_with_equal_state_share_the_writing(tmp_path: Path) -> None:
    def work(rank: int, world: int) -> None:
        engine = make(0, world, zeroshard={"units": ["Block"]})
        train(engine, range(1))
        engine.save_checkpoint(tmp_path, tag="a")

    run_ranks(work, 2)
    sizes = [(tmp_path / "a" / f"rank_0000{rank}.safetensors").stat().st_size for rank in range(2)]
    assert max(sizes) < 0.75 * sum(sizes)


def test_frozen_parameters_can_be_left_out_and_then_stay_as_they_are(tmp_path: Path) -> None:
    def work(rank: int, world: int) -> None:
        engine = make(3, world)
        train(engine, range(2))
        before = everything(engine)
        engine.save_checkpoint(tmp_path / "part", exclude_frozen_parameters=True)
        engine.save_checkpoint(tmp_path / "whole")
        engine.destroy()
        other = Net()
        with torch.no_grad():
            for block in other.blocks:
                block.frozen.weight.fill_(rank + 3.0)
        resumed = make(3, world, model=other)
        resumed.load_checkpoint(tmp_path / "part")
        after = everything(resumed)
        changed = {f"blocks.{i}.frozen.{what}" for i in range(2) for what in ("weight", "bias")}
        assert set(differing(after, before)) == changed
        assert (after["blocks.0.frozen.weight"] == 3).all()
        resumed.load_checkpoint(tmp_path / "whole")
        assert differing(everything(resumed), before) == []

    run_ranks(work, 2)
    part = checkpoint.get_fp32_state_dict_from_zero_checkpoint(tmp_path / "part")
    assert not [name for name in part if "frozen" in name]


def test_client_state_comes_back_as_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = torch.arange(6.0).view(2, 3)
    data: dict[Any, Any] = {
        "epoch": 3,
        "nested": {1: (1, 2.5, None), "more": [True, {"a": {4, 5}}]},
        ("a", 1): math.inf,
        "tensors": [weights.t(), torch.tensor(3), torch.ones(2, dtype=torch.bfloat16)],
        "array": np.arange(4, dtype=np.int16).reshape(2, 2),
        "number": np.float64(0.1),
        "path": Path("a/b"),
        "when": datetime(2020, 1, 2, 3, 4, 5),
        "args": argparse.Namespace(lr=0.1),
        "ordered": OrderedDict(b=1, a=2),
        "counter": Counter("aab"),
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "#": "not a tag",
        "bytes": b"\x00\xff",
    }

    def work(rank: int, world: int) -> None:
        engine = make(2, world)
        engine.save_checkpoint(tmp_path, tag="data", client_state=data | {"rank": rank})
        with caplog.at_level(logging.WARNING, logger="zeroshard"):
            client = engine.load_checkpoint(tmp_path, tag="data")[1]
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert client.pop("rank") == 0
        for ours, theirs in zip(client.pop("tensors"), data["tensors"], strict=True):
            assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
        array = client.pop("array")
        assert (array == data["array"]).all() and array.dtype == np.int16
        rest = {key: value for key, value in data.items() if key not in {"tensors", "array"}}
        assert client == rest and [*map(type, client.values())] == [*map(type, rest.values())]

        engine.save_checkpoint(tmp_path, tag="objects", client_state={"own": Own(7)})
        with caplog.at_level(logging.WARNING, logger="zeroshard"):
            assert engine.load_checkpoint(tmp_path, tag="objects")[1]["own"].value == 7
        assert "is unpickled" in caplog.text
        with pytest.raises((UsageError, DistributedError), match="client_state holds something"):
            engine.save_checkpoint(tmp_path, tag="no", client_state={"f": lambda: 0})
        assert engine.load_checkpoint(tmp_path)[0] == str(tmp_path / "objects")

    run_ranks(work, 2)


def test_values_whose_memory_is_not_all_of_them_come_back_as_they_were(tmp_path: Path) -> None:
    whole = torch.tensor([1 + 2j, 3 - 4j])
    state: dict[str, Any] = {
        "whole": whole,
        "conjugate": whole.conj(),
        "negative": whole.clone().conj().imag,
        "flags": re.ASCII | re.DOTALL,
        "flag": re.ASCII,
        "record": np.array([(1, 2.5)], dtype=[("a", "i4"), ("b", "f8")]),
        "masked": np.ma.array([1, 2], mask=[False, True]),
    }

    def work(rank: int, world: int) -> None:
        engine = make(1, world)
        engine.save_checkpoint(tmp_path, client_state=state)
        _, got = engine.load_checkpoint(tmp_path)
        for name in ("whole", "conjugate", "negative"):
            assert torch.equal(got[name], state[name].resolve_conj().resolve_neg()), name
        assert (got["flags"], got["flag"]) == (state["flags"], state["flag"])
        assert got["record"].dtype == state["record"].dtype and (got["record"] == state["record"])
        assert got["masked"].mask.tolist() == [False, True]

    run_ranks(work, 1)


class Own:
    def __init__(self, value: int) -> None:
        self.value = value


# What is refused --------------------------------------------------------------------------------


class FullError(OSError):
    """What a disk says that is full."""


@pytest.mark.parametrize("stage", (0, 3))
def test_a_rank_that_cannot_write_leaves_the_checkpoint_before(stage: int, tmp_path: Path) -> None:
    def work(rank: int, world: int) -> None:
        engine = make(stage, world)
        train(engine, range(1))
        engine.save_checkpoint(tmp_path, tag="x")
        want = everything(engine)
        train(engine, range(1, 2))
        write = files._write

        def fail(file: Any, data: Any) -> None:
            if rank == 1 and len(data) > 300:
                raise FullError("no space left")
            write(file, data)

        files._write = fail
        for tag in ("x", "y"):
            expected: Any = FullError if rank == 1 else DistributedError
            with pytest.raises(expected, match="no space left") as raised:
                engine.save_checkpoint(tmp_path, tag=tag)
            assert rank == 1 or "rank 1 could not write its part" in str(raised.value)
        files._write = write
        torch.distributed.barrier()  # rank 0 tidies up when it knows
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "latest",
            "x",
            "zero_to_fp32.py",
        ]
        assert engine.load_checkpoint(tmp_path)[0] == str(tmp_path / "x")
        assert differing(everything(engine), want) == []

    run_ranks(work, 2)


def test_a_state_dict_that_one_rank_cannot_make_is_an_error_on_all(tmp_path: Path) -> None:
    class Moody(Net):
        is_moody = False

        def get_extra_state(self) -> dict[str, int]:
            if self.is_moody:
                raise ValueError("not today")
            return {"a": 1}

        def set_extra_state(self, state: dict[str, int]) -> None:
            assert state == {"a": 1}

    def work(rank: int, world: int) -> None:
        model = Moody()
        engine = make(1, world, model=nn.Sequential(OrderedDict(inner=model)))
        engine.save_checkpoint(tmp_path, tag="before")
        model.is_moody = rank == 1
        expected: Any = ValueError if rank == 1 else DistributedError
        with pytest.raises(expected, match="not today"):
            engine.save_checkpoint(tmp_path, tag="after")
        model.is_moody = False
        assert engine.load_checkpoint(tmp_path)[0] == str(tmp_path / "before")
        other = make(1, world, model=nn.Sequential(OrderedDict(another=Net())))
        other.load_checkpoint(tmp_path, load_module_strict=False, load_module_only=True)

    run_ranks(work, 2, timeout=30)


def test_a_checkpoint_that_was_being_replaced_is_found_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def work(rank: int, world: int) -> None:
        engine = make(1, world)
        engine.save_checkpoint(tmp_path, tag="x")
        torch.distributed.barrier()
        if rank == 0:
            (tmp_path / "x").rename(tmp_path / ".x.replaced")
            (tmp_path / ".x.unfinished").mkdir()
        with caplog.at_level(logging.WARNING, logger="zeroshard"):
            assert engine.load_checkpoint(tmp_path)[0] == str(tmp_path / "x")
        assert rank == 1 or "the older one is used" in caplog.text
        assert rank == 1 or ".x.unfinished of saves that were killed" in caplog.text
        engine.save_checkpoint(tmp_path, tag="x")
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]

    run_ranks(work, 2)


class KilledError(BaseException):
    """The end of a process: nothing that tidies up after an error sees it."""


@pytest.mark.parametrize("tag", ("same", "other"))
def test_a_save_that_ends_anywhere_leaves_a_whole_checkpoint(tag: str, tmp_path: Path) -> None:
    """At each thing that it does to files; in place of an older one, and beside it."""

    def work(rank: int, world: int) -> None:
        left: list[int] = []

        def kill(event: str, arguments: tuple[Any, ...]) -> None:
            is_ours = any(str(tmp_path) in str(each) for each in arguments)
            if left and is_ours and event.partition(".")[0] in {"open", "os", "shutil"}:
                left[0] -= 1
                if left[0] < 0:
                    left.clear()
                    raise KilledError

        sys.addaudithook(kill)
        engine = make(3, world)
        engine.save_checkpoint(tmp_path, tag="same", client_state={"done": 0})
        (tmp_path / "same" / "tokenizer.json").touch()
        num_ends, last, is_over = 0, 0, False
        while not is_over:
            left[:] = [num_ends]
            try:
                engine.save_checkpoint(tmp_path, tag=tag, client_state={"done": num_ends + 1})
                is_over = True
            except KilledError:
                num_ends += 1
            left.clear()
            checkpoint.get_fp32_state_dict_from_zero_checkpoint(tmp_path)
            path, client = engine.load_checkpoint(tmp_path)
            assert path is not None and last <= client["done"] <= num_ends + 1
            last = client["done"]
        assert num_ends > 20
        assert last == num_ends + 1
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
        assert (tmp_path / "same" / "tokenizer.json").exists()

    run_ranks(work, 1, timeout=60)


def test_a_tag_that_names_no_folder_of_its_own_is_refused(tmp_path: Path) -> None:
    def work(rank: int, world: int) -> None:
        engine = make(1, world)
        engine.save_checkpoint(tmp_path, tag="kept")
        engine.save_checkpoint(tmp_path, tag="nested/kept")
        torch.distributed.barrier()
        there = sorted(tmp_path.rglob("*"))
        for tag in ("", ".", "..", "a/../..", str(tmp_path / "b"), "latest", "zero_to_fp32.py"):
            with pytest.raises(UsageError, match="no name of a new folder"):
                engine.save_checkpoint(tmp_path, tag=tag)
        with pytest.raises(UsageError, match="save_latest or exclude_frozen_parameters"):
            engine.save_checkpoint(tmp_path, tag="a", exclude_frozen_parameters=rank == 1)
        torch.distributed.barrier()
        assert sorted(tmp_path.rglob("*")) == there

    run_ranks(work, 2)


def test_replacing_a_checkpoint_leaves_what_is_no_part_of_it(tmp_path: Path) -> None:
    def work(rank: int, world: int) -> None:
        engine = make(3, world)
        engine.save_checkpoint(tmp_path, tag="a")
        engine.save_checkpoint(tmp_path, tag="a/b")
        torch.distributed.barrier()
        if rank == 0:
            (tmp_path / "a" / "tokenizer.json").write_text("{}")
            (tmp_path / "a" / "rank_00007.safetensors").write_text("of a larger world")
            (tmp_path / "link").symlink_to("a")
            (tmp_path / "file").write_text("of somebody")
        torch.distributed.barrier()
        train(engine, range(2))
        for _ in range(2):
            engine.save_checkpoint(tmp_path, tag="a")
            assert (tmp_path / "a" / "tokenizer.json").read_text() == "{}"
            assert not (tmp_path / "a" / "rank_00007.safetensors").exists()
        assert engine.load_checkpoint(tmp_path, tag="a/b")[0]
        for _ in range(2):
            engine.save_checkpoint(tmp_path, tag="link")
        assert engine.load_checkpoint(tmp_path, tag="a")[0]
        with pytest.raises((UsageError, DistributedError), match="is a file"):
            engine.save_checkpoint(tmp_path, tag="file")
        assert not list(tmp_path.rglob(".*"))
        assert (tmp_path / "file").read_text() == "of somebody"

    run_ranks(work, 2)


def test_what_cannot_be_loaded_is_refused_on_every_rank_and_changes_nothing(tmp_path: Path) -> None:
    def cut(folder: Path) -> None:
        file = folder / "rank_00001.safetensors"
        os.truncate(file, file.stat().st_size - 5)

    def damage_header(folder: Path) -> None:
        file = folder / "rank_00001.safetensors"
        file.write_bytes(file.read_bytes().replace(b"data_offsets", b"data_offset_", 1))

    def make_foreign(folder: Path) -> None:
        (folder / "manifest.json").write_text("{}")

    damages: dict[str, tuple[Any, str]] = {
        "missing": (lambda folder: (folder / "rank_00001.safetensors").unlink(), "is missing"),
        "cut": (cut, r"rank_00001.* bytes, and had \d+"),
        "header": (damage_header, "rank_00001.* header that cannot be read"),
        "foreign": (make_foreign, "no manifest of a zeroshard checkpoint"),
        "gone": (shutil.rmtree, "there is no checkpoint .*gone"),
        "deepspeed": (lambda folder: (folder / "manifest.json").unlink(), "one of DeepSpeed"),
    }

    def work(rank: int, world: int) -> None:
        engine = make(3, world)
        train(engine, range(1))
        engine.save_checkpoint(tmp_path, tag="whole")
        train(engine, range(1, 2))
        want = everything(engine)
        for name, (damage, message) in damages.items():
            if rank == 0:
                shutil.copytree(tmp_path / "whole", tmp_path / name)
                damage(tmp_path / name)
            torch.distributed.barrier()
            # A rank that reads nothing of a damaged file hears of it from the one that does.
            with pytest.raises((CheckpointError, DistributedError), match=message):
                engine.load_checkpoint(tmp_path, tag=name)
            assert differing(everything(engine), want) == []
        engine.load_checkpoint(tmp_path, tag="whole")
        assert engine.global_steps == 1

    run_ranks(work, 2)


def test_a_file_that_one_rank_cannot_read_is_an_error_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(rank: int, world: int) -> None:
        engine = make(3, world)
        engine.save_checkpoint(tmp_path)
        if rank == 1:
            monkeypatch.setattr(files.TensorFile, "_read_header", lambda self: 1 / 0)
        expected: Any = ZeroDivisionError if rank == 1 else DistributedError
        with pytest.raises(expected) as raised:
            engine.load_checkpoint(tmp_path)
        assert rank == 1 or "rank 1 could not" in str(raised.value)

    run_ranks(work, 2)


def test_another_model_is_refused_with_the_names_that_differ(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def work(rank: int, world: int) -> None:
        torch.manual_seed(0)
        engine = make(3, world)
        train(engine, range(1))
        engine.save_checkpoint(tmp_path)
        before = everything(engine)
        engine.destroy()

        larger = make(1, world, model=Net(blocks=3))
        with pytest.raises(CheckpointError, match=r"blocks\.2\.up\.weight is not in it"):
            larger.load_checkpoint(tmp_path)
        smaller = make(1, world, model=Net(blocks=1))
        with pytest.raises(CheckpointError, match=r"blocks\.1\.gate is not in the model"):
            smaller.load_checkpoint(tmp_path)
        with caplog.at_level(logging.WARNING, logger="zeroshard"):
            smaller.load_checkpoint(tmp_path, load_module_strict=False)
        assert "blocks.1.gate is not in the model" in caplog.text
        now = everything(smaller)
        assert torch.equal(now["blocks.0.up.weight"], before["blocks.0.up.weight"])

        other = Net()
        other.head = nn.Linear(WIDTH, 5)
        with pytest.raises(CheckpointError, match=r"head\.bias was \(31,\), and is \(5,\)"):
            make(1, world, model=other).load_checkpoint(tmp_path, load_module_strict=False)

        sgd = make(2, world, optimizer={"type": "SGD", "params": {"lr": 0.1}})
        with pytest.raises(CheckpointError, match=r"torch\.AdamW, and the optimizer is torch\.SGD"):
            sgd.load_checkpoint(tmp_path)
        sgd.load_checkpoint(tmp_path, load_optimizer_states=False)
        assert torch.equal(everything(sgd)["head.weight"], before["head.weight"])

    run_ranks(work, 2)


def test_state_that_does_not_fit_is_refused_before_weights_change(tmp_path: Path) -> None:
    def grouped(world: int, *, matrices_first: bool) -> zeroshard.Engine:
        net = Net()
        trained = [param for param in net.parameters() if param.requires_grad]
        groups = [
            {"params": [p for p in trained if (p.dim() > 1) is is_matrix], "weight_decay": decay}
            for is_matrix, decay in ((matrices_first, 0.1), (not matrices_first, 0.0))
        ]
        return make(3, world, model=net, given=torch.optim.AdamW(groups, lr=1e-2))

    def work(rank: int, world: int) -> None:
        engine = grouped(world, matrices_first=True)
        train(engine, range(2))
        engine.save_checkpoint(tmp_path / "groups")
        engine.save_checkpoint(tmp_path / "client", client_state={"own": Own(1)})
        engine.destroy()
        other = grouped(world, matrices_first=False)
        train(other, range(5, 6))
        before = everything(other)
        with pytest.raises(CheckpointError, match=r"was in param group 0 .* and is in group 1"):
            other.load_checkpoint(tmp_path / "groups")
        assert differing(everything(other), before) == []
        objects = tmp_path / "client" / "global_step2" / "objects.pt"
        torch.distributed.barrier()
        if rank == 0:
            objects.write_bytes(b"?" * objects.stat().st_size)
        torch.distributed.barrier()
        with pytest.raises(CheckpointError, match=r"objects\.pt cannot be read"):
            other.load_checkpoint(tmp_path / "client", load_optimizer_states=False)
        assert differing(everything(other), before) == []

    run_ranks(work, 2)


def test_ranks_that_load_by_different_arguments_are_refused(tmp_path: Path) -> None:
    def work(rank: int, world: int) -> None:
        engine = make(3, world)
        for folder in ("a", "b"):
            train(engine, range(1))
            engine.save_checkpoint(tmp_path / folder, tag="x")
        before = everything(engine)
        for options in (
            {"load_dir": tmp_path / "ab"[rank]},
            {"load_dir": tmp_path / "a", "tag": "x" if rank else None},
            {"load_dir": tmp_path / "a", "load_module_only": rank == 1},
            {"load_dir": tmp_path / "a", "custom_load_fn": print if rank else None},
        ):
            with pytest.raises(UsageError, match="different values of load_dir, tag"):
                engine.load_checkpoint(**options)
        assert differing(everything(engine), before) == []

    run_ranks(work, 2)


def test_without_a_newest_checkpoint_nothing_is_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def work(rank: int, world: int) -> None:
        engine = make(2, world)
        with caplog.at_level(logging.WARNING, logger="zeroshard"):
            assert engine.load_checkpoint(tmp_path) == (None, {})
        assert "no file 'latest'" in caplog.text
        engine.save_checkpoint(tmp_path, tag="a", save_latest=False)
        assert engine.load_checkpoint(tmp_path) == (None, {})
        assert engine.load_checkpoint(tmp_path, "a") == (str(tmp_path / "a"), {})
        with pytest.raises(UsageError, match="different values of save_dir, tag"):
            engine.save_checkpoint(tmp_path, tag=f"of rank {rank}")
        engine.offload_states()
        with pytest.raises(UsageError, match="reload_states"):
            engine.save_checkpoint(tmp_path)

    run_ranks(work, 2)


# What each argument of load_checkpoint does -----------------------------------------------------


def test_each_argument_of_loading_does_what_it_says(tmp_path: Path) -> None:
    def work(rank: int, world: int) -> None:
        engine = make(3, world)
        train(engine, range(4))
        engine.save_checkpoint(tmp_path)
        saved = everything(engine)
        engine.destroy()

        def loaded(**options: Any) -> dict[str, Any]:
            fresh = make(3, world)
            train(fresh, range(10, 12))
            fresh.load_checkpoint(tmp_path, **options)
            state = everything(fresh)
            fresh.destroy()
            return state

        fresh = make(3, world)
        train(fresh, range(10, 12))
        untouched = everything(fresh)
        fresh.destroy()

        def of_saved(state: dict[str, Any]) -> set[str]:
            same = {n for n in saved if torch.equal(state[n], saved[n])}
            return same - {n for n in saved if torch.equal(untouched[n], saved[n])}

        everything_new = of_saved(saved)
        moments = {name for name in everything_new if name.startswith(("exp_avg", "step "))}
        counters = {"micro_steps", "global_steps", "global_samples"}
        assert of_saved(loaded()) == everything_new
        assert of_saved(loaded(load_lr_scheduler_states=False)) == everything_new - {"lr"} | (
            {"lr"} & of_saved(loaded(load_lr_scheduler_states=False))
        )
        assert of_saved(loaded(load_optimizer_states=False)) == everything_new - moments - (
            {"lr"} - of_saved(loaded(load_optimizer_states=False))
        )
        assert of_saved(loaded(load_module_only=True)) == (
            everything_new - moments - counters - {"lr"}
        )

        seen: list[str] = []

        def custom(src: Any, dst: nn.Module) -> None:
            seen.extend(src)
            with torch.no_grad():
                dst.head.bias.copy_(src["head.bias"] + 1)

        state = loaded(custom_load_fn=custom, load_module_only=True)
        assert ("head.weight" in seen) is (rank == 0)
        assert torch.equal(state["head.bias"], saved["head.bias"] + 1)
        assert torch.equal(state["head.weight"], untouched["head.weight"])

    run_ranks(work, 2)


def test_a_model_without_optimizer_is_saved_and_loads_weights_of_one_with(tmp_path: Path) -> None:
    def work(rank: int, world: int) -> None:
        engine = make(3, world)
        train(engine, range(2))
        engine.save_checkpoint(tmp_path / "trained", client_state={"epoch": 1})
        want = everything(engine)
        engine.destroy()
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
        evaluating = zeroshard.initialize(model=Net(), config=config)[0]
        assert evaluating.load_checkpoint(tmp_path / "trained")[1] == {"epoch": 1}
        evaluating.save_checkpoint(tmp_path / "weights")
        evaluating.destroy()
        resumed = make(2, world, model=Net())
        resumed.load_checkpoint(tmp_path / "weights")
        assert resumed.global_steps == 2
        now = everything(resumed)
        assert [
            n for n in now if n in resumed.module.state_dict() and not torch.equal(now[n], want[n])
        ] == []

    run_ranks(work, 2)


# Plain weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", (0, 2, 3))
def test_weights_of_a_checkpoint_are_made_by_functions_and_by_the_script(
    stage: int, tmp_path: Path
) -> None:
    def work(rank: int, world: int) -> dict[str, Tensor]:
        engine = make(stage, world, bf16={"enabled": True})
        train(engine, range(2))
        engine.save_checkpoint(tmp_path, client_state={"epoch": 3})
        state = everything(engine)
        for name in [name for name in state if name.startswith("master ")]:
            param = engine.module.get_parameter(name.removeprefix("master "))
            full = zeroshard.zero.safe_get_full_fp32_param(param)
            state[name.removeprefix("master ")] = full
        state["head.weight"] = state["embedding.weight"]
        return {
            name: value
            for name, value in state.items()
            if name in engine.module.state_dict(keep_vars=True)
        }

    want = {
        name: value.float() if value.is_floating_point() else value
        for name, value in run_ranks(work, 2)[0].items()
    }

    def check(got: Any) -> None:
        assert got.keys() == want.keys()
        assert [n for n in want if not torch.equal(got[n], want[n])] == []
        assert {n: t.dtype for n, t in got.items()} == {n: t.dtype for n, t in want.items()}

    check(checkpoint.get_fp32_state_dict_from_zero_checkpoint(tmp_path))
    lazy = checkpoint.get_fp32_state_dict_from_zero_checkpoint(tmp_path, lazy_mode=True)
    check({name: tensor.contiguous() for name, tensor in lazy.items()})
    model = checkpoint.load_state_dict_from_zero_checkpoint(Net(), tmp_path)
    check(model.state_dict())
    folder = tmp_path / "global_step2"
    (first, *others) = checkpoint.get_optim_files(folder)
    assert len(others) == 1 and "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt" in first
    assert torch.load(first)["optimizer_state_dict"]["zero_stage"] == stage
    model_file = checkpoint.get_model_state_file(folder, stage)
    assert Path(model_file).name == ("zero_pp_rank_0_" if stage == 3 else "") + (
        "mp_rank_00_model_states.pt"
    )
    facts = torch.load(model_file)
    assert (facts["epoch"], facts["global_steps"], facts["dp_world_size"]) == (3, 2, 2)

    if stage != 3:
        return
    script = tmp_path / "zero_to_fp32.py"
    assert os.access(script, os.X_OK)
    command = [sys.executable, str(script), str(tmp_path), str(tmp_path / "pytorch_model.bin")]
    subprocess.run(command, check=True, timeout=60)
    check(torch.load(tmp_path / "pytorch_model.bin"))
    checkpoint.main([str(tmp_path), str(tmp_path / "out"), "--safe_serialization"])
    check(load_file(tmp_path / "out" / "model.safetensors"))
    options = ["--max_shard_size", "2KB", "--tag", "global_step2", "--safe_serialization"]
    checkpoint.main([str(tmp_path), str(tmp_path / "shards"), *options])
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert len(names) > 2
    merged: dict[str, Tensor] = {}
    for name in names:
        merged |= load_file(tmp_path / "shards" / name)
    check(merged)
