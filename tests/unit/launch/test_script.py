from __future__ import annotations

import sys
from pathlib import Path

import pytest

from zeroshard.launch.script import Script


def test_command_lines_by_kind() -> None:
    assert Script("a$b.py", ("$1", "--x")).command(local_rank=3) == [
        *[sys.executable, "-u", "a$b.py", "--local_rank=3", "$1", "--x"]
    ]
    module = Script("package.train", ("x",), "module")
    assert module.command(None) == [sys.executable, "-u", "-m", "package.train", "x"]
    assert Script("./a.out", ("x",), "executable").command(None) == ["./a.out", "x"]


@pytest.mark.parametrize(
    ("text", "declares"),
    [
        ('parser.add_argument("--local_rank", type=int, default=-1)', True),
        ('parser.add_argument("-l", "--local-rank")', True),
        ('@click.option("--local_rank")\ndef main(): ...', True),
        ('flags.DEFINE_integer("local_rank", -1, "")', True),
        ('parser.add_argument("--lr")  # not --local_rank', False),
        ('print("--local_rank")', False),
        ('"""Start with --local_rank."""', False),
        ("this is not Python", False),
    ],
)
def test_a_script_that_declares_a_local_rank_is_recognised(
    text: str, declares: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "package" / "train.py"
    path.parent.mkdir()
    path.write_text(text)
    assert Script(str(path)).declares_local_rank() == declares
    assert not Script(str(path), kind="executable").declares_local_rank()
    monkeypatch.chdir(tmp_path)
    assert Script("package.train", kind="module").declares_local_rank() == declares
