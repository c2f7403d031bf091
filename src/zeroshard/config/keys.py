"""Keys that a DeepSpeed file may hold and that this version does not act on.

Every key of a configuration is in exactly one class. `Honoured` keys are fields of the models in
`schema`. The rest is listed here, each with its reason: `NoEffect` keys can be ignored without
changing a single number, `Refused` keys cannot, except at the values that ask for nothing. The
keys inside a block that is listed here are in `contents` and of the class of their block.

To build a feature, delete its row here and add a field there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from zeroshard.config.kinds import (
    Anything,
    Block,
    Count,
    CountOrNone,
    DtypeName,
    Flag,
    Kind,
    LargestNumel,
    Names,
    Text,
)
from zeroshard.config.values import is_auto, is_block

__all__ = [
    "ALIASES",
    "DEVICE_SWITCHES",
    "ROWS",
    "Always",
    "Honoured",
    "NoEffect",
    "Path",
    "Refused",
    "Treatment",
]

Path = tuple[str, ...]
"""Where a key sits, from the top of the file."""


def _not_given(value: object) -> bool:
    """Accept null and "auto"."""
    return value is None or is_auto(value)


def _only(*values: object) -> Callable[[object], bool]:
    """Accept null, "auto" and the given values; `True` is not 1 here."""

    def fits(value: object) -> bool:
        if isinstance(value, bool | int | float | str):
            return is_auto(value) or any(
                value == allowed and isinstance(value, bool) == isinstance(allowed, bool)
                for allowed in values
            )
        return value is None

    return fits


@dataclass(frozen=True, slots=True)
class Honoured:
    """The key does what it says."""


@dataclass(frozen=True, slots=True)
class Always:
    """A mark on an honoured field that can be had at one value only."""

    value: object
    reason: str
    """Why another value changes nothing."""


@dataclass(frozen=True, slots=True)
class NoEffect:
    """The key is accepted and changes nothing."""

    reason: str
    """Why, as a whole sentence."""

    kind: Kind = Anything
    """What the value has to be; null and "auto" always may."""

    asks_for_nothing: Callable[[object], bool] = _not_given
    """Whether a value is what happens anyway, so that there is nothing to say."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The key is an error unless its value asks for nothing."""

    reason: str
    """Why the value cannot simply be ignored, as a whole sentence."""

    asks_for_nothing: Callable[[object], bool]
    """Whether a value is what happens anyway."""

    instead: str
    """What to write, as the hint of the error."""

    subkey: str = ""
    """The key inside a block that the error shows."""

    reported: bool = False
    """Whether a value that asks for nothing is mentioned, as DeepSpeed stops at it."""


Treatment = Honoured | NoEffect | Refused


def _at_most(bound: int) -> Callable[[object], bool]:
    """Accept null, "auto" and numbers up to a bound."""

    def fits(value: object) -> bool:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value <= bound
        return value is None or is_auto(value)

    return fits


def _disabled(value: object) -> bool:
    """Accept null, false and a block whose switch is off or missing."""
    return _only(False)(value.get("enabled") if is_block(value) else value)


def _nothing_given(value: object) -> bool:
    """Accept null, "auto" and an empty block."""
    return not value if is_block(value) else _not_given(value)


def _nothing_enabled(value: object) -> bool:
    """Accept a block in which no nested switch is on."""
    inner = value.values() if is_block(value) else ()
    return _disabled(value) and all(_nothing_enabled(block) for block in inner if is_block(block))


def _empty(value: object) -> bool:
    """Accept null, false, an empty block and a block switched off by name."""
    if is_block(value):
        return not value or value.get("enabled") is False
    return _disabled(value)


def _no_ranks_per_tensor(value: object) -> bool:
    """Accept a tensor parallel block of one rank."""
    if not is_block(value):
        return _only(False)(value)
    tp = value.get("tp")
    size = tp.get("tp_size") if is_block(tp) else tp
    return _at_most(1)(value.get("autotp_size")) and _at_most(1)(size)


def _without_effect(reason: str) -> NoEffect:
    """Make the row of a switch."""
    return NoEffect(reason, kind=Flag, asks_for_nothing=_only(False))


def _block(reason: str, switch: str = "enabled") -> NoEffect:
    """Make the row of a block with a switch."""

    def is_off(value: object) -> bool:
        return _only(False)(value.get(switch) if is_block(value) else value)

    return NoEffect(reason, kind=Block, asks_for_nothing=is_off)


