"""Print the table of tests/compat/golden.py as the installed package `deepspeed` computes it.

It takes DeepSpeed itself in an environment of its own, with torch for CPUs, transformers and
accelerate of the versions that constraints.txt names:

    DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed==0.19.8
    DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR=$(mktemp -d) torchrun --nproc_per_node 2 \
        tools/measure_golden.py
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from compat.golden import Recipe, run


def main() -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    combinations = itertools.product(
        ("fp32", "bf16"), range(4), ((), ("optimizer",), ("scheduler",), ("optimizer", "scheduler"))
    )
    for dtype, stage, blocks in combinations:
        recipe = Recipe(stage, dtype, blocks)
        log = run(recipe)
        if os.environ.get("RANK", "0") == "0":
            print(f"{(world, dtype, stage, blocks)}: {log},", flush=True)


if __name__ == "__main__":
    main()
