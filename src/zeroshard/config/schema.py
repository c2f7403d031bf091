"""The typed configuration: one frozen model per block, one documented field per key.

The docstring under a field is its entry in the reference page, so it says what the key does and
what DeepSpeed's default is where the two differ. A field whose type carries `NoEffect` is checked
for its type and otherwise ignored; one that carries `Always` can be had at one value only. Keys
without a field are in `keys`.

Sub-blocks default to their models, so readers of a `Config` never test for a missing block. What
keys demand of each other is in `rules`; `load` checks it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from zeroshard.config.batch import Batch, resolve
from zeroshard.config.keys import Always
from zeroshard.config.kinds import (
    Budget,
    Count,
    CountOrNone,
    Device,
    DtypeName,
    Flag,
    FlagOrNone,
    Fraction,
    FractionOrNone,
    Kernels,
    LargestNumel,
    LargestNumelFromOne,
    Name,
    Names,
    NamesOrAuto,
    NamesOrNone,
    NotNegative,
    PathOrNone,
    Positive,
    ScalePower,
    SizeOrNone,
    Stage,
    StepsPerPrint,
    Transfer,
    Where,
    expected,
)

__all__ = [
    "ActivationCheckpointing",
    "AioConfig",
    "Bf16Config",
    "CompileConfig",
    "Config",
    "DataTypes",
    "ExtensionConfig",
    "Fp16Config",
    "LeafModule",
    "OffloadOptimizer",
    "OffloadParam",
    "OptimizerConfig",
    "SchedulerConfig",
    "TorchAutocast",
    "ZeroConfig",
]

_ONE_BUFFER = Always(True, "The gradients of a unit always lie in one buffer.")
_GATHERED = Always(True, "Parameters are always gathered by all-gather.")
_NO_PATCH = Always(True, "torch.nn.functional.linear is never replaced.")
_PREALLOCATED = Always(True, "Files are preallocated, and filled once.")
_READ_AHEAD = Always(True, "What is in files is always read before it is needed.")
_WRITTEN_BEHIND = Always(True, "What goes to files is always written while work goes on.")


class _Block(BaseModel):
    """A JSON object with known keys only."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class OptimizerConfig(_Block):
    """Which optimizer to make."""

    type: Name
    """The optimizer's name in any case: a class of torch.optim, Lion, Lamb, Muon, an 8-bit
    optimizer of bitsandbytes or torchao, or one of mup."""

    params: dict[str, object] = Field(default_factory=dict[str, object])
    """Its arguments. "auto" is resolved from the caller."""


class SchedulerConfig(_Block):
    """Which learning rate schedule to make."""

    type: Name
    """The schedule's name: WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest, or a
    class of torch.optim.lr_scheduler."""

    params: dict[str, object] = Field(default_factory=dict[str, object])
    """Its arguments. "auto" is resolved from the caller."""


class Fp16Config(_Block):
    """Training in fp16 with a loss scale."""

    enabled: Flag = False
    """Whether the model computes in fp16; "auto" follows its parameters."""

    auto_cast: Flag = False
    """Whether floating-point inputs of the model are cast to fp16."""

    loss_scale: NotNegative = 0.0
    """A fixed loss scale, or 0 for a dynamic one."""

    initial_scale_power: ScalePower = 16
    """The dynamic loss scale starts at 2 to this power."""

    loss_scale_window: Count = 1000
    """Steps without overflow after which the dynamic loss scale doubles."""

    hysteresis: Count = 2
    """The dynamic loss scale halves at the overflow of this number; those before are tolerated."""

    consecutive_hysteresis: Flag = False
    """Whether a step without overflow restores the tolerance at once."""

    min_loss_scale: NotNegative = 1.0
    """The dynamic loss scale never falls below this number."""

    @field_validator("min_loss_scale")
    @classmethod
    def _reachable(cls, value: float, info: ValidationInfo) -> float:
        if value == 0 and info.data.get("loss_scale") == 0:
            raise expected("greater than 0 while the loss scale is dynamic")
        return value


class Bf16Config(_Block):
    """Training in bf16."""

    enabled: Flag = False
    """Whether the model computes in bf16; "auto" follows its parameters."""

    check_grad_overflow: Flag = True
    """Whether a step with infinite or NaN gradients is skipped."""


class TorchAutocast(_Block):
    """Computing in lower precision by torch.autocast, with parameters in fp32."""

    enabled: Flag = False
    """Whether forward runs under torch.autocast."""

    dtype: DtypeName = None
    """The dtype to cast to, fp16 or bf16; null is torch's choice for the device."""

    lower_precision_safe_modules: NamesOrNone = None
    """Classes whose parameters are gathered in the lower dtype; null is linear and convolution."""


