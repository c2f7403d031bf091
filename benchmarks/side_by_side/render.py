"""Records as tables: for a terminal, and in Markdown for documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from side_by_side.claims import CLAIMS, Verdict, judge
from side_by_side.records import OK
from side_by_side.workload import Workload

__all__ = ["loss_differences", "markdown", "reference_of", "terminal", "verdicts"]

Record = Mapping[str, Any]

# Whose losses the others are compared with: the first of these that ran. The sharded engines have
# fp32 master weights; plain PyTorch in bf16 rounds its updates, so it comes last.
_REFERENCES = ("plain-master", "fsdp2", "fsdp2-root-kept", "fsdp2-kept", "ddp", "plain")
_EMPTY = "-"
_NOTABLE_GIB = 0.1


def reference_of(records: Sequence[Record]) -> Record | None:
    """Return the record whose losses are the measure of the others'."""
    fine = [each for each in records if each["status"] == OK]
    found = {each["engine"]: each for each in reversed(fine)}
    # Nothing is rounded in fp32, where plain PyTorch is as good as any.
    is_fp32 = bool(fine) and fine[0]["workload"].get("dtype") == "fp32"
    names = reversed(_REFERENCES) if is_fp32 else _REFERENCES
    return next((found[name] for name in names if name in found), fine[0] if fine else None)


def loss_differences(one: Record, reference: Record) -> tuple[float, float]:
    """Return relative differences of losses: before any update, and at most in the warm-up."""
    mine, theirs = one["result"]["losses"], reference["result"]["losses"]
    count = min(one["workload"]["warmup"], reference["workload"]["warmup"])
    each = [abs(a - b) / abs(b) for a, b in zip(mine[:count], theirs[:count], strict=True)]
    return each[0], max(each)


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    """Return what a run says about the claim it was made for."""
    claim = CLAIMS.get(records[0].get("claim") or "") if records else None
    return [judge(requirement, records) for requirement in claim.requirements] if claim else []


def is_as_claimed(records: Sequence[Record]) -> bool:
    """Whether a run is what its claim asks for, with all of its engines, on GPUs."""
    claim = CLAIMS.get(records[0].get("claim") or "") if records else None
    if claim is None or not {*claim.engines} <= {each["engine"] for each in records}:
        return False
    return all(
        each["hardware"]["device"] != "CPU"
        and (claim.workload is None or claim.workload == _shortened(claim.workload, each))
        for each in records
    )


def _shortened(asked: Workload, one: Record) -> Workload:
    """More steps than were asked for are as good."""
    found = Workload(**one["workload"])
    steps, warmup = min(found.steps, asked.steps), min(found.warmup, asked.warmup)
    return replace(found, steps=steps, warmup=warmup)


def describe(one: Record) -> str:
    """Return a record's workload in words."""
    if one["benchmark"] == "train_step":
        return Workload(**one["workload"]).describe()
    return ", ".join(f"{name} {value}" for name, value in one["workload"].items())


def _head(records: Sequence[Record]) -> list[str]:
    """The columns: host memory and numbers of parameters only where engines differ in them."""
    name, *others = _HEAD
    return [
        name,
        *(_PARAMETERS if _differ_in_size(records) else ()),
        *others,
        *(_HOST if _leave_the_device(records) else ()),
    ]


def _leave_the_device(records: Sequence[Record]) -> bool:
    return any("offload" in each["engine"] for each in records)


def _differ_in_size(records: Sequence[Record]) -> bool:
    found = [each["result"].get("parameters") for each in records if each["status"] == OK]
    return len(set(found)) > 1


def _rows(records: Sequence[Record]) -> list[list[str]]:
    """The table without its head: a row for each engine, with its ratio to the first that ran."""
    fine = [each for each in records if each["status"] == OK]
    reference = reference_of(records)
    several = len({each["ranks"] for each in records}) > 1
    sizes, on_host = _differ_in_size(records), _leave_the_device(records)
    rows: list[list[str]] = []
    for each in records:
        name = f"{each['engine']} on {each['ranks']}" if several else each["engine"]
        if each["status"] != OK:
            rows.append([name, each["status"]])
            continue
        result = each["result"]
        speed = result.get("tokens_per_s_per_rank")
        ratio = fine[0]["result"]["median_s"] / result["median_s"]
        rows.append(
            [
                name,
                *([f"{result['parameters'] / 1e9:.2f}"] if sizes else ()),
                f"{result['median_s']:.4f}",
                f"{result['min_s']:.4f}-{result['max_s']:.4f}",
                _EMPTY if speed is None else f"{speed:,.0f}",
                f"x {ratio:.3f}",
                _gib(result.get("allocated_gib")),
                _gib(result.get("reserved_gib")),
                _gib(result.get("device_used_gib")),
                _loss(each, reference),
                *([_gib(result.get("host_gib"))] if on_host else ()),
            ]
        )
    return rows


