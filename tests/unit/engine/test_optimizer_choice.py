"""The optimizer and the schedule of initialize(): how they may be given, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR, LambdaLR, StepLR

import zeroshard
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


# The optimizer ----------------------------------------------------------------------------------

GIVEN: dict[str, Callable[[Net], Config]] = {
    "object": lambda model: {"optimizer": torch.optim.SGD(model.parameters(), lr=1e-3)},
    "object over a generator": lambda model: {
        "optimizer": torch.optim.SGD(iter(model.parameters()))
    },
    "class": lambda model: {"optimizer": torch.optim.SGD},
    "callable": lambda model: {"optimizer": lambda params: torch.optim.SGD(params, lr=1e-3)},
    "partial": lambda model: {"optimizer": partial(torch.optim.SGD, lr=1e-3)},
    "class for some": lambda model: {
        "optimizer": torch.optim.SGD,
        "model_parameters": iter(list(model.parameters())),
    },
}


@pytest.mark.parametrize("given", list(GIVEN))
@on_ranks(2, (0, 3))
def test_an_optimizer_may_be_given_as(given: str, stage: int) -> None:
    model = Net()
    arguments = GIVEN[given](model)
    config = config_without("optimizer", stage)
    engine, optimizer, *_ = zeroshard.initialize(model=model, config=config, **arguments)
    assert type(optimizer.optimizer) is torch.optim.SGD
    assert engine.get_lr() == [1e-3]
    train(engine)
    assert_equal_weights(
        weights_of(engine), plain_weights(lambda m: torch.optim.SGD(m.parameters(), lr=1e-3))
    )


@pytest.mark.parametrize("name", ["SGD", "sgd", "AdamW", "adamw", "Adam", "ADAM", "RMSprop"])
@on_ranks(1)
def test_an_optimizer_may_be_named_in_the_configuration(name: str) -> None:
    engine = make(optimizer={"type": name, "params": {"lr": 0.25}})
    kind = {"SGD": "SGD", "RMSPROP": "RMSprop"}.get(name.upper(), "AdamW")
    assert type(engine.basic_optimizer).__name__ == kind
    assert engine.get_lr() == [0.25]
    train(engine)


@on_ranks(1)
def test_adam_with_adam_w_mode_false_is_adam_with_l2_decay() -> None:
    params = {"lr": 0.25, "betas": [0.5, 0.75], "weight_decay": 0.5, "adam_w_mode": False}
    engine = make(optimizer={"type": "Adam", "params": params})
    assert type(engine.basic_optimizer) is torch.optim.Adam
    train(engine)
    want = plain_weights(
        lambda m: torch.optim.Adam(m.parameters(), lr=0.25, betas=(0.5, 0.75), weight_decay=0.5)
    )
    assert_equal_weights(weights_of(engine), want)


@on_ranks(1)
def test_an_optimizer_that_is_passed_wins_over_the_one_in_the_configuration() -> None:
    model = Net()
    mine = torch.optim.AdamW(model.parameters(), lr=0.25)
    engine, optimizer, *_ = zeroshard.initialize(model=model, optimizer=mine, config=config_of())
    assert optimizer.optimizer is mine
    assert engine.get_lr() == [0.25]


@pytest.mark.parametrize(
    ("block", "text"),
    [
        ({"type": "Adan", "params": {}}, r'"Adan" is not one(.|\n)*hint: use one of .*AdamW'),
        ({"type": "AdamW", "params": {"momentum": 0.5}}, r"AdamW does not take momentum"),
        ({"type": "AdamW", "params": {"max_grad_norm": 1.0}}, "max_grad_norm(.|\n)*hint: "),
    ],
)
@on_ranks(1)
def test_an_optimizer_block_that_cannot_be_honoured_is_refused(block: Config, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make(optimizer=block)


@on_ranks(2, STAGES)
def test_param_groups_may_be_given_as_model_parameters(stage: int) -> None:
    def groups(model: Net) -> list[dict[str, Any]]:
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim <= 1]
        return [{"params": matrices, "lr": 0.5}, {"params": vectors, "weight_decay": 0.25}]

    model = Net()
    engine, optimizer, *_ = zeroshard.initialize(
        model=model, model_parameters=groups(model), config=config_of(stage)
    )
    assert optimizer is not None
    assert engine.get_lr() == [0.5, LR]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 0.25]
    train(engine)
    assert_equal_weights(
        weights_of(engine), plain_weights(lambda m: torch.optim.SGD(groups(m), lr=LR))
    )


WITH_FROZEN: dict[str, Callable[[Net], Config]] = {
    "nothing": lambda model: {},
    "model_parameters": lambda model: {"model_parameters": model.parameters()},
    "groups": lambda model: {"model_parameters": [{"params": list(model.parameters())}]},
    "object": lambda model: {"optimizer": torch.optim.SGD(model.parameters(), lr=LR)},
    "class": lambda model: {"optimizer": partial(torch.optim.SGD, lr=LR)},
}


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize(
    "given",
    [
        "nothing",
        "model_parameters",
        "class",
        "groups",
        "object",
    ],
)
@on_ranks(1)
def test_an_optimizer_over_all_parameters_leaves_frozen_ones_alone(given: str, stage: int) -> None:
    """As in plain PyTorch, where a frozen parameter has no gradient and is passed over."""

    def freeze(model: Net) -> Net:
        model.blocks[0].requires_grad_(False)
        model.blocks[1].up.weight.requires_grad_(False)
        return model

    model = freeze(Net())
    engine = zeroshard.initialize(
        model=model, config=config_of(stage), **WITH_FROZEN[given](model)
    )[0]
    train(engine)
    assert_equal_weights(
        weights_of(engine),
        plain_weights(lambda m: torch.optim.SGD(freeze(m).parameters(), lr=LR)),
    )


@on_ranks(2, STAGES)
def test_an_optimizer_that_has_stepped_before_keeps_its_state(stage: int) -> None:
    def warm_up() -> tuple[Net, torch.optim.Optimizer]:
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)
        loss_of(model, 7).backward()
        optimizer.step()
        optimizer.zero_grad()
        return model, optimizer

    model, optimizer = warm_up()
    config = config_without("optimizer", stage)
    engine = zeroshard.initialize(model=model, optimizer=optimizer, config=config)[0]
    plain, plain_optimizer = warm_up()
    for number in range(2):
        engine.backward(loss_of(engine, number))
        engine.step()
        loss_of(plain, number).backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
    assert_equal_weights(weights_of(engine), weights_of(plain))


@on_ranks(2)
def test_an_optimizer_that_looks_at_whole_matrices_is_refused_where_they_are_cut() -> None:
    def start(stage: int, **more: Any) -> Any:
        model = Net()
        optimizer = torch.optim.Adafactor(model.parameters())
        config = {**config_of(stage), **more}
        return zeroshard.initialize(model=model, optimizer=optimizer, config=config)[0]

    with pytest.raises(UsageError, match=r"Adafactor keeps averages(.|\n)*hint: use \"stage\": 0"):
        start(1)
    train(start(0))


# The schedule -----------------------------------------------------------------------------------

SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "object": lambda optimizer: StepLR(optimizer, step_size=1, gamma=0.5),
    "callable": lambda optimizer: lambda given: LambdaLR(given, lambda step: 0.5**step),
    "partial": lambda optimizer: partial(StepLR, step_size=1, gamma=0.5),
}


@pytest.mark.parametrize("given", list(SCHEDULES))
@on_ranks(1)
def test_a_schedule_may_be_given_as(given: str) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, _, _, schedule = zeroshard.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=SCHEDULES[given](optimizer),
        config=config_without("optimizer") | {"gradient_accumulation_steps": 2},
    )
    assert schedule.optimizer is optimizer
    rates = []
    for number in range(4):
        engine.backward(loss_of(engine, number))
        engine.step()
        rates += engine.get_lr()
    assert rates == [1.0, 0.5, 0.5, 0.25]


@on_ranks(1)
def test_a_class_of_schedules_is_a_callable_that_makes_one() -> None:
    engine, _, _, schedule = zeroshard.initialize(
        model=Net(), lr_scheduler=ConstantLR, config=config_of()
    )
    assert isinstance(schedule, ConstantLR)
    assert engine.get_lr() == [LR / 3]
    train(engine, steps=1)


@on_ranks(1)
def test_a_schedule_of_torch_may_be_named_in_the_configuration() -> None:
    block = {"type": "StepLR", "params": {"step_size": 1, "gamma": 0.5}}
    engine = make(scheduler=block)
    assert isinstance(engine.lr_scheduler, StepLR)
    train(engine, steps=1)
    assert engine.get_lr() == [LR / 2]


@on_ranks(1)
def test_a_schedule_of_deepspeeds_sets_the_rate_of_each_step() -> None:
    params = {"warmup_min_lr": 0, "warmup_max_lr": 0.5, "warmup_num_steps": 2}
    engine = make(scheduler={"type": "WarmupLR", "params": params})
    rates = []
    for number in range(4):
        rates += engine.get_lr()
        engine.backward(loss_of(engine, number))
        engine.step()
    assert rates == [0, 0, 0.5, 0.5]


@on_ranks(1)
def test_a_schedule_that_is_passed_wins_over_the_one_in_the_configuration() -> None:
    config = config_of(scheduler={"type": "StepLR", "params": {"step_size": 1}})
    schedule = zeroshard.initialize(
        model=Net(), lr_scheduler=partial(ConstantLR, factor=0.5), config=config
    )[3]
    assert isinstance(schedule, ConstantLR)


@on_ranks(1)
def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ConfigError, match=r'scheduler\.type "Unheard"(.|\n)*hint: '):
        make(scheduler={"type": "Unheard", "params": {}})


@pytest.mark.parametrize(
    ("block", "text"),
    [
        ({"type": "StepLr"}, r'"StepLr" is not a schedule .* Did you mean "StepLR"'),
        ({"type": "Tensor"}, r'"Tensor" is not a schedule of torch\.optim\.lr_scheduler'),
        ({"type": "LRScheduler"}, r'"LRScheduler" is not a schedule'),
        ({"type": "LambdaLR"}, r"LambdaLR needs a function"),
        ({"type": "StepLR"}, r"scheduler\.params\.step_size is missing"),
        ({"type": "StepLR", "params": {"step_size": "3"}}, r"scheduler\.params\.step_size"),
    ],
)
@on_ranks(1)
def test_a_scheduler_block_that_cannot_be_honoured_is_refused(block: Config, text: str) -> None:
    with pytest.raises(ConfigError, match=text + r"(.|\n)*hint: "):
        make(scheduler=block)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"optimizer": "adam"}, "'adam' as an optimizer"),
        ({"lr_scheduler": 3}, "3 as a learning rate schedule"),
        ({"optimizer": lambda params: None}, "callable as an optimizer, which returned None"),
        ({"lr_scheduler": lambda optimizer: 3}, "callable as a .* schedule, which returned 3"),
    ],
)
@on_ranks(1)
def test_what_is_neither_an_object_nor_a_maker_is_refused(given: Config, text: str) -> None:
    with pytest.raises(UsageError, match=text + r"(.|\n)*hint: pass"):
        zeroshard.initialize(model=Net(), config=config_of(), **given)


@on_ranks(1)
def test_a_schedule_that_decides_by_a_figure_is_given_one_before_weights_move() -> None:
    block = {"type": "ReduceLROnPlateau", "params": {"patience": 0, "factor": 0.5}}
    engine = make(scheduler=block)
    before = weights_of(engine)
    engine.backward(loss_of(engine))
    with pytest.raises(UsageError, match=r'hint: call engine\.step\(lr_kwargs=\{"metrics": loss'):
        engine.step()
    assert_equal_weights(weights_of(engine), before)
    engine.step(lr_kwargs={"metrics": 1.0})
    engine.backward(loss_of(engine))
    engine.step(lr_kwargs={"metrics": 2.0})
    assert engine.get_lr() == [LR / 2]


@on_ranks(1)
def test_a_schedule_for_another_optimizer_is_refused() -> None:
    other = torch.optim.SGD(Net().parameters(), lr=1.0)
    schedule = StepLR(other, step_size=1)
    with pytest.raises(UsageError, match="belongs to another optimizer"):
        zeroshard.initialize(model=Net(), lr_scheduler=schedule, config=config_of())


@on_ranks(1)
def test_a_schedule_without_an_optimizer_is_refused() -> None:
    with pytest.raises(UsageError, match="schedule but no optimizer"):
        zeroshard.initialize(
            model=Net(),
            lr_scheduler=partial(StepLR, step_size=1),
            config=config_without("optimizer"),
        )


@on_ranks(1)
def test_a_schedule_of_the_configuration_is_not_used_without_an_optimizer() -> None:
    config = config_without("optimizer") | {"scheduler": {"type": "StepLR", "params": {}}}
    _, optimizer, _, schedule = zeroshard.initialize(model=Net(), config=config)
    assert optimizer is None
    assert schedule is None


@pytest.mark.parametrize(
    ("given", "fact"),
    [
        (5, "is no list but of type int"),
        ({"params": []}, "is no list but of type dict"),
        (torch.zeros(3), "is no list but of type Tensor"),
        ([{"lr": 1.0}], "holds {'lr': 1.0}, which is no parameter"),
        (["weight"], "holds 'weight', which is no parameter"),
    ],
    ids=["number", "group", "tensor", "group without parameters", "name"],
)
@on_ranks(1)
def test_what_is_no_list_of_parameters_is_refused(given: Any, fact: str) -> None:
    with pytest.raises(UsageError, match=re.escape(fact)):
        zeroshard.initialize(model=Net(), model_parameters=given, config=config_of())
