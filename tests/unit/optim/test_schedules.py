"""Schedules by name: their rates step by step, resuming, and refusals.

The tables are worked out by hand from the formulas, with the number of steps made from 0 on.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zeroshard.errors import ConfigError, UsageError
from zeroshard.optim import VALID_LR_SCHEDULES, OneCycle, WarmupLR
from zeroshard.optim.schedules import make_schedule

Options = dict[str, Any]


def optimizer(*rates: float, cls: Any = torch.optim.AdamW) -> torch.optim.Optimizer:
    return cls([{"params": [nn.Parameter(torch.ones(1))], "lr": rate} for rate in rates or (1.0,)])


def rates(name: str, options: Options, steps: int, base: float = 1.0) -> list[float]:
    """The rate each of the first so many steps is made with."""
    inner = optimizer(base)
    schedule = make_schedule(name, inner, options)
    seen = []
    for _ in range(steps):
        seen.append(inner.param_groups[0]["lr"])
        assert schedule.get_last_lr() == seen[-1:]
        inner.step()
        schedule.step()
    return seen


WARMUP = {"warmup_min_lr": 1, "warmup_max_lr": 5, "warmup_num_steps": 4}
DECAY = {"total_num_steps": 8, "warmup_max_lr": 8, "warmup_num_steps": 4, "warmup_type": "linear"}
COSINE = {
    "total_num_steps": 6,
    "warmup_num_steps": 2,
    "warmup_min_ratio": 0.5,
    "cos_min_ratio": 0.1,
    "warmup_type": "linear",
}
CYCLE = {
    "cycle_min_lr": 1,
    "cycle_max_lr": 5,
    "cycle_first_step_size": 4,
    "cycle_second_step_size": 2,
}
RANGE = {
    "lr_range_test_min_lr": 2,
    "lr_range_test_step_size": 2,
    "lr_range_test_step_rate": 0.5,
}

TABLES: dict[str, tuple[str, Options, float, list[float]]] = {
    # ln(2) / ln(4) = 1/2 and ln(3) / ln(4) = 0.79248125.
    "log": ("WarmupLR", WARMUP, 9.0, [1, 1, 3, 4.169925001, 5, 5, 5]),
    "linear": ("WarmupLR", {**WARMUP, "warmup_type": "linear"}, 9.0, [1, 1, 2, 3, 4, 5, 5]),
    "to the group's rate": (
        "WarmupLR",
        {"warmup_max_lr": None, "warmup_num_steps": 2, "warmup_type": "linear"},
        6.0,
        [0, 0, 3, 6, 6],
    ),
    "to the group's rate by default": ("WarmupLR", {"warmup_num_steps": 2}, 6.0, [0, 0, 6, 6]),
    "no warm-up": ("WarmupLR", {**WARMUP, "warmup_num_steps": 0}, 9.0, [5, 5, 5]),
    "one step is two": (
        "WarmupLR",
        {**WARMUP, "warmup_num_steps": 1, "warmup_type": "linear"},
        9.0,
        [1, 1, 3, 5, 5],
    ),
    "decay": ("WarmupDecayLR", DECAY, 1.0, [0, 0, 2, 4, 6, 8, 6, 4, 2, 0, 0]),
    "decay to a rate": (
        "WarmupDecayLR",
        {**DECAY, "warmup_min_lr": 4},
        1.0,
        [4, 4, 5, 6, 7, 8, 7, 6, 5, 4, 4],
    ),
    "decay without warm-up": (
        "WarmupDecayLR",
        {"total_num_steps": 4, "warmup_max_lr": 4, "warmup_num_steps": 0},
        1.0,
        [4, 4, 3, 2, 1, 0, 0],
    ),
    "decay with its own full rate": (
        "WarmupDecayLR",
        {"total_num_steps": 4, "warmup_num_steps": 2, "warmup_type": "linear"},
        7.0,
        [0, 0, 0.0005, 0.001, 0.0005, 0],
    ),
    # (1 + cos(pi / 4)) / 2 = 0.8535533906, and 1/10 + 9/10 of it is 0.8681980515.
    "cosine": (
        "WarmupCosineLR",
        COSINE,
        2.0,
        [0, 1, 1.5, 1.736396103, 1.1, 0.463603897, 0.2, 0.2],
    ),
    "cosine after log": (
        "WarmupCosineLR",
        {"total_num_steps": 6, "warmup_num_steps": 4, "cos_min_ratio": 0},
        2.0,
        [0, 0, 1, 1.584962501, 2, 1, 0, 0],
    ),
    "cosine without warm-up": (
        "WarmupCosineLR",
        {"total_num_steps": 4, "warmup_num_steps": 0, "cos_min_ratio": 0},
        1.0,
        [1, 0.8535533906, 0.5, 0.1464466094, 0, 0],
    ),
    "cycle": ("OneCycle", CYCLE, 9.0, [1, 2, 3, 4, 5, 3, 1, 1, 1]),
    "cycle of equal halves": (
        "OneCycle",
        {"cycle_min_lr": 0, "cycle_max_lr": 2, "cycle_first_step_size": 2},
        9.0,
        [0, 1, 2, 1, 0, 0],
    ),
    "cycle, then decay": (
        "OneCycle",
        {**CYCLE, "decay_lr_rate": 1, "decay_step_size": 2},
        9.0,
        [1, 2, 3, 4, 5, 3, 1, 1 / 1.5, 1 / 2, 1 / 2.5],
    ),
    "cycle with stairs": (
        "OneCycle",
        {**CYCLE, "cycle_second_step_size": 4, "cycle_first_stair_count": 2},
        9.0,
        [1, 1, 3, 3, 5, 5, 3, 3, 1, 1],
    ),
    "cycle with stairs on the way up": (
        "OneCycle",
        {
            **CYCLE,
            "cycle_second_step_size": 4,
            "cycle_first_stair_count": 1,
            "cycle_second_stair_count": 0,
        },
        9.0,
        [1, 1, 1, 1, 5, 4, 3, 2, 1, 1],
    ),
    "range": ("LRRangeTest", RANGE, 9.0, [2, 2.5, 3, 3.5, 4, 4.5]),
    "range with stairs": (
        "LRRangeTest",
        {**RANGE, "lr_range_test_staircase": True},
        9.0,
        [2, 2, 3, 3, 4, 4],
    ),
}


@pytest.mark.parametrize("table", TABLES)
def test_rates_are_those_of_the_table(table: str) -> None:
    name, options, base, want = TABLES[table]
    assert rates(name, options, len(want), base) == pytest.approx(want, rel=1e-9, abs=1e-12)


def test_the_tables_cover_every_schedule() -> None:
    assert {name for name, *_ in TABLES.values()} == set(VALID_LR_SCHEDULES)


def test_a_rate_may_be_given_for_each_param_group() -> None:
    inner = optimizer(7, 8)
    schedule = make_schedule(
        "WarmupLR", inner, {"warmup_min_lr": [1, 2], "warmup_max_lr": [5, 4], "warmup_num_steps": 4}
    )
    assert schedule.get_last_lr() == [1, 2]
    for _ in range(2):
        inner.step()
        schedule.step()
    assert schedule.get_last_lr() == pytest.approx([3, 3])


def test_each_group_warms_up_to_its_own_rate_where_none_is_given() -> None:
    inner = optimizer(7, 8)
    make_schedule("WarmupLR", inner, {"warmup_num_steps": 0})
    assert [group["lr"] for group in inner.param_groups] == [7, 8]


# Momentum ---------------------------------------------------------------------------------------


def momenta(options: Options, steps: int) -> list[tuple[float, ...]]:
    inner = optimizer()
    inner.param_groups[0]["betas"] = (0.5, 0.75)
    schedule = make_schedule("OneCycle", inner, {**CYCLE, **options})
    seen = [inner.param_groups[0]["betas"]]
    for _ in range(steps - 1):
        inner.step()
        schedule.step()
        seen.append(inner.param_groups[0]["betas"])
    return seen


def test_momentum_moves_against_the_rate_and_beta2_stays() -> None:
    want = [0.9, 0.875, 0.85, 0.825, 0.8, 0.85, 0.9, 0.9]
    assert momenta({}, 8) == [(pytest.approx(beta1), 0.75) for beta1 in want]


def test_momentum_changes_after_the_cycle_where_that_is_asked_for() -> None:
    found = momenta({"decay_mom_rate": 0.1, "decay_step_size": 2}, 9)
    assert [beta1 for beta1, _ in found[6:]] == pytest.approx([0.9, 0.945, 0.99])


def test_a_momentum_of_one_is_refused_when_it_is_reached() -> None:
    with pytest.raises(ConfigError, match=r"momentum to 1\.035 after 9 steps(.|\n)*decay_mom_rate"):
        momenta({"decay_mom_rate": 0.1, "decay_step_size": 2}, 10)


def test_momentum_stays_where_it_is_told_to() -> None:
    assert momenta({"cycle_momentum": False}, 3) == [(0.5, 0.75)] * 3


def test_an_optimizer_without_betas_keeps_its_momentum_and_that_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    inner = torch.optim.SGD([nn.Parameter(torch.ones(1))], momentum=0.25)
    with caplog.at_level(logging.WARNING):
        schedule = make_schedule("OneCycle", inner, CYCLE)
    assert inner.param_groups[0]["momentum"] == 0.25
    assert isinstance(schedule, OneCycle)
    assert schedule.get_mom() is None
    assert "SGD has no betas" in caplog.text


# Resuming ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("saved_after", [0, 3, 6])
def test_a_schedule_goes_on_exactly_where_it_was_saved(table: str, saved_after: int) -> None:
    name, options, base, _ = TABLES[table]

    def groups(inner: torch.optim.Optimizer) -> Options:
        return {key: inner.param_groups[0][key] for key in ("lr", "betas")}

    def go(inner: torch.optim.Optimizer, schedule: Any, steps: int) -> list[Options]:
        seen = []
        for _ in range(steps):
            seen.append(groups(inner))
            inner.step()
            schedule.step()
        return seen

    first = optimizer(base)
    before = make_schedule(name, first, options)
    go(first, before, saved_after)
    saved = json.loads(json.dumps(before.state_dict()))
    second = optimizer(base)
    after = make_schedule(name, second, options)
    after.load_state_dict(saved)
    assert after.get_last_lr() == before.get_last_lr()
    assert go(second, after, 4) == go(first, before, 4)


def test_the_state_is_the_number_of_the_last_step() -> None:
    inner = optimizer()
    schedule = make_schedule("WarmupLR", inner, WARMUP)
    assert schedule.state_dict() == {"last_batch_iteration": -1}
    inner.step()
    schedule.step()
    assert schedule.state_dict() == {"last_batch_iteration": 0}


def test_a_rate_held_in_a_tensor_is_written_there() -> None:
    rate = torch.tensor(2.0)
    inner = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=rate)
    schedule = make_schedule("LRRangeTest", inner, RANGE)
    schedule.load_state_dict({"last_batch_iteration": 3})
    held = inner.param_groups[0]["lr"]
    assert isinstance(held, Tensor)
    assert held.item() == 4


def test_the_state_of_another_schedule_is_refused() -> None:
    schedule = make_schedule("WarmupLR", optimizer(), WARMUP)
    with pytest.raises(UsageError, match="no last_batch_iteration"):
        schedule.load_state_dict({"last_epoch": 3})


# Names and options ------------------------------------------------------------------------------


def test_a_schedule_of_torch_is_made_by_its_name() -> None:
    schedule = make_schedule("MultiStepLR", optimizer(), {"milestones": [2, 3], "gamma": 0.5})
    assert type(schedule) is torch.optim.lr_scheduler.MultiStepLR


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("warmuplr", {}, r'"warmuplr" is not a schedule .* Did you mean "WarmupLR"'),
        ("Stepping", {}, "is not a schedule of torch"),
        ("WarmupDecayLR", {}, r"scheduler\.params\.total_num_steps is missing"),
        ("StepLR", {}, r"scheduler\.params\.step_size is missing"),
        ("StepLR", {"step_size": "3"}, r"scheduler\.params\.step_size must be a whole number"),
        ("OneCycleLR", {"max_lr": "1e-3"}, r"scheduler\.params\.max_lr must be a number"),
        ("WarmupLR", {"warmup_steps": 3}, r'take warmup_steps. Did you mean "warmup_num_steps"'),
        ("WarmupLR", {"last_epoch": 3}, "does not take last_epoch"),
        ("WarmupLR", {"warmup_num_steps": -1}, r"scheduler\.params\.warmup_num_steps must be"),
        ("WarmupLR", {"warmup_num_steps": 2.5}, r"scheduler\.params\.warmup_num_steps must be"),
        ("WarmupLR", {"warmup_num_steps": None}, r"scheduler\.params\.warmup_num_steps must be"),
        ("WarmupLR", {"warmup_type": "cubic"}, r'\.warmup_type must be "log" or "linear"'),
        ("WarmupLR", {"warmup_max_lr": -1}, r"scheduler\.params\.warmup_max_lr must be"),
        ("WarmupLR", {"warmup_max_lr": float("nan")}, r"scheduler\.params\.warmup_max_lr must"),
        ("WarmupLR", {"warmup_max_lr": True}, r"scheduler\.params\.warmup_max_lr must be"),
        ("WarmupLR", {"warmup_min_lr": [1, 2]}, "one number or 1, one for each param group"),
        ("WarmupDecayLR", {"total_num_steps": 0}, r"\.total_num_steps must be"),
        ("WarmupCosineLR", {"total_num_steps": 2, "cos_min_ratio": -1}, r"\.cos_min_ratio must"),
        ("OneCycle", {**CYCLE, "cycle_first_step_size": 0}, r"\.cycle_first_step_size must be"),
        ("OneCycle", {**CYCLE, "cycle_momentum": 1}, r"\.cycle_momentum must be true or false"),
        ("OneCycle", {"cycle_min_lr": 1}, r"\.cycle_max_lr is missing"),
        ("LRRangeTest", {"lr_range_test_staircase": "yes"}, r"\.lr_range_test_staircase must be"),
        ("SequentialLR", {}, "SequentialLR needs other schedules"),
        ("ChainedScheduler", {}, "ChainedScheduler needs other schedules"),
        ("LambdaLR", {}, "LambdaLR needs a function"),
        ("CyclicLR", {"base_lr": 1, "max_lr": 2}, "do not fit CyclicLR"),
        ("CyclicLR", {"base_lr": 1, "max_lr": 2, "step_size_up": 0}, r"\.step_size_up must be"),
        ("StepLR", {"step_size": 0}, r"\.step_size must be a whole number"),
        ("StepLR", {"step_size": None}, r"\.step_size must be a whole number"),
        ("StepLR", {"step_size": 1, "gamma": None}, r"\.gamma must be a number"),
        ("CosineAnnealingLR", {"T_max": 0}, r"\.T_max must be a whole number"),
        ("ExponentialLR", {"gamma": "a"}, r"\.gamma must be a number"),
        ("OneCycleLR", {"max_lr": 1, "total_steps": 9, "div_factor": 0}, "do not fit OneCycleLR"),
        ("WarmupLR", {"last_batch_iteration": 5}, r"\.last_batch_iteration must be -1"),
    ],
)
def test_what_cannot_be_honoured_is_refused(name: str, options: Options, text: str) -> None:
    inner = optimizer(cls=torch.optim.Rprop)
    with pytest.raises(ConfigError, match=text + r"(.|\n)*hint: "):
        make_schedule(name, inner, options)


def test_where_deepspeeds_schedules_start_may_be_said() -> None:
    schedule = make_schedule("WarmupLR", optimizer(), {"last_batch_iteration": -1})
    assert schedule.state_dict() == {"last_batch_iteration": -1}


def test_torchs_schedules_keep_options_that_are_lists_or_left_open() -> None:
    make_schedule("ReduceLROnPlateau", optimizer(), {"min_lr": [0.1], "patience": 0})
    cycle = {"max_lr": [1], "total_steps": None, "epochs": 2, "steps_per_epoch": 3}
    make_schedule("OneCycleLR", optimizer(), {**cycle, "cycle_momentum": False})


def test_a_count_may_be_written_as_a_float() -> None:
    assert rates("WarmupLR", {**WARMUP, "warmup_num_steps": 4.0}, 3) == pytest.approx([1, 1, 3])


def test_a_warm_up_longer_than_the_training_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        make_schedule("WarmupDecayLR", optimizer(), {"total_num_steps": 3, "warmup_num_steps": 4})
    assert "after total_num_steps, 3, before its warm-up does, after 4" in caplog.text


def test_a_schedule_is_one_of_torchs_for_those_who_ask() -> None:
    schedule = WarmupLR(optimizer(), **WARMUP)
    assert isinstance(schedule, torch.optim.lr_scheduler.LRScheduler)
