"""Optimizer state off the device: the same training to the last bit, and state as it is without."""

from __future__ import annotations

import copy
import gc
import itertools
import os
import pickle
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zeroshard
from forked import run_ranks
from reference import Setting, engine_run, pairwise
from unit.engine.small import STAGES, Net, batch
from zeroshard import UsageError, zero
from zeroshard.checkpoint.tensors import TensorFile
from zeroshard.errors import OffloadError
from zeroshard.optim import Lamb
from zoo import ZOO

Config = Mapping[str, Any]

PRECISIONS: Mapping[str, Config] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    # The first steps overflow, and the ones after them do not.
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 16, "hysteresis": 1}},
}
OPTIMIZERS: Mapping[str, tuple[str, str]] = {
    "AdamW": ("AdamW", "torch"),
    "fused": ("AdamW", "fused"),
    "SGD": ("SGD", "torch"),
    "Lion": ("Lion", "torch"),
    "Lamb": ("Lamb", "torch"),
    "Muon": ("Muon", "torch"),
}
HOMES: Mapping[str, Config] = {
    "near": {},
    "host": {"device": "cpu"},
    "files": {"device": "nvme", "buffer_count": 2},
    "half": {"device": "cpu", "ratio": 0.5},
}
STEPS = 3


def make(
    stage: int,
    home: str,
    folder: Path,
    optimizer: str = "AdamW",
    precision: str = "bf16",
    accumulation: int = 1,
    clip: float = 0.1,
    model: nn.Module | None = None,
) -> Any:
    kind, kernels = OPTIMIZERS[optimizer]
    block = dict(HOMES[home])
    if home == "files":
        block["nvme_path"] = str(folder)
    more = {"momentum": 0.9} if kind == "SGD" else {}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "optimizer": {"type": kind, "params": {"lr": 0.01, **more}},
        "zero_optimization": {"stage": stage, **({"offload_optimizer": block} if block else {})},
        "zeroshard": {"units": ["Block"], "optimizer_step": kernels},
        **PRECISIONS[precision],
    }
    return zeroshard.initialize(model=Net() if model is None else model, config=config)[0]


def loss_of(engine: Any, number: int) -> Tensor:
    dtype = next(engine.module.parameters()).dtype
    inputs = batch(100 * number + engine.global_rank, dtype)
    return (engine(inputs).float() - 1).square().mean()


def train(engine: Any, numbers: range) -> list[float]:
    losses: list[float] = []
    for number in numbers:
        for micro in range(engine.gradient_accumulation_steps()):
            loss = loss_of(engine, 10 * number + micro)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


def state_of(engine: Any) -> dict[str, Tensor]:
    """Weights and state by DeepSpeed's names, in full."""
    found: dict[str, Tensor] = {}
    for name, param in engine.module.named_parameters():
        if (weights := zero.safe_get_full_fp32_param(param)) is None:
            continue
        found[f"master {name}"] = weights
        keys = {key for state in engine.optimizer.state.values() for key in state}
        for key in sorted(keys & {"exp_avg", "exp_avg_sq", "momentum_buffer"}):
            try:
                value = zero.safe_get_full_optimizer_state(param, key)
            except UsageError:  # Muon keeps another one for some
                continue
            if value is not None:
                found[f"{key} {name}"] = value
    with zeroshard.gathered(engine.module):
        found |= {name: param.detach().clone() for name, param in engine.module.named_parameters()}
    return found


def differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    return [
        *(one.keys() ^ other.keys()),
        *(name for name in one.keys() & other.keys() if not torch.equal(one[name], other[name])),
    ]


ROWS = pairwise(
    {
        "optimizer": list(OPTIMIZERS),
        "stage": STAGES,
        "home": ["host", "files", "half"],
        "precision": list(PRECISIONS),
        "accumulation": [1, 2],
    }
)


