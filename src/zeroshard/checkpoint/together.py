"""What all ranks must be given alike."""

from __future__ import annotations

from zeroshard.core.collectives import Answered, Exchange, broadcast_bytes
from zeroshard.core.mesh import Mesh
from zeroshard.errors import UsageError, compose

__all__ = ["check_equal", "from_rank_0"]


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
