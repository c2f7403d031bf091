"""The loader that initialize() makes of training_data."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import zeroshard
from unit.engine.small import Net, config_of, on_ranks
from zeroshard import UsageError
from zeroshard.engine.data import ShardedLoader, make_loader


class Numbers(Dataset[int]):
    """0, 1, 2, ... by index."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


class Stream(IterableDataset[int]):
    """0, 1, 2, ... one after another."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.length))


def loaders(data: Any, world: int = 2, batch_size: int = 2, **more: Any) -> list[ShardedLoader]:
    """The loaders of all ranks."""
    return [
        make_loader(data, batch_size=batch_size, rank=rank, world=world, **more)
        for rank in range(world)
    ]


def epoch(loader: ShardedLoader) -> list[int]:
    return [sample for batch in loader for sample in batch.tolist()]


@pytest.mark.parametrize("data", [Numbers(12), list(range(12))], ids=["dataset", "list"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_ranks_share_out_a_dataset(data: Any, world: int) -> None:
    shares = [epoch(loader) for loader in loaders(data, world)]
    assert {len(share) for share in shares} == {12 // world}
    assert sorted(itertools.chain(*shares)) == list(range(12))


def test_every_epoch_has_a_new_order_and_the_ranks_agree_on_it() -> None:
    pair = loaders(Numbers(24))
    epochs = [[epoch(loader) for loader in pair] for _ in range(4)]
    for shares in epochs:
        assert sorted(shares[0] + shares[1]) == list(range(24))
    assert len({tuple(shares[0]) for shares in epochs}) == 4
    assert len({frozenset(shares[0]) for shares in epochs}) > 1


def test_the_order_is_the_same_in_every_run() -> None:
    (first,), (second,) = loaders(Numbers(24), 1), loaders(Numbers(24), 1)
    assert [epoch(first), epoch(first)] == [epoch(second), epoch(second)]


def test_an_epoch_left_early_does_not_come_again() -> None:
    (left,), (whole,) = loaders(Numbers(24), 1), loaders(Numbers(24), 1)
    next(iter(left))
    epoch(whole)
    assert epoch(left) == epoch(whole)


def test_the_length_is_in_micro_batches_of_one_rank() -> None:
    assert [len(loader) for loader in loaders(Numbers(12), batch_size=4)] == [2, 2]
    (loader,) = loaders(Numbers(12), 1, batch_size=4)
    assert [len(batch) for batch in loader] == [4, 4, 4]


@pytest.mark.parametrize("drop_last", [False, True])
def test_drop_last_decides_about_incomplete_batches(drop_last: bool) -> None:
    for loader in loaders(Numbers(11), drop_last=drop_last):
        sizes = [len(batch) for batch in loader]
        assert sizes == ([2, 2] if drop_last else [2, 2, 2])
        assert len(loader) == len(sizes)


def test_every_rank_has_as_many_batches_as_the_others_whatever_the_length() -> None:
    for length in range(1, 9):
        sizes = [[len(batch) for batch in loader] for loader in loaders(Numbers(length), 3)]
        assert sizes[0] == sizes[1] == sizes[2]
        assert sizes[0]


def test_collate_fn_makes_the_batches() -> None:
    for loader in loaders(Numbers(8), collate_fn=lambda samples: {"sum": sum(samples)}):
        batches = list(loader)
        assert [set(batch) for batch in batches] == [{"sum"}, {"sum"}]


def test_of_a_stream_each_rank_takes_every_nth_sample(caplog: pytest.LogCaptureFixture) -> None:
    assert [epoch(loader) for loader in loaders(Stream(8))] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    messages = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert all("each of the 2 ranks keeps every 2-th sample" in message for message in messages)
    assert messages


def test_a_stream_of_one_rank_comes_in_full_and_without_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    (loader,) = loaders(Stream(5), 1)
    assert [epoch(loader), epoch(loader)] == [list(range(5))] * 2
    assert caplog.records == []


def test_of_a_stream_every_rank_has_as_many_batches_as_the_others() -> None:
    """A rank with one batch more would wait in it for the others for ever."""
    for length in range(1, 9):
        sizes = [[len(batch) for batch in loader] for loader in loaders(Stream(length), 3)]
        assert sizes[0] == sizes[1] == sizes[2]


@pytest.mark.parametrize("data", [5, iter([1, 2]), object()], ids=["number", "iterator", "object"])
def test_what_is_no_dataset_is_refused(data: object) -> None:
    with pytest.raises(UsageError, match="training_data must be a torch dataset, not "):
        make_loader(data, batch_size=1, rank=0, world=1)


@on_ranks(2)
def test_initialize_makes_a_loader_from_its_arguments() -> None:
    def collate(samples: list[tuple[Tensor]]) -> Tensor:
        return torch.stack([sample for (sample,) in samples]) + 1

    data = TensorDataset(torch.zeros(11, 4))
    config = config_of(train_micro_batch_size_per_gpu=2, dataloader_drop_last=True)
    engine, _, loader, _ = zeroshard.initialize(
        model=Net(), training_data=data, collate_fn=collate, config=config
    )
    assert loader is not None
    assert [tuple(x.shape) for x in loader] == [(2, 4), (2, 4)]
    for x in loader:
        assert torch.equal(x, torch.ones(2, 4))
        engine.backward(engine(x).square().mean())
        engine.step()
    assert (engine.global_steps, engine.global_samples) == (2, 8)


@on_ranks(2)
def test_initialize_makes_a_loader_from_a_stream() -> None:
    config = config_of(train_micro_batch_size_per_gpu=2)
    engine, _, loader, _ = zeroshard.initialize(model=Net(), training_data=Stream(8), config=config)
    assert loader is not None
    seen = [batch.tolist() for batch in loader]
    first = engine.global_rank
    assert seen == [[first, first + 2], [first + 4, first + 6]]
