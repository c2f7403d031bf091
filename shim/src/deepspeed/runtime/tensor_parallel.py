"""``deepspeed.runtime.tensor_parallel``: layers divided over ranks, which zeroshard does not do."""

from __future__ import annotations

from typing import TypeVar

from deepspeed._names import names
from zeroshard.errors import UsageError, compose

__all__ = ["tp_model_init"]

_Model = TypeVar("_Model")


def tp_model_init(
    model: _Model, tp_size: int, dtype: object = None, config: object = None, **_: object
) -> _Model:
    """Return the model as it is, for a division over one rank.

    Raises:
        UsageError: it shall be divided over several.
    """
    del dtype, config
    if tp_size != 1:
        raise UsageError(
            compose(
                f"tp_model_init(tp_size={tp_size}): zeroshard has no tensor parallelism.",
                hint='remove "tensor_parallel"; stage 3 divides parameters over all ranks.',
            )
        )
    return model


__getattr__, __dir__ = names(__name__)
