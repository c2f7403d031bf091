"""How this process finds the other ranks and joins them.

Launchers say who we are in environment variables, each in its own dialect. :func:`rendezvous`
reads all dialects into one value without touching anything, so every rule here can be tested with
a plain dict; :func:`init_distributed` acts on that value. Everything comes from the environment:
no mpi4py, no ``scontrol``, no ssh. What cannot be known from it (the host of rank 0 of an Open MPI
job started in an unusual way) is asked for by name instead of being sought over the network.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Final, Literal

import torch
import torch.distributed as dist

from zeroshard.errors import DistributedError, Error, UsageError, compose
from zeroshard.logs import show_messages

__all__ = [
    "DEFAULT_PORT",
    "DEFAULT_TIMEOUT",
    "Rendezvous",
    "device",
    "hosts",
    "init_distributed",
    "local_rank",
    "patience",
    "rank_so_far",
    "rendezvous",
]

logger = logging.getLogger(__name__)

DEFAULT_PORT: Final = 29500
DEFAULT_TIMEOUT: Final = timedelta(minutes=10)

# Every environment variable read or written here.
# Our own.
TIMEOUT: Final = "ZEROSHARD_TIMEOUT"  # minutes to wait for other ranks, where the call names none
# torchrun, the `zeroshard` launcher, and whatever else speaks torch's dialect.
RANK: Final = "RANK"  # this process among all
WORLD_SIZE: Final = "WORLD_SIZE"  # number of processes
LOCAL_RANK: Final = "LOCAL_RANK"  # this process among those of its host
LOCAL_WORLD_SIZE: Final = "LOCAL_WORLD_SIZE"  # number of processes on this host
MASTER_ADDR: Final = "MASTER_ADDR"  # host of rank 0
MASTER_PORT: Final = "MASTER_PORT"  # free port on that host
ERROR_FILE: Final = "TORCHELASTIC_ERROR_FILE"  # where the launcher looks for our last words
# Slurm, in a task started by srun. The STEP variables describe the step, the others the allocation.
SLURM_PROCID: Final = "SLURM_PROCID"  # rank
SLURM_STEP_ID: Final = "SLURM_STEP_ID"  # present in steps only, not in batch scripts
SLURM_STEP_NUM_TASKS: Final = "SLURM_STEP_NUM_TASKS"  # world size
SLURM_NTASKS: Final = "SLURM_NTASKS"  # the same, also set by salloc and sbatch
SLURM_LOCALID: Final = "SLURM_LOCALID"  # local rank
SLURM_NODEID: Final = "SLURM_NODEID"  # this host among the hosts of the step
SLURM_STEP_TASKS_PER_NODE: Final = "SLURM_STEP_TASKS_PER_NODE"  # such as "4(x2),3"
SLURM_TASKS_PER_NODE: Final = "SLURM_TASKS_PER_NODE"
SLURM_NODE_LISTS: Final = ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")
SLURM_LAUNCH_NODE_IPADDR: Final = "SLURM_LAUNCH_NODE_IPADDR"  # where srun runs: maybe a login node
# Open MPI, in a process started by mpirun.
OMPI_RANK: Final = "OMPI_COMM_WORLD_RANK"
OMPI_SIZE: Final = "OMPI_COMM_WORLD_SIZE"
OMPI_LOCAL_RANK: Final = "OMPI_COMM_WORLD_LOCAL_RANK"
OMPI_LOCAL_SIZE: Final = "OMPI_COMM_WORLD_LOCAL_SIZE"
OMPI_HNP_URI: Final = (
    "OMPI_MCA_orte_hnp_uri"  # up to version 4: "17.0;tcp://10.0.0.1,10.1.0.1:4321"
)
PMIX_NAMESPACE: Final = "PMIX_NAMESPACE"  # from version 5 on: "prterun-<host of mpirun>-<pid>@1"

_LOOPBACK: Final = "127.0.0.1"
# Slurm gives its own steps (interactive shell, batch script, extern) ids from the top of 32 bits.
_FIRST_RESERVED_STEP: Final = 0xFFFFFFFA

Source = Literal["torchrun", "slurm", "openmpi", "arguments", "alone"]


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Who this process is and where the ranks meet.

    ``local_world_size`` is None where the environment does not tell how many ranks share the host.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int | None
    master_addr: str
    master_port: int
    source: Source


def rendezvous(env: Mapping[str, str], port: int) -> Rendezvous:
    """Read who we are from the environment of torchrun, Open MPI, Slurm, or nothing.

    ``port`` is used where MASTER_PORT is not set. The order matters: torchrun may run under srun or
    mpirun, and mpirun starts its daemons with srun, so the innermost launcher is asked first.
    """
    if RANK in env:
        return _checked(_from_torchrun(env, port), RANK, LOCAL_RANK)
    if OMPI_RANK in env:
        return _checked(_from_openmpi(env, port), OMPI_RANK, OMPI_LOCAL_RANK)
    if _is_slurm_task(env):
        return _checked(_from_slurm(env, port), SLURM_PROCID, SLURM_LOCALID)
    if _integer(env, WORLD_SIZE, default=1) != 1:
        raise DistributedError(
            compose(
                f"{WORLD_SIZE} is {env[WORLD_SIZE]}, but {RANK} is not set, so this process cannot "
                "tell which rank it is.",
                hint=f"start the script with `zeroshard` or `torchrun`, or unset {WORLD_SIZE}.",
            )
        )
    return Rendezvous(0, 1, 0, 1, _LOOPBACK, port, "alone")


def hosts(nodelist: str) -> Iterator[str]:
    """Expand a Slurm node list, such as ``node[003-005,7],x1``, one host at a time."""
    for pattern in _split_outside_brackets(nodelist):
        yield from _expand(pattern)


def init_distributed(  # noqa: PLR0913, PLR0917 - the arguments of deepspeed.init_distributed
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = DEFAULT_PORT,
    verbose: bool = True,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: object = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Join the other ranks; keep a process group that exists already.

    Args:
        dist_backend: nccl where a GPU is visible and gloo elsewhere, unless named here.
        auto_mpi_discovery: Also read the environments of Slurm and Open MPI.
        distributed_port: Port on the host of rank 0, where MASTER_PORT is not set.
        verbose: Log one line about the group that was joined.
        timeout: How long to wait for other ranks; by default ZEROSHARD_TIMEOUT minutes, or 10.
        init_method: Another meeting point, as for ``torch.distributed.init_process_group``.
        dist_init_required: False says that a process group must exist already.
        config: Accepted for compatibility; nothing here is configured by it.
        rank: This process among all, where the caller knows better than the environment.
        world_size: Number of processes; goes with ``rank``.
    """
    del config
    show_messages(rank_so_far)
    _report_uncaught_errors(os.environ.get(ERROR_FILE, ""))
    if dist.is_initialized():
        _check_kept_group(dist_backend, rank, world_size)
        return
    if dist_init_required is False:
        raise UsageError(
            compose(
                "dist_init_required is False, but there is no process group to use.",
                hint="call torch.distributed.init_process_group first, or drop the argument.",
            )
        )
    env = dict(os.environ) if auto_mpi_discovery else _torchrun_only(os.environ)
    if init_method is not None:
        # The meeting point is named by the caller, so MASTER_ADDR is not missed.
        env.setdefault(MASTER_ADDR, init_method)
    if rank >= 0 or world_size >= 0:
        found = _from_arguments(env, distributed_port, rank, world_size)
    else:
        found = rendezvous(env, distributed_port)
    if found.source in ("slurm", "openmpi"):
        _export(found)
    backend = _join(found, dist_backend, init_method, timeout or patience())
    if verbose:
        logger.info(
            "rank %d of %d (%s) joined over %s on %s",
            found.rank,
            found.world_size,
            found.source,
            backend,
            device(),
        )


