"""The ZeRO formulas, and what tells the stages apart."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeroshard.core.lifetime import STAGES, StateBytes, lifetime, state_bytes

SIZES = {"numel": st.integers(0, 10**12), "world": st.integers(1, 4096)}

# Psi parameters over N ranks, in the three terms of the paper's table: parameters, gradients,
# optimizer; each either whole or divided by N.
WHOLE = {0: (1, 1, 1), 1: (1, 1, 0), 2: (1, 0, 0), 3: (0, 0, 0)}


@pytest.mark.parametrize("stage", STAGES)
@given(**SIZES)
def test_a_stage_divides_its_share_of_the_state_by_the_number_of_ranks(
    stage: int, numel: int, world: int
) -> None:
    got = state_bytes(stage, numel, world, 2, 2, 12)
    cuts = [1 if whole else world for whole in WHOLE[stage]]
    want = [numel * size / cut for size, cut in zip((2, 2, 12), cuts, strict=True)]
    assert [got.parameters, got.gradients, got.optimizer] == want
    assert got.total == want[0] + want[1] + want[2]


@pytest.mark.parametrize(("stage", "billions_of_bytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_example_of_the_paper_comes_out(stage: int, billions_of_bytes: float) -> None:
    """7.5 billion parameters over 64 ranks, fp16 with Adam: figure 1 of the paper."""
    total = state_bytes(stage, 7_500_000_000, 64, 2, 2, 12).total
    assert total / 1e9 == pytest.approx(billions_of_bytes, abs=0.05)


@given(**SIZES)
def test_a_higher_stage_never_needs_more(numel: int, world: int) -> None:
    totals = [state_bytes(stage, numel, world).total for stage in sorted(STAGES)]
    assert totals == sorted(totals, reverse=True)


@given(SIZES["numel"])
def test_on_one_rank_all_stages_need_the_same(numel: int) -> None:
    assert len({state_bytes(stage, numel, 1) for stage in STAGES}) == 1


def test_the_default_is_fp32_with_the_two_moments_of_adam() -> None:
    assert state_bytes(0, 10, 4) == StateBytes(40, 40, 80)


def test_an_unknown_stage_has_no_formula() -> None:
    with pytest.raises(KeyError):
        state_bytes(4, 1, 1)


def test_stages_differ_in_exactly_one_choice_from_their_neighbours() -> None:
    rows = [
        (life.sharded, not life.grads_stay, not life.params_stay)
        for _, life in sorted(STAGES.items())
    ]
    assert rows == [
        (False, False, False),
        (True, False, False),
        (True, True, False),
        (True, True, True),
    ]


def test_one_rank_frees_and_reduces_early_only_for_what_leaves_the_device() -> None:
    assert [lifetime(number, 1) for number in STAGES] == [STAGES[0]] * 4
    assert lifetime(3, 1, ["parameters"]) == lifetime(3, 1, ["parameters", "state"]) == STAGES[3]
    for number, row in STAGES.items():
        with_state = lifetime(number, 1, ["state"])
        assert with_state.params_stay
        assert with_state.grads_stay == row.grads_stay
        for offloads in ([], ["parameters"], ["state"]):
            assert lifetime(number, 2, offloads) == row  # type: ignore[arg-type]
