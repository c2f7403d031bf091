"""Lines in the log while something takes long."""

from __future__ import annotations

import logging

import pytest

from zeroshard.engine.progress import Progress


def test_how_far_it_is_is_told_every_five_seconds_and_not_more_often(
    caplog: pytest.LogCaptureFixture,
) -> None:
    seconds = iter([0.0, 2, 4, 6, 6, 8, 10, 12, 12])
    with caplog.at_level(logging.INFO, logger="zeroshard"):
        progress = Progress("sharded", 6, 6_000_000_000, now=lambda: next(seconds))
        for _ in range(6):
            progress.tell(1_000_000_000)
    assert caplog.messages == [
        "sharded 3 of 6 units, 3.0 of 6.0 GB.",
        "sharded 6 of 6 units, 6.0 of 6.0 GB.",
    ]
