"""The command `zeroshard`: a script to launch, or the name of another command.

torch takes seconds to import, so only the commands that cannot do without it import it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence

import click

from zeroshard.errors import Error, compose
from zeroshard.launch.config_command import config
from zeroshard.launch.env_command import env
from zeroshard.launch.io_bench_command import io_bench
from zeroshard.launch.launch_command import REFUSED, launch, say

__all__ = ["main"]

_EXIT_USAGE = 2
_SEE_HELP = "`zeroshard --help` lists the options, which come before the script."
_NO_ARGUMENTS = getattr(click.exceptions, "NoArgsIsHelpError", ())  # before 8.2 it is no error


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
      zeroshard --include localhost:0,2 train.py
      zeroshard -m package.train
    """  # noqa: D301 - click's mark of lines to leave as they are


entry.add_command(launch)
entry.add_command(env)
entry.add_command(config)
entry.add_command(io_bench)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    _open_streams()
    try:
        result: object = entry.main(argv, prog_name="zeroshard", standalone_mode=False)
    except click.NoSuchOption as error:
        refused = REFUSED.get(error.option_name.replace("-", "_").replace("__", "--", 1))
        if refused:
            fact = f"{error.option_name} is not an option of zeroshard."
            say(f"error: {compose(fact, hint=refused)}")
        else:
            say(f"error: {compose(error.format_message(), hint=_SEE_HELP)}")
        return _EXIT_USAGE
    except click.ClickException as error:
        if isinstance(error, _NO_ARGUMENTS):
            error.show()  # the help
            return error.exit_code
        say(f"error: {compose(error.format_message(), hint=_SEE_HELP)}")
        return error.exit_code
    except Error as error:
        say(f"error: {error}")
        return _EXIT_USAGE
    except (click.Abort, KeyboardInterrupt):
        return 130
    finally:
        _leave_stderr()
    return result if isinstance(result, int) else 0


def _open_streams() -> None:
    """Open what a daemon has closed of the standard streams, or other files get their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _leave_stderr() -> None:
    """Give up what stderr does not take, or Python tries once more and changes the exit code."""
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
    except OSError:
        sys.stderr = None


if __name__ == "__main__":
    sys.exit(main())
