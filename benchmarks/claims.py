"""Measures claims: `python benchmarks/claims.py long short`, or all of them without a name.

Each claim is a workload, engines side by side, and the ratios that are asked for, which are printed
beside the measured ones. Options after `--` go to the benchmark, as in `claims.py long -- --profile
all`. On a host without GPUs, they run at toy size, and no name means the engines only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from side_by_side.claims import ALL, CLAIMS
from zeroshard.launch.gpus import visible_gpus

FOLDER = Path(__file__).resolve().parent
TOYS = {
    "train_step": ("--model", "tiny", "--batch", "2", "--seq", "64", "--no-compile"),
    "qlora": ("--size", "toy"),
    "overhead": (),
    "disk": ("--toy",),
    "largest": ("--toy",),
}
STARTS_RANKS = ("largest",)  # by itself, as train_step does


def commands(names: Sequence[str], gpus: int) -> list[list[str]]:
    """Return the command lines that measure claims on a host with so many GPUs.

    Those about training steps share one, because ranks take long to start.
    """
    steps = [name for name in names if CLAIMS[name].workload is not None]
    toys = {} if gpus else TOYS
    script = str(FOLDER / "train_step.py")
    together = [sys.executable, script, "--claim", ",".join(steps), *toys.get("train_step", ())]
    found = [together] if steps else []
    for claim in (CLAIMS[name] for name in names if name not in steps):
        ranks = (gpus or 2) if claim.ranks[0] == ALL else claim.ranks[0]
        launcher = ["-m", "zeroshard", "--quiet", "--num_gpus", str(ranks)]
        script = [str(FOLDER / f"{claim.benchmark}.py"), *toys.get(claim.benchmark, ())]
        by = () if claim.benchmark in STARTS_RANKS else launcher
        found.append([sys.executable, *by, *script])
    return found


def engines_only() -> list[list[str]]:
    """Return the command lines of no claim, for a host without GPUs."""
    scripts = ("train_step.py", "overhead.py")
    return [[sys.executable, str(FOLDER / script)] for script in scripts]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark after another; the status is that of the first that failed."""
    names = ", ".join(CLAIMS)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog=f"names: {names}")
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[[], *CLAIMS])
    given = list(sys.argv[1:] if argv is None else argv)
    cut = given.index("--") if "--" in given else len(given)
    args, rest = parser.parse_args(given[:cut]), given[cut + 1 :]
    gpus = len(visible_gpus(os.environ))
    wanted = args.names or (list(CLAIMS) if gpus else [])
    env = os.environ | {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
    statuses: list[int] = []
    for each in commands(wanted, gpus) or engines_only():
        print("+", " ".join([*each, *rest]), flush=True)
        statuses.append(subprocess.run([*each, *rest], env=env, check=False).returncode)
    return next((status for status in statuses if status), 0)


if __name__ == "__main__":
    sys.exit(main())
