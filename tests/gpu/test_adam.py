"""Runs tests/gpu/adam_checks.py on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gpu.test_gpus import with_gpus

CHECKS = Path(__file__).with_name("adam_checks.py")


@pytest.mark.gpu
@pytest.mark.timeout(400)
def test_the_triton_kernel_steps_as_torch_does_and_makes_the_host_wait_for_nothing() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, str(CHECKS)],
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
        env=with_gpus(),
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line for line in lines if not line["ok"]] == []
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert len(lines) >= 4
