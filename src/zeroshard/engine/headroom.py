"""Whether hosts and drives have room for what is to be kept there: one answer for all ranks.

Ranks of one host share its memory, and files on one drive its space. So each rank shows all others
what it asks for and what it finds free, all of them come to the same verdict, and an error is one
on every rank, before anything has been moved.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zeroshard.core.collectives import Answered, Exchange, broadcast_bytes
from zeroshard.core.mesh import Mesh
from zeroshard.core.pulled import host_number
from zeroshard.engine.budget import in_words
from zeroshard.errors import OffloadError, compose

__all__ = ["Claim", "Folder", "check_room"]

_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder that files are to be made in, and how many bytes of them; no bytes, no files."""

    key: str
    """The key of the configuration that names it."""

    path: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Claim:
    """What one rank asks for."""

    host_bytes: int
    """Bytes of host memory."""

    returned_bytes: int = 0
    """Bytes of host memory that it gives back meanwhile."""

    folders: Sequence[Folder] = ()
    """The same keys on all ranks."""


@dataclass(frozen=True, slots=True)
class _Offer:
    """What one rank finds in a folder: why no file can be made there, or how much is free."""

    error: int
    drive: int
    free: int
    asked: int


@dataclass(frozen=True, slots=True)
class _Told:
    """What one rank tells the others."""

    rank: int
    host: int
    asked: int
    free: int
    offers: tuple[_Offer, ...]


def check_room(claim: Claim, mesh: Mesh, free_host_bytes: Callable[[], int | None]) -> None:
    """Refuse to go on if a host or a drive has no room for all that is asked. A collective.

    Args:
        claim: what this rank asks for.
        mesh: the ranks.
        free_host_bytes: tells how much memory of this host is left; None where that is unknown.

    Raises:
        OffloadError: the same one on every rank.
    """
    free = free_host_bytes()
    mine = [host_number(), claim.host_bytes - claim.returned_bytes, -1 if free is None else free]
    for folder in claim.folders:
        offer = _look_into(folder)
        mine += [offer.error, offer.drive, offer.free, offer.asked]
    with Answered(mesh.rank, "to know whether there is room for what leaves the devices"):
        rows = Exchange(mesh, len(mine))(mine)
    told = [_read(rank, row) for rank, row in enumerate(rows)]
    _check_folders(told, claim.folders, mesh)
    _check_drives(told, claim.folders, mesh)
    _check_hosts(told)


def _look_into(folder: Folder) -> _Offer:
    if not folder.nbytes:
        return _Offer(0, 0, 0, 0)
    try:
        with tempfile.TemporaryFile(dir=folder.path) as file:
            drive = os.fstat(file.fileno()).st_dev
        return _Offer(0, drive, shutil.disk_usage(folder.path).free, folder.nbytes)
    except OSError as error:
        return _Offer(error.errno or -1, 0, 0, folder.nbytes)


def _read(rank: int, row: Sequence[int]) -> _Told:
    host, asked, free, *rest = row
    offers = tuple(_Offer(*rest[at : at + 4]) for at in range(0, len(rest), 4))
    return _Told(rank, host, asked, free, offers)


def _path_on(rank: int, folder: Folder, mesh: Mesh) -> str:
    """What a rank has as the path of a folder. A collective: paths may differ."""
    return broadcast_bytes(folder.path.encode(), mesh, rank).decode()


def _check_folders(told: Sequence[_Told], folders: Sequence[Folder], mesh: Mesh) -> None:
    for number, folder in enumerate(folders):
        failed = [each for each in told if each.offers[number].error]
        if failed:
            error = failed[0].offers[number].error
            reason = os.strerror(error) if error > 0 else "the system gives no reason"
            path = _path_on(failed[0].rank, folder, mesh)
            raise OffloadError(
                compose(
                    f"{folder.key} is {path!r}, where {_ranks(failed)} cannot make files: "
                    f"{reason}.",
                    hint="make that folder on every host, writable for the one who trains, or name "
                    "another one.",
                )
            )


def _check_drives(told: Sequence[_Told], folders: Sequence[Folder], mesh: Mesh) -> None:
    drives: dict[tuple[int, int], list[tuple[_Told, Folder, _Offer]]] = {}
    for each in told:
        for folder, offer in zip(folders, each.offers, strict=True):
            if offer.asked:
                drives.setdefault((each.host, offer.drive), []).append((each, folder, offer))
    for claims in drives.values():
        asked = sum(offer.asked for _, _, offer in claims)
        free = min(offer.free for _, _, offer in claims)
        if asked > free:
            named = dict.fromkeys(
                f"{_path_on(each.rank, folder, mesh)} ({folder.key})" for each, folder, _ in claims
            )
            ranks = list(dict.fromkeys(each for each, _, _ in claims))
            raise OffloadError(
                compose(
                    f"{_ranks(ranks)} would keep {in_words(asked)} in files in "
                    f"{' and '.join(named)}, and {in_words(free)} are free there.",
                    hint="free space on that drive, name a folder on another one, or offload less "
                    'with "ratio" or "gpu_budget".',
                )
            )


def _check_hosts(told: Sequence[_Told]) -> None:
    hosts: dict[int, list[_Told]] = {}
    for each in told:
        hosts.setdefault(each.host, []).append(each)
    for ranks in hosts.values():
        asked = sum(each.asked for each in ranks)
        free = min((each.free for each in ranks if each.free >= 0), default=None)
        if free is not None and asked > free:
            raise OffloadError(
                compose(
                    f"{_ranks(ranks)} would keep {in_words(asked)} more in the memory of their "
                    f"host, and {in_words(free)} are free there, or within the limit of its "
                    "container.",
                    hint='offload less with "ratio" or "gpu_budget", offload to "nvme", use more '
                    "hosts, or raise the memory limit.",
                )
            )


def _ranks(told: Sequence[_Told]) -> str:
    numbers = [str(each.rank) for each in told]
    more = f" and {len(numbers) - _SHOWN} others" if len(numbers) > _SHOWN else ""
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(numbers[:_SHOWN])}{more}"
