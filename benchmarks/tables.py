"""Writes the tables of README.md from the results in benchmarks/results.

    python benchmarks/tables.py            # rewrite the marked part of README.md
    python benchmarks/tables.py --check    # fail if it is not what the results say
    python benchmarks/tables.py --show DIR # print every run in a folder
    python benchmarks/tables.py --draw DIR # and draw the training steps into it

A run is shown if it was made for a claim, as the claim asks for it, on GPUs: of several, the last
one for each number of GPUs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from side_by_side import plots, records, render
from side_by_side.claims import CLAIMS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN = "<!-- Written by `python benchmarks/tables.py`; do not edit. -->"
END = "<!-- End of what is written. -->"
NOTHING = "There are none yet: nothing has been measured with it so far."
LEGEND = (
    "`plain` is PyTorch with bf16 weights and moments and no communication, `plain-master` the "
    "same with fp32 ones beside the weights, as the sharded engines have them, `fsdp2-kept` FSDP2 "
    "with `reshard_after_forward=False`; `fsdp2` reshards every block and the root, which its "
    "default keeps. A step is the median of those timed, until the slowest rank is done; ratios "
    "are over the first engine of a table. Memory is GiB on the fullest GPU: peaks of "
    "allocated and reserved in the timed steps, and what is in use on the device, NCCL included. "
    "Losses are compared before any update / at most in the first steps. Where state leaves the "
    "device, `offload` is what does, and `host` is GiB of host memory in use by all ranks."
)

Record = Mapping[str, Any]


def by_run(found: Sequence[Record]) -> list[list[Record]]:
    """Return the records of each run, in the order of the first of each."""
    runs: dict[str, list[Record]] = {}
    for each in found:
        runs.setdefault(each["run"], []).append(each)
    return list(runs.values())


def shown(found: Sequence[Record]) -> list[list[Record]]:
    """Return the runs to show, in the order of the claims."""
    latest: dict[tuple[str, int], list[Record]] = {}
    for run in by_run(found):  # in the order of dates
        if render.is_as_claimed(run):
            latest[run[0]["claim"], max(each["ranks"] for each in run)] = run
    order = list(CLAIMS)
    return [latest[key] for key in sorted(latest, key=lambda key: (order.index(key[0]), key[1]))]


def written(found: Sequence[Record]) -> str:
    """Return the text between the marks."""
    runs = shown(found)
    parts = [LEGEND, *(render.markdown(run) for run in runs)] if runs else [NOTHING]
    return "\n\n".join([BEGIN, *parts, END])


def rewritten(document: str, text: str) -> str:
    """Return a document with another text at its marks, which it must have."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md lacks the lines {BEGIN!r} and {END!r}")
    return before + text + after


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite or check."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--show", type=Path, metavar="DIR")
    parser.add_argument("--draw", type=Path, metavar="DIR")
    args = parser.parse_args(argv)
    if folder := args.show or args.draw:
        for run in by_run(records.read(folder)):
            print(f"{render.terminal(run)}\n")
            if args.draw and run[0]["benchmark"] == "train_step":
                plots.draw(run, folder)
        return 0
    old = README.read_text(encoding="utf-8")
    new = rewritten(old, written(records.read(RESULTS)))
    if args.check:
        if new != old:
            print("README.md is not what benchmarks/results say; run python benchmarks/tables.py")
        return int(new != old)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
