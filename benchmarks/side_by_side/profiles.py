"""What the device did in one step, by kind of kernel, and how much communication was hidden.

A gather or a reduction is hidden where a kernel of the stream that computes runs at the same time.
Its time includes waiting for other ranks. The arithmetic on spans is apart from the profiler.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Activity", "activities", "hidden", "kind_of", "profiled", "summarize", "union"]

Span = tuple[float, float]  # from and to, in microseconds

LARGEST_TRACE_BYTES = 12 * 2**20

# The first pattern found in a kernel's name, in small letters, says what kind of work it does.
_KINDS = (
    ("gather", ("allgather", "all_gather", "memcpy ptop")),
    ("reduce", ("reducescatter", "reduce_scatter", "allreduce", "ncclsymkdevkernel_reduce")),
    ("reduce", ("mean_of_rows",)),
    ("other communication", ("nccl", "barrier_kernel")),
    ("copy on device", ("memcpy dtod",)),
    ("copy to or from host", ("memcpy", "memset")),
    ("optimizer", ("adam",)),
    ("attention", ("flash", "fmha", "attention", "sdpa")),
    ("matmul", ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk")),
)
_REST = "elementwise and other"
GATHER, REDUCE = "gather", "reduce"
_NO_ARITHMETIC = (
    *(GATHER, REDUCE, "other communication"),
    *("copy on device", "copy to or from host"),
)


@dataclass(frozen=True)
class Activity:
    """A kernel or copy on the device: its name, its stream, and from when to when it ran."""

    name: str
    stream: int
    start: float
    end: float

    @property
    def span(self) -> Span:
        """From when to when, in microseconds."""
        return self.start, self.end


def kind_of(name: str) -> str:
    """Return what kind of work a kernel or copy of this name does."""
    small = name.lower()
    return next((kind for kind, words in _KINDS if any(w in small for w in words)), _REST)


def computes(name: str) -> bool:
    """Whether a kernel of this name keeps the device's arithmetic busy."""
    return kind_of(name) not in _NO_ARITHMETIC


def union(spans: Iterable[Span]) -> list[Span]:
    """Return the same points of time as spans that are apart from each other, in order."""
    merged: list[Span] = []
    for start, end in sorted(span for span in spans if span[1] > span[0]):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def length(spans: Iterable[Span]) -> float:
    """Return how long the spans last, one after another."""
    return sum(end - start for start, end in spans)


def overlap(first: Iterable[Span], second: Iterable[Span]) -> float:
    """Return how long there is a span of both kinds at once."""
    a, b, total = union(first), union(second), 0.0
    i = j = 0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total


def hidden(spans: Sequence[Span], cover: Sequence[Span]) -> float | None:
    """Return the share of the spans' time in which there is cover, None without any span."""
    whole = length(union(spans))
    return overlap(spans, cover) / whole if whole else None


def summarize(found: Sequence[Activity]) -> dict[str, Any]:
    """Return times by kind, shares of hidden communication, and idle time where it computes."""
    if not found:
        return {"kernels": 0}
    by_kind: defaultdict[str, list[Span]] = defaultdict(list)
    busy: defaultdict[int, list[Span]] = defaultdict(list)
    for each in found:
        by_kind[kind_of(each.name)].append(each.span)
        if computes(each.name):
            busy[each.stream].append(each.span)
    computing = union(max(busy.values(), key=length, default=[]))
    traffic = {kind: by_kind[kind] for kind in (GATHER, REDUCE)}
    traffic["both"] = [*traffic[GATHER], *traffic[REDUCE]]
    first, last = min(each.start for each in found), max(each.end for each in found)
    return {
        "kernels": len(found),
        "span_ms": _ms(last - first),
        "idle_of_compute_stream_ms": _ms(last - first - length(computing)),
        "idle_of_device_ms": _ms(last - first - length(union(each.span for each in found))),
        "ms": {kind: _ms(length(spans)) for kind, spans in sorted(by_kind.items())},
        "count": {kind: len(spans) for kind, spans in sorted(by_kind.items())},
        "hidden": {
            kind: None if (share := hidden(spans, computing)) is None else round(share, 4)
            for kind, spans in traffic.items()
        },
        "ms_by_stream": _by_stream(found),
        "longest": _longest(found),
    }


def _ms(microseconds: float) -> float:
    return round(microseconds / 1e3, 3)


def _by_stream(found: Sequence[Activity]) -> dict[str, dict[str, float]]:
    streams: defaultdict[int, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for each in found:
        streams[each.stream][kind_of(each.name)] += each.end - each.start
    return {
        str(stream): {kind: _ms(time) for kind, time in sorted(kinds.items())}
        for stream, kinds in sorted(streams.items())
    }


def _longest(found: Sequence[Activity], most: int = 12) -> list[dict[str, Any]]:
    total: defaultdict[str, float] = defaultdict(float)
    count: defaultdict[str, int] = defaultdict(int)
    for each in found:
        total[each.name] += each.end - each.start
        count[each.name] += 1
    names = sorted(total, key=lambda name: -total[name])[:most]
    return [
        {"name": n[:90], "kind": kind_of(n), "ms": _ms(total[n]), "count": count[n]} for n in names
    ]


def activities(trace: dict[str, Any]) -> list[Activity]:
    """Return what ran on the device, from a trace as torch.profiler writes it for Chrome."""
    return [
        Activity(
            event["name"],
            int(event.get("args", {}).get("stream", 0)),
            float(event["ts"]),
            float(event["ts"]) + float(event["dur"]),
        )
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]


def profiled(step: Callable[[], object], keep: Path | None = None) -> list[Activity]:
    """Run a step under the profiler; the trace is kept compressed unless it is large."""
    import torch  # noqa: PLC0415 - the arithmetic above does not need it
    from torch.profiler import ProfilerActivity, profile  # noqa: PLC0415

    on_gpu = torch.cuda.is_available()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=kinds) as recorded:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        text = path.read_bytes()
    if keep is not None:
        packed = gzip.compress(text, compresslevel=3)
        if len(packed) < LARGEST_TRACE_BYTES:
            keep.parent.mkdir(parents=True, exist_ok=True)
            keep.write_bytes(packed)
    return activities(json.loads(text))
