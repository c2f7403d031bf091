"""Which way to gather is faster on these GPUs, found by trying both beside matrix products."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil

import torch

from zeroshard.core.collectives import Exchange, Ticket
from zeroshard.core.mesh import Mesh
from zeroshard.core.pulled import Pulled, Slab, aligned, map_slab, on_all
from zeroshard.core.transport import COLLECTIVE, Transport

__all__ = ["Cost", "Costs", "least_bytes", "tried"]

_MOST_SIZES = 4
_LEAST_BYTES = 1 << 20
_SIDE = 4096  # of the square matrices
_TRIAL_S = 0.006  # that the gathers of one measurement take alone
_MOST_GATHERS = 24
_PAUSE_CYCLES = 4_000_000  # both wait about 2 ms until all of it has been issued
_REPEATS = 3
_PRODUCTS = 20  # that are measured alone

Issue = Callable[[], Ticket]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a gather costs beside computation, in seconds.

    ``gather_s``: how long it takes. ``lost_s``: by how much longer the computation takes.
    """

    gather_s: float
    lost_s: float

    def is_below(self, other: Cost) -> bool:
        """Whether both are less: one counts where gathers are hidden, the other where not."""
        return self.gather_s < other.gather_s and self.lost_s <= other.lost_s


def tried(
    sizes: Iterable[int], collective: Callable[[int], Cost], pull: Callable[[int], Cost]
) -> int | None:
    """The least size from which on pulls cost less than collectives; None where they never do.

    A few sizes are tried, the largest first, until one is found that speaks against it; where none
    is found it is 0.
    """
    least: int | None = None
    chosen = _chosen(sizes)
    for size in chosen:
        if not pull(size).is_below(collective(size)):
            return least
        least = size
    return 0 if chosen else None


def _chosen(sizes: Iterable[int]) -> list[int]:
    """Some of the sizes, from large to small; what is too small to be measured follows the rest."""
    ordered = sorted({size for size in sizes if size >= _LEAST_BYTES}, reverse=True)
    if len(ordered) <= _MOST_SIZES:
        return ordered
    last = len(ordered) - 1
    return [ordered[round(at * last / (_MOST_SIZES - 1))] for at in range(_MOST_SIZES)]


def least_bytes(sizes: Iterable[int], mesh: Mesh) -> int | None:
    """Bytes of a full unit from which pulls are faster on these GPUs. A collective over all ranks.

    It takes some tenths of a second, and the memory of the largest unit and of one shard of it.
    Models of tiny units are not worth it.

    Raises:
        UnavailableError: on every rank, if they cannot read each other's memory.
    """
    sizes = _chosen(sizes)
    if not sizes:
        return None
    slab = map_slab(_shard_bytes(max(sizes), mesh), mesh)
    least = _tried_on(slab, sizes, mesh)
    slab.fence()
    torch.cuda.synchronize(mesh.device)
    del slab
    torch.cuda.empty_cache()
    return least


def _tried_on(slab: Slab, sizes: Sequence[int], mesh: Mesh) -> int | None:
    trial = _Trial(slab, max(sizes), mesh)
    costs = Costs(trial.elapsed, mesh)
    return tried(
        sizes,
        lambda size: costs.of(trial.collective(size)),
        lambda size: costs.of(trial.pull(size)),
    )


