"""``deepspeed.runtime.zero.partition_parameters``: parameters that live in shards."""

from __future__ import annotations

from deepspeed._attributes import ZeroParamStatus, install
from deepspeed._names import names
from zeroshard.zero import (
    GatheredParameters,
    Init,
    register_external_parameter,
    unregister_external_parameter,
)

__all__ = [
    "GatheredParameters",
    "Init",
    "ZeroParamStatus",
    "is_zero_param",
    "register_external_parameter",
    "unregister_external_parameter",
]


install()


def is_zero_param(parameter: object) -> bool:
    """Tell whether a parameter lives in shards."""
    return hasattr(parameter, "ds_id")


__getattr__, __dir__ = names(__name__)
