"""What a configuration makes leave the device, by the sizes of a model's units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from unit.engine.small import Net
from zeroshard.config import load
from zeroshard.core.lifetime import STAGES
from zeroshard.core.unit import Member, Precision
from zeroshard.core.wrap import Group, Kind, choose_groups
from zeroshard.engine.placement import (
    Placed,
    Size,
    Sizes,
    Wishes,
    averages,
    describe,
    file_bytes,
    host_bytes,
    plan,
    update_bytes,
    wishes,
)
from zeroshard.errors import ConfigError

GIB = 2**30
ADAM = 8.0


def groups_of(*sizes: Sequence[int], **kind: Any) -> list[Group]:
    """Groups of parameters with so many elements."""
    return [
        Group(
            Kind(trained=True, **kind),
            [Member(f"{at}.{n}", nn.Parameter(torch.empty(size))) for n, size in enumerate(run)],
        )
        for at, run in enumerate(sizes)
    ]


def sizes(stage: int = 3, ranks: int = 2) -> Sizes:
    return Sizes(STAGES[stage], Precision(), ranks, averages={})


def moved(placed: Sequence[Placed]) -> list[tuple[int, str, str]]:
    return [(len(each.group.members), each.state, each.shard) for each in placed]


def test_wishes_are_those_of_the_configuration() -> None:
    zero: dict[str, object] = {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "ratio": 0.25, "buffer_count": 6},
        "offload_param": {"device": "nvme", "nvme_path": "/fast", "max_in_cpu": 1e6},
    }
    config = load({"zero_optimization": zero})
    wished = Wishes("cpu", "nvme", ratio=0.25, most_shards=10**6, num_buffers=6)
    assert wishes(config, trains=True) == wished
    assert wishes(config, trains=False).state == "none"
    assert wishes(load({}), trains=True) == Wishes()


def test_a_gradient_with_one_addend_is_counted_in_the_dtype_that_it_keeps() -> None:
    (group,) = groups_of([64], compute=torch.bfloat16)
    for stage, wanted in ((3, 2), (2, 2), (1, 4)):  # at stage 1 it stays in full, to be summed in
        near = sizes(stage, ranks=1)
        alone = replace(near, has_one_addend=True)
        assert near.of(group).gradients == 4 * 64
        assert alone.of(group).gradients == wanted * 64


def test_a_budget_alone_moves_state_to_the_host() -> None:
    assert wishes(load({"zeroshard": {"gpu_budget": 1.5}}), trains=True) == Wishes(
        "cpu", budget=3 * GIB // 2, num_buffers=4
    )
    assert wishes(load({"zeroshard": {"gpu_budget": "auto"}}), trains=True).budget == "auto"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_unit_takes_what_its_lifetime_says(stage: int) -> None:
    (group,) = groups_of([1024, 1024], compute=torch.bfloat16)
    ranks = 2 if stage else 1
    size = sizes(stage, ranks).of(group)
    full, shard = 2048, 2048 // ranks
    assert size.numel == shard
    assert size.parameters == 2 * (shard if stage == 3 else full)
    assert size.gradients == 4 * (full if stage < 2 else shard)
    assert size.can_free == (stage == 3)
    assert not size.is_master
    # Master weights and two averages, each with what may be padded.
    assert size.near == size.far
    assert 12 * shard <= sum(size.far) <= 12 * (shard + 8)


def test_master_weights_cost_nothing_beside_a_shard_of_their_dtype_that_stays() -> None:
    (group,) = groups_of([1024])
    size = sizes().of(group)
    assert size.is_master
    assert sum(size.far) - sum(size.near) == 4 * (512 + 4)


def test_frozen_parameters_have_no_state_and_bytes_are_counted_as_they_are() -> None:
    (group,) = groups_of([1024])
    group.kind = Kind(trained=False, as_bytes=True)
    size = sizes().of(group)
    assert (size.parameters, size.gradients, size.near, size.far) == (2048, 0, (), ())


def test_averages_are_those_of_each_param_group() -> None:
    model = Net()
    head = list(model.head.parameters())
    blocks = list(model.blocks.parameters())
    optimizer = torch.optim.AdamW([{"params": blocks}, {"params": head, "amsgrad": True}])
    found = averages(optimizer)
    assert {found[param] for param in blocks} == {8.0}
    assert {found[param] for param in head} == {12.0}
    assert averages(None) == {}


def test_without_a_wish_nothing_leaves() -> None:
    placed = plan(groups_of([8], [8, 8]), sizes().of, Wishes())
    assert moved(placed) == [(1, "none", "none"), (2, "none", "none")]


def test_a_ratio_cuts_the_group_in_which_it_falls() -> None:
    groups = groups_of([512] * 4, [512] * 4)
    placed = plan(groups, sizes().of, Wishes("cpu", ratio=0.25))
    assert moved(placed) == [(4, "none", "none"), (2, "none", "none"), (2, "cpu", "none")]
    names = [member.name for each in placed for member in each.group.members]
    assert names == [member.name for group in groups for member in group.members]
    assert moved(plan(groups, sizes().of, Wishes("nvme"))) == [(4, "nvme", "none")] * 2
    assert moved(plan(groups, sizes().of, Wishes("cpu", ratio=0.0))) == [(4, "none", "none")] * 2


def test_both_parts_of_a_cut_group_are_gathered_where_it_was() -> None:
    model = Net()
    kind = Kind(trained=True)
    groups = choose_groups(model, kind_of=lambda param: kind)
    placed = plan(groups, sizes().of, Wishes("cpu", ratio=0.7))
    assert len(placed) == len(groups) + 1
    sites = [each.group.sites for each in placed]
    assert sites == [[model.blocks[0]], [model.blocks[0]], [model.blocks[1]], [model.head]]


def test_shards_leave_where_they_are_freed_after_use() -> None:
    groups = groups_of([512], [512], compute=torch.bfloat16)
    groups[1].kind = Kind(trained=True, compute=torch.bfloat16, persistent=True)
    placed = plan(groups, sizes().of, Wishes("cpu", "cpu"))
    assert moved(placed) == [(1, "cpu", "cpu"), (1, "cpu", "none")]
    below = plan(groups_of([512], compute=torch.bfloat16), sizes(2).of, Wishes("cpu", "cpu"))
    assert moved(below) == [(1, "cpu", "none")]


def test_a_shard_that_is_stepped_itself_stays_with_its_state() -> None:
    groups = groups_of([512], [512])
    assert moved(plan(groups, sizes().of, Wishes("none", "cpu"))) == [(1, "none", "none")] * 2
    placed = plan(groups, sizes().of, Wishes("cpu", "cpu", ratio=0.5))
    assert moved(placed) == [(1, "none", "none"), (1, "cpu", "cpu")]


def test_the_first_shards_stay_in_host_memory_up_to_a_number_of_elements() -> None:
    groups = groups_of([512], [2048], [512], compute=torch.bfloat16)
    placed = plan(groups, sizes().of, Wishes("nvme", "nvme", most_shards=520))
    assert moved(placed) == [(1, "nvme", "cpu"), (1, "nvme", "nvme"), (1, "nvme", "cpu")]
    assert host_bytes(placed) == 2 * 2 * 256
    state, shards = file_bytes(placed)
    assert shards == 2 * 1024
    assert 12 * 1536 <= state <= 12 * (1536 + 3 * 8)


def test_a_step_on_the_host_takes_room_for_gradients_in_the_dtype_they_are_summed_in() -> None:
    groups = groups_of([512], [2048], compute=torch.bfloat16)
    placed = plan(groups, sizes().of, Wishes("cpu", ratio=0.8))
    assert moved(placed) == [(1, "none", "none"), (1, "cpu", "none")]
    narrow = Precision(torch.bfloat16, reduce=torch.bfloat16)
    assert update_bytes(placed, narrow, sums=False) == 2 * 1024
    assert update_bytes(placed, narrow, sums=True) == 4 * 1024


def test_an_automatic_budget_begins_with_nothing_that_could_leave() -> None:
    groups = groups_of([512], compute=torch.bfloat16)
    placed = plan(groups, sizes().of, Wishes("cpu", "cpu", budget="auto", ratio=0.5))
    assert moved(placed) == [(1, "cpu", "cpu")]


def on_device(placed: Sequence[Placed]) -> int:
    return sum(
        (sum(each.size.near) if each.state == "none" else 0)
        + (each.size.parameters if each.shard == "none" else 0)
        + each.size.gradients
        for each in placed
    )


def test_a_budget_is_kept_and_used() -> None:
    groups = groups_of(*([4096] * 4,) * 3, compute=torch.bfloat16)
    size_of = sizes().of
    everything = sum(
        size.parameters + size.gradients + sum(size.near) for size in map(size_of, groups)
    )
    buffers = 10_000

    def buffers_of(found: Sequence[Size]) -> int:
        assert len(found) == len(groups)
        return buffers

    def placed_within(budget: int) -> list[Placed]:
        return plan(groups, size_of, Wishes("cpu", "cpu", budget=budget), buffers_of)

    assert moved(placed_within(everything)) == [(4, "none", "none")] * 3
    before = everything
    for budget in range(everything - 1, buffers + 12 * 4096 * 4 // 2, -20_000):
        placed = placed_within(budget)
        left = on_device(placed) + buffers
        assert left <= budget
        assert left <= before + buffers
        before = left
        is_state_gone = all(each.state == "cpu" for each in placed)
        assert is_state_gone or all(each.shard == "none" for each in placed)
        if not is_state_gone:
            assert budget - left < 12 * (4096 // 2 + 8)
    assert any(each.shard == "cpu" for each in placed)
    with pytest.raises(ConfigError, match=r"zeroshard\.gpu_budget is .* gradients .* buffers"):
        placed_within(1000)


def test_the_log_says_what_went_where() -> None:
    groups = groups_of([2**20] * 4, [2**20] * 4, compute=torch.bfloat16)
    placed = plan(groups, Sizes(STAGES[3], Precision(), 2, {}).of, Wishes("cpu", ratio=0.5))
    said = describe(placed, pins_state=True, pins_shards=True)
    assert said == (
        "master weights and optimizer state: 24.0 MiB on the device, "
        "24.0 MiB in page-locked host memory"
    )
    placed = plan(groups, Sizes(STAGES[3], Precision(), 2, {}).of, Wishes("nvme", "cpu"))
    assert describe(placed, pins_state=True, pins_shards=False) == (
        "master weights and optimizer state: all 48.0 MiB in files; "
        "shards of parameters: all 8.0 MiB in host memory"
    )
