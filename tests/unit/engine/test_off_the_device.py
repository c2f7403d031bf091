"""What a configuration says about offloading is what happens, and it changes no bit."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from forked import run_ranks
from unit.engine.small import Block, Net, batch, make, weights_of
from zeroshard.engine import build
from zeroshard.engine.headroom import Claim
from zeroshard.errors import ConfigError, OffloadError
from zeroshard.optim import carriers

NUM_BLOCKS = 12
BYTES = 2**-30  # in GiB
CPU = {"device": "cpu"}
ADAM = {"type": "AdamW", "params": {"lr": 0.01}}


@dataclass(frozen=True)
class Run:
    """What a rank has after some steps."""

    weights: Mapping[str, Tensor]
    memory: Any
    said: list[str]

    def is_bit_equal_to(self, other: Run) -> bool:
        return all(torch.equal(self.weights[name], w) for name, w in other.weights.items())

    @property
    def places(self) -> tuple[bool, ...]:
        """Whether parameters and state are on the device, anything on the host, and in files."""
        memory = self.memory
        counts = memory.parameters_bytes, memory.optimizer_bytes
        return tuple(map(bool, (*counts, memory.host_bytes, memory.file_bytes)))


@contextmanager
def heard() -> Iterator[list[str]]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("zeroshard")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


class Deep(nn.Module):
    """Blocks of one size."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(Block(64) for _ in range(NUM_BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        x = x.repeat(1, 16)
        for block in self.blocks:
            x = block(x)
        return x


def train(
    stage: int,
    zero: Mapping[str, Any] | None = None,
    model: nn.Module | None = None,
    **more: Any,
) -> Run:
    settings = {"zero_optimization": {"stage": stage, **(zero or {})}, **more}
    with heard() as said:
        engine = make(stage, model, **{"optimizer": ADAM, "bf16": {"enabled": True}} | settings)
    for number in range(3):
        loss = (engine(batch(number, torch.bfloat16)).float() - 1).square().mean()
        engine.backward(loss)
        engine.step()
    run = Run(weights_of(engine), engine.memory(), [text for text in said if "each rank" in text])
    engine.destroy()
    return run


@pytest.mark.parametrize("world", [1, 2])
def test_state_goes_where_the_configuration_says_at_every_stage(world: int, tmp_path: Path) -> None:
    nvme = {"device": "nvme", "nvme_path": str(tmp_path)}

    def rank(rank: int, world: int) -> None:
        for stage in range(4):
            here = train(stage)
            assert here.places == (True, True, False, False)
            assert here.said == []
            for place, places, words in (
                (CPU, (True, False, True, False), "all 0.0 MiB in host memory"),
                (nvme, (True, False, False, True), "all 0.0 MiB in files"),
                ({**CPU, "ratio": 0.6}, (True, True, True, False), "0.0 MiB on the device, "),
                ({**CPU, "ratio": 0}, (True, True, False, False), None),
            ):
                there = train(stage, {"offload_optimizer": place})
                assert there.is_bit_equal_to(here), f"stage {stage}, {place}"
                assert there.places == places, f"stage {stage}, {place}"
                assert len(there.said) == (words is not None)
                if words is not None:
                    start = "each rank: master weights and optimizer state: "
                    assert there.said[0].startswith(start + words)

    run_ranks(rank, world)
    assert list(tmp_path.iterdir()) == []


def test_buffers_of_state_in_files_are_page_locked_unless_that_is_turned_off(
    tmp_path: Path,
) -> None:
    def rank(rank: int, world: int) -> None:
        for wanted in (True, False):
            nvme = {"device": "nvme", "nvme_path": str(tmp_path), "pin_memory": wanted}
            with mock.patch.object(carriers, "HostDepot", wraps=carriers.HostDepot) as made:
                train(2, {"offload_optimizer": nvme})
            assert [call.kwargs["pin"] for call in made.call_args_list] == [wanted]

    run_ranks(rank, 1)


@pytest.mark.parametrize("world", [1, 2])
def test_shards_go_where_the_configuration_says(world: int, tmp_path: Path) -> None:
    nvme = {"device": "nvme", "nvme_path": str(tmp_path)}
    few = {**nvme, "max_in_cpu": 20, "buffer_count": 2, "buffer_size": 16}

    def rank(rank: int, world: int) -> None:
        here = train(3)
        for zero, places in (
            ({"offload_param": CPU}, (False, True, True, False)),
            ({"offload_param": few}, (False, True, True, True)),
            ({"offload_param": nvme, "offload_optimizer": nvme}, (False, False, True, True)),
            ({"offload_param": CPU, "offload_optimizer": nvme}, (False, False, True, True)),
        ):
            there = train(3, zero)
            assert there.is_bit_equal_to(here), str(zero)
            assert there.places == places, str(zero)
            assert "; shards of parameters: " in there.said[0]

    run_ranks(rank, world)


