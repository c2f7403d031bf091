from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeroshard.errors import UsageError
from zeroshard.launch.hosts import choose, parse_hostfile


def test_a_hostfile_has_hosts_slots_comments_and_blank_lines() -> None:
    text = "# the pool\n\nworker-1 slots=4  # the second\nlocalhost   slots = 8\n"
    assert parse_hostfile(text, "hosts") == {"worker-1": 4, "localhost": 8}


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", socket.gethostname()])
def test_this_host_is_known_by_all_its_names(name: str) -> None:
    assert parse_hostfile(f"{name} slots=2", "hosts") == {"localhost": 2}
    assert choose({"localhost": 2}, include=f"{name}:1") == (1,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("localhost slots=1\n127.0.0.1 slots=2", "hosts, line 2: '127.0.0.1' names a host that an"),
        ("worker-0 4", "hosts, line 1: 'worker-0 4' is not a host and its number of slots"),
        ("worker-0 slots=0", "is not a host and its number of slots"),
        ("worker-0 slots=four", "is not a host and its number of slots"),
        ("# nothing\n", "hosts names no host"),
    ],
)
def test_a_bad_hostfile_is_refused_with_file_and_line(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_hostfile(text, "hosts")


POOL = {"localhost": 4, "worker-1": 4}


@pytest.mark.parametrize(
    ("include", "exclude", "slots"),
    [
        ("localhost", "", (0, 1, 2, 3)),
        ("localhost:2,0", "", (0, 2)),
        ("localhost:1@localhost:3", "", (1, 3)),
        ("localhost:1, 1", "", (1,)),
        ("", "worker-1", (0, 1, 2, 3)),
        ("", "worker-1@localhost:0,3", (1, 2)),
        ("", "localhost:1@worker-1:0,1,2,3", (0, 2, 3)),
    ],
)
def test_slots_are_chosen_in_deepspeeds_notation(
    include: str, exclude: str, slots: tuple[int, ...]
) -> None:
    assert choose(POOL, include=include, exclude=exclude) == slots


@given(st.sets(st.integers(0, 7), min_size=1, max_size=7))
def test_including_some_is_excluding_the_others(chosen: set[int]) -> None:
    others = set(range(8)) - chosen
    pool = {"localhost": 8}
    include = f"localhost:{','.join(map(str, chosen))}"
    exclude = f"localhost:{','.join(map(str, others))}"
    assert choose(pool, include=include) == choose(pool, exclude=exclude) == tuple(sorted(chosen))


def test_the_first_host_alone_may_be_this_one() -> None:
    assert choose(POOL, num_nodes=1) == (0, 1, 2, 3)
    with pytest.raises(UsageError, match="worker-1 would be used"):
        choose({"worker-1": 1, "localhost": 1}, num_nodes=1)


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("localhost", "localhost", "--include and --exclude exclude each other"),
        ("worker-2", "", "--include names the host 'worker-2'.*Did you mean 'worker-1'.*srun"),
        ("localhost:4", "", "--include localhost:4: there is no slot 4.*from 0 to 3"),
        ("localhost:0-2", "", "slot '0-2' is not a number.*one by one"),
        ("localhost:", "", "'localhost:' is not NAME or NAME:SLOT"),
        ("localhost@", "", "'' is not NAME or NAME:SLOT"),
        ("", "localhost:9", "--exclude localhost:9: there is no slot 9"),
        ("", "localhost@worker-1", "leaves nothing to run on.*4 slots on localhost, 4 slots on"),
        ("worker-1:0", "", "worker-1 would be used.*`--include localhost`.*srun.*torchrun"),
        ("", "", "worker-1 would be used"),
        ("", "localhost", "worker-1 would be used"),
    ],
)
def test_a_choice_that_cannot_be_launched_here_is_refused(
    include: str, exclude: str, message: str
) -> None:
    with pytest.raises(UsageError, match=f"(?s){message}"):
        choose(POOL, include=include, exclude=exclude)
