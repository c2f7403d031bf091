"""Where offloaded state is stepped: times out of rates, threads out of CPUs, and the choice."""

from __future__ import annotations

import gc
import logging
import os
import threading
from unittest import mock

import pytest
import torch

from unit.engine.small import make, on_ranks
from zeroshard.optim import update_choice
from zeroshard.optim.host_update import Worker
from zeroshard.optim.update_choice import Rates, Seconds, num_threads, seconds

H200 = Rates(bus=50e9, adam=4.7e9)


def test_a_step_on_the_device_takes_the_way_of_12_bytes_and_one_on_the_host_its_own_time() -> None:
    found = seconds(H200)
    assert found.device == pytest.approx(0.24)
    assert found.host == pytest.approx(1 / 4.7)


def test_what_is_read_ahead_in_backward_costs_the_device_nothing() -> None:
    assert seconds(H200, ahead=0.5).device == pytest.approx(0.12)
    assert seconds(H200, ahead=1.0).device == 0


def test_on_a_slow_bus_the_host_waits_for_its_weights() -> None:
    assert seconds(Rates(bus=1e9, adam=5e9), weight_bytes=4).host == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("device", "host", "runs_on", "prefers"),
    [
        (0.24, 0.24, True, False),
        (0.24, 0.22, True, False),  # near enough to be chance
        (0.24, 0.20, True, True),
        (0.24, 0.20, False, False),  # forward hides some of the device's way, and none of this
        (0.50, 0.20, False, True),
    ],
)
def test_the_host_is_preferred_where_it_is_clearly_faster(
    device: float, host: float, runs_on: bool, prefers: bool
) -> None:
    assert Seconds(device, host).prefers_host(runs_on=runs_on) == prefers


def cpus(*numbers: int) -> frozenset[int]:
    return frozenset(numbers)


def test_ranks_of_a_host_have_no_more_threads_than_it_has_cpus() -> None:
    every = frozenset(range(16))
    assert num_threads(every, [every], None, None) == 15  # one is left to the program
    assert num_threads(every, [every] * 8, None, None) == 2
    assert num_threads(every, [every] * 32, None, None) == 1
    near, far = frozenset(range(8)), frozenset(range(8, 16))
    assert num_threads(near, [near, far], None, None) == 7  # a launcher has divided them
    assert num_threads(near, [near, near, far], None, None) == 3
    assert num_threads(cpus(0, 1, 2, 3), [cpus(0, 1, 2, 3), cpus(2, 3)], None, 1.0) == 3


def test_a_container_and_the_configuration_limit_threads() -> None:
    every = frozenset(range(64))
    assert num_threads(every, [every] * 2, 16.0, None) == 7
    assert num_threads(every, [every], None, 0.5) == 32
    assert num_threads(every, [every] * 64, None, 0.1) == 1


@on_ranks(1)
def test_the_worker_has_threads_and_cpus_of_its_own_and_others_keep_theirs() -> None:
    first = frozenset([min(os.sched_getaffinity(0))])
    worker, before = Worker(first, 3), os.sched_getaffinity(0)
    assert worker.submit(torch.get_num_threads).result() == 3
    assert worker.submit(lambda: os.sched_getaffinity(0)).result() == first
    assert os.sched_getaffinity(0) == before
    assert torch.get_num_threads() == 1
    other = Worker(first, 2)
    assert other.submit(torch.get_num_threads).result() == 2
    assert worker.submit(torch.get_num_threads).result() == 3
    worker.close()
    (thread,) = [each for each in threading.enumerate() if "zeroshard-update" in each.name]
    del other  # nobody has ended it
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def offloaded(stage: int = 3, **extension: object) -> object:
    offload = {"device": "cpu", "cpuadam_cores_perc": 0.1}
    zero = {"stage": stage, "offload_optimizer": offload}
    adam = {"type": "AdamW", "params": {"lr": 0.1}}
    return make(stage, optimizer=adam, zero_optimization=zero, zeroshard=extension)._sharded._host


@on_ranks(2)
def test_all_ranks_choose_by_the_slowest_and_say_both_figures(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rank = int(os.environ["RANK"])

    def crosses(*_: object) -> mock.Mock:
        return mock.Mock(both_ways=(200e9, 4e9)[rank])

    for least, where in ((1e9, "host"), (1e6, "GPU")):
        rates = (least, 5e9)
        with (
            mock.patch.object(update_choice, "bus", crosses),
            mock.patch.object(update_choice, "_adam_rate", lambda rates=rates: rates[rank]),
            mock.patch.object(update_choice, "_is_the_host", lambda _: False),
            mock.patch.object(update_choice, "_BUFFER_BYTES", 0),
            caplog.at_level(logging.INFO, "zeroshard"),
        ):
            host = offloaded()
        assert (host is not None) == (where == "host")
        (said,) = [line for line in caplog.messages if line.startswith("the update")]
        device, on_host = 12e9 / 2e9, max(4e9 / 2e9, 1e9 / least)
        assert said.startswith(
            f"the update of offloaded state runs on the {where}: {device:.2f} s per billion "
            f"parameters on the GPU, {on_host:.2f} s on the host"
        )
        caplog.clear()


@on_ranks(1)
def test_nothing_is_tried_where_memory_for_gradients_would_be_short(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with (
        mock.patch.object(update_choice, "bytes_free", lambda: 100),
        mock.patch.object(update_choice, "_is_the_host", lambda _: False),
        mock.patch.object(update_choice, "bus", side_effect=AssertionError),
        caplog.at_level(logging.INFO, "zeroshard"),
    ):
        assert offloaded() is None
    said = "the update of offloaded state runs on the GPU: host memory is short"
    assert said in caplog.messages


@on_ranks(1)
def test_nothing_is_tried_where_the_device_where_the_device_is_the_host() -> None:
    with mock.patch.object(update_choice, "bus", side_effect=AssertionError):
        assert offloaded() is None
        assert offloaded(offload_update="gpu") is None
        assert offloaded(offload_update="cpu") is not None


@on_ranks(2)
def test_replicas_on_cpus_of_different_kinds_are_stepped_on_the_device(
    caplog: pytest.LogCaptureFixture,
) -> None:
    kind = ("AVX2", "AVX512")[int(os.environ["RANK"])]
    with (
        mock.patch.object(torch.backends.cpu, "get_cpu_capability", lambda: kind),
        caplog.at_level(logging.WARNING, "zeroshard"),
    ):
        assert offloaded(stage=0, offload_update="cpu") is None
        assert offloaded(stage=3, offload_update="cpu") is not None
    assert "with the same weights differ" in "".join(caplog.messages)
