"""What the keys about communication and memory change: collectives, their dtypes, full units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import zeroshard
from forked import run_ranks
from reference import Setting, compare, config_of, full_weights, make_engine, train
from zeroshard.core import collectives
from zoo import ZOO

PLAIN = ZOO["plain"]
WORLD = 2


def setting(stage: int = 3, top: dict[str, Any] | None = None, **zero: Any) -> Setting:
    """A setting with further keys at the top of the file and under zero_optimization."""
    extra = {"zero_optimization": {"stage": stage, **zero}, **(top or {})}
    return Setting(stage, WORLD, accumulation=2, extra=extra)


@dataclass(frozen=True)
class Sent:
    """One collective on a unit."""

    kind: str
    op: str
    dtype: torch.dtype
    numel: int


@dataclass
class Wire:
    """All collectives on units from now on, and how many were under way at once."""

    sent: list[Sent] = field(default_factory=list[Sent])
    under_way: int = 0
    most_under_way: int = 0

    def listen(self) -> Wire:
        collectives._gather_op = self._heard("gather", collectives._gather_op)
        collectives._scatter_op = self._heard("scatter", collectives._scatter_op)
        dist.all_reduce = self._heard("all_reduce", dist.all_reduce)
        return self

    def _heard(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, async_op: bool = False, **options: Any) -> Any:
            work = function(*args, async_op=async_op, **options)
            if not async_op:
                return work
            op = str(options.get("op", "")).removeprefix("RedOpType.")
            # Of a reduce-scatter the second tensor is the full one.
            full = args[1] if kind == "scatter" else args[0]
            self.sent.append(Sent(kind, op, full.dtype, full.numel()))
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
            return Heard(work, self)

        return call

    def reductions(self) -> list[Sent]:
        return [each for each in self.sent if each.kind != "gather"]

    def gathers(self) -> list[Sent]:
        return [each for each in self.sent if each.kind == "gather"]


@dataclass
class Heard:
    """A ticket that tells when it was waited for."""

    work: Any
    wire: Wire

    def wait(self) -> None:
        self.work.wait()
        self.wire.under_way -= 1


@dataclass(frozen=True)
class Seen:
    """What one rank saw in the steps after the first two."""

    sent: list[Sent]
    most_under_way: int
    most_full_bytes: int
    weights: dict[str, Tensor]

    def numels(self, kind: str) -> list[int]:
        return [each.numel for each in self.sent if each.kind == kind]


def observe(wanted: Setting, case: Any = PLAIN, steps: int = 2) -> Seen:
    """Train and watch, once the schedule knows the order."""

    def work(rank: int, world: int) -> Seen:
        engine = make_engine(case, wanted)
        train(engine, case, wanted, rank, steps=range(2))
        most = 0

        def sample(*_: object) -> None:
            nonlocal most
            units = engine.runtime.units
            most = max(most, sum(unit.nbytes_full for unit in units if unit.is_full))

        for module in engine.module.modules():
            module.register_forward_hook(sample)
        for param in engine.module.parameters():
            param.register_post_accumulate_grad_hook(sample)
        wire = Wire().listen()
        train(engine, case, wanted, rank, steps=range(2, 2 + steps))
        sent = list(wire.sent)
        return Seen(sent, wire.most_under_way, most, full_weights(engine))

    return run_ranks(work, WORLD)[0]


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        assert torch.equal(tensor, want[name]), name


# Reductions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_gradients_travel_in_the_communication_dtype(stage: int, name: str) -> None:
    seen = observe(setting(stage, {"communication_data_type": name}), steps=1)
    dtypes = {each.dtype for each in seen.sent if each.kind != "gather"}
    assert dtypes == {{"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_without_reduce_scatter_means_are_made_by_all_reduce(stage: int) -> None:
    scattered, whole = observe(setting(stage)), observe(setting(stage, reduce_scatter=False))
    assert scattered.numels("scatter") and not scattered.numels("all_reduce")
    assert whole.numels("all_reduce") == scattered.numels("scatter")
    assert not whole.numels("scatter")
    assert_equal(whole.weights, scattered.weights)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("reduce_scatter", [True, False])
@pytest.mark.parametrize(
    "how", [{"prescale_gradients": True}, {"gradient_predivide_factor": 4.0}], ids=str
)
def test_dividing_before_the_reduction_is_still_a_mean(
    stage: int, reduce_scatter: bool, how: dict[str, Any]
) -> None:
    wanted = setting(stage, how, reduce_scatter=reduce_scatter)
    assert compare(PLAIN, [wanted])[0].differences == []
    ops = {each.op for each in observe(wanted, steps=1).sent if each.kind != "gather"}
    assert ops == {"SUM"}


class OneWeight(nn.Module):
    """Its gradient is its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).sum()


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize(
    ("how", "is_finite"),
    [
        ({"prescale_gradients": True}, True),
        ({"gradient_predivide_factor": 2.0}, False),
        ({"gradient_predivide_factor": 8.0}, True),
    ],
    ids=str,
)
def test_dividing_first_keeps_a_narrow_wire_from_overflowing(
    stage: int, how: dict[str, Any], is_finite: bool
) -> None:
    """Gradients of 50,000 add up to more than fp16 holds; fp16 ends at 65,504."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
        "communication_data_type": "fp16",
        "gradient_clipping": 0,
        "zero_optimization": {"stage": stage},
        **how,
    }
    # 80,000 fits when it is halved, and the sum of two halves does not.
    scale = 80_000.0 if how.get("gradient_predivide_factor") == 2.0 else 50_000.0

    def work(rank: int, world: int) -> bool:
        engine = zeroshard.initialize(model=OneWeight(), config=config)[0]
        engine.backward(engine(torch.full((8,), scale)))
        engine.step()
        return bool(torch.isfinite(engine.get_global_grad_norm()))

    assert run_ranks(work, WORLD) == [is_finite] * WORLD


@pytest.mark.parametrize("stage", [2, 3])
def test_without_overlap_each_collective_ends_before_the_next_begins(stage: int) -> None:
    beside, alone = observe(setting(stage)), observe(setting(stage, overlap_comm=False))
    assert alone.numels("scatter") == beside.numels("scatter")
    if stage == 3:
        assert beside.most_under_way > 1
        assert alone.most_under_way == 1
    assert_equal(alone.weights, beside.weights)


# Steps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_sub_group_size_steps_a_few_units_at_a_time(
    stage: int, optimizer: Literal["adamw", "sgd"]
) -> None:
    def work(rank: int, world: int) -> list[tuple[list[int], dict[str, Tensor]]]:
        found = []
        for keys in ({}, {"sub_group_size": 200}, {"sub_group_size": 10**9}):
            extra = {"zero_optimization": {"stage": stage, **keys}}
            wanted = Setting(stage, WORLD, clip=0.1, optimizer=optimizer, extra=extra)
            engine = make_engine(PLAIN, wanted)
            stepped: list[int] = []

            def count(
                inner: torch.optim.Optimizer, *_: object, stepped: list[int] = stepped
            ) -> None:
                pieces = [p for group in inner.param_groups for p in group["params"]]
                stepped.append(sum(p.numel() for p in pieces if p.grad is not None))

            engine.optimizer.register_step_pre_hook(count)
            train(engine, PLAIN, wanted, rank)
            largest = max(unit.layout.shard_numel for unit in engine.runtime.units)
            assert "sub_group_size" not in keys or max(stepped) <= max(
                keys["sub_group_size"], largest
            )
            found.append((stepped, full_weights(engine)))
        return found

    for whole, parts, large in run_ranks(work, WORLD):
        assert len(whole[0]) == len(large[0]) == 3 and len(parts[0]) > 6
        assert sum(parts[0]) == sum(whole[0])
        assert_equal(parts[1], whole[1])
        assert_equal(large[1], whole[1])


@pytest.mark.parametrize("size", [10, 10**9])
def test_an_optimizer_that_looks_at_all_parameters_steps_them_at_once(
    size: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    extra = {
        "optimizer": {"type": "Lamb", "params": {"lr": 0.01}},
        "zero_optimization": {"stage": 2, "sub_group_size": size},
    }
    wanted = Setting(2, WORLD, extra=extra)

    def work(rank: int, world: int) -> tuple[int, str]:
        engine = make_engine(PLAIN, wanted)
        steps: list[int] = []
        engine.optimizer.register_step_pre_hook(lambda *_: steps.append(1))
        train(engine, PLAIN, wanted, rank)
        return len(steps), caplog.text

    for steps, text in run_ranks(work, WORLD):
        assert steps == 3
        assert ("sub_group_size is ignored: Lamb" in text) == (size == 10)


# Gathers and what stays full --------------------------------------------------------------------


def test_nothing_is_gathered_ahead_with_a_prefetch_bucket_of_zero() -> None:
    default = observe(setting())
    none = observe(setting(stage3_prefetch_bucket_size=0))
    one = observe(setting(stage3_prefetch_bucket_size=1))
    many = observe(setting(stage3_prefetch_bucket_size=10**9))
    assert none.most_full_bytes < default.most_full_bytes < many.most_full_bytes
    assert one.most_full_bytes == default.most_full_bytes
    for seen in (none, one, many):
        assert_equal(seen.weights, default.weights)


def test_a_limit_of_live_parameters_ends_gathering_ahead() -> None:
    many = observe(setting(stage3_prefetch_bucket_size=10**9))
    few = observe(setting(stage3_prefetch_bucket_size=10**9, stage3_max_live_parameters=1))
    assert few.most_full_bytes < many.most_full_bytes
    assert few.most_full_bytes == observe(setting(stage3_prefetch_bucket_size=0)).most_full_bytes
    assert_equal(few.weights, many.weights)


def test_units_needed_again_soon_stay_full_and_are_not_gathered_twice() -> None:
    default = observe(setting())
    some = observe(setting(stage3_max_reuse_distance=1000))
    all_stay = observe(setting(stage3_max_reuse_distance=10**9))
    counts = [len(seen.numels("gather")) for seen in (default, some, all_stay)]
    assert counts[0] > counts[1] > counts[2]
    peaks = [seen.most_full_bytes for seen in (default, some, all_stay)]
    assert peaks[0] <= peaks[1] < peaks[2]
    for seen in (some, all_stay):
        assert_equal(seen.weights, default.weights)


def test_a_limit_of_live_parameters_also_limits_what_stays_for_reuse() -> None:
    free = observe(setting(stage3_max_reuse_distance=10**9))
    held = observe(setting(stage3_max_reuse_distance=10**9, stage3_max_live_parameters=600))
    assert held.most_full_bytes < free.most_full_bytes
    assert_equal(held.weights, free.weights)


def test_small_parameters_stay_full_in_one_unit() -> None:
    wanted = setting(stage3_param_persistence_threshold=16)

    def work(rank: int, world: int) -> list[tuple[list[str], bool]]:
        engine = make_engine(PLAIN, wanted)
        train(engine, PLAIN, wanted, rank, steps=range(2))
        return [
            ([member.name for member in unit.members], unit.is_full)
            for unit in engine.runtime.units
        ]

    model = PLAIN.build(0)
    small = [name for name, param in model.named_parameters() if param.numel() <= 16]
    assert small
    units = run_ranks(work, WORLD)[0]
    assert [members for members, is_full in units if is_full] == [small]
    assert_equal(observe(wanted).weights, observe(setting()).weights)


def test_what_stays_full_does_not_count_as_something_to_gather_ahead() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small = nn.ParameterList(nn.Parameter(torch.ones(8)) for _ in range(200))
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(6)
            )

        def forward(self, x: Tensor) -> Tensor:
            x = x * sum(self.small)
            for block in self.blocks:
                x = block(x)
            return x.sum()

    config = {
        "train_batch_size": WORLD,
        "optimizer": {"type": "SGD", "params": {"lr": 1e-6}},
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 8,
            "stage3_prefetch_bucket_size": 1,
        },
    }

    def work(rank: int, world: int) -> int:
        engine = zeroshard.initialize(model=Stack(), config=config)[0]
        most = 0

        def sample(*_: object) -> None:
            nonlocal most
            units = [u for u in engine.runtime.units if not u.lifetime.params_stay]
            most = max(most, sum(unit.is_full for unit in units))

        for block in engine.module.blocks:
            block[0].register_forward_hook(sample)
        for _ in range(3):
            engine.backward(engine(torch.ones(2, 8)))
            engine.step()
        return most

    assert run_ranks(work, WORLD) == [2, 2]  # the one in use and the one after it


def test_no_more_stays_full_than_the_model_persistence_threshold_allows() -> None:
    sizes = [param.numel() for param in PLAIN.build(0).parameters() if param.numel() <= 16]
    limit = sum(sizes) // 2
    wanted = setting(
        stage3_param_persistence_threshold=16, stage3_model_persistence_threshold=limit
    )

    def work(rank: int, world: int) -> int:
        engine = make_engine(PLAIN, wanted)
        return sum(
            param.numel()
            for unit in engine.runtime.units
            if unit.is_full
            for param in (member.param for member in unit.members)
        )

    (kept,) = set(run_ranks(work, WORLD))
    assert limit - max(sizes) < kept <= limit


class Layers(nn.Module):
    """A large layer, and three small ones after it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 2000)
        self.first, self.second, self.third = (nn.Linear(n, n) for n in (4, 5, 6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        return sum(
            layer(h[:, : layer.in_features]).sum()
            for layer in self.children()
            if layer is not self.body
        )


@pytest.mark.parametrize("key", ["reduce_bucket_size", "allgather_bucket_size"])
def test_a_bucket_size_limits_what_small_layers_put_together(key: str) -> None:
    def work(rank: int, world: int) -> list[list[int]]:
        found = []
        for keys in ({}, {key: 36}, {key: 10**9}):
            config = {
                "train_micro_batch_size_per_gpu": 1,
                "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
                "zero_optimization": {"stage": 2, **keys},
            }
            engine = zeroshard.initialize(model=Layers(), config=config)[0]
            wire = Wire().listen()
            engine.backward(engine(torch.ones(2, 8)))
            engine.step()
            found.append(sorted(each.numel for each in wire.reductions()))
        return found

    (together, body), cut, large = run_ranks(work, WORLD)[0]
    assert large == [together, body]
    # Each layer of more than 36 elements needs a unit of its own; the large one is not divided.
    assert len(cut) == 4 and cut[-1] == body and sum(cut[:-1]) >= together


# Modules and dtypes -----------------------------------------------------------------------------


def units_of(case: Any, wanted: Setting) -> list[list[str]]:
    def work(rank: int, world: int) -> list[list[str]]:
        units = make_engine(case, wanted).runtime.units
        return [[member.name for member in unit.members] for unit in units]

    return run_ranks(work, WORLD)[0]


@pytest.mark.parametrize(
    "leaf", [{"classes": ["ModuleOfTwo"]}, {"names": ["pair"]}, {"name_suffixes": ["pair"]}]
)
def test_a_leaf_module_is_one_unit(leaf: dict[str, Any]) -> None:
    class ModuleOfTwo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)
            )

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = ModuleOfTwo()

        def forward(self, x: Tensor) -> Tensor:
            return self.pair(x).sum()

    def work(rank: int, world: int) -> tuple[int, int]:
        counts = []
        for zero in ({"stage": 3}, {"stage": 3, "leaf_module": leaf}):
            config = {
                "train_micro_batch_size_per_gpu": 1,
                "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
                "zero_optimization": zero,
            }
            engine = zeroshard.initialize(model=Holder(), config=config)[0]
            engine.backward(engine(torch.ones(2, 4)))
            engine.step()
            counts.append(len(engine.runtime.units))
        return counts[0], counts[1]

    assert run_ranks(work, WORLD)[0] == (2, 1)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_parameter_without_gradient_is_an_error_where_that_is_asked_for(stage: int) -> None:
    case = ZOO["never_used"]
    wanted = setting(stage, ignore_unused_parameters=False)

    def work(rank: int, world: int) -> str:
        engine = make_engine(case, wanted)
        try:
            train(engine, case, wanted, rank)
        except zeroshard.UsageError as error:
            return str(error)
        return ""

    unused = [name for name, _ in case.build(0).named_parameters() if "spare" in name]
    for message in run_ranks(work, WORLD):
        assert "got no gradient in this step" in message
        for rank in (0, 1):
            (line,) = (line for line in message.splitlines() if line.startswith(f"rank {rank}: "))
            assert all(name in line for name in unused)
    used = compare(PLAIN, [setting(stage, ignore_unused_parameters=False)])
    assert used[0].differences == []


