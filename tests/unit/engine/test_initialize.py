"""initialize(): what it takes, what it gives back, and what it refuses."""

from __future__ import annotations

import argparse
import base64
import inspect
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, StepLR

import zeroshard
from forked import run_ranks
from unit.engine.small import (
    LR,
    STAGES,
    Net,
    assert_equal_weights,
    config_of,
    config_without,
    loss_of,
    make,
    on_ranks,
    plain_weights,
    train,
    weights_of,
)
from zeroshard import ConfigError, UsageError

Config = dict[str, Any]


# The signature and the result -------------------------------------------------------------------


def test_it_takes_the_arguments_of_deepspeed_in_their_order_with_their_defaults() -> None:
    parameters = inspect.signature(zeroshard.initialize).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        "args": None,
        "model": None,
        "optimizer": None,
        "model_parameters": None,
        "training_data": None,
        "lr_scheduler": None,
        "distributed_port": 29500,
        "mpu": None,
        "dist_init_required": None,
        "collate_fn": None,
        "config": None,
        "mesh_param": None,
        "config_params": None,
    }
    assert list(parameters)[:4] == ["args", "model", "optimizer", "model_parameters"]
    assert list(parameters)[4:8] == ["training_data", "lr_scheduler", "distributed_port", "mpu"]
    assert list(parameters)[8:] == [
        "dist_init_required",
        "collate_fn",
        "config",
        "mesh_param",
        "config_params",
    ]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())


@on_ranks(1)
def test_it_returns_the_engine_the_optimizer_the_loader_and_the_schedule() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    schedule = StepLR(optimizer, step_size=1)
    data = [torch.zeros(4)] * 3
    result = zeroshard.initialize(
        None, model, optimizer, None, data, schedule, config=config_without("optimizer")
    )
    assert type(result) is tuple
    engine, returned, loader, returned_schedule = result
    assert isinstance(engine, zeroshard.Engine)
    assert engine.module is model
    assert returned is engine.optimizer
    assert returned.optimizer is optimizer
    assert returned_schedule is schedule is engine.lr_scheduler
    assert loader is engine.training_dataloader
    assert len(loader) == 3


@on_ranks(1)
def test_it_returns_none_for_what_was_not_asked_for() -> None:
    engine, *rest = zeroshard.initialize(model=Net(), config=config_without("optimizer"))
    assert rest == [None, None, None]
    assert engine.optimizer is engine.training_dataloader is engine.lr_scheduler is None


def test_it_makes_a_process_group_where_there_is_none() -> None:
    def work(rank: int, world: int) -> int:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
        train(make())
        return dist.get_world_size()

    assert run_ranks(work, 1, process_group=False) == [1]


@on_ranks(2)
def test_every_rank_starts_with_the_buffers_of_rank_0() -> None:
    class WithBuffers(Net):
        def __init__(self) -> None:
            super().__init__()
            rank = dist.get_rank()
            self.register_buffer("mean", torch.full((2,), 1.0 + rank))
            self.register_buffer("count", torch.tensor(3 + rank))
            self.register_buffer("mask", torch.ones(2, 2, dtype=torch.bool).tril(-rank))
            self.register_buffer("phases", torch.full((2,), 1j + rank))
            self.register_buffer("transposed", torch.arange(6.0).view(2, 3).t() + rank)
            self.register_buffer("expanded", torch.full((1, 3), 1.0 + rank).expand(1000, 3))
            self.register_buffer("spread", torch.full((6,), 1.0 + rank)[::2])
            self.register_buffer("absent", None)

    module = make(model=WithBuffers()).module
    assert module.mean.tolist() == [1.0, 1.0]
    assert module.count.item() == 3
    assert module.mask.tolist() == [[True, False], [True, True]]
    assert module.phases.tolist() == [1j, 1j]
    assert module.transposed.tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert torch.equal(module.expanded, torch.ones(1000, 3))
    assert module.spread.tolist() == [1.0, 1.0, 1.0]
    assert module.absent is None


# The configuration ------------------------------------------------------------------------------


