"""What is measured, what is asked for, and what the README says about it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))

import claims as claims_script  # noqa: E402 - scripts, found by the path set above
import tables  # noqa: E402
import train_step  # noqa: E402
from side_by_side import records, render  # noqa: E402
from side_by_side.claims import CLAIMS, Requirement, judge  # noqa: E402
from side_by_side.workload import Variant, Workload  # noqa: E402

GPUS = records.Origin("run", "2026-01-02 03:04", "0123abc", False, {"device": "H"}, {"torch": "2"})


def measured(
    engine: str, seconds: float, *, claim: str = "short", ranks: int = 4, **more: Any
) -> dict[str, Any]:
    """A record with figures that are made up."""
    workload = more.pop("workload", CLAIMS[claim].workload)
    source = more.pop("source", GPUS)
    result = {
        "median_s": seconds,
        "min_s": seconds / 2,
        "max_s": 2 * seconds,
        "tokens_per_s_per_rank": workload.tokens / seconds,
        "allocated_gib": 10.0,
        "reserved_gib": 11.0,
        "device_used_gib": 12.0,
        "losses": [4.0, 3.0, 2.0, 1.0, 0.5],
        **more,
    }
    args = (source, "train_step", ranks, workload.as_dict(), engine, result)
    return records.record(*args, claim=claim)


def failed(engine: str, status: str, claim: str = "short") -> dict[str, Any]:
    workload = CLAIMS[claim].workload or Workload("tiny", 1, 1)
    args = (GPUS, "train_step", 4, workload.as_dict(), engine, None)
    return records.record(*args, status=status, claim=claim)


# What is measured


def test_a_variant_says_what_differs_in_the_workload_and_in_the_configuration() -> None:
    text = "zeroshard-3:reduce=fp32:zeroshard.gather=nccl:zero_optimization.overlap_comm=false"
    variant = Variant.parse(text)
    assert (variant.label, variant.family, variant.stage) == (text, "zeroshard", 3)
    assert variant.workload(Workload("tiny", 1, 8)) == Workload("tiny", 1, 8, reduce="fp32")
    base = {"zero_optimization": {"stage": 3}}
    assert variant.configuration(base) == {
        "zero_optimization": {"stage": 3, "overlap_comm": False},
        "zeroshard": {"gather": "nccl"},
    }
    assert base == {"zero_optimization": {"stage": 3}}
    assert Variant.parse("fsdp2-kept").stage is None


def test_what_leaves_the_device_is_a_setting_of_each_engine_that_can() -> None:
    base = {"zero_optimization": {"stage": 3}}
    home = {"device": "cpu", "pin_memory": True}
    ratio = "zero_optimization.offload_optimizer.ratio=0.25"
    variant = Variant.parse(f"zeroshard-2:offload=optimizer:{ratio}")
    assert variant.configuration(base) == {
        "zero_optimization": {"stage": 3, "offload_optimizer": {**home, "ratio": 0.25}}
    }
    variant = Variant.parse("deepspeed-3:offload=all")
    assert variant.offload == "all" and Variant.parse("zeroshard-3").offload == "none"
    assert variant.configuration(base) == {
        "zero_optimization": {"stage": 3, "offload_optimizer": home, "offload_param": home}
    }
    assert Variant.parse("fsdp2:offload=all").offload == "all"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("zeroshard-3:offload=half", "none, optimizer and all"),
        ("fsdp2:offload=optimizer", "none and all"),
        ("plain:offload=all", "plain: offload can be none"),
        ("fsdp", "no engine"),
        ("zeroshard-4", "no engine"),
        ("zeroshard-3:gather", "not KEY=VALUE"),
        ("fsdp2:zeroshard.gather=nccl", "no configuration"),
        ("plain:checkpointing=some", "none, full"),
    ],
)
def test_a_mistyped_engine_is_refused_before_anything_starts(text: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Variant.parse(text).workload(Workload("tiny", 1, 8))


def test_settings_of_the_command_line_reach_every_engine_of_ours_and_no_other() -> None:
    options = ["--engines", "plain,zeroshard-2,zeroshard-3", "--set", "zeroshard.gather=nccl"]
    entries = train_step.entries_of(train_step.arguments(options), None)
    setting = ":zeroshard.gather=nccl"
    assert [entry.variant.label for entry in entries] == [
        "plain",
        f"zeroshard-2{setting}",
        f"zeroshard-3{setting}",
    ]


def test_weak_scaling_runs_on_two_ranks_and_then_on_all() -> None:
    assert train_step.ranks_of("weak-scaling", 4) == [2, 4]
    assert train_step.ranks_of("weak-scaling", 2) == [2]
    assert train_step.ranks_of("long", 4) == [4]
    assert train_step.ranks_of("one-gpu", 4) == [1]


@pytest.mark.parametrize("name", CLAIMS)
def test_every_claim_has_a_command_and_asks_only_for_engines_that_it_runs(name: str) -> None:
    claim = CLAIMS[name]
    asked = {r.ours for r in claim.requirements} | {r.peer for r in claim.requirements if r.peer}
    assert asked <= set(claim.engines)
    (command,) = claims_script.commands([name], 4)
    assert Path(next(word for word in command if word.endswith(".py"))).exists()
    if claim.workload is not None:
        assert claim.workload.steps >= 8
        assert all(Variant.parse(engine).workload(claim.workload) for engine in claim.engines)


# What is asked for


def test_a_ratio_is_judged_against_the_bound_for_its_number_of_ranks() -> None:
    requirement = Requirement("zeroshard-3", "speed", 1.35, "fsdp2", at=((4, 1.22),))
    runs = {ranks: [measured("zeroshard-3", 0.8, ranks=ranks)] for ranks in (4, 8)}
    verdicts = {
        ranks: judge(requirement, [*run, measured("fsdp2", 1.0, ranks=ranks)])
        for ranks, run in runs.items()
    }
    assert {ranks: (v.measured, v.is_met) for ranks, v in verdicts.items()} == {
        4: (1.25, True),
        8: (1.25, False),
    }
    assert "x 1.250 (asked: at least 1.35): missed" in verdicts[8].describe()


def test_memory_has_ceilings() -> None:
    run = [measured("zeroshard-3", 1.0, reserved_gib=11.5), measured("fsdp2", 1.0)]
    by_figure = {v.requirement.figure: v for v in render.verdicts(run)}
    assert (by_figure["allocated"].measured, by_figure["allocated"].is_met) == (1.0, True)
    assert (by_figure["reserved"].measured, by_figure["reserved"].is_met) == (1.15, False)


def test_communication_is_judged_where_it_was_profiled() -> None:
    requirement = Requirement("zeroshard-3", "hidden", 0.9)
    profile = {
        "hidden": {"gather": 0.95, "reduce": None, "both": 0.95},
        "idle_of_compute_stream_ms": 1.0,
        "span_ms": 10.0,
    }
    run = [measured("zeroshard-3", 1.0, claim="long", profile=profile)]
    assert judge(requirement, run).is_met
    assert "gather 95%, reduce -, both 95%; computes nothing in 1.0 of 10.0 ms" in (
        render.terminal(run)
    )
    assert judge(requirement, [measured("zeroshard-3", 1.0)]).measured is None
    left = render.terminal([measured("fsdp2", 1.0, before_gib=2.5)])
    assert "fsdp2: 2.50 GiB of an engine before it were still allocated" in left
    broken = [measured("zeroshard-3", 1.0, profile={"error": "OSError: disk full"})]
    assert judge(requirement, broken).measured is None
    assert "no profile: OSError: disk full" in render.terminal(broken)


@pytest.mark.parametrize("name", CLAIMS)
def test_on_a_host_without_gpus_a_claim_runs_at_toy_size(name: str) -> None:
    (command,) = claims_script.commands([name], 0)
    benchmark = CLAIMS[name].benchmark
    assert (
        tuple(command[len(command) - len(claims_script.TOYS[benchmark]) :])
        == (claims_script.TOYS[benchmark])
    )
    if benchmark == "train_step":
        args = train_step.arguments(command[2:])
        entries = train_step.entries_of(args, name)
        assert {entry.own_workload.model for entry in entries} == {"tiny"}


def test_page_locked_bytes_are_judged_on_the_rank_with_most_for_its_state() -> None:
    requirement = Requirement("zeroshard-3", "pinned", 1.02)
    moved = [None, {"state_bytes": 100, "pinned_bytes": 101}]
    run = [measured("zeroshard-3", 1.0, off_device=moved)]
    assert (judge(requirement, run).measured, judge(requirement, run).is_met) == (1.01, True)
    run = [measured("zeroshard-3", 1.0, off_device=[{"state_bytes": 100, "pinned_bytes": 128}])]
    assert judge(requirement, run).is_met is False
    nothing = judge(requirement, [measured("zeroshard-3", 1.0)])
    assert nothing.measured is None and "nothing is page-locked" in nothing.describe()


def test_a_disk_and_the_largest_model_have_figures_of_their_own() -> None:
    disk = Requirement("zeroshard-2", "disk", 0.85)
    assert judge(disk, [measured("zeroshard-2", 1.0, disk_ratio=0.9)]).is_met
    assert judge(disk, [measured("zeroshard-2", 1.0, disk_ratio=None)]).measured is None
    largest = Requirement("zeroshard-3", "parameters", 1.8, "zeroshard-2")
    run = [
        measured("zeroshard-3", 1.0, parameters=18e9, notes=["20 billion do not train: no room"]),
        measured("zeroshard-2", 1.0, parameters=9e9),
    ]
    assert judge(largest, run).measured == 2.0
    assert "10^9 parameters" in render.terminal(run) and "18.00" in render.terminal(run)
    assert "- zeroshard-3: 20 billion do not train: no room" in render.markdown(run)


def test_host_memory_is_shown_where_something_leaves_the_device() -> None:
    run = [
        measured("zeroshard-2:offload=optimizer", 1.0, claim="offload", host_gib=43.25),
        failed("deepspeed-2:offload=optimizer", "out of memory (build)", "offload"),
    ]
    text = render.markdown(run)
    assert text.count("| host |") == 1 and "| 43.25 |" in text
    assert " host" not in render.terminal([measured("zeroshard-2", 1.0, host_gib=43.25)])


def test_scaling_compares_most_ranks_with_fewest() -> None:
    requirement = Requirement("zeroshard-3", "scaling", 0.97)
    run = [measured("zeroshard-3", 0.9, ranks=2), measured("zeroshard-3", 1.0, ranks=8)]
    verdict = judge(requirement, run)
    assert (verdict.measured, verdict.is_met) == (0.9, False)
    assert judge(requirement, run[:1]).measured is None


def test_what_failed_or_did_not_run_is_not_judged_but_named() -> None:
    run = [measured("zeroshard-3", 1.0), failed("fsdp2", "out of memory (step 2)")]
    lines = [verdict.describe() for verdict in render.verdicts(run)]
    assert "not measured (fsdp2: out of memory (step 2); asked: at least 1.22)" in lines[0]
    assert "not measured (plain: not run; asked: at least 0.88)" in lines[1]
    assert "out of memory (step 2)" in render.terminal(run)
    assert "| fsdp2 | out of memory (step 2) | - |" in render.markdown(run)


def test_on_cpus_memory_is_not_judged() -> None:
    run = [
        measured(e, 1.0, allocated_gib=None, reserved_gib=None) for e in ("zeroshard-3", "fsdp2")
    ]
    assert [v.measured for v in render.verdicts(run)] == [1.0, None, None, None]
    assert "no GPU" in render.terminal(run)


# Losses


def test_losses_are_compared_with_an_engine_that_has_master_weights() -> None:
    names = ("plain", "zeroshard-3", "fsdp2")
    run = [measured(name, 1.0) for name in names]
    run[1]["result"]["losses"][1] = 3.3
    reference = render.reference_of(run)
    assert reference is run[2]
    assert render.loss_differences(run[1], reference) == (0, pytest.approx(0.1))
    run[1]["result"]["losses"][4] = 99.0  # after the warm-up, where plain PyTorch trains alone
    assert render.loss_differences(run[1], reference) == (0, pytest.approx(0.1))


def test_in_fp32_losses_are_compared_with_plain_pytorch() -> None:
    fp32 = dataclasses.replace(train_step.CLAIMS["short"].workload, dtype="fp32")
    run = [measured(name, 1.0, workload=fp32) for name in ("fsdp2", "plain", "plain-master")]
    assert render.reference_of(run) is run[1]


# The README


def test_the_readme_is_what_the_result_files_say() -> None:
    assert tables.main(["--check"]) == 0, "run python benchmarks/tables.py"


def test_without_results_the_readme_says_that_there_are_none() -> None:
    text = tables.written([])
    assert tables.NOTHING in text and "|" not in text


def test_the_last_run_of_a_claim_on_each_number_of_gpus_is_shown() -> None:
    def run(name: str, date: str, ranks: int, seconds: float, **more: Any) -> list[dict[str, Any]]:
        source = dataclasses.replace(GPUS, run=name, date=date)
        return [
            measured(engine, seconds, ranks=ranks, source=source, **more)
            for engine in ("plain", "zeroshard-3", "fsdp2")
        ]

    tiny = Workload("tiny", 1, 1024, compile=True)
    on_cpu = dataclasses.replace(GPUS, run="cpu", hardware={"device": "CPU"})
    longer = dataclasses.replace(train_step.CLAIMS["short"].workload, steps=20)
    found = [
        *run("long", "2026-01-01 00:00", 4, 3.0, claim="long"),
        *run("old", "2026-01-02 00:00", 4, 0.7),
        *run("eight", "2026-01-03 00:00", 8, 0.25),
        *run("new", "2026-01-04 00:00", 4, 0.125, workload=longer),
        *run("other", "2026-01-05 00:00", 4, 9.0, workload=tiny),
        *(measured(engine, 9.0, source=on_cpu) for engine in ("plain", "zeroshard-3")),
    ]
    assert [run[0]["run"] for run in tables.shown(found)] == ["long", "new", "eight"]
    text = tables.written(found)
    assert "0.1250" in text and "0.7000" not in text and "9.0000" not in text
    assert "2026-01-04; code of 0123abc; torch 2; `python benchmarks/claims.py short`" in text


def test_a_run_may_fail_where_its_claim_cannot_be_measured_and_is_shown() -> None:
    run = [measured(name, 1.0) for name in ("plain", "fsdp2")]
    assert tables.shown([*run, failed("zeroshard-3", "failed (build)")])
    assert tables.shown(run) == []  # it was cut short, or left an engine out


def test_only_the_marked_part_of_a_document_is_rewritten() -> None:
    document = f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n"
    text = tables.written([])
    assert tables.rewritten(document, text) == f"before\n{text}\nafter\n"
    with pytest.raises(ValueError, match="lacks"):
        tables.rewritten("no marks", text)


def test_records_come_back_in_the_order_of_their_dates(tmp_path: Path) -> None:
    dates = ("2026-01-02 00:00", "2026-01-01 00:00")
    written = [
        measured("plain", 1.0, source=dataclasses.replace(GPUS, date=date)) for date in dates
    ]
    records.write(tmp_path, written[:1])
    records.write(tmp_path, written[1:])
    assert records.read(tmp_path) == written[::-1]
    assert records.read(tmp_path / "none") == []
