"""What is waited for when something runs on another stream."""

from __future__ import annotations

from typing import Protocol

__all__ = ["DONE", "Ticket"]


class Ticket(Protocol):
    """Something under way on another stream. See [Note: streams] in `collectives.py`."""

    def wait(self) -> object:
        """Make the compute stream wait for it; for gloo, make the host wait."""
        ...


class _Done:
    def wait(self) -> None:
        return


DONE: Ticket = _Done()
