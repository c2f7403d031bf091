from __future__ import annotations

from pathlib import Path

import pytest

from zeroshard.errors import UsageError
from zeroshard.host.cpus import numa_node, parse_list


def test_lists_of_cores_have_numbers_and_ranges() -> None:
    assert parse_list("0-3, 7,2\n") == {0, 1, 2, 3, 7}


@pytest.mark.parametrize("text", ["", "1,", "a", "3-1", "1-", "-1"])
def test_other_lists_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a number or a range"):
        parse_list(text)


def test_the_numa_node_of_a_gpu_is_the_one_of_its_pci_address(tmp_path: Path) -> None:
    for address, node in (("0000:3b:00.0", "1"), ("0000:af:00.0", "-1")):
        (tmp_path / address).mkdir()
        (tmp_path / address / "numa_node").write_text(node + "\n")
    assert numa_node("00000000:3B:00.0", tmp_path) == 1
    assert numa_node("00000000:AF:00.0", tmp_path) is None  # what a host says that does not know
    assert numa_node("00000000:01:00.0", tmp_path) is None
