"""``deepspeed.runtime.zero``: what ``deepspeed.zero`` holds, and where its parts are said to be."""

from deepspeed._names import names
from deepspeed.runtime.zero.partition_parameters import (
    GatheredParameters,
    Init,
    ZeroParamStatus,
    is_zero_param,
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

__getattr__, __dir__ = names(
    __name__,
    {
        name: f"deepspeed.runtime.zero.{name}"
        for name in (
            *("offload_config", "parameter_offload", "partition_parameters"),
            *("stage3", "stage_1_and_2"),
        )
    },
    {
        "config": "zeroshard.config.load(source) reads and checks a configuration",
        "mics": "every rank shards with all others; leave the groups of MiCS out",
        "tiling": "use torch.nn.Linear; stage 3 frees it after use",
    },
)
