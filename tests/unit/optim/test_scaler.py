"""The loss scale against a literal transcription of DeepSpeed's rule."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from zeroshard.errors import LossScaleError
from zeroshard.optim.scaler import LossScaler, ScalePolicy


@dataclass
class Transcript:
    """The rule as DeepSpeed states it, line by line, for one optimizer step each."""

    scale: float
    window: int
    hysteresis: int
    consecutive_hysteresis: bool
    minimum: float
    current_hysteresis: int = 0
    iteration: int = 0
    last_overflow: int = -1

    def __post_init__(self) -> None:
        self.current_hysteresis = self.hysteresis

    def update(self, overflow: bool) -> None:
        if overflow:
            if self.hysteresis == 1 or self.current_hysteresis == 1:
                if self.scale == self.minimum:
                    raise RuntimeError("already at minimum")
                self.scale = max(self.scale / 2, self.minimum)
            else:
                self.current_hysteresis -= 1
            self.last_overflow = self.iteration
        else:
            if self.consecutive_hysteresis:
                self.current_hysteresis = self.hysteresis
            stable = self.iteration - self.last_overflow - 1
            if stable > 0 and stable % self.window == 0:
                if not self.consecutive_hysteresis:
                    self.current_hysteresis = self.hysteresis
                self.scale *= 2
        self.iteration += 1


@st.composite
def policies(draw: st.DrawFn) -> ScalePolicy:
    minimum = draw(st.sampled_from((0.25, 1.0, 3.0)))
    return ScalePolicy(
        initial=minimum * 2.0 ** draw(st.integers(0, 5)) + draw(st.sampled_from((0.0, 0.7))),
        window=draw(st.integers(1, 4)),
        hysteresis=draw(st.integers(1, 3)),
        consecutive_hysteresis=draw(st.booleans()),
        minimum=minimum,
    )


# Runs of equal outcomes reach windows and minima that single coins seldom do.
runs = st.lists(st.tuples(st.booleans(), st.integers(1, 6)), max_size=12).map(
    lambda parts: [overflow for overflow, count in parts for _ in range(count)]
)


@given(policies(), runs)
@example(ScalePolicy(initial=4, window=1, hysteresis=1, minimum=1), [False] * 3 + [True] * 5)
def test_the_scale_follows_the_rule_of_deepspeed(
    policy: ScalePolicy, overflows: list[bool]
) -> None:
    ours = LossScaler(policy)
    theirs = Transcript(
        policy.initial,
        policy.window,
        policy.hysteresis,
        policy.consecutive_hysteresis,
        policy.minimum,
    )
    for overflow in overflows:
        try:
            theirs.update(overflow)
        except RuntimeError:
            with pytest.raises(LossScaleError):
                ours.update(overflow)
            return
        ours.update(overflow)
        assert ours.scale == theirs.scale


def scales(policy: ScalePolicy, outcomes: str) -> list[float]:
    """The scale after each step; ``x`` is an overflow, ``.`` is none."""
    scaler = LossScaler(policy)
    found: list[float] = []
    for outcome in outcomes:
        scaler.update(outcome == "x")
        found.append(scaler.scale)
    return found


def test_an_overflow_halves_the_scale() -> None:
    assert scales(ScalePolicy(initial=16, hysteresis=1), "xx.") == [8, 4, 4]


def test_a_window_without_overflow_doubles_the_scale() -> None:
    assert scales(ScalePolicy(initial=16, window=2), ".....") == [16, 16, 32, 32, 64]


def test_hysteresis_forgives_the_first_overflows_and_good_steps_do_not_renew_it() -> None:
    policy = ScalePolicy(initial=16, hysteresis=3)
    assert scales(policy, "x.x.x.x") == [16, 16, 16, 16, 8, 8, 4]


def test_consecutive_hysteresis_is_renewed_by_every_good_step() -> None:
    policy = ScalePolicy(initial=16, hysteresis=2, consecutive_hysteresis=True)
    assert scales(policy, "x.x.xx") == [16, 16, 16, 16, 16, 8]


def test_a_full_window_renews_hysteresis() -> None:
    policy = ScalePolicy(initial=16, hysteresis=2, window=1)
    assert scales(policy, "xx..x") == [16, 8, 8, 16, 16]


def test_an_overflow_at_the_smallest_scale_ends_training_with_advice() -> None:
    scaler = LossScaler(ScalePolicy(initial=3, minimum=2, hysteresis=1))
    scaler.update(True)
    assert scaler.scale == 2
    with pytest.raises(LossScaleError, match="smallest loss scale, 2") as error:
        scaler.update(True)
    assert "\n\nhint: " in str(error.value)
    assert "bf16" in str(error.value)


@given(runs)
def test_a_static_scale_never_moves(overflows: list[bool]) -> None:
    scaler = LossScaler(ScalePolicy(initial=1, dynamic=False, window=1, hysteresis=1))
    for overflow in overflows:
        scaler.update(overflow)
    assert scaler.scale == 1


def test_the_defaults_are_those_of_deepspeed() -> None:
    policy = ScalePolicy()
    assert (policy.initial, policy.window, policy.hysteresis) == (2**16, 1000, 2)
    assert (policy.dynamic, policy.consecutive_hysteresis, policy.minimum) == (True, False, 1)
