"""The loader that ``initialize(training_data=...)`` returns: each rank sees its own samples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from torch.utils.data.distributed import DistributedSampler

from zeroshard.errors import UsageError, compose

__all__ = ["RepeatingLoader", "ShardedLoader", "make_loader"]

_log = logging.getLogger(__name__)


class _EveryNth(IterableDataset[Any]):
    """Every ``world``-th sample of a stream, beginning with the ``rank``-th."""

    def __init__(self, stream: IterableDataset[Any], rank: int, world: int) -> None:
        self.stream, self.rank, self.world = stream, rank, world

    def __iter__(self) -> Iterator[Any]:
        samples = iter(self.stream)
        # Only whole rounds: a rank with a sample more than the others would wait for ever.
        while len(turn := list(islice(samples, self.world))) == self.world:
            yield turn[self.rank]


class ShardedLoader:
    """Micro-batches of this rank's samples; every pass over it is an epoch in a new order."""

    def __init__(self, loader: DataLoader[Any], sampler: DistributedSampler[Any] | None) -> None:
        self.loader, self.sampler, self.epoch = loader, sampler, 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        if self.sampler is not None:
            self.sampler.set_epoch(self.epoch)
        self.epoch += 1
        return iter(self.loader)


class RepeatingLoader:
    """The batches of a loader without end: what comes after the last is its next pass.

    Args:
        loader: anything that can be iterated again and again.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self._batches = iter(loader)

    def __len__(self) -> int:
        """Batches of one pass."""
        loader: Any = self.loader
        return len(loader)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        for batch in self._batches:
            return batch
        self._batches = iter(self.loader)
        for batch in self._batches:
            return batch
        raise UsageError(
            compose(
                "RepeatingLoader: the loader has no batches left in a new pass.",
                hint="pass something that can be iterated again, such as a DataLoader, and that is "
                "not empty; an iterator is used up after one pass.",
            )
        )


def make_loader(
    data: object,
    *,
    batch_size: int,
    rank: int,
    world: int,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    drop_last: bool = False,
    pin_memory: bool = False,
    sampler: Sampler[Any] | None = None,
    num_workers: int = 0,
) -> ShardedLoader:
    """Distribute a dataset over the ranks.

    A map-style dataset is shuffled anew each epoch and divided evenly. Of a stream each rank takes
    every ``world``-th sample, which reads the whole stream on every rank; the same number on each.
    A ``sampler`` of the caller's replaces that: it says which samples this rank sees.

    Raises:
        UsageError: ``data`` is not a torch dataset.
    """
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "collate_fn": collate_fn,
        "drop_last": drop_last,
        "pin_memory": pin_memory,
        "num_workers": num_workers,
    }
    if isinstance(data, IterableDataset):
        if world > 1:
            _log.warning(
                "training_data is a stream: each of the %d ranks keeps every %d-th sample of it. "
                "Pass your own loader if the stream is divided already.",
                world,
                world,
            )
        stream: IterableDataset[Any] = _EveryNth(data, rank, world)
        return ShardedLoader(DataLoader(stream, **options), None)
    if not (isinstance(data, Dataset) or hasattr(data, "__getitem__")):
        raise UsageError(f"training_data must be a torch dataset, not {type(data).__name__}.")
    dataset: Any = data
    if sampler is not None:
        return ShardedLoader(DataLoader(dataset, sampler=sampler, **options), None)
    shuffled: DistributedSampler[Any] = DistributedSampler(
        dataset, num_replicas=world, rank=rank, shuffle=True, drop_last=drop_last
    )
    return ShardedLoader(DataLoader(dataset, sampler=shuffled, **options), shuffled)
