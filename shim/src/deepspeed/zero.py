"""``deepspeed.zero``: models built in shards, and full parameters outside of forward."""

from deepspeed import _attributes
from deepspeed._names import names
from zeroshard.zero import (
    GatheredParameters,
    Init,
    OffloadStateTypeEnum,
    estimate_zero1_model_states_mem_needs,
    estimate_zero1_model_states_mem_needs_all_cold,
    estimate_zero1_model_states_mem_needs_all_live,
    estimate_zero2_model_states_mem_needs,
    estimate_zero2_model_states_mem_needs_all_cold,
    estimate_zero2_model_states_mem_needs_all_live,
    estimate_zero3_model_states_mem_needs,
    estimate_zero3_model_states_mem_needs_all_cold,
    estimate_zero3_model_states_mem_needs_all_live,
    register_external_parameter,
    unregister_external_parameter,
)

__all__ = [
    "GatheredParameters",
    "Init",
    "OffloadStateTypeEnum",
    "estimate_zero1_model_states_mem_needs",
    "estimate_zero1_model_states_mem_needs_all_cold",
    "estimate_zero1_model_states_mem_needs_all_live",
    "estimate_zero2_model_states_mem_needs",
    "estimate_zero2_model_states_mem_needs_all_cold",
    "estimate_zero2_model_states_mem_needs_all_live",
    "estimate_zero3_model_states_mem_needs",
    "estimate_zero3_model_states_mem_needs_all_cold",
    "estimate_zero3_model_states_mem_needs_all_live",
    "register_external_parameter",
    "unregister_external_parameter",
]

_attributes.install()

__getattr__, __dir__ = names(
    __name__,
    instead={
        "MiCS_Init": "every rank shards with all others; leave the groups of MiCS out",
        "TiledLinear": "use torch.nn.Linear; stage 3 frees it after use",
    },
)
