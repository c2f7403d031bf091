"""The command `zeroshard launch`, which is what `zeroshard SCRIPT` runs.

Its options carry DeepSpeed's names and meanings. Everything that can be wrong is found before
anything starts, in the order of a reader: the script, the ranks, their cores, their meeting point.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from zeroshard.errors import UsageError, compose
from zeroshard.host import cpus
from zeroshard.launch import cores, env_file, gpus, hosts, meeting, supervisor
from zeroshard.launch.gpus import Gpu
from zeroshard.launch.hosts import Slots
from zeroshard.launch.job import RESERVED, Job
from zeroshard.launch.output import STDERR, is_writable
from zeroshard.launch.script import Kind, Script

__all__ = ["REFUSED", "launch", "say"]

_ALL = -1  # what DeepSpeed's launcher calls "as many as there are"
_LOOPBACK = "127.0.0.1"
_PATIENCE_S = 1.0  # with a reader of stderr
_HOSTFILE = Path("/job/hostfile")
_OMP_NUM_THREADS = "OMP_NUM_THREADS"
_LEVELS = {name: getattr(logging, name.upper()) for name in ("debug", "info", "warning", "error")}
_LEVELS["critical"] = logging.CRITICAL
_IDLE = "zeroshard.idle_options"  # where the context keeps those that were given
_ONE_HOST = "zeroshard launches on one host."

# Options of DeepSpeed's launcher that are answered by something else here, and by what.
REFUSED = {
    "--nproc_per_node": "write --num_gpus for the number of ranks.",
    "--autotuning": "drop it; set the batch size in the configuration.",
    **dict.fromkeys(
        ["--elastic_training", "--min_elastic_nodes", "--max_elastic_nodes"],
        "drop it; --max_restarts N starts the ranks again after a failure.",
    ),
}


@dataclass(frozen=True, kw_only=True)
class _Options:
    """The command line, as click has read it."""

    script: str
    args: tuple[str, ...]
    module: bool
    no_python: bool
    num_gpus: int | None
    num_nodes: int | None
    include: str
    exclude: str
    hostfile: Path | None
    master_addr: str | None
    master_port: int | None
    pass_local_rank: bool
    no_local_rank: bool
    bind_cores_to_rank: bool
    bind_core_list: str | None
    enable_each_rank_log: Path | None
    max_restarts: int
    save_pid: bool
    quiet: bool
    log_level: str

    @property
    def level(self) -> int:
        """The least logging level of messages to show."""
        return logging.ERROR if self.quiet else _LEVELS[self.log_level]


def say(text: str) -> None:
    """Write one message to stderr, under the launcher's name.

    A terminal that is gone, a reader that has left or has stopped reading, a full disk: none of
    them may end a training, or keep it from ending.
    """
    with contextlib.suppress(OSError):
        if is_writable(STDERR, timeout_s=_PATIENCE_S):
            click.echo(f"zeroshard: {text}", err=True)


def _num_gpus(_ctx: click.Context, _option: click.Parameter, given: int | None) -> int | None:
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


def _num_nodes(_ctx: click.Context, _option: click.Parameter, given: int | None) -> int | None:
    if given in (None, _ALL):
        return None
    if given != 1:
        raise UsageError(
            compose(f"--num_nodes is {given}, but {_ONE_HOST}", hint=hosts.SEVERAL_HOSTS)
        )
    return given


def _node_rank(_ctx: click.Context, _option: click.Parameter, given: int) -> None:
    if given not in (0, _ALL):
        raise UsageError(
            compose(f"--node_rank is {given}, but {_ONE_HOST}", hint=hosts.SEVERAL_HOSTS)
        )


def _note_idle(ctx: click.Context, option: click.Parameter, given: object) -> None:
    if given:
        ctx.meta.setdefault(_IDLE, []).append(option.opts[0])


def _idle(name: str, *, is_flag: bool = False) -> Any:
    """Declare an option of DeepSpeed's launcher that has nothing to do on one host."""
    return click.option(name, is_flag=is_flag, hidden=True, expose_value=False, callback=_note_idle)


