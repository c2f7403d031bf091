"""The activation budget inside engines: equal numbers, and memory that stays within it."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import zeroshard
from forked import run_ranks
from reference import Record, Setting, engine_run, make_engine
from zeroshard.engine import build
from zeroshard.engine.budget import GIB
from zeroshard.engine.meter import Memory
from zoo import ZOO

NUM_BLOCKS, WIDTH, VOCABULARY = 6, 8, 11


class Plain(nn.Module):
    """Keeps several times its input, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return h + F.dropout(self.down(F.gelu(self.up(h))), 0.1)


class Block(Plain):
    """Counts its runs, too."""

    num_runs = 0
    own_runs = 0

    def forward(self, h: Tensor) -> Tensor:
        Block.num_runs += 1
        self.own_runs += 1
        return super().forward(h)


class Net(nn.Module):
    def __init__(
        self, call: Callable[..., Tensor] | None = None, kind: type[Plain] = Block
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.call = call
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(kind() for _ in range(NUM_BLOCKS))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        for block in self.blocks:
            h = block(h) if self.call is None else self.call(block, h)
        return F.cross_entropy(self.head(h).flatten(0, 1), ids.flatten())


def engine_of(model: Net, budget: object, *, stage: int = 3, accumulation: int = 1) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage},
        "zeroshard": {"activation_budget": budget, "units": [type(model.blocks[0]).__name__]},
    }
    return zeroshard.initialize(model=model, config=config)[0]


def pass_of(engine: Any, samples: int, length: int, seed: int) -> None:
    torch.manual_seed(seed)
    engine.backward(engine(torch.randint(VOCABULARY, (samples, length))))


def step(engine: Any, samples: int, length: int, seed: int = 0) -> None:
    pass_of(engine, samples, length, seed)
    engine.step()


def weights_of(engine: Any) -> dict[str, Tensor]:
    with zeroshard.gathered(engine.module):
        return {name: param.detach().clone() for name, param in engine.module.named_parameters()}