def _settings(reason: str) -> NoEffect:
    """Make the row of a block without a switch."""
    return NoEffect(reason, kind=Block, asks_for_nothing=_nothing_given)


def _switch(reason: str, *, subkey: str = "") -> Refused:
    return Refused(
        reason=reason,
        asks_for_nothing=_disabled,
        instead='remove it, or set "enabled": false.' if subkey else "remove it, or set false.",
        subkey=subkey,
    )


def _removed(
    what: str,
    harmless: Callable[[object], bool] = _disabled,
    instead: str = "remove the key.",
) -> Refused:
    return Refused(
        reason=f"DeepSpeed itself has removed {what}, and it is not built yet here.",
        asks_for_nothing=harmless,
        instead=instead,
        subkey="enabled",
        reported=True,
    )


_UNOBSERVED = "Monitoring and profiling are not built yet."
_THREADS = "Each read or write is one call of a thread; none is handed in for later."
_ONE_CHECKPOINT = "Checkpoints are written in one way, and fit any number of ranks."
_WHOLE_UNITS = "Parameters are gathered, reduced and freed by units."
_ALWAYS_FREE = "It guards a mechanism that this library does not have."
_OUTSIDE = "Communication stays outside of compiled graphs, so no pass has to place it there."
_AT_THE_TOP = 'Only the key inside the block "zero_optimization" counts, as in DeepSpeed.'

_TOP: Mapping[str, NoEffect | Refused] = {
    "amp": _removed(
        "Apex AMP", instead='remove it, and enable "torch_autocast", "bf16" or "fp16" instead.'
    ),
    "autotuning": _block("Tuning by trial runs is not built yet."),
    "checkpoint": _settings(_ONE_CHECKPOINT),
    "comet": _block(_UNOBSERVED),
    "comms_logger": _block(_UNOBSERVED),
    "compression_training": _removed("compression training", _nothing_enabled),
    "csv_monitor": _block(_UNOBSERVED),
    "curriculum_learning": _removed("this form of curriculum learning"),
    "data_efficiency": Refused(
        reason="It changes which samples are seen, and it is not built yet.",
        asks_for_nothing=_disabled,
        instead='remove it, or set "enabled": false.',
        subkey="enabled",
        reported=True,
    ),
    "data_parallel_size": NoEffect("Every rank is data parallel.", kind=Count),
    "disable_allgather": _without_effect("DeepSpeed ignores it too."),
    "disable_python_gc": _without_effect("The garbage collector is left to the script."),
    "dump_state": _without_effect("`zeroshard config explain` prints the configuration."),
    "eigenvalue": _removed("eigenvalue estimation"),
    "elasticity": _removed(
        "elastic batch sizes", instead='remove it, and set "train_batch_size" instead.'
    ),
    "expert_parallel": _switch("Expert parallelism is not built yet.", subkey="enabled"),
    "flops_profiler": _block(_UNOBSERVED),
    "gradient_allreduce_op": Refused(
        reason="Gradients are averaged over the ranks; a sum is not built yet.",
        asks_for_nothing=_only("mean"),
        instead='set "mean", and multiply the loss by the number of ranks if a sum is meant.',
    ),
    "graph_harvesting": _removed("graph harvesting"),
    "hybrid_engine": _switch("An engine that also generates is not built yet.", subkey="enabled"),
    "log_level": NoEffect('Set the level of the "zeroshard" logger.', kind=Text),
    "managed_gradient_accumulation": Refused(
        reason="Without it every step() is an optimizer step, which is not built yet.",
        asks_for_nothing=_only(True),
        instead="remove it, and call engine.set_gradient_accumulation_boundary() instead.",
    ),
    "memory_breakdown": _without_effect(_UNOBSERVED),
    "msamp": _switch("MS-AMP changes every number format, and it is not built yet."),
    "nebula": _removed("Nebula checkpoints"),
    "pipeline": _settings("Pipeline parallelism is not built yet."),
    "progressive_layer_drop": _removed("progressive layer drop"),
    "quantize_training": _removed("quantized training", _nothing_enabled),
    "seq_parallel_communication_data_type": NoEffect(
        "Sequence parallelism is not built yet.", kind=DtypeName
    ),
    "sequence_parallel_size": Refused(
        reason="Sequence parallelism is not built yet.",
        asks_for_nothing=_at_most(1),
        instead="remove it, or set 1.",
    ),
    "sparse_attention": _removed("sparse attention", _empty),
    "sparse_gradients": _switch(
        "Gradients are reduced as dense tensors; sparse reduction is not built yet."
    ),
    "tensor_parallel": Refused(
        reason="Tensor parallelism is not built yet.",
        asks_for_nothing=_no_ranks_per_tensor,
        instead="remove the block.",
        subkey="autotp_size",
    ),
    "tensorboard": _block(_UNOBSERVED),
    "timers": _settings(_UNOBSERVED),
    "use_data_before_expert_parallelism": _without_effect("Expert parallelism is not built yet."),
    "vocabulary_size": NoEffect("It only makes DeepSpeed print a warning.", kind=CountOrNone),
    "wall_clock_breakdown": _without_effect(_UNOBSERVED),
    "wandb": _block(_UNOBSERVED),
    "zero_force_ds_cpu_optimizer": _without_effect("Any optimizer may step offloaded state."),
    # Some frameworks write these three dotted names at the top by mistake; DeepSpeed ignores them.
    "zero_optimization.reduce_bucket_size": NoEffect(_AT_THE_TOP),
    "zero_optimization.stage3_param_persistence_threshold": NoEffect(_AT_THE_TOP),
    "zero_optimization.stage3_prefetch_bucket_size": NoEffect(_AT_THE_TOP),
}

