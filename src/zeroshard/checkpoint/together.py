"""What may fail on one rank, and is then an error on all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from zeroshard.core.collectives import Answered, Exchange, broadcast_bytes
from zeroshard.core.mesh import Mesh
from zeroshard.errors import DistributedError, Error, UsageError, compose

__all__ = ["agreed", "check_equal", "from_rank_0"]


@contextmanager
def agreed(
    mesh: Mesh, what: str, error_elsewhere: type[Error] = DistributedError
) -> Iterator[None]:
    """Around local work; a collective at its end.

    Args:
        mesh: the ranks.
        what: the work, as in "could not ...".
        error_elsewhere: what is raised if another rank failed, though this one did not.

    Raises:
        Error: of that class.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    told = b"" if error is None else f"{type(error).__name__}: {error}".encode()
    with Answered(mesh.rank, f"to know whether every rank could {what}"):
        lengths = [length for (length,) in Exchange(mesh, 1)([len(told)])]
        first = next((rank for rank, length in enumerate(lengths) if length), None)
        text = b"" if first is None else broadcast_bytes(told, mesh, first)
    if error is not None:
        raise error
    if first is not None:
        fact, _, hint = text.decode(errors="replace").partition("\n\nhint: ")
        raise error_elsewhere(
            compose(
                f"rank {first} could not {what}, so no rank did. {fact}",
                hint=hint or f"look at the error of rank {first}, which is the cause.",
            )
        )


def from_rank_0(data: bytes | None, mesh: Mesh, what: str) -> bytes:
    """What rank 0 has, on every rank; a collective."""
    with Answered(mesh.rank, what):
        return broadcast_bytes(data or b"", mesh)


def check_equal(text: str, mesh: Mesh, what: str) -> None:
    """Refuse to go on if ranks differ in what they were given; a collective.

    Raises:
        UsageError: on every rank.
    """
    theirs = from_rank_0(text.encode(), mesh, f"to compare {what}").decode()
    with Answered(mesh.rank, f"to compare {what}"):
        differ = [rank for rank, (d,) in enumerate(Exchange(mesh, 1)([text != theirs])) if d]
    if differ:
        raise UsageError(
            compose(
                f"ranks were given different values of {what}: rank 0 has {theirs!r}, and rank "
                f"{mesh.rank if text != theirs else differ[0]} has "
                + (f"{text!r}." if text != theirs else "another."),
                hint="call it with the same arguments on every rank.",
            )
        )
