"""`zeroshard io-bench` where there are GPUs: page-locked copies run at the rate of a bus."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpu.test_gpus import with_gpus


@pytest.mark.gpu
def test_copies_both_ways_at_once_are_faster_than_pageable_memory_would_allow(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-m", "zeroshard", "io-bench", str(tmp_path), "--json"]
    options = ["--size", "0.25", "--seconds", "0.3", "--block-size", "16", "--depth", "8"]
    done = subprocess.run(
        [*command, *options],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        env=with_gpus(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    gpus = [bus["gpus"] for bus in found["rates"]["bus"]]
    assert gpus in ([1], [1, int(os.environ["TEST_GPUS"])])
    alone = found["rates"]["bus"][0]
    # Copies of pageable memory go through one buffer of the driver, one direction at a time.
    assert alone["to_gpu_bytes_per_second"] > 15e9
    assert alone["to_host_bytes_per_second"] > 15e9
    assert alone["both_ways_bytes_per_second"] > 1.3 * alone["to_gpu_bytes_per_second"]
    assert all(model["bus_seconds"] for model in found["models"])
    assert list(tmp_path.iterdir()) == []
