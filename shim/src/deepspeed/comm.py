"""``deepspeed.comm``: the collectives of torch, which zeroshard's own are, too."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch.distributed as dist
from torch.distributed import (
    ProcessGroup,
    ReduceOp,
    all_gather,
    all_gather_into_tensor,
    all_gather_object,
    all_reduce,
    all_to_all,
    all_to_all_single,
    barrier,
    broadcast,
    broadcast_object_list,
    destroy_process_group,
    gather,
    get_backend,
    get_global_rank,
    get_group_rank,
    get_process_group_ranks,
    get_rank,
    get_world_size,
    irecv,
    is_available,
    isend,
    monitored_barrier,
    new_group,
    recv,
    reduce,
    reduce_scatter,
    reduce_scatter_tensor,
    scatter,
    send,
)

from deepspeed._accelerate import tell_backend
from deepspeed._names import names
from zeroshard.core import world

__all__ = [
    "ProcessGroup",
    "ReduceOp",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "destroy_process_group",
    "gather",
    "get_all_ranks_from_group",
    "get_backend",
    "get_global_rank",
    "get_group_rank",
    "get_local_rank",
    "get_process_group_ranks",
    "get_rank",
    "get_world_group",
    "get_world_size",
    "init_distributed",
    "irecv",
    "is_available",
    "is_initialized",
    "isend",
    "monitored_barrier",
    "new_group",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "send",
]

_PROFILER = "use torch.profiler, which shows every collective by its name"

get_local_rank = world.local_rank
get_all_ranks_from_group = get_process_group_ranks


@wraps(world.init_distributed)
def init_distributed(*args: Any, **kwargs: Any) -> None:
    """Join the other ranks; keep a process group that exists already."""
    world.init_distributed(*args, **kwargs)
    tell_backend()


def is_initialized() -> bool:
    """Tell whether the ranks have been joined; Accelerate, which asks, is told how."""
    joined = dist.is_initialized()
    if joined:
        tell_backend()
    return joined


def get_world_group() -> ProcessGroup | None:
    """Return the group of all ranks."""
    return dist.group.WORLD


__getattr__, __dir__ = names(
    __name__,
    instead={
        "configure": _PROFILER,
        "inference_all_reduce": "use all_reduce",
        "initialize_mesh_device": "use torch.distributed.device_mesh.init_device_mesh",
        "log_summary": _PROFILER,
    },
)
