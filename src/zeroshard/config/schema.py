"""The typed configuration: one frozen model per block, one documented field per key.

The docstring under a field is its entry in the reference page, so it says what the key does and
what DeepSpeed's default is where the two differ. A field whose type carries `NoEffect` is checked
for its type and otherwise ignored. Keys without a field are in `keys`.

Values are taken strictly: `true` is not 1 and "8" is not 8. The one liberty is DeepSpeed's, that
a whole number may be written as 5e8. Sub-blocks default to their models, so readers of a `Config`
never test for a missing block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from zeroshard.config.batch import Batch, resolve
from zeroshard.config.keys import NoEffect
from zeroshard.config.values import is_sequence

__all__ = [
    "ActivationCheckpointing",
    "Bf16Config",
    "Config",
    "DataTypes",
    "ExtensionConfig",
    "Fp16Config",
    "OptimizerConfig",
    "SchedulerConfig",
    "ZeroConfig",
]

TWO_PRECISIONS = "fp16 and bf16 cannot both be enabled"

# A number that fp32 can still hold: larger loss scales are infinite in every compute dtype.
_LARGEST_SCALE_POWER = 127
_LAST_STAGE = 3

_DTYPES = {
    "fp32": "fp32",
    "float32": "fp32",
    "float": "fp32",
    "fp16": "fp16",
    "float16": "fp16",
    "half": "fp16",
    "bf16": "bf16",
    "bfloat16": "bf16",
}


def expected(what: str) -> PydanticCustomError:
    """Make the error of a value of the wrong kind; the caller adds the key and the value."""
    return PydanticCustomError("expected", "{expected}", {"expected": what})


def _whole(least: int, most: int | None = None, *, nullable: bool = False) -> BeforeValidator:
    what = f"a whole number of at least {least}"
    what += "" if most is None else f" and at most {most}"
    what += " or null" if nullable else ""

    def check(value: object) -> int | None:
        if value is None and nullable:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise expected(what)
        if value < least or (most is not None and value > most):
            raise expected(what)
        return value

    return BeforeValidator(check)


def _number(what: str) -> BeforeValidator:
    def check(value: object) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise expected(what)
        try:
            number = float(value)
        except OverflowError:
            raise expected(what) from None
        if not math.isfinite(number) or number < 0:
            raise expected(what)
        return number

    return BeforeValidator(check)


def _flag(*, nullable: bool = False) -> BeforeValidator:
    def check(value: object) -> bool | None:
        if isinstance(value, bool) or (value is None and nullable):
            return value
        raise expected("true, false or null" if nullable else "true or false")

    return BeforeValidator(check)


def _dtype(value: object) -> str | None:
    if value is None:
        return None
    name = _DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else None
    if name is None:
        raise expected('"fp32", "fp16", "bf16" or null')
    return name


def _steps_per_print(value: object) -> object:
    if isinstance(value, str | float) and value in ("Infinity", "inf", math.inf):
        return None
    return value


def _name(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise expected("a name")
    return value


Count = Annotated[int, _whole(1)]
CountOrNone = Annotated[int | None, _whole(1, nullable=True)]
SizeOrNone = Annotated[int | None, _whole(0, nullable=True)]
Flag = Annotated[bool, _flag()]
FlagOrNone = Annotated[bool | None, _flag(nullable=True)]
NotNegative = Annotated[float, _number("a finite number of at least 0")]
DtypeName = Annotated[Literal["fp32", "fp16", "bf16"] | None, BeforeValidator(_dtype)]
Name = Annotated[str, BeforeValidator(_name)]

_UNITS = NoEffect("The unit is the bucket: it is gathered and reduced as a whole.")
_OVERLAP = NoEffect("Communication runs beside computation wherever the device can do both.")
_OWNED = NoEffect("Every rank reduces and keeps exactly its own shards.")
_SAVING = NoEffect("Checkpoints are not built yet.")


class _Block(BaseModel):
    """A JSON object with known keys only."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class OptimizerConfig(_Block):
    """Which optimizer to make."""

    type: Name
    """The optimizer's name in any case: a class of torch.optim whose update is element-wise."""

    params: dict[str, object] = Field(default_factory=dict[str, object])
    """Its arguments. "auto" leaves an argument to the optimizer's own default."""


class SchedulerConfig(_Block):
    """Which learning rate schedule to make."""

    type: Name
    """The schedule's name: a class of torch.optim.lr_scheduler."""

    params: dict[str, object] = Field(default_factory=dict[str, object])
    """Its arguments. "auto" leaves an argument to the schedule's own default."""


class Fp16Config(_Block):
    """Training in fp16 with a loss scale."""

    enabled: Flag = False
    """Whether parameters are computed with in fp16. "auto" is false."""

    auto_cast: Flag = False
    """Whether floating-point inputs of the model are cast to fp16."""

    loss_scale: NotNegative = 0.0
    """A fixed loss scale, or 0 for a dynamic one."""

    initial_scale_power: Annotated[int, _whole(0, _LARGEST_SCALE_POWER)] = 16
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
    """Whether parameters are computed with in bf16. "auto" is false."""

    check_grad_overflow: Flag = True
    """Whether a step with infinite or NaN gradients is skipped."""


