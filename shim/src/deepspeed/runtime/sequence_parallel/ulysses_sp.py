"""``deepspeed.runtime.sequence_parallel.ulysses_sp``: sequences divided over ranks, refused."""

from __future__ import annotations

from typing import NoReturn

from deepspeed._names import names
from zeroshard.errors import UsageError, compose

__all__ = ["UlyssesSPAttentionHF", "UlyssesSPDataLoaderAdapter"]


def _refuse(what: str) -> NoReturn:
    raise UsageError(
        compose(
            f"{what}: zeroshard has no sequence parallelism.",
            hint="leave sequence parallelism off (sp_size 1); gradient checkpointing and stage 3 "
            "make room for longer sequences.",
        )
    )


class UlyssesSPAttentionHF:
    """What would divide the attention of a Hugging Face model over ranks."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        del args, kwargs
        _refuse("UlyssesSPAttentionHF")

    @classmethod
    def register_with_transformers(cls, *args: object, **kwargs: object) -> NoReturn:
        """Refuse to replace the attention of a model.

        Raises:
            UsageError: always.
        """
        del args, kwargs
        _refuse("UlyssesSPAttentionHF.register_with_transformers()")


class UlyssesSPDataLoaderAdapter:
    """What would give each rank its part of every sequence."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        del args, kwargs
        _refuse("UlyssesSPDataLoaderAdapter")


__getattr__, __dir__ = names(__name__)
