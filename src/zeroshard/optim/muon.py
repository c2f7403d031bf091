"""Muon: momentum made orthogonal, for matrices, and AdamW for everything else.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). The step of a
matrix is its momentum with all singular values brought near one by five Newton-Schulz iterations,
so it needs the whole matrix. The conventions are those of ``torch.optim.Muon``: momentum is a
running average, the iterations run in bf16, and the step grows with ``sqrt(rows / columns)`` of a
tall matrix. Only the orthogonalisation looks at whole matrices, and what it looks at first is
rounded to bf16; so ranks exchange momentum in bf16, two bytes per element, and lose nothing by it.

Unlike ``torch.optim.Muon`` it takes all parameters of a model, each by the rule that fits it, and
parameters of more than two dimensions, as matrices with a row for each index of the first.
"""

# Torch's list operations have no public name, and its step is two overloads.
# pyright: reportPrivateUsage=false, reportIncompatibleMethodOverride=false

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from zeroshard.core.slots import full_shape
from zeroshard.optim.groups import Group, decay_, evaluate, moments, with_gradients
from zeroshard.optim.whole import WholeOptimizer

__all__ = ["Muon", "muon_groups", "orthogonalize"]

# Coefficients of x -> a x + b x^3 + c x^5, steep at zero: after five steps all singular values from
# 1e-3 to 1 lie in about 0.7 to 1.2.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_SMALLEST_NORM = 1e-7
_ADJUSTMENTS: Mapping[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}
# What a group does not need, by its rule. The two rates are defaults of "lr".
_NOT_OF_MUON = ("muon_lr", "adam_lr", "betas", "eps")
_NOT_OF_ADAM = ("muon_lr", "adam_lr", "momentum", "nesterov", "ns_steps", "adjust_lr_fn")


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Bring the singular values of a matrix near one, in bf16."""
    is_tall = matrix.size(0) > matrix.size(1)
    x = matrix.bfloat16()
    if is_tall:
        x = x.T
    # The spectral norm is at most the Frobenius norm, and the iteration converges from below one.
    x = x / x.norm().clamp(min=_SMALLEST_NORM)
    for _ in range(steps):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=_B, alpha=_C)
        x = torch.addmm(x, polynomial, x, beta=_A)
    return x.T if is_tall else x


def muon_groups(params: Iterable[Any], model: nn.Module | None = None) -> list[dict[str, Any]]:
    """Split parameters or param groups by rule, saying ``use_muon`` for each resulting group.

    Matrices are for Muon, except embeddings and the head: modules that are embeddings in ``model``,
    and parameters with "embed" or "lm_head" in their names there. A group that says ``use_muon``,
    or a parameter that has an attribute of that name, decides for itself.
    """
    names: dict[Tensor, str] = {}
    if model is not None:
        names = {param: name for name, param in model.named_parameters()}
    tables: set[Tensor] = {
        module.weight
        for module in (model.modules() if model is not None else ())
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    }

    def is_for_muon(param: Tensor) -> bool:
        told = getattr(param, "use_muon", None)
        if told is not None:
            return bool(told)
        name = names.get(param, "")
        is_table = param in tables or "embed" in name or "lm_head" in name
        return len(full_shape(param)) >= 2 and not is_table

    groups: list[dict[str, Any]] = []
    for group in _as_groups(params):
        if "use_muon" in group:
            groups.append(group)
            continue
        for rule in (True, False):
            own = [param for param in group["params"] if is_for_muon(param) is rule]
            if own:
                groups.append({**group, "params": own, "use_muon": rule})
    return groups


def _as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Param groups of bare parameters, from any form torch's optimizers take."""
    given = list(params)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    return [{**group, "params": _bare(group["params"])} for group in groups]


def _bare(params: Any) -> list[Any]:
    listed = [params] if isinstance(params, Tensor) else list(params)
    return [item[1] if isinstance(item, tuple) else item for item in listed]