@pytest.mark.parametrize("world", [1, 2])
def test_training_is_the_same_to_the_last_bit_wherever_state_is(world: int, tmp_path: Path) -> None:
    def work(rank: int, world: int) -> list[str]:
        found: list[str] = []
        skipped: set[int] = set()
        for row in ROWS[world - 1 :: 2]:
            # A norm is added up unit by unit, and a ratio may make two units of one.
            clip = 0.0 if row["home"] == "half" else 0.1
            near, far = (
                outcome(make(folder=tmp_path, **{**row, "home": home, "clip": clip}))
                for home in ("near", row["home"])
            )
            skipped.add(near.skipped)
            if row["home"] == "half" and row["optimizer"] == "fused":
                # Without a GPU, a vector's last elements are rounded in another way.
                torch.testing.assert_close(far.state, near.state, rtol=1e-6, atol=1e-8)
                near = replace(near, state=far.state)
            if (near.losses, near.skipped) != (far.losses, far.skipped):
                found.append(f"{row}: {near.losses} and {far.losses}")
            found += [f"{row}: {name}" for name in differing(near.state, far.state)]
            if not far.bytes_elsewhere or (far.bytes_here and row["home"] != "half"):
                found.append(f"{row}: {far}")
        assert len(skipped) > 1
        return found

    assert run_ranks(work, world) == [[]] * world


@dataclass(frozen=True)
class Outcome:
    losses: list[float]
    skipped: int
    state: dict[str, Tensor]
    bytes_here: int
    bytes_elsewhere: int


def outcome(engine: Any) -> Outcome:
    losses = train(engine, range(STEPS))
    memory = engine.memory()
    done = Outcome(
        losses,
        engine.skipped_steps,
        state_of(engine),
        memory.optimizer_bytes,
        memory.host_bytes + memory.file_bytes,
    )
    engine.destroy()
    return done


@pytest.mark.parametrize("world", [1, 2])
def test_awkward_models_train_to_the_same_bits(world: int) -> None:
    names = {
        "tied_head": "AdamW",
        "frozen_weight_in_each_block": "fused",
        "never_used": "AdamW",
        "used_on_some_ranks": "AdamW",
        "depth_varies_by_rank": "fused",
        "zero_sized_parameters": "AdamW",
    }

    def work(rank: int, world: int) -> list[str]:
        found: list[str] = []
        for number, (name, optimizer) in enumerate(names.items()):
            stage = (number + 2) % 4
            records = []
            for block in ({}, {"offload_optimizer": {"device": "cpu"}}):
                zero_block = {"stage": stage, **block}
                kernels = {
                    "units": list(ZOO[name].units),
                    "optimizer_step": OPTIMIZERS[optimizer][1],
                }
                extra = {"zero_optimization": zero_block, "zeroshard": kernels}
                setting = Setting(stage, world, 2, 0.1, steps=2, precision="bf16", extra=extra)
                records.append(engine_run(ZOO[name], setting, rank))
            near, far = records
            if (near.losses, near.norms) != (far.losses, far.norms):
                found.append(f"{name}: {near.losses}, {far.losses}")
            found += [f"{name}: {key}" for key in differing(near.weights, far.weights)]
        return found

    assert run_ranks(work, world) == [[]] * world


# Checkpoints ------------------------------------------------------------------------------------


def test_a_checkpoint_has_the_bytes_that_one_without_offload_has(tmp_path: Path) -> None:
    def work(rank: int, world: int) -> list[str]:
        found: list[str] = []
        for optimizer, stage, precision in (
            ("AdamW", 3, "bf16"),
            ("fused", 2, "fp32"),
            ("Muon", 1, "bf16"),
            ("fused", 0, "fp16"),
        ):
            files: list[dict[str, bytes]] = []
            for home in ("near", "host", "files"):
                torch.manual_seed(rank)
                engine = make(stage, home, tmp_path, optimizer, precision)
                train(engine, range(2))
                engine.backward(loss_of(engine, 99))  # state is read ahead, and stays as it is
                folder = tmp_path / f"{optimizer}-{home}"
                engine.save_checkpoint(folder, tag="all")
                engine.destroy()
                found += [
                    f"{optimizer} {home}: {path.name}"
                    for path in sorted((folder / "all").glob("*.safetensors"))
                    if files and files[0][path.name] != path.read_bytes()
                ]
                files.append(
                    {
                        path.name: path.read_bytes()
                        for path in (folder / "all").glob("*.safetensors")
                    }
                )
            assert len(files[0]) > world
        return found

    assert run_ranks(work, 2) == [[]] * 2


