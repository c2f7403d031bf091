"""The order in which state that is off the device goes through its buffers."""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import Tensor

from places import ThreadedFiles
from zeroshard.core.mesh import Axis, Mesh
from zeroshard.core.slab import HostDepot
from zeroshard.errors import OffloadError
from zeroshard.optim import pipeline as module
from zeroshard.optim.carriers import Bus, Load, Slot
from zeroshard.optim.pipeline import Pipeline

NUMEL = 2048  # two pages of fp32


class Recorded(Bus):
    """Copies, and a list of what was copied which way."""

    def __init__(self, mesh: Mesh, journal: list[str], names: dict[Load, str]) -> None:
        super().__init__(mesh)
        self._journal, self._names = journal, names
        self.buffers: list[weakref.ref[Tensor]] = []
        self.fails_at: str | None = None

    def fetch(self, slot: Slot) -> None:
        assert slot.load is not None
        self._journal.append(f"fetch {self._names[slot.load]}")
        if all(slot.buffer is not known() for known in self.buffers):
            self.buffers.append(weakref.ref(slot.buffer))
        super().fetch(slot)

    def receive(self, slot: Slot) -> None:
        assert slot.load is not None
        if self._names[slot.load] == self.fails_at:
            raise OffloadError("the drive is gone")
        super().receive(slot)

    def send(self, slot: Slot, stepped: Any) -> None:
        assert slot.load is not None
        self._journal.append(f"send {self._names[slot.load]}")
        super().send(slot, stepped)

    @property
    def num_alive(self) -> int:
        return sum(buffer() is not None for buffer in self.buffers)


