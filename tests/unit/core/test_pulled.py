"""How shards of other ranks are copied, from what the installed libraries can do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from zeroshard.core import pulled

CPU = torch.device("cpu")


class NotAtAll(pulled.HostCopies):
    def __init__(self, device: torch.device) -> None:
        raise ImportError("no such library")


class Working(pulled.HostCopies):
    def __init__(self, device: torch.device) -> None:
        pass


class Idle(Working):
    def __call__(self, copies: Any) -> Any:
        return super().__call__([])


class Refused(Working):
    def __call__(self, copies: Any) -> Any:
        raise RuntimeError("the driver is too old")


class OneByOne(Working):
    pass


@pytest.mark.parametrize(
    ("batched", "chosen", "says"),
    [
        (Working, Working, None),
        (NotAtAll, OneByOne, None),
        (Refused, OneByOne, "the driver is too old"),
        (Idle, OneByOne, "copied nothing"),
    ],
)
def test_copies_go_one_by_one_where_a_call_for_all_is_unknown_or_fails(
    batched: Callable[..., object],
    chosen: type,
    says: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="zeroshard")
    with (
        mock.patch.object(pulled, "BatchedCopies", batched),
        mock.patch.object(pulled, "StreamCopies", OneByOne),
    ):
        assert type(pulled._copier(CPU)) is chosen
    assert [says in record.getMessage() for record in caplog.records if says] == [True] * bool(says)
    assert says or not caplog.records
