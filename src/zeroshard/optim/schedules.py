"""Learning rate schedules by name: the five of DeepSpeed's configurations, and those of torch.

[Note: counting steps]
The formulas below are functions of ``t``: -1 before the first step of the optimizer, then the
number of its last step, counted from 0. So the first step is made with the rate for ``t = -1``
and the second with that for ``t = 0``, which in a warm-up are both the smallest.
``warmup_num_steps`` 0 means that there is no warm-up: the first step has the full rate already. 1
means 2, as in DeepSpeed.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from zeroshard.errors import ConfigError, UsageError, compose
from zeroshard.optim.options import Recipe, is_number, recipe, suggestion

__all__ = [
    "VALID_LR_SCHEDULES",
    "LRRangeTest",
    "OneCycle",
    "WarmupCosineLR",
    "WarmupDecayLR",
    "WarmupLR",
    "make_schedule",
]

_log = logging.getLogger(__name__)
_STATE_KEY = "last_batch_iteration"

Rates = float | Sequence[float]


class _Schedule(LRScheduler):
    """Rates that are a formula of the number of steps made, and of nothing else.

    Subclasses set what the formula needs before they call this constructor, which applies it.
    """

    @abstractmethod
    def rates(self, t: int) -> list[float]:
        """Give the rate of each param group. See [Note: counting steps]."""

    def get_lr(self) -> list[Any]:
        """Give the rate of each param group for the next step of the optimizer."""
        return list(self.rates(self.last_epoch - 1))

    def state_dict(self) -> dict[str, Any]:
        """Give what has to be saved: the number of the last step, as DeepSpeed does."""
        return {_STATE_KEY: self.last_epoch - 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved step: the rates of the param groups are those of that step at once.

        Raises:
            UsageError: it is the state of a schedule of another kind.
        """
        if not isinstance(state_dict.get(_STATE_KEY), int):
            raise UsageError(
                compose(
                    f"{type(self).__name__} cannot load this state: it has no {_STATE_KEY}.",
                    hint="load what its own state_dict() or one of DeepSpeed's schedules saved.",
                )
            )
        self.last_epoch = state_dict[_STATE_KEY] + 1
        self._step_count = self.last_epoch + 1
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


class _Warmup:
    """The first steps of a training, from 0 to 1 in a straight line or fast at first."""

    def __init__(self, num_steps: int, kind: str) -> None:
        steps = _count("warmup_num_steps", num_steps, least=0)
        if kind not in {"log", "linear"}:
            raise _refused("warmup_type", '"log" or "linear"', kind)
        self.num_steps = max(2, steps) if steps else 0
        self._is_linear = kind == "linear"

    def __call__(self, t: int) -> float:
        """Give the share of the full rate."""
        if t >= self.num_steps or not self.num_steps:
            return 1.0
        t = max(t, 0)
        if self._is_linear:
            return t / self.num_steps
        return math.log(t + 1) / math.log(self.num_steps)


class WarmupLR(_Schedule):
    """A warm-up to the full rate, which then stays.

    ``min + (max - min) * w(t)`` with ``w = ln(t + 1) / ln(N)`` ("log") or ``t / N`` ("linear") for
    ``t < N`` and 1 from there.

    Args:
        optimizer: whose rates are set.
        warmup_min_lr: the smallest rate, or one for each param group.
        warmup_max_lr: the full rate, or one for each group; None for the group's own.
        warmup_num_steps: N.
        warmup_type: "log" or "linear".
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        warmup_min_lr: Rates = 0.0,
        warmup_max_lr: Rates | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
    ) -> None:
        self._warmup = _Warmup(warmup_num_steps, warmup_type)
        self._lowest = _for_groups("warmup_min_lr", warmup_min_lr, optimizer)
        self._highest = None
        if warmup_max_lr is not None:
            self._highest = _for_groups("warmup_max_lr", warmup_max_lr, optimizer)
        super().__init__(optimizer)

    def share(self, t: int) -> float:
        """Give the share of the way from the smallest rate to the full one."""
        return self._warmup(t)

    def rates(self, t: int) -> list[float]:
        """Give the rate of each param group. See [Note: counting steps]."""
        share = self.share(t)
        full = self._highest or [float(rate) for rate in self.base_lrs]
        return [low + (high - low) * share for low, high in zip(self._lowest, full, strict=True)]


class WarmupDecayLR(WarmupLR):
    """A warm-up to the full rate, then a straight line down to the smallest at ``T`` steps.

    As :class:`WarmupLR`, but with a share of ``max(0, (T - t) / max(1, T - N))`` from ``t = N``.

    Args:
        optimizer: whose rates are set.
        total_num_steps: T.
        warmup_min_lr: the smallest rate, or one for each param group.
        warmup_max_lr: the full rate, or one for each group; None for the group's own.
        warmup_num_steps: N.
        warmup_type: "log" or "linear".
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_num_steps: int,
        warmup_min_lr: Rates = 0.0,
        warmup_max_lr: Rates | None = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
    ) -> None:
        self._total = _count("total_num_steps", total_num_steps)
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type)
        _warn_of_short(self._total, self._warmup.num_steps)

    def share(self, t: int) -> float:
        """Give the share of the way from the smallest rate to the full one."""
        length = self._warmup.num_steps
        if t < length:
            return self._warmup(t)
        return max(0.0, (self._total - max(t, 0)) / max(1, self._total - length))


