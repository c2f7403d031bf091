"""The command `zeroshard`: a script to launch, or the name of another command.

torch takes seconds to import, so it is imported only once the command line is known to be sound.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zeroshard.errors import Error, UsageError, compose
from zeroshard.launch.config_command import config

if TYPE_CHECKING:
    from zeroshard.launch.elastic import Kind

__all__ = ["main"]

_EXIT_USAGE = 2
_SEE_HELP = "`zeroshard --help` lists the options, which come before the script."
_NO_ARGUMENTS = getattr(click.exceptions, "NoArgsIsHelpError", ())  # before 8.2 it is no error
_ALL = -1  # what DeepSpeed's launcher calls "as many as there are"
_ONE_HOST = "zeroshard launches on one host."
_HOSTS = (
    "on several hosts start the script with `srun`, `mpirun` or `torchrun`; "
    "it needs no change for them."
)
# Options of DeepSpeed's launcher that another tool answers, and how.
_ELSEWHERE = {
    **dict.fromkeys(
        ["--nproc_per_node", "--nproc-per-node"], "write --num_gpus for the number of ranks."
    ),
    **dict.fromkeys(
        ["-i", "--include", "-e", "--exclude"],
        "choose GPUs with CUDA_VISIBLE_DEVICES, such as CUDA_VISIBLE_DEVICES=0,1.",
    ),
    "--autotuning": "drop it; set the batch size in the configuration.",
    **dict.fromkeys(
        ["-H", "--hostfile", "--node_rank", "--master_addr", "--launcher", "--no_ssh"], _HOSTS
    ),
}


class _Entry(click.Group):
    """A group whose first word may also be a script, which is then launched."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Supply the word `launch` where no command was named."""
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h", "--version"):
            args = ["launch", *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the options of `launch`, since they may be given here."""
        super().format_options(ctx, formatter)
        options = [param for param in launch.params if isinstance(param, click.Option)]
        rows = [row for option in options if (row := option.get_help_record(ctx))]
        with formatter.section("Options of launch"):
            formatter.write_dl(rows)


def _show_version(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        versions = [f"{name} {_version(name)}" for name in ("zeroshard", "torch")]
        click.echo(", ".join([*versions, f"Python {platform.python_version()}"]))
        ctx.exit()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


@click.group(
    cls=_Entry,
    subcommand_metavar="SCRIPT [ARGS]... | COMMAND [ARGS]...",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the versions of zeroshard, torch and Python.",
)
def entry() -> None:
    """Run SCRIPT once per GPU of this host, as the ranks of one training job.

    Everything after SCRIPT belongs to the script. It finds its place in RANK, LOCAL_RANK,
    WORLD_SIZE, MASTER_ADDR and MASTER_PORT; `zeroshard.initialize` reads them.

    \b
    Examples:
      zeroshard train.py --deepspeed_config ds.json
      zeroshard --num_gpus 4 train.py --lr 1e-4
      zeroshard -m package.train
    """  # noqa: D301 - click's mark of lines to leave as they are


entry.add_command(config)


def _at_least_one(_ctx: click.Context, _option: click.Parameter, given: int | None) -> int | None:
    if given is None or given == _ALL:
        return None
    if given < 1:
        raise UsageError(
            compose(
                f"--num_gpus is {given}, but a job has at least one rank.",
                hint="leave it out for all visible GPUs.",
            )
        )
    return given


def _one_host(_ctx: click.Context, _option: click.Parameter, given: int) -> None:
    if given not in (1, _ALL):
        raise UsageError(compose(f"--num_nodes is {given}, but {_ONE_HOST}", hint=_HOSTS))


@entry.command(
    context_settings={"allow_interspersed_args": False}, short_help="Run a script (the default)."
)
@click.option(
    "--num_gpus",
    "--num-gpus",
    "--num_accelerators",
    "num_ranks",
    type=int,
    callback=_at_least_one,
    metavar="N",
    help="Number of ranks, one per GPU; where no GPU is visible, ranks on the CPU.  "
    "[default: all visible GPUs, or 1 rank on the CPU]",
)
@click.option(
    "--master_port",
    "--master-port",
    type=click.IntRange(1, 65535),
    metavar="PORT",
    help="Port where the ranks meet.  [default: a free port]",
)
@click.option(
    "--num_nodes",
    "--num-nodes",
    type=int,
    default=1,
    hidden=True,
    expose_value=False,
    callback=_one_host,
)
@click.option("--module", "-m", is_flag=True, help="SCRIPT is a module, as for `python -m`.")
@click.option("--no_python", is_flag=True, help="SCRIPT is a program to run without Python.")
@click.option(
    "--pass_local_rank",
    is_flag=True,
    help="Put --local_rank=N before the script's own arguments. DeepSpeed's launcher always does; "
    "here the script reads LOCAL_RANK from its environment unless this flag is given.",
)
@click.option("--no_local_rank", is_flag=True, help="The default; accepted for DeepSpeed's users.")
@click.option("--quiet", "-q", is_flag=True, help="Say nothing unless a rank fails.")
@click.argument("script")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def launch(
    *,
    num_ranks: int | None,
    master_port: int | None,
    module: bool,
    no_python: bool,
    pass_local_rank: bool,
    no_local_rank: bool,
    quiet: bool,
    script: str,
    args: tuple[str, ...],
) -> int:
    """Run SCRIPT once per GPU of this host, or N times on the CPU where no GPU is visible.

    The exit code is that of the rank that failed first, 128 plus the signal if a signal ended it.
    """
    if module and no_python:
        raise UsageError("--module and --no_python exclude each other: a module needs Python.")
    if pass_local_rank and no_local_rank:
        raise UsageError("--pass_local_rank and --no_local_rank contradict each other.")
    kind: Kind = "module" if module else "executable" if no_python else "script"
    _check_exists(script, kind)

    from zeroshard.launch import elastic  # noqa: PLC0415 - imports torch

    gpus = elastic.num_visible_gpus()
    num_ranks = num_ranks or max(gpus, 1)
    _check_enough_gpus(num_ranks, gpus)
    if not quiet:
        _say(f"starting {_ranks(num_ranks, gpus)}")
    ended = elastic.run(
        elastic.Job(
            script=script,
            arguments=args,
            num_ranks=num_ranks,
            kind=kind,
            master_port=master_port,
            pass_local_rank=pass_local_rank,
        )
    )
    if ended.message:
        _say(ended.message)
    return ended.exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        result: object = entry.main(argv, prog_name="zeroshard", standalone_mode=False)
    except click.NoSuchOption as error:
        if error.option_name in _ELSEWHERE:
            fact = f"{error.option_name} is not an option here: {_ONE_HOST}"
            _say(f"error: {compose(fact, hint=_ELSEWHERE[error.option_name])}")
        else:
            _say(f"error: {compose(error.format_message(), hint=_SEE_HELP)}")
        return _EXIT_USAGE
    except click.ClickException as error:
        if isinstance(error, _NO_ARGUMENTS):
            error.show()  # the help
            return error.exit_code
        _say(f"error: {compose(error.format_message(), hint=_SEE_HELP)}")
        return error.exit_code
    except Error as error:
        _say(f"error: {error}")
        return _EXIT_USAGE
    except (click.Abort, KeyboardInterrupt):
        return 130
    return result if isinstance(result, int) else 0


def _check_exists(script: str, kind: Kind) -> None:
    """Report a script that is not there now, rather than once per rank."""
    if kind == "module" or (kind == "executable" and shutil.which(script)):
        return
    path = Path(script)
    is_runnable = (path / "__main__.py").is_file() if path.is_dir() else path.exists()
    if kind == "script" and is_runnable:
        return
    looks_like_path = path.suffix == ".py" or os.sep in script
    if kind == "script" and not looks_like_path:
        fact = f"{script!r} is neither a script nor a command of zeroshard."
        near = difflib.get_close_matches(script, entry.commands)
    elif path.is_dir():
        raise UsageError(compose(f"{script!r} is a folder.", hint="name the file in it to run."))
    elif path.exists():
        raise UsageError(
            compose(
                f"{script!r} is not executable.",
                hint=f"run `chmod +x {script}`, or drop --no_python if it is a Python script.",
            )
        )
    else:
        fact = f"{kind} {script!r} does not exist (looked in {Path.cwd()})."
        folder = path.parent
        names = [child.name for child in folder.iterdir()] if folder.is_dir() else []
        near = [str(path.with_name(name)) for name in difflib.get_close_matches(path.name, names)]
    raise UsageError(fact + (f" Did you mean {near[0]!r}?" if near else ""))


def _check_enough_gpus(num_ranks: int, gpus: int) -> None:
    if gpus == 0 or num_ranks <= gpus:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    because = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
    raise UsageError(
        compose(
            f"--num_gpus is {num_ranks}, but {gpus} GPUs are visible{because}.",
            hint=f"ask for at most {gpus}, or hide all of them (CUDA_VISIBLE_DEVICES=) to run on "
            "the CPU.",
        )
    )


def _ranks(num_ranks: int, gpus: int) -> str:
    plural = "rank" if num_ranks == 1 else "ranks"
    if gpus == 0:
        return f"{num_ranks} {plural} on the CPU, as no GPU is visible"
    return f"{num_ranks} {plural} on {num_ranks} of {gpus} visible GPUs"


def _say(text: str) -> None:
    click.echo(f"zeroshard: {text}", err=True)


if __name__ == "__main__":
    sys.exit(main())