@click.command(
    context_settings={
        "allow_interspersed_args": False,
        "token_normalize_func": lambda name: name.replace("-", "_"),
    },
    short_help="Run a script (the default).",
)
@click.option(
    "--num_gpus",
    "--num_accelerators",
    type=int,
    callback=_num_gpus,
    metavar="N",
    help="Number of ranks, one per GPU; where no GPU is visible, ranks on the CPU.  "
    "[default: all visible GPUs, or 1 rank on the CPU]",
)
@click.option(
    "--include",
    "-i",
    default="",
    metavar="SLOTS",
    help="GPUs to use, such as localhost:0,2; numbers count the visible ones.",
)
@click.option("--exclude", "-e", default="", metavar="SLOTS", help="GPUs to leave out.")
@click.option(
    "--hostfile",
    "-H",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help=f"File with a line `localhost slots=N`.  [default: {_HOSTFILE}, if it exists]",
)
@click.option("--num_nodes", type=int, hidden=True, callback=_num_nodes)
@click.option(
    "--node_rank", type=int, default=0, hidden=True, expose_value=False, callback=_node_rank
)
@click.option(
    "--master_addr",
    metavar="ADDR",
    help=f"Address of this host where the ranks meet.  [default: {_LOOPBACK}]",
)
@click.option(
    "--master_port",
    type=click.IntRange(1, 65535),
    metavar="PORT",
    help="Port where the ranks meet.  [default: a free port]",
)
@click.option("--module", "-m", is_flag=True, help="SCRIPT is a module, as for `python -m`.")
@click.option("--no_python", is_flag=True, help="SCRIPT is a program to run without Python.")
@click.option(
    "--pass_local_rank",
    is_flag=True,
    help="Put --local_rank=N before the script's own arguments.  "
    "[default: if the script declares it]",
)
@click.option("--no_local_rank", is_flag=True, help="Leave --local_rank=N out.")
@click.option(
    "--bind_cores_to_rank",
    is_flag=True,
    help="Give each rank CPU cores of its own, on the NUMA node of its GPU.",
)
@click.option(
    "--bind_core_list", metavar="LIST", help='CPU cores to divide among the ranks: "0-25,27".'
)
@click.option(
    "--enable_each_rank_log",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write each rank's output to a file in DIR instead of the console.",
)
@click.option(
    "--max_restarts",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="Start all ranks again after a failure, at most N times.",
)
@click.option("--save_pid", is_flag=True, help="Keep the launcher's process id in a file.")
@click.option(
    "--log_level",
    type=click.Choice(list(_LEVELS)),
    default="info",
    metavar="LEVEL",
    help=f"Least important messages to show: {', '.join(_LEVELS)}.  [default: info]",
)
@click.option("--quiet", "-q", is_flag=True, help="Say nothing unless a rank fails.")
@_idle("--launcher")
@_idle("--launcher_args")
@_idle("--ssh_port")
@_idle("--venv_script")
@_idle("--no_ssh", is_flag=True)
@_idle("--no_ssh_check", is_flag=True)
@_idle("--force_multi", is_flag=True)
@click.argument("script")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def launch(ctx: click.Context, **given: Any) -> int:
    """Run SCRIPT once per GPU of this host, or N times on the CPU where no GPU is visible.

    The exit code is that of the rank that failed first, 128 plus the signal if a signal ended it.
    """
    options = _Options(**given)
    files = env_file.read_all(os.environ, RESERVED)
    env = dict(os.environ)
    for file in files:
        env.update(file.variables)
    script = _script(options, ctx, env)
    visible = gpus.visible_gpus(env)
    slots = _slots(options, visible)
    if 0 < len(slots) < len(visible):
        env[gpus.VISIBLE] = ",".join(visible[slot].name for slot in slots)
    bound = _cpus(options, slots, visible)
    if bound:
        env[_OMP_NUM_THREADS] = str(len(bound[0]))
    else:
        share = cpus.num_usable_cpus() // len(slots)
        env.setdefault(_OMP_NUM_THREADS, str(max(1, share)))
    pass_local_rank = options.pass_local_rank or (
        not options.no_local_rank and script.declares_local_rank()
    )
    if options.master_addr is not None:
        meeting.check_address(options.master_addr)

    def tell(level: int, text: str) -> None:
        if level >= options.level:
            say(text)

    if idle := ctx.meta.get(_IDLE):
        tell(logging.WARNING, f"{', '.join(idle)}: no effect on one host")
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(meeting.reserve_port(options.master_port)).getsockname()[1]
        job = Job(
            script=script,
            num_ranks=len(slots),
            env=env,
            master_addr=options.master_addr or _LOOPBACK,
            master_port=port,
            pass_local_rank=pass_local_rank,
            cpus=tuple(frozenset(cpu for core in own for cpu in core.cpus) for own in bound),
            logs=_logs(options.enable_each_rank_log, len(slots)),
            max_restarts=options.max_restarts,
        )
        notes = [f"starting {_ranks(slots, visible)}"]
        notes += [f"{len(file.variables)} variables from {file.path}" for file in files]
        if pass_local_rank and not options.pass_local_rank:
            notes.append(f"passing the --local_rank that {script.name} declares")
        if job.logs:
            notes.append(f"writing output to files in {job.logs[0].parent}")
        if options.save_pid:
            notes.append(f"process id in {stack.enter_context(_pid_file())}")
        tell(logging.INFO, "; ".join(notes))
        for rank, own in enumerate(job.cpus):
            tell(logging.DEBUG, f"rank {rank} is bound to CPUs {sorted(own)}")
        ended = supervisor.run(job, tell)
        if ended.message:
            tell(logging.CRITICAL, ended.message)
    return ended.exit_code


def _script(options: _Options, ctx: click.Context, env: Mapping[str, str]) -> Script:
    if options.module and options.no_python:
        raise UsageError("--module and --no_python exclude each other: a module needs Python.")
    if options.pass_local_rank and options.no_local_rank:
        raise UsageError("--pass_local_rank and --no_local_rank contradict each other.")
    kind: Kind = "module" if options.module else "executable" if options.no_python else "script"
    script = Script(options.script, options.args, kind)
    group = ctx.parent.command if ctx.parent else None
    script.check_exists(
        list(group.commands) if isinstance(group, click.Group) else [],
        # `python -m` looks in this folder first.
        ["", *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))],
    )
    return script


