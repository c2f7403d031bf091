"""What Accelerate is told about ranks that compute on the CPU.

Accelerate leaves it to DeepSpeed to join the ranks, and names the backend that belongs to its kind
of GPU. On a host without any it names none, keeps none, and would therefore take each of several
ranks for the only one, with all of the data: so the backend that was joined over is put there.
"""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed as dist

__all__ = ["tell_backend"]


def tell_backend() -> None:
    """Put the backend into Accelerate's state, if Accelerate is in the middle of setting it up."""
    owner = getattr(sys.modules.get("accelerate.state"), "PartialState", None)
    # All instances share this dictionary; to make one would set it up. An Accelerate without it is
    # not told, and the batch size that it computes for one rank is refused on several.
    state: dict[str, Any] = getattr(owner, "_shared_state", {})
    if state.get("backend", "set") is None and "num_processes" not in state:
        state["backend"] = dist.get_backend()
