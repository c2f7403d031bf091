"""``deepspeed.utils``: logging, groups, leaf modules, and the state of single parameters."""

from deepspeed._names import names
from deepspeed.utils import groups
from deepspeed.utils.logging import log_dist, logger
from deepspeed.utils.nvtx import instrument_w_nvtx
from deepspeed.utils.z3_leaf_module import (
    get_z3_leaf_modules,
    set_z3_leaf_module,
    set_z3_leaf_modules,
    set_z3_leaf_modules_by_name,
    set_z3_leaf_modules_by_suffix,
    unset_z3_leaf_modules,
    z3_leaf_module,
    z3_leaf_parameter,
)
from zeroshard.zero import (
    RepeatingLoader,
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_grad,
    safe_set_local_optimizer_state,
    safe_update_full_grad_vectorized,
)

__all__ = [
    "RepeatingLoader",
    "get_z3_leaf_modules",
    "groups",
    "instrument_w_nvtx",
    "log_dist",
    "logger",
    "safe_get_full_fp32_param",
    "safe_get_full_grad",
    "safe_get_full_optimizer_state",
    "safe_get_local_fp32_param",
    "safe_get_local_grad",
    "safe_get_local_optimizer_state",
    "safe_set_full_fp32_param",
    "safe_set_full_grad",
    "safe_set_full_optimizer_state",
    "safe_set_local_fp32_param",
    "safe_set_local_grad",
    "safe_set_local_optimizer_state",
    "safe_update_full_grad_vectorized",
    "set_z3_leaf_module",
    "set_z3_leaf_modules",
    "set_z3_leaf_modules_by_name",
    "set_z3_leaf_modules_by_suffix",
    "unset_z3_leaf_modules",
    "z3_leaf_module",
    "z3_leaf_parameter",
]

_FRAGMENTS = "use the safe_get_local_* and safe_get_full_* functions"

__getattr__, __dir__ = names(
    __name__,
    {"zero_to_fp32": "deepspeed.utils.zero_to_fp32"},
    {
        "OnDevice": 'build the model inside `with torch.device("meta"):`, or in shards inside '
        "`with deepspeed.zero.Init():`",
        "get_full_hp_grad": "use safe_get_full_grad",
        "get_full_hp_param": "use safe_get_full_fp32_param",
        "get_hp_fragment_mapping": _FRAGMENTS,
        "tensor_fragment": _FRAGMENTS,
    },
)