def as_dict(config: Config, folder: Path) -> Config:
    return {"config": config}


def as_path(config: Config, folder: Path) -> Config:
    (folder / "config.json").write_text(json.dumps(config))
    return {"config": folder / "config.json"}


def as_path_in_a_string(config: Config, folder: Path) -> Config:
    return {"config": str(as_path(config, folder)["config"])}


def as_base64(config: Config, folder: Path) -> Config:
    return {"config": base64.urlsafe_b64encode(json.dumps(config).encode()).decode()}


def as_arguments(config: Config, folder: Path) -> Config:
    path = as_path_in_a_string(config, folder)["config"]
    parser = zeroshard.add_config_arguments(argparse.ArgumentParser())
    return {"args": parser.parse_args(["--deepspeed", "--deepspeed_config", path])}


def as_old_arguments(config: Config, folder: Path) -> Config:
    path = as_path_in_a_string(config, folder)["config"]
    parser = zeroshard.add_config_arguments(argparse.ArgumentParser())
    return {"args": parser.parse_args(["--deepscale", "--deepscale_config", path])}


def as_config_params(config: Config, folder: Path) -> Config:
    return {"config_params": config}


WAYS = (
    as_dict,
    as_path,
    as_path_in_a_string,
    as_base64,
    as_arguments,
    as_old_arguments,
    as_config_params,
)


@pytest.mark.parametrize("way", WAYS)
@on_ranks(1)
def test_a_configuration_may_come(way: Any, tmp_path: Path) -> None:
    config = config_of(train_micro_batch_size_per_gpu=3)
    engine = zeroshard.initialize(model=Net(), **way(config, tmp_path))[0]
    assert engine.train_batch_size() == 3
    train(engine)


@pytest.mark.parametrize(
    "ways",
    [
        (as_dict, as_arguments),
        (as_dict, as_config_params),
        (as_arguments, as_config_params),
        (as_dict, as_arguments, as_config_params),
    ],
)
def test_two_configurations_are_refused(ways: Any, tmp_path: Path) -> None:
    given: Config = {}
    for way in ways:
        given |= way(config_of(), tmp_path)
    with pytest.raises(ConfigError, match=r"more than one configuration.*\n\nhint: pass exactly"):
        zeroshard.initialize(model=Net(), **given)


@pytest.mark.parametrize("args", [None, argparse.Namespace(deepspeed_config=None)])
def test_no_configuration_is_refused(args: Any) -> None:
    with pytest.raises(ConfigError, match=r"no configuration(.|\n)*hint: .*--deepspeed_config"):
        zeroshard.initialize(args, Net())


@pytest.mark.parametrize(
    "args", [argparse.Namespace(deepspeed_config=None), argparse.Namespace(), object()]
)
@on_ranks(1)
def test_arguments_without_a_configuration_leave_room_for_one(args: Any) -> None:
    train(zeroshard.initialize(args, Net(), config=config_of())[0])


# The model --------------------------------------------------------------------------------------


def test_a_call_without_a_model_is_refused() -> None:
    with pytest.raises(UsageError, match="needs a model"):
        zeroshard.initialize(config=config_of())


@pytest.mark.parametrize("argument", ["mpu", "mesh_param"])
def test_model_parallel_groups_are_refused(argument: str) -> None:
    with pytest.raises(UsageError, match="mpu and mesh_param are not supported"):
        zeroshard.initialize(model=Net(), config=config_of(), **{argument: object()})


@on_ranks(2, STAGES)
def test_a_parameter_on_the_meta_device_is_refused(stage: int) -> None:
    model = Net()
    model.blocks[1] = model.blocks[1].to("meta")
    with pytest.raises(UsageError, match=r"blocks\.1\.up\.weight is on the meta.*(.|\n)*to_empty"):
        make(stage, model)


@on_ranks(2, STAGES)
def test_a_parameter_of_another_engine_is_refused(stage: int) -> None:
    first, second = Net(seed=0), Net(seed=1)
    second.head.weight = first.head.weight
    engine = make(stage, first)
    with pytest.raises(UsageError, match=r"head\.weight belongs to another engine"):
        make(stage, second)
    train(engine)
    assert_equal_weights(
        weights_of(engine), plain_weights(lambda m: torch.optim.SGD(m.parameters(), LR))
    )