class WarmupCosineLR(_Schedule):
    """A warm-up to the group's own rate, then half a cosine down.

    The rate is multiplied by 0 for ``t < 0``, by ``a + (1 - a) * w(t)`` for ``t < N``, with the
    ``w`` of :class:`WarmupLR`, and then by ``c + (1 - c) * (1 + cos(pi * p)) / 2`` with ``p =
    min(1, (t - N + 1) / max(1, T - N))``.

    Args:
        optimizer: whose rates are set.
        total_num_steps: T.
        warmup_min_ratio: a.
        warmup_num_steps: N.
        cos_min_ratio: c.
        warmup_type: "log" or "linear".
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = "log",
    ) -> None:
        self._total = _count("total_num_steps", total_num_steps)
        self._warmup = _Warmup(warmup_num_steps, warmup_type)
        self._warmup_ratio = _not_negative("warmup_min_ratio", warmup_min_ratio)
        self._cosine_ratio = _not_negative("cos_min_ratio", cos_min_ratio)
        super().__init__(optimizer)
        _warn_of_short(self._total, self._warmup.num_steps)

    def ratio(self, t: int) -> float:
        """Give the share of the group's own rate. See [Note: counting steps]."""
        length = self._warmup.num_steps
        if length and t < 0:
            return 0.0
        if t < length:
            return self._warmup_ratio + (1 - self._warmup_ratio) * self._warmup(t)
        done = min(1.0, (t - length + 1) / max(1, self._total - length))
        half_wave = (1 + math.cos(math.pi * done)) / 2
        return max(0.0, self._cosine_ratio + (1 - self._cosine_ratio) * half_wave)

    def rates(self, t: int) -> list[float]:
        """Give the rate of each param group. See [Note: counting steps]."""
        ratio = self.ratio(t)
        return [float(rate) * ratio for rate in self.base_lrs]


