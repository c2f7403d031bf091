"""The batch identity: what is derived, what is refused, and what the refusal says."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zeroshard.config import Batch, load, resolve
from zeroshard.errors import ConfigError

counts = st.integers(min_value=1, max_value=10_000)
maybe = st.none() | st.integers(min_value=-2, max_value=200)


@pytest.mark.parametrize(
    ("given_numbers", "batch"),
    [
        ((32, 4, 2), Batch(32, 4, 2)),
        ((32, 4, None), Batch(32, 4, 2)),
        ((32, None, 2), Batch(32, 4, 2)),
        ((None, 4, 2), Batch(32, 4, 2)),
        ((32, None, None), Batch(32, 8, 1)),
        ((None, 4, None), Batch(16, 4, 1)),
    ],
)
def test_each_row_of_the_table_derives_the_missing_numbers(
    given_numbers: tuple[int | None, int | None, int | None], batch: Batch
) -> None:
    assert resolve(*given_numbers, world=4) == batch


def test_three_numbers_that_disagree_are_named_with_what_each_would_have_to_be() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(32, 4, 2, 3)
    fact, hint = str(caught.value).split("\n\nhint: ")
    assert fact == "train_batch_size 32 != 4 (micro) x 2 (accumulation) x 3 (ranks) = 24."
    assert '"train_batch_size": 24' in hint
    assert '"train_micro_batch_size_per_gpu": none fits' in hint
    assert '"gradient_accumulation_steps": none fits' in hint
    assert "the number of ranks: 4" in hint


def test_the_hint_names_whole_numbers_where_they_exist() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(48, 4, 2, 3)
    assert '"train_micro_batch_size_per_gpu": 8' in str(caught.value)
    assert '"gradient_accumulation_steps": 4' in str(caught.value)


@pytest.mark.parametrize(
    ("numbers", "fact", "hint"),
    [
        (
            (32, 5, None, 4),
            "train_batch_size 32 is not a multiple of 5 (micro) x 4 (ranks) = 20",
            'set "train_batch_size": 20 or 40, or "train_micro_batch_size_per_gpu": 4.',
        ),
        (
            (8, None, 3, 2),
            "train_batch_size 8 is not a multiple of 3 (accumulation) x 2 (ranks) = 6",
            'set "train_batch_size": 6 or 12, or "gradient_accumulation_steps": 2.',
        ),
        (
            (2, None, None, 4),
            "train_batch_size 2 is not a multiple of 1 (accumulation) x 4 (ranks) = 4",
            'set "train_batch_size": 4.',
        ),
    ],
)
def test_a_division_that_does_not_come_out_is_refused(
    numbers: tuple[int, int | None, int | None, int], fact: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(*numbers)
    assert str(caught.value).startswith(fact)
    assert str(caught.value).endswith(f"hint: {hint}")


@pytest.mark.parametrize("accumulation", [None, 4])
def test_an_unknown_batch_size_is_refused(accumulation: int | None) -> None:
    with pytest.raises(ConfigError, match="the batch size is unknown"):
        resolve(None, None, accumulation, 2)


@pytest.mark.parametrize(
    ("numbers", "name"),
    [
        ((0, 1, 1, 1), "train_batch_size is 0"),
        ((None, -4, None, 1), "train_micro_batch_size_per_gpu is -4"),
        ((None, 1, 0, 1), "gradient_accumulation_steps is 0"),
        ((8, 1, None, 0), "the number of ranks is 0"),
        ((True, 1, None, 1), "train_batch_size is True"),
    ],
)
def test_numbers_below_one_are_refused_by_name(
    numbers: tuple[int | None, int | None, int | None, int], name: str
) -> None:
    with pytest.raises(ConfigError, match=name):
        resolve(*numbers)


def test_a_config_resolves_its_own_numbers() -> None:
    config = load({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 2})
    assert config.batch(world=8) == Batch(16, 2, 1)
    with pytest.raises(ConfigError, match="the batch size is unknown"):
        load({"train_batch_size": "auto"}).batch(world=8)


@settings(max_examples=300, deadline=None)
@given(micro=counts, accumulation=counts, world=counts)
def test_any_two_numbers_with_the_batch_size_give_back_all_three(
    micro: int, accumulation: int, world: int
) -> None:
    train = micro * accumulation * world
    batch = Batch(train, micro, accumulation)
    assert resolve(train, micro, accumulation, world) == batch
    assert resolve(train, micro, None, world) == batch
    assert resolve(train, None, accumulation, world) == batch
    assert resolve(None, micro, accumulation, world) == batch


@settings(max_examples=500, deadline=None)
@given(train=maybe, micro=maybe, accumulation=maybe, world=st.integers(-1, 16))
def test_a_resolved_batch_keeps_what_was_given_and_satisfies_the_identity(
    train: int | None, micro: int | None, accumulation: int | None, world: int
) -> None:
    try:
        batch = resolve(train, micro, accumulation, world)
    except ConfigError as error:
        assert "\n\nhint: " in str(error)
        return
    assert batch.train == batch.micro * batch.accumulation * world
    assert min(batch.train, batch.micro, batch.accumulation) >= 1
    assert train in (None, batch.train)
    assert micro in (None, batch.micro)
    assert accumulation in (None, batch.accumulation)
