from __future__ import annotations

from pathlib import Path

import pytest

from zeroshard.errors import UsageError
from zeroshard.launch.gpus import numa_node, select

UUIDS = ["GPU-aa11", "GPU-ab22", "GPU-cc33"]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (None, [("0", 0), ("1", 1), ("2", 2)]),
        ("2,0", [("2", 2), ("0", 0)]),
        (" 1 , 2", [("1", 1), ("2", 2)]),
        ("GPU-cc33,GPU-aa", [("GPU-cc33", 2), ("GPU-aa", 0)]),
        ("-1", []),
        ("NoDevFiles", []),
        ("1,-1,2", [("1", 1)]),
        ("", []),
    ],
)
def test_names_of_visible_gpus_are_read_as_cuda_reads_them(
    names: str | None, found: list[tuple[str, int]]
) -> None:
    assert select(names, UUIDS) == found


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("0,3", "CUDA_VISIBLE_DEVICES=0,3 names GPU 3, but this host has 3 GPUs and none"),
        ("GPU-zz", "names GPU GPU-zz, but this host has 3 GPUs and none of that name"),
        ("GPU-a", "more than one of that name"),
        ("1,GPU-ab22", "names GPU 1 twice"),
    ],
)
def test_names_that_cuda_would_drop_silently_are_refused(names: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        select(names, UUIDS)


def test_the_numa_node_of_a_gpu_is_the_one_of_its_pci_address(tmp_path: Path) -> None:
    for address, node in (("0000:3b:00.0", "1"), ("0000:af:00.0", "-1")):
        (tmp_path / address).mkdir()
        (tmp_path / address / "numa_node").write_text(node + "\n")
    assert numa_node("00000000:3B:00.0", tmp_path) == 1
    assert numa_node("00000000:AF:00.0", tmp_path) is None  # what a host says that does not know
    assert numa_node("00000000:01:00.0", tmp_path) is None