def rank_so_far() -> int:
    """Return this process's rank, as the environment tells it while no group is joined."""
    if dist.is_initialized():
        return dist.get_rank()
    try:
        return rendezvous(os.environ, port=0).rank
    except Error:
        return 0


def local_rank() -> int:
    """Return this process's number among those of its host, 0 where no launcher gave one."""
    known = _known_local_rank(os.environ)
    return 0 if known is None else known


def patience() -> timedelta:
    """Return how long to wait for other ranks where a call names no time."""
    return _default_timeout(os.environ)


def device() -> torch.device:
    """Return the GPU that belongs to this process, or the CPU where no GPU is visible."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    known = _known_local_rank(os.environ)
    if known is None:
        # Started by hand: the script may have chosen its GPU with torch.cuda.set_device.
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cuda", _device_index(known, torch.cuda.device_count()))


def _from_torchrun(env: Mapping[str, str], port: int) -> Rendezvous:
    world_size = _integer(env, WORLD_SIZE, needed_by=RANK)
    alone = world_size == 1
    if not alone and not env.get(MASTER_ADDR):
        raise _missing(MASTER_ADDR, needed_by=RANK)
    return Rendezvous(
        rank=_integer(env, RANK),
        world_size=world_size,
        # With several ranks a guess would put them all on one GPU without a word.
        local_rank=_integer(env, LOCAL_RANK, needed_by=RANK, default=0 if alone else None),
        local_world_size=_integer(env, LOCAL_WORLD_SIZE) if LOCAL_WORLD_SIZE in env else None,
        master_addr=env.get(MASTER_ADDR) or _LOOPBACK,
        master_port=_integer(env, MASTER_PORT, default=port),
        source="torchrun",
    )


def _from_arguments(env: Mapping[str, str], port: int, rank: int, world_size: int) -> Rendezvous:
    if not 0 <= rank < world_size:
        raise UsageError(
            compose(
                f"rank={rank} and world_size={world_size} do not name one rank of a world.",
                hint="pass both, with 0 <= rank < world_size, or neither.",
            )
        )
    if world_size > 1 and not env.get(MASTER_ADDR):
        raise _missing(MASTER_ADDR, needed_by="world_size")
    return Rendezvous(
        rank=rank,
        world_size=world_size,
        local_rank=_known_local_rank(env) or 0,
        local_world_size=None,
        master_addr=env.get(MASTER_ADDR) or _LOOPBACK,
        master_port=_integer(env, MASTER_PORT, default=port),
        source="arguments",
    )


def _from_openmpi(env: Mapping[str, str], port: int) -> Rendezvous:
    world_size = _integer(env, OMPI_SIZE, needed_by=OMPI_RANK)
    local_world_size = _integer(env, OMPI_LOCAL_SIZE) if OMPI_LOCAL_SIZE in env else None
    return Rendezvous(
        rank=_integer(env, OMPI_RANK),
        world_size=world_size,
        local_rank=_integer(env, OMPI_LOCAL_RANK, needed_by=OMPI_RANK),
        local_world_size=local_world_size,
        master_addr=env.get(MASTER_ADDR) or _openmpi_host(env, world_size, local_world_size),
        master_port=_integer(env, MASTER_PORT, default=port),
        source="openmpi",
    )


def _openmpi_host(env: Mapping[str, str], world_size: int, local_world_size: int | None) -> str:
    """Name the host of rank 0: this one, or the one where mpirun runs."""
    if local_world_size == world_size:
        return _LOOPBACK
    uri = re.search(r"tcp6?://\[?([^,;\]]+?)\]?(?:[,;]|:\d+(?:;|$)|$)", env.get(OMPI_HNP_URI, ""))
    if uri is not None:
        return uri[1]
    namespace = re.fullmatch(r"(?:prte|prterun|mpirun)-(.+)-\d+@\d+", env.get(PMIX_NAMESPACE, ""))
    if namespace is not None:
        return namespace[1]
    raise DistributedError(
        compose(
            f"Open MPI started {world_size} ranks on several hosts, but its environment does not "
            "say which host has rank 0.",
            hint=f"name it: `mpirun -x {MASTER_ADDR}=<host of rank 0> ...`.",
        )
    )


def _is_slurm_task(env: Mapping[str, str]) -> bool:
    """Tell a task of srun from a shell or batch script that merely runs in an allocation."""
    if SLURM_PROCID not in env or SLURM_STEP_ID not in env:
        return False
    return _integer(env, SLURM_STEP_ID) < _FIRST_RESERVED_STEP


def _from_slurm(env: Mapping[str, str], port: int) -> Rendezvous:
    size = SLURM_STEP_NUM_TASKS if SLURM_STEP_NUM_TASKS in env else SLURM_NTASKS
    world_size = _integer(env, size, needed_by=SLURM_PROCID)
    if _integer(env, WORLD_SIZE, default=world_size) != world_size:
        raise DistributedError(
            compose(
                f"{WORLD_SIZE} is {env[WORLD_SIZE]}, but srun started {world_size} tasks ({size}).",
                hint=f"unset {WORLD_SIZE}, or start as many tasks as it says.",
            )
        )
    return Rendezvous(
        rank=_integer(env, SLURM_PROCID),
        world_size=world_size,
        local_rank=_integer(env, SLURM_LOCALID, needed_by=SLURM_PROCID),
        local_world_size=_slurm_local_world_size(env),
        master_addr=env.get(MASTER_ADDR) or _slurm_host(env),
        master_port=_integer(env, MASTER_PORT, default=port),
        source="slurm",
    )


def _slurm_host(env: Mapping[str, str]) -> str:
    """Name the first host of the step; the host of srun only where no node list is known."""
    for name in SLURM_NODE_LISTS:
        if env.get(name):
            try:
                return next(hosts(env[name]))
            except (DistributedError, StopIteration) as error:
                raise DistributedError(
                    compose(
                        f"{name} is {env[name]!r}, which is not a Slurm node list.",
                        hint=f"set {MASTER_ADDR} to the host of rank 0.",
                    )
                ) from error
    if env.get(SLURM_LAUNCH_NODE_IPADDR):
        return env[SLURM_LAUNCH_NODE_IPADDR]
    raise _missing(SLURM_NODE_LISTS[1], needed_by=SLURM_PROCID)


def _slurm_local_world_size(env: Mapping[str, str]) -> int | None:
    """Look this host up in Slurm's run-length code of tasks per host, such as ``4(x2),3``."""
    if SLURM_NODEID not in env:
        return None
    node = _integer(env, SLURM_NODEID)
    for count in re.finditer(
        r"(\d+)(?:\(x(\d+)\))?",
        env.get(SLURM_STEP_TASKS_PER_NODE) or env.get(SLURM_TASKS_PER_NODE, ""),
    ):
        node -= int(count[2] or 1)
        if node < 0:
            return int(count[1])
    return None


