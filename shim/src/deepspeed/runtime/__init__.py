"""``deepspeed.runtime``: the engine, its optimizer and its schedules."""

from deepspeed._names import names

__getattr__, __dir__ = names(
    __name__,
    {
        name: f"deepspeed.runtime.{name}"
        for name in (
            *("activation_checkpointing", "base_optimizer", "dataloader", "engine"),
            *("lr_schedules", "sequence_parallel", "tensor_parallel", "utils", "zero"),
        )
    },
    {
        "bf16_optimizer": 'one optimizer serves all dtypes; "bf16": {"enabled": true} chooses',
        "config": "zeroshard.config.load(source) reads and checks a configuration",
        "fp16": 'one optimizer serves all dtypes; "fp16": {"enabled": true} chooses',
        "hybrid_engine": "zeroshard.zero.unwrap_model_for_generation makes a model whole",
        "pipe": "zeroshard has no pipeline parallelism; stage 3 shards the layers over all ranks",
        "progressive_layer_drop": "drop layers in the model's forward",
        "swap_tensor": "state is kept on the devices",
    },
)
