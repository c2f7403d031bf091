from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeroshard.errors import UsageError
from zeroshard.launch.cores import Core, assign, read_cores


def host(*sizes: int) -> list[Core]:
    """Describe nodes of as many cores, two hardware threads each, numbered as Linux does."""
    nodes = [node for node, size in enumerate(sizes) for _ in range(size)]
    return [Core((number, number + len(nodes)), node) for number, node in enumerate(nodes)]


HOSTS = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(lambda sizes: host(*sizes))


@given(st.data(), HOSTS)
def test_shares_are_disjoint_equal_and_never_span_nodes(data: st.DataObject, cores: list) -> None:
    nodes = st.none() | st.integers(0, 5)
    near = data.draw(st.lists(nodes, min_size=1, max_size=len(cores)))
    shares = assign(cores, near)
    given_out = [core for share in shares for core in share]
    assert len(shares) == len(near)
    assert len(set(given_out)) == len(given_out)
    assert set(given_out) <= set(cores)
    assert len({len(share) for share in shares}) == 1
    assert all(len({core.node for core in share}) == 1 for share in shares)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.integers(1, 8))
def test_equal_nodes_are_used_up_to_what_cannot_be_divided(
    num_nodes: int, ranks_per_node: int, rest: int, share: int
) -> None:
    cores = host(*[ranks_per_node * share + rest % ranks_per_node] * num_nodes)
    shares = assign(cores, [None] * (num_nodes * ranks_per_node))
    assert {len(own) for own in shares} == {share}


@given(st.lists(st.integers(0, 2), min_size=1, max_size=6))
def test_a_rank_is_on_the_node_of_its_gpu_where_there_is_room(near: list[int]) -> None:
    shares = assign(host(6, 6, 6), near)
    assert [share[0].node for share in shares] == near


@pytest.mark.parametrize(
    ("sizes", "near", "numbers"),
    [
        ((4, 4), [1, 0], [(4, 5, 6, 7), (0, 1, 2, 3)]),
        ((4, 4), [None, None, None], [(0, 1), (2, 3), (4, 5)]),
        ((5, 3), [None, None], [(0, 1, 2), (5, 6, 7)]),
        ((1, 3), [0, 0], [(0,), (1,)]),  # no room near both
        ((2, 2), [7, 7], [(0, 1), (2, 3)]),  # a node this process may not use
        ((8, 8), [1], [tuple(range(8, 16))]),
    ],
)
def test_shares_by_example(
    sizes: tuple[int, ...], near: list[int | None], numbers: list[tuple[int, ...]]
) -> None:
    assert [
        tuple(core.cpus[0] for core in share) for share in assign(host(*sizes), near)
    ] == numbers


def test_more_ranks_than_cores_are_refused_with_both_numbers() -> None:
    with pytest.raises(UsageError, match="3 ranks cannot be bound to 2 CPU cores"):
        assign(host(2), [None] * 3)


def test_a_host_is_read_with_its_nodes_and_hardware_threads(tmp_path: Path) -> None:
    for node, cpus in ((0, "0-1,4-5"), (1, "2-3,6-7"), (2, "")):
        folder = tmp_path / f"node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cpus + "\n")
    for cpu in range(8):
        folder = tmp_path / f"cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    assert read_cores({0, 1, 2, 4, 5, 7}, tmp_path) == [
        Core((0, 4), 0),
        Core((1, 5), 0),
        Core((2,), 1),
        Core((7,), 1),
    ]


def test_a_host_that_does_not_describe_itself_has_one_node(tmp_path: Path) -> None:
    assert read_cores({3, 1}, tmp_path) == [Core((1,), 0), Core((3,), 0)]
