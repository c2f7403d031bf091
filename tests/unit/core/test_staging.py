"""Shards in files: what is read when, which buffers it takes, and that nothing is ever mixed up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from places import FilesByHand, PlainDepot, ThreadedFiles
from zeroshard.core.mesh import Axis, Mesh
from zeroshard.core.staging import FileStore, InFiles, Staging
from zeroshard.core.ticket import DONE, Ticket
from zeroshard.errors import OffloadError

PIECE = 1024  # elements of a buffer of 4096 bytes


def alone() -> Mesh:
    only = Axis(size=1, rank=0)
    return Mesh(only, only, control=None, device=torch.device("cpu"))


def staging_of(files: Any, count: int) -> Staging:
    return Staging(files, PlainDepot(), count=count, nbytes=PIECE * 4)


def filled(value: float, num_pieces: float = 1) -> Tensor:
    return torch.full((int(PIECE * num_pieces),), float(value))


def stores_by_hand(
    count: int, numbers: int, num_pieces: float = 1
) -> tuple[FilesByHand, Staging, list[FileStore]]:
    """Stores whose content is their number, and of which nothing moves by itself."""
    files = FilesByHand()
    staging = staging_of(files, count)
    stores: list[FileStore] = []
    for number in range(numbers):
        home = files.take(int(PIECE * num_pieces), torch.float32)
        home.fill_(number)
        stores.append(FileStore(home, staging, alone()))
    return files, staging, stores


def settle(staging: Staging) -> None:
    """Let the porters come to the end of what they were given."""
    for porter in staging._porters:
        porter.submit(lambda: None).result()


def fed(store: FileStore, num_pieces: float = 1) -> Tensor:
    into = filled(torch.nan, num_pieces)

    def gather(shard: Tensor) -> Ticket:
        assert shard is into
        return DONE

    store.feed(into, gather).wait()
    return into


def test_what_comes_is_read_ahead_as_far_as_there_are_buffers() -> None:
    files, staging, stores = stores_by_hand(count=2, numbers=4)
    staging.expect(stores[:3])
    settle(staging)
    assert len(files.jobs) == 2
    assert not stores[0].is_at_hand
    files.end()
    files.end()
    assert [store.is_at_hand for store in stores] == [True, True, False, False]
    assert torch.equal(fed(stores[0]), filled(0))
    assert not files.jobs  # it was not read again
    staging.expect(stores[1:])
    settle(staging)
    assert len(files.jobs) == 1  # for the buffer that came free
    files.end()
    assert [store.is_at_hand for store in stores] == [False, True, True, False]
    assert staging.nbytes == 2 * PIECE * 4


def test_a_wrong_guess_makes_room_for_what_is_wanted() -> None:
    files, staging, stores = stores_by_hand(count=1, numbers=2)
    staging.expect([stores[0]])
    settle(staging)
    staging.expect([stores[1]])
    assert len(files.jobs) == 1  # the second read waits for the first, which fills its buffer
    files.end()
    settle(staging)
    files.end()
    assert [store.is_at_hand for store in stores] == [False, True]
    assert torch.equal(fed(stores[1]), filled(1))


def test_a_read_waits_for_the_write_before_it_and_forgets_what_was_read_ahead() -> None:
    files, staging, stores = stores_by_hand(count=3, numbers=3)
    staging.expect(stores[:1])
    settle(staging)
    stores[0].write(filled(7)).wait()
    staging.expect(stores[:1])
    assert [kind for kind, *_ in files.jobs] == ["read"]
    files.end()
    staging._porters[1].submit(lambda: None).result()
    assert [kind for kind, *_ in files.jobs] == ["write"]
    files.end()
    settle(staging)
    assert [kind for kind, *_ in files.jobs] == ["read"]
    files.end()
    assert torch.equal(fed(stores[0]), filled(7))
    assert torch.equal(stores[0].home, filled(7))


def test_values_on_the_host_are_put_into_a_buffer_when_the_last_copy_out_of_it_is_over() -> None:
    files = ThreadedFiles()
    staging = staging_of(files, count=1)
    home = files.take(PIECE, torch.float32)
    store = FileStore(home.fill_(3), staging, alone())
    buffer = staging.fetch(store.shelf, 0)
    seen: list[Tensor] = []

    class Copy:
        def wait(self) -> None:
            """Only streams wait."""

        def synchronize(self) -> None:
            seen.append(buffer.of(home).clone())

    staging.hand_in(buffer, Copy())
    store.write(filled(7))
    assert torch.equal(seen[0], filled(3))
    assert torch.equal(store.home, filled(7))


def test_a_write_that_fails_is_told_to_whoever_looks_next() -> None:
    files, staging, stores = stores_by_hand(count=1, numbers=1)
    stores[0].write(filled(7)).wait()
    settle(staging)
    files.end(error=OffloadError("the drive is full"))
    with pytest.raises(OffloadError, match="the drive is full"):
        _ = stores[0].home


def test_a_gather_goes_on_without_what_could_not_be_read_and_its_store_says_why() -> None:
    files, staging, stores = stores_by_hand(count=1, numbers=1)
    staging.expect(stores)
    settle(staging)
    files.end(error=OffloadError("cut short"))
    fed(stores[0])  # other ranks are in it
    assert str(stores[0].failure) == "cut short"


steps = st.lists(
    st.one_of(
        st.tuples(st.just("expect"), st.lists(st.integers(0, 3), max_size=4)),
        st.tuples(st.just("feed"), st.integers(0, 3)),
        st.tuples(st.just("write"), st.integers(0, 3)),
        st.tuples(st.just("edit"), st.integers(0, 3)),
        st.tuples(st.just("drop"), st.integers(0, 3)),
    ),
    max_size=30,
)


@settings(deadline=None, max_examples=50)
@given(steps, st.integers(1, 4))
def test_a_gather_always_gets_what_was_written_last(plan: list[Any], count: int) -> None:
    staging = staging_of(ThreadedFiles(), count)
    place = InFiles(staging)
    # Of the four, one fits a buffer exactly, and two take several.
    widths = [0.5, 1, 2.5, 3]
    stores = [place.store(filled(0, width), alone()) for width in widths]
    wanted = [0] * len(stores)
    for number, (what, arg) in enumerate(plan, 1):
        if what == "expect":
            staging.expect([stores[at] for at in arg])
        elif what == "feed":
            assert torch.equal(fed(stores[arg], widths[arg]), filled(wanted[arg], widths[arg]))
        elif what == "drop":
            del stores[arg]
            stores.insert(arg, place.store(filled(number, widths[arg]), alone()))
            wanted[arg] = number
        else:
            wanted[arg] = number
            if what == "write":
                stores[arg].write(filled(number, widths[arg])).wait()
            else:
                home = stores[arg].home
                home.fill_(number)
                stores[arg].write(home).wait()
    for store, number, width in zip(stores, wanted, widths, strict=True):
        assert torch.equal(store.home, filled(number, width))
        assert torch.equal(fed(store, width), filled(number, width))
    staging.close()
    assert staging.nbytes == 0
    stores.clear()
    del store
    assert staging.files.nbytes == 0
