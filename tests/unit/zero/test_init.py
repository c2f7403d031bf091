"""``zero.Init``: its arguments, its rules for dtypes, and where it may be used."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import zeroshard
from forked import run_ranks
from zeroshard import ConfigError, UsageError
from zeroshard.core.slots import is_waiting, slot_of
from zeroshard.zero import Init

OWN = (torch.float64, torch.float32, torch.bfloat16, torch.int64)
OFFLOADED = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


class Kinds(nn.Module):
    """One parameter of each dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.params = nn.ParameterList(
            nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False) for dtype in OWN
        )


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({}, OWN),
        ({"dtype": BF16}, (BF16, BF16, BF16, torch.int64)),
        ({"dtype": FP32}, (FP32, FP32, FP32, torch.int64)),
        ({"config": {"bf16": {"enabled": True}}}, (BF16, BF16, BF16, torch.int64)),
        ({"config": {"fp16": {"enabled": True}}}, (FP16, FP16, FP16, torch.int64)),
        ({"config_dict_or_path": {}}, (torch.float64, FP32, FP32, torch.int64)),
        ({"config": {"bf16": {"enabled": True}}, "dtype": FP32}, (FP32, FP32, FP32, torch.int64)),
        ({"config": {"bf16": {"enabled": "auto"}}}, (torch.float64, FP32, FP32, torch.int64)),
    ],
)
def test_the_dtype_is_that_of_the_argument_or_of_the_configuration(
    arguments: dict[str, Any], wanted: tuple[torch.dtype, ...], world: int
) -> None:
    def work(rank: int, world: int) -> tuple[torch.dtype, ...]:
        with Init(**arguments):
            model = Kinds()
        freed = tuple(param.dtype for param in model.parameters())
        with zeroshard.gathered(model):
            assert tuple(param.dtype for param in model.parameters()) == freed
        return freed

    assert run_ranks(work, world) == [wanted] * world


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"mpu": object()}, UsageError, "mpu is not supported"),
        ({"param_swapper": object()}, UsageError, "param_swapper"),
        ({"zero_quantized_weights": True}, UsageError, "zero_quantized_weights is not"),
        (
            {"zero_quantized_nontrainable_weights": True},
            UsageError,
            "zero_quantized_nontrainable_weights is not",
        ),
        ({"remote_device": "disk"}, UsageError, "remote_device cannot be 'disk'"),
        ({"dtype": "auto"}, UsageError, "floating-point torch.dtype, not 'auto'"),
        ({"dtype": torch.int8}, UsageError, "floating-point torch.dtype, not torch.int8"),
        ({"module": "model"}, UsageError, "must be a torch.nn.Module"),
        ({"config": {}, "config_dict_or_path": {}}, ConfigError, "its older name"),
        ({"config": {"zero_optimisation": {}}}, ConfigError, "zero_optimization"),
        ({"data_parallel_group": object()}, UsageError, "must hold all ranks"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    def work(rank: int, world: int) -> None:
        with pytest.raises(error, match=words):
            Init(**arguments)

    run_ranks(work, 1)


def test_a_group_of_all_ranks_is_accepted_and_a_part_of_them_is_not() -> None:
    def work(rank: int, world: int) -> None:
        Init(data_parallel_group=dist.group.WORLD, zero_param_parallel_group=dist.new_group())
        part = [dist.new_group([0]), dist.new_group([1])][rank]
        with pytest.raises(UsageError, match="sequence_data_parallel_group must hold all ranks"):
            Init(sequence_data_parallel_group=part)

    run_ranks(work, 2)


@pytest.mark.parametrize(
    ("arguments", "is_remote"),
    [
        ({"remote_device": "cpu"}, True),
        ({"remote_device": "nvme", "pin_memory": True}, True),
        ({"config": OFFLOADED}, True),
        ({"config": OFFLOADED, "remote_device": "none"}, False),
        ({}, False),
    ],
)
@pytest.mark.parametrize("world", [1, 2])
def test_shards_wait_in_host_memory_where_argument_or_configuration_say_so(
    arguments: dict[str, Any], is_remote: bool, world: int
) -> None:
    def work(rank: int, world: int) -> None:
        with Init(**arguments):
            layer = nn.Linear(3, 2)
            twin = copy.deepcopy(layer)
            nn.init.ones_(layer.weight)
        slot = slot_of(layer.weight)
        if world == 1 and not is_remote:
            assert slot is None
            return
        assert slot is not None
        assert slot.unit.is_shard_near != is_remote
        with zeroshard.gathered([layer.weight, twin.weight], modifier_rank=0):
            assert torch.equal(layer.weight, torch.ones(2, 3))
            assert not torch.equal(layer.weight, twin.weight)
            twin.weight.data.fill_(2)
        with zeroshard.gathered(twin.weight):
            assert torch.equal(twin.weight, torch.full((2, 3), 2.0))

    run_ranks(work, world)


def test_disabled_it_does_nothing_at_all() -> None:
    def work(rank: int, world: int) -> None:
        before = dict(vars(nn.Module))
        with Init(enabled=False, mpu="ignored", module=nn.Linear(2, 2)):
            assert dict(vars(nn.Module)) == before
            layer = nn.Linear(2, 2)
        assert slot_of(layer.weight) is None
        assert not dist.is_initialized()

    run_ranks(work, 1, process_group=False)


def test_it_joins_the_other_ranks_itself() -> None:
    def work(rank: int, world: int) -> bool:
        with Init(dtype=BF16):
            layer = nn.Linear(2, 2)
        assert layer.weight.dtype == BF16
        return dist.is_initialized()

    assert run_ranks(work, 1, process_group=False) == [True]


def test_a_group_of_one_rank_among_several_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(rank: int, world: int) -> None:
        monkeypatch.setenv("WORLD_SIZE", "4")
        with pytest.raises(UsageError, match="has one rank, but 4 were started"):
            Init()

    run_ranks(work, 1)


def test_one_object_is_entered_again_and_inside_itself() -> None:
    def work(rank: int, world: int) -> list[bool]:
        init = Init()
        with init, init:
            first = nn.Linear(2, 2)
        outside = nn.Linear(2, 2)
        with init:
            second = nn.Linear(2, 2)
        return [is_waiting(layer.weight) for layer in (first, outside, second)]

    assert run_ranks(work, 2) == [[True, False, True]] * 2


def test_an_existing_module_is_sharded_in_place() -> None:
    def work(rank: int, world: int) -> bool:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        Init(module=model, dtype=BF16)
        return all(is_waiting(param) and param.dtype == BF16 for param in model.parameters())

    assert run_ranks(work, 2) == [True] * 2


def test_initialize_inside_the_context_builds_ordinary_modules() -> None:
    built: list[nn.Module] = []

    def make_optimizer(params: Any) -> torch.optim.Optimizer:
        built.append(nn.Linear(2, 2))  # as a library might
        return torch.optim.SGD(params, lr=0.1)

    def work(rank: int, world: int) -> bool:
        config = {"train_batch_size": 2, "zero_optimization": {"stage": 3}}
        with Init():
            model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
            engine = zeroshard.initialize(model=model, optimizer=make_optimizer, config=config)[0]
            loss = engine(torch.ones(1, 2)).sum()
            engine.backward(loss)
            engine.step()
        return slot_of(built[0].weight) is None

    assert run_ranks(work, 2) == [True] * 2


def test_initialize_inside_gathered_is_refused() -> None:
    def work(rank: int, world: int) -> None:
        with Init():
            model = nn.Linear(2, 2)
        with (
            zeroshard.gathered(model, modifier_rank=0),
            pytest.raises(UsageError, match="weight is gathered, and edits"),
        ):
            zeroshard.initialize(model=model, config={"train_batch_size": 2})

    run_ranks(work, 2)
