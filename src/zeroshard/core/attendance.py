"""Who waits where, when a collective has failed: each rank that waits says so in the store."""

# The store behind the default process group has no public name.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import time

import torch.distributed as dist

__all__ = ["roll_call"]

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


def _sentence(waits: dict[int, str], missing: list[int]) -> str:
    parts = [f"rank {rank} wants {wanted}" for rank, wanted in sorted(waits.items())[:4]]
    if len(waits) > len(parts):
        parts.append(f"{len(waits) - len(parts)} others wait, too")
    if missing:
        ranks = ", ".join(str(rank) for rank in missing[:8]) + (", ..." if missing[8:] else "")
        who = f"rank {ranks} does" if len(missing) == 1 else f"ranks {ranks} do"
        parts.append(f"{who} not wait for anything here")
    return "; ".join(parts)