def _slots(options: _Options, visible: Sequence[Gpu]) -> Slots:
    """Return the slots to start ranks on: indices into the visible GPUs, or CPU ranks' numbers."""
    pool = _pool(options, visible)
    if (options.include or options.exclude) and (options.num_gpus or options.num_nodes):
        raise UsageError(
            compose(
                "--include and --exclude cannot go with --num_gpus or --num_nodes.",
                hint="let --include or --exclude alone say what to use.",
            )
        )
    if pool is None:
        if options.include or options.exclude:
            raise UsageError(
                compose(
                    "--include and --exclude choose among GPUs, but none is visible"
                    f"{_because_of_env()}.",
                    hint="write --num_gpus N for N ranks on the CPU.",
                )
            )
        return tuple(range(options.num_gpus or 1))
    slots = hosts.choose(
        pool, include=options.include, exclude=options.exclude, num_nodes=options.num_nodes
    )
    if options.num_gpus is not None and options.num_gpus > len(slots):
        at_most = f"ask for at most {len(slots)}, or hide all of them ({gpus.VISIBLE}=) to run on "
        fact = (
            f"--num_gpus is {options.num_gpus}, but {len(slots)} GPUs are visible"
            f"{_because_of_env()}."
            if visible
            else f"--num_gpus is {options.num_gpus}, but the hostfile gives {len(slots)} slots."
        )
        raise UsageError(compose(fact, hint=at_most + "the CPU." if visible else None))
    slots = slots[: options.num_gpus]
    if visible and slots[-1] >= len(visible):
        raise UsageError(
            compose(
                f"the hostfile has a slot {slots[-1]} for this host, but {len(visible)} GPUs are "
                f"visible{_because_of_env()}.",
                hint=f"correct it to slots={len(visible)} or fewer.",
            )
        )
    return slots


def _pool(options: _Options, visible: Sequence[Gpu]) -> dict[str, int] | None:
    """Return the slots of each host, None where nothing but a number of CPU ranks can be chosen."""
    path = options.hostfile or (_HOSTFILE if _HOSTFILE.is_file() else None)
    if path is None:
        return {hosts.THIS_HOST: len(visible)} if visible else None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            compose(
                f"hostfile {str(path)!r} cannot be read: {error}.",
                hint="leave --hostfile out to use the GPUs of this host.",
            )
        ) from error
    return hosts.parse_hostfile(text, str(path))


def _cpus(options: _Options, slots: Slots, visible: Sequence[Gpu]) -> list[tuple[cores.Core, ...]]:
    """Return the cores of each rank; none where ranks are not bound."""
    if not options.bind_cores_to_rank and options.bind_core_list is None:
        return []
    allowed = cpus.allowed_cpus()
    if options.bind_core_list is not None:
        wanted = cpus.parse_list(options.bind_core_list)
        if wanted - allowed:
            raise UsageError(
                compose(
                    f"--bind_core_list {options.bind_core_list} has CPU cores that this process "
                    f"may not use: {', '.join(map(str, sorted(wanted - allowed)))}.",
                    hint=f"it may use {', '.join(map(str, sorted(allowed)))}.",
                )
            )
        allowed = wanted
    near = [visible[slot].node if visible else None for slot in slots]
    return cores.assign(cores.read_cores(allowed), near)


def _logs(folder: Path | None, num_ranks: int) -> tuple[Path, ...]:
    if folder is None:
        return ()
    stamp = time.strftime("%Y%m%d%H%M%S")
    logs = tuple(folder / f"{stamp}_rank{rank}.log" for rank in range(num_ranks))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        logs[0].touch()
    except OSError as error:
        raise UsageError(
            compose(
                f"--enable_each_rank_log {folder}: {error.strerror}.",
                hint="name a folder that can be written to.",
            )
        ) from error
    return logs


@contextlib.contextmanager
def _pid_file() -> Generator[Path, None, None]:
    """Keep a file with the process id of this launcher while it runs."""
    path = Path(tempfile.gettempdir()) / f"{os.getpid()}.deepspeed"
    try:
        # What a killed launcher of the same number left is not ours, nor a link laid there.
        path.unlink(missing_ok=True)
        with path.open("x") as file:
            file.write(str(os.getpid()))
    except OSError as error:
        raise UsageError(f"--save_pid: {path} cannot be written: {error.strerror}.") from error
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _because_of_env() -> str:
    visible = os.environ.get(gpus.VISIBLE)
    return "" if visible is None else f" ({gpus.VISIBLE}={visible})"


def _ranks(slots: Slots, visible: Sequence[Gpu]) -> str:
    ranks = f"{len(slots)} rank{'s' if len(slots) > 1 else ''}"
    if not visible:
        return f"{ranks} on the CPU, as no GPU is visible"
    which = "" if len(slots) == len(visible) else f" ({','.join(map(str, slots))})"
    return f"{ranks} on {len(slots)} of {len(visible)} visible GPUs{which}"