class DataTypes(_Block):
    """Dtypes beside the one computed in."""

    grad_accum_dtype: DtypeName = None
    """The dtype gradients are accumulated in; null is fp32 (DeepSpeed: the model's dtype)."""

    param_dtype: DtypeName = None
    """The dtype computed in, which has to be the one the fp16 and bf16 blocks choose."""

    buffer_dtype: DtypeName = None
    """The dtype floating-point buffers are cast to; null leaves them as they are."""

    keep_in_fp32_modules: NamesOrAuto = ()
    """Modules whose parameters stay fp32; "auto" is the list the model itself brings."""


class ActivationCheckpointing(_Block):
    """How zeroshard.checkpointing keeps the inputs of what it runs again in backward."""

    partition_activations: Flag = False
    """Whether kept inputs are divided over the ranks of a tensor parallel group."""

    number_checkpoints: CountOrNone = None
    """Number of checkpointed parts of the model."""

    contiguous_memory_optimization: Flag = False
    """Whether copies of inputs lie in one buffer; needs number_checkpoints."""

    synchronize_checkpoint_boundary: Flag = False
    """Whether the device is waited for at both ends of a checkpointed part."""

    profile: Flag = False
    """Nothing is printed: torch.profiler shows every checkpointed part by name."""

    cpu_checkpointing: Flag = False
    """Whether kept inputs are moved to the host."""


class CompileConfig(_Block):
    """Compiling the model's repeated blocks with torch.compile."""

    enabled: Flag = False
    """Whether the blocks are compiled, those of one class as one graph."""

    backend: Name = "inductor"
    """A backend that torch.compile knows by name."""

    kwargs: dict[str, object] = Field(default_factory=dict[str, object])
    """Further arguments of torch.compile."""


class OffloadOptimizer(_Block):
    """Where optimizer state and master weights live, at every stage."""

    device: Device = "none"
    """The device that trains with "none", host memory with "cpu", files with "nvme"."""

    nvme_path: PathOrNone = None
    """The folder for the files of "nvme", which has to exist; each run makes files of its own."""

    pin_memory: Flag = True
    """Whether host memory is page-locked, without which copies are slow and wait for each other."""

    ratio: Fraction = 1.0
    """The part of the bytes of this state that leaves the device, exact to one parameter's slice.
    What the first layers need stays (DeepSpeed: of groups of sub_group_size, at stage 3 only)."""

    buffer_count: CountOrNone = None
    """Buffers on the device that state streams through; null is the engine's choice by what is
    free (DeepSpeed: 4, between host memory and files)."""

    cpuadam_cores_perc: FractionOrNone = None
    """The part of a rank's cores that an update on the host uses, at least one core; null is the
    engine's choice (DeepSpeed: 0.8)."""

    pipeline_read: Annotated[Flag, _READ_AHEAD] = True
    """Whether a part is read while the one before it is stepped (DeepSpeed: false)."""

    pipeline_write: Annotated[Flag, _WRITTEN_BEHIND] = True
    """Whether a part is written while the one after it is stepped (DeepSpeed: false)."""

    fast_init: Annotated[Flag, _PREALLOCATED] = True
    """Whether making the files writes nothing but what they are to hold (DeepSpeed: false)."""


class OffloadParam(_Block):
    """Where the shards of parameters live at stage 3."""

    device: Device = "none"
    """The device that trains with "none", host memory with "cpu", files with "nvme"."""

    nvme_path: PathOrNone = None
    """The folder for the files of "nvme", which has to exist; each run makes files of its own."""

    pin_memory: Flag = True
    """Whether host memory is page-locked, without which copies are slow and wait for each other."""

    buffer_count: CountOrNone = None
    """With "nvme", buffers in host memory that shards pass through; null is the engine's choice
    (DeepSpeed: 5)."""

    buffer_size: LargestNumelFromOne = None
    """Most elements of one such buffer; larger shards pass in pieces. null is the engine's choice
    (DeepSpeed: 1e8)."""

    max_in_cpu: LargestNumel = None
    """With "nvme", elements of a rank's shards that are kept in host memory all the same, those
    needed first; null is 0 (DeepSpeed: 1e9)."""


class AioConfig(_Block):
    """How the files of "nvme" are read and written."""

    block_size: CountOrNone = None
    """Bytes of one read or write; null is the engine's choice (DeepSpeed: 1048576)."""

    queue_depth: CountOrNone = None
    """Reads and writes under way at once for each of intra_op_parallelism; null is the engine's
    choice (DeepSpeed: 8)."""

    intra_op_parallelism: CountOrNone = None
    """What queue_depth is multiplied by, to give the threads of a rank that read and write, each
    one block at a time; null is 1."""

    thread_count: CountOrNone = None
    """As intra_op_parallelism, which goes before it, by the name in DeepSpeed's pages."""