class Held:
    """The bytes that blocks hold from forward to backward: what autograd saves in their calls.

    Checkpoints hide what they do not keep from hooks that are around them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.now = self.peak = 0
        self._num_inside = 0
        self._users: dict[int, int] = {}
        self._model = model
        for block in model.modules():
            if isinstance(block, Block):
                block.register_forward_pre_hook(lambda *_: self._enter(1))
                block.register_forward_hook(lambda *_: self._enter(-1))

    def _enter(self, by: int) -> None:
        self._num_inside += by

    @contextmanager
    def counted(self) -> Iterator[None]:
        with saved_tensors_hooks(self._pack, lambda kept: kept[0]):
            yield

    def _pack(self, tensor: Tensor) -> tuple[Tensor, object]:
        storage = tensor.untyped_storage()
        params = {param.untyped_storage()._cdata for param in self._model.parameters()}
        if not self._num_inside or storage._cdata in params:
            return tensor.detach(), None
        return tensor.detach(), _Share(self, storage._cdata, storage.nbytes())

    def change(self, address: int, nbytes: int, by: int) -> None:
        users = self._users[address] = self._users.get(address, 0) + by
        if users == (by > 0):  # the first came or the last went
            self.now += by * nbytes
            self.peak = max(self.peak, self.now)


class _Share:
    def __init__(self, held: Held, address: int, nbytes: int) -> None:
        self._args = (held, address, nbytes)
        held.change(address, nbytes, 1)

    def __del__(self) -> None:
        held, address, nbytes = self._args
        held.change(address, nbytes, -1)


# Numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("dropout", 0),
        ("block_called_twice", 1),
        ("edited_arguments", 2),
        ("nested_units", 3),
        ("order_varies_by_rank", 3),
        ("two_forwards_then_two_backwards", 3),
    ],
)
def test_weights_have_the_same_bits_whatever_blocks_keep(name: str, stage: int) -> None:
    case = ZOO[name]

    def check(rank: int, world: int) -> list[Any]:
        def run(budget: float | None) -> tuple[Record, Any]:
            extra = {"zeroshard": {"units": list(case.units), "activation_budget": budget}}
            setting = Setting(stage=stage, world=world, steps=4, extra=extra)
            engines: list[Any] = []

            def make(*args: Any) -> Any:
                engines.append(make_engine(*args))
                return engines[0]

            return engine_run(case, setting, rank, make_engine=make), engines[0].activation_plan

        want, _ = run(None)
        everything, whole = run(1)
        _, nothing = run(0)
        held = whole.most_bytes - whole.kept_bytes  # of 1 GiB: what is left beside the inputs
        inputs = GIB - whole.most_bytes
        part_of = (inputs + whole.kept_bytes * 0.7) / GIB
        part, some = run(part_of)
        assert held > 0
        assert whole.num_kept == whole.num_blocks
        assert nothing.num_kept == 0
        assert 0 < some.num_kept < some.num_blocks
        for got in (everything, part):
            assert got.losses == want.losses
            for key, weight in want.weights.items():
                assert torch.equal(got.weights[key], weight), key
        return []

    run_ranks(check, 2)


def test_blocks_that_edit_their_buffers_keep_their_activations(
    caplog: pytest.LogCaptureFixture,
) -> None:
    case = ZOO["buffers"]

    def check(rank: int, world: int) -> str:
        def run(budget: float | None) -> Record:
            extra = {"zeroshard": {"units": list(case.units), "activation_budget": budget}}
            return engine_run(case, Setting(world=world, extra=extra), rank)

        want, got = run(None), run(0)
        assert got.losses == want.losses
        assert all(torch.equal(got.weights[name], want.weights[name]) for name in want.weights)
        for name, buffer in want.buffers[0].items():
            assert torch.equal(got.buffers[0][name], buffer)
        return caplog.text

    (text,) = run_ranks(check, 1)
    assert text.count("edits buffers of its own in forward") == 1


# A number of GiB ----------------------------------------------------------------------------------


def test_blocks_hold_no_more_than_the_budget_while_batches_vary() -> None:
    sizes = [(2, 8), (2, 8), (1, 5), (2, 16), (2, 16), (3, 12), (1, 16), (2, 15), (5, 4), (3, 16)]

    def check(rank: int, world: int) -> None:
        one = 3 * 16 * WIDTH * 4  # bytes of the largest hidden state
        for num_inputs in (NUM_BLOCKS, 14, 22, 100):
            budget = num_inputs * one
            model = Net()
            held = Held(model)
            engine = engine_of(model, budget / GIB, accumulation=2)
            num_kept: list[int] = []
            for at, size in enumerate(sizes):
                with held.counted():
                    step(engine, *size, seed=at)
                num_kept.append(engine.activation_plan.num_kept if engine.activation_plan else 0)
                assert held.peak <= budget, (num_inputs, size, held.peak, budget)
            assert num_kept[0] == 0
            assert num_inputs > NUM_BLOCKS or max(num_kept[:-1]) < NUM_BLOCKS
            assert num_inputs < 100 or NUM_BLOCKS in num_kept
            # What is held is most of what may be held, where the largest batch has been seen.
            with held.counted():
                for seed in range(4):
                    held.peak = 0
                    step(engine, *sizes[-1], seed=seed)
            kept = engine.activation_plan
            per_block = kept.kept_bytes // max(kept.num_kept, 1)
            if kept.num_kept < NUM_BLOCKS and kept.num_kept:
                assert kept.most_bytes - kept.kept_bytes < per_block
                assert budget - held.peak < per_block + NUM_BLOCKS * one
            # Twice as many blocks as in any pass before: only their inputs were not planned.
            ids = torch.zeros(3, 16, dtype=torch.int64)
            with held.counted():
                engine.backward(engine(ids) + engine(ids))
                assert held.peak <= budget + NUM_BLOCKS * one
            engine.destroy()

    run_ranks(check, 1)


def test_only_the_first_blocks_run_again_and_only_in_training(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="zeroshard")

    def check(rank: int, world: int) -> str:
        engine = engine_of(Net(), 0, stage=2)
        Block.num_runs = 0
        step(engine, 2, 8)
        assert Block.num_runs == 2 * NUM_BLOCKS
        engine.destroy()
        engine = engine_of(engine.module, 1)
        for _ in range(2):
            Block.num_runs = 0
            step(engine, 2, 8)
        assert Block.num_runs == NUM_BLOCKS
        whole = engine.activation_plan
        engine.destroy()
        budget = (GIB - whole.most_bytes + whole.kept_bytes // 2) / GIB
        engine = engine_of(engine.module, budget)
        for _ in range(2):
            order: list[nn.Module] = []

            def note(block: nn.Module, *_: object, order: list[nn.Module] = order) -> None:
                order.append(block)

            handles = [block.register_forward_hook(note) for block in engine.module.blocks]
            for block in engine.module.blocks:
                block.own_runs = 0
            step(engine, 2, 8)
            for handle in handles:
                handle.remove()
        assert order == list(engine.module.blocks)  # hooks of others see one call
        assert [block.own_runs for block in engine.module.blocks] == [2, 2, 2, 1, 1, 1]
        Block.num_runs = 0
        with torch.no_grad():
            engine(torch.zeros(2, 8, dtype=torch.int64))
        engine.eval()
        engine(torch.zeros(2, 8, dtype=torch.int64)).backward()
        assert Block.num_runs == 2 * NUM_BLOCKS
        return caplog.text

    text = run_ranks(check, 2)[0]
    assert "0 of 6 blocks keep" not in text.replace("0 of 6 blocks keep", "", 1)
    assert "activation budget: 3 of 6 blocks keep their activations" in text


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_forward_is_what_runs_again() -> None:
    def check(rank: int, world: int) -> None:
        found = []
        for budget in (None, 0, 1):
            engine = engine_of(Net(kind=Plain), budget)
            engine.compile(backend="aot_eager")
            for seed in range(3):
                step(engine, 2, 8, seed)
            found.append(weights_of(engine))
            if budget is not None:
                assert engine.activation_plan.num_kept == budget * NUM_BLOCKS
            engine.destroy()
        for got in found[1:]:
            assert all(torch.equal(got[name], found[0][name]) for name in got)

    run_ranks(check, 1)


def test_copies_and_used_up_engines_leave_plain_blocks() -> None:
    def check(rank: int, world: int) -> None:
        engine = engine_of(Net(), 0, stage=1)
        step(engine, 2, 8)
        twin = copy.deepcopy(engine.module)
        again = pickle.loads(pickle.dumps(engine.module))
        for other in (twin, again):
            Block.num_runs = 0
            other(torch.zeros(2, 8, dtype=torch.int64)).backward()
            assert Block.num_runs == NUM_BLOCKS
            assert other.blocks[0].forward.__self__ is other.blocks[0]
        engine.destroy()
        assert all("forward" not in vars(block) for block in engine.module.blocks)
        # An engine that nobody ended.
        model = Net()
        engine_of(model, 0, stage=1)
        step(engine_of(model, None, stage=1), 2, 8)
        assert all("forward" not in vars(block) for block in model.blocks)

    run_ranks(check, 1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_model_that_checkpoints_itself_is_left_alone_and_told_so(
    reentrant: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def check(rank: int, world: int) -> str:
        def call(block: nn.Module, h: Tensor) -> Tensor:
            return checkpoint(block, h, use_reentrant=reentrant)

        found = []
        for budget in (None, 1):
            engine = engine_of(Net(call), budget)
            for seed in range(3):
                Block.num_runs = 0
                step(engine, 2, 8, seed)
                assert Block.num_runs == 2 * NUM_BLOCKS
            found.append(weights_of(engine))
            engine.destroy()
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
        return caplog.text

    (text,) = run_ranks(check, 1)
    assert text.count("activation_budget has no effect: the model itself checkpoints") == 1


def test_without_blocks_a_budget_is_said_to_have_no_effect(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def check(rank: int, world: int) -> str:
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdamW"},
            "zeroshard": {"activation_budget": 1},
        }
        engine = zeroshard.initialize(model=nn.Linear(2, 2), config=config)[0]
        assert engine.activation_plan is None
        return caplog.text

    (text,) = run_ranks(check, 1)
    assert "activation_budget has no effect: no blocks that repeat" in text


# What a device has left --------------------------------------------------------------------------


class Device:
    """An allocator as described: fixed memory, an overhead per token, and what blocks hold."""

    per_token = 40

    def __init__(self, held: Held, stays: int, capacity: int) -> None:
        self.held, self.stays, self.capacity = held, stays, capacity
        self.peak = self.num_shortages = self.tokens = 0
        self.highest = 0

    def ran(self, tokens: int) -> None:
        """A pass with so many tokens has run: its logits were there when blocks held most."""
        peak = self.stays + tokens * self.per_token + self.held.peak
        self.peak = max(self.peak, peak)
        self.highest = max(self.highest, peak)
        self.held.peak = self.held.now

    def read(self) -> Memory:
        return Memory(self.stays, self.peak, self.num_shortages)

    def restart(self) -> None:
        self.peak = self.stays

    def limit(self) -> int:
        return self.capacity


def measured(monkeypatch: pytest.MonkeyPatch, stays: int, capacity: int) -> tuple[Any, Device]:
    model = Net()
    held = Held(model)
    device = Device(held, stays, capacity)
    monkeypatch.setattr(build, "meter_of", lambda _: device)
    return engine_of(model, "auto"), device


def test_blocks_keep_what_the_device_has_left_and_all_ranks_alike(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="zeroshard")
    capacity = 200_000

    def check(rank: int, world: int) -> tuple[list[int], str]:
        engine, device = measured(monkeypatch, 30_000 + 40_000 * rank, capacity)

        def run(samples: int, length: int, seed: int) -> int:
            with device.held.counted():
                pass_of(engine, samples, length, seed)
            device.ran(samples * length)
            engine.step()
            assert device.highest <= capacity
            return engine.activation_plan.num_kept

        kept = [run(2, 64, seed) for seed in range(7)]
        # A larger batch is measured before its blocks keep anything; a smaller one keeps more.
        larger = [run(3, 64, seed) for seed in range(4)]
        smaller = run(1, 32, 0)
        assert kept[0] == larger[0] == 0
        assert 0 < larger[-1] < kept[-1] < smaller == NUM_BLOCKS
        assert sorted(kept) == kept
        assert len(set(kept[-3:])) == 1
        return kept, caplog.text

    (mine, text), (theirs, _) = run_ranks(check, 2)
    assert mine == theirs
    assert text.count("blocks keep their activations") == 1
    assert "each; peak 0.1 MiB of 0.2 MiB" in text


def test_a_device_that_runs_short_or_out_of_memory_has_blocks_keep_half(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def check(rank: int, world: int) -> str:
        engine, device = measured(monkeypatch, 30_000, 10_000_000)
        for seed in range(5):
            step(engine, 2, 64, seed)
        assert engine.activation_plan.num_kept == NUM_BLOCKS
        # The allocator had to free its cache in evaluation, then in training.
        device.num_shortages += 1
        step(engine, 2, 64)
        step(engine, 2, 64)
        assert engine.activation_plan.num_kept == NUM_BLOCKS
        pass_of(engine, 2, 64, 0)
        device.num_shortages += 1
        engine.step()
        step(engine, 2, 64)
        assert engine.activation_plan.num_kept == NUM_BLOCKS // 2

        def fail(*_: object) -> None:
            device.num_shortages += 2  # a cache that was given back, and the error
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

        handle = engine.module.head.register_forward_hook(fail)
        with pytest.raises(torch.OutOfMemoryError, match=r"(?s)out of memory.*activation_budget"):
            engine(torch.zeros(2, 64, dtype=torch.int64))
        handle.remove()
        for _ in range(2):
            step(engine, 2, 64)
            assert engine.activation_plan.num_kept == 1
        return caplog.text

    (text,) = run_ranks(check, 1)
    assert text.count("the device ran short of memory while 6 blocks kept") == 1
    assert text.count("the device ran out of memory while 3 blocks kept") == 1


def test_auto_without_a_gpu_checkpoints_every_block_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def check(rank: int, world: int) -> str:
        engine = engine_of(Net(), "auto")
        for _ in range(2):
            Block.num_runs = 0
            step(engine, 2, 8)
            assert Block.num_runs == 2 * NUM_BLOCKS
        return caplog.text

    (text,) = run_ranks(check, 1)
    assert 'activation_budget "auto" measures the memory of a GPU' in text
