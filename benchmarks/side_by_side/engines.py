"""Each engine as a trainer: the same model from the same seed, the same optimizer and clipping."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import zeroshard
from side_by_side.workload import SHAPES, Shape, Variant, Workload
from zeroshard.core.pulled import Slab

__all__ = [
    "OffDevice",
    "Trainer",
    "adamw",
    "build",
    "bytes_beside",
    "deepspeed_configuration",
    "llama_config",
    "off_device",
    "unavailable",
    "zeroshard_configuration",
]

SEED = 0
CLIP = 1.0
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

_ADAMW: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.95), "weight_decay": 0.1}

Step = Callable[[Tensor], Tensor]


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class OffDevice:
    """Bytes of state that an engine keeps off the device on this rank, and has page-locked."""

    state_bytes: int
    pinned_bytes: int


def _all_on_device() -> OffDevice | None:
    return None


@dataclass
class Trainer:
    """An engine ready to train: a step from tokens to the loss, and what gives its memory back.

    ``warm_step`` takes the place of ``step`` before the measurement. ``bytes_beside`` are those on
    the device that torch's allocator does not count. ``off_device`` is None where the engine keeps
    nothing elsewhere or does not tell; ``optimizer`` says which one steps, where engines differ.
    """

    parameters: int
    step: Step
    close: Callable[[], None] = _nothing
    warm_step: Step | None = None
    bytes_beside: Callable[[], int] = int
    off_device: Callable[[], OffDevice | None] = _all_on_device
    optimizer: str = ""

    def warm(self, x: Tensor) -> Tensor:
        """Take a step before the measurement."""
        return (self.warm_step or self.step)(x)

    def release(self) -> None:
        """Let go of the model and all that trains it, which only the functions hold."""
        self.step, self.close, self.warm_step = torch.Tensor.detach, _nothing, None
        self.bytes_beside, self.off_device = int, _all_on_device


def unavailable(variant: Variant) -> str | None:
    """Return why an engine cannot run here, or None. Imports nothing."""
    if variant.family != "deepspeed":
        return None
    spec = importlib.util.find_spec("deepspeed")
    if spec is None or spec.origin is None:
        return "not installed"
    # Our stand-in of the same name has no such file.
    if not (Path(spec.origin).parent / "git_version_info.py").exists():
        return "not installed (the deepspeed found is zeroshard's stand-in)"
    return None


def build(variant: Variant, workload: Workload, device: torch.device) -> Trainer:
    """Build a model on the device and the engine that trains it. A collective."""
    model = _model(workload, device)
    if variant.family == "zeroshard":
        return _zeroshard(model, variant, workload)
    if variant.family == "deepspeed":
        return _deepspeed(model, variant, workload)
    if workload.compile:
        for block in model.model.layers:
            block.compile()
    if variant.family == "plain":
        return _plain(model)
    if variant.family == "plain-master":
        return _plain_master(model)
    return _fsdp2(model, workload, variant)


def adamw(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer of every engine."""
    return torch.optim.AdamW(params, fused=True, **_ADAMW)


def llama_config(shape: Shape, **more: Any) -> Any:
    """Return Hugging Face's configuration of a Llama of these widths."""
    from transformers import LlamaConfig  # noqa: PLC0415 - seconds to import

    return LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocab,
        max_position_embeddings=8192,
        use_cache=False,
        tie_word_embeddings=False,
        **more,
    )


def _model(workload: Workload, device: torch.device) -> Any:
    from transformers import LlamaForCausalLM  # noqa: PLC0415 - seconds to import

    config = llama_config(SHAPES[workload.model], attn_implementation="sdpa")
    before = torch.get_default_dtype()
    torch.manual_seed(SEED)
    torch.set_default_dtype(DTYPES[workload.dtype])
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    if workload.checkpointing == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def _loss(model: Callable[..., Any], x: Tensor) -> Tensor:
    return model(input_ids=x, labels=x).loss


