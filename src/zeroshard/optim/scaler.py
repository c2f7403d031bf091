"""The fp16 loss scale: static, or found by trial.

Gradients smaller than 6e-8 vanish in fp16, so the loss is multiplied by a scale before backward and
the gradients are divided by it before the step. The dynamic rule (Micikevicius et al., "Mixed
Precision Training", 2018) halves the scale when gradients overflow and doubles it after a window of
steps without overflow. ``hysteresis`` is the number of overflows it takes to halve it once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zeroshard.errors import LossScaleError, compose

__all__ = ["LossScaler", "ScalePolicy"]


@dataclass(frozen=True, slots=True)
class ScalePolicy:
    """How the loss scale starts and moves; ``dynamic`` false keeps ``initial`` for ever."""

    initial: float = 2.0**16
    dynamic: bool = True
    window: int = 1000
    hysteresis: int = 2
    consecutive_hysteresis: bool = False
    minimum: float = 1.0


class LossScaler:
    """The current loss scale; call :meth:`update` once for every optimizer step."""

    def __init__(self, policy: ScalePolicy) -> None:
        self.policy = policy
        self.scale = policy.initial
        self._tolerance = policy.hysteresis
        self._step = 0
        self._last_overflow = -1

    def update(self, overflow: bool) -> None:
        """Take note of a step whose gradients did or did not overflow.

        Raises:
            LossScaleError: an overflow at the smallest scale; no smaller one may be tried.
        """
        if self.policy.dynamic:
            if overflow:
                self._shrink()
            else:
                self._grow()
        self._step += 1

    def _shrink(self) -> None:
        if self._tolerance > 1:
            self._tolerance -= 1
        elif self.scale <= self.policy.minimum:
            raise LossScaleError(
                compose(
                    f"fp16 gradients overflow at the smallest loss scale, {self.scale:g}; "
                    "no smaller scale is allowed, so training cannot go on.",
                    hint="weights trained in bf16 often do this: use bf16 where the device has it. "
                    "Else lower the learning rate, look for infinities in the loss, or lower "
                    "fp16.min_loss_scale.",
                )
            )
        else:
            self.scale = max(self.scale / 2, self.policy.minimum)
        self._last_overflow = self._step

    def _grow(self) -> None:
        if self.policy.consecutive_hysteresis:
            self._tolerance = self.policy.hysteresis
        stable = self._step - self._last_overflow - 1
        if stable > 0 and stable % self.policy.window == 0:
            self._tolerance = self.policy.hysteresis
            self.scale *= 2

    def state_dict(self) -> dict[str, float | int]:
        """Where the scale stands, by which a scaler of the same policy goes on."""
        return {
            "scale": self.scale,
            "tolerance": self._tolerance,
            "step": self._step,
            "last_overflow": self._last_overflow,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where another scaler stood; a scale that is kept stays what it is."""
        if self.policy.dynamic:
            self.scale = float(state["scale"])
        self._tolerance = int(state["tolerance"])
        self._step, self._last_overflow = int(state["step"]), int(state["last_overflow"])
