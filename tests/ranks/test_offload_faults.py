"""Hosts and drives that refuse or fail: an error on every rank, and nothing is left behind."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

import zeroshard
from forked import RankError, run_ranks
from zeroshard import zero
from zeroshard.core.slab import HostDepot
from zeroshard.engine import build
from zeroshard.errors import OffloadError

WIDTH = 64


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


def model() -> Net:
    torch.manual_seed(3)
    return Net()


def config(
    stage: int = 2,
    *,
    state: Path | str | None = None,
    shards: Path | str | None = None,
    optimizer: str = "AdamW",
) -> dict[str, Any]:
    """State and shards in host memory ("cpu"), in files in a folder, or on the device."""

    def block(home: Path | str | None) -> dict[str, Any]:
        if home is None:
            return {"device": "none"}
        return {"device": "cpu"} if home == "cpu" else {"device": "nvme", "nvme_path": str(home)}

    zero = {"stage": stage, "offload_optimizer": block(state), "offload_param": block(shards)}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": optimizer, "params": {"lr": 0.01}},
        "zero_optimization": zero,
        "zeroshard": {"units": ["Linear"]},
    }


def start(settings: dict[str, Any], net: nn.Module | None = None) -> Any:
    return zeroshard.initialize(model=net or model(), config=settings)[0]


def take_step(engine: Any) -> float:
    loss = engine(torch.ones(2, WIDTH))
    engine.backward(loss)
    engine.step()
    return loss.item()


def error_of(call: Callable[[], object]) -> str:
    """The error of a host or a drive that a call ends with; empty if with none."""
    try:
        call()
    except OffloadError as error:
        return str(error)
    return ""


def double(weight: nn.Parameter) -> None:
    with zeroshard.gathered(weight, modifier_rank=0), torch.no_grad():
        weight.mul_(2)


def open_files(folder: Path) -> list[Path]:
    """Paths to the files of this process in a folder, which have no names there."""
    found: list[Path] = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if str(link.readlink()).startswith(f"{folder}/"):
                found.append(link)
    return found


def num_groups() -> int:
    return len(dist.distributed_c10d._world.pg_map)


def largest_file(nbytes: int) -> Any:
    """A drive that has no room for a larger file, whatever it says of what is free."""
    true = os.posix_fallocate

    def allocate(file: int, offset: int, more: int) -> None:
        if offset + more > nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        true(file, offset, more)

    return mock.patch.object(os, "posix_fallocate", allocate)


def refuse_after(cls: type, name: str, calls: int, text: str) -> Any:
    """Let a method raise from its n-th call on."""
    true, count = getattr(cls, name), iter(range(calls))

    def method(*args: Any, **kwargs: Any) -> Any:
        if next(count, None) is None:
            raise OffloadError(text)
        return true(*args, **kwargs)

    return mock.patch.object(cls, name, method)


def io_error(*_: object) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_what_is_refused_on_one_rank_is_an_error_on_all_and_the_model_trains_elsewhere(
    tmp_path: Path,
) -> None:
    nothing = contextlib.nullcontext
    locked = "rank 1 cannot page-lock 3 MiB"

    def work(rank: int, world: int) -> None:
        mine = rank == 1
        missing, readonly = tmp_path / "missing", Path("/proc/self")
        cases: list[tuple[str, dict[str, Any], Any]] = [
            (str(missing), config(state=missing if mine else tmp_path), nothing()),
            (str(missing), config(3, state="cpu", shards=missing), nothing()),
            (
                str(readonly),
                config(3, state="cpu", shards=readonly if mine else tmp_path),
                nothing(),
            ),
            (
                f"{tmp_path}.*free: No space left on device",
                config(state=tmp_path),
                largest_file(8192) if mine else nothing(),
            ),
            (
                "in the memory of their host, and 0.0 MiB are free",
                config(state="cpu"),
                mock.patch.object(build, "bytes_free", lambda: 7 if mine else 1 << 40),
            ),
            (
                locked,
                config(state="cpu"),
                refuse_after(HostDepot, "seal", 0, locked) if mine else nothing(),
            ),
            (
                "rank 1 has no memory.*given back as by",
                config(3, state="cpu", shards="cpu"),
                refuse_after(HostDepot, "take", 3, "rank 1 has no memory") if mine else nothing(),
            ),
        ]
        start(config()).destroy()
        before = num_groups()
        for fact, settings, fault in cases:
            net = model()
            with fault, pytest.raises(OffloadError, match=fact):
                start(settings, net)
            assert num_groups() == before
            assert not open_files(tmp_path)
            engine = start(config(3), net)
            names = dict(net.named_parameters())
            with zeroshard.gathered(list(names.values())):
                for name, weight in model().named_parameters():
                    assert torch.equal(names[name], weight), name
            take_step(engine)
            engine.destroy()

    run_ranks(work)


@pytest.mark.parametrize(
    "where", ["state 1", "state 2", "muon", "forward", "backward", "evaluate", "gathered"]
)
def test_a_drive_that_fails_under_way_ends_the_training_of_all_ranks_alike(
    where: str, tmp_path: Path
) -> None:
    def settings() -> dict[str, Any]:
        if where.startswith("state"):
            return config(int(where[-1]), state=tmp_path)
        if where == "muon":
            return config(2, state=tmp_path, optimizer="Muon")
        return config(3, state="cpu", shards=tmp_path)

    def work(rank: int, world: int) -> list[str]:
        engine = start(settings())
        take_step(engine)
        take_step(engine)
        x = torch.ones(2, WIDTH)
        loss = engine(x) if where == "backward" else None
        with contextlib.ExitStack() as faults:
            if rank == 1:
                for link in open_files(tmp_path):
                    os.truncate(link, link.stat().st_size // 2)
                faults.enter_context(mock.patch.object(os, "preadv", io_error))
            if where == "backward":
                first = error_of(lambda: engine.backward(loss))
            elif where == "evaluate":
                with torch.no_grad():
                    first = error_of(lambda: engine(x))
            elif where == "gathered":
                first = error_of(lambda: zeroshard.gathered(engine.module).__enter__())
                assert not any(unit.is_full for unit in engine.runtime.units)
                assert "rank 1" in error_of(lambda: engine(x))
            else:
                first = error_of(lambda: take_step(engine))
        later = [
            error_of(lambda: engine(x)),
            error_of(lambda: engine.backward(torch.ones((), requires_grad=True))),
            error_of(engine.step),
            error_of(lambda: engine.save_checkpoint(tmp_path)),
        ]
        assert all("ended this engine's training" in text for text in later), later
        assert all("load the last checkpoint" in text for text in later)
        net = engine.module
        engine.destroy()
        if not where.startswith(("state", "muon")):
            assert "rank 1" in error_of(lambda: start(config(3), net))  # its shards are lost
        engine = start(config(3))
        take_step(engine)
        engine.destroy()
        return [first]

    for (text,) in run_ranks(work, timeout=30):
        assert "rank 1" in text
        assert str(tmp_path) in text


def test_a_checkpoint_of_state_that_cannot_be_read_is_refused_by_all_ranks(tmp_path: Path) -> None:
    def work(rank: int, world: int) -> str:
        engine = start(config(2, state=tmp_path))
        take_step(engine)
        engine.save_checkpoint(tmp_path / "checkpoints", tag="good")
        weight = engine.module.layers[0].weight
        calls = [
            lambda: zero.safe_get_full_fp32_param(weight),
            lambda: zero.safe_set_full_fp32_param(weight, weight),
            lambda: zero.safe_get_full_optimizer_state(weight, "exp_avg"),
            lambda: zero.safe_set_full_optimizer_state(weight, weight, "exp_avg"),
        ]
        calls.append(lambda: double(weight))
        assert all(error_of(call) == "" for call in calls)
        if rank == 1:
            for link in open_files(tmp_path):
                os.truncate(link, 4096)
        assert all("cut short" in error_of(call) for call in calls)
        text = error_of(lambda: engine.save_checkpoint(tmp_path / "checkpoints", tag="bad"))
        engine.destroy()
        engine = start(config(2))
        assert engine.load_checkpoint(tmp_path / "checkpoints")[0].endswith("good")
        engine.destroy()
        return text

    for text in run_ranks(work, timeout=30):
        assert "cut short" in text
        assert f"rank 1 in {tmp_path}" in text


def test_state_without_room_in_the_first_step_that_is_not_skipped_is_an_error_on_all() -> None:
    def work(rank: int, world: int) -> list[str]:
        settings = config(state="cpu", optimizer="Lion")
        engine = start({**settings, "fp16": {"enabled": True, "initial_scale_power": 4}})
        texts: list[str] = []
        with refuse_after(HostDepot, "seal", 0, "no memory") if rank else contextlib.nullcontext():
            for value in (torch.inf, 1.0):
                engine.backward(engine(torch.full((2, WIDTH), value, dtype=torch.float16)))
                texts.append(error_of(engine.step))
        assert engine.skipped_steps == 1
        engine.destroy()
        return texts

    for skipped, made in run_ranks(work, timeout=30):
        assert skipped == ""
        assert "no memory" in made


def test_two_runs_in_one_folder_do_not_meet_and_a_killed_one_leaves_nothing(
    tmp_path: Path,
) -> None:
    def train(rank: int, world: int) -> None:
        settings = config(3, state=tmp_path, shards=tmp_path)
        alone = start(settings)
        want = [take_step(alone) for _ in range(3)]
        alone.destroy()
        one, two = start(settings), start(settings)
        got = [(take_step(one), take_step(two)) for _ in range(3)]
        assert got == [(loss, loss) for loss in want]
        assert len(open_files(tmp_path)) >= 4
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()

    with pytest.raises(RankError):
        run_ranks(train)
    assert not list(tmp_path.iterdir())


def test_workers_of_a_data_loader_live_beside_state_off_the_device(tmp_path: Path) -> None:
    def work(rank: int, world: int) -> None:
        engine = start(config(3, state="cpu", shards=tmp_path))
        data = [torch.full((WIDTH,), float(at)) for at in range(4)]
        for _ in range(2):
            for batch in DataLoader(data, batch_size=2, num_workers=1):
                engine.backward(engine(batch))
                engine.step()
        assert engine.global_steps == 4
        engine.destroy()

    run_ranks(work, 1)