class Muon(WholeOptimizer):
    """Muon and AdamW in one optimizer, on whole parameters or on slices of them.

    Args:
        params: matrices, or param groups with ``use_muon`` true or false, as :func:`muon_groups`
            makes them of a model's parameters.
        lr: the rate of both rules; None for Muon's 0.02 and AdamW's 3e-4.
        muon_lr: the rate of Muon, where it differs.
        adam_lr: the rate of AdamW, where it differs.
        momentum: share of the past in Muon's running average.
        nesterov: whether the step looks ahead by one gradient.
        weight_decay: decoupled decay, of both rules.
        betas: AdamW's two averages.
        eps: AdamW's.
        ns_steps: iterations of the orthogonalisation.
        adjust_lr_fn: "original" lengthens the steps of tall matrices; "match_rms_adamw" gives steps
            the length AdamW's have, so that rates found for AdamW can be used.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the options are DeepSpeed's and torch's
        self,
        params: Any,
        lr: float | None = None,
        muon_lr: float | None = None,
        adam_lr: float | None = None,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        ns_steps: int = 5,
        adjust_lr_fn: str = "original",
    ) -> None:
        rates = {
            "muon_lr": next(rate for rate in (muon_lr, lr, 0.02) if rate is not None),
            "adam_lr": next(rate for rate in (adam_lr, lr, 3e-4) if rate is not None),
        }
        if not min(*rates.values(), weight_decay, eps, ns_steps) >= 0:
            raise ValueError("Invalid rate, weight_decay, eps or ns_steps: one is negative")
        if not all(0 <= share < 1 for share in (momentum, *betas)):
            raise ValueError(f"Invalid momentum or betas: {momentum}, {betas}")
        if ns_steps != int(ns_steps):
            raise ValueError(f"Invalid ns_steps: {ns_steps} is not a whole number")
        if adjust_lr_fn not in _ADJUSTMENTS:
            raise ValueError(f"adjust_lr_fn is {adjust_lr_fn!r}, not one of {[*_ADJUSTMENTS]}")
        defaults = {
            **rates,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "betas": betas,
            "eps": eps,
            "ns_steps": int(ns_steps),
            "adjust_lr_fn": adjust_lr_fn,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with the defaults of its rule; matrices for Muon unless it says otherwise.

        Raises:
            ValueError: a parameter for Muon is no matrix.
        """
        for_muon = param_group.setdefault("use_muon", True)
        param_group.setdefault("lr", self.defaults["muon_lr" if for_muon else "adam_lr"])
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        for key in _NOT_OF_MUON if for_muon else _NOT_OF_ADAM:
            added.pop(key, None)
        shapes = [full_shape(param) for param in added["params"]]
        vectors = [tuple(shape) for shape in shapes if len(shape) < 2]
        if for_muon and vectors:
            self.param_groups.pop()
            raise ValueError(
                f"Muon steps matrices, but a parameter of shape {vectors[0]} is in a group for it; "
                'put it into a group with "use_muon" false, as muon_groups() does'
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make one step; a collective where parameters are sharded."""
        loss = evaluate(closure)
        groups: list[Group] = []
        matrices: list[Tensor] = []
        momenta: list[Tensor] = []
        for group in self.param_groups:
            params, grads = with_gradients(group)
            if not params:
                continue
            if not group["use_muon"]:
                self._step_adam(group, params)
                continue
            groups += [group] * len(params)
            matrices += params
            momenta += self._momenta(group, params, grads)
            decay_(params, group)
        for found in self.whole.assemble(matrices, momenta):
            group, param = groups[found.index], matrices[found.index]
            matrix = found.tensor.flatten(1)
            direction = orthogonalize(matrix, group["ns_steps"])
            rate = group["lr"] * _ADJUSTMENTS[group["adjust_lr_fn"]](*matrix.shape)
            param.add_(found.part_of(direction, param), alpha=-rate)
        return loss

    def _momenta(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        (averages,) = moments(self.state, params, "momentum_buffer")
        torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
        ahead = averages
        if group["nesterov"]:
            ahead = torch._foreach_lerp(grads, averages, group["momentum"])
        return [momentum.bfloat16() for momentum in ahead]

    def _step_adam(self, group: Group, params: list[Tensor]) -> None:
        own = [param for param in params if param.numel()]
        averages, squares = moments(self.state, own, "exp_avg", "exp_avg_sq")
        for param in own:
            self.state[param].setdefault("step", torch.zeros((), device="cpu"))
        adamw(
            list(own),
            [param.grad for param in own if param.grad is not None],
            averages,
            squares,
            [],
            [self.state[param]["step"] for param in own],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