_OPTIMIZER: Mapping[str, NoEffect | Refused] = {"legacy_fusion": _without_effect(_ALWAYS_FREE)}

_OPTIMIZER_PARAMS: Mapping[str, NoEffect | Refused] = {
    "max_grad_norm": Refused(
        reason="Optimizers do not clip here, as in DeepSpeed.",
        asks_for_nothing=_not_given,
        instead='move the number to the top-level key "gradient_clipping".',
    ),
}

_FP16: Mapping[str, NoEffect | Refused] = {
    "fp16_master_weights_and_grads": _switch("Master weights are fp32; fp16 is not built yet."),
}

_BF16: Mapping[str, NoEffect | Refused] = {
    "bf16_master_weights_and_grads": _switch("Master weights are fp32; bf16 is not built yet."),
    "bf16_optimizer_states": _switch("Optimizer state is fp32; bf16 is not built yet."),
    "immediate_grad_update": _without_effect("Gradients are always accumulated as they arrive."),
}

# What DeepSpeed's compiler passes do with graphs that hold the communication, too.
_COMPILE: Mapping[str, NoEffect | Refused] = {
    **dict.fromkeys(
        (
            "debug_log",
            "double_buffer",
            "free_activation",
            "keep_all_input_tensors",
            "keep_int_input_tensors",
            "offload_activation",
            "offload_activation_pin_memory",
            "offload_opt_states",
            "offload_parameters",
            "symmetric_memory",
            "sync_after_allgather",
            "sync_after_reduce",
            "sync_before_allgather",
            "sync_before_reduce",
        ),
        _without_effect(_OUTSIDE),
    ),
    "deepcompile": _without_effect(f'{_OUTSIDE} "enabled" compiles the blocks.'),
    "free_activation_threshold": NoEffect(_OUTSIDE, kind=Count),
    "passes": NoEffect(_OUTSIDE, kind=Names),
}