def test_a_parameter_that_one_rank_does_not_use_is_an_error_on_every_rank() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 1), nn.Linear(4, 1)

        def forward(self, x: Tensor, both: bool) -> Tensor:
            return self.left(x).sum() + (self.right(x).sum() if both else 0)

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": 2, "ignore_unused_parameters": False},
    }

    def work(rank: int, world: int) -> str:
        engine = zeroshard.initialize(model=Routed(), config=config)[0]
        engine.backward(engine(torch.ones(2, 4), both=rank == 0))
        with pytest.raises(zeroshard.UsageError) as caught:
            engine.step()
        engine.reset()
        engine.backward(engine(torch.ones(2, 4), both=True))
        engine.step()
        return str(caught.value)

    for message in run_ranks(work, WORLD):
        assert "rank 1: right.weight, right.bias" in message and "rank 0:" not in message


def test_names_that_reach_no_parameter_are_told(caplog: pytest.LogCaptureFixture) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))

    config = {
        "train_batch_size": WORLD,
        "bf16": {"enabled": True},
        "data_types": {"keep_in_fp32_modules": ["experts", "expert"]},
        "zero_optimization": {"stage": 3, "leaf_module": {"names": ["experts"]}},
    }

    def work(rank: int, world: int) -> str:
        zeroshard.initialize(model=Holder(), config=config)
        return caplog.text

    for text in run_ranks(work, WORLD):
        assert "leaf_module: experts is a ModuleList, which is never called itself" in text
        assert "keep_in_fp32_modules: no parameter of the model is inside expert;" in text