def _checked(found: Rendezvous, rank_name: str, local_rank_name: str) -> Rendezvous:
    """Return a rendezvous whose numbers fit together, or name the variable that does not."""
    local_size = found.world_size if found.local_world_size is None else found.local_world_size
    for name, value, size, where in (
        (rank_name, found.rank, found.world_size, "in all"),
        (local_rank_name, found.local_rank, local_size, "on this host"),
    ):
        if not 0 <= value < size:
            raise DistributedError(
                compose(
                    f"{name} is {value}, but the ranks {where} are numbered from 0 to {size - 1}.",
                    hint="let the launcher set these variables, or correct them.",
                )
            )
    if not 0 < found.master_port < 2**16:
        raise DistributedError(f"{MASTER_PORT} is {found.master_port}, which is not a port.")
    return found


def _integer(
    env: Mapping[str, str], name: str, *, needed_by: str = "", default: int | None = None
) -> int:
    text = env.get(name)
    if text is None:
        if default is None:
            raise _missing(name, needed_by)
        return default
    try:
        return int(text)
    except ValueError:
        raise DistributedError(f"{name} is {text!r}, which is not an integer.") from None


def _missing(name: str, needed_by: str) -> DistributedError:
    return DistributedError(
        compose(
            f"{needed_by} is set, but {name} is not, so this process cannot find the other ranks.",
            hint="start the script with `zeroshard`, `torchrun`, `srun` or `mpirun`, or set "
            f"{name}.",
        )
    )