class LeafModule(_Block):
    """Modules that are gathered as one, with everything below them; inside a block, with that."""

    classes: Names = ()
    """Class names, bare or with their module."""

    names: Names = ()
    """Paths in the model."""

    name_suffixes: Names = ()
    """Ends of paths in the model."""


class ZeroConfig(_Block):
    """What is sharded over the ranks, and the tuning keys of DeepSpeed's ZeRO."""

    stage: Stage = 0
    """0 shards nothing, 1 optimizer state, 2 also gradients, 3 also parameters."""

    overlap_comm: FlagOrNone = None
    """Whether communication runs beside computation; null is true. false finishes each collective
    before computation goes on (DeepSpeed: null is true at stage 3 only)."""

    contiguous_gradients: Annotated[Flag, _ONE_BUFFER] = True
    """Whether the gradients of a unit lie in one buffer."""

    reduce_scatter: Flag = True
    """Whether gradients are averaged by reduce-scatter; false averages by all-reduce, of which
    each rank keeps its part."""

    allgather_partitions: Annotated[Flag, _GATHERED] = True
    """Whether parameters are gathered by all-gather."""

    reduce_bucket_size: LargestNumelFromOne = None
    """Most elements of a unit that is put together from small layers outside blocks; null is the
    engine's choice, and the smaller of this and allgather_bucket_size counts. A block is never
    divided, since that saves neither memory nor time (DeepSpeed: 5e8)."""

    allgather_bucket_size: LargestNumelFromOne = None
    """As reduce_bucket_size (DeepSpeed: 5e8)."""

    sub_group_size: LargestNumelFromOne = None
    """Elements of a rank's master weights that are stepped at once; null is all
    (DeepSpeed: 1e9)."""

    stage3_prefetch_bucket_size: LargestNumel = None
    """Elements gathered ahead of their use, at least one unit unless 0; null is one unit
    (DeepSpeed: 5e7)."""

    stage3_param_persistence_threshold: LargestNumel = None
    """Parameters of at most this many elements stay full; null is 0 (DeepSpeed: 1e5)."""

    stage3_model_persistence_threshold: LargestNumel = None
    """Most elements that stay full because of their size; null is no limit."""

    stage3_max_live_parameters: LargestNumel = None
    """Elements full at once beyond which nothing is gathered ahead or kept; null is no limit
    (DeepSpeed: 1e9)."""

    stage3_max_reuse_distance: LargestNumel = None
    """A unit needed again within so many elements stays full in between; null is 0
    (DeepSpeed: 1e9)."""

    stage3_gather_16bit_weights_on_model_save: Flag = False
    """Whether engine.save_16bit_model gathers the parameters, which it needs at stage 3."""

    round_robin_gradients: Flag = False
    """Whether gradients are dealt out evenly over the ranks; every rank's part is of equal size
    either way."""

    ignore_unused_parameters: Flag = True
    """Whether a trained parameter may end a step without a gradient; false raises."""

    memory_efficient_linear: Annotated[Flag, _NO_PATCH] = True
    """Whether linear layers hold on to nothing more than they need in backward."""

    leaf_module: LeafModule = LeafModule()
    """Modules that are gathered as one."""

    offload_optimizer: OffloadOptimizer = OffloadOptimizer()
    """Where optimizer state and master weights live."""

    offload_param: OffloadParam = OffloadParam()
    """Where the shards of parameters live."""

    @field_validator("offload_optimizer", "offload_param", mode="before")
    @classmethod
    def _nothing_as_switch(cls, value: object) -> object:
        return {} if value is False else value


class ExtensionConfig(_Block):
    """Keys of this library that DeepSpeed does not have."""

    units: Names = ()
    """Module classes or paths that form a unit each; empty finds the repeated blocks."""

    lookahead_bytes: SizeOrNone = None
    """Bytes gathered ahead of their use at stage 3; null leaves the choice to the engine."""

    optimizer_step: Kernels = "auto"
    """What steps Adam and AdamW: "fused" is one pass over each unit's shard that also unscales,
    clips and casts, with torch's optimizer where that does not fit; "torch" is torch's optimizer
    always; "auto" is "fused" on GPUs where Triton runs, else "torch"."""

    gather: Transfer = "auto"
    """How stage 3 gathers: by collectives, or by reading shards in the memory of other ranks;
    "auto" tries both on GPUs of one host and takes what is faster there."""

    reduce: Transfer = "auto"
    """How stages 2 and 3 average gradients: by collectives, or by reading them in the memory of
    other ranks and adding them up in fp32, whatever communication_data_type sends; "auto" is
    "nccl"."""

    activation_budget: Budget = None
    """GiB that blocks may keep for backward, others run again; "auto" measures what is free."""

    gpu_budget: Budget = None
    """GiB of model state that may stay on a rank's device between steps, the buffers that offloaded
    state streams through included; "auto" takes back what fits once a step has shown what is free;
    null is no limit. What leaves goes where offload_optimizer and, as a last resort, offload_param
    say, optimizer state without them to "cpu"."""

    offload_update: Where = "auto"
    """Where offloaded state is stepped: on the device with "gpu", through which it streams, or on
    the host with "cpu"; "auto" measures which is faster here."""


