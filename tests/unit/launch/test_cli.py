from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from zeroshard.launch import cli, cores, gpus, supervisor
from zeroshard.launch.cli import main
from zeroshard.launch.cores import Core
from zeroshard.launch.failure import Ended
from zeroshard.launch.gpus import Gpu
from zeroshard.launch.job import Job
from zeroshard.launch.meeting import reserve_port
from zeroshard.launch.script import Script
from zeroshard.launch.supervisor import Say


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "train.py"
    path.write_text("")
    return str(path)


class Launches(list[Job]):
    """The jobs that would have run, on a machine with some GPUs."""

    gpus: tuple[Gpu, ...] = ()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    seen = Launches()

    def run(job: Job, _say: Say) -> Ended:
        seen.append(job)
        return Ended(0)

    monkeypatch.setattr(supervisor, "run", run)
    monkeypatch.setattr(gpus, "visible_gpus", lambda _env: seen.gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return seen


def named(*names: str) -> tuple[Gpu, ...]:
    return tuple(Gpu(name) for name in names)


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
    with reserve_port(None) as probe:
        port = probe.getsockname()[1]
    theirs = ["--num_gpus", "3", "--", "-m", "--help", "", "$x"]
    assert main([f"--master_port={port}", script, *theirs]) == 0
    (job,) = launches
    assert job.script == Script(script, tuple(theirs))
    assert (job.num_ranks, job.master_port) == (1, port)


def test_all_visible_gpus_are_used_by_default(
    launches: Launches, script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    launches.gpus = named(*"01234567")
    assert main([script]) == 0
    assert main(["--num_gpus", "2", script]) == 0
    assert main(["--num_gpus", "-1", script]) == 0  # DeepSpeed's way to say all
    assert [job.num_ranks for job in launches] == [8, 2, 8]
    assert "2 ranks on 2 of 8 visible GPUs (0,1)" in capsys.readouterr().err
    assert ["CUDA_VISIBLE_DEVICES" in job.env for job in launches] == [False, True, False]


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
    launches.gpus = named(*"01")
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
        (["--nproc-per-node=2", "{script}"], "hint: write --num_gpus"),
        (["--autotuning=run", "{script}"], "hint: drop it; set the batch size"),
        (["--elastic_training", "{script}"], "hint: drop it; --max_restarts N"),
        (["-m", "{script}"], "'{script}' is a path, not a module"),
        (["-m", "nosuch.train"], "module 'nosuch.train': there is no 'nosuch' in this folder"),
        (["--node_rank=1", "{script}"], "--node_rank is 1, but zeroshard launches on one host"),
        (["--bogus", "{script}"], "hint: `zeroshard --help` lists the options"),
        (["--no_python", "{script}"], "not executable.\n\nhint: run `chmod +x {script}`"),
        (["--no_python", "{folder}"], "'{folder}' is a folder"),
        (["{folder}"], "'{folder}' is a folder"),
        (["--master_port", "70000", "{script}"], "70000 is not in the range"),
        (
            ["--include", "localhost:0", "{script}"],
            "--include and --exclude choose among GPUs, but",
        ),
        (["-i", "x", "--num_gpus=1", "{script}"], "cannot go with --num_gpus or --num_nodes"),
        (
            ["--hostfile=hosts", "{script}"],
            "hostfile 'hosts' cannot be read: [Errno 2] No such file",
        ),
        (["--master_addr=192.0.2.1", "{script}"], "192.0.2.1 is not an address of this host"),
        (["--bind_core_list=0-", "{script}"], "'0-' in the list of CPU cores '0-' is not a number"),
        (["--bind_core_list=0-99999999999", "{script}"], "is not a number or a range"),
        (["--bind_core_list=9999", "{script}"], "cores that this process may not use: 9999"),
        (["--bind-cores-to-rank", "--num_gpus=9999", "{script}"], "9999 ranks cannot be bound"),
        (["--max_restarts=-1", "{script}"], "-1 is not in the range"),
        (["--log_level=loud", "{script}"], "'loud' is not one of"),
        (["--enable_each_rank_log={script}", "{script}"], "--enable_each_rank_log {script}: File"),
        (["--pass_local_ran", "{script}"], "--pass_local_rank"),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_starts(
    arguments: list[str],
    message: str,
    script: str,
    launches: Launches,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = {"script": script, "folder": str(Path(script).parent), "cwd": str(Path.cwd())}
    assert main([argument.format(**words) for argument in arguments]) == 2
    assert message.format(**words) in capsys.readouterr().err
    assert launches == []


def test_a_port_in_use_is_refused_before_anything_starts(
    launches: Launches, script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main([f"--master_port={port}", script]) == 2
    assert f"port {port} of this host is in use by process {os.getpid()}" in capsys.readouterr().err
    assert launches == []


@pytest.mark.parametrize(
    ("options", "visible"),
    [
        (["--include", "localhost:0,2"], "GPU-a,GPU-c"),
        (["--exclude", "localhost:1"], "GPU-a,GPU-c"),
        (["--num_gpus=1"], "GPU-a"),
    ],
)
def test_a_choice_of_gpus_selects_from_those_that_are_visible(
    launches: Launches, script: str, options: list[str], visible: str
) -> None:
    launches.gpus = named("GPU-a", "GPU-b", "GPU-c")
    assert main([*options, script]) == 0
    (job,) = launches
    assert job.env["CUDA_VISIBLE_DEVICES"] == visible
    assert job.num_ranks == visible.count(",") + 1


@pytest.mark.parametrize(
    ("hostfile", "gpus", "options", "code", "told"),
    [
        ("localhost slots=2", 4, [], 0, "2 ranks on 2 of 4 visible GPUs (0,1)"),
        ("localhost slots=3", 0, ["-e", "localhost:1"], 0, "2 ranks on the CPU"),
        ("localhost slots=3", 2, [], 2, "has a slot 2 for this host, but 2 GPUs are visible"),
        ("localhost slots=1", 0, ["--num_gpus=2"], 2, "but the hostfile gives 1 slots"),
        ("localhost slots=1\nworker-1 slots=1", 1, [], 2, "worker-1 would be used"),
        ("localhost slots=1\nworker-1 slots=1", 1, ["--num_nodes=1"], 0, "1 rank on 1 of 1"),
    ],
)
def test_a_hostfile_says_how_many_ranks_there_are(
    launches: Launches,
    script: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    hostfile: str,
    gpus: int,
    options: list[str],
    code: int,
    told: str,
) -> None:
    path = tmp_path / "hosts"
    path.write_text(hostfile)
    launches.gpus = named(*map(str, range(gpus)))
    assert main(["-H", str(path), *options, script]) == code
    assert told in capsys.readouterr().err
    assert len(launches) == (code == 0)


def test_options_that_matter_on_several_hosts_only_are_accepted_and_said_once(
    launches: Launches, script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--launcher=pdsh", "--no_ssh_check", "--force_multi", "--node_rank=0"]
    assert main([*options, script]) == 0
    told = "zeroshard: --launcher, --no_ssh_check, --force_multi: no effect on one host\n"
    assert capsys.readouterr().err.count(told) == 1
    assert main([*options, "--quiet", script]) == 0
    assert capsys.readouterr().err == ""
    assert len(launches) == 2


def test_a_script_that_declares_a_local_rank_is_given_one_unless_told_otherwise(
    launches: Launches, script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([script]) == 0
    assert main(["--pass_local_rank", script]) == 0
    Path(script).write_text("parser.add_argument('--local_rank', type=int, default=-1)")
    assert main([script]) == 0
    assert f"passing the --local_rank that {script} declares" in capsys.readouterr().err
    assert main(["--no_local_rank", script]) == 0
    assert [job.pass_local_rank for job in launches] == [False, True, True, False]


def test_cores_are_those_near_the_gpus(
    launches: Launches, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = [Core((cpu, cpu + 8), node=cpu // 4) for cpu in range(8)]
    monkeypatch.setattr(cores, "read_cores", lambda _allowed: host)
    launches.gpus = (Gpu("0", node=1), Gpu("1", node=0), Gpu("2", node=0))
    assert main(["--bind_cores_to_rank", "--include=localhost:0,2", script]) == 0
    (job,) = launches
    assert job.cpus == (
        frozenset([4, 5, 6, 7, 12, 13, 14, 15]),
        frozenset([0, 1, 2, 3, 8, 9, 10, 11]),
    )
    assert job.env["OMP_NUM_THREADS"] == "4"


@pytest.mark.parametrize("module", [True, False])
def test_modules_and_programs_need_not_be_files(launches: Launches, module: bool) -> None:
    assert main(["-m", "json.tool"] if module else ["--no_python", "sh"]) == 0
    assert [job.script.kind for job in launches] == ["module" if module else "executable"]


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
