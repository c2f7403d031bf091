from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from zeroshard.launch import cli
from zeroshard.launch.cli import main


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "train.py"
    path.write_text("")
    return str(path)


class Launches(list[Any]):
    """The jobs that would have run."""

    gpus = 0


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    from zeroshard.launch import elastic

    seen = Launches()

    def run(job: elastic.Job) -> elastic.Ended:
        seen.append(job)
        return elastic.Ended(0)

    monkeypatch.setattr(elastic, "run", run)
    monkeypatch.setattr(elastic, "num_visible_gpus", lambda: seen.gpus)
    return seen


@pytest.mark.parametrize(
    "options",
    [
        ["--num_gpus=4"],
        ["--num_gpus", "4"],
        ["--num-gpus", "4"],
        ["--num_accelerators", "4"],
        ["launch", "--num_gpus", "4"],
        ["--num_nodes", "1", "--num_gpus", "4"],
    ],
)
def test_the_number_of_ranks_can_be_written_in_many_ways(
    launches: Launches, script: str, options: list[str]
) -> None:
    assert main([*options, script]) == 0
    assert [job.num_ranks for job in launches] == [4]


def test_everything_after_the_script_is_the_scripts(launches: Launches, script: str) -> None:
    theirs = ["--num_gpus", "3", "--", "-m", "--help", "", "$x"]
    assert main(["--master_port=1234", script, *theirs]) == 0
    (job,) = launches
    assert job.arguments == tuple(theirs)
    assert (job.num_ranks, job.master_port, job.kind) == (1, 1234, "script")


def test_all_visible_gpus_are_used_by_default(
    launches: Launches, script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    launches.gpus = 8
    assert main([script]) == 0
    assert main(["--num_gpus", "2", script]) == 0
    assert main(["--num_gpus", "-1", script]) == 0  # DeepSpeed's way to say all
    assert [job.num_ranks for job in launches] == [8, 2, 8]
    assert "2 ranks on 2 of 8 visible GPUs" in capsys.readouterr().err


def test_ranks_on_the_cpu_are_announced(
    launches: Launches, script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--num_gpus", "3", script]) == 0
    assert "3 ranks on the CPU, as no GPU is visible" in capsys.readouterr().err
    assert main(["-q", script]) == 0
    assert capsys.readouterr().err == ""
    assert [job.num_ranks for job in launches] == [3, 1]


def test_more_gpus_than_visible_are_refused_with_both_numbers(
    launches: Launches,
    script: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    launches.gpus = 2
    assert main(["--num_gpus", "4", script]) == 2
    message = capsys.readouterr().err
    assert "--num_gpus is 4, but 2 GPUs are visible (CUDA_VISIBLE_DEVICES=0,1)" in message
    assert launches == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}/trainn.py"], "does not exist (looked in {cwd}). Did you mean '{script}'?"),
        (["lunch"], "'lunch' is neither a script nor a command of zeroshard. Did you mean 'launch"),
        (["--no_python", "{folder}/run"], "executable '{folder}/run' does not exist"),
        (["-m", "--no_python", "x"], "--module and --no_python exclude each other"),
        (["--pass_local_rank", "--no_local_rank", "{script}"], "contradict each other"),
        (["--num_gpus", "2"], "Missing argument 'SCRIPT'"),
        (["--num_gpus", "0", "{script}"], "--num_gpus is 0, but a job has at least one rank"),
        (["--num_gpus", "two", "{script}"], "'two' is not a valid integer"),
        (["--num_nodes", "2", "{script}"], "--num_nodes is 2, but zeroshard launches on one host"),
        (["-H", "hosts", "{script}"], "hint: on several hosts start the script with `srun`"),
        (["--nproc-per-node=2", "{script}"], "hint: write --num_gpus"),
        (["--bogus", "{script}"], "hint: `zeroshard --help` lists the options"),
        (["--no_python", "{script}"], "not executable.\n\nhint: run `chmod +x {script}`"),
        (["--no_python", "{folder}"], "'{folder}' is a folder"),
        (["{folder}"], "'{folder}' is a folder"),
        (["--master_port", "70000", "{script}"], "70000 is not in the range"),
        (["--include", "localhost:0", "{script}"], "hint: choose GPUs with CUDA_VISIBLE_DEVICES"),
        (["--hostfile=hosts", "{script}"], "hint: on several hosts start the script with `srun`"),
        (["--pass_local_ran", "{script}"], "--pass_local_rank"),
    ],
)
def test_a_wrong_command_line_is_refused_before_torch_is_imported(
    arguments: list[str],
    message: str,
    script: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "zeroshard.launch.elastic", raising=False)
    words = {"script": script, "folder": str(Path(script).parent), "cwd": str(Path.cwd())}
    assert main([argument.format(**words) for argument in arguments]) == 2
    assert message.format(**words) in capsys.readouterr().err
    assert "zeroshard.launch.elastic" not in sys.modules


@pytest.mark.parametrize("module", [True, False])
def test_modules_and_programs_need_not_be_files(launches: Launches, module: bool) -> None:
    assert main(["-m", "package.train"] if module else ["--no_python", "sh"]) == 0
    assert [job.kind for job in launches] == ["module" if module else "executable"]


def test_help_shows_the_options_of_a_launch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "--num_gpus" in text
    assert "zeroshard train.py --deepspeed_config ds.json\n" in text
    assert "--pass_local_rank" in text


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Usage: zeroshard [OPTIONS] SCRIPT" in "".join(capsys.readouterr())


def test_version_names_torch_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("zeroshard ")
    assert "torch 2" in text


def test_another_command_is_not_taken_for_a_script(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import click

    @click.command()
    @click.argument("path")
    def plan(path: str) -> None:
        click.echo(f"planning {path}")

    monkeypatch.setitem(cli.entry.commands, "plan", plan)
    assert main(["plan", f"a{os.sep}b.json"]) == 0
    assert capsys.readouterr().out == f"planning a{os.sep}b.json\n"
