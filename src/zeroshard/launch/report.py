"""What this machine offers to a training job: versions, devices, limits, optional features.

Every line is found by a probe of its own, and a probe that fails says so in its line: the report
is wanted most where something is broken.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import psutil

from zeroshard.host import cgroup, cpus
from zeroshard.launch import cores, gpus

__all__ = ["Feature", "Report", "collect"]

_PACKAGES = [
    *["zeroshard", "torch", "triton", "numpy", "safetensors", "pydantic"],
    *["transformers", "accelerate", "datasets", "peft"],
    *["bitsandbytes", "torchao", "flash-attn"],
]
# What of the environment changes how ranks find each other or their devices.
_VARIABLES = ("CUDA_", "NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "OMP_", "MASTER_", "ZEROSHARD_")
_BF16_CAPABILITY = (8, 0)

Probe = Callable[[], object]


@dataclass(frozen=True)
class Feature:
    """Something optional, what it needs, and whether that is there."""

    name: str
    needs: str
    is_there: bool
    found: str


@dataclass(frozen=True)
class Report:
    """Sections of named facts, and the features they allow."""

    sections: Mapping[str, Mapping[str, str]]
    features: Sequence[Feature]


def collect() -> Report:
    """Find out everything; nothing here raises."""
    sections = {
        "versions": _versions(),
        "GPUs": dict(_rows(_gpu_probes)),
        "interconnect": dict(_rows(_link_probes)),
        "host": {name: _found(probe) for name, probe in _HOST.items()},
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)
        },
    }
    return Report(sections, [_feature(*row) for row in _FEATURES])


def _found(probe: Probe) -> str:
    """Return what a probe finds, or why it finds nothing."""
    try:
        return str(probe())
    except Exception as error:  # a broken installation fails in any way it likes
        return _why_not(error)


def _why_not(error: Exception) -> str:
    reason = (str(error).splitlines() or [""])[0]
    return f"unknown ({type(error).__name__}: {reason})"


def _rows(probes: Callable[[], Iterator[tuple[str, Probe]]]) -> Iterator[tuple[str, str]]:
    """Run probes whose number is itself found by looking."""
    try:
        for name, probe in probes():
            yield name, _found(probe)
    except Exception as error:  # as above
        yield "all", _why_not(error)


def _torch() -> ModuleType:
    import torch  # noqa: PLC0415 - it takes seconds, and may be what is broken

    return torch


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _versions() -> dict[str, str]:
    probes: dict[str, Probe] = {
        "python": lambda: f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform,
        **{package: (lambda name=package: _version(name)) for package in _PACKAGES},
        "deepspeed": _deepspeed,
        "CUDA of torch": lambda: _torch().version.cuda or "none (torch is built without)",
        "HIP of torch": lambda: _torch().version.hip or "none (torch is built without)",
        "cuDNN": lambda: _torch().backends.cudnn.version() or "none",
        "NCCL": _nccl,
        "NVIDIA driver": _driver,
    }
    return {name: _found(probe) for name, probe in probes.items()}


def _deepspeed() -> str:
    """Tell what answers to `import deepspeed`: zeroshard may be installed under that name."""
    version = _version("deepspeed")
    found = importlib.util.find_spec("deepspeed")
    if found is None or found.origin is None:
        return version
    folder = Path(found.origin).parent
    is_ours = (folder / "_names.py").is_file()
    whose = "zeroshard under this name" if is_ours else "DeepSpeed itself"
    if is_ours is not ("+zeroshard" in version):
        whose += ", mixed with another one: uninstall deepspeed until pip finds none"
    return f"{version} ({whose}, in {folder})"


def _nccl() -> str:
    torch = _torch()
    if not torch.distributed.is_nccl_available():
        return "none (torch is built without)"
    return ".".join(map(str, torch.cuda.nccl.version()))


def _driver() -> str:
    with gpus.management() as library:
        return "none" if library is None else library.driver()


def _num_gpus() -> int:
    torch = _torch()
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _gpu_probes() -> Iterator[tuple[str, Probe]]:
    visible = gpus.visible_gpus(os.environ)
    if not visible:
        yield "visible", lambda: "none"
    if len(visible) != _num_gpus():
        yield "usable", lambda: f"{_num_gpus()} of {len(visible)}: torch cannot use the others"
    for index in range(_num_gpus()):
        node = visible[index].node if index < len(visible) else None
        yield f"cuda:{index}", lambda index=index, node=node: _gpu(index, node)


def _gpu(index: int, node: int | None) -> str:
    cuda = _torch().cuda
    properties = cuda.get_device_properties(index)
    free_bytes, total_bytes = cuda.mem_get_info(index)
    where = "" if node is None else f", NUMA node {node}"
    return (
        f"{properties.name}, {_size(total_bytes)} ({_size(free_bytes)} free), capability "
        f"{properties.major}.{properties.minor}{where}"
    )


def _link_probes() -> Iterator[tuple[str, Probe]]:
    yield "InfiniBand", lambda: ", ".join(_names("/sys/class/infiniband")) or "none"
    yield "networks", lambda: ", ".join(_networks()) or "none"
    for one in range(_num_gpus()):
        others = [other for other in range(_num_gpus()) if other != one]
        if others:
            yield f"cuda:{one}", lambda one=one, others=others: _links(one, others)


def _links(one: int, others: Sequence[int]) -> str:
    """Tell by which way a GPU reaches each of the others."""
    physical = [index for _, index in _physical()]
    by_way: dict[str, list[str]] = {}
    with gpus.management() as library:
        for other in others:
            if library is not None and library.are_linked(physical[one], physical[other]):
                way = "NVLink"
            elif _torch().cuda.can_device_access_peer(one, other):
                way = "peer access over PCIe"
            else:
                way = "host memory"
            by_way.setdefault(way, []).append(f"cuda:{other}")
    return "; ".join(f"{way} to {', '.join(names)}" for way, names in by_way.items())


def _physical() -> list[tuple[str, int]]:
    with gpus.management() as library:
        if library is None:
            return [(str(index), index) for index in range(_num_gpus())]
        return gpus.select(os.environ.get(gpus.VISIBLE), library.uuids())


def _names(folder: str) -> list[str]:
    return sorted(child.name for child in Path(folder).iterdir()) if Path(folder).is_dir() else []


def _networks() -> list[str]:
    return [
        f"{name} ({state.speed} Mb/s)" if state.speed else name
        for name, state in sorted(psutil.net_if_stats().items())
        if state.isup
    ]


def _cpus() -> str:
    described = cores.read_cores(cpus.allowed_cpus())
    nodes = sorted({core.node for core in described})
    return (
        f"{len(cpus.allowed_cpus())} of {psutil.cpu_count()} may be used: {len(described)} cores "
        f"on {len(nodes)} NUMA {'node' if len(nodes) == 1 else 'nodes'}"
    )


def _cpu_limit() -> str:
    limit = cgroup.of_this_process().cpu_limit()
    return "none" if limit is None else f"{limit:g} CPUs"


def _memory() -> str:
    memory = psutil.virtual_memory()
    return f"{_size(memory.total)} ({_size(memory.available)} available)"


def _memory_limit() -> str:
    limit = cgroup.of_this_process().memory_limit_bytes()
    return "none" if limit is None else _size(limit)


def _locked_memory() -> str:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return "unlimited" if limit == resource.RLIM_INFINITY else _size(limit)


def _disk(folder: str) -> str:
    usage = shutil.disk_usage(folder)
    return f"{_size(usage.total)} ({_size(usage.free)} free)"


def _direct_io() -> str:
    """Write one block past the page cache, in the folder where a job would start."""
    descriptor, name = tempfile.mkstemp(prefix=".zeroshard-", dir=Path.cwd())
    os.close(descriptor)
    try:
        descriptor = os.open(name, os.O_WRONLY | os.O_DIRECT)
        os.close(descriptor)
    except OSError as error:
        return f"no ({error.strerror})"
    finally:
        Path(name).unlink()
    return "yes"


_HOST: Mapping[str, Probe] = {
    "CPUs": _cpus,
    "CPU limit": _cpu_limit,
    "memory": _memory,
    "memory limit": _memory_limit,
    "locked memory (ulimit -l)": _locked_memory,
    "/dev/shm": lambda: _disk("/dev/shm"),
    "disk here": lambda: _disk("."),
    "direct I/O here": _direct_io,
}


def _feature(name: str, needs: str, probe: Callable[[], tuple[bool, str]]) -> Feature:
    try:
        is_there, found = probe()
    except Exception as error:  # as in _found
        is_there, found = False, _why_not(error)
    return Feature(name, needs, is_there, found)


def _package(*names: str) -> Callable[[], tuple[bool, str]]:
    """Probe for one of several packages."""

    def probe() -> tuple[bool, str]:
        found = [f"{name} {_version(name)}" for name in names if _is_installed(name)]
        return bool(found), ", ".join(found) or "not installed"

    return probe


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package.replace("-", "_")) is not None


def _nccl_ranks() -> tuple[bool, str]:
    count = _num_gpus()
    return count > 1 and _torch().distributed.is_nccl_available(), f"{count} GPUs, NCCL {_nccl()}"


def _gloo_ranks() -> tuple[bool, str]:
    available = _torch().distributed.is_gloo_available()
    return available, "gloo" if available else "torch is built without gloo"


def _bf16() -> tuple[bool, str]:
    cuda = _torch().cuda
    capabilities = [cuda.get_device_capability(index) for index in range(_num_gpus())]
    if not capabilities:
        return True, "CPU"
    least = min(capabilities)
    return least >= _BF16_CAPABILITY, f"capability {least[0]}.{least[1]}"


def _fp16() -> tuple[bool, str]:
    count = _num_gpus()
    return True, f"{count} GPUs" if count else "CPU"


def _compile() -> tuple[bool, str]:
    if _num_gpus():
        return _package("triton")()
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    return compiler is not None, compiler or "no C++ compiler"


def _muon() -> tuple[bool, str]:
    torch = _torch()
    return hasattr(torch.optim, "Muon"), f"torch {torch.__version__}"


def _nvme() -> tuple[bool, str]:
    # Where direct I/O is refused, files are read and written through the page cache.
    return hasattr(os, "posix_fallocate"), f"direct I/O here: {_direct_io()}"


def _binding() -> tuple[bool, str]:
    available = hasattr(os, "sched_setaffinity")
    return available, "sched_setaffinity" if available else "this system has none"


_FEATURES: Sequence[tuple[str, str, Callable[[], tuple[bool, str]]]] = (
    ("ranks on several GPUs", "2 GPUs or more, NCCL", _nccl_ranks),
    ("ranks on the CPU", "gloo", _gloo_ranks),
    ("bf16", "GPUs of capability 8.0, or the CPU", _bf16),
    ("fp16 with a loss scale", "GPUs, or the CPU", _fp16),
    ("torch.compile", "triton on GPUs, a C++ compiler on the CPU", _compile),
    ("Muon", "torch.optim.Muon (torch 2.9)", _muon),
    ("8-bit optimizers", "bitsandbytes or torchao", _package("bitsandbytes", "torchao")),
    ("offload to NVMe", "Linux; direct I/O is faster", _nvme),
    ("safetensors files", "safetensors", _package("safetensors")),
    ("Hugging Face models", "transformers", _package("transformers")),
    ("LoRA adapters", "peft", _package("peft")),
    ("core binding", "Linux", _binding),
)


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} TiB"
