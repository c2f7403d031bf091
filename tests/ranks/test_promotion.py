"""State that comes back to the device after the first steps: no bit differs, nothing is lost."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from forked import run_ranks
from unit.engine.small import Block, batch, make
from zeroshard.core.depot import DeviceDepot
from zeroshard.engine import build
from zeroshard.engine.meter import Memory
from zeroshard.engine.placement import buffer_bytes

STEPS, NUM_BLOCKS = 4, 5
SOME = 70_000  # bytes on one rank: the state of one or two blocks
ADAM = {"type": "AdamW", "params": {"lr": 0.01}}
BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 18, "hysteresis": 1}}


class Wide(nn.Module):
    """Blocks whose state is larger than pages, and of which no buffer holds all."""

    def __init__(self, num_blocks: int = NUM_BLOCKS, width: int = 256) -> None:
        super().__init__()
        self.width = width
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(Block(width) for _ in range(num_blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = x.repeat(1, self.width // 4)
        for block in self.blocks:
            x = block(x)
        return x


@dataclass
class Meter:
    """Measures a device on which so many bytes are free."""

    free: int
    restarts: int = 0

    def read(self) -> Memory:
        return Memory(allocated=0, peak=1000, shortages=0)

    def restart(self) -> None:
        self.restarts += 1

    def limit(self) -> int:
        return 1000 + self.free


@dataclass(frozen=True)
class Run:
    """What is left of some steps."""

    losses: list[float]
    tensors: Mapping[str, Tensor]
    engine: Any
    said: list[str]

    def differs_from(self, other: Run) -> list[str]:
        assert self.tensors.keys() == other.tensors.keys()
        return [
            *(name for name, own in self.tensors.items() if not own.equal(other.tensors[name])),
            *(["losses"] if self.losses != other.losses else []),
        ]

    @property
    def num_far(self) -> int:
        return sum(not unit.state.is_near for unit in self.engine.runtime.units)


def train(patch: pytest.MonkeyPatch, stage: int, free: int | None, **more: Any) -> Run:
    """Train, where so many bytes come to be known as free; None keeps everything there anyway."""
    said: list[str] = []
    patch.setattr(build._log, "warning", lambda text, *args: said.append(text % args))
    log = logging.getLogger("zeroshard.engine.promotion")
    patch.setattr(log, "info", lambda text, *args: said.append(text % args))
    meter = Meter(free or 0)
    patch.setattr(build, "meter_of", lambda device: meter)
    extension = {"units": ["Block"], **more.pop("zeroshard", {})}
    if free is not None:
        extension["gpu_budget"] = "auto"
    settings: dict[str, Any] = {"optimizer": ADAM, **more}
    cpu = {"device": "cpu", "buffer_count": 1}
    zero = {"stage": stage, **({} if free is None else {"offload_optimizer": cpu})}
    engine = make(stage, Wide(), **{"zero_optimization": zero, **settings}, zeroshard=extension)
    losses: list[float] = []
    for number in range(STEPS):
        dtype = next(engine.module.parameters()).dtype
        inputs = batch(10 * number + engine.global_rank, dtype)
        loss = (engine(inputs).float() - 1).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    found: dict[str, Tensor] = {}
    for unit in engine.runtime.units:
        kept = unit.read_kept()
        found[f"master {unit.name}"] = kept.clone()
        for member, piece in zip(unit.members, unit.slices, strict=True):
            for name, value in engine.optimizer.state.get(piece, {}).items():
                found[f"{name} {member.name}"] = value.clone()
    return Run(losses, found, engine, said)


CASES: Mapping[str, Mapping[str, Any]] = {
    "bf16": BF16,
    "fp32": {},
    "fused, clipped": {
        **BF16,
        "zeroshard": {"optimizer_step": "fused"},
        "gradient_clipping": 0.1,
    },
    "fused, fp32": {"zeroshard": {"optimizer_step": "fused"}},
    "stepped on the host": {
        **BF16,
        "zeroshard": {"optimizer_step": "fused", "offload_update": "cpu"},
    },
    "first steps overflow": FP16,
    "momentum": {**BF16, "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}},
}


@pytest.mark.parametrize("world", [1, 2])
def test_state_comes_back_without_a_trace_in_numbers(world: int) -> None:
    def rank(rank: int, world: int) -> list[str]:
        found: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            for number, (case, settings) in enumerate(CASES.items()):
                stage = 1 + (number + world) % 3
                near = train(patch, stage, None, **settings)
                for free, some_far in ((SOME // world, (3, 4)), (10**6, (0,))):
                    where = f"{case}, stage {stage}, {free} bytes free"
                    back = train(patch, stage, free, **settings)
                    found += [f"{where}: {name}" for name in back.differs_from(near)]
                    assert len(back.said) == 1, where
                    assert back.num_far in some_far, where
                    if not back.num_far:
                        check_nothing_is_left(back, near)
                    back.engine.destroy()
                near.engine.destroy()
        return found

    assert run_ranks(rank, world) == [[]] * world


def places(run: Run) -> tuple[int, ...]:
    """Bytes in each place; gradients apart, which one rank does not keep in full beside offload."""
    memory = run.engine.memory()
    return memory.parameters_bytes, memory.optimizer_bytes, memory.host_bytes, memory.file_bytes


def check_nothing_is_left(back: Run, near: Run) -> None:
    """Memory is that of a run whose state never left, and nothing goes beside the computation."""
    sharded = back.engine._sharded
    assert not sharded.far_bytes
    assert sharded.buffer_bytes == 0
    assert sharded._host is None
    assert not sharded._pipeline._carriers
    assert places(back) == places(near)
    for unit, other in zip(back.engine.runtime.units, near.engine.runtime.units, strict=True):
        assert isinstance(unit.state, DeviceDepot)
        assert unit.recall is None
        assert unit.can_share_master == other.can_share_master
        if unit.can_share_master:
            assert unit.master.data_ptr() == unit.store.home.data_ptr()


def test_the_first_units_come_back_and_ranks_with_more_room_bring_no_more() -> None:
    def rank(rank: int, world: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            run = train(patch, 2, 10**6 if rank else 50_000, **BF16)
            first, second, *others = run.engine.runtime.units
            assert [first.state.is_near, second.state.is_near] == [True, True]
            assert not any(unit.state.is_near for unit in others)
            memory = run.engine.memory()
            back_bytes = far_bytes(first) + far_bytes(second)
            assert 0.99 * back_bytes < memory.optimizer_bytes <= back_bytes  # padding apart
            assert memory.host_bytes == sum(map(far_bytes, others))
            assert run.engine._sharded.buffer_bytes < 2 * far_bytes(first)
            assert run.said == [
                "each rank: 0.0 MiB of 0.1 MiB of optimizer state came back to the device (2 of 5 "
                "units), where steps had left 0.0 MiB."
            ]

    run_ranks(rank, 2)


def far_bytes(unit: Any) -> int:
    """Master weights and two averages in fp32."""
    return 3 * unit.master.nbytes


def test_state_that_has_come_back_is_saved_moved_and_loaded_as_any_other(tmp_path: Path) -> None:
    def rank(rank: int, world: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            runs = {free: train(patch, 2, free, **BF16) for free in (None, SOME // world)}
            for free, run in runs.items():
                run.engine.offload_states()
                run.engine.reload_states()
                run.engine.save_checkpoint(tmp_path / str(free))
            for free, run in runs.items():
                other = next(each for each in runs if each != free)
                run.engine.load_checkpoint(tmp_path / str(other))
            after = {}
            for free, run in runs.items():
                run.engine.backward(run.engine(batch(rank, torch.bfloat16)).float().square().mean())
                run.engine.step()
                after[free] = [unit.read_kept().clone() for unit in run.engine.runtime.units]
            assert all(map(torch.equal, *after.values()))

    run_ranks(rank, 2)


def test_state_in_files_comes_back_and_the_files_give_their_space_back(tmp_path: Path) -> None:
    def rank(rank: int, world: int) -> None:
        nvme = {"device": "nvme", "nvme_path": str(tmp_path)}
        zero = {"stage": 2, "offload_optimizer": nvme}
        with pytest.MonkeyPatch.context() as patch:
            near = train(patch, 2, None, **BF16)
            back = train(patch, 2, 10**6, zero_optimization=zero, **BF16)
            assert back.differs_from(near) == []
            assert places(back) == places(near)

    run_ranks(rank, 1)


def test_master_weights_come_back_without_their_shard_where_that_is_elsewhere() -> None:
    def rank(rank: int, world: int) -> None:
        cpu = {"device": "cpu"}
        zero = {"stage": 3, "offload_optimizer": cpu, "offload_param": cpu}
        with pytest.MonkeyPatch.context() as patch:
            near = train(patch, 3, None)
            back = train(patch, 3, 10**6, zero_optimization=zero)
            assert back.differs_from(near) == []
            units = back.engine.runtime.units
            assert not any(unit.is_shard_near for unit in units)
            memory = back.engine.memory()
            back_bytes = sum(map(far_bytes, units))
            assert 0.99 * back_bytes < memory.optimizer_bytes <= back_bytes
            assert memory.host_bytes == sum(unit.master.nbytes for unit in units)

    run_ranks(rank, 2)


def test_without_a_gpu_to_measure_state_stays_where_it_is() -> None:
    def rank(rank: int, world: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            said: list[str] = []
            patch.setattr(build._log, "warning", lambda text, *args: said.append(text % args))
            make(2, zeroshard={"gpu_budget": "auto"}, optimizer={"type": "AdamW"})
            assert len(said) == 1
            assert 'zeroshard.gpu_budget "auto" measures the memory of a GPU' in said[0]

    run_ranks(rank, 1)


def test_running_out_of_memory_afterwards_names_the_key_to_set() -> None:
    def rank(rank: int, world: int) -> list[str]:
        def run_out(*_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        texts: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            for free in (None, 10**6):
                engine = train(patch, 2, free, **BF16).engine
                engine.module.register_forward_pre_hook(run_out)
                with pytest.raises(torch.OutOfMemoryError) as caught:
                    engine(batch(0, torch.bfloat16))
                texts.append(str(caught.value))
        return texts

    ((near, back),) = run_ranks(rank, 1)
    assert "offload_optimizer" in near
    assert "gpu_budget" not in near
    assert "offload_optimizer" not in back
    assert '"zeroshard": {"gpu_budget": ...} with a number of GiB' in back


@pytest.mark.parametrize("kernels", ["fused", "torch"])
def test_the_buffers_that_a_budget_counts_are_those_that_are_made(kernels: str) -> None:
    def rank(rank: int, world: int) -> None:
        planned: list[int] = []

        def spy(*args: Any) -> int:
            planned.append(buffer_bytes(*args))
            return planned[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "buffer_bytes", spy)
            for num_wanted, num_made in ((None, 4), (1, 1), (3, 3), (99, 99)):
                model = Wide(num_blocks=6, width=1020)
                numel = sum(param.numel() for param in model.parameters())
                offload = {"device": "cpu", "buffer_count": num_wanted}
                # What forward and backward need, and the state of about one block.
                block, load = 12 * numel / 6, 12 * (4096 if kernels == "fused" else numel / 6)
                num_loads = 6 * -(-block // load)
                buffers = min(num_made, num_loads) * load
                budget = 6 * numel + 1.05 * buffers + 1.01 * block
                if buffers > 4 * block:
                    continue
                engine = make(
                    1,
                    model,
                    optimizer=ADAM,
                    zero_optimization={
                        "stage": 1,
                        "offload_optimizer": offload,
                        "sub_group_size": 4096,
                    },
                    zeroshard={
                        "units": ["Block"],
                        "optimizer_step": kernels,
                        "gpu_budget": budget / 2**30,
                    },
                    **BF16,
                )
                for number in range(2):
                    x = batch(number, torch.bfloat16)
                    engine.backward(engine(x).float().square().mean())
                    engine.step()
                made = engine._sharded.buffer_bytes
                assert made == pytest.approx(planned[-1], rel=0.01)  # whole pages
                assert made == pytest.approx(buffers, rel=0.05)
                memory = engine.memory()
                assert memory.host_bytes > 0
                assert memory.total_bytes + made <= budget
                engine.destroy()

    run_ranks(rank, 1)
