"""Gathers that read shards in other ranks' memory train to the bits that collectives train to."""

from __future__ import annotations

import logging
import mmap
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import zeroshard
from forked import RankError, run_ranks
from reference import SEED, Setting, compare, config_of, engine_run, full_weights, train
from zeroshard import zero
from zeroshard.core import collectives
from zeroshard.core import schedule as schedule_module
from zeroshard.core.mesh import build_mesh
from zeroshard.core.pulled import Slab, UnavailableError, map_slab, share
from zeroshard.core.unit import Unit
from zeroshard.engine import build
from zoo import ZOO, Case


def make_engine(case: Case, setting: Setting, how: str = "copy_engine") -> Any:
    config = config_of(case, setting)
    config["zeroshard"]["gather"] = how
    model = case.build(SEED, setting.checkpointing)
    return zeroshard.initialize(model=model, config=config)[0]


def make_mixed_engine(case: Case, setting: Setting) -> Any:
    """Half of the units are pulled, as where that is chosen by size."""
    with mock.patch.object(build, "share", lambda units, mesh: share(units[::2], mesh)):
        engine = make_engine(case, setting)
    assert {unit.gathers_alone for unit in engine.runtime.units} == {False, True}
    return engine


def is_pulled(engine: Any) -> bool:
    return all(unit.gathers_alone for unit in engine.runtime.units)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one | other)


# Cases in which all ranks run the same modules, so that gradients are added up in one order.
ALIKE: dict[str, dict[str, Any]] = {
    "plain": {"precision": "bf16", "lookahead_bytes": 1 << 20},
    "checkpointed_segments": {"checkpointing": "reentrant"},
    "tied_head_with_own_units": {"accumulation": 2},
    "low_rank_adapters": {"precision": "bf16"},
    "zero_sized_parameters": {"precision": "fp16"},
    "gradient_penalty": {"clip": 0.1},
}


def test_pulls_and_collectives_train_to_the_same_bits() -> None:
    def work(rank: int, world: int) -> dict[str, bool]:
        found: dict[str, bool] = {}
        for name, options in ALIKE.items():
            case = ZOO[name]
            setting = Setting(3, world, steps=2, **options)
            makers = [partial(make_engine, how="nccl"), make_engine]
            if name == "plain":
                makers.append(make_mixed_engine)
            sent, *others = (engine_run(case, setting, rank, make_engine=make) for make in makers)
            found[name] = all(
                same(sent.weights, pulled.weights) and sent.norms == pulled.norms
                for pulled in others
            )
        return found

    for found in run_ranks(work, 3):
        assert found == dict.fromkeys(ALIKE, True)


def test_ranks_that_run_other_modules_train_as_in_plain_pytorch() -> None:
    for name in ("depth_varies_by_rank", "mixture_of_experts"):
        settings = [Setting(3, 3, accumulation=2, clip=0.3, lookahead_bytes=1 << 20)]
        assert compare(ZOO[name], settings, make_engine=make_engine)[0].differences == []


class Experts(nn.Module):
    """Blocks of experts of which each token goes through some, by chance."""

    def __init__(self, width: int = 16, num_blocks: int = 3, num_experts: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, width)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
                for _ in range(num_experts)
            )
            for _ in range(num_blocks)
        )
        self.head = nn.Linear(width, 32)

    def forward(self, ids: Tensor, routes: list[list[int]]) -> Tensor:
        h = self.embedding(ids)
        for experts, route in zip(self.blocks, routes, strict=True):
            for index in route:
                h = h + experts[index](h)
        return nn.functional.cross_entropy(self.head(h).flatten(0, 1), ids.flatten())


def routes_of(step: int, rank: int) -> list[list[int]]:
    """In each block other experts, a different number of them, in another order; perhaps none."""
    generator = torch.Generator().manual_seed(31 * step + rank)
    order = [torch.randperm(4, generator=generator).tolist() for _ in range(3)]
    return [each[: int(torch.randint(0, 4, (), generator=generator))] for each in order]


