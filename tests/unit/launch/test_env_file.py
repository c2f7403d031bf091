from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeroshard.errors import UsageError
from zeroshard.launch.env_file import parse, read_all


def test_lines_are_read_as_a_shell_would_but_nothing_is_expanded() -> None:
    text = """
# a comment
NCCL_DEBUG=INFO
export  PATH_OF_MINE=/a:/b
 SPACED = value with spaces   # and a comment
URL=http://host/#anchor
DOUBLE="a b # c"
SINGLE='say "hi"'  # quoted
EMPTY=
LITERAL=$HOME
EQUATION=a=b=c
"""
    assert parse(text, "file") == {
        "NCCL_DEBUG": "INFO",
        "PATH_OF_MINE": "/a:/b",
        "SPACED": "value with spaces",
        "URL": "http://host/#anchor",
        "DOUBLE": "a b # c",
        "SINGLE": 'say "hi"',
        "EMPTY": "",
        "LITERAL": "$HOME",
        "EQUATION": "a=b=c",
    }


@given(st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters="\"'")))
def test_any_quoted_text_comes_back(text: str) -> None:
    assert parse(f"KEY='{text}'", "file") == {"KEY": text}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A=1\nB", "file, line 2: 'B' is not KEY=VALUE"),
        ("1A=1", "file, line 1: '1A=1' is not KEY=VALUE"),
        ("A='b", "the quotes of 'b do not match"),
        ("A='b'c", "the quotes of 'b'c do not match"),
        ("RANK=3", "file, line 1: RANK is set by the launcher for each rank"),
    ],
)
def test_a_bad_line_is_reported_with_file_and_line(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(text, "file", reserved={"RANK"})


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for folder in ("home", "here"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return {"HOME": str(tmp_path / "home")}


def test_the_home_folder_is_read_first_and_this_folder_has_the_last_word(
    tmp_path: Path, home: dict[str, str]
) -> None:
    assert read_all(home, ()) == []
    (tmp_path / "home" / ".deepspeed_env").write_text("A=home\n")
    (tmp_path / "here" / ".deepspeed_env").write_text("A=here\n")
    assert [file.variables["A"] for file in read_all(home, ())] == ["home", "here"]


def test_no_file_at_all_can_be_asked_for(home: dict[str, str]) -> None:
    (file,) = read_all({**home, "DS_ENV_FILE": os.devnull}, ())
    assert file.variables == {}


def test_folders_that_are_gone_are_passed_over(tmp_path: Path, home: dict[str, str]) -> None:
    Path.cwd().rmdir()
    assert read_all({"HOME": str(tmp_path / "nobody")}, ()) == []


def test_another_file_can_be_named_and_must_then_exist(
    tmp_path: Path, home: dict[str, str]
) -> None:
    path = tmp_path / "mine"
    env = {**home, "DS_ENV_FILE": str(path)}
    with pytest.raises(UsageError, match=r"DS_ENV_FILE is .*mine, but there is no such file"):
        read_all(env, ())
    path.write_text("A=1")
    (file,) = read_all(env, ())
    assert file.path == path
