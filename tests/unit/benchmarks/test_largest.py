"""The search for the largest model: what it tries, when it stops, and what it says of the bound."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

import largest
from largest import SHAPE, Outcome
from side_by_side.workload import SHAPES, Variant

GIB = 2**30


def outcome(layers: int, limit: int, took_s: float = 1.0) -> Outcome:
    """As if so many layers fitted and no more."""
    parameters = replace(SHAPE, layers=layers).parameters
    if layers > limit:
        return Outcome(layers, parameters, f"does not fit: {layers}", took_s=took_s)
    figures = {
        **dict.fromkeys(("allocated_gib", "reserved_gib", "host_gib", "build_s"), 1.0),
        "seconds": [9.0, 2.0, 3.0],
        "off_device": None,
    }
    return Outcome(layers, parameters, figures=figures, took_s=took_s)


def tried(limit: int, first: int, **more: int) -> list[Outcome]:
    settings = {"step": 6, "resolution": 1, "most": None, **more}
    return largest.search(
        lambda layers: outcome(layers, limit), first, time_left_s=lambda: 1e9, **settings
    )


def best(found: Sequence[Outcome]) -> int:
    return max((each.layers for each in found if each.trains), default=0)


@given(st.integers(0, 90), st.integers(1, 90), st.integers(1, 12))
def test_the_search_ends_at_the_largest_size_that_trains(limit: int, first: int, step: int) -> None:
    found = tried(limit, first, step=step)
    assert best(found) == limit
    assert len({each.layers for each in found}) == len(found), "no size is tried twice"
    assert min(each.layers for each in found if not each.trains) == limit + 1


def test_a_good_guess_takes_few_trials_and_a_coarse_answer_fewer() -> None:
    assert len(tried(50, 50)) <= 5
    coarse = tried(50, 48, resolution=3)
    assert len(coarse) <= 3 and 50 - best(coarse) < 3


def test_no_more_layers_are_tried_than_are_allowed() -> None:
    found = tried(50, 70, most=40)
    assert [each.layers for each in found] == [40]


def test_no_trial_starts_that_may_not_end_in_time() -> None:
    left = iter([25.0, 15.0, 5.0])
    found = largest.search(
        lambda layers: outcome(layers, 50, took_s=10.0),
        48,
        step=6,
        resolution=1,
        most=None,
        time_left_s=lambda: next(left),
    )
    assert [each.layers for each in found] == [48, 54, 51]


def test_the_first_guess_divides_the_memory_by_what_a_parameter_takes() -> None:
    near = Variant.parse("zeroshard-2")
    far = Variant.parse("zeroshard-3:offload=all")
    layers = [largest.guess(SHAPE, each, 140 * GIB, 128 * GIB, 1) for each in (near, far)]
    sizes = [replace(SHAPE, layers=count).parameters / 1e9 for count in layers]
    assert sizes == [pytest.approx(8.0, abs=0.3), pytest.approx(16.9, abs=0.3)]
    assert largest.guess(SHAPE, near, 140 * GIB, 0, 2) > 1.9 * layers[0]
    assert largest.guess(SHAPE, near, GIB, 0, 1) == 1


def test_model_state_may_take_what_activations_leave_of_the_device() -> None:
    all_off = Variant.parse("zeroshard-3:offload=all")
    assert largest.budget(all_off, 140 * GIB) == pytest.approx(140 - 6)
    assert largest.budget(Variant.parse("zeroshard-2"), 140 * GIB) is None
    assert largest.budget(all_off, 0) is None
    own = Variant.parse("zeroshard-3:offload=all:zeroshard.gpu_budget=7")
    assert largest.budget(own, 140 * GIB) is None


def test_what_bounds_it_is_how_the_smallest_size_ended_that_did_not_train() -> None:
    found = [outcome(layers, 50) for layers in (48, 60, 54, 51)]
    result, bound = largest.summarize(found, tokens=2048)
    assert result is not None and result["layers"] == 48
    assert bound.endswith("billion parameters do not train: does not fit: 51")
    assert result["median_s"] == 2.5  # without the first step
    assert result["notes"] == [bound]
    nothing, why = largest.summarize([outcome(9, 0)], tokens=1)
    assert nothing is None and "does not fit: 9" in why


def test_the_shapes_have_as_many_parameters_as_they_are_named_for() -> None:
    sizes = {name: round(SHAPES[name].parameters / 1e9, 2) for name in ("1b", "3b", "8b")}
    assert sizes == {"1b": 1.5, "3b": 3.61, "8b": 8.03}


def test_a_trial_without_any_report_is_a_size_that_does_not_train(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "killed.py"
    monkeypatch.setattr(largest, "__file__", str(program))
    trial = largest.Trial("zeroshard-2", replace(SHAPE, layers=3), 1, 8, 1)
    program.write_text("raise SystemExit(137)", encoding="utf-8")
    ended = largest.try_in_new_ranks(trial, 1, 60.0)
    assert not ended.trains and "ended with status" in ended.reason
    said = json.dumps({"reason": "OffloadError: no room"})
    program.write_text(
        "import pathlib, sys\n"
        f"pathlib.Path(sys.argv[-1]).with_name('said-0.json').write_text({said!r})\n"
        "raise SystemExit(1)\n",
        encoding="utf-8",
    )
    assert largest.try_in_new_ranks(trial, 1, 60.0).reason == "OffloadError: no room"
