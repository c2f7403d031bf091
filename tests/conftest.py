"""Settings every test shares: CPU ranks of one thread each, and quick properties.

On a host with GPUs, too, all ranks are CPU ranks, but for those of the tests marked ``gpu``: these
start processes of their own and give them back what ``CUDA_VISIBLE_DEVICES`` was.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

# Ranks are forked, and a process that has initialised CUDA cannot fork; ask the driver library.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# The processes of xdist run this again, with the environment that the first one left.
if "TEST_GPUS" not in os.environ:
    os.environ["TEST_GPUS"] = str(torch.cuda.device_count())
    os.environ["TEST_GPUS_VISIBLE"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

settings.register_profile(
    "ci",
    deadline=None,
    max_examples=50,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("long", parent=settings.get_profile("ci"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _same_random_numbers_in_every_run() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _messages_go_where_they_went_before() -> Iterator[None]:
    """An engine made in the test's own process shows messages from then on."""
    logger = logging.getLogger("zeroshard")
    level, handlers = logger.level, [*logger.handlers]
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if int(os.environ["TEST_GPUS"]):
        return
    skip = pytest.mark.skip(reason="no CUDA device is visible")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