def test_a_run_goes_on_exactly_wherever_state_was_and_is(tmp_path: Path) -> None:
    """Also at another stage, and on another number of ranks."""
    routes = [
        ("AdamW", "near", "host", 2, 3),
        ("fused", "host", "near", 3, 1),
        ("fused", "near", "files", 0, 2),
        ("Lamb", "files", "host", 1, 1),
        ("SGD", "half", "files", 3, 3),
    ]

    def save(rank: int, world: int) -> list[dict[str, Tensor]]:
        states = []
        for number, (optimizer, home, _, stage, _) in enumerate(routes):
            engine = make(stage, home, tmp_path, optimizer, "bf16")
            train(engine, range(2))
            engine.save_checkpoint(tmp_path / str(number))
            states.append(state_of(engine))
            engine.destroy()
        return states

    def load(rank: int, world: int, saved: list[dict[str, Tensor]]) -> list[str]:
        found: list[str] = []
        for number, (optimizer, _, home, _, stage) in enumerate(routes):
            ends = []
            for there in ("near", home):
                engine = make(stage, there, tmp_path, optimizer, "bf16")
                train(engine, range(5, 6))  # which is forgotten
                engine.backward(loss_of(engine, 7))  # and so is what it reads ahead
                engine.load_checkpoint(tmp_path / str(number))
                found += [
                    f"{optimizer} to {there}: {n}"
                    for n in differing(saved[number], state_of(engine))
                ]
                train(engine, range(2, 3))
                ends.append(state_of(engine))
                engine.destroy()
            found += [f"{optimizer} goes on at {home}: {name}" for name in differing(*ends)]
        return found

    saved = run_ranks(save, 2)[0]
    for world in (1, 2):
        assert run_ranks(lambda rank, size: load(rank, size, saved), world) == [[]] * world


def test_loading_holds_no_second_copy_of_all_state(tmp_path: Path) -> None:
    def work(rank: int, world: int) -> tuple[int, int]:
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))

        def engine_of() -> Any:
            config = {
                "train_micro_batch_size_per_gpu": 1,
                "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
                "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
                "zeroshard": {"units": ["Linear"]},
            }
            return zeroshard.initialize(model=model, config=config)[0]

        engine = engine_of()
        engine.backward(engine(torch.ones(2, 64)).square().mean())
        engine.step()
        engine.save_checkpoint(tmp_path, tag="all")
        unit = 3 * max(unit.nbytes_full for unit in engine.runtime.units)
        most = 0
        own = {id(value) for state in engine.optimizer.state.values() for value in state.values()}
        read_range = TensorFile.read_range

        def watched(self: TensorFile, name: str, start: int, out: Tensor) -> None:
            nonlocal most
            read_range(self, name, start, out)
            homes = [far._kept for far in engine._sharded._far.values()]
            kept = {kept.home.data_ptr() for each in homes for kept in each}
            elsewhere = [
                value.nbytes
                for state in engine._sharded.inner.state.values()
                for value in state.values()
                if isinstance(value, Tensor) and value.dim() and value.data_ptr() not in kept
            ]
            most = max(most, sum(elsewhere))

        TensorFile.read_range = watched
        engine.load_checkpoint(tmp_path, tag="all")
        assert own
        return most, unit

    ((most, unit),) = run_ranks(work, 1)
    assert 0 < most <= unit


# State between two steps ------------------------------------------------------------------------


def set_weights(engine: Any) -> None:
    weight = dict(engine.module.named_parameters())["blocks.0.up.weight"]
    zero.safe_set_full_fp32_param(weight, torch.full((6, 4), 0.25))


def set_own_weights(engine: Any) -> None:
    local = zero.safe_get_local_fp32_param(engine.module.head.bias)
    assert local is not None
    zero.safe_set_local_fp32_param(engine.module.head.bias, local + 1)


def set_state(engine: Any) -> None:
    weight = dict(engine.module.named_parameters())["blocks.0.up.weight"]
    zero.safe_set_full_optimizer_state(weight, torch.full((6, 4), 0.5), "exp_avg")


def set_own_state(engine: Any) -> None:
    moment = zero.safe_get_local_optimizer_state(engine.module.head.bias, "exp_avg_sq")
    assert moment is not None
    zero.safe_set_local_optimizer_state(engine.module.head.bias, moment + 0.125, "exp_avg_sq")


def edit_gathered(engine: Any) -> None:
    weight = dict(engine.module.named_parameters())["blocks.1.down.weight"]
    with zeroshard.gathered(weight, modifier_rank=0), torch.no_grad():
        weight.mul_(2)


def edit_shown_state(engine: Any) -> None:
    for state in engine.optimizer.state.values():
        state["exp_avg"].mul_(0.5)


def replace_shown_state(engine: Any) -> None:
    for state in engine.optimizer.state.values():
        state["exp_avg"] = state["exp_avg"] * 0.5


def edit(engine: Any) -> None:
    """Edit whatever may be edited between backward, when state was read ahead, and the step."""
    edits = [set_weights, set_own_weights, set_state, set_own_state]
    for each in (*edits, edit_gathered, edit_shown_state, replace_shown_state):
        engine.backward(loss_of(engine, 30))
        each(engine)
        engine.step()


