"""``deepspeed.utils.groups``: all ranks share data parallelism, and each is alone in all else."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from deepspeed._names import names

__all__ = [
    "_get_data_parallel_group",
    "_get_data_parallel_rank",
    "_get_data_parallel_world_size",
    "_get_model_parallel_world_size",
    "_get_sequence_data_parallel_group",
    "_get_sequence_data_parallel_rank",
    "_get_sequence_data_parallel_world_size",
    "_get_sequence_parallel_group",
    "_get_sequence_parallel_rank",
    "_get_sequence_parallel_world_size",
]

_ALONE = "a model is sharded over all ranks, and otherwise divided over none"


def _get_data_parallel_group() -> ProcessGroup | None:
    return dist.group.WORLD


def _get_data_parallel_rank() -> int:
    return dist.get_rank()


def _get_data_parallel_world_size() -> int:
    return dist.get_world_size()


@cache
def _alone() -> ProcessGroup:
    group: Any = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    return group


def _get_sequence_parallel_group() -> ProcessGroup:
    return _alone()


def _get_sequence_parallel_rank() -> int:
    return 0


def _get_sequence_parallel_world_size() -> int:
    return 1


def _get_model_parallel_world_size() -> int:
    return 1


_get_sequence_data_parallel_group = _get_data_parallel_group
_get_sequence_data_parallel_rank = _get_data_parallel_rank
_get_sequence_data_parallel_world_size = _get_data_parallel_world_size

__getattr__, __dir__ = names(
    __name__,
    instead={
        "_get_expert_data_parallel_group": _ALONE,
        "_get_expert_parallel_group": _ALONE,
        "_get_model_parallel_group": _ALONE,
        "initialize": _ALONE,
    },
)
