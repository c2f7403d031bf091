from __future__ import annotations

import pytest

from zeroshard.errors import UsageError
from zeroshard.launch.gpus import select

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