def give_its_own_state_back(engine: Any) -> None:
    state = copy.deepcopy(engine.optimizer.state_dict())
    train(engine, range(20, 21))
    engine.backward(loss_of(engine, 30))
    engine.optimizer.load_state_dict(pickle.loads(pickle.dumps(state)))
    engine.step()


def move_states(engine: Any) -> None:
    engine.offload_states()
    engine.reload_states()


def give_a_step_up(engine: Any) -> None:
    engine.backward(loss_of(engine, 50))
    engine.reset()


def load_weights(engine: Any) -> None:
    engine.load_module_state_dict(Net(seed=1).state_dict())


def test_whatever_edits_state_has_the_effect_that_it_has_without_offload(
    tmp_path: Path,
) -> None:
    meddlers = [edit, give_its_own_state_back, move_states, give_a_step_up, load_weights]

    def work(rank: int, world: int) -> list[str]:
        found: list[str] = []
        for number, (meddle, optimizer) in enumerate(
            itertools.product(meddlers, ("AdamW", "fused"))
        ):
            # Each of the two kernels meets both homes, and each edit does.
            home = ("host", "files")[(number + number // 2) % 2]
            ends: list[dict[str, Tensor]] = []
            for place in ("near", home):
                engine = make(number % 4, place, tmp_path, optimizer)
                train(engine, range(1))
                meddle(engine)
                ends.append(state_of(engine))
                train(engine, range(1, 2))
                ends.append(state_of(engine))
                engine.destroy()
            before, after, far_before, far_after = ends
            found += [f"{meddle.__name__} {optimizer}: {n}" for n in differing(before, far_before)]
            found += [f"{meddle.__name__} {optimizer}: {n}" for n in differing(after, far_after)]
        return found

    assert run_ranks(work, 2) == [[]] * 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_edit_through_data_that_master_weights_elsewhere_would_undo_is_refused(
    precision: str, tmp_path: Path
) -> None:
    def work(rank: int, world: int) -> None:
        for stage in (0, 1, 2):
            engine = make(stage, "host", tmp_path, precision=precision)
            train(engine, range(1))
            engine.module.head.weight.data.mul_(2)
            with pytest.raises(UsageError, match=r"head.* its .data.*would be lost"):
                train(engine, range(1, 2))
            engine.destroy()

    run_ranks(work, 2)


def test_nothing_that_loops_do_in_every_step_waits_for_state(tmp_path: Path) -> None:
    def work(rank: int, world: int) -> tuple[list[str], list[str]]:
        engine = make(2, "host", tmp_path)
        schedule = torch.optim.lr_scheduler.StepLR(engine.optimizer, 1)
        train(engine, range(1))
        waits: list[str] = []

        class Watched:
            def wait(self) -> None:
                waits.append("step")

        for unit in engine.runtime.units:
            unit._step = Watched()
        settle = engine._sharded._pipeline.settle
        engine._sharded._pipeline.settle = lambda: (waits.append("host"), settle())
        engine.zero_grad()
        engine.optimizer.zero_grad()
        schedule.step()
        _ = engine.optimizer.param_groups[0]["lr"], engine.get_lr(), engine.optimizer.optimizer
        _ = engine.get_global_grad_norm(), engine.was_step_applied(), engine.memory()
        none = list(waits)
        _ = engine.optimizer.state
        return none, sorted(set(waits))

    assert run_ranks(work, 1) == [([], ["host", "step"])]


def test_an_engine_gives_its_model_and_memory_to_the_next(tmp_path: Path) -> None:
    def work(rank: int, world: int) -> None:
        for stage, home in zip(STAGES, itertools.cycle(("host", "files"))):
            model = Net()
            engine = make(stage, home, tmp_path, "fused", model=model)
            train(engine, range(2))
            depot = engine._sharded.units[0].state
            assert depot.nbytes
            want = state_of(engine)
            engine.destroy()
            assert not depot.nbytes
            again = make(stage, "near", tmp_path, model=model)
            got = state_of(again)
            assert all(torch.equal(got[name], want[name]) for name in Net().state_dict())
            train(again, range(1))
            again.destroy()
            dropped = make(stage, home, tmp_path, model=model)
            train(dropped, range(1))
            gone = weakref.ref(dropped)
            del dropped
            gc.collect()
            assert gone() is None

    run_ranks(work, 2)


# What goes wrong --------------------------------------------------------------------------------


class InterruptError(Exception):
    pass


def test_a_step_that_raises_half_way_can_be_given_up(tmp_path: Path) -> None:
    def work(rank: int, world: int) -> list[str]:
        found: list[str] = []
        for fails_at in (0, 2):
            engine = make(2, "files", tmp_path)
            train(engine, range(2))
            pipeline = engine._sharded._pipeline
            before, calls = state_of(engine), itertools.count()

            def fail(*_: object, calls: Iterator[int] = calls, at: int = fails_at) -> None:
                if next(calls) == at:
                    raise InterruptError

            hook = engine.optimizer.register_step_pre_hook(fail)
            engine.backward(loss_of(engine, 9))
            with pytest.raises(InterruptError):
                engine.step()
            hook.remove()
            assert not (pipeline.is_under_way or pipeline._coming)
            changed = differing(before, state_of(engine))
            assert bool(changed) == bool(fails_at)  # what was stepped before is, and no more
            engine.reset()
            if not fails_at:
                other = make(2, "near", tmp_path)
                train(other, range(2))
                train(other, range(3, 5))
                train(engine, range(3, 5))
                found += differing(state_of(other), state_of(engine))
                other.destroy()
            else:
                train(engine, range(3, 5))
            engine.destroy()
        return found

    assert run_ranks(work, 1) == [[]]


def test_a_broken_file_is_an_error_in_every_later_step(tmp_path: Path) -> None:
    def work(rank: int, world: int) -> None:
        engine = make(2, "files", tmp_path, "fused")
        train(engine, range(2))
        engine.optimizer.state  # noqa: B018 - waits for what is on its way
        os.ftruncate(engine._sharded.units[0].state._plain, 0)
        for _ in range(2):
            with pytest.raises(OffloadError, match="was cut short"):
                train(engine, range(2, 3))
            engine.reset()
        engine.destroy()

    run_ranks(work, 1)


# Optimizers -------------------------------------------------------------------------------------


def test_an_optimizer_that_looks_at_all_parameters_steps_them_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Wider(Lamb):
        """One that is not known to ask for a unit at a time."""

    def work(rank: int, world: int) -> tuple[int, int, bool]:
        sizes = []
        for kind in (Lamb, Wider):
            model = Net()
            config = {
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
                "zeroshard": {"units": ["Block"]},
                "zero_allow_untested_optimizer": True,
            }
            optimizer = kind(model.parameters(), lr=0.01)
            engine = zeroshard.initialize(model=model, optimizer=optimizer, config=config)[0]
            train(engine, range(2))
            sizes.append(len(engine._sharded._parts))
        return (*sizes, "saves memory between steps only" in caplog.text)

    assert run_ranks(work, 2) == [(3, 1, True)] * 2


def test_state_that_is_no_number_for_each_element_stays_where_it_is(tmp_path: Path) -> None:
    """Tables that slices share stay shared, and quantised state leaves the device."""
    bnb = pytest.importorskip("bitsandbytes")

    def work(rank: int, world: int) -> list[str]:
        ends = []
        for block in ({}, {"offload_optimizer": {"device": "cpu"}}):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 128))
            optimizer = bnb.optim.AdamW8bit(model.parameters(), lr=0.01)
            config = {
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": {"stage": 2, **block},
                "zeroshard": {"units": ["Linear"]},
                "zero_allow_untested_optimizer": True,
            }
            engine = zeroshard.initialize(model=model, optimizer=optimizer, config=config)[0]
            for number in range(3):
                inputs = torch.randn(2, 128, generator=torch.Generator().manual_seed(number))
                engine.backward(engine(inputs).square().mean())
                engine.step()
            states = list(engine.optimizer.state.values())
            quantized = [state for state in states if state["state1"].dtype == torch.uint8]
            assert len({state["qmap1"].data_ptr() for state in quantized}) == 1
            if block:
                engine.save_checkpoint(tmp_path, tag="all")
                engine.load_checkpoint(tmp_path, tag="all")
                units = engine._sharded.units
                assert engine.memory().host_bytes == units[0].state.nbytes
                kept = sum(unit.master.nbytes for unit in units)
                kept += sum(s["state1"].nbytes + s["state2"].nbytes for s in states)
                assert 0 <= units[0].state.nbytes - kept < 1024  # padding
            ends.append(state_of(engine))
            engine.destroy()
        return differing(*ends)

    assert run_ranks(work, 1) == [[]]