def _loss(one: Record, reference: Record | None) -> str:
    if reference is None or "losses" not in one["result"] or one["ranks"] != reference["ranks"]:
        return _EMPTY
    if one is reference:
        return "reference"
    first, most = loss_differences(one, reference)
    return f"{first:.0e} / {most:.0e}"


def _gib(value: float | None) -> str:
    return _EMPTY if value is None else f"{value:.2f}"


_HEAD = [
    *("engine", "s a step", "from-to", "tokens/s/GPU", "ratio"),
    *("allocated", "reserved", "in use", "loss off by"),
]
_PARAMETERS, _HOST = ("10^9 parameters",), ("host",)


def terminal(records: Sequence[Record]) -> str:
    """Return a run as a table to read in a terminal, with what its claim asks for."""
    head = _head(records)
    rows = [head, *_rows(records)]
    whole = [row for row in rows if len(row) == len(head)]
    widths = [max(len(row[i]) for row in whole) for i in range(len(head))]
    widths[0] = max(len(row[0]) for row in rows)
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 or len(row) < len(head) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([_subject(records), *lines, *_notes(records)])


def _subject(records: Sequence[Record]) -> str:
    first = records[0]
    ranks = " and ".join(str(n) for n in sorted({each["ranks"] for each in records}))
    return f"{describe(first)}; {ranks} x {first['hardware']['device']}; memory in GiB"


def _notes(records: Sequence[Record]) -> list[str]:
    details = [f"{e['engine']}: {e['detail']}" for e in records if e.get("detail")]
    shares = [line for each in records for line in _profile(each)]
    left = [
        f"{each['engine']}: {before:.2f} GiB of an engine before it were still allocated"
        for each in records
        if (before := (each["result"] or {}).get("before_gib") or 0) >= _NOTABLE_GIB
    ]
    judged = [verdict.describe() for verdict in verdicts(records)]
    return [*details, *left, *shares, *_said(records), *judged]


def _said(records: Sequence[Record]) -> list[str]:
    """What a benchmark says of its engines in words."""
    return [
        f"{each['engine']}: {note}"
        for each in records
        for note in (each["result"] or {}).get("notes", ())
    ]


def _profile(one: Record) -> list[str]:
    profile = (one["result"] or {}).get("profile", {})
    if "error" in profile:
        return [f"{one['engine']}: no profile: {profile['error']}"]
    if "hidden" not in profile:
        return []
    shares = ", ".join(
        f"{kind} {_EMPTY if share is None else f'{share:.0%}'}"
        for kind, share in profile["hidden"].items()
    )
    idle = f"{profile['idle_of_compute_stream_ms']:.1f} of {profile['span_ms']:.1f} ms"
    return [f"{one['engine']}, profiled: under computation {shares}; computes nothing in {idle}"]


def markdown(records: Sequence[Record]) -> str:
    """Return one run of a claim as a section of a document."""
    first = records[0]
    claim = CLAIMS[first["claim"]]
    ranks = " and ".join(str(n) for n in sorted({each["ranks"] for each in records}))
    head = f"**{claim.title[0].upper()}{claim.title[1:]}**, {ranks} x {first['hardware']['device']}"
    columns = _head(records)
    rows = [columns, ["---"] * len(columns), *_rows(records)]
    filled = [[*row, *[_EMPTY] * (len(columns) - len(row))] for row in rows]
    table = "\n".join(f"| {' | '.join(row)} |" for row in filled)
    notes = [*_said(records), *(verdict.describe() for verdict in verdicts(records))]
    found = [f"- {note}" for note in notes]
    return "\n\n".join(
        [
            f"{head}: {describe(first)}.",
            table,
            "\n".join(found),
            provenance(first),
        ]
    )


def provenance(one: Record) -> str:
    """Return where a record comes from, in a line."""
    named = {"torch": "torch", "transformers": "transformers", "deepspeed": "DeepSpeed"}
    versions = [
        f"{name} {one['versions'][key]}" for key, name in named.items() if key in one["versions"]
    ]
    driver = one["hardware"].get("driver")
    commit = one["commit"] or "an unknown commit"
    changed = " with changes" if one["modified"] else ""
    parts = [
        one["date"].split()[0],
        f"code of {commit}{changed}",
        *versions,
        *([f"driver {driver}"] if driver else []),
        f"`python benchmarks/claims.py {one['claim']}`",
    ]
    return f"({'; '.join(parts)})"