@contextmanager
def counted(engine: Any) -> Iterator[dict[str, int]]:
    """How many gathers were collectives, and how many of them ranks told each other about."""
    counts = {"collective": 0, "agreed": 0, "exchanges": 0, "pulls": 0}
    gather_op, show = collectives._gather_op, schedule_module.Schedule._show
    unit_gather = type(engine.runtime.units[0]).gather

    def counted_op(*args: Any, **kwargs: Any) -> Any:
        counts["collective"] += kwargs.get("group") is not engine.mesh.control
        return gather_op(*args, **kwargs)

    def counted_show(self: Any, wish: Any) -> Any:
        counts["exchanges"] += 1
        shown = show(self, wish)
        counts["agreed"] += sum(op.kind == "gather" for each in shown for op in each)
        return shown

    def counted_gather(self: Any) -> None:
        counts["pulls"] += self.gathers_alone
        unit_gather(self)

    with (
        mock.patch.object(collectives, "_gather_op", counted_op),
        mock.patch.object(schedule_module.Schedule, "_show", counted_show),
        mock.patch.object(type(engine.runtime.units[0]), "gather", counted_gather),
    ):
        yield counts


def test_randomly_routed_experts_need_no_schedule_of_gathers() -> None:
    """Nor do ranks that evaluate meanwhile need the others at all."""

    def work(rank: int, world: int) -> tuple[list[dict[str, int]], bool]:
        weights: list[dict[str, Tensor]] = []
        counts: list[dict[str, int]] = []
        for how in ("nccl", "copy_engine"):
            torch.manual_seed(0)
            engine = zeroshard.initialize(
                model=Experts(),
                config={
                    "train_micro_batch_size_per_gpu": 1,
                    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
                    "zero_optimization": {"stage": 3},
                    "zeroshard": {"gather": how, "units": ["Sequential"]},
                },
            )[0]
            generator = torch.Generator().manual_seed(rank)
            with counted(engine) as training:
                counts.append(training)
                for step in range(6):
                    ids = torch.randint(0, 32, (2, 8), generator=generator)
                    engine.backward(engine(ids, routes_of(step, rank)))
                    engine.step()
            if how == "copy_engine" and rank == 0:
                with counted(engine) as alone, torch.no_grad():
                    counts.append(alone)
                    for step in range(3):
                        engine(torch.arange(8)[None], routes_of(step, 7))
            weights.append(full_weights(engine))
            engine.destroy()
        return counts, same(*weights)

    for (sent, pulled, *alone), is_same in run_ranks(work, 2):
        assert sent["collective"] > 0 and sent["agreed"] > 0 and sent["pulls"] == 0
        assert pulled["collective"] == pulled["agreed"] == 0 and pulled["pulls"] > 0
        assert 0 < pulled["exchanges"] < sent["exchanges"]
        assert is_same, "of two ranks, a sum in two parts has the bits of the whole sum"
        for evaluation in alone:
            assert evaluation["pulls"] > 0 and evaluation["exchanges"] == 0


@contextmanager
def writes_watched() -> Iterator[list[str]]:
    """What changed shards that others may read at that time."""
    fences: Counter[Slab] = Counter()
    fence, unfenced = Slab.fence, list[str]()

    def counted_fence(self: Slab) -> None:
        fences[self] += 1
        fence(self)

    def watched(write: Callable[..., None]) -> Callable[..., None]:
        def call(self: Unit, *args: Any) -> None:
            # Three make a slab; from then on every other one begins a change.
            if isinstance(self.transport.memory, Slab) and fences[self.transport.memory] % 2:
                unfenced.append(write.__name__)
            write(self, *args)

        return call

    verbs = ("write_master", "adopt", "load_kept")
    with (
        mock.patch.multiple(Unit, **{verb: watched(getattr(Unit, verb)) for verb in verbs}),
        mock.patch.object(Slab, "fence", counted_fence),
    ):
        yield unfenced


