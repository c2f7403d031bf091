"""The ways to gather and to reduce that the benchmark times on CPU ranks move the right values."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from forked import run_ranks
from zeroshard.core.mesh import build_mesh

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))


def test_pushes_pulls_with_and_without_the_own_shard_and_reductions_are_right() -> None:
    def measure(rank: int, world: int) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        import gathers  # in the child: it sets variables of the environment

        mesh = build_mesh(world, torch.device("cpu"))
        size = gathers.even(1 << 14, mesh)
        bench = gathers.Bench(mesh, size, "")
        found = {name: bench.try_out(name, make) for _, name, make in bench.plan([size])}
        bench.slab = bench.turns = None
        mesh.destroy()
        return found, bench.problems

    for found, problems in run_ranks(measure, 2):
        assert not problems
        kinds = {name.removesuffix(", float32").removesuffix(", bfloat16") for name in found}
        assert {"gloo", "gloo in place", "pull", "pull without own", "push"} <= kinds
        assert {"reduce pulled, copy engines", "reduce pulled, direct"} <= kinds
        assert all(each["right"] and each["rate_gb_s"] > 0 for each in found.values()), found
