"""Every awkward model trains as plain PyTorch does, at every stage, on one to four ranks."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest

from reference import LOOSE_CLIP, TIGHT_CLIP, Setting, compare, differences, pairwise
from zoo import ZOO, Case

STAGES = (0, 1, 2, 3)
WORLDS = (1, 2, 3, 4)

# One with everything shared and frozen at once would hide which part fails; these three differ in
# what they ask of the core: nothing special, another order on each rank, parts that do not learn.
REPRESENTATIVE = ("block_called_twice_apart", "depth_varies_by_rank", "frozen_weight_in_each_block")

# Many ranks on two cores are slow, and hardly differ from few: every second model meets three, and
# every sixth four.
PAIRS = [
    pytest.param(case, world, id=f"{case.name}-{world}")
    for number, case in enumerate(ZOO.values())
    for world in WORLDS
    if number % {1: 1, 2: 1, 3: 2, 4: 6}[world] == 0 or case.name in REPRESENTATIVE
]


def selection(case: Case) -> dict[int, list[Setting]]:
    """By world, settings in which every two values of different factors meet at least once.

    Four ranks meet stage 3 and one other stage, which varies with the case. Only two ranks take a
    third step.
    """
    factors: dict[str, Sequence[Any]] = {
        "stage": STAGES,
        "world": WORLDS[:3],
        "accumulation": (1, 2, 3),
        "clip": (0.0, TIGHT_CLIP, LOOSE_CLIP),
        "checkpointing": case.checkpointing,
        "optimizer": ("adamw", "sgd"),
        "optimizer_from": ("config", "caller"),
        "units": ("named", "chosen"),
        "backward": ("engine", "loss"),
        "lookahead_bytes": (None, 0, 1 << 20),
    }
    by_world: dict[int, list[Setting]] = defaultdict(list)
    for row in pairwise(factors):
        by_world[row["world"]].append(Setting(**row, steps=3 if row["world"] == 2 else 2))
    number = list(ZOO).index(case.name)
    for turn, stage in enumerate((3, STAGES[number % 3])):
        chosen = {name: values[(number + turn) % len(values)] for name, values in factors.items()}
        by_world[4].append(Setting(**{**chosen, "stage": stage, "world": 4}, steps=2))
    return by_world


def failures(case: Case, settings: list[Setting]) -> list[str]:
    return [text for comparison in compare(case, settings) for text in comparison.differences]


@pytest.mark.parametrize(("case", "world"), PAIRS)
def test_awkward_models_train_as_in_plain_pytorch(case: Case, world: int) -> None:
    assert failures(case, selection(case)[world]) == []


@pytest.mark.parametrize(("stage", "world"), list(itertools.product(STAGES, WORLDS[:3])))
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_every_combination_trains_as_in_plain_pytorch(name: str, stage: int, world: int) -> None:
    case = ZOO[name]
    settings = [
        Setting(stage, world, accumulation, clip, checkpointing, steps=2)
        for accumulation, clip, checkpointing in itertools.product(
            (1, 3), (0.0, TIGHT_CLIP), case.checkpointing
        )
    ]
    assert failures(case, settings) == []


@pytest.mark.parametrize("world", [1, 3])
def test_adamw_with_its_own_epsilon_trains_as_in_plain_pytorch(world: int) -> None:
    settings = [Setting(stage, world, optimizer="adamw_default") for stage in STAGES]
    assert failures(ZOO["plain"], settings) == []


@pytest.mark.parametrize("name", ["plain", "mixture_of_experts", "order_varies_by_step"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_stages_that_shard_agree_to_the_last_bit(name: str, world: int) -> None:
    """They do the same additions, as long as the ranks run the same blocks in the same order.

    Otherwise a gradient may be reduced in two parts.
    """
    case = ZOO[name]
    settings = [
        Setting(stage, world, clip=clip, checkpointing=checkpointing)
        for clip, checkpointing in itertools.product((0.0, TIGHT_CLIP), case.checkpointing)
        for stage in (1, 2, 3)
    ]
    records = [comparison.record for comparison in compare(case, settings, keep_records=True)]
    for first, *others in zip(records[::3], records[1::3], records[2::3], strict=True):
        for other in others:
            assert differences(other, first, tolerance=0) == []
