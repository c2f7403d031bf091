"""What is inside the blocks that have a row in `keys`: every key, and the kind of its value.

The keys are checked although nothing acts on them, so that a typo is heard of before the feature
is built. Blocks of features that DeepSpeed has removed are not looked into.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from zeroshard.config.keys import Path
from zeroshard.config.kinds import (
    Anything,
    Block,
    Count,
    CountOrNone,
    DtypeName,
    Flag,
    FlagOrNone,
    Fraction,
    Kind,
    Names,
    NotNegative,
    SizeOrNone,
    Text,
    Whole,
    one_of,
)

__all__ = ["KINDS"]

_MONITOR = {"enabled": Flag, "output_path": Text, "job_name": Text}

_CHECKPOINT = {
    "tag_validation": one_of("Ignore", "Warn", "Fail"),
    "load_universal": Flag,
    "use_node_local_storage": Flag,
    "parallel_write": {"pipeline_stage": Flag},
    "checkpoint_serialization": Flag,
    "writer": {
        "type": one_of("MOCK", "PYTHON", "FAST"),
        "decoupled": Flag,
        "io_buffer_size": Count,
        "io_buffer_double": Flag,
        "show_statistics": Flag,
        "data_parallel": one_of("REPLICA", "SOCKET", "MACHINE"),
        "io_multiplier": Count,
    },
    "datastates_ckpt": Anything,
}

_AUTOTUNING = {
    "enabled": Flag,
    "fast": Flag,
    "results_dir": Text,
    "exps_dir": Text,
    "overwrite": Flag,
    "start_profile_step": Count,
    "end_profile_step": Count,
    "metric": one_of("throughput", "latency", "flops"),
    "tuner_type": one_of("gridsearch", "random", "model_based"),
    "tuner_early_stopping": Count,
    "tuner_num_trials": Count,
    "arg_mappings": Anything,
    "max_train_batch_size": CountOrNone,
    "min_train_batch_size": Count,
    "max_train_micro_batch_size_per_gpu": Count,
    "min_train_micro_batch_size_per_gpu": Count,
    "num_tuning_micro_batch_sizes": Count,
    "mp_size": Count,
    "model_info": {
        "profile": Flag,
        "num_params": SizeOrNone,
        "hidden_size": SizeOrNone,
        "num_layers": SizeOrNone,
    },
}

_DATA_EFFICIENCY = {
    "enabled": Flag,
    "seed": Whole,
    "data_sampling": {
        "enabled": Flag,
        "num_epochs": Count,
        "num_workers": SizeOrNone,
        "pin_memory": Flag,
        "curriculum_learning": Block,
        "dynamic_batching": Block,
    },
    "data_routing": {"enabled": Flag, "random_ltd": Block},
}

_EXPERT_PARALLEL = {
    "enabled": Flag,
    "autoep_size": Count,
    "preset_model": Text,
    **dict.fromkeys(
        ("async_split_plan", "disable_triton_grouped_mm", "use_grouped_mm"),
        Flag,
    ),
    **dict.fromkeys(("has_shared_experts", "route_norm"), FlagOrNone),
    **dict.fromkeys(
        ("expert_tensor_parallel_size", "num_expert_groups", "num_limited_groups"), CountOrNone
    ),
    **dict.fromkeys(
        (
            "combine_impl",
            "expert_pattern",
            "expert_w1",
            "expert_w2",
            "expert_w3",
            "moe_layer_pattern",
            "num_experts_attr",
            "router_pattern",
            "score_apply",
            "score_func",
            "shared_experts_pattern",
            "top_k_attr",
        ),
        Text,
    ),
    "load_balance_coeff": Anything,
    "route_scale": NotNegative,
    "routed_scaling_factor": NotNegative,
    "top_k": Count,
}

# A kind, or the keys of a block inside a block.
_Tree = Mapping[str, "Kind | _Tree"]

_TREE: _Tree = {
    "autotuning": _AUTOTUNING,
    "checkpoint": _CHECKPOINT,
    "comet": {
        "enabled": Flag,
        "samples_log_interval": Count,
        "project": Text,
        "workspace": Text,
        "api_key": Text,
        "experiment_name": Text,
        "experiment_key": Text,
        "online": FlagOrNone,
        "mode": Text,
    },
    "comms_logger": {
        "enabled": Flag,
        "prof_all": Flag,
        "prof_ops": Names,
        "verbose": Flag,
        "debug": Flag,
    },
    "csv_monitor": _MONITOR,
    "data_efficiency": _DATA_EFFICIENCY,
    "elasticity": {
        "enabled": Flag,
        "max_train_batch_size": Count,
        "micro_batch_sizes": Anything,
        "min_gpus": Count,
        "max_gpus": Count,
        "min_time": SizeOrNone,
        "prefer_larger_batch": Flag,
        "ignore_non_elastic_batch_info": Flag,
        "version": NotNegative,
        "model_parallel_size": Count,
        "num_gpus_per_node": Count,
    },
    "expert_parallel": _EXPERT_PARALLEL,
    "flops_profiler": {
        "enabled": Flag,
        "recompute_fwd_factor": NotNegative,
        "profile_step": Count,
        "module_depth": Whole,
        "top_modules": Count,
        "detailed": Flag,
        "output_file": Text,
    },
    "hybrid_engine": {
        "enabled": Flag,
        "max_out_tokens": Count,
        "inference_tp_size": Count,
        "release_inference_cache": Flag,
        "pin_parameters": Flag,
        "tp_gather_partition_size": Count,
        "enable_cuda_graph": Flag,
    },
    "pipeline": {
        "stages": Anything,
        "partition": Text,
        "seed_layers": Flag,
        "activation_checkpoint_interval": SizeOrNone,
        "pipe_partitioned": Flag,
        "grad_partitioned": Flag,
    },
    "tensor_parallel": {
        "autotp_size": SizeOrNone,
        "dtype": DtypeName,
        "tp_overlap_comm": Flag,
        "tp": {"tp_size": Count, "tp_grain_size": Count},
        "partition_config": Anything,
        "preset_model": Text,
        "vocab_parallel_lm_head": FlagOrNone,
        "keep_module_on_host": Flag,
    },
    "tensorboard": _MONITOR,
    "timers": {"throughput": {"enabled": Flag, "synchronized": Flag}},
    "wandb": {"enabled": Flag, "group": Text, "team": Text, "project": Text},
    "zero_optimization": {
        "zenflow": {
            "topk_ratio": Fraction,
            "select_strategy": one_of("auto", "step", "epoch"),
            "select_interval": Count,
            "update_interval": Count,
            "overlap_step": Flag,
            "offload": Flag,
            "auto_ratio": Fraction,
            "full_warm_up_rounds": SizeOrNone,
            "pt_reserved_cores_perc": Fraction,
        },
    },
}


def _flat(tree: _Tree, block: Path) -> Iterator[tuple[Path, Kind]]:
    for name, inside in tree.items():
        path = (*block, name)
        if isinstance(inside, Mapping):
            yield path, Block
            yield from _flat(inside, path)
        else:
            yield path, inside


KINDS: Mapping[Path, Kind] = dict(_flat(_TREE, ()))
"""The kind of every key by its path; the blocks themselves are in it, too."""