class DataTypes(_Block):
    """Dtypes beside the one computed in."""

    grad_accum_dtype: DtypeName = None
    """The dtype gradients are accumulated in; null is fp32 (DeepSpeed: the model's dtype)."""


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


class ZeroConfig(_Block):
    """What is sharded over the ranks, and the tuning keys of DeepSpeed's ZeRO."""

    stage: Literal[0, 1, 2, 3] = 0
    """0 shards nothing, 1 optimizer state, 2 also gradients, 3 also parameters."""

    overlap_comm: Annotated[FlagOrNone, _OVERLAP] = None
    """Whether DeepSpeed communicates on a side stream (its default: at stage 3 only)."""

    contiguous_gradients: Annotated[FlagOrNone, _UNITS] = None
    """Whether DeepSpeed copies gradients into one buffer (its default: true)."""

    reduce_scatter: Annotated[FlagOrNone, _OWNED] = None
    """Whether DeepSpeed reduce-scatters gradients (its default: true)."""

    allgather_partitions: Annotated[FlagOrNone, _OWNED] = None
    """Whether parameters are gathered by all-gather (unused in DeepSpeed too)."""

    reduce_bucket_size: Annotated[CountOrNone, _UNITS] = None
    """Elements in one reduction of DeepSpeed (its default: 5e8)."""

    allgather_bucket_size: Annotated[CountOrNone, _UNITS] = None
    """Elements in one gather of DeepSpeed (its default: 5e8)."""

    sub_group_size: Annotated[CountOrNone, _UNITS] = None
    """Elements DeepSpeed steps at once at stage 3 (its default: 1e9)."""

    stage3_prefetch_bucket_size: Annotated[SizeOrNone, _UNITS] = None
    """Elements DeepSpeed gathers ahead (its default: 5e7); see zeroshard.lookahead_bytes."""

    stage3_param_persistence_threshold: Annotated[SizeOrNone, _UNITS] = None
    """Largest parameter that DeepSpeed never frees (its default: 1e5 elements)."""

    stage3_max_live_parameters: Annotated[SizeOrNone, _UNITS] = None
    """Elements DeepSpeed keeps gathered at most (its default: 1e9)."""

    stage3_max_reuse_distance: Annotated[SizeOrNone, _UNITS] = None
    """Elements until reuse below which DeepSpeed does not free (its default: 1e9)."""

    stage3_gather_16bit_weights_on_model_save: Annotated[FlagOrNone, _SAVING] = None
    """Whether DeepSpeed gathers 16-bit weights when a model is saved (its default: false)."""

    round_robin_gradients: Annotated[FlagOrNone, _OWNED] = None
    """Whether DeepSpeed deals gradients out over the ranks in turn (its default: false)."""

    ignore_unused_parameters: Annotated[FlagOrNone, _OWNED] = None
    """Whether parameters without a gradient are allowed (its default: true); they always are."""

    @field_validator("stage", mode="before")
    @classmethod
    def _known_stage(cls, value: object) -> object:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LAST_STAGE:
            return value
        raise expected("0, 1, 2 or 3")


class ExtensionConfig(_Block):
    """Keys of this library that DeepSpeed does not have."""

    units: tuple[Name, ...] = ()
    """Module classes or paths that form a unit each; empty finds the repeated blocks."""

    lookahead_bytes: SizeOrNone = None
    """Bytes gathered ahead of their use at stage 3; null leaves the choice to the engine."""

    @field_validator("units", mode="before")
    @classmethod
    def _list_of_names(cls, value: object) -> object:
        if not is_sequence(value):
            raise expected("a list of class names or module paths")
        return value


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

    steps_per_print: Annotated[CountOrNone, BeforeValidator(_steps_per_print)] = None
    """Optimizer steps between progress lines; null and Infinity print none."""

    communication_data_type: DtypeName = None
    """The dtype gradients are reduced in; null is fp32 (DeepSpeed: the dtype computed in)."""

    data_types: DataTypes = DataTypes()
    """Dtypes beside the one computed in."""

    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing()
    """How zeroshard.checkpointing keeps activations."""

    zero_allow_untested_optimizer: Flag = False
    """Whether optimizers that were not tested with sharded state are allowed."""

    dataloader_drop_last: Flag = False
    """Whether the engine's data loader drops an incomplete last batch."""

    zero_optimization: ZeroConfig = ZeroConfig()
    """What is sharded over the ranks; true and false are old names of stages 1 and 0."""

    zeroshard: ExtensionConfig = ExtensionConfig()
    """Keys of this library that DeepSpeed does not have."""

    @field_validator("bf16")
    @classmethod
    def _one_precision(cls, value: Bf16Config, info: ValidationInfo) -> Bf16Config:
        fp16 = info.data.get("fp16")
        if value.enabled and isinstance(fp16, Fp16Config) and fp16.enabled:
            raise PydanticCustomError("two_precisions", TWO_PRECISIONS)
        return value

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
    ("data_types",): DataTypes,
    ("activation_checkpointing",): ActivationCheckpointing,
    ("zero_optimization",): ZeroConfig,
    ("zeroshard",): ExtensionConfig,
}
"""Every model by the place of its block."""

OPEN_BLOCKS = frozenset({("optimizer", "params"), ("scheduler", "params")})
"""Blocks whose keys belong to somebody else."""
