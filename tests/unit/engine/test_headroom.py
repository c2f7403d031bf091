"""Hosts and drives without room are an error on every rank, before anything is moved."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from forked import run_ranks
from zeroshard.core.mesh import build_mesh
from zeroshard.engine.headroom import Claim, Folder, check_room
from zeroshard.errors import OffloadError

GIB = 2**30
KEY = "zero_optimization.offload_optimizer.nvme_path"


def verdicts(*claims: Claim, free: int | None = 100 * GIB) -> list[str]:
    """What each rank is told of the claims of all."""

    def rank(rank: int, world: int) -> str:
        mesh = build_mesh(world, torch.device("cpu"))
        try:
            check_room(claims[rank], mesh, lambda: None if free is None else free + rank)
        except OffloadError as error:
            return str(error)
        return ""

    return run_ranks(rank, len(claims))


def agreed(texts: list[str]) -> str:
    (text,) = set(texts)
    return text


def test_ranks_of_one_host_share_its_memory() -> None:
    assert agreed(verdicts(Claim(60 * GIB), Claim(40 * GIB))) == ""
    # They look one after another, and one may see a byte more than the other.
    text = agreed(verdicts(Claim(60 * GIB), Claim(40 * GIB + 1)))
    assert text.startswith(
        "ranks 0, 1 would keep 100.0 GiB more in the memory of their host, and 100.0 GiB are free"
    )
    assert '\n\nhint: offload less with "ratio" or "gpu_budget"' in text


def test_what_is_given_back_counts_and_an_unknown_limit_does_not() -> None:
    assert agreed(verdicts(Claim(60 * GIB, returned_bytes=GIB), Claim(41 * GIB))) == ""
    assert agreed(verdicts(Claim(60 * GIB), Claim(41 * GIB), free=None)) == ""


def test_a_folder_that_is_missing_on_one_rank_is_named_on_all(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    # Ranks of several hosts have one path, which not all of them have made.
    both = [Claim(0, folders=[Folder(KEY, path, 1)]) for path in (str(tmp_path), missing)]
    told = verdicts(*both)
    assert all("rank 1 cannot make files: No such file or directory." in text for text in told)
    assert all(text.startswith(f"{KEY} is ") for text in told)
    assert "\n\nhint: make that folder on every host" in told[0]


def test_a_file_is_no_folder_and_what_asks_for_nothing_needs_none(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    text = agreed(verdicts(Claim(0, folders=[Folder(KEY, str(path), 1)])))
    assert f"{KEY} is {str(path)!r}, where rank 0 cannot make files: Not a directory." in text
    assert agreed(verdicts(Claim(0, folders=[Folder(KEY, str(path), 0)]))) == ""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_nobody_may_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    text = agreed(verdicts(Claim(0, folders=[Folder(KEY, str(tmp_path), 1)])))
    assert "Permission denied" in text


def test_files_of_all_ranks_share_their_drive(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    (tmp_path / "two").mkdir()
    other = KEY.replace("optimizer", "param")
    folders = [
        Folder(KEY, str(tmp_path), free // 3),
        Folder(other, str(tmp_path / "two"), free // 3),
    ]
    assert agreed(verdicts(Claim(0, folders=folders))) == ""
    text = agreed(verdicts(Claim(0, folders=folders), Claim(0, folders=folders)))
    assert text.startswith("ranks 0, 1 would keep ")
    assert f"in files in {tmp_path} ({KEY}) and {tmp_path / 'two'} ({other}), and " in text
    assert "are free there.\n\nhint: free space on that drive" in text
