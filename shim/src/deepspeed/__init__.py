"""The name ``deepspeed`` for zeroshard: programs written for DeepSpeed run on it unchanged.

Names are imported from zeroshard when they are first used: this package is imported by every
program that uses Hugging Face's libraries, whether it trains with it or not.
"""

from __future__ import annotations

from deepspeed._installed import check
from deepspeed._names import names

__version__ = "0.19.8+zeroshard.0.1"

_PIPELINES = "zeroshard has no pipeline parallelism; stage 3 shards the layers over all ranks"
_EXPERTS = (
    "zeroshard has no expert parallelism; experts train as ordinary modules, and "
    "deepspeed.utils.set_z3_leaf_modules gathers each block of them as a whole"
)
_INFERENCE = (
    "zeroshard trains; initialize(model=..., config=...) without an optimizer shards a model that "
    "is only run, and deepspeed.zero.GatheredParameters makes it whole"
)
_KERNELS = "use the module of torch or of transformers; torch.compile fuses its kernels"

check()

__getattr__, __dir__ = names(
    __name__,
    {
        "DeepSpeedConfigError": "zeroshard.errors:ConfigError",
        "DeepSpeedEngine": "deepspeed.runtime.engine:DeepSpeedEngine",
        "DeepSpeedOptimizer": "deepspeed.runtime.base_optimizer:DeepSpeedOptimizer",
        "add_config_arguments": "zeroshard.engine.arguments:add_config_arguments",
        "dist": "deepspeed.comm",
        "get_accelerator": "deepspeed.accelerator:get_accelerator",
        "init_distributed": "zeroshard.core.world:init_distributed",
        "initialize": "deepspeed._initialize:initialize",
        "log_dist": "deepspeed.utils.logging:log_dist",
        "logger": "deepspeed.utils.logging:logger",
        "tp_model_init": "deepspeed.runtime.tensor_parallel:tp_model_init",
        **{
            module: f"deepspeed.{module}"
            for module in (
                *("accelerator", "checkpoint", "checkpointing", "comm", "launcher", "ops"),
                *("runtime", "utils", "zero"),
            )
        },
    },
    {
        "DeepSpeedConfig": "zeroshard.config.load(source) reads and checks a configuration",
        "DeepSpeedHybridEngine": "deepspeed.initialize makes the one kind of engine there is, and "
        "zeroshard.zero.unwrap_model_for_generation makes its model whole to generate",
        "DeepSpeedTransformerConfig": _KERNELS,
        "DeepSpeedTransformerLayer": _KERNELS,
        "InferenceEngine": _INFERENCE,
        "OnDevice": 'build the model inside `with torch.device("meta"):`, or in shards inside '
        "`with deepspeed.zero.Init():`",
        "PipelineEngine": _PIPELINES,
        "PipelineModule": _PIPELINES,
        "add_tuning_arguments": "declare the arguments in your parser, and put the schedule into "
        'the "scheduler" block of the configuration',
        "autotuning": 'set the batch size in the configuration; "auto" takes it from the script',
        "compression": "zeroshard does not compress models; use torchao or bitsandbytes",
        "elasticity": "the launcher's --max_restarts starts ranks again after a failure",
        "inference": _INFERENCE,
        "init_inference": _INFERENCE,
        "linear": "use the LoRA layers of peft, which train at every stage",
        "model_implementations": _INFERENCE,
        "module_inject": _INFERENCE,
        "moe": _EXPERTS,
        "monitor": "log what the engine tells: get_global_grad_norm(), get_lr(), memory()",
        "nebula": "engine.save_checkpoint writes to any folder",
        "pipe": _PIPELINES,
        "profiling": "use torch.profiler, and torch.utils.flop_counter for operations",
        "sequence": "zeroshard has no sequence parallelism; use a micro-batch of 1 with "
        "deepspeed.checkpointing for long sequences",
    },
)