def test_a_budget_decides_how_much_leaves_and_shards_leave_last() -> None:
    def rank(rank: int, world: int) -> None:
        def within(nbytes: float, zero: Mapping[str, Any] | None = None) -> Run:
            return train(3, zero, model=Deep(), zeroshard={"gpu_budget": nbytes * BYTES})

        here = train(3, model=Deep())
        held = torch.tensor(astuple(here.memory)[:3])
        dist.all_reduce(held, dist.ReduceOp.MAX)  # the last rank has the padding
        parameters, gradients, state = held.tolist()
        buffers = 4 * state / NUM_BLOCKS
        fixed = parameters + gradients
        before = 0
        for share in (0.0, 0.4):
            budget = fixed + 1.2 * buffers + share * state
            there = within(budget)
            assert there.is_bit_equal_to(here)
            left = there.memory.total_bytes
            assert left + buffers <= budget
            assert there.memory.optimizer_bytes >= share * state
            assert there.memory.host_bytes > 0
            assert left > before
            before = left
        everything = within(1.2 * (fixed + state))
        assert everything.places == (True, True, False, False)
        with pytest.raises(ConfigError, match=r"gpu_budget is .* on the device takes"):
            within(gradients, {"offload_param": CPU})
        some = within(gradients + 1.2 * buffers + parameters / 2, {"offload_param": CPU})
        assert some.is_bit_equal_to(here)
        assert some.memory.optimizer_bytes == 0
        assert 0 < some.memory.parameters_bytes < parameters
        assert "; shards of parameters: " in some.said[0]

    run_ranks(rank, 2)


def test_an_automatic_budget_begins_with_nothing_that_could_leave() -> None:
    def rank(rank: int, world: int) -> None:
        auto = train(2, zeroshard={"gpu_budget": "auto"})
        assert auto.places == (True, False, True, False)
        assert auto.is_bit_equal_to(train(2))

    run_ranks(rank, 1)


def test_what_room_is_looked_for_is_what_is_taken() -> None:
    """Whatever the optimizer keeps: padding is all that is asked for beside."""
    optimizers: list[dict[str, Any]] = [
        ADAM,
        {"type": "SGD", "params": {"lr": 0.1}},
        {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
        {"type": "Lion", "params": {"lr": 0.01}},
        {"type": "Adagrad", "params": {"lr": 0.01}},
        {"type": "RMSprop", "params": {"lr": 0.01, "centered": True}},
    ]

    def rank(rank: int, world: int) -> None:
        asked: list[Claim] = []
        zero = {"offload_optimizer": CPU, "offload_param": CPU}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "check_room", lambda claim, *_: asked.append(claim))
            for optimizer in optimizers:
                taken = train(3, zero, model=Deep(), optimizer=optimizer).memory.host_bytes
                assert taken <= asked[-1].host_bytes <= 1.05 * taken, optimizer["type"]

    run_ranks(rank, 2)


def test_a_missing_folder_is_one_error_on_all_ranks_and_the_model_can_train_after_it(
    tmp_path: Path,
) -> None:
    def rank(rank: int, world: int) -> str:
        model = Net()
        path = tmp_path if rank == 0 else tmp_path / "not mounted"
        nvme = {"device": "nvme", "nvme_path": str(path)}
        zero = {"stage": 2, "offload_optimizer": nvme}
        with pytest.raises(OffloadError) as caught:
            make(2, model, optimizer=ADAM, zero_optimization=zero)
        engine = make(2, model, optimizer=ADAM)
        engine.backward(engine(batch(0)).sum())
        engine.step()
        return str(caught.value)

    for text in run_ranks(rank, 2):
        assert "rank 1 cannot make files: No such file or directory" in text
        assert "zero_optimization.offload_optimizer.nvme_path is " in text


def test_too_little_host_memory_is_one_error_on_all_ranks_before_anything_is_moved() -> None:
    def rank(rank: int, world: int) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "bytes_free", lambda: 1000)
            model = Net()
            with pytest.raises(OffloadError) as caught:
                make(1, model, zero_optimization={"stage": 1, "cpu_offload": True}, optimizer=ADAM)
            assert all(param.numel() for param in model.parameters())
        return str(caught.value)

    (text,) = set(run_ranks(rank, 2))
    assert "ranks 0, 1 would keep " in text


