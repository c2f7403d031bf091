"""What a launch runs, and what each rank is told in its environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from zeroshard.launch.script import Script

__all__ = ["ERROR_FILE", "RESERVED", "Job", "rank_environment"]

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to run, how many times, where the ranks meet, and what becomes of their output.

    ``cpus`` has the CPUs of each rank, and is empty where ranks are not bound; ``logs`` has the
    file for the output of each rank, and is empty where it belongs on the console.
    """

    script: Script
    num_ranks: int
    env: Mapping[str, str]
    master_addr: str
    master_port: int
    pass_local_rank: bool = False
    cpus: tuple[frozenset[int], ...] = ()
    logs: tuple[Path, ...] = ()
    max_restarts: int = 0


def rank_environment(job: Job, rank: int, *, attempt: int, error_file: str) -> dict[str, str]:
    """Return the environment of a rank: the names of torchrun, and those of DeepSpeed's launcher.

    The whole job is on one host, so a rank's number among all is also its number there.
    """
    return {**job.env, **_own(job, str(rank), str(attempt), error_file)}


def _own(job: Job, rank: str, attempt: str, error_file: str) -> dict[str, str]:
    size = str(job.num_ranks)
    return {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": job.master_addr,
        "MASTER_PORT": str(job.master_port),
        # DeepSpeed's names; CROSS counts hosts.
        "LOCAL_SIZE": size,
        "CROSS_RANK": "0",
        "CROSS_SIZE": "1",
        # torchrun's names; a group is a host, and all ranks have one role.
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "ROLE_RANK": rank,
        "ROLE_WORLD_SIZE": size,
        "TORCHELASTIC_RUN_ID": f"zeroshard-{job.master_port}",
        "TORCHELASTIC_RESTART_COUNT": attempt,
        "TORCHELASTIC_MAX_RESTARTS": str(job.max_restarts),
        ERROR_FILE: error_file,
        # Rank 0 holds torch's store, as it does without torchrun.
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }


_NOTHING = Job(script=Script(""), num_ranks=0, env={}, master_addr="", master_port=0)
RESERVED = frozenset(_own(_NOTHING, "", "", ""))