@pytest.mark.parametrize("name", ["blocks", "ModuleList"])
@on_ranks(1)
def test_a_container_which_never_runs_is_refused_as_a_unit(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}(.|\n)*hint: "):
        make(3, zeroshard={"units": [name]})


@on_ranks(2, STAGES)
def test_parameters_that_no_optimizer_steps_are_warned_about_and_stay(
    stage: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.clear()
    model = Net()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    engine = zeroshard.initialize(
        model=model, model_parameters=model.head.parameters(), config=config_of(stage)
    )[0]
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "8 parameters require gradients but no optimizer steps them" in warnings[0]
    assert "blocks.0.up.weight" in warnings[0]
    assert "head" not in warnings[0]
    train(engine)
    assert all(param.grad is None for param in model.parameters())
    after = weights_of(engine)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}


@on_ranks(2, STAGES)
def test_without_an_optimizer_only_forward_works(stage: int) -> None:
    model = Net()
    with torch.no_grad():
        want = [loss_of(model, number) for number in range(3)]
    engine = zeroshard.initialize(model=model, config=config_without("optimizer", stage))[0]
    with torch.no_grad():
        got = [loss_of(engine, number) for number in range(3)]
    torch.testing.assert_close(got, want)
    loss = loss_of(engine)
    assert engine.get_lr() == []
    assert engine.get_global_grad_norm() is None
    with pytest.raises(UsageError, match=r"backward\(\) needs an optimizer(.|\n)*hint: pass opt"):
        engine.backward(loss)
    with pytest.raises(UsageError, match=r"step\(\) needs an optimizer"):
        engine.step()
    torch.testing.assert_close(loss_of(engine), want[0])


def mistakes() -> dict[str, Callable[[Net], Config]]:
    """Arguments that are refused, each for a reason that shows late."""
    return {
        "optimizer of another model": lambda model: {
            "optimizer": torch.optim.SGD(Net().parameters(), LR)
        },
        "schedule of another optimizer": lambda model: {
            "lr_scheduler": ConstantLR(torch.optim.SGD(Net().parameters(), LR))
        },
        "unknown schedule": lambda model: {
            "config": config_of(3, scheduler={"type": "Unheard", "params": {}})
        },
        "data that is no dataset": lambda model: {"training_data": 5},
    }


@pytest.mark.parametrize("mistake", list(mistakes()))
@on_ranks(1)
def test_a_refused_call_leaves_the_model_as_it_was(mistake: str) -> None:
    model = Net()
    with pytest.raises((UsageError, ConfigError)):
        zeroshard.initialize(
            **{"model": model, "config": config_of(3)} | mistakes()[mistake](model)
        )
    engine = make(3, model)
    train(engine)
    assert_equal_weights(
        weights_of(engine), plain_weights(lambda m: torch.optim.SGD(m.parameters(), LR))
    )


# Arguments of scripts ---------------------------------------------------------------------------


def test_a_parser_with_the_arguments_of_deepspeed_knows_them_and_their_old_names() -> None:
    parser = argparse.ArgumentParser()
    assert zeroshard.add_config_arguments(parser) is parser
    neither = {
        "deepspeed": False,
        "deepspeed_config": None,
        "deepscale": False,
        "deepscale_config": None,
    }
    assert vars(parser.parse_args([])) == neither
    given = parser.parse_args(["--deepspeed", "--deepspeed_config", "ds.json"])
    assert vars(given) == {**neither, "deepspeed": True, "deepspeed_config": "ds.json"}
    assert "deepscale" not in parser.format_help()


@on_ranks(2)
def test_a_model_that_is_one_layer_trains() -> None:
    model = nn.Linear(4, 3)
    engine = make(3, model)
    before = weights_of(engine)
    train(engine, steps=1)
    assert not torch.equal(before["weight"], weights_of(engine)["weight"])