def _split_outside_brackets(nodelist: str) -> list[str]:
    """Split at commas, but not at those inside brackets."""
    if not re.fullmatch(r"(?:[^\[\]]|\[[^\[\]]+\])*", nodelist):
        raise DistributedError(f"{nodelist!r} has brackets that do not match.")
    return [part.strip() for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)]


def _expand(pattern: str) -> Iterator[str]:
    """Expand the first bracket of a pattern, then what follows it."""
    head, bracket, rest = pattern.partition("[")
    if not bracket:
        yield pattern
        return
    inside, _, tail = rest.partition("]")
    for item in inside.split(","):
        bounds = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", item)
        if bounds is None:
            raise DistributedError(f"{item!r} in {pattern!r} is not a number or a range.")
        first, last = bounds[1], bounds[2] or bounds[1]
        for number in range(int(first), int(last) + 1):
            for end in _expand(tail):
                yield f"{head}{number:0{len(first)}d}{end}"


def _known_local_rank(env: Mapping[str, str]) -> int | None:
    """Return the local rank if any launcher named it, whatever else it named."""
    if LOCAL_RANK in env:
        return _integer(env, LOCAL_RANK)
    if OMPI_LOCAL_RANK in env:
        return _integer(env, OMPI_LOCAL_RANK)
    if SLURM_LOCALID in env and _is_slurm_task(env):
        return _integer(env, SLURM_LOCALID)
    return None


def _device_index(rank_on_host: int, num_devices: int) -> int:
    """Choose a GPU by local rank; the only one where the launcher shows each rank just its own."""
    if num_devices == 1:
        return 0
    if not 0 <= rank_on_host < num_devices:
        raise DistributedError(
            compose(
                f"the local rank is {rank_on_host}, but {num_devices} GPUs are visible here.",
                hint="start at most one rank per GPU, or check CUDA_VISIBLE_DEVICES.",
            )
        )
    return rank_on_host


def _torchrun_only(env: Mapping[str, str]) -> dict[str, str]:
    names = (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT)
    return {name: env[name] for name in names if name in env}


