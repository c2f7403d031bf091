"""The claims that a run can check: a workload, the engines, and the ratios that are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from side_by_side.workload import Workload

__all__ = ["ALL", "CLAIMS", "LARGEST_OFFLOADED", "Claim", "Requirement", "Verdict", "judge"]

ALL = 0  # as many ranks as there are GPUs
LARGEST_OFFLOADED = "zeroshard-3:offload=all"

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Requirement:
    """A bound on a figure of one engine, alone or over that of a peer.

    ``figure`` is ``speed``, ``allocated`` (peak), ``reserved`` (peak over the
    peak allocated), ``scaling`` (tokens per second and rank, on most ranks over on fewest),
    ``hidden`` (the share of gather and reduce time under computation, in a profile), ``pinned``
    (page-locked bytes over those of the state that is off the device), ``disk`` (bytes per second
    of a step over those of the bare disk) or ``parameters`` (of the largest model that trains).
    ``at`` replaces the bound on so many ranks.
    """

    ours: str
    figure: str
    bound: float
    peer: str | None = None
    at: tuple[tuple[int, float], ...] = ()

    @property
    def is_ceiling(self) -> bool:
        """Whether less is better."""
        return self.figure in ("allocated", "reserved", "pinned")

    def bound_on(self, ranks: int) -> float:
        """Return what is asked for on so many ranks."""
        return dict(self.at).get(ranks, self.bound)

    def describe(self) -> str:
        """Return what is compared, in words."""
        words = {
            "speed": f"speed of {self.ours} over {self.peer}",
            "allocated": f"peak allocated of {self.ours} over {self.peer}",
            "reserved": f"reserved over allocated of {self.ours}",
            "scaling": f"tokens/s/GPU of {self.ours}, most over fewest ranks",
            "hidden": f"share of gathers and reductions of {self.ours} under computation",
            "pinned": f"page-locked bytes of {self.ours} over those of its state off the device",
            "disk": f"bytes read and written per second by {self.ours} over those of the bare disk",
            "parameters": f"largest model of {self.ours} over that of {self.peer}",
        }
        return words[self.figure]


@dataclass(frozen=True)
class Claim:
    """A row of the table of figures to reach, and the benchmark that measures it.

    ``workload`` is None where the benchmark has a workload of its own.
    """

    title: str
    workload: Workload | None
    engines: tuple[str, ...]
    requirements: tuple[Requirement, ...]
    ranks: tuple[int, ...] = (ALL,)
    benchmark: str = "train_step"

    @property
    def profiled(self) -> set[str]:
        """The engines of which a profile is asked for."""
        return {each.ours for each in self.requirements if each.figure == "hidden"}


@dataclass(frozen=True)
class Verdict:
    """A requirement and what was measured; ``measured`` is None where an engine has no figure."""

    requirement: Requirement
    asked: float
    measured: float | None
    missing: str = ""

    @property
    def is_met(self) -> bool | None:
        """Whether the bound holds, None where nothing was measured."""
        if self.measured is None:
            return None
        return (
            self.measured <= self.asked
            if self.requirement.is_ceiling
            else (self.measured >= self.asked)
        )

    def describe(self) -> str:
        """Return the verdict in words."""
        sign = "at most" if self.requirement.is_ceiling else "at least"
        asked = f"asked: {sign} {self.asked:g}"
        if self.measured is None:
            return f"{self.requirement.describe()}: not measured ({self.missing}; {asked})"
        word = "ok" if self.is_met else "missed"
        times = "" if self.requirement.figure in ("hidden", "disk") else "x "
        return f"{self.requirement.describe()}: {times}{self.measured:.3f} ({asked}): {word}"


LONG = Workload("8b", 2, 4096, compile=True)
SHORT = Workload("8b", 1, 1024, compile=True)
EAGER_LONG = Workload("8b", 2, 4096, checkpointing="full")
EAGER_SHORT = Workload("8b", 1, 1024, checkpointing="full")
BUDGET = replace(EAGER_LONG, warmup=8)  # it measures in the first steps
ONE_GPU = Workload("3b", 4, 4096, checkpointing="full")
OFFLOADED = replace(ONE_GPU, warmup=2)  # whose steps take seconds

_AUTO = "zeroshard-3:checkpointing=none:zeroshard.activation_budget=auto"
_STATE_OFF = "zeroshard-2:offload=optimizer"
# GiB for the parameters of OFFLOADED and their gradients, 2 bytes each, three quarters of the 12 of
# their state, and the four buffers that the rest of it passes through.
_QUARTER_OFF = "zeroshard-2:zeroshard.gpu_budget=44.5"
_ALL_OFF = "zeroshard-3:offload=all"


def _memory(ours: str, peer: str) -> tuple[Requirement, ...]:
    return Requirement(ours, "allocated", 1.0, peer), Requirement(ours, "reserved", 1.1)


_MEMORY = _memory("zeroshard-3", "fsdp2")
_MEMORY_KEPT = _memory("zeroshard-2", "fsdp2-kept")

CLAIMS = {
    "long": Claim(
        "ZeRO-3 against FSDP2, long batches",
        LONG,
        ("plain", "zeroshard-3", "fsdp2"),
        (
            Requirement("zeroshard-3", "speed", 1.07, "fsdp2"),
            Requirement("zeroshard-3", "speed", 0.99, "plain"),
            *_MEMORY,
            Requirement("zeroshard-3", "hidden", 0.9),
        ),
    ),
    "short": Claim(
        "ZeRO-3 against FSDP2, short batches",
        SHORT,
        ("plain", "zeroshard-3", "fsdp2"),
        (
            Requirement("zeroshard-3", "speed", 1.35, "fsdp2", at=((4, 1.22),)),
            Requirement("zeroshard-3", "speed", 0.88, "plain"),
            *_MEMORY,
        ),
    ),
    "eager-long": Claim(
        "ZeRO-3 against DeepSpeed ZeRO-3, long batches",
        EAGER_LONG,
        ("zeroshard-3", "fsdp2", "deepspeed-3"),
        (
            Requirement("zeroshard-3", "speed", 1.18, "deepspeed-3", at=((4, 1.15),)),
            *_MEMORY,
        ),
    ),
    "eager-short": Claim(
        "ZeRO-3 against DeepSpeed ZeRO-3, short batches",
        EAGER_SHORT,
        ("zeroshard-3", "fsdp2", "deepspeed-3"),
        (Requirement("zeroshard-3", "speed", 3.5, "deepspeed-3"), *_MEMORY),
    ),
    "stage2": Claim(
        "ZeRO-2 against DeepSpeed ZeRO-2 and FSDP2 kept gathered",
        EAGER_LONG,
        ("zeroshard-2", "fsdp2-kept", "deepspeed-2"),
        (
            Requirement("zeroshard-2", "speed", 1.05, "deepspeed-2"),
            Requirement("zeroshard-2", "speed", 1.02, "fsdp2-kept"),
            *_MEMORY_KEPT,
        ),
    ),
    "stage2-compiled": Claim(
        "ZeRO-2 against FSDP2 kept gathered, blocks compiled",
        LONG,
        ("zeroshard-2", "fsdp2-kept"),
        (
            Requirement("zeroshard-2", "speed", 1.02, "fsdp2-kept"),
            *_MEMORY_KEPT,
        ),
    ),
    "budget": Claim(
        "an activation budget of auto against full checkpointing",
        BUDGET,
        ("zeroshard-3", _AUTO),
        (Requirement(_AUTO, "speed", 1.2, "zeroshard-3"),),
    ),
    "one-gpu": Claim(
        "one GPU against plain PyTorch",
        ONE_GPU,
        ("plain", "plain-master", "zeroshard-3"),
        tuple(
            Requirement("zeroshard-3", "speed", 0.99, name) for name in ("plain", "plain-master")
        ),
        ranks=(1,),
    ),
    "offload": Claim(
        "optimizer state and parameters in host memory, one GPU",
        OFFLOADED,
        (
            "zeroshard-2",
            _QUARTER_OFF,
            _STATE_OFF,
            _ALL_OFF,
            "fsdp2:offload=all",
            "deepspeed-2:offload=optimizer",
            "deepspeed-3:offload=all",
        ),
        (
            Requirement(_STATE_OFF, "speed", 1.6, "deepspeed-2:offload=optimizer"),
            Requirement(_ALL_OFF, "speed", 2.0, "deepspeed-3:offload=all"),
            Requirement(_QUARTER_OFF, "speed", 0.8, "zeroshard-2"),
            Requirement(_STATE_OFF, "pinned", 1.02),
            Requirement(_ALL_OFF, "pinned", 1.02),
        ),
        ranks=(1,),
    ),
    "offload-8b": Claim(
        "optimizer state in host memory against DeepSpeed ZeRO-3",
        replace(EAGER_LONG, warmup=2),
        ("zeroshard-3", "zeroshard-3:offload=optimizer", "deepspeed-3:offload=optimizer"),
        (
            Requirement(
                "zeroshard-3:offload=optimizer", "speed", 1.8, "deepspeed-3:offload=optimizer"
            ),
            Requirement("zeroshard-3:offload=optimizer", "pinned", 1.02),
        ),
    ),
    "offload-nvme": Claim(
        "optimizer state in files against the bare disk",
        None,
        ("zeroshard-2", "zeroshard-3"),
        tuple(Requirement(f"zeroshard-{stage}", "disk", 0.85) for stage in (2, 3)),
        ranks=(1,),
        benchmark="disk",
    ),
    "offload-largest": Claim(
        "the largest model that trains",
        None,
        ("zeroshard-2", LARGEST_OFFLOADED),
        (Requirement(LARGEST_OFFLOADED, "parameters", 1.8, "zeroshard-2"),),
        ranks=(1,),
        benchmark="largest",
    ),
    "weak-scaling": Claim(
        "weak scaling from two GPUs to all",
        LONG,
        ("zeroshard-3",),
        (Requirement("zeroshard-3", "scaling", 0.97),),
        ranks=(2, ALL),
    ),
    "qlora": Claim(
        "QLoRA against DDP and DeepSpeed ZeRO-3",
        None,
        ("ddp", "zeroshard-2", "zeroshard-3", "deepspeed-3"),
        (
            Requirement("zeroshard-3", "speed", 0.9, "ddp"),
            Requirement("zeroshard-3", "speed", 2.2, "deepspeed-3"),
        ),
        ranks=(2,),
        benchmark="qlora",
    ),
    "overhead": Claim(
        "hooks over 1,000 small parameters against plain PyTorch",
        None,
        ("plain", "zeroshard-0", "zeroshard-1", "zeroshard-2", "zeroshard-3"),
        tuple(Requirement(f"zeroshard-{stage}", "speed", 0.9, "plain") for stage in (1, 2, 3)),
        ranks=(1,),
        benchmark="overhead",
    ),
}


_OF_GPUS = ("allocated", "reserved")
# Why there may be no figure although the engine ran.
_WITHOUT = {
    "hidden": "no profile with communication",
    "pinned": "nothing is page-locked",
    "disk": "nothing was read or written",
}


def judge(requirement: Requirement, records: Sequence[Record]) -> Verdict:
    """Compare a requirement with the records of one run."""
    ours = [each for each in records if each["engine"] == requirement.ours]
    peers = [each for each in records if each["engine"] == requirement.peer]
    most = max((each["ranks"] for each in records), default=0)
    asked = requirement.bound_on(most)
    for label, found in ((requirement.ours, ours), (requirement.peer, peers)):
        failed = [each for each in found if each["status"] != "ok"]
        if label is not None and (failed or not found):
            why = failed[0]["status"] if failed else "not run"
            return Verdict(requirement, asked, None, f"{label}: {why}")
    if requirement.figure == "scaling" and len({each["ranks"] for each in ours}) < 2:
        return Verdict(requirement, asked, None, "one number of ranks only")
    figures = [each["result"] for each in (*ours, *peers)]
    if requirement.figure in _OF_GPUS and any(each["allocated_gib"] is None for each in figures):
        return Verdict(requirement, asked, None, "no GPU")
    measured = _measured(requirement, ours, peers)
    return Verdict(requirement, asked, measured, _WITHOUT.get(requirement.figure, ""))


def _hidden(result: Record) -> float | None:
    return result.get("profile", {}).get("hidden", {}).get("both")


def _pinned(result: Record) -> float | None:
    """Page-locked bytes over bytes of state, on the rank where that is most."""
    found = [each for each in result.get("off_device", ()) if each and each["pinned_bytes"]]
    return max((each["pinned_bytes"] / each["state_bytes"] for each in found), default=None)


_ALONE: Mapping[str, Callable[[Record], float | None]] = {
    "hidden": _hidden,
    "pinned": _pinned,
    "reserved": lambda mine: mine["reserved_gib"] / mine["allocated_gib"],
    "disk": lambda mine: mine["disk_ratio"],
}
_OVER_A_PEER: Mapping[str, Callable[[Record, Record], float]] = {
    "speed": lambda mine, theirs: theirs["median_s"] / mine["median_s"],
    "allocated": lambda mine, theirs: mine["allocated_gib"] / theirs["allocated_gib"],
    "parameters": lambda mine, theirs: mine["parameters"] / theirs["parameters"],
}


def _measured(
    requirement: Requirement, ours: Sequence[Record], peers: Sequence[Record]
) -> float | None:
    mine = max(ours, key=lambda each: each["ranks"])["result"]
    if requirement.figure == "scaling":
        fewest = min(ours, key=lambda each: each["ranks"])["result"]
        return fewest["median_s"] / mine["median_s"]
    if requirement.figure in _ALONE:
        return _ALONE[requirement.figure](mine)
    return _OVER_A_PEER[requirement.figure](mine, peers[0]["result"])
