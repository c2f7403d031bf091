"""What becomes of the other engines, and of the other ranks, when one fails."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from forked import RankError, run_ranks

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

import train_step
from side_by_side import driver, records, worker
from side_by_side.driver import Report, run
from side_by_side.engines import Trainer
from side_by_side.plan import Entry, Plan
from side_by_side.workload import Variant, Workload


@dataclass
class Ended:
    """A job that is over when it has been started."""

    status: int

    def poll(self) -> int:
        return self.status

    def terminate(self) -> None:
        raise AssertionError("it has ended")


Build = Callable[[Variant, Workload, torch.device], Trainer]


def trained(fails: Callable[[int], None] = lambda step: None) -> Trainer:
    """A model of one parameter whose step meets the other ranks."""
    weight, steps = nn.Parameter(torch.ones(())), iter(range(100))

    def step(x: Tensor) -> Tensor:
        fails(next(steps))
        dist.all_reduce(weight.detach())
        return weight.detach() / x.numel()

    return Trainer(1, step)


def measured(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    build: Build,
    engines: tuple[str, ...],
    *,
    isolate: bool = False,
    ends_with: int = 0,
) -> tuple[list[Report], list[list[str]]]:
    """What two forked ranks report when engines are built in this way, and the jobs it took."""
    monkeypatch.setattr(worker, "build", build)
    monkeypatch.setattr(worker, "_PATIENCE_S", 0.2)
    monkeypatch.setattr(worker, "unavailable", lambda variant: None)
    jobs: list[list[str]] = []

    def start(path: Path, ranks: int) -> Ended:
        jobs.append([entry.variant.label for entry in Plan.load(path).entries])
        try:
            run_ranks(lambda rank, world: worker.work(Plan.load(path)), ranks, timeout=20)
        except RankError as error:
            print(error)
            return Ended(worker.BROKEN)
        return Ended(ends_with)

    workload = Workload("tiny", 1, 8, warmup=1, steps=2)
    entries = tuple(Entry(workload, Variant.parse(engine)) for engine in engines)
    plan = Plan(entries, tmp_path, tmp_path, limit_s=15)
    return list(run(plan, 2, isolate=isolate, start=start)), jobs


def test_engines_share_a_job_unless_they_are_to_be_isolated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = ("plain", "fsdp2")
    reports, jobs = measured(monkeypatch, tmp_path, lambda *_: trained(), names)
    assert [(each.entry.variant.label, each.status) for each in reports] == [
        (n, "ok") for n in names
    ]
    assert jobs == [["plain", "fsdp2"]]
    assert reports[0].result is not None
    assert reports[0].result["losses"] == [0.25, 0.5, 1.0, 2.0]  # sums over two ranks
    assert len(reports[0].result["step_s"]) == 2
    _, jobs = measured(monkeypatch, tmp_path, lambda *_: trained(), names, isolate=True)
    assert jobs == [["plain"], ["fsdp2"]]


def test_an_engine_that_fails_on_every_rank_is_reported_and_the_rest_goes_on_in_a_new_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def build(variant: Variant, *_: Any) -> Trainer:
        if variant.engine == "fsdp2":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return trained()

    reports, jobs = measured(monkeypatch, tmp_path, build, ("plain", "fsdp2", "zeroshard-3"))
    assert [each.status for each in reports] == ["ok", "out of memory (build)", "ok"]
    assert "Tried to allocate 2.00 GiB" in reports[1].detail and reports[1].result is None
    assert jobs == [["plain", "fsdp2", "zeroshard-3"], ["zeroshard-3"]]


@pytest.mark.parametrize("ends_with", [0, 1])  # as where leaving the process group hangs
def test_an_engine_that_keeps_memory_ends_the_job_and_neither_it_nor_the_next_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ends_with: int
) -> None:
    left = {"deepspeed-3": 11.0}
    built: list[str] = []

    def build(variant: Variant, *_: Any) -> Trainer:
        built.append(variant.label)
        return trained()

    monkeypatch.setattr(worker, "_forget", lambda rank, trainer: left.get(built[-1], 0.1))
    names = ("plain", "deepspeed-3", "zeroshard-3", "fsdp2")
    reports, jobs = measured(monkeypatch, tmp_path, build, names, ends_with=ends_with)
    assert [(each.entry.variant.label, each.status) for each in reports] == [
        (n, "ok") for n in names
    ]
    assert jobs == [list(names), ["zeroshard-3", "fsdp2"]]


def test_so_does_one_that_keeps_memory_of_the_host(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    built: list[str] = []

    def build(variant: Variant, *_: Any) -> Trainer:
        built.append(variant.label)
        return trained()

    # As where page-locked memory is kept for the next who asks.
    monkeypatch.setattr(worker, "_host_gib", lambda: 40.0 if "deepspeed-2" in built else 1.0)
    names = ("plain", "deepspeed-2", "zeroshard-2")
    reports, jobs = measured(monkeypatch, tmp_path, build, names)
    assert jobs == [list(names), ["zeroshard-2"]]
    figures = [each.result or {} for each in reports]
    assert [each["host_gib"] for each in figures] == [2.0, 80.0, 2.0]  # of two ranks


def test_a_rank_that_fails_alone_does_not_leave_the_others_waiting_in_a_collective(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(step: int) -> None:
        if dist.get_rank() == 1 and step == 2:
            raise RuntimeError("only here")

    def build(variant: Variant, *_: Any) -> Trainer:
        return trained(fails) if variant.engine == "zeroshard-3" else trained()

    reports, jobs = measured(monkeypatch, tmp_path, build, ("zeroshard-3", "plain"))
    assert [each.status for each in reports] == ["failed (steps)", "ok"]
    assert reports[0].detail.startswith("rank 1: RuntimeError: only here")
    assert jobs == [["zeroshard-3", "plain"], ["plain"]]


def test_an_engine_that_is_not_installed_ends_no_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    missing = {"deepspeed-3": "not installed"}
    monkeypatch.setattr(worker, "build", lambda *_: trained())
    monkeypatch.setattr(worker, "unavailable", lambda variant: missing.get(variant.label))

    def start(path: Path, ranks: int) -> Ended:
        run_ranks(lambda rank, world: worker.work(Plan.load(path)), ranks, timeout=20)
        return Ended(0)

    workload = Workload("tiny", 1, 8, warmup=1, steps=1)
    entries = tuple(Entry(workload, Variant.parse(name)) for name in ("deepspeed-3", "plain"))
    plan = Plan(entries, tmp_path, tmp_path)
    reports = list(run(plan, 2, isolate=False, start=start))
    assert [each.status for each in reports] == ["not installed", "ok"]


def test_a_job_that_ends_well_before_its_last_engine_has_failed_in_the_next(tmp_path: Path) -> None:
    def start(path: Path, ranks: int) -> Ended:
        line = json.dumps({"engine": "plain", "status": "ok", "result": {"median_s": 1.0}})
        (path.parent / "report.jsonl").write_text(f"{line}\n", encoding="utf-8")
        return Ended(0)

    workload = Workload("tiny", 1, 8)
    entries = tuple(Entry(workload, Variant.parse(name)) for name in ("plain", "fsdp2"))
    reports = list(run(Plan(entries, tmp_path, tmp_path), 2, isolate=False, start=start))
    assert [each.status for each in reports] == ["ok", "failed"]


def test_a_job_that_ends_without_a_word_costs_one_engine_only(tmp_path: Path) -> None:
    jobs: list[int] = []

    def start(path: Path, ranks: int) -> Ended:
        jobs.append(ranks)
        return Ended(137)

    workload = Workload("tiny", 1, 8)
    entries = tuple(Entry(workload, Variant.parse(name)) for name in ("plain", "fsdp2"))
    plan = Plan(entries, tmp_path, tmp_path)
    reports = list(run(plan, 4, isolate=False, start=start))
    assert [each.status for each in reports] == ["failed", "failed"] and jobs == [4, 4]
    assert "status 137" in reports[0].detail


def test_claims_on_the_same_ranks_share_a_job_and_have_runs_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs: list[tuple[int, list[str | None]]] = []

    def start(path: Path, ranks: int) -> Ended:
        plan = Plan.load(path)
        jobs.append((ranks, [entry.claim for entry in plan.entries]))
        assert {entry.workload.model for entry in plan.entries} == {"tiny"}
        lines = [
            {"engine": e.variant.label, "status": "none", "result": None} for e in plan.entries
        ]
        report = "".join(json.dumps(line) + "\n" for line in lines)
        (plan.report / "report.jsonl").write_text(report, encoding="utf-8")
        return Ended(0)

    monkeypatch.setattr(driver, "_start", start)
    options = ["--model", "tiny", "--ranks", "4", "--out", str(tmp_path)]
    assert train_step.main(["--claim", "long,weak-scaling", *options]) == 0
    assert jobs == [(2, ["weak-scaling"]), (4, ["long"] * 3 + ["weak-scaling"])]
    by_claim = {each["claim"]: each for each in records.read(tmp_path)}
    assert by_claim["long"]["run"] != by_claim["weak-scaling"]["run"]
    assert capsys.readouterr().out.count("not measured") == 6
    assert train_step.main(["--claim", "long,longer", *options]) == 2
    assert "no claim is called longer" in capsys.readouterr().err


def test_an_engine_is_known_while_the_next_one_runs_and_ranks_end_with_who_started_them(
    tmp_path: Path,
) -> None:
    class Running:
        """A job that has reported one engine of two."""

        is_terminated = False

        def __init__(self, folder: Path) -> None:
            line = json.dumps({"engine": "plain", "status": "ok", "result": {"median_s": 1.0}})
            text = f"{line}\n{line[:20]}"  # the second is being written
            (folder / "report.jsonl").write_text(text, encoding="utf-8")

        def poll(self) -> None:
            return None

        def terminate(self) -> None:
            self.is_terminated = True

    jobs: list[Running] = []

    def start(path: Path, ranks: int) -> Running:
        jobs.append(Running(path.parent))
        return jobs[-1]

    workload = Workload("tiny", 1, 8)
    entries = tuple(Entry(workload, Variant.parse(name)) for name in ("plain", "fsdp2"))
    reports = run(Plan(entries, tmp_path, tmp_path), 2, isolate=False, start=start)
    first = next(reports)
    assert (first.entry.variant.label, first.status) == ("plain", "ok")
    assert not jobs[0].is_terminated
    reports.close()
    assert jobs[0].is_terminated


def test_ranks_of_another_launcher_start_no_ranks_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    assert train_step.main([]) == 2
    assert "starts its ranks itself" in capsys.readouterr().err