def _shard_bytes(size: int, mesh: Mesh) -> int:
    return aligned(size // mesh.shard.size)


class Costs:
    """What gathers cost, in which all ranks agree, from what each of them measures.

    Ranks that saw different costs would go on to try different sizes, and wait for each other.

    Args:
        elapsed: measures seconds of some gathers, one after another, and of some matrix products
            beside them; all ranks begin together.
        mesh: the ranks.
    """

    def __init__(
        self, elapsed: Callable[[Issue | None, int, int], tuple[float, float]], mesh: Mesh
    ) -> None:
        self._elapsed, self._agree = elapsed, Exchange(mesh, 2)
        alone = (self._slowest(None, 0, _PRODUCTS) for _ in range(_REPEATS))
        self._product_s = max(min(products_s for _, products_s in alone) / _PRODUCTS, 1e-6)

    def of(self, issue: Issue) -> Cost:
        """The cost for the slowest rank, in the best of some measurements."""
        self._slowest(issue, 1, 0)
        alone_s = self._slowest(issue, 2, 0)[0] / 2
        count = int(min(max(_TRIAL_S / max(alone_s, 1e-6), 2), _MOST_GATHERS))
        # More products than gathers, which go more slowly beside them.
        products = ceil(3 * count * alone_s / self._product_s)
        found = [self._slowest(issue, count, products) for _ in range(_REPEATS)]
        gather_s = min(gathers for gathers, _ in found) / count
        lost_s = min(computation for _, computation in found) - products * self._product_s
        return Cost(gather_s, max(lost_s, 0.0) / count)

    def _slowest(self, issue: Issue | None, count: int, products: int) -> tuple[float, float]:
        shown = self._agree([round(each * 1e9) for each in self._elapsed(issue, count, products)])
        gathers_s, products_s = (max(column) / 1e9 for column in zip(*shown, strict=True))
        return gathers_s, products_s


class _Trial:
    """Full memory to gather into, and matrices to multiply."""

    def __init__(self, slab: Slab, largest: int, mesh: Mesh) -> None:
        self._slab, self._mesh = slab, mesh
        self._meet = Exchange(mesh, 1)
        device, shape = mesh.device, (_SIDE, _SIDE)
        with on_all(mesh):
            nbytes = _shard_bytes(largest, mesh) * mesh.shard.size
            self._full = torch.empty(nbytes, dtype=torch.uint8, device=device)
            own = torch.Generator(device).manual_seed(0)  # the user's is not touched
            self._a = torch.randn(shape, device=device, dtype=torch.bfloat16, generator=own)
            self._out = torch.empty_like(self._a)
            # What the first product loads and allocates is not to be measured, and may not fit.
            torch.matmul(self._a, self._a, out=self._out)
            self.pull(largest)().wait()  # no rank waits for another here, if it fails
            torch.cuda.synchronize(device)
        self._side = torch.cuda.Stream(device)

    def collective(self, size: int) -> Issue:
        """An all-gather of a unit of so many bytes."""
        return self._gather(COLLECTIVE, _shard_bytes(size, self._mesh))

    def pull(self, size: int) -> Issue:
        """Reads of the other ranks' memory, for a unit of so many bytes."""
        nbytes = _shard_bytes(size, self._mesh)
        return self._gather(Pulled(self._slab, 0, nbytes, torch.uint8), nbytes)

    def _gather(self, transport: Transport, nbytes: int) -> Issue:
        axis = self._mesh.shard
        full, shard = self._full[: nbytes * axis.size], self._slab.rows[axis.rank][:nbytes]
        return lambda: transport.gather(full, shard, axis)

    def elapsed(self, issue: Issue | None, count: int, products: int) -> tuple[float, float]:
        """Seconds of some gathers, one after another, and of the matrix products beside them."""
        torch.cuda.synchronize(self._mesh.device)
        self._meet([0])  # all begin together
        main = torch.cuda.current_stream(self._mesh.device)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        torch.cuda._sleep(_PAUSE_CYCLES)  # pyright: ignore[reportPrivateUsage]
        self._side.wait_stream(main)
        with torch.cuda.stream(self._side):
            events[0].record()
            for _ in range(count):
                assert issue is not None, "there is something to count"
                issue().wait()
            events[1].record()
        events[2].record()
        for _ in range(products):
            torch.matmul(self._a, self._a, out=self._out)
        events[3].record()
        torch.cuda.synchronize(self._mesh.device)
        return events[0].elapsed_time(events[1]) / 1e3, events[2].elapsed_time(events[3]) / 1e3