def test_modules_kept_in_fp32_are_gathered_and_computed_in_fp32() -> None:
    top = {"bf16": {"enabled": True}, "data_types": {"keep_in_fp32_modules": ["head"]}}

    def work(rank: int, world: int) -> dict[str, torch.dtype]:
        wanted = setting(3, top)
        model = PLAIN.build(0)
        engine = zeroshard.initialize(model=model, config=config_of(PLAIN, wanted))[0]
        with zeroshard.gathered(engine.module):
            return {name: param.dtype for name, param in engine.module.named_parameters()}

    for name, dtype in run_ranks(work, WORLD)[0].items():
        assert dtype == (torch.float32 if name.startswith("head.") else torch.bfloat16), name


def test_a_model_that_names_its_fp32_modules_is_believed() -> None:
    def work(rank: int, world: int) -> list[torch.dtype]:
        found = []
        for half in ("fp16", "bf16"):
            top = {half: {"enabled": True}, "data_types": {"keep_in_fp32_modules": "auto"}}
            model = PLAIN.build(0)
            model._keep_in_fp32_modules = ["head"]
            config = config_of(PLAIN, setting(2, top))
            engine = zeroshard.initialize(model=model, config=config)[0]
            found.append(engine.module.head.weight.dtype)
        return found

    assert run_ranks(work, WORLD)[0] == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("stage", [0, 3])