def test_a_depot_that_fails_on_one_rank_is_an_error_on_all() -> None:
    def rank(rank: int, world: int) -> str:
        def seal(depots: object) -> None:
            if rank == 1:
                raise OffloadError("rank 1 cannot page-lock.\n\nhint: do this.")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build.Depots, "seal", seal)
            with pytest.raises(OffloadError) as caught:
                make(2, zero_optimization={"stage": 2, "offload_optimizer": CPU}, optimizer=ADAM)
        return str(caught.value)

    first, second = run_ranks(rank, 2)
    assert second.startswith("rank 1 cannot page-lock. The model was being divided by then")
    assert second.endswith("\n\nhint: do this.")
    assert first == (
        "rank 1 could not keep state off its device, so no rank did. OffloadError: rank 1 cannot "
        "page-lock. The model was being divided by then; it is given back as by engine.destroy(), "
        "and can be given to initialize() again.\n\nhint: do this."
    )


def test_shards_that_cannot_leave_without_their_state_are_said_to_stay() -> None:
    def rank(rank: int, world: int) -> list[str]:
        with heard() as said:
            for optimizer in ({}, {**CPU, "ratio": 0.5}, CPU):
                zero = {"stage": 3, "offload_param": CPU, "offload_optimizer": optimizer}
                make(3, optimizer=ADAM, zero_optimization=zero).destroy()
        return [text for text in said if "stay on the device, as" in text]

    nothing_leaves, half = run_ranks(rank, 2)[0]
    assert "offload_param: the shards of 3 of 3 units stay on the device" in nothing_leaves
    assert "the shards of 1 of 3 units stay" in half


def test_where_the_update_runs_is_said_to_be_idle_if_nothing_leaves() -> None:
    def rank(rank: int, world: int) -> list[str]:
        with heard() as said:
            make(2, zeroshard={"offload_update": "cpu"})
        return [text for text in said if "offload_update" in text]

    ((text,),) = run_ranks(rank, 1)
    assert text == 'zeroshard.offload_update: "cpu" has no effect: no state leaves the device.'


def test_what_backward_has_read_ahead_is_not_read_again_by_the_step() -> None:
    def work(rank: int, world: int) -> list[int]:
        counts: list[int] = []
        fetch = carriers.Bus.fetch

        def counted(bus: carriers.Bus, slot: carriers.Slot) -> None:
            counts[-1] += 1
            fetch(bus, slot)

        zero = {"stage": 1, "offload_optimizer": CPU}
        engine = make(1, zero_optimization=zero, optimizer=ADAM)
        with mock.patch.object(carriers.Bus, "fetch", counted):
            for number in range(4):
                counts.append(0)
                engine.backward((engine(batch(number)) - 1).square().mean())
                engine.step()
        return [*counts, len(engine.runtime.trained)]

    for *counts, num_units in run_ranks(work, 1):
        assert counts[-1] == counts[-2] == num_units


def test_no_buffer_is_larger_than_what_is_stepped_at_once_in_the_first_backward_either() -> None:
    def work(rank: int, world: int) -> list[int]:
        sizes: list[int] = []
        fetch = carriers.Bus.fetch

        def measured(bus: carriers.Bus, slot: carriers.Slot) -> None:
            sizes.append(slot.buffer.nbytes)
            fetch(bus, slot)

        engine = make(
            1,
            nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128)),
            zero_optimization={"stage": 1, "offload_optimizer": CPU, "sub_group_size": 4096},
            zeroshard={"optimizer_step": "fused", "units": ["Linear"]},
            optimizer=ADAM,
        )
        with mock.patch.object(carriers.Bus, "fetch", measured):
            for _ in range(2):
                engine.backward(engine(torch.ones(2, 128)).square().mean())
                engine.step()
        engine.destroy()
        return sizes

    (sizes,) = run_ranks(work, 1)
    assert set(sizes) == {3 * 4 * 4096}  # master weights and two averages


def test_an_engine_that_was_dropped_is_gone_with_what_it_kept_off_the_device() -> None:
    def rank(rank: int, world: int) -> None:
        for stage in (2, 3):
            zero: dict[str, Any] = {"stage": stage, "offload_optimizer": CPU}
            if stage == 3:
                zero["offload_param"] = CPU
            settings: dict[str, Any] = {"zero_optimization": zero, "bf16": {"enabled": True}}
            engine = make(stage, optimizer=ADAM, **settings)
            engine.backward(engine(batch(0, torch.bfloat16)).sum())
            engine.step()
            assert not engine.mesh.parcels._sent  # the device keeps nothing of what has left it
            want, model, gone = weights_of(engine), engine.module, weakref.ref(engine)
            del engine
            gc.collect()
            assert gone() is None
            second = make(stage, model, optimizer=ADAM, **settings)
            assert all(torch.equal(w, want[name]) for name, w in weights_of(second).items())
            second.destroy()

    run_ranks(rank, 2)