def _numel(model: nn.Module) -> int:
    return sum(param.numel() for param in model.parameters())


def _average(grads: Iterable[Tensor | None]) -> None:
    ranks = dist.get_world_size()
    if ranks > 1:
        for grad in grads:
            if grad is not None:
                dist.all_reduce(grad.div_(ranks))


def _plain(model: nn.Module) -> Trainer:
    """PyTorch alone, all state in the dtype of the weights; ranks meet only before measuring.

    The warm-up averages gradients, so that its losses are those of training on all ranks' tokens.
    """
    optimizer = adamw(model.parameters())

    def train(x: Tensor, *, alone: bool) -> Tensor:
        loss = _loss(model, x)
        loss.backward()
        if not alone:
            _average(param.grad for param in model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Trainer(
        _numel(model),
        lambda x: train(x, alone=True),
        warm_step=lambda x: train(x, alone=False),
    )


def _plain_master(model: nn.Module) -> Trainer:
    """PyTorch alone with fp32 master weights and moments, as the sharded engines have them."""
    params = list(model.parameters())
    masters = [nn.Parameter(param.detach().float().clone()) for param in params]
    optimizer = adamw(masters)

    def train(x: Tensor, *, alone: bool) -> Tensor:
        loss = _loss(model, x)
        loss.backward()
        for param, master in zip(params, masters, strict=True):
            master.grad = None if param.grad is None else param.grad.float()
            param.grad = None
        if not alone:
            _average(master.grad for master in masters)
        nn.utils.clip_grad_norm_(masters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(params, masters)
        return loss.detach()

    return Trainer(
        _numel(model),
        lambda x: train(x, alone=True),
        warm_step=lambda x: train(x, alone=False),
    )


# Whether the blocks, and then the root with embedding and head, are resharded after forward. Left
# to its default, FSDP2 keeps the root: one gather less, for the memory of its full parameters.
_RESHARD = {
    "fsdp2": (True, True),
    "fsdp2-root-kept": (True, False),
    "fsdp2-kept": (False, False),
}


def _fsdp2(model: Any, workload: Workload, variant: Variant) -> Trainer:
    numel = _numel(model)
    more: dict[str, Any] = {}
    if variant.offload == "all":
        more["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    device = next(model.parameters()).device
    model.float()  # the master weights
    policy = MixedPrecisionPolicy(
        param_dtype=None if workload.dtype == "fp32" else DTYPES[workload.dtype],
        reduce_dtype=None if workload.dtype == "fp32" else DTYPES[workload.reduce],
    )
    of_blocks, of_root = _RESHARD[variant.family]
    for block in model.model.layers:
        fully_shard(block, mp_policy=policy, reshard_after_forward=of_blocks, **more)
    fully_shard(model, mp_policy=policy, reshard_after_forward=of_root, **more)
    params = list(model.parameters())
    optimizer = adamw(params)

    def step(x: Tensor) -> Tensor:
        loss = _loss(model, x)
        loss.backward()
        if more:
            _clip_on_host(params, device)
        else:
            nn.utils.clip_grad_norm_(params, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Trainer(numel, step)


def _clip_on_host(params: Sequence[nn.Parameter], device: torch.device) -> None:
    """Clip gradients that are sharded over host memory; the device's group sums their squares.

    torch's own clipping would ask NCCL to reduce a tensor of the host.
    """
    grads = [grad.to_local() for p in params if isinstance(grad := p.grad, DTensor)]
    norms = torch.nn.utils.get_total_norm(grads)
    square = norms.to(device).square()
    dist.all_reduce(square)
    torch._foreach_mul_(grads, float((CLIP / (square.sqrt() + 1e-6)).clamp(max=1.0)))


def _steps_of(engine: Any) -> Step:
    """A step through the calls that DeepSpeed's engine and ours share."""

    def step(x: Tensor) -> Tensor:
        loss = _loss(engine, x)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


def _zeroshard(model: nn.Module, variant: Variant, workload: Workload) -> Trainer:
    numel = _numel(model)
    engine, _, _, _ = zeroshard.initialize(
        model=model,
        optimizer=adamw(model.parameters()),
        config=variant.configuration(
            zeroshard_configuration(
                variant.stage or 0, workload.batch, workload.dtype, workload.reduce
            )
        ),
    )
    if workload.compile:
        engine.compile()

    return Trainer(
        numel,
        _steps_of(engine),
        engine.destroy,
        bytes_beside=lambda: bytes_beside(engine),
        off_device=lambda: off_device(engine),
    )


def zeroshard_configuration(
    stage: int, batch: int, dtype: str = "bf16", reduce: str = "bf16"
) -> dict[str, Any]:
    """Return our JSON, in which only what the engines have in common is set."""
    return {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_clipping": CLIP,
        "bf16": {"enabled": dtype == "bf16"},
        "communication_data_type": reduce if dtype == "bf16" else "fp32",
        "zero_optimization": {"stage": stage},
    }


def off_device(engine: zeroshard.Engine) -> OffDevice | None:
    """Return what an engine of ours keeps off the device on this rank, None if that is nothing."""
    report = engine.memory()
    found = OffDevice(report.host_bytes + report.file_bytes, report.pinned_bytes)
    return found if found.state_bytes else None


def bytes_beside(engine: zeroshard.Engine) -> int:
    """Return the bytes that others read on this rank, which torch's allocator does not count."""
    units = engine.runtime.units
    slabs = {unit.transport.memory for unit in units}
    shared = sum(slab.rows[0].nbytes for slab in slabs if isinstance(slab, Slab))
    return shared + max(unit.reducer.nbytes for unit in units)


def deepspeed_configuration(stage: int, batch: int, hidden: int) -> dict[str, Any]:
    """Return DeepSpeed's JSON as Hugging Face's documents and Trainer fill it in."""
    return {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": CLIP,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "allgather_partitions": True,
            "allgather_bucket_size": int(5e8),
            "reduce_bucket_size": hidden * hidden if stage == 3 else int(5e8),
            "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
            "stage3_param_persistence_threshold": 10 * hidden,
            "sub_group_size": int(1e9),
            "stage3_max_live_parameters": int(1e9),
            "stage3_max_reuse_distance": int(1e9),
        },
    }


def _deepspeed(model: nn.Module, variant: Variant, workload: Workload) -> Trainer:
    import deepspeed  # noqa: PLC0415 - seconds to import, and it is optional

    numel = _numel(model)
    base = deepspeed_configuration(
        variant.stage or 0, workload.batch, SHAPES[workload.model].hidden
    )
    if workload.dtype == "bf16":
        base |= {"bf16": {"enabled": True}, "communication_data_type": workload.reduce}
    optimizer = adamw(model.parameters())
    if variant.offload != "none":
        optimizer = _deepspeed_adamw(model.parameters()) or optimizer
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        config=variant.configuration(base),
        model_parameters=model.parameters(),
        optimizer=optimizer,
    )
    if workload.compile:
        engine.compile()

    name = type(optimizer).__name__ if variant.offload != "none" else ""
    return Trainer(numel, _steps_of(engine), engine.destroy, optimizer=name)


def _deepspeed_adamw(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer | None:
    """DeepSpeed's own AdamW for the host, or None where its kernel is neither built nor buildable.

    torch's fused one steps there then, which DeepSpeed allows and which is about as fast.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam  # noqa: PLC0415 - seconds to import

    try:
        return DeepSpeedCPUAdam(params, adamw_mode=True, **_ADAMW)
    except (RuntimeError, ImportError) as error:
        print(f"DeepSpeedCPUAdam cannot be had ({error.__cause__ or error}); torch's AdamW steps")
        return None
