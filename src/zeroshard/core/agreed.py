"""What may fail on one rank, and is then an error on all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from zeroshard.core.collectives import Answered, Exchange, broadcast_bytes
from zeroshard.core.mesh import Mesh
from zeroshard.errors import DistributedError, OffloadError, compose

__all__ = ["agreed"]


@contextmanager
def agreed(mesh: Mesh, what: str) -> Iterator[None]:
    """Around local work; a collective at its end.

    Args:
        mesh: the ranks.
        what: the work, as in "could not ...".

    Raises:
        OffloadError: another rank raised one.
        DistributedError: another rank failed in another way.
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
        kinds = [OffloadError, DistributedError]
        raise next((kind for kind in kinds if fact.startswith(kind.__name__)), DistributedError)(
            compose(
                f"rank {first} could not {what}, so no rank did. {fact}",
                hint=hint or f"look at the error of rank {first}, which is the cause.",
            )
        )