def rewrites(engine: Any, case: Case, setting: Setting, rank: int, folder: Path) -> list[Any]:
    """Everything that changes or moves shards, and training in between; what was seen of it."""
    seen: list[Any] = []
    steps = iter(range(100))

    def go_on() -> None:
        seen.append(train(engine, case, setting, rank, steps=[next(steps)]))

    params = dict(engine.module.named_parameters())
    param = next(p for n, p in params.items() if "blocks.1" in n and "weight" in n)
    go_on()
    with zeroshard.gathered(engine.module, modifier_rank=1), torch.no_grad():
        param.mul_(1.5 if rank == 1 else 7.0)
    go_on()
    full = zero.safe_get_full_fp32_param(param)
    assert full is not None
    zero.safe_set_full_fp32_param(param, full * 0.5)
    go_on()
    local = zero.safe_get_local_fp32_param(param)
    assert local is not None
    zero.safe_set_local_fp32_param(param, local + 0.25)
    with zeroshard.gathered(param):
        seen.append(param.detach().clone())
        go_on()  # the values that are held follow the step
        seen.append(param.detach().clone())
    engine.save_checkpoint(folder, tag="one")
    state = engine.module_state_dict()
    go_on()
    engine.load_checkpoint(folder, tag="one")
    go_on()
    engine.load_module_state_dict(state)
    go_on()
    engine.offload_states()
    engine.reload_states()
    go_on()
    engine.offload_states(include=["optim_states", "lp_params"])
    engine.reload_states()
    go_on()
    seen.append(full_weights(engine))
    return seen


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_whatever_changes_or_moves_weights_is_seen_by_the_next_pull(
    precision: str, tmp_path: Path
) -> None:
    """In fp32 master weights are the very memory that other ranks read."""
    case = ZOO["plain"]

    def work(rank: int, world: int) -> tuple[bool, list[str], list[Any], list[Any]]:
        setting = Setting(3, world, precision=precision, steps=1)  # type: ignore[arg-type]
        seen: list[list[Any]] = []
        for how in ("nccl", "copy_engine"):
            with writes_watched() as unfenced:
                engine = make_engine(case, setting, how)
                was_pulled = is_pulled(engine)
                seen.append(rewrites(engine, case, setting, rank, tmp_path / how))
                was_pulled = was_pulled and is_pulled(engine)
            model = engine.module
            engine.destroy()
            again = zeroshard.initialize(
                model=model,
                config={**config_of(case, setting), "zeroshard": {"gather": how}},
            )[0]
            seen[-1].append(full_weights(again))
            again.destroy()
        return was_pulled, unfenced, *seen

    for was_pulled, unfenced, sent, pulled in run_ranks(work, 2):
        assert was_pulled
        assert unfenced == []
        for number, (one, other) in enumerate(zip(sent, pulled, strict=True)):
            if isinstance(one, dict):
                assert same(one, other), number
            elif isinstance(one, Tensor):
                assert torch.equal(one, other), number
            else:
                assert one == other, number


def test_a_slab_belongs_to_a_row_of_the_mesh_and_has_no_name() -> None:
    def work(rank: int, world: int) -> tuple[list[int], int]:
        mesh = build_mesh(2, torch.device("cpu"))
        slab = map_slab(1 << 12, mesh)
        slab.rows[mesh.shard.rank].fill_(10 + rank)
        slab.fence()
        found = [int(row[-1]) for row in slab.rows]
        slab.fence()
        lines = Path("/proc/self/maps").read_text().splitlines()
        maps = [line for line in lines if "/zeroshard-" in line]
        return found, sum(line.endswith("(deleted)") for line in maps)

    results = run_ranks(work, 4)
    assert [found for found, _ in results] == [[10, 11], [10, 11], [12, 13], [12, 13]]
    assert [num_nameless for _, num_nameless in results] == [2] * 4


def test_a_rank_that_is_killed_leaves_no_shared_memory() -> None:
    folder, parent = Path("/dev/shm"), os.getpid()

    def work(rank: int, world: int) -> None:
        with mock.patch("secrets.randbits", lambda bits: world * parent + rank):
            map_slab(1 << 20, build_mesh(world, torch.device("cpu")))
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()

    with pytest.raises(RankError, match="rank 1 ended"):
        run_ranks(work, 2)
    names = [f"zeroshard-{2 * parent + rank:016x}" for rank in range(2)]
    assert not any((folder / name).exists() for name in names)


@pytest.mark.parametrize(
    ("module", "call", "error"),
    [(os, "posix_fallocate", OSError), (mmap, "mmap", ValueError)],
    ids=["reserving", "mapping"],
)
def test_where_one_rank_cannot_share_memory_all_use_collectives_and_say_why(
    module: Any, call: str, error: type[Exception]
) -> None:
    case = ZOO["plain"]
    setting = Setting(3, 2, steps=1)

    def work(rank: int, world: int) -> tuple[list[str], bool]:
        def full(*args: Any) -> None:
            raise error("no room is left")

        messages: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("zeroshard").addHandler(handler)
        with mock.patch.object(module, call, full if rank == 1 else getattr(module, call)):
            engine = make_engine(case, setting)
            with pytest.raises(UnavailableError):
                map_slab(100, engine.mesh)
        train(engine, case, setting, rank)
        return [text for text in messages if "gather" in text], is_pulled(engine)

    for messages, pulled in run_ranks(work, 2):
        assert len(messages) == 1 and "rank 1: no room is left" in messages[0]
        assert not pulled
