"""How fast full parameters and averaged gradients come about, alone and beside matrix products.

    zeroshard --num_gpus 4 benchmarks/gathers.py [--largest 512] [--only gather|reduce]

For units of 1 to 512 MiB (bf16, full) it times all-gathers by NCCL, with kernels and with copy
engines; reads of the shards in other ranks' memory (pulls), on one stream, on two and in one call,
with and without the rank's own shard; writes into the other ranks' memory (pushes);
reduce-scatters; and reductions that read the other ranks' gradients, in fp32 sums, by copies first
or directly by so many blocks of threads. Of each it tells

* the rate: bytes received from other ranks per time, alone and beside matrix products;
* the tax: of the time that it runs beside matrix products, the part by which those take longer;
* the host's time to issue one.

Every variant is checked once for right values. One that fails is reported, and the others go on;
one that hangs ends the run after a minute, with what has been printed so far. No multicast is used.
On CPU ranks there are gloo and shared memory, at toy size, alone. Prints a table and, with --out, a
JSON line for each cell.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ["NCCL_NVLS_ENABLE"] = "0"
os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
os.environ["ZEROSHARD_TIMEOUT"] = "1"  # minute

import torch
import torch.distributed as dist
from torch import Tensor

import zeroshard
from zeroshard.core.collectives import all_gather
from zeroshard.core.layout import Layout
from zeroshard.core.mesh import Axis, Mesh, build_mesh
from zeroshard.core.pulled import BatchedCopies, Copier, Slab, StreamCopies, map_slab
from zeroshard.core.reductions import PulledReduction, Ring, map_slots

MIB = 1 << 20
SIZES_MIB = (1, 4, 16, 64, 128, 256, 512)
TARGET_S = 0.012  # how long the repetitions of one timing last
GEMM_S = 0.018  # and the matrix products beside them
PAUSE_CYCLES = 40_000_000  # both wait about 20 ms until all of that has been issued
MOST_REPETITIONS = 60  # CUDA queues about 1000 launches, and lets the host wait after that
DTYPE = torch.bfloat16

# torch 2.13 renamed it; older versions know only the second name.
reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Issue = Callable[[], Any]
"""Starts one operation on the current stream, and makes that stream wait for its end."""


@dataclass(frozen=True)
class Variant:
    """An operation on one size."""

    name: str
    issue: Issue
    check: Callable[[], bool]
    nbytes: int
    """Received from other ranks."""


class Bench:
    """The ranks, the memory that they share, and the matrix products."""

    def __init__(self, mesh: Mesh, largest: int, only: str) -> None:
        self.mesh, self.only = mesh, only
        self.rank, self.world, self.device = mesh.rank, mesh.world, mesh.device
        self.on_gpu = self.device.type == "cuda"
        self.groups: dict[str, Any] = {"nccl" if self.on_gpu else "gloo": mesh.shard.gather}
        self.slab: Slab | None = None
        self.turns: Slab | None = None
        self.problems: dict[str, str] = {}
        self.host_s = 0.0  # to issue one, in the last timing
        with self.reported("slab"):
            # Full buffers first, of which the shards are a part too: a push writes the one, a pull
            # reads the other.
            self.slab = map_slab(largest + largest // self.world, mesh)
        if only != "gather":
            with self.reported("slab of reductions"):
                self.turns = map_slots(2 * largest, mesh)  # up to fp32
        if self.on_gpu:
            self.a = torch.randn(8192, 8192, device=self.device, dtype=DTYPE)
            self.b, self.c = torch.randn_like(self.a), torch.empty_like(self.a)
            self.side = torch.cuda.Stream(self.device)
            for _ in range(3):
                self.gemm()
            self.num_gemms = max(1, round(GEMM_S / self.timed_gemms(10) * 10))
            self.gemms_s = self.timed_gemms(self.num_gemms)

    def reported(self, name: str) -> Any:
        return _Reported(self, name)

    # Matrix products

    def gemm(self) -> None:
        torch.matmul(self.a, self.b, out=self.c)

    def timed_gemms(self, count: int) -> float:
        self.meet()
        torch.cuda._sleep(PAUSE_CYCLES)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            self.gemm()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def meet(self) -> None:
        self.synchronize()
        dist.barrier(group=self.mesh.control)

    # Timing

    def try_out(self, key: str, make: Callable[[], Variant]) -> dict[str, Any]:
        """Make and measure a variant, if it works on all ranks; else nothing."""
        variant, is_right = None, False
        with self.reported(key):
            made = make()
            for _ in range(2):
                made.issue()
            self.synchronize()
            variant = made
        if self.slowest(variant is None) or variant is None:
            return {}
        with self.reported(key):
            is_right = variant.check()
        found = {"right": not self.slowest(not is_right)}
        with self.reported(key):
            found |= self.measure(variant)
        return found

    def measure(self, variant: Variant) -> dict[str, Any]:
        """Times of one variant: the slowest rank's."""
        guess = self.slowest(self.repeat(variant, 3) / 3)
        count = int(min(max(TARGET_S / guess, 3), MOST_REPETITIONS))
        alone = self.slowest(self.repeat(variant, count) / count)
        found = {
            "ms": alone * 1e3,
            "rate_gb_s": variant.nbytes / alone / 1e9,
            "host_us": self.host_s * 1e6,
        }
        if self.on_gpu:
            together, gemms = self.beside_gemms(variant, count)
            under = self.slowest(together / count)
            lost = (gemms - self.gemms_s) / min(together, gemms)
            found |= {"rate_under_gemm_gb_s": variant.nbytes / under / 1e9, "tax": lost}
        return found

    def slowest(self, value: float) -> float:
        found = torch.tensor(float(value), dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.mesh.control)
        return found.item()

    def repeat(self, variant: Variant, count: int) -> float:
        """Seconds of some repetitions, one after another, issued before the first starts."""
        self.meet()
        if not self.on_gpu:
            started = time.perf_counter()
            for _ in range(count):
                variant.issue()
            total = time.perf_counter() - started
            self.host_s = total / count
            return total
        with torch.cuda.stream(self.side):
            torch.cuda._sleep(PAUSE_CYCLES)
            return self._timed(variant, count)()

    def _timed(self, variant: Variant, count: int) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        issuing = time.perf_counter()
        for _ in range(count):
            variant.issue()
        self.host_s = (time.perf_counter() - issuing) / count
        end.record()

        def seconds() -> float:
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1e3

        return seconds

    def beside_gemms(self, variant: Variant, count: int) -> tuple[float, float]:
        """Seconds of the repetitions, and of the matrix products that run meanwhile."""
        self.meet()
        main = torch.cuda.current_stream()
        torch.cuda._sleep(PAUSE_CYCLES)
        self.side.wait_stream(main)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.side):
            seconds = self._timed(variant, count)
        start.record()
        for _ in range(self.num_gemms):
            self.gemm()
        end.record()
        together = seconds()
        return together, start.elapsed_time(end) / 1e3

    # Variants

    def plan(self, sizes: Sequence[int]) -> Iterator[tuple[int, str, Callable[[], Variant]]]:
        """All sizes and variants, last those that might hang and so end the run."""
        for last in (False, True):
            if last and self.on_gpu and self.only != "reduce":
                with self.reported("nccl zero-CTA"):
                    self.add_zero_cta()
            for size in sizes:
                for name, make in self.variants(size):
                    if last == any(word in name for word in ("zero-CTA", "pulled", "symm_mem")):
                        yield size, name, make

    def variants(self, size: int) -> Iterator[tuple[str, Callable[[], Variant]]]:
        """Makers of the variants for full units of ``size`` bytes."""
        if self.only != "reduce":
            yield from self.gathers(size)
        if self.only != "gather":
            yield from self.reductions(size)

    def gathers(self, size: int) -> Iterator[tuple[str, Callable[[], Variant]]]:
        for name in list(self.groups):
            if name == "nccl zero-CTA":
                yield name, lambda: self.zero_cta(size)
            else:
                yield name, lambda name=name: self.collective(size, name, in_place=False)
                yield f"{name} in place", lambda n=name: self.collective(size, n, in_place=True)
        if self.slab is None:
            return
        copiers: list[tuple[str, Callable[[], Copier]]] = [("", lambda: self.slab.copy)]
        if self.on_gpu:
            copiers = [
                (", 1 stream", lambda: StreamCopies(self.device, 1)),
                (", 2 streams", lambda: StreamCopies(self.device, 2)),
                (", one call", lambda: BatchedCopies(self.device)),
            ]
        for how, make in copiers:
            for own in ("", " without own"):
                yield (
                    f"pull{how}{own}",
                    lambda make=make, own=own: self.pull(size, make(), with_own=not own),
                )
            yield f"push{how}", lambda make=make: self.push(size, make())
        if self.on_gpu:
            yield "symm_mem low contention", lambda: self.low_contention_gather(size)

    def tensors(self, size: int) -> tuple[Tensor, Tensor]:
        """A full buffer, and a shard of this rank's number plus one."""
        full = torch.zeros(size // DTYPE.itemsize, dtype=DTYPE, device=self.device)
        return full, torch.full_like(full[: full.numel() // self.world], self.rank + 1)

    def is_gathered(self, full: Tensor, without: int | None = None) -> bool:
        rows = full.view(self.world, -1)
        ranks = [rank for rank in range(self.world) if rank != without]
        return all(bool((rows[rank] == rank + 1).all()) for rank in ranks)

    def received(self, size: int) -> int:
        return size // self.world * (self.world - 1)

    def axis(self, name: str) -> Axis:
        return Axis(self.world, self.rank, self.groups[name])

    def collective(self, size: int, name: str, *, in_place: bool) -> Variant:
        full, shard = self.tensors(size)
        if in_place:
            mine = full.view(self.world, -1)[self.rank]
            shard = mine.copy_(shard)
        axis = self.axis(name)

        def issue() -> None:
            all_gather(full, shard, axis).wait()

        return Variant(name, issue, lambda: self.is_gathered(full), self.received(size))

    def zero_cta(self, size: int) -> Variant:
        group = self.groups["nccl zero-CTA"]
        backend = group._get_backend(self.device)
        pool = torch.cuda.MemPool(backend.mem_allocator)
        with torch.cuda.use_mem_pool(pool):
            full = torch.zeros(size // DTYPE.itemsize, dtype=DTYPE, device=self.device)
        try:
            backend.register_mem_pool(pool, symm=True)
        except TypeError:
            backend.register_mem_pool(pool, True)
        shard = full.view(self.world, -1)[self.rank].fill_(self.rank + 1)
        axis = self.axis("nccl zero-CTA")

        def issue() -> Any:
            all_gather(full, shard, axis).wait()
            return pool  # lives as long as the variant

        return Variant("", issue, lambda: self.is_gathered(full), self.received(size))

    def rows(self, size: int) -> list[Tensor]:
        """The first bytes of every rank's slab."""
        assert self.slab is not None
        return [row[:size].view(DTYPE) for row in self.slab.rows]

    def pull(self, size: int, copy: Copier, *, with_own: bool) -> Variant:
        full, shard = self.tensors(size)
        shards = self.rows(size // self.world)
        shards[self.rank].copy_(shard)
        self.meet()
        parts = full.view(self.world, -1)
        ranks = [*self.mesh.shard.others, *([self.rank] if with_own else [])]
        copies = [(parts[rank], shards[rank]) for rank in ranks]

        def check() -> bool:
            return self.is_gathered(full, without=None if with_own else self.rank)

        return Variant("", lambda: copy(copies).wait(), check, self.received(size))

    def push(self, size: int, copy: Copier) -> Variant:
        _, shard = self.tensors(size)
        fulls = self.rows(size)
        fulls[self.rank].zero_()
        self.meet()
        parts = [fulls[rank].view(self.world, -1)[self.rank] for rank in self.mesh.shard.others]
        copies = [(part, shard) for part in parts]

        def check() -> bool:
            return self.is_gathered(fulls[self.rank], without=self.rank)

        return Variant("", lambda: copy(copies).wait(), check, self.received(size))

    def low_contention_gather(self, size: int) -> Variant:
        shard = self.rows(size // self.world)[self.rank].fill_(self.rank + 1)
        name, results = self.mesh.shard.gather.group_name, []

        def issue() -> None:
            out = torch.ops.symm_mem._low_contention_all_gather(shard, name)
            results[:] = [torch.ops._c10d_functional.wait_tensor(out)]

        self.meet()
        return Variant("", issue, lambda: self.is_gathered(results[0]), self.received(size))

    def reductions(self, size: int) -> Iterator[tuple[str, Callable[[], Variant]]]:
        name = "nccl" if self.on_gpu else "gloo"
        for dtype in (torch.bfloat16, torch.float32):
            text = str(dtype).removeprefix("torch.")
            yield f"reduce {name} {text}", lambda dtype=dtype: self.reduce(size, dtype)
        for name, make in self.rings():
            for dtype in (torch.bfloat16, torch.float32):
                text = str(dtype).removeprefix("torch.")
                yield (
                    f"reduce pulled, {name}, {text}",
                    lambda make=make, dtype=dtype: self.reduce_pulled(size, dtype, make()),
                )
        if not self.on_gpu:
            return
        yield "reduce nccl bfloat16, sum", lambda: self.reduce(size, DTYPE, dist.ReduceOp.SUM)
        yield "reduce symm_mem low contention", lambda: self.reduce_low_contention(size)
        yield "reduce symm_mem reduce_scatter", lambda: self.reduce_scatter_out(size)
        yield "reduce symm_mem two-shot", lambda: self.two_shot(size)
        if size <= 64 * MIB:
            yield "reduce symm_mem one-shot", lambda: self.one_shot(size)

    def reduce(self, size: int, dtype: torch.dtype, op: Any = None) -> Variant:
        """``size`` is that of the unit in bf16; in fp32 twice as much is sent."""
        op = op or (dist.ReduceOp.AVG if self.on_gpu else dist.ReduceOp.SUM)
        full = torch.full((size // DTYPE.itemsize,), 1, dtype=dtype, device=self.device)
        out = torch.empty_like(full[: full.numel() // self.world])
        group, want = self.mesh.shard.reduce, 1 if op == dist.ReduceOp.AVG else self.world

        def issue() -> None:
            reduce_scatter(out, full, op=op, group=group, async_op=True).wait()

        return Variant("", issue, lambda: bool((out == want).all()), self.received(full.nbytes))

    def rings(self) -> Iterator[tuple[str, Callable[[], Ring]]]:
        """The ways to read the other ranks' gradients."""
        slab = self.turns
        if slab is None:
            return
        yield "copy engines", lambda: Ring(slab, self.mesh, slab.copy)
        if not self.on_gpu:
            yield "direct", lambda: Ring(slab, self.mesh)
            return
        yield "2 streams", lambda: Ring(slab, self.mesh, StreamCopies(self.device, 2))
        for number in (16, 32, 64):
            yield f"direct {number}", lambda n=number: Ring(slab, self.mesh, num_programs=n)

    def reduce_pulled(self, size: int, dtype: torch.dtype, ring: Ring) -> Variant:
        """Without the copy of gradients into the ring. ``size`` as in `reduce`."""
        layout = Layout(numels=(size // DTYPE.itemsize,), world=self.world)
        shape = torch.Size([layout.full_numel])
        reducer = PulledReduction(ring, layout, [shape], dtype)
        for slot in range(2):
            ring.own(slot, layout.full_numel, dtype).fill_(self.rank + 1)
        out = torch.empty(layout.shard_numel, device=self.device)
        self.meet()

        def issue() -> None:
            reducer.start(out, reducer.room().tensor).wait()

        def check() -> bool:
            return bool((out == (self.world + 1) / 2).all())

        nbytes = self.received(layout.full_numel * dtype.itemsize)
        return Variant("", issue, check, nbytes)

    def symmetric_ones(self, size: int) -> tuple[Tensor, str]:
        ones = self.rows(size)[self.rank].fill_(1)
        self.meet()
        return ones, self.mesh.shard.gather.group_name

    def reduce_low_contention(self, size: int) -> Variant:
        full, name = self.symmetric_ones(size)
        results: list[Tensor] = []

        def issue() -> None:
            out = torch.ops.symm_mem._low_contention_reduce_scatter(full, "sum", name)
            results[:] = [torch.ops._c10d_functional.wait_tensor(out)]

        def check() -> bool:
            return bool((results[0] == self.world).all())

        return Variant("", issue, check, self.received(size))

    def reduce_scatter_out(self, size: int) -> Variant:
        full, name = self.symmetric_ones(size)
        out = torch.empty_like(full[: full.numel() // self.world])

        def issue() -> None:
            torch.ops.symm_mem.reduce_scatter_out(full, name, False, out)

        return Variant("", issue, lambda: bool((out == self.world).all()), self.received(size))

    def two_shot(self, size: int) -> Variant:
        """In place, so ones grow with each; the time does not depend on that."""
        full, name = self.symmetric_ones(size)

        def issue() -> None:
            torch.ops.symm_mem.two_shot_all_reduce_(full, "sum", name)

        return Variant("", issue, lambda: True, self.received(size))

    def one_shot(self, size: int) -> Variant:
        full, name = self.symmetric_ones(size)
        results: list[Tensor] = []

        def issue() -> None:
            results[:] = [torch.ops.symm_mem.one_shot_all_reduce(full, "sum", name)]

        def check() -> bool:
            return bool((results[0] == self.world).all())

        return Variant("", issue, check, self.received(size))

    def add_zero_cta(self) -> None:
        """A communicator whose gathers use copy engines, if this NCCL has them."""
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options.config.cta_policy = dist.ProcessGroupNCCL.NCCL_CTA_POLICY_ZERO
        ranks, patience = list(range(self.world)), timedelta(seconds=60)
        group = dist.new_group(ranks, timeout=patience, backend="nccl", pg_options=options)
        dist.barrier(group=group, device_ids=[self.device.index])
        self.groups["nccl zero-CTA"] = group


def even(nbytes: int, mesh: Mesh) -> int:
    """So many bytes, or a few more that divide evenly into aligned shards."""
    return -(-nbytes // (512 * mesh.world)) * 512 * mesh.world


class _Reported:
    """Around a part that may fail on this machine: the failure is told, and all go on."""

    def __init__(self, bench: Bench, name: str) -> None:
        self._bench, self._name = bench, name

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if isinstance(error, Exception):
            self._bench.problems[self._name] = f"{type(error).__name__}: {error}"[:300]
        return isinstance(error, Exception)


COLUMNS = ("rate_gb_s", "rate_under_gemm_gb_s", "tax", "ms", "host_us", "right")
HEADS = ("GB/s", "GB/s beside", "tax", "ms", "host us", "right")


def run(bench: Bench, sizes: Sequence[int], out: Path | None) -> None:
    """Measure every variant at every size; rank 0 prints as it goes."""
    about = {
        "world": bench.world,
        "device": torch.cuda.get_device_name() if bench.on_gpu else platform.processor() or "CPU",
        "torch": torch.__version__,
        "gemm_tflops": 2 * 8192**3 * bench.num_gemms / bench.gemms_s / 1e12 if bench.on_gpu else 0,
    }
    if bench.rank == 0:
        print(json.dumps(about))
        print(f"{'MiB':>5} {'variant':<38}" + "".join(f"{head:>14}" for head in HEADS))
    for size, name, make in bench.plan(sizes):
        key = f"{name}, {size / MIB:.4g} MiB"
        found = bench.try_out(key, make)
        if bench.rank == 0:
            show(size, name, found or {"failed": bench.problems.get(key)})
            if out is not None:
                line = {**about, "size": size, "variant": name, **found}
                with out.open("a") as lines:
                    lines.write(json.dumps(line | {"failed": bench.problems.get(key)}) + "\n")
    if bench.rank == 0:
        print(json.dumps({"problems": bench.problems}))


def show(size: int, name: str, found: dict[str, Any]) -> None:
    """Print a row of the table."""
    text = f"{size / MIB:>5.4g} {name:<38}"
    if "failed" in found:
        print(text, "failed:", found["failed"], flush=True)
        return
    for column in COLUMNS:
        value = found.get(column, "")
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        text += f"{shown:>14}"
    print(text, flush=True)


def main() -> None:
    """Measure on all ranks of the launcher."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--largest", type=int, help="MiB; 512 on GPUs, 4 on CPUs")
    parser.add_argument("--only", choices=("gather", "reduce"), default="")
    parser.add_argument("--out", type=Path, help="a file to which JSON lines are appended")
    args = parser.parse_args()
    zeroshard.init_distributed(timeout=timedelta(seconds=60))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    largest = args.largest or (512 if on_gpu else 4)
    mesh = build_mesh(dist.get_world_size(), device, timeout=timedelta(seconds=60))
    bench = Bench(mesh, even(largest * MIB, mesh), args.only)
    run(bench, [even(size * MIB, mesh) for size in SIZES_MIB if size <= largest], args.out)
    bench.slab = bench.turns = None
    mesh.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
