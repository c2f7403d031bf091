"""How many bytes blocks may keep, by what the allocator of a device says."""

from __future__ import annotations

from zeroshard.engine.budget import Shape
from zeroshard.engine.meter import Memory
from zeroshard.engine.space import Measured

SMALL: Shape = ((100, 10),)
LARGE: Shape = ((1000, 100),)
STAYS, LIMIT = 50, 1000


class Device:
    """An allocator in which a pass takes a tenth of its elements beside what its blocks keep."""

    def __init__(self) -> None:
        self.peak = STAYS
        self.num_shortages = 0

    def read(self) -> Memory:
        return Memory(STAYS, self.peak, self.num_shortages)

    def restart(self) -> None:
        self.peak = STAYS

    def limit(self) -> int:
        return LIMIT


def run(space: Measured, device: Device, shape: Shape, kept: int | None = None) -> int:
    """A pass that keeps what it may; says how much that was."""
    space.begin()
    room = space.room(shape, 0)
    kept = room if kept is None else kept
    device.peak = max(device.peak, STAYS + shape[0][0] // 10 + kept)
    space.end(shape, kept)
    return room


def settled() -> tuple[Measured, Device]:
    device = Device()
    space = Measured(device, lambda room: room)
    while not space.is_settled:
        run(space, device, SMALL)
        space.end_step()
    return space, device


def test_a_much_larger_pass_is_measured_by_itself_whatever_comes_before_and_after_it() -> None:
    space, device = settled()
    assert run(space, device, SMALL) == LIMIT - STAYS - 10
    assert run(space, device, LARGE) == 0
    space.end_step()
    for _ in range(3):
        assert run(space, device, SMALL) == LIMIT - STAYS - 10
        space.end_step()
    assert space.is_settled
    assert run(space, device, LARGE) == LIMIT - STAYS - 100


def test_memory_that_is_given_back_while_the_number_of_blocks_grows_does_not_end_that() -> None:
    device = Device()
    space = Measured(device, lambda room: room)
    while not space.is_settled:
        run(space, device, SMALL)
        device.num_shortages += 1
        assert not space.end_step()
    run(space, device, SMALL)
    device.num_shortages += 1
    assert space.end_step()
    run(space, device, SMALL)
    assert not space.end_step()


def test_running_out_of_memory_is_answered_once() -> None:
    space, device = settled()
    run(space, device, SMALL)
    device.num_shortages += 2
    space.fail()
    run(space, device, SMALL)
    assert not space.end_step()
