"""Which dtype each parameter is computed in, and how gradients are averaged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import nn

from zeroshard.config import Config
from zeroshard.core.collectives import Averaging
from zeroshard.core.unit import Precision
from zeroshard.optim.scaler import LossScaler, ScalePolicy

__all__ = [
    "DTYPES",
    "DtypeName",
    "autocast_dtype",
    "averaging",
    "compute_dtypes",
    "make_scaler",
    "precision",
]

_log = logging.getLogger(__name__)

DtypeName = Literal["fp32", "fp16", "bf16"]

DTYPES: Mapping[DtypeName, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
# What torch.autocast computes in lower precision, whatever the dtype of its weights.
_SAFE_MODULES = tuple(f"torch.nn.{name}" for name in ("Linear", "Conv1d", "Conv2d", "Conv3d"))


def _half(settings: Config) -> torch.dtype | None:
    """The dtype that the whole model computes in, if it is not each parameter's own."""
    if settings.fp16.enabled:
        return torch.float16
    return torch.bfloat16 if settings.bf16.enabled else None


def autocast_dtype(settings: Config, device: torch.device) -> torch.dtype | None:
    """The dtype of torch.autocast around forward; None without it."""
    if not settings.torch_autocast.enabled:
        return None
    chosen = settings.torch_autocast.dtype
    return DTYPES[chosen] if chosen else torch.get_autocast_dtype(device.type)


def precision(settings: Config, world: int) -> Precision:
    """The dtypes of all units; ``compute`` is decided for each parameter."""
    return Precision(
        reduce=DTYPES[settings.communication_data_type or "fp32"],
        accumulate=DTYPES[settings.data_types.grad_accum_dtype or "fp32"],
        averaging=averaging(settings, world),
    )


def averaging(settings: Config, world: int) -> Averaging:
    """How gradients become a mean over ``world`` ranks."""
    scatter = settings.zero_optimization.reduce_scatter
    if settings.prescale_gradients:
        return Averaging(before=1 / world, scatter=scatter)
    factor = settings.gradient_predivide_factor
    if factor != 1:
        return Averaging(before=1 / factor, after=factor / world, scatter=scatter)
    return Averaging(scatter=scatter)


def compute_dtypes(
    model: nn.Module, settings: Config, device: torch.device
) -> Callable[[nn.Parameter], torch.dtype | None]:
    """The dtype that each parameter is gathered and computed in; None for its own."""
    lower = autocast_dtype(settings, device)
    everywhere = _half(settings)
    if lower is not None:
        chosen = settings.torch_autocast.lower_precision_safe_modules
        safe = _held_only_by(model, _SAFE_MODULES if chosen is None else chosen)
        return lambda param: lower if param in safe else None
    if everywhere is None:
        return lambda param: None
    names = _names_kept_in_fp32(model, settings)
    exempt = _inside(model, names)
    unknown = [name for name in sorted(names) if not _inside(model, [name])]
    if unknown and settings.data_types.keep_in_fp32_modules != "auto":
        _log.warning(
            "data_types.keep_in_fp32_modules: no parameter of the model is inside %s; give whole "
            "names of modules.",
            ", ".join(unknown),
        )
    return lambda param: torch.float32 if param in exempt else everywhere


def _held_only_by(model: nn.Module, classes: Iterable[str]) -> set[nn.Parameter]:
    """The parameters that no module of another class uses, too."""
    classes = frozenset(classes)
    inside: set[nn.Parameter] = set()
    outside: set[nn.Parameter] = set()
    for module in model.modules():
        kind = type(module)
        names = {kind.__name__, f"{kind.__module__}.{kind.__qualname__}"}
        if kind.__module__.startswith("torch.nn."):
            names.add(f"torch.nn.{kind.__name__}")
        (inside if names & classes else outside).update(module.parameters(recurse=False))
    return inside - outside


def _names_kept_in_fp32(model: nn.Module, settings: Config) -> set[str]:
    """Names of modules that stay fp32: those of the configuration, or those the model brings."""
    chosen = settings.data_types.keep_in_fp32_modules
    if chosen != "auto":
        return set(chosen)
    # Hugging Face's lists: one for fp16 alone, whose range is small, one for both dtypes.
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    for_fp16 = getattr(model, "_keep_in_fp32_modules", None) or ()
    return {*strict, *(for_fp16 if settings.fp16.enabled else ())}


def _inside(model: nn.Module, names: Iterable[str]) -> set[nn.Parameter]:
    """The parameters whose path holds one of the names as a whole part."""
    parts = [f".{name}." for name in names]
    return {
        param
        for path, param in model.named_parameters(remove_duplicate=False)
        if any(part in f".{path}." for part in parts)
    }


def make_scaler(settings: Config, device: torch.device) -> LossScaler | None:
    """The loss scaler of training in fp16, whichever block asks for it."""
    fp16 = settings.fp16
    if not fp16.enabled and autocast_dtype(settings, device) != torch.float16:
        return None
    return LossScaler(
        ScalePolicy(
            initial=fp16.loss_scale or 2.0**fp16.initial_scale_power,
            dynamic=fp16.loss_scale == 0,
            window=fp16.loss_scale_window,
            hysteresis=fp16.hysteresis,
            consecutive_hysteresis=fp16.consecutive_hysteresis,
            minimum=fp16.min_loss_scale,
        )
    )