class OneCycle(_Schedule):
    """One climb of the rate and one descent, with momentum going the other way, and then a decay.

    With ``b = t + 1`` the height ``s`` climbs from 0 to 1 over the first ``A`` steps and falls to 0
    over the next ``B``. The rate is ``min + (max - min) * s``. Momentum, which is beta1 of every
    group that has betas, is ``max - (max - min) * s``. From ``b = A + B + 1`` on, with ``k``
    counted from 1 there, the rate is ``min / (1 + r * k / D)`` and momentum is
    ``max * (1 + m * k / D)``.

    Stairs hold the height that the slope has where each begins.

    Args:
        optimizer: whose rates are set.
        cycle_min_lr: rate at both ends of the cycle.
        cycle_max_lr: rate at its height.
        decay_lr_rate: r; 0 does not decay.
        cycle_first_step_size: A.
        cycle_second_step_size: B; None for A.
        cycle_first_stair_count: stairs on the way up; 0 for a slope.
        cycle_second_stair_count: stairs on the way down; None for as many as up.
        decay_step_size: D; 0 does not decay.
        cycle_momentum: whether momentum moves, too.
        cycle_min_mom: momentum at the height of the rate.
        cycle_max_mom: momentum at both ends.
        decay_mom_rate: m; 0 does not change momentum after the cycle.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the options are DeepSpeed's
        self,
        optimizer: torch.optim.Optimizer,
        cycle_min_lr: float,
        cycle_max_lr: float,
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: int = 2000,
        cycle_second_step_size: int | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: int = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: float = 0.8,
        cycle_max_mom: float = 0.9,
        decay_mom_rate: float = 0.0,
    ) -> None:
        self._rates = (
            _not_negative("cycle_min_lr", cycle_min_lr),
            _not_negative("cycle_max_lr", cycle_max_lr),
        )
        self._momenta = (
            _not_negative("cycle_min_mom", cycle_min_mom),
            _not_negative("cycle_max_mom", cycle_max_mom),
        )
        first = _count("cycle_first_step_size", cycle_first_step_size)
        second = first
        if cycle_second_step_size is not None:
            second = _count("cycle_second_step_size", cycle_second_step_size)
        up = _count("cycle_first_stair_count", cycle_first_stair_count, least=0)
        down = up
        if cycle_second_stair_count is not None:
            down = _count("cycle_second_stair_count", cycle_second_stair_count, least=0)
        self._first, self._second, self._up, self._down = first, second, up, down
        self._decay_step = _not_negative("decay_step_size", decay_step_size)
        self._rate_decay = _not_negative("decay_lr_rate", decay_lr_rate)
        self._momentum_decay = _not_negative("decay_mom_rate", decay_mom_rate)
        if not isinstance(cycle_momentum, bool):
            raise _refused("cycle_momentum", "true or false", cycle_momentum)
        has_betas = any("betas" in group for group in optimizer.param_groups)
        self._moves_momentum = cycle_momentum and has_betas
        if cycle_momentum and not has_betas:
            _log.warning(
                "scheduler.params.cycle_momentum has no effect: %s has no betas",
                type(optimizer).__name__,
            )
        super().__init__(optimizer)

    def height(self, b: int) -> float:
        """Give the height in the cycle, from 0 to 1, after ``b`` steps."""
        at = b % (self._first + self._second)
        if at <= self._first:
            return _climbed(at, self._first, self._up)
        return 1 - _climbed(at - self._first, self._second, self._down)

    def _decay_intervals(self, t: int) -> float:
        """How long the decay has been going on; 0 during the cycle."""
        past = t - (self._first + self._second) + 1
        return past / self._decay_step if past > 0 and self._decay_step else 0.0

    def rates(self, t: int) -> list[float]:
        """Give the rate of each param group. See [Note: counting steps]."""
        low, high = self._rates
        if t < self._first + self._second:
            rate = low + (high - low) * self.height(t + 1)
        else:
            rate = low / (1 + self._rate_decay * self._decay_intervals(t))
        return [rate] * len(self.optimizer.param_groups)

    def momentum(self, t: int) -> float:
        """Give the momentum of all param groups. See [Note: counting steps]."""
        low, high = self._momenta
        if t < self._first + self._second:
            return high - (high - low) * self.height(t + 1)
        return high * (1 + self._momentum_decay * self._decay_intervals(t))

    def get_mom(self) -> list[tuple[float, float]] | None:
        """Give the betas of the param groups that have some; None if momentum does not move."""
        if not self._moves_momentum:
            return None
        return [group["betas"] for group in self.optimizer.param_groups if "betas" in group]

    def step(self, epoch: int | None = None) -> None:
        """Count a step of the optimizer, and set rates and momentum for the next."""
        super().step(epoch)
        self._set_momentum()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved step: rates and momentum are those of that step at once."""
        super().load_state_dict(state_dict)
        self._set_momentum()

    def _set_momentum(self) -> None:
        if not self._moves_momentum:
            return
        momentum = self.momentum(self.last_epoch - 1)
        if not momentum < 1:
            raise ConfigError(
                compose(
                    f"OneCycle raised momentum to {momentum:g} after {self.last_epoch} steps, and "
                    "an average with no share of the present never changes.",
                    hint="lower scheduler.params.decay_mom_rate or cycle_max_mom.",
                )
            )
        for group in self.optimizer.param_groups:
            if "betas" in group:
                group["betas"] = (momentum, *group["betas"][1:])


class LRRangeTest(_Schedule):
    """A rate that grows without end, to see where training breaks.

    ``min * (1 + r * b / S)`` with ``b = t + 1``; ``b / S`` is rounded down for a staircase.

    Args:
        optimizer: whose rates are set.
        lr_range_test_min_lr: the first rate, or one for each param group.
        lr_range_test_step_size: S.
        lr_range_test_step_rate: r.
        lr_range_test_staircase: whether the rate grows every S steps only.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        lr_range_test_min_lr: Rates = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
    ) -> None:
        self._lowest = _for_groups("lr_range_test_min_lr", lr_range_test_min_lr, optimizer)
        self._size = _count("lr_range_test_step_size", lr_range_test_step_size)
        self._growth = _not_negative("lr_range_test_step_rate", lr_range_test_step_rate)
        if not isinstance(lr_range_test_staircase, bool):
            raise _refused("lr_range_test_staircase", "true or false", lr_range_test_staircase)
        self._has_stairs = lr_range_test_staircase
        super().__init__(optimizer)

    def rates(self, t: int) -> list[float]:
        """Give the rate of each param group. See [Note: counting steps]."""
        steps = t + 1
        intervals = steps // self._size if self._has_stairs else steps / self._size
        return [rate * (1 + self._growth * intervals) for rate in self._lowest]


_OWN = {
    cls.__name__: cls for cls in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)
}
VALID_LR_SCHEDULES = list(_OWN)
"""Names of the schedules that DeepSpeed's configurations know."""

