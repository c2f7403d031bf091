"""Which slots of this host a command line chooses, in the notation of DeepSpeed's launcher.

A hostfile has lines ``host slots=N``. ``--include`` and ``--exclude`` take
``NAME[:SLOT[,SLOT...]][@NAME...]``. Several hosts can be written down, since the files exist
already; only a choice that leaves this host alone can be launched.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from difflib import get_close_matches

import psutil

from zeroshard.errors import UsageError, compose

__all__ = ["SEVERAL_HOSTS", "THIS_HOST", "Slots", "choose", "parse_hostfile"]

THIS_HOST = "localhost"
SEVERAL_HOSTS = (
    "on several hosts start the script with `srun`, `mpirun` or `torchrun`; "
    "it needs no change for them."
)

Slots = tuple[int, ...]


def parse_hostfile(text: str, path: str) -> dict[str, int]:
    """Read the number of slots of each host; this host is called ``localhost``, however written.

    Raises:
        UsageError: a line is not ``host slots=N``, a host comes twice, or no line is left.
    """
    pool: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        entry = re.fullmatch(r"(\S+)\s+slots\s*=\s*(\d+)", line)
        if entry is None or int(entry[2]) < 1:
            raise UsageError(
                compose(
                    f"{path}, line {number}: {line!r} is not a host and its number of slots.",
                    hint="write lines such as `worker-0 slots=8`; `#` begins a comment.",
                )
            )
        name = _canonical(entry[1])
        if name in pool:
            raise UsageError(
                compose(
                    f"{path}, line {number}: {entry[1]!r} names a host that an earlier line has.",
                    hint="write one line per host.",
                )
            )
        pool[name] = int(entry[2])
    if not pool:
        raise UsageError(
            compose(
                f"{path} names no host.", hint="write one line per host, as `localhost slots=8`."
            )
        )
    return pool


def choose(
    pool: Mapping[str, int], *, include: str = "", exclude: str = "", num_nodes: int | None = None
) -> Slots:
    """Return the slots of this host that a choice among a pool of hosts leaves.

    Raises:
        UsageError: the choice contradicts itself or the pool, or is not one of this host alone.
    """
    if include and exclude:
        raise UsageError(
            compose(
                "--include and --exclude exclude each other.",
                hint="keep one: --include lists what to use, --exclude lists what to leave out.",
            )
        )
    slots = {name: tuple(range(count)) for name, count in pool.items()}
    if include:
        slots = _parse_filter("--include", include, slots)
    elif exclude:
        dropped = _parse_filter("--exclude", exclude, slots)
        slots = {
            name: tuple(slot for slot in known if slot not in dropped.get(name, ()))
            for name, known in slots.items()
        }
        slots = {name: left for name, left in slots.items() if left}
        if not slots:
            raise UsageError(
                compose(
                    f"--exclude {exclude} leaves nothing to run on.",
                    hint=f"there are {_total(pool)}; exclude fewer.",
                )
            )
    if num_nodes is not None:
        slots = dict(list(slots.items())[:num_nodes])
    others = [name for name in slots if name != THIS_HOST]
    if others:
        raise UsageError(
            compose(
                f"{', '.join(others)} would be used, but zeroshard launches on one host, this one "
                f"({socket.gethostname()}).",
                hint=(f"choose it with `--include {THIS_HOST}`; " if THIS_HOST in pool else "")
                + SEVERAL_HOSTS,
            )
        )
    return slots[THIS_HOST]


def _parse_filter(option: str, text: str, pool: Mapping[str, Slots]) -> dict[str, Slots]:
    """Read NAME[:SLOT,...][@...] against the slots that exist."""
    chosen: dict[str, set[int]] = {}
    for spec in text.split("@"):
        name, colon, list_of_slots = spec.strip().partition(":")
        if not name or (colon and not list_of_slots.strip()):
            raise UsageError(
                compose(
                    f"{option} {text}: {spec!r} is not NAME or NAME:SLOT,SLOT,....",
                    hint=f"write it as in `{option} {THIS_HOST}:0,2`; `@` separates hosts.",
                )
            )
        known = _slots_of(_canonical(name), name, option, pool)
        numbers = [
            _slot(item.strip(), known, f"{option} {text}")
            for item in (list_of_slots.split(",") if colon else [])
        ]
        chosen.setdefault(_canonical(name), set()).update(numbers or known)
    return {name: tuple(sorted(chosen[name])) for name in pool if name in chosen}


def _slots_of(canonical: str, name: str, option: str, pool: Mapping[str, Slots]) -> Slots:
    if canonical in pool:
        return pool[canonical]
    near = get_close_matches(name, pool)
    known = ", ".join(pool)
    raise UsageError(
        compose(
            f"{option} names the host {name!r}; known are: {known}."
            + (f" Did you mean {near[0]!r}?" if near else ""),
            hint=f"this host is {socket.gethostname()!r} or {THIS_HOST!r}. For others, "
            + SEVERAL_HOSTS,
        )
    )


def _slot(text: str, known: Slots, where: str) -> int:
    if not re.fullmatch(r"\d+", text):
        raise UsageError(
            compose(
                f"{where}: slot {text!r} is not a number.",
                hint="list the slots one by one, as in `0,1,2`.",
            )
        )
    if int(text) not in known:
        raise UsageError(
            compose(
                f"{where}: there is no slot {int(text)}.",
                hint=f"slots are numbered from 0 to {len(known) - 1} there.",
            )
        )
    return int(text)


def _canonical(name: str) -> str:
    """Return ``localhost`` for every name and address of this host, asking no name server."""
    own = socket.gethostname()
    names = {THIS_HOST, own, own.partition(".")[0]}
    addresses = {
        address.address.partition("%")[0]
        for interface in psutil.net_if_addrs().values()
        for address in interface
    }
    is_this_host = name.lower() in {known.lower() for known in names} or name in addresses
    return THIS_HOST if is_this_host else name


def _total(pool: Mapping[str, int]) -> str:
    return ", ".join(f"{count} slots on {name}" for name, count in pool.items())