def test_buffers_take_the_dtype_asked_for_and_indices_keep_theirs(stage: int) -> None:
    class Buffered(OneWeight):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.ones(3))
            self.register_buffer("index", torch.arange(3))

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": stage},
        "data_types": {"buffer_dtype": "bf16"},
    }

    def work(rank: int, world: int) -> tuple[torch.dtype, torch.dtype]:
        module = zeroshard.initialize(model=Buffered(), config=config)[0].module
        return module.table.dtype, module.index.dtype

    assert run_ranks(work, WORLD)[0] == (torch.bfloat16, torch.int64)


# Autocast ---------------------------------------------------------------------------------------


class Casts(nn.Module):
    """A linear layer and a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        assert h.dtype == torch.get_autocast_dtype(x.device.type)
        return self.norm(h).float().square().mean()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_autocast_trains_as_plain_autocast_with_fp32_weights_does(stage: int, dtype: str) -> None:
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "gradient_clipping": 0,
        "fp16": {"loss_scale": 1024.0},
        "torch_autocast": {"enabled": True, "dtype": dtype},
        "zero_optimization": {"stage": stage},
    }
    batches = torch.randn(3, 4, 16)

    def work(rank: int, world: int) -> list[dict[str, Tensor]]:
        engine = zeroshard.initialize(model=Casts(), config=config)[0]
        plain = Casts()
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
        for batch in batches:
            engine.backward(engine(batch))
            engine.step()
            with torch.autocast("cpu", half):
                loss = plain(batch)
            (loss * (1024 if dtype == "fp16" else 1)).backward()
            for param in plain.parameters():
                assert param.grad is not None
                param.grad /= 1024 if dtype == "fp16" else 1
            optimizer.step()
            optimizer.zero_grad()
        master = {
            member.name: piece.detach()
            for unit in engine.runtime.units
            for member, piece in zip(unit.members, unit.slices, strict=True)
        }
        want = {
            name: param.detach().reshape(-1)[owned.slice()]
            for unit in engine.runtime.units
            for index, (name, param) in enumerate(
                (member.name, plain.get_parameter(member.name)) for member in unit.members
            )
            for owned in [unit.layout.owned(index, unit.mesh.shard.rank)]
        }
        return [{name: value.reshape(-1) for name, value in master.items()}, want]

    for got, want in run_ranks(work, WORLD):
        for name, tensor in got.items():
            torch.testing.assert_close(tensor, want[name], rtol=1e-6, atol=1e-7)


def test_under_autocast_only_safe_modules_travel_in_the_lower_dtype() -> None:
    def gathers(safe: dict[str, Any]) -> set[tuple[torch.dtype, int]]:
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
            "torch_autocast": {"enabled": True, "dtype": "bf16", **safe},
            "zero_optimization": {"stage": 3},
        }

        def work(rank: int, world: int) -> set[tuple[torch.dtype, int]]:
            engine = zeroshard.initialize(model=Casts(), config=config)[0]
            wire = Wire().listen()
            engine(torch.ones(2, 16))
            return {(each.dtype, each.numel) for each in wire.gathers()}

        return run_ranks(work, WORLD)[0]

    linear, norm = 16 * 16 + 16, 16 + 16
    assert gathers({}) == {(torch.bfloat16, linear), (torch.float32, norm)}
    none_safe = gathers({"lower_precision_safe_modules": []})
    assert none_safe == {(torch.float32, linear), (torch.float32, norm)}
    both = gathers({"lower_precision_safe_modules": ["torch.nn.Linear", "torch.nn.LayerNorm"]})
    assert both == {(torch.bfloat16, linear), (torch.bfloat16, norm)}
