"""Training steps of one model under several engines, side by side: time, memory and losses.

    python benchmarks/train_step.py --claim long
    python benchmarks/train_step.py --model 8b --batch 1 --seq 1024 --compile \
        --engines plain,zeroshard-3,zeroshard-3:zeroshard.gather=nccl,fsdp2

Starts the ranks itself, one for each GPU, or two on a host without any. The engines run one after
another in these ranks, each with a model of its own made from the same seed, the same tokens, the
same AdamW and clipping. An engine that fails is reported as such and the others run all the same.
Prints a table, appends a line of JSON for each engine to DIR/train_step.jsonl, and draws
DIR/train_step-*.png where matplotlib is installed. docs/guides/benchmarks.md has the rest.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from side_by_side import claims, records, render
from side_by_side.claims import ALL
from side_by_side.driver import Report, run
from side_by_side.plan import Entry, Plan
from side_by_side.workload import Variant, Workload
from zeroshard.launch.gpus import visible_gpus

CLAIMS = {name: claim for name, claim in claims.CLAIMS.items() if claim.workload is not None}
ENGINES = "plain,zeroshard-3,fsdp2"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--claim", help=f"workload, engines and ratios of one or more of {', '.join(CLAIMS)}")
    add("--engines", help=f"names, separated by commas, or the claim's; default {ENGINES}")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="for all zeroshard engines")
    add("--model", help="tiny, 1b, 3b or 8b")
    add("--batch", type=int, help="sequences on each rank")
    add("--seq", type=int, help="tokens in a sequence")
    add("--compile", action=argparse.BooleanOptionalAction, default=None, help="compile blocks")
    add("--checkpointing", help="none or full")
    add("--reduce", help="dtype that gradients travel in: bf16 or fp32")
    add("--dtype", help="dtype to compute in: bf16 or fp32")
    add("--warmup", type=int, help="steps before the measurement")
    add("--steps", type=int, help="steps in the measurement")
    add("--ranks", type=int, help="ranks; default one for each GPU, or two CPU ranks")
    add("--isolate", action="store_true", help="start new ranks for each engine")
    add("--profile", action="append", default=[], metavar="ENGINE", help="profile one step; or all")
    add("--limit", type=float, default=300.0, help="seconds that one engine may take")
    records.add_out(parser)
    add("--no-plot", action="store_true")
    add("--plan", type=Path, help=argparse.SUPPRESS)  # ranks are started with it
    return parser.parse_args(argv)


def entries_of(args: argparse.Namespace, claim: str | None) -> list[Entry]:
    """Return what is measured for a claim, or for none, as the command line changes it."""
    asked = CLAIMS.get(claim)
    base = (asked and asked.workload) or Workload("tiny", 2, 64)
    given = {name: value for name in base.as_dict() if (value := getattr(args, name)) is not None}
    names = args.engines or (",".join(asked.engines) if asked else ENGINES)
    variants = [Variant.parse(name) for name in names.split(",")]
    for setting in args.set:
        variants = [v.having(setting) if v.family == "zeroshard" else v for v in variants]
    entries = [Entry(replace(base, **given), variant, claim) for variant in variants]
    for entry in entries:
        _ = entry.own_workload  # which refuses values that are wrong
    return entries


def ranks_of(claim: str | None, every: int) -> list[int]:
    """Return the numbers of ranks that a claim is measured on where there are so many."""
    wanted = CLAIMS[claim].ranks if claim else (ALL,)
    return sorted({count or every for count in wanted if count <= every})


def measure(args: argparse.Namespace) -> list[list[dict[str, Any]]]:
    """Run everything; return the records of each claim, which are in the file by then.

    Claims on the same number of ranks share the ranks, whose start takes as long as some engines.
    """
    every = args.ranks or len(visible_gpus(os.environ)) or 2
    claims = args.claim.split(",") if args.claim else [None]
    entries = {claim: entries_of(args, claim) for claim in claims}
    sources = {claim: records.origin(args.commit) for claim in claims}
    found: dict[str | None, list[dict[str, Any]]] = {claim: [] for claim in claims}
    for ranks in sorted({count for claim in claims for count in ranks_of(claim, every)}):
        wanted = [entry for c in claims if ranks in ranks_of(c, every) for entry in entries[c]]
        # Whoever is known to keep memory goes last: new ranks are started after it.
        wanted.sort(key=lambda entry: entry.variant.family == "deepspeed")
        plan = Plan(tuple(wanted), args.out, args.out, tuple(args.profile), args.limit)
        for report in run(plan, ranks, isolate=args.isolate):
            one = as_record(report, sources[report.entry.claim], ranks)
            found[report.entry.claim].append(one)
            records.write(args.out, [one])
    return list(found.values())


def as_record(report: Report, source: records.Origin, ranks: int) -> dict[str, Any]:
    """Return the line of JSON for what the ranks said about an engine."""
    return records.record(
        source,
        "train_step",
        ranks,
        report.entry.workload.as_dict(),
        report.entry.variant.label,
        report.result,
        status=report.status,
        detail=report.detail,
        claim=report.entry.claim,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or be one of the ranks that are measured."""
    args = arguments(argv)
    if args.plan:
        from side_by_side.worker import work  # noqa: PLC0415 - imports torch

        work(Plan.load(args.plan))
        return 0
    if "RANK" in os.environ:
        print("train_step.py starts its ranks itself; start it with python", file=sys.stderr)
        return 2
    unknown = {*(args.claim or "").split(",")} - {"", *CLAIMS}
    try:
        if unknown:
            raise ValueError(f"no claim is called {', '.join(sorted(unknown))}")
        runs = [run for run in measure(args) if run]
    except ValueError as error:
        print(f"train_step.py: {error}", file=sys.stderr)
        return 2
    for found in runs:
        print(f"\n{render.terminal(found)}", flush=True)
        if not args.no_plot:
            from side_by_side import plots  # noqa: PLC0415 - matplotlib is optional

            plots.draw(found, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