_ZERO: Mapping[str, NoEffect | Refused] = {
    "compute_grad_norm": NoEffect(
        "The norm is always computed.", kind=Flag, asks_for_nothing=_only(True)
    ),
    "cpu_offload_use_pin_memory": _without_effect("DeepSpeed ignores it too."),
    "elastic_checkpoint": _without_effect(_ONE_CHECKPOINT),
    "enable_sanity_checks": _without_effect("What it checks is always checked."),
    "grad_hooks": _without_effect(_ALWAYS_FREE),
    "legacy_stage1": _switch("DeepSpeed itself refuses it, and it is not built yet here."),
    "load_from_fp32_weights": _without_effect(_ONE_CHECKPOINT),
    "log_trace_cache_warnings": _without_effect(_ALWAYS_FREE),
    "mics_hierarchical_params_gather": _without_effect("It tunes MiCS, which is not built yet."),
    "mics_shard_size": Refused(
        reason="Sharding over a part of the ranks is not built yet.",
        asks_for_nothing=_at_most(0),
        instead="remove it, or set -1.",
    ),
    "override_module_apply": _without_effect(_ALWAYS_FREE),
    "parameter_alignment": _without_effect(_WHOLE_UNITS),
    "pipeline_loading_checkpoint": _without_effect(_ALWAYS_FREE),
    "save_muon_momentum_buffer_in_memory": _without_effect(
        "Momentum is optimizer state, which offload_optimizer places as a whole."
    ),
    "stage3_allgather_sequential": _without_effect(_WHOLE_UNITS),
    "stage3_module_granularity_threshold": NoEffect(
        _WHOLE_UNITS, kind=LargestNumel, asks_for_nothing=_only(0)
    ),
    "stage3_use_all_reduce_for_fetch_params": _without_effect(_WHOLE_UNITS),
    "use_multi_rank_bucket_allreduce": _without_effect(_WHOLE_UNITS),
    "zenflow": Refused(
        reason="ZenFlow applies updates late, and it is not built yet.",
        asks_for_nothing=_only(False),
        instead="remove the block.",
    ),
    "zero_hpz_partition_size": Refused(
        reason="A second copy of the parameters inside a node is not built yet.",
        asks_for_nothing=_at_most(1),
        instead="remove it, or set 1.",
    ),
    "zero_quantized_gradients": _switch("Reducing in 4 bits is lossy, and it is not built yet."),
    "zero_quantized_nontrainable_weights": _switch(
        "Gathering in 8 bits is lossy, and it is not built yet."
    ),
    "zero_quantized_weights": _switch("Gathering in 8 bits is lossy, and it is not built yet."),
    "zeropp_loco_param": Refused(
        reason="Error feedback for lossy reduction is not built yet.",
        asks_for_nothing=_only(False),
        instead="remove the block.",
    ),
}

_OFFLOAD_OPTIMIZER: Mapping[str, NoEffect | Refused] = {
    "super_offload": _without_effect(
        "It steps before the gradients' norm is known, and takes a wrong step back. Here state is "
        "on its way while the norm is computed, on any GPU."
    ),
}

_AIO: Mapping[str, NoEffect | Refused] = {
    "overlap_events": NoEffect(_THREADS, kind=Flag, asks_for_nothing=_only(True)),
    "single_submit": _without_effect(_THREADS),
    "use_gds": _without_effect(
        "Files are read and written by way of page-locked host memory, which takes no driver."
    ),
}

_BLOCKS: Mapping[Path, Mapping[str, NoEffect | Refused]] = {
    (): _TOP,
    ("optimizer",): _OPTIMIZER,
    ("optimizer", "params"): _OPTIMIZER_PARAMS,
    ("fp16",): _FP16,
    ("bf16",): _BF16,
    ("compile",): _COMPILE,
    ("aio",): _AIO,
    ("zero_optimization",): _ZERO,
    ("zero_optimization", "offload_optimizer"): _OFFLOAD_OPTIMIZER,
}

ROWS: Mapping[Path, NoEffect | Refused] = {
    (*block, name): row for block, rows in _BLOCKS.items() for name, row in rows.items()
}
"""Every known key that is not a field of the schema."""

_STAGE3_KEYS = (
    "allgather_sequential",
    "gather_16bit_weights_on_model_save",
    "max_live_parameters",
    "max_reuse_distance",
    "model_persistence_threshold",
    "module_granularity_threshold",
    "param_persistence_threshold",
    "prefetch_bucket_size",
    "use_all_reduce_for_fetch_params",
)

DEVICE_SWITCHES: Mapping[Path, Path] = {
    ("zero_optimization", "cpu_offload"): ("zero_optimization", "offload_optimizer"),
    ("zero_optimization", "cpu_offload_param"): ("zero_optimization", "offload_param"),
}
"""Older switches, where true is the block with the device "cpu"."""

ALIASES: Mapping[Path, Path] = {
    ("bfloat16",): ("bf16",),
    ("compile", "compile_kwargs"): ("compile", "kwargs"),
    ("zero_optimization", "stage3_gather_fp16_weights_on_model_save"): (
        "zero_optimization",
        "stage3_gather_16bit_weights_on_model_save",
    ),
    **DEVICE_SWITCHES,
    **{("zero_optimization", key): ("zero_optimization", f"stage3_{key}") for key in _STAGE3_KEYS},
}
"""Second names of keys, each with the name used here."""
