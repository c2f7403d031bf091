"""What keys demand of each other, once each of them is right by itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from zeroshard.config.keys import Path
from zeroshard.config.problems import Problem
from zeroshard.config.schema import Config

__all__ = ["broken"]

_STAGE_OF_OFFLOAD_PARAM = 3
_FP16: Path = ("fp16", "enabled")
_BF16: Path = ("bf16", "enabled")
_AUTOCAST: Path = ("torch_autocast", "enabled")
_STAGE: Path = ("zero_optimization", "stage")
_GPU_BUDGET: Path = ("zeroshard", "gpu_budget")


def _one_precision(config: Config) -> Problem | None:
    if not (config.fp16.enabled and config.bf16.enabled):
        return None
    return Problem(
        "fp16 and bf16 cannot both be enabled",
        hint='set "enabled": false in one of the two blocks.',
    )


def _no_autocast_beside_a_precision(config: Config) -> Problem | None:
    name = "fp16" if config.fp16.enabled else "bf16" if config.bf16.enabled else None
    if name is None or not config.torch_autocast.enabled:
        return None
    return Problem(
        f"torch_autocast and {name} cannot both be enabled",
        tail=f"\ntorch_autocast keeps parameters in fp32 and casts in forward; {name} computes "
        f"with {name} parameters.",
        hint='set "enabled": false in one of the two blocks.',
    )


def _autocast_to_fewer_bits(config: Config) -> Problem | None:
    if not config.torch_autocast.enabled or config.torch_autocast.dtype != "fp32":
        return None
    return Problem(
        'torch_autocast.dtype cannot be "fp32" while torch_autocast is enabled',
        tail="\ntorch.autocast casts to fp16 and bf16 only, and would cast nothing.",
        hint='set "bf16" or "fp16", or "enabled": false.',
    )


def _one_division(config: Config) -> Problem | None:
    factor = config.gradient_predivide_factor
    if not config.prescale_gradients or factor == 1:
        return None
    return Problem(
        f"gradient_predivide_factor cannot be {factor} while prescale_gradients is true",
        tail="\nprescale_gradients already divides by the number of ranks before the sum, "
        "so nothing is left to divide.",
        hint='remove one of the two keys; "prescale_gradients": false lets the factor count.',
    )


def _dtype_of_the_precision(config: Config) -> Problem | None:
    wanted = config.data_types.param_dtype
    chosen = "fp16" if config.fp16.enabled else "bf16" if config.bf16.enabled else "fp32"
    if wanted in (None, chosen):
        return None
    hint = "remove it, or disable the fp16 and bf16 blocks."
    if wanted != "fp32":
        hint = f'remove it, or set "enabled": true in the "{wanted}" block and in no other.'
    return Problem(
        f'data_types.param_dtype is "{wanted}", but the fp16 and bf16 blocks choose "{chosen}"',
        hint=hint,
    )


def _parameters_to_offload(config: Config) -> Problem | None:
    zero = config.zero_optimization
    if zero.offload_param.device == "none" or zero.stage >= _STAGE_OF_OFFLOAD_PARAM:
        return None
    return Problem(
        f"zero_optimization.offload_param needs stage 3, but stage is {zero.stage}",
        tail=f"\nStage {zero.stage} keeps full parameters on the device, so there is nothing to "
        "offload.",
        hint='set "stage": 3, or use "offload_optimizer" to move optimizer state only.',
    )


def _a_folder(name: str) -> Callable[[Config], Problem | None]:
    def check(config: Config) -> Problem | None:
        block = getattr(config.zero_optimization, name)
        if block.device != "nvme" or block.nvme_path is not None:
            return None
        return Problem(
            f'zero_optimization.{name}.nvme_path is missing, but the device is "nvme"',
            hint='add "nvme_path": the path of a folder on the drive.',
        )

    return check


def _one_amount(config: Config) -> Problem | None:
    ratio, budget = config.zero_optimization.offload_optimizer.ratio, config.zeroshard.gpu_budget
    if ratio == 1 or budget is None:
        return None
    return Problem(
        f"zero_optimization.offload_optimizer.ratio cannot be {ratio} beside zeroshard.gpu_budget",
        tail="\nBoth say how much leaves the device: the ratio as a part, the budget by what may "
        "stay.",
        hint="remove one of the two keys.",
    )


def _one_that_measures(config: Config) -> Problem | None:
    extension = config.zeroshard
    if not extension.gpu_budget == extension.activation_budget == "auto":
        return None
    return Problem(
        'zeroshard.gpu_budget and zeroshard.activation_budget cannot both be "auto"',
        tail="\nEach of them would take what the other one has found free.",
        hint="name a number of GiB for one of them.",
    )


@dataclass(frozen=True, slots=True)
class _Rule:
    keys: tuple[Path, ...]
    """What it looks at: where one of them is wrong already, it says nothing."""

    check: Callable[[Config], Problem | None]


def _offload(name: str, key: str) -> Path:
    return ("zero_optimization", name, key)


_RULES = (
    _Rule((_FP16, _BF16), _one_precision),
    _Rule((_FP16, _BF16, _AUTOCAST), _no_autocast_beside_a_precision),
    _Rule((_AUTOCAST, ("torch_autocast", "dtype")), _autocast_to_fewer_bits),
    _Rule((("gradient_predivide_factor",), ("prescale_gradients",)), _one_division),
    _Rule((_FP16, _BF16, ("data_types", "param_dtype")), _dtype_of_the_precision),
    _Rule((_STAGE, _offload("offload_param", "device")), _parameters_to_offload),
    *(
        _Rule((_offload(name, "device"), _offload(name, "nvme_path")), _a_folder(name))
        for name in ("offload_optimizer", "offload_param")
    ),
    _Rule((_offload("offload_optimizer", "ratio"), _GPU_BUDGET), _one_amount),
    _Rule((_GPU_BUDGET, ("zeroshard", "activation_budget")), _one_that_measures),
)


def broken(config: Config, wrong: Collection[Path]) -> Iterator[Problem]:
    """Yield the demands that a configuration does not meet.

    Args:
        config: the configuration, with defaults in place of what is wrong.
        wrong: keys and blocks that are wrong by themselves.
    """
    for rule in _RULES:
        if any(key[: len(path)] == path for key in rule.keys for path in wrong):
            continue
        problem = rule.check(config)
        if problem is not None:
            yield problem
