"""What is waited for when something runs on another stream."""

from __future__ import annotations

from typing import Protocol

__all__ = ["DONE", "Mark", "Ticket"]


class Ticket(Protocol):
    """Something under way on another stream. See [Note: streams] in `collectives.py`."""

    def wait(self) -> object:
        """Make the compute stream wait for it; for gloo, make the host wait."""
        ...


class Mark(Ticket, Protocol):
    """A ticket that the host can wait for, too, as it must before it touches what is copied."""

    def synchronize(self) -> object:
        """Make the host wait for it."""
        ...


class _Done:
    def wait(self) -> None:
        return

    def synchronize(self) -> None:
        return


DONE: Mark = _Done()
