from __future__ import annotations

import pytest
from torch import nn

from unit.engine.small import Net, make, on_ranks
from zeroshard import zero

P, L = 1_000_000, 100_000


@pytest.mark.parametrize(
    ("gpus", "nodes", "offload", "host", "gpu"),
    [
        (1, 1, True, 24_000_000, 4_000_000),  # 16 P 1.5
        (8, 1, True, 48_000_000, 4_000_000),  # 32 P 1.5
        (8, 2, True, 96_000_000, 4_000_000),  # 64 P 1.5
        (8, 2, False, 48_000_000, 5_000_000),  # 4 P 8 1.5; 4 P + 16 P / 16
        (1, 1, False, 6_000_000, 20_000_000),
    ],
)
def test_bytes_where_optimizer_state_is_sharded(
    gpus: int, nodes: int, offload: bool, host: int, gpu: int
) -> None:
    assert zero.estimate_zero1_model_states_mem_needs(P, gpus, nodes, offload) == (host, gpu)
    shift = 2 * P if offload else 2 * P - 2 * P // (gpus * nodes)
    assert zero.estimate_zero2_model_states_mem_needs(P, gpus, nodes, offload) == (
        host,
        gpu - shift,
    )


@pytest.mark.parametrize(
    ("offload", "zero_init", "host", "gpu"),
    [
        ((True, True), True, 13_500_000, 400_000),  # 18 P / 2 1.5; 4 L
        ((True, True), False, 48_000_000, 400_000),  # 32 P 1.5
        ((True, False), True, 12_000_000, 525_000),  # 16 P / 2 1.5; 4 L + 2 P / 16
        ((True, False), False, 48_000_000, 525_000),
        ((False, False), True, 4_800_000, 1_525_000),  # 4 L 8 1.5; 4 L + 18 P / 16
        ((False, False), False, 48_000_000, 1_525_000),
    ],
)
def test_bytes_where_parameters_are_sharded_too(
    offload: tuple[bool, bool], zero_init: bool, host: int, gpu: int
) -> None:
    got = zero.estimate_zero3_model_states_mem_needs(P, L, 8, 2, *offload, zero_init)
    assert got == (host, gpu, 400_000)
    doubled = zero.estimate_zero3_model_states_mem_needs(P, L, 8, 2, *offload, zero_init, 3.0)
    assert doubled[0] == 2 * host


def test_a_table_is_printed_with_a_line_for_each_choice(
    capsys: pytest.CaptureFixture[str],
) -> None:
    zero.estimate_zero3_model_states_mem_needs_all_cold(2**30, 2**25, 8, 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:4] == [
        "of a model with 1074M parameters, 34M in the largest layer,",
        "on 1 node with 8 GPUs each:",
        "   per host |    per GPU | options",
    ]
    assert lines[4] == (
        "   27.00GiB |    0.12GiB | offload_param=cpu , offload_optimizer=cpu , zero_init=1"
    )
    assert len(lines) == 10
    for print_table in (
        zero.estimate_zero1_model_states_mem_needs_all_cold,
        zero.estimate_zero2_model_states_mem_needs_all_cold,
    ):
        print_table(2**30)
        assert len(capsys.readouterr().out.splitlines()) == 6


def test_the_sizes_of_a_model_are_counted_with_tied_parameters_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = nn.Sequential(nn.Linear(1000, 1000, bias=False), nn.Linear(1000, 1000, bias=False))
    model[1].weight = model[0].weight
    zero.estimate_zero2_model_states_mem_needs_all_live(model)
    assert "with 1M parameters" in capsys.readouterr().out


@on_ranks(2)
def test_freed_parameters_count_with_their_sizes() -> None:
    from zeroshard.zero.estimators import _sizes

    assert _sizes(make(3).module) == _sizes(Net()) == (6 * 4 * 4 + 2 * 10 + 15, 30)