class Config(_Block):
    """A whole configuration, as `load` returns it."""

    train_batch_size: CountOrNone = None
    """Samples in one optimizer step over all ranks."""

    train_micro_batch_size_per_gpu: CountOrNone = None
    """Samples one rank takes in one micro-step."""

    gradient_accumulation_steps: CountOrNone = None
    """Micro-steps in one optimizer step."""

    optimizer: OptimizerConfig | None = None
    """The optimizer to make, unless the script passes one."""

    scheduler: SchedulerConfig | None = None
    """The learning rate schedule to make, unless the script passes one."""

    fp16: Fp16Config = Fp16Config()
    """Training in fp16."""

    bf16: Bf16Config = Bf16Config()
    """Training in bf16; "bfloat16" is a second name of this block."""

    gradient_clipping: NotNegative = 1.0
    """Largest global 2-norm of the gradients; 0 does not clip."""

    steps_per_print: StepsPerPrint = None
    """Optimizer steps between progress lines; null and Infinity print none."""

    communication_data_type: DtypeName = None
    """The dtype gradients are reduced in; null is fp32 (DeepSpeed: the dtype computed in)."""

    gradient_predivide_factor: Positive = 1.0
    """Gradients are divided by this number before they are summed, and by the rest after."""

    prescale_gradients: Flag = False
    """Whether gradients are divided by the number of ranks before they are summed."""

    torch_autocast: TorchAutocast = TorchAutocast()
    """Computing in lower precision by torch.autocast."""

    data_types: DataTypes = DataTypes()
    """Dtypes beside the one computed in."""

    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing()
    """How zeroshard.checkpointing keeps activations."""

    compile: CompileConfig = CompileConfig()
    """Compiling the model's repeated blocks."""

    zero_allow_untested_optimizer: Flag = False
    """Whether optimizers that are not known to be element-wise may step shards."""

    dataloader_drop_last: Flag = False
    """Whether the engine's data loader drops an incomplete last batch."""

    aio: AioConfig = AioConfig()
    """How the files of offloaded state are read and written."""

    zero_optimization: ZeroConfig = ZeroConfig()
    """What is sharded over the ranks; true and false are old names of stages 1 and 0."""

    zeroshard: ExtensionConfig = ExtensionConfig()
    """Keys of this library that DeepSpeed does not have."""

    @field_validator("zero_optimization", mode="before")
    @classmethod
    def _stage_as_switch(cls, value: object) -> object:
        return {"stage": int(value)} if isinstance(value, bool) else value

    def batch(self, world: int) -> Batch:
        """Resolve the batch numbers for a number of ranks."""
        return resolve(
            self.train_batch_size,
            self.train_micro_batch_size_per_gpu,
            self.gradient_accumulation_steps,
            world,
        )


BLOCKS: Mapping[tuple[str, ...], type[BaseModel]] = {
    (): Config,
    ("optimizer",): OptimizerConfig,
    ("scheduler",): SchedulerConfig,
    ("fp16",): Fp16Config,
    ("bf16",): Bf16Config,
    ("torch_autocast",): TorchAutocast,
    ("data_types",): DataTypes,
    ("activation_checkpointing",): ActivationCheckpointing,
    ("compile",): CompileConfig,
    ("aio",): AioConfig,
    ("zero_optimization",): ZeroConfig,
    ("zero_optimization", "leaf_module"): LeafModule,
    ("zero_optimization", "offload_optimizer"): OffloadOptimizer,
    ("zero_optimization", "offload_param"): OffloadParam,
    ("zeroshard",): ExtensionConfig,
}
"""Every model by the place of its block."""

OPEN_BLOCKS = frozenset({("optimizer", "params"), ("scheduler", "params"), ("compile", "kwargs")})
"""Blocks whose keys belong to somebody else."""

AUTO_IS_A_VALUE = frozenset(
    {
        ("data_types", "keep_in_fp32_modules"),
        ("zeroshard", "activation_budget"),
        ("zeroshard", "gpu_budget"),
        ("zeroshard", "offload_update"),
        ("zeroshard", "optimizer_step"),
    }
)
"""Fields that take "auto" themselves."""

NEVER_AUTO = frozenset(
    {("optimizer", "type"), ("scheduler", "type"), ("zero_optimization", "stage")}
)
"""Fields that nobody resolves, and whose default nobody means who leaves them open."""
