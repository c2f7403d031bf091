"""``deepspeed.ops``: optimizers. None of them is compiled, so there is nothing to be compatible."""

from deepspeed._names import names

_KERNELS = "use the module of torch or of transformers; torch.compile fuses its kernels"

__compatible_ops__ = {"async_io": True}
"""Whether an operation that DeepSpeed compiles could be used here."""

__getattr__, __dir__ = names(
    __name__,
    {name: f"deepspeed.ops.{name}" for name in ("adagrad", "adam", "aio", "lamb", "lion")},
    {
        "fp_quantizer": "use torchao or bitsandbytes",
        "op_builder": "there is nothing to build: optimizers are those of torch, fused",
        "sparse_attention": "use torch.nn.attention.flex_attention",
        "transformer": _KERNELS,
    },
)
