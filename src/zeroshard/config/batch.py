"""The batch identity: samples per step = samples per micro-step x micro-steps x ranks.

Pure integer arithmetic. DeepSpeed divides and rounds down first and complains afterwards, so its
message shows numbers nobody wrote. Here a division that does not come out is refused where it
happens, and the hint says what each key would have to be.
"""

from __future__ import annotations

from dataclasses import dataclass

from zeroshard.errors import ConfigError, compose

__all__ = ["Batch", "resolve"]

_TRAIN = "train_batch_size"
_MICRO = "train_micro_batch_size_per_gpu"
_ACCUMULATION = "gradient_accumulation_steps"


@dataclass(frozen=True, slots=True)
class Batch:
    """The three batch numbers, resolved: `train = micro x accumulation x ranks`."""

    train: int
    """Samples that one optimizer step sees over all ranks."""

    micro: int
    """Samples that one rank sees in one micro-step."""

    accumulation: int
    """Micro-steps in one optimizer step."""


def resolve(train: int | None, micro: int | None, accumulation: int | None, world: int) -> Batch:
    """Derive the missing batch numbers from the given ones, or check them when all are given."""
    _check_positive(train, micro, accumulation, world)
    if train is None:
        if micro is None:
            raise _unknown(accumulation)
        steps = accumulation or 1
        return Batch(micro * steps * world, micro, steps)
    if micro is None:
        steps = accumulation or 1
        _check_divisible(train, _MICRO, {"accumulation": steps, "ranks": world})
        return Batch(train, train // (steps * world), steps)
    if accumulation is None:
        _check_divisible(train, _ACCUMULATION, {"micro": micro, "ranks": world})
        return Batch(train, micro, train // (micro * world))
    if train != micro * accumulation * world:
        raise _unequal(train, micro, accumulation, world)
    return Batch(train, micro, accumulation)


def _check_positive(
    train: int | None, micro: int | None, accumulation: int | None, world: int
) -> None:
    named = {
        _TRAIN: train,
        _MICRO: micro,
        _ACCUMULATION: accumulation,
        "the number of ranks": world,
    }
    wrong = {name: value for name, value in named.items() if not _is_count(value)}
    if wrong:
        facts = " and ".join(f"{name} is {value!r}" for name, value in wrong.items())
        raise ConfigError(
            compose(
                f"{facts}, but batch numbers are whole numbers of at least 1.",
                hint="correct the value, or leave the key out to have it derived from the others.",
            )
        )


def _is_count(value: object) -> bool:
    if value is None:
        return True
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_divisible(train: int, derived: str, factors: dict[str, int]) -> None:
    product = 1
    for value in factors.values():
        product *= value
    if train % product == 0:
        return
    below, above = train // product * product, -(-train // product) * product
    multiples = f"{below} or {above}" if below else f"{above}"
    options = [f'"{_TRAIN}": {multiples}']
    world = factors["ranks"]
    if train % world == 0:
        per_rank = train // world
        given = factors.get("micro", factors.get("accumulation", 1))
        key = _MICRO if "micro" in factors else _ACCUMULATION
        options.append(f'"{key}": {_largest_divisor(per_rank, given)}')
    terms = " x ".join(f"{value} ({name})" for name, value in factors.items())
    raise ConfigError(
        compose(
            f"{_TRAIN} {train} is not a multiple of {terms} = {product}, "
            f"so no whole {derived} exists.",
            hint=f"set {', or '.join(options)}.",
        )
    )


def _largest_divisor(of: int, at_most: int) -> int:
    """Find the largest divisor that does not exceed a bound, looking at most at a million."""
    start = min(of, at_most)
    return next((n for n in range(start, max(0, start - 1_000_000), -1) if of % n == 0), 1)


def _unequal(train: int, micro: int, accumulation: int, world: int) -> ConfigError:
    product = micro * accumulation * world
    options = [f'"{_TRAIN}": {product}']
    for key, rest in ((_MICRO, accumulation * world), (_ACCUMULATION, micro * world)):
        if train % rest == 0:
            options.append(f'"{key}": {train // rest}')
        else:
            options.append(f'"{key}": none fits, as {train} is not a multiple of {rest}')
    if train % (micro * accumulation) == 0:
        options.append(f"the number of ranks: {train // (micro * accumulation)}")
    return ConfigError(
        compose(
            f"{_TRAIN} {train} != {micro} (micro) x {accumulation} (accumulation) "
            f"x {world} (ranks) = {product}.",
            hint="change one of them: "
            + "; ".join(options)
            + ". Or leave one key out to have it derived.",
        )
    )


def _unknown(accumulation: int | None) -> ConfigError:
    known = "none of the batch keys is" if accumulation is None else f"only {_ACCUMULATION} is"
    return ConfigError(
        compose(
            f'the batch size is unknown: {known} set ("auto" counts as not set).\n'
            f"{_TRAIN} = {_MICRO} x {_ACCUMULATION} x ranks needs {_TRAIN} or {_MICRO}.",
            hint=f'set "{_MICRO}" to the number of samples one rank takes at a time.',
        )
    )
