"""What "auto" stands for: values that the caller of `initialize` knows, or the defaults.

`resolve` is a function of the file and of `Facts`, which say what the model and the arguments of a
script are like without holding either. Each answer tells where it comes from. A value that nobody
gives is `Unknown`: an error where the caller was asked, and left open where there is none, as when
a file is only looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from zeroshard.config.keys import Path
from zeroshard.config.schema import OPEN_BLOCKS
from zeroshard.config.table import TABLE
from zeroshard.config.values import is_block

__all__ = ["DERIVED", "Answer", "Facts", "Given", "Unknown", "lookup", "resolve"]

DERIVED = "the other batch numbers"
"""The source of a batch number that nobody gives: `Config.batch` works it out."""

_LR: Path = ("optimizer", "params", "lr")
_WARMUP_MIN_LR: Path = ("scheduler", "params", "warmup_min_lr")
_WARMUP_MAX_LR: Path = ("scheduler", "params", "warmup_max_lr")
_BATCH: frozenset[Path] = frozenset(
    {("train_batch_size",), ("train_micro_batch_size_per_gpu",), ("gradient_accumulation_steps",)}
)
_PRECISIONS: Mapping[Path, str] = {("fp16", "enabled"): "fp16", ("bf16", "enabled"): "bf16"}
_AUTOCAST: Path = ("torch_autocast", "enabled")

# Where a script usually has the value.
_USUAL_SOURCE: Mapping[Path, str] = {
    ("gradient_clipping",): "args.max_grad_norm",
    _LR: 'args.learning_rate, or as "lr" of every group in model_parameters',
    ("optimizer", "params", "betas"): "args.adam_beta1 and args.adam_beta2",
    ("optimizer", "params", "eps"): "args.adam_epsilon",
    ("optimizer", "params", "weight_decay"): "args.weight_decay",
    _WARMUP_MAX_LR: "args.learning_rate",
    ("scheduler", "params", "warmup_num_steps"): "args.warmup_steps",
    ("scheduler", "params", "total_num_steps"): "args.max_steps",
}


@dataclass(frozen=True, slots=True)
class Given:
    """A value that the caller gives for a key."""

    value: object
    source: str
    """Where the caller has it, such as "args.learning_rate"."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known outside the file."""

    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    """The dtype of the model's parameters; None if they have several, or there are none."""

    hidden_size: int | None = None
    """The hidden size that the model's own configuration states."""

    given: Mapping[Path, Given] = field(default_factory=dict[Path, Given])
    """Values for keys, by the path of the key."""

    replaced: frozenset[str] = frozenset()
    """The blocks that do not count, as the caller passes an object: "optimizer", "scheduler"."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The value that an "auto" stands for."""

    value: object
    source: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """An "auto" whose value only the caller can know."""

    hint: str
    """What to set, if the caller was asked and does not know."""


def lookup(values: Mapping[str, object], path: Path) -> object:
    """Find a value by its path, or None."""
    here: object = values
    for part in path:
        here = here.get(part) if is_block(here) else None
    return here


def resolve(
    paths: Iterable[Path], values: Mapping[str, object], facts: Facts | None
) -> dict[Path, Answer | Unknown]:
    """Find what each "auto" stands for.

    Args:
        paths: the keys whose value is "auto".
        values: the other keys of the file.
        facts: what the caller knows; None if there is no caller to ask.
    """
    resolution = _Resolution(values, facts)
    # fp16 comes before bf16 and the optimizer before the schedule, which look at them.
    for path in sorted(paths, key=lambda path: (path == ("bf16", "enabled"), path[0], path)):
        resolution.answers[path] = resolution.find(path)
    return {path: resolution.answers[path] for path in paths}


class _Resolution:
    def __init__(self, values: Mapping[str, object], facts: Facts | None) -> None:
        self._values = values
        self._asked = facts is not None
        self._facts = facts or Facts()
        self.answers: dict[Path, Answer | Unknown] = {}

    def find(self, path: Path) -> Answer | Unknown:
        given = self._facts.given.get(path)
        if given is not None:
            return Answer(given.value, given.source)
        if path in _PRECISIONS:
            return self._precision(path)
        if path == _WARMUP_MAX_LR:
            return self._peak(path)
        if path == _WARMUP_MIN_LR:
            return Answer(0, "default")
        if path[:-1] in OPEN_BLOCKS:
            return Unknown(_what_to_set(path))
        return self._field(path)

    def _field(self, path: Path) -> Answer | Unknown:
        if path in _BATCH:
            return self._ask(path, Answer(None, DERIVED))
        if path in _SIZES:
            return self._ask(path, self._size(path))
        if path in _USUAL_SOURCE:
            return self._ask(path, _default(path))
        return _default(path)

    def _ask(self, path: Path, answer: Answer) -> Answer | Unknown:
        """Give an answer only if the caller was there to give another one."""
        return answer if self._asked else Unknown(_what_to_set(path))

    def _precision(self, path: Path) -> Answer | Unknown:
        for other in (*_PRECISIONS, _AUTOCAST):
            if other != path and self._value(other) is True:
                return Answer(False, f"{'.'.join(other)} = true")
        dtype = self._facts.dtype
        if dtype is not None:
            return Answer(dtype == _PRECISIONS[path], f"the model's {dtype} parameters")
        return self._ask(path, _default(path))

    def _size(self, path: Path) -> Answer:
        hidden = self._facts.hidden_size
        if hidden is None:
            return _default(path)
        value, formula = _SIZES[path]
        return Answer(value(hidden), f"{formula} with the model's hidden size {hidden}")

    def _peak(self, path: Path) -> Answer | Unknown:
        source = self._facts.given.get(_LR)
        value = self._value(_LR)
        if value is not None:
            return Answer(value, "optimizer.params.lr")
        return (
            Unknown(_what_to_set(path)) if source is None else Answer(source.value, source.source)
        )

    def _value(self, path: Path) -> object:
        answer = self.answers.get(path)
        return answer.value if isinstance(answer, Answer) else lookup(self._values, path)


# As Hugging Face fills these keys.
_SIZES: Mapping[Path, tuple[Callable[[int], int], str]] = {
    ("zero_optimization", "reduce_bucket_size"): (lambda h: h * h, "hidden^2"),
    ("zero_optimization", "stage3_prefetch_bucket_size"): (
        lambda h: 9 * h * h // 10,
        "0.9 hidden^2",
    ),
    ("zero_optimization", "stage3_param_persistence_threshold"): (lambda h: 10 * h, "10 hidden"),
}


def _default(path: Path) -> Answer:
    return Answer(TABLE[path].default, "default")


def _what_to_set(path: Path) -> str:
    usual = _USUAL_SOURCE.get(path)
    if usual:
        return f'set "{".".join(path)}", or pass it to initialize() as {usual}.'
    return f'set "{".".join(path)}", or remove it for the default of the {path[0]}.'