class Rig:
    """A pipeline over a few loads of ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_loads: int, num_buffers: int) -> None:
        alone = Axis(size=1, rank=0)
        self.mesh = Mesh(alone, alone, None, torch.device("cpu"))
        depot = HostDepot(self.mesh.device, pin=False, name="state")
        self.homes = [depot.take(NUMEL, torch.float32).fill_(1) for _ in range(num_loads)]
        self.loads = [Load(depot, (home,)) for home in self.homes]
        self.journal: list[str] = []
        names = {load: str(number) for number, load in enumerate(self.loads)}
        self.carrier = Recorded(self.mesh, self.journal, names)
        monkeypatch.setattr(module, "Bus", lambda mesh: self.carrier)
        self.pipeline = Pipeline(self.mesh, num_buffers)

    def visit(self, numbers: range) -> None:
        for number in numbers:
            with self.pipeline.visiting(self.loads[number]) as (tensor,):
                tensor.add_(1)

    def step(self) -> None:
        self.pipeline.start(list(self.loads))
        self.visit(range(len(self.loads)))
        self.pipeline.end()

    @property
    def values(self) -> list[float]:
        assert all(bool((home == home[0]).all()) for home in self.homes)
        return [home[0].item() for home in self.homes]


def test_loads_come_in_order_through_no_more_buffers_than_were_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(monkeypatch, num_loads=7, num_buffers=5)
    for wanted in (0, 2, 4, 5, 5):  # bit by bit, as far as the buffers go
        assert rig.journal == [f"fetch {number}" for number in range(wanted)]
        rig.pipeline.start(list(rig.loads))  # the next share, and the step, find what is on its way
        rig.pipeline.read_ahead(share=0.4)
    rig.visit(range(7))
    rig.pipeline.end()
    sent = [entry for entry in rig.journal if entry.startswith("send")]
    fetched = [entry for entry in rig.journal if entry.startswith("fetch")]
    assert sent == [f"send {number}" for number in range(7)]
    assert fetched == [f"fetch {number}" for number in range(7)]
    for number in range(5, 7):  # which take the buffers of those that have left
        assert rig.journal.index(f"fetch {number}") > rig.journal.index(f"send {number - 5}")
    assert len(rig.carrier.buffers) == 5
    assert rig.values == [2.0] * 7


def test_buffers_are_used_again_until_the_memory_is_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(monkeypatch, num_loads=6, num_buffers=4)
    for _ in range(3):
        rig.step()
    assert len(rig.carrier.buffers) == rig.carrier.num_alive == 4
    rig.pipeline.release()
    assert rig.carrier.num_alive == 0
    rig.pipeline.start(rig.loads)
    rig.pipeline.read_ahead(share=0.5)
    rig.pipeline.release()  # not now
    rig.visit(range(6))
    rig.pipeline.end()
    assert rig.values == [5.0] * 6
    rig.pipeline.close()
    assert rig.carrier.num_alive == 0


def test_nothing_that_was_read_ahead_survives_an_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, num_loads=5, num_buffers=4)
    rig.pipeline.start(rig.loads)
    rig.pipeline.read_ahead(share=1)
    rig.pipeline.forget()
    for home in rig.homes:
        home.fill_(10)
    rig.step()
    assert rig.values == [11.0] * 5


def test_an_edit_inside_a_step_reaches_what_is_still_to_be_stepped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(monkeypatch, num_loads=6, num_buffers=4)
    rig.pipeline.start(rig.loads)
    rig.visit(range(2))
    with rig.pipeline.visiting(rig.loads[2]) as (tensor,):
        rig.pipeline.forget()
        for home in rig.homes:
            home.fill_(10)
        tensor.add_(1)
    rig.visit(range(3, 6))
    rig.pipeline.end()
    assert rig.values == [10.0, 10.0, 2.0, 11.0, 11.0, 11.0]


@pytest.mark.parametrize("where", ["inside", "on its way"])
def test_a_load_that_fails_is_as_it_was_and_the_next_step_can_be_made(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(monkeypatch, num_loads=5, num_buffers=4)
    rig.pipeline.start(rig.loads)
    rig.visit(range(2))
    if where == "inside":
        with (
            pytest.raises(ZeroDivisionError),
            rig.pipeline.visiting(rig.loads[2]) as (tensor,),
        ):
            tensor.fill_(1 / 0)
    else:
        rig.carrier.fails_at = "2"
        with pytest.raises(OffloadError), rig.pipeline.visiting(rig.loads[2]):
            pass
    assert rig.values == [2.0, 2.0, 1.0, 1.0, 1.0]
    rig.pipeline.forget()
    rig.pipeline.release()
    assert rig.carrier.num_alive == 0
    if where == "on its way":
        rig.pipeline.start(rig.loads)
        rig.pipeline.read_ahead(share=1)
        rig.pipeline.forget()  # says nothing: whoever wants it hears of it
        rig.pipeline.start(rig.loads)
        rig.visit(range(2))
        with pytest.raises(OffloadError), rig.pipeline.visiting(rig.loads[2]):
            pass
        return
    rig.step()
    assert rig.values == [3.0, 3.0, 2.0, 2.0, 2.0]


def test_another_order_of_loads_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, num_loads=5, num_buffers=4)
    rig.pipeline.start(rig.loads)
    rig.pipeline.read_ahead(share=1)
    rig.loads.reverse()
    rig.homes.reverse()
    rig.step()
    assert rig.values == [2.0] * 5
    assert next(entry for entry in rig.journal if "send" in entry) == "send 4"


def test_a_step_without_loads_ends_though_others_were_read_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(monkeypatch, num_loads=6, num_buffers=4)
    rig.pipeline.start(rig.loads)
    rig.pipeline.read_ahead(share=1)
    rig.pipeline.start([])
    rig.pipeline.end()
    assert rig.values == [1.0] * 6


class LaggingFiles(ThreadedFiles):
    """Files in which the second write waits for a read after it, if one comes at once."""

    pin = False

    def __init__(self) -> None:
        super().__init__()
        self.has_read = threading.Event()

    def read(self, home: Tensor, into: Tensor) -> Future[None]:
        future = super().read(home, into)
        if self.num_writes:
            future.result()
            self.has_read.set()
        return future

    def write(self, home: Tensor, source: Tensor) -> Future[None]:
        if self.num_writes == 1:
            self.has_read.wait(timeout=0.1)
        return super().write(home, source)


def test_what_one_list_of_loads_writes_to_files_is_what_another_one_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "FileDepot", LaggingFiles)
    alone = Axis(size=1, rank=0)
    pipeline, depot = Pipeline(Mesh(alone, alone, None, torch.device("cpu")), 4), LaggingFiles()
    homes = [depot.take(NUMEL, torch.float32) for _ in range(2)]
    for _ in range(2):  # as when an optimizer has made its state, or another one steps
        homes.reverse()
        loads = [Load(depot, (home,)) for home in homes]
        pipeline.start(loads)
        for load in loads:
            with pipeline.visiting(load) as (tensor,):
                tensor.add_(1)
        pipeline.end()
    pipeline.close()
    assert all(home.eq(2).all() for home in homes)
