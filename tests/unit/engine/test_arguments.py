"""Facts for "auto": what arguments, models and param groups say, and how odd they may be."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import zeroshard
from unit.engine.small import Net, on_ranks
from zeroshard.config import Facts, Given
from zeroshard.engine.arguments import collect_facts
from zeroshard.errors import ConfigError


def model_with(config: object, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Linear(2, 2, dtype=dtype)
    model.config = config  # type: ignore[assignment]  # as Hugging Face's models have it
    return model


def given(facts: Facts) -> dict[str, object]:
    return {".".join(path): value.value for path, value in facts.given.items()}


def test_the_arguments_of_a_trainer_are_known_by_name() -> None:
    args = Namespace(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        learning_rate=3e-4,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-6,
        weight_decay=0.1,
        max_grad_norm=0.5,
        warmup_steps=10,
        max_steps=100,
        fp16=False,
        bf16=True,
    )
    facts = collect_facts(args, nn.Linear(2, 2))
    assert given(facts) == {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "optimizer.params.lr": 3e-4,
        "optimizer.params.betas": [0.9, 0.95],
        "optimizer.params.eps": 1e-6,
        "optimizer.params.weight_decay": 0.1,
        "gradient_clipping": 0.5,
        "scheduler.params.warmup_num_steps": 10,
        "scheduler.params.total_num_steps": 100,
        "fp16.enabled": False,
        "bf16.enabled": True,
    }
    assert facts.given["optimizer", "params", "lr"] == Given(3e-4, "args.learning_rate")
    assert facts.given["gradient_clipping",].source == "args.max_grad_norm"


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"warmup_steps": 0}, 0),
        ({"warmup_steps": 0, "warmup_ratio": 0.0}, 0),
        ({"warmup_steps": 0, "warmup_ratio": 0.03, "max_steps": 101}, 4),
        ({"warmup_steps": 0, "warmup_ratio": 0.03, "max_steps": -1}, None),
        ({"warmup_steps": 0.5, "max_steps": 10}, 5),
        ({"warmup_steps": 7, "warmup_ratio": 0.5, "max_steps": 10}, 7),
        ({"warmup_ratio": 0.5}, None),
        ({}, None),
    ],
)
def test_a_warm_up_is_a_number_or_a_part_of_all_steps(
    arguments: dict[str, Any], steps: int | None
) -> None:
    facts = collect_facts(Namespace(**arguments), nn.Linear(2, 2))
    assert given(facts).get("scheduler.params.warmup_num_steps") == steps


@pytest.mark.parametrize(
    ("config", "hidden"),
    [
        (SimpleNamespace(hidden_size=64), 64),
        (SimpleNamespace(hidden_sizes=[32, 128, 64]), 128),
        (SimpleNamespace(text_config=SimpleNamespace(hidden_size=48)), 48),
        (SimpleNamespace(text_config=SimpleNamespace(hidden_sizes=(8, 16))), 16),
        ({"hidden_size": 24}, 24),
        (SimpleNamespace(hidden_size=None, hidden_sizes=[]), None),
        (SimpleNamespace(hidden_size="64"), None),
        (SimpleNamespace(hidden_size=True, hidden_sizes=["x"]), None),
        (SimpleNamespace(hidden_size=float("nan"), hidden_sizes=3), None),
        (SimpleNamespace(hidden_size=0), None),
        (None, None),
        (3, None),
    ],
)
def test_the_hidden_size_is_where_hugging_face_states_it(config: object, hidden: object) -> None:
    assert collect_facts(None, model_with(config)).hidden_size == hidden


class Odd:
    """Everything about it raises."""

    def __getattr__(self, name: str) -> object:
        raise RuntimeError(name)


def test_odd_arguments_and_models_say_nothing() -> None:
    for args in (None, 3, "x", {}, {"learning_rate": "fast"}, Odd()):
        for config in (Odd(), SimpleNamespace(text_config=Odd()), lambda: None):
            facts = collect_facts(args, model_with(config), Odd())
            assert (facts.hidden_size, facts.given, facts.replaced) == (None, {}, frozenset())


@pytest.mark.parametrize(
    "value", [True, "0.1", None, [1], float("nan"), float("inf"), 10**400, torch.ones(())]
)
def test_arguments_of_other_types_do_not_count(value: object) -> None:
    names = ("learning_rate", "max_grad_norm", "max_steps", "warmup_steps", "adam_beta1")
    args = Namespace(**dict.fromkeys(names, value), fp16="yes", per_device_train_batch_size=0)
    assert collect_facts(args, nn.Linear(2, 2)).given == {}


def test_numbers_of_numpy_are_numbers() -> None:
    args = Namespace(per_device_train_batch_size=np.int64(2), learning_rate=np.float32(0.5))
    found = given(collect_facts(args, nn.Linear(2, 2)))
    assert found == {"train_micro_batch_size_per_gpu": 2, "optimizer.params.lr": 0.5}
    assert [type(value) for value in found.values()] in ([int, float], [float, int])


@pytest.mark.parametrize(
    ("dtypes", "dtype"),
    [
        ([torch.bfloat16, torch.bfloat16], "bf16"),
        ([torch.float16], "fp16"),
        ([torch.float32], "fp32"),
        ([torch.float32, torch.bfloat16], None),
        ([torch.float64], None),
        ([torch.bfloat16, torch.uint8], "bf16"),
        ([], None),
    ],
)
def test_the_dtype_is_that_of_all_floating_point_parameters(
    dtypes: list[torch.dtype], dtype: str | None
) -> None:
    values = [torch.zeros(1, dtype=kind) for kind in dtypes]
    model = nn.Module()
    for index, value in enumerate(values):
        needs_grad = value.is_floating_point()
        model.register_parameter(f"p{index}", nn.Parameter(value, requires_grad=needs_grad))
    assert collect_facts(None, model).dtype == dtype


def test_param_groups_count_where_they_agree_and_before_the_arguments() -> None:
    model = Net()
    params = list(model.parameters())
    groups = [
        {"params": params[:1], "lr": 0.5, "weight_decay": 0.0, "betas": (0.8, 0.9)},
        {"params": params[1:], "lr": 0.5, "weight_decay": 0.1, "betas": (0.8, 0.9)},
    ]
    facts = collect_facts(Namespace(learning_rate=0.1, weight_decay=0.3), model, groups)
    assert given(facts) == {
        "optimizer.params.lr": 0.5,
        "optimizer.params.betas": (0.8, 0.9),
        "optimizer.params.weight_decay": 0.3,
    }
    assert facts.given["optimizer", "params", "lr"].source == "model_parameters"


def test_an_optimizer_that_is_passed_speaks_for_itself() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    facts = collect_facts(None, model, optimizer=optimizer)
    assert given(facts)["optimizer.params.lr"] == 0.25
    assert facts.replaced == {"optimizer"}
    both = collect_facts(None, model, optimizer=torch.optim.SGD, lr_scheduler=lambda _: None)
    assert both.replaced == {"optimizer", "scheduler"}
    assert both.given == {}


def test_an_iterator_of_parameters_is_left_alone() -> None:
    model = Net()
    parameters = iter(model.parameters())
    collect_facts(None, model, parameters)
    assert len(list(parameters)) == len(list(model.parameters()))


AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
}


@on_ranks(2)
def test_initialize_resolves_auto_from_what_it_is_given() -> None:
    model = Net()
    model.config = SimpleNamespace(hidden_size=4)  # type: ignore[assignment]
    args = Namespace(
        per_device_train_batch_size=3, gradient_accumulation_steps=2, weight_decay=0.25
    )
    groups = [{"params": list(model.parameters()), "lr": 0.125}]
    engine, optimizer, *_ = zeroshard.initialize(
        args=args, model=model, model_parameters=groups, config=AUTO
    )
    assert optimizer is not None
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert optimizer.param_groups[0]["weight_decay"] == 0.25
    assert engine.train_batch_size() == 3 * 2 * 2


@on_ranks(1)
def test_initialize_names_what_nobody_gives() -> None:
    with pytest.raises(ConfigError) as caught:
        zeroshard.initialize(model=Net(), config={**AUTO, "train_batch_size": 2})
    text = str(caught.value)
    assert 'optimizer.params.lr is "auto", but nobody gives its value' in text
    assert 'optimizer.params.weight_decay is "auto"' in text


@on_ranks(1)
def test_initialize_needs_no_values_for_a_block_that_an_object_replaces() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    config = {**AUTO, "train_batch_size": 2}
    _, returned, *_ = zeroshard.initialize(model=model, optimizer=optimizer, config=config)
    assert returned.optimizer is optimizer