def _export(found: Rendezvous) -> None:
    """Put what Slurm or Open MPI said into torch's own variables, where user scripts look."""
    os.environ[RANK] = str(found.rank)
    os.environ[WORLD_SIZE] = str(found.world_size)
    os.environ[LOCAL_RANK] = str(found.local_rank)
    if found.local_world_size is not None:
        os.environ[LOCAL_WORLD_SIZE] = str(found.local_world_size)
    os.environ[MASTER_ADDR] = found.master_addr
    os.environ[MASTER_PORT] = str(found.master_port)


def _default_timeout(env: Mapping[str, str]) -> timedelta:
    text = env.get(TIMEOUT)
    if not text:
        return DEFAULT_TIMEOUT
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise DistributedError(f"{TIMEOUT} is {text!r}, which is not a number of minutes above 0.")
    return timedelta(minutes=minutes)


def _join(
    found: Rendezvous, dist_backend: str | None, init_method: str | None, timeout: timedelta
) -> str:
    """Create the process group and return the name of its backend."""
    target = device()
    on_gpu = target.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(target)
    backend = dist_backend or ("nccl" if on_gpu else "gloo")
    store = None
    if init_method is None:
        if found.world_size == 1:
            # Nobody else has to find us, so no port is taken.
            store = dist.HashStore()
        else:
            init_method = _tcp_url(found.master_addr, found.master_port)
    try:
        dist.init_process_group(
            backend,
            init_method=init_method,
            store=store,
            rank=found.rank,
            world_size=found.world_size,
            timeout=timeout,
            # Binds nccl to the GPU now, instead of guessing it from the first tensor.
            device_id=target if on_gpu and "nccl" in backend else None,
        )
    except dist.DistError as error:
        raise DistributedError(
            compose(
                f"rank {found.rank} of {found.world_size} ({found.source}) could not join the "
                f"others at {init_method}; it waits up to {timeout.total_seconds():g} s. "
                f"{_first_line(error)}",
                hint=f"check that all ranks run, that {MASTER_ADDR} is the host of rank 0, and "
                f"that {MASTER_PORT} is free there. {TIMEOUT} sets the wait in minutes.",
            )
        ) from error
    if not on_gpu:
        atexit.register(_leave_at_exit)
    return backend


def _leave_at_exit() -> None:
    """End gloo's threads before the interpreter ends: one that outlives it aborts the process.

    An abort would take the place of the exit code of a rank that failed. Groups of GPUs are left
    to the end of the process, since ending them may wait for ranks that failed.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def _tcp_url(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _check_kept_group(dist_backend: str | None, rank: int, world_size: int) -> None:
    """Refuse arguments that contradict the process group that exists already."""
    for name, asked, actual in (
        ("rank", rank, dist.get_rank()),
        ("world_size", world_size, dist.get_world_size()),
    ):
        if asked >= 0 and asked != actual:
            raise DistributedError(
                compose(
                    f"init_distributed was called with {name}={asked}, but torch.distributed is "
                    f"initialised already with {name}={actual}.",
                    hint=f"drop `{name}`, or initialise once.",
                )
            )
    if dist_backend is not None and dist_backend not in dist.get_backend():
        logger.warning(
            "dist_backend=%r is ignored: torch.distributed is initialised already with %r",
            dist_backend,
            dist.get_backend(),
        )


@dataclass(frozen=True)
class _LastWords:
    """An exception hook that leaves the traceback where the launcher looks for it."""

    path: Path
    previous: Callable[[type[BaseException], BaseException, TracebackType | None], object]

    def __call__(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """Write the error once, then let the previous hook print it as usual."""
        try:
            if isinstance(error, Exception) and not self.path.exists():
                self._write(error)
        except OSError:
            logger.warning("cannot write the traceback to %s", self.path)
        finally:
            self.previous(kind, error, trace)

    def _write(self, error: Exception) -> None:
        text = "".join(traceback.format_exception(error))
        # The layout of torch.distributed.elastic's error files, plus a finer clock: which rank
        # failed first is often a matter of milliseconds.
        extra = {"py_callstack": text, "timestamp": str(int(time.time())), "time_s": time.time()}
        data = {"message": {"message": f"{type(error).__name__}: {error}", "extraInfo": extra}}
        # The agent may read at any moment, so the file appears whole or not at all.
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(data), encoding="utf-8")
        partial.replace(self.path)


def _report_uncaught_errors(path: str) -> None:
    """Let the launcher's last message show the traceback of the rank that failed first."""
    if path:
        sys.excepthook = _LastWords(Path(path), sys.excepthook)
