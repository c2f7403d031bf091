"""What the allocator of a GPU is asked for, as far as that can be said without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from zeroshard.engine.meter import Memory, meter_of

GPU = torch.device("cuda", 1)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that were made, with answers of an allocator that runs short of memory."""
    calls: list[str] = []
    answers: dict[str, Any] = {
        "memory_stats_as_nested_dict": {
            "allocated_bytes": {"all": {"current": 30, "peak": 70}},
            "num_alloc_retries": 2,
            "num_ooms": 1,
        },
        "reset_peak_memory_stats": None,
        "mem_get_info": (400, 1000),
        "memory_reserved": 100,
        "get_per_process_memory_fraction": 1.0,
    }
    for name, answer in answers.items():

        def call(device: torch.device, name: str = name, answer: Any = answer) -> Any:
            assert device == GPU
            calls.append(name)
            return answer

        monkeypatch.setattr(torch.cuda, name, call, raising=False)
    return calls


def test_a_gpu_tells_what_is_allocated_its_peak_and_how_often_it_ran_short(
    asked: list[str],
) -> None:
    meter = meter_of(GPU)
    assert meter is not None
    assert meter.read() == Memory(allocated=30, peak=70, shortages=3)
    assert asked == ["memory_stats_as_nested_dict"]
    meter.restart()
    assert asked[-1] == "reset_peak_memory_stats"


def test_the_limit_is_nine_tenths_of_what_others_leave_and_a_fraction_allows(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = meter_of(GPU)
    assert meter is not None
    assert meter.limit() == 450
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 0.25)
    assert meter.limit() == 225
    monkeypatch.delattr(torch.cuda, "get_per_process_memory_fraction")
    assert meter.limit() == 450


def test_the_memory_of_a_cpu_is_not_measured() -> None:
    assert meter_of(torch.device("cpu")) is None
