"""`zeroshard config`: what it prints, what it writes, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from zeroshard.config import load
from zeroshard.launch.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run_main(*arguments: str) -> tuple[int, str, str]:
        code = main(["config", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_main


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "ds.json"
    path.write_text(
        """{
          // as in the book
          "train_batch_size": 32,
          "bf16": {"enabled": "auto"},
          "wandb": {"enabled": true, "group": "x"},
          "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        }""",
        encoding="utf-8",
    )
    return str(path)


def rows(text: str) -> dict[str, list[str]]:
    """The cells of a printed table by block and key."""
    found: dict[str, list[str]] = {}
    block = ""
    for line in text.splitlines():
        cells = [cell for cell in line.split("  ") if cell.strip()]
        cells = [cell.strip() for cell in cells]
        if cells and cells[1:2] == ["value"]:
            block = cells[0]
        elif cells:
            found[f"{block}.{cells[0]}"] = cells[1:]
    return found


def test_every_value_is_printed_with_its_source_and_class(run: Run, file: str) -> None:
    code, out, err = run("explain", file, "--world-size", "4")
    assert (code, err) == (0, "")
    table = rows(out)
    assert table["top level.train_batch_size"] == ["32", "file", "honoured"]
    assert table["top level.train_micro_batch_size_per_gpu"] == [
        "8",
        "derived: batch / accumulation / ranks",
        "honoured",
    ]
    assert table["top level.gradient_clipping"] == ["1.0", "default", "honoured"]
    assert table["bf16.enabled"] == ['"auto"', "auto (resolved from the caller)", "honoured"]
    assert table["zero_optimization.stage"] == ["2", "file", "honoured"]
    assert table["wandb.enabled"] == [
        "true",
        "file",
        "no effect: Monitoring and profiling are not built yet.",
    ]
    assert table["wandb.group"] == ['"x"', "file", "no effect: as above"]
    offload = table["zero_optimization.offload_optimizer.device"]
    assert offload == ['"cpu"', "file", "honoured"]


def test_what_is_printed_is_plain_text_with_whole_lines(run: Run, file: str) -> None:
    option = "zero_optimization.offload_optimizer.super_offload=true"
    _, out, _ = run("explain", file, "--set", option)
    assert out.isascii()
    assert "\x1b" not in out
    assert all(line == line.rstrip() for line in out.splitlines())
    assert max(map(len, out.splitlines())) > 120


def test_a_terminal_gets_lines_that_fit_and_no_name_is_cut(
    run: Run, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _, out, _ = run("explain", file)
    assert max(map(len, out.splitlines())) <= 90
    assert out.isascii()
    assert "zero_optimization.offload_optimizer" in out


def test_values_can_be_set_on_the_command_line(run: Run, file: str) -> None:
    options = ("--set", "zero_optimization.stage=3", "--set", "bf16.enabled=true")
    code, out, _ = run("explain", file, *options)
    assert code == 0
    assert rows(out)["zero_optimization.stage"] == ["3", "--set", "honoured"]
    assert rows(out)["bf16.enabled"] == ["true", "--set", "honoured"]


def test_json_holds_the_same_for_programs(run: Run, file: str) -> None:
    code, out, _ = run("explain", file, "--json", "--world-size=4", "--set", "dump_state=true")
    assert code == 0
    entries = {entry["path"]: entry for entry in json.loads(out)}
    assert entries["train_micro_batch_size_per_gpu"] == {
        "path": "train_micro_batch_size_per_gpu",
        "value": 8,
        "source": "derived: batch / accumulation / ranks",
        "class": "honoured",
        "reason": "",
    }
    assert entries["dump_state"]["source"] == "--set"
    assert entries["dump_state"]["class"] == "no effect"
    assert entries["dump_state"]["reason"]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--set", "sparse_gradients=true"], "sparse_gradients cannot be true"),
        (["--set", "zero_optimization.stag=1"], 'Did you mean "stage"?'),
        (["--set", "stage"], "is not of the form KEY=VALUE"),
        (["--world-size", "3"], "train_batch_size 32 is not a multiple of"),
        (["--world-size", "0"], "0 is not in the range"),
    ],
)
def test_what_cannot_be_used_ends_in_the_report_and_code_two(
    run: Run, file: str, options: list[str], part: str
) -> None:
    code, out, err = run("explain", file, *options)
    assert code == 2
    assert out == ""
    assert err.startswith("zeroshard: error: ")
    assert part in err
    assert "Traceback" not in err


def test_a_missing_file_is_named(run: Run, tmp_path: Path) -> None:
    code, _, err = run("explain", str(tmp_path / "missing.json"))
    assert code == 2
    assert "missing.json does not exist" in err


def test_a_template_is_printed_or_written(run: Run, tmp_path: Path) -> None:
    options = ("template", "--stage", "3", "--offload", "cpu", "--precision", "fp16")
    path = tmp_path / "ds.json"
    code, out, _ = run(*options)
    assert code == 0
    assert run(*options, "-o", str(path)) == (0, "", "")
    assert path.read_text(encoding="utf-8") == out
    config = load(path)
    assert config.zero_optimization.stage == 3
    assert config.zero_optimization.offload_param.device == "cpu"
    assert config.fp16.enabled
    assert json.loads(run(*options, "--plain")[1])["fp16"]["enabled"] is True


def test_a_template_does_not_replace_a_file_unasked(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text("precious")
    code, _, err = run("template", "-o", str(path))
    assert code == 2
    assert f"{path} exists already.\n\nhint: add --force to replace it." in err
    assert path.read_text() == "precious"
    assert run("template", "-o", str(path), "--force")[0] == 0
    assert path.read_text().startswith("{\n")
    code, _, err = run("template", "-o", str(tmp_path / "no" / "folder.json"))
    assert code == 2
    assert "folder.json cannot be written: No such file or directory" in err


def test_neither_command_waits_for_torch(file: str) -> None:
    program = (
        "import sys; from zeroshard.launch.cli import main; "
        f"assert main(['config', 'explain', {file!r}]) == 0; "
        "assert main(['config', 'template']) == 0; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_starting_a_script_does_not_wait_for_the_configuration() -> None:
    program = "import sys, zeroshard.launch.cli; assert 'pydantic' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [[], ["--help"], ["explain", "--help"]])
def test_help_is_given(run: Run, arguments: list[str]) -> None:
    _, out, err = run(*arguments)
    assert "Usage: zeroshard config" in out + err