# Arguments of torch's schedules that something is divided by.
_COUNTS = frozenset(
    {
        *("T_0", "T_max", "T_mult", "epochs", "step_size", "step_size_down", "step_size_up"),
        *("steps_per_epoch", "total_steps"),
    }
)
_NEED_CODE = {
    "ChainedScheduler": "other schedules",
    "SequentialLR": "other schedules",
    "LambdaLR": "a function",
    "MultiplicativeLR": "a function",
}


def make_schedule(
    name: str, optimizer: torch.optim.Optimizer, options: Mapping[str, Any]
) -> LRScheduler:
    """Build a learning rate schedule by its configuration name.

    Raises:
        ConfigError: the name is unknown, or the options do not fit.
    """
    known = _of_torch() | _OWN
    if name not in known:
        raise ConfigError(
            compose(
                f'scheduler.type "{name}" is not a schedule of torch.optim.lr_scheduler, nor one '
                f"of {', '.join(VALID_LR_SCHEDULES)}.{suggestion(name, known)}",
                hint="use one of these, or pass lr_scheduler=... to initialize().",
            )
        )
    if name in _NEED_CODE:
        raise ConfigError(
            compose(
                f"scheduler.type {name} needs {_NEED_CODE[name]}, which JSON cannot say.",
                hint="pass lr_scheduler=lambda optimizer: torch.optim.lr_scheduler."
                f"{name}(optimizer, ...) to initialize().",
            )
        )
    options = dict(options)
    # Where schedules of DeepSpeed start; from elsewhere they go on by load_state_dict().
    if name in _OWN and (start := options.pop("last_batch_iteration", -1)) != -1:
        raise _refused("last_batch_iteration", "-1", start)
    found = recipe(known[name], not_set={"optimizer", "last_epoch"})
    if name not in _OWN:
        _check_numbers(found, options)
    return found("scheduler.params", options, optimizer)


def _check_numbers(found: Recipe, options: Mapping[str, Any]) -> None:
    """Refuse what torch's schedules take without a look, and stumble over in some later step."""
    for key, value in options.items():
        default = found.takes[key].default if key in found.takes else None
        if key in _COUNTS and not (value is None and default is None):
            _count(key, value)
        elif isinstance(value, str) and value.strip("+-").replace(".", "", 1)[:1].isdigit():
            raise _refused(key, "a number", value)
        elif is_number(default) or key == "gamma":
            items: Sequence[Any] = value if isinstance(value, (list, tuple)) else [value]
            if not all(is_number(item) for item in items):
                raise _refused(key, "a number", value)


def _of_torch() -> dict[str, type[LRScheduler]]:
    return {
        found: value
        for found, value in vars(torch.optim.lr_scheduler).items()
        if isinstance(value, type) and issubclass(value, LRScheduler) and value is not LRScheduler
        if not found.startswith("_")
    }


def _climbed(done: int, size: int, stairs: int) -> float:
    """The share of a slope that is done, rounded down to whole stairs."""
    return done / size if stairs == 0 else (done * stairs // size) / stairs


def _warn_of_short(total: int, warmup: int) -> None:
    if total < warmup:
        _log.warning(
            "scheduler.params: training ends after total_num_steps, %d, before its warm-up does, "
            "after %d",
            total,
            warmup,
        )


def _for_groups(key: str, value: Rates, optimizer: torch.optim.Optimizer) -> list[float]:
    """One rate for each param group."""
    count = len(optimizer.param_groups)
    if isinstance(value, (list, tuple)):
        if len(value) != count:
            raise _refused(key, f"one number or {count}, one for each param group", value)
        return [_not_negative(key, item) for item in value]
    return [_not_negative(key, value)] * count


def _not_negative(key: str, value: Any) -> float:
    if not is_number(value) or not value >= 0:
        raise _refused(key, "a number that is not negative", value)
    return float(value)


def _count(key: str, value: Any, least: int = 1) -> int:
    """A whole number, which JSON may write as 1e3."""
    if not is_number(value) or value != math.floor(value) or value < least:
        raise _refused(key, f"a whole number of at least {least}", value)
    return int(value)


def _refused(key: str, wanted: str, value: object) -> ConfigError:
    return ConfigError(
        compose(
            f"scheduler.params.{key} must be {wanted}, but is {value!r}.",
            hint="correct the value, or remove the key for the default.",
        )
    )
