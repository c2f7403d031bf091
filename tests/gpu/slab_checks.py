"""Checks of page-locked host memory on one GPU, one JSON object per check; on a CPU, what is left.

python tests/gpu/slab_checks.py [--gib 4]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zeroshard.core.numa import near
from zeroshard.core.slab import CudaPinner, HostDepot

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
MIB, GIB = 1 << 20, 1 << 30


def check_copies() -> dict[str, Any]:
    """Every tensor is pinned, alone in its memory, and copied asynchronously both ways."""
    depot = HostDepot(DEVICE, pin=True, name="checks", largest_slab_bytes=64 * MIB)
    tensors = [depot.take(numel, torch.float32) for numel in (1, 1000, 3 * MIB + 5, 40 * MIB, 7)]
    depot.seal()
    tensors += [depot.take(numel, torch.bfloat16) for numel in (5, 10 * MIB)]
    depot.seal()
    sources = [torch.randn(each.numel(), device=DEVICE).to(each.dtype) for each in tensors]
    for tensor, source in zip(tensors, sources, strict=True):
        assert tensor.is_pinned() == ON_GPU
        assert tensor[-1:].is_pinned() == ON_GPU
        tensor.copy_(source, non_blocking=True)
    if ON_GPU:
        torch.cuda.synchronize()
    for tensor, source in zip(tensors, sources, strict=True):
        assert torch.equal(tensor.to(DEVICE, non_blocking=True), source)
    beside = depot.locked_bytes - depot.nbytes
    assert not ON_GPU or 0 <= beside < 0.02 * depot.nbytes
    depot.give_back(tensors[3])
    assert not tensors[3].is_pinned()
    assert tensors[2].is_pinned() == ON_GPU
    depot.close()
    assert not any(tensor.is_pinned() for tensor in tensors)
    return {"beside": beside}


def check_refusal() -> dict[str, Any]:
    """What CUDA refuses is told with its words, and troubles no kernel that is launched later."""
    if not ON_GPU:
        return {}
    depot = HostDepot(DEVICE, pin=True, name="checks")
    tensor = depot.take(MIB, torch.float32)
    depot.seal()
    reason = CudaPinner(DEVICE).lock(tensor.data_ptr(), 4096)
    assert reason is not None
    assert torch.ones(3, device=DEVICE).sum().item() == 3
    depot.close()
    return {"reason": reason, "again": CudaPinner(DEVICE).unlock(tensor.data_ptr())}


def check_children() -> dict[str, Any]:
    """A forked process ends well, and the memory stays what it was and pinned."""
    depot = HostDepot(DEVICE, pin=True, name="checks")
    tensors = [depot.take(MIB, torch.float32).fill_(2)]
    depot.seal()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            depot.close()
            tensors.clear()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert tensors[0].is_pinned() == ON_GPU
    assert tensors[0].to(DEVICE).eq(2).all()
    depot.close()
    return {}


def rate(target: Tensor, source: Tensor) -> float:
    """GB/s of a copy, and proof that the host did not wait for it."""
    target.copy_(source, non_blocking=True)
    if not ON_GPU:
        return 0.0
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    target.copy_(source, non_blocking=True)
    end.record()
    assert not end.query(), "the host waited for the copy"
    torch.cuda.synchronize()
    return round(source.nbytes / begin.elapsed_time(end) / 1e6, 1)


def check_rates(nbytes: int) -> dict[str, Any]:
    """How long page-locking takes, and how fast copies are then."""
    found: dict[str, Any] = {"near": [len(near(DEVICE).cpus), near(DEVICE).node]}
    for name, numel in (("in slabs", nbytes // 64), ("one tensor", nbytes // 4)):
        depot = HostDepot(DEVICE, pin=True, name="checks", largest_slab_bytes=max(GIB, nbytes // 8))
        tensors = [depot.take(numel, torch.float32) for _ in range(nbytes // 4 // numel)]
        begin = time.perf_counter()
        depot.seal()
        found[f"{name}: s per GiB"] = round((time.perf_counter() - begin) / nbytes * GIB, 4)
        host = tensors[-1]
        device = torch.empty(numel, device=DEVICE)
        found[f"{name}: D2H GB/s"] = rate(host, device)
        found[f"{name}: H2D GB/s"] = rate(device, host)
        begin = time.perf_counter()
        depot.close()
        seconds = time.perf_counter() - begin
        found[f"{name}: s per GiB to unlock"] = round(seconds / nbytes * GIB, 4)
        del tensors, host, device, depot
    return found


def main() -> int:
    """Run the checks; say how each went."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gib", type=float, default=4.0, help="host memory to measure with")
    args = parser.parse_args()
    checks: dict[str, Callable[[], dict[str, Any]]] = {
        "copies": check_copies,
        "refusal": check_refusal,
        "children": check_children,
        "rates": lambda: check_rates(int(args.gib * GIB)),
    }
    is_ok = True
    for name, check in checks.items():
        try:
            line = {"check": name, "ok": True, **check()}
        except Exception as error:
            line = {"check": name, "ok": False, "error": f"{error}"[:2000]}
            line["at"] = traceback.format_exc()[-1500:]
        is_ok = is_ok and line["ok"]
        print(json.dumps(line), flush=True)
    return 0 if is_ok else 1


if __name__ == "__main__":
    sys.exit(main())
