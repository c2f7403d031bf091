"""Runs tests/gpu/slab_checks.py on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gpu.test_gpus import with_gpus

CHECKS = Path(__file__).with_name("slab_checks.py")


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_host_memory_is_page_locked_copied_asynchronously_and_left_in_order() -> None:
    done = subprocess.run(
        [sys.executable, str(CHECKS)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=with_gpus(),
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line for line in lines if not line["ok"]] == []
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert len(lines) == 4
