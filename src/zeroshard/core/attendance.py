"""Who waits where, when a collective has failed: each rank that waits says so in the store."""

# The store behind the default process group has no public name.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

__all__ = ["forget_word", "leave_word", "roll_call", "word_of"]

_PATIENCE_S = 2.0
_PAUSE_S = 0.05


def roll_call(wanted: str) -> str:
    """Tell the other ranks what this one wanted, and say which of them wait, too, and which not.

    Empty where the store cannot be asked any more, as after the end of the host that keeps it.
    """
    if not dist.is_initialized():
        return ""
    rank, world = dist.get_rank(), dist.get_world_size()
    try:
        store = dist.distributed_c10d._get_default_store()
        # Ranks that survived earlier failures have counted those.
        number = store.add(f"zeroshard/failures/{rank}", 1)
        store.set(f"zeroshard/waits/{number}/{rank}", wanted)
        waits: dict[int, str] = {}
        missing = [other for other in range(world) if other != rank]
        deadline = time.monotonic() + _PATIENCE_S
        while missing and time.monotonic() < deadline:
            for other in list(missing):
                key = f"zeroshard/waits/{number}/{other}"
                if store.check([key]):
                    waits[other] = store.get(key).decode()
                    missing.remove(other)
            time.sleep(_PAUSE_S if missing else 0)
    except RuntimeError:
        return ""
    return _sentence(waits, missing)


def leave_word(text: str) -> None:
    """Let the other ranks read why this one leaves what they are in together."""
    _store_do(lambda store: store.set(_word_key(dist.get_rank()), text))


def forget_word() -> None:
    """Take back what `leave_word` left, which all have read."""
    _store_do(lambda store: store.delete_key(_word_key(dist.get_rank())))


def word_of(rank: int) -> str:
    """Why a rank left; empty if it does not say."""
    key = _word_key(rank)
    return _store_do(lambda store: store.get(key).decode() if store.check([key]) else "") or ""


def _word_key(rank: int) -> str:
    return f"zeroshard/left/{rank}"


def _store_do(what: Callable[[Any], Any]) -> Any:
    """Ask something of the store; None where nobody answers."""
    try:
        return what(dist.distributed_c10d._get_default_store())
    except (RuntimeError, ValueError):  # its host has ended; or there is no process group
        return None


def _sentence(waits: dict[int, str], missing: list[int]) -> str:
    parts = [f"rank {rank} wants {wanted}" for rank, wanted in sorted(waits.items())[:4]]
    if len(waits) > len(parts):
        parts.append(f"{len(waits) - len(parts)} others wait, too")
    if missing:
        ranks = ", ".join(str(rank) for rank in missing[:8]) + (", ..." if missing[8:] else "")
        who = f"rank {ranks} does" if len(missing) == 1 else f"ranks {ranks} do"
        parts.append(f"{who} not wait for anything here")
    return "; ".join(parts)
