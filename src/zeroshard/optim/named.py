"""Optimizers by DeepSpeed's names and arguments, for scripts that construct them themselves.

DeepSpeed has one class for each device. Here they differ in name alone: all are fused kernels of
torch, or Lion, and step wherever the master weights are.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from zeroshard.errors import UsageError, compose
from zeroshard.optim.elementwise import Lion

__all__ = [
    "NAMED",
    "DeepSpeedCPUAdagrad",
    "DeepSpeedCPUAdam",
    "DeepSpeedCPULion",
    "FusedAdam",
    "FusedLion",
]

_log = logging.getLogger(__name__)
Betas = tuple[float, float]


def _check_corrected(name: str, bias_correction: bool) -> None:
    if not bias_correction:
        raise UsageError(
            compose(
                f"{name}(bias_correction=False) is not built.",
                hint="construct a zeroshard.optim.UncorrectedAdam, or let the configuration do it: "
                '"optimizer": {"type": "Adam", "params": {"bias_correction": false}}.',
            )
        )


def _check_states(name: str, fp32_optimizer_states: bool) -> None:
    if not fp32_optimizer_states:
        _log.warning("%s: fp32_optimizer_states is ignored: state is always fp32", name)


class DeepSpeedCPUAdam(torch.optim.Adam):
    """Adam whose decay acts on the weights unless ``adamw_mode`` is false."""

    def __init__(
        self,
        model_params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ) -> None:
        name = type(self).__name__
        _check_corrected(name, bias_correction)
        _check_states(name, fp32_optimizer_states)
        super().__init__(
            model_params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            decoupled_weight_decay=adamw_mode,
            fused=True,
        )


class FusedAdam(torch.optim.Adam):
    """Adam whose decay acts on the weights unless ``adam_w_mode`` is false."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        del set_grad_none  # gradients are freed by the step
        _check_corrected(type(self).__name__, bias_correction)
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            decoupled_weight_decay=adam_w_mode,
            fused=True,
        )


class DeepSpeedCPUAdagrad(torch.optim.Adagrad):
    """Adagrad."""

    def __init__(
        self,
        model_params: Any,
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        fp32_optimizer_states: bool = True,
    ) -> None:
        del amsgrad  # it means nothing to Adagrad
        _check_states(type(self).__name__, fp32_optimizer_states)
        super().__init__(model_params, lr=lr, eps=eps, weight_decay=weight_decay)


class DeepSpeedCPULion(Lion):
    """Lion."""

    def __init__(
        self,
        model_params: Any,
        lr: float = 1e-3,
        betas: Betas = (0.9, 0.999),
        weight_decay: float = 0.0,
        fp32_optimizer_states: bool = True,
    ) -> None:
        _check_states(type(self).__name__, fp32_optimizer_states)
        super().__init__(model_params, lr=lr, betas=betas, weight_decay=weight_decay)


class FusedLion(Lion):
    """Lion."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Betas = (0.9, 0.999),
        weight_decay: float = 0.0,
        set_grad_none: bool = True,
    ) -> None:
        del set_grad_none  # gradients are freed by the step
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay)


NAMED = (DeepSpeedCPUAdagrad, DeepSpeedCPUAdam, DeepSpeedCPULion, FusedAdam, FusedLion)
