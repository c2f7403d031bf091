from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from zeroshard.checkpoint.tensors import TensorFile, dtype_named, name_of_dtype, write_tensors
from zeroshard.errors import CheckpointError

TENSORS = {
    "matrix": torch.arange(12.0).view(3, 4).t(),
    "half": torch.randn(5).bfloat16(),
    "flags": torch.tensor([True, False, True]),
    "count": torch.tensor(7),
    "nothing": torch.empty(0, 3),
    "bytes": torch.arange(256).to(torch.uint8),
    "eight": torch.randn(4).to(torch.float8_e4m3fn),
}


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    nbytes = write_tensors(path, TENSORS, {"format": "pt"})
    assert nbytes == path.stat().st_size
    read = load_file(path)
    assert all(equal(read[name], TENSORS[name]) for name in TENSORS) and len(read) == len(TENSORS)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, path)
    file = TensorFile(path)
    assert sorted(file.names()) == sorted(TENSORS)
    assert all(equal(file.read(name), TENSORS[name]) for name in TENSORS)


def test_a_range_is_read_in_any_dtype(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": torch.arange(10.0)})
    out = torch.empty(3, dtype=torch.float64)
    TensorFile(path).read_range("x", 4, out)
    assert out.tolist() == [4, 5, 6]
    with pytest.raises(CheckpointError, match="holds less of x"):
        TensorFile(path).read_range("x", 8, out)
    with pytest.raises(CheckpointError, match="does not hold y"):
        TensorFile(path).read("y")


def test_storages_that_were_written_and_read_into_can_still_be_resized(tmp_path: Path) -> None:
    path, tensor = tmp_path / "a.safetensors", torch.ones(8)
    write_tensors(path, {"x": tensor})
    TensorFile(path).read_range("x", 0, tensor)
    tensor.untyped_storage().resize_(0)


@pytest.mark.parametrize("num_bytes", (0, 7, 8, 60, 200))
def test_a_file_that_is_cut_is_refused_when_it_is_opened(num_bytes: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": torch.arange(100.0)})
    os.truncate(path, num_bytes)
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        TensorFile(path)


def test_dtypes_have_names() -> None:
    assert name_of_dtype(torch.bfloat16) == "bfloat16"
    assert dtype_named("bfloat16") is torch.bfloat16
    with pytest.raises(CheckpointError, match="no dtype 'nn'"):
        dtype_named("nn")
