"""Which GPUs the ranks will see, found without importing torch.

Importing torch takes seconds, and the launcher is what a user meets first. NVIDIA's management
library answers in milliseconds and is what torch itself asks first. Where it cannot tell (another
vendor's GPUs, slices of one GPU), torch is asked after all, in a process of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import re
import runpy
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from zeroshard.errors import UsageError, compose
from zeroshard.host.cpus import numa_node

__all__ = ["VISIBLE", "Gpu", "Management", "management", "select", "visible_gpus"]

VISIBLE = "CUDA_VISIBLE_DEVICES"
# No process can use a GPU without one of these: NVIDIA, AMD, NVIDIA under Windows, Jetson.
_DEVICE_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/nvhost-gpu")
_COUNT = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
_NVLINK = 2  # NVML_P2P_CAPS_INDEX_NVLINK


@dataclass(frozen=True)
class Gpu:
    """A visible GPU: its name in CUDA_VISIBLE_DEVICES, and the NUMA node it hangs on, if known."""

    name: str
    node: int | None = None


def visible_gpus(env: Mapping[str, str]) -> tuple[Gpu, ...]:
    """Return the GPUs that torch would find in processes with this environment.

    Raises:
        UsageError: CUDA_VISIBLE_DEVICES names a GPU that is not there.
    """
    names = env.get(VISIBLE)
    if names == "" or not any(Path(file).exists() for file in _DEVICE_FILES):
        return ()
    if not _torch_uses_gpus():
        return ()
    with management() as library:
        if library is None or "MIG-" in (names or "") or library.any_is_split():
            return _ask_torch(env)
        buses = library.buses()
        return tuple(
            Gpu(name, numa_node(buses[index])) for name, index in select(names, library.uuids())
        )


def select(names: str | None, uuids: Sequence[str]) -> list[tuple[str, int]]:
    """Read CUDA_VISIBLE_DEVICES as CUDA does: each name in it, and the index of the GPU it means.

    A negative number or a word such as NoDevFiles hides what follows it, which is how GPUs are
    hidden on purpose. What CUDA would also drop silently, a number or UUID without a GPU, raises.
    """
    if names is None:
        return [(str(index), index) for index in range(len(uuids))]
    found: list[tuple[str, int]] = []
    for name in (part.strip() for part in names.split(",")):
        if re.fullmatch(r"\d+", name):
            matches = [int(name)] if int(name) < len(uuids) else []
        elif name.startswith("GPU-"):
            matches = [index for index, uuid in enumerate(uuids) if uuid.startswith(name)]
        else:
            break
        if len(matches) != 1:
            raise UsageError(
                compose(
                    f"{VISIBLE}={names} names GPU {name}, but this host has {len(uuids)} GPUs and "
                    f"{'none' if not matches else 'more than one'} of that name.",
                    hint="`nvidia-smi -L` lists them.",
                )
            )
        if matches[0] in [index for _, index in found]:
            raise UsageError(
                compose(
                    f"{VISIBLE}={names} names GPU {matches[0]} twice, so CUDA would see none.",
                    hint="name each GPU once.",
                )
            )
        found.append((name, matches[0]))
    return found


class _PciInfo(ctypes.Structure):
    """nvmlPciInfo_t."""

    _fields_ = (
        ("busIdLegacy", ctypes.c_char * 16),
        ("domain", ctypes.c_uint),
        ("bus", ctypes.c_uint),
        ("device", ctypes.c_uint),
        ("pciDeviceId", ctypes.c_uint),
        ("pciSubSystemId", ctypes.c_uint),
        ("busId", ctypes.c_char * 32),
    )


class Management:
    """NVIDIA's management library (NVML), as much of it as is asked here."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._handles = [self._handle(index) for index in range(self._count())]

    def uuids(self) -> list[str]:
        """Return the UUID of every GPU of this host."""
        text = ctypes.create_string_buffer(96)
        found: list[str] = []
        for handle in self._handles:
            self._call("nvmlDeviceGetUUID", handle, text, ctypes.c_uint(len(text)))
            found.append(text.value.decode())
        return found

    def buses(self) -> list[str]:
        """Return the PCI address of every GPU of this host."""
        info = _PciInfo()
        found: list[str] = []
        for handle in self._handles:
            self._call("nvmlDeviceGetPciInfo_v3", handle, ctypes.byref(info))
            found.append(info.busId.decode())
        return found

    def any_is_split(self) -> bool:
        """Tell whether a GPU is split into instances (MIG), which are counted in another way."""
        current, pending = ctypes.c_uint(), ctypes.c_uint()
        for handle in self._handles:
            # GPUs that cannot be split refuse the question.
            with contextlib.suppress(OSError):
                self._call(
                    "nvmlDeviceGetMigMode", handle, ctypes.byref(current), ctypes.byref(pending)
                )
                if current.value:
                    return True
        return False

    def are_linked(self, one: int, other: int) -> bool:
        """Tell whether two GPUs reach each other over NVLink."""
        status = ctypes.c_uint()
        with contextlib.suppress(OSError):
            self._call(
                "nvmlDeviceGetP2PStatus",
                self._handles[one],
                self._handles[other],
                ctypes.c_uint(_NVLINK),
                ctypes.byref(status),
            )
            return status.value == 0
        return False

    def driver(self) -> str:
        """Return the version of the driver."""
        text = ctypes.create_string_buffer(96)
        self._call("nvmlSystemGetDriverVersion", text, ctypes.c_uint(len(text)))
        return text.value.decode()

    def _count(self) -> int:
        count = ctypes.c_uint()
        self._call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        return count.value

    def _handle(self, index: int) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
        return handle

    def _call(self, name: str, *arguments: object) -> None:
        code: int = getattr(self._library, name)(*arguments)
        if code != 0:
            raise OSError(code, f"{name} returned {code}")


@contextlib.contextmanager
def management() -> Generator[Management | None, None, None]:
    """Open NVIDIA's management library; None where there is none that works."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        opened = Management(library) if library.nvmlInit_v2() == 0 else None
    except (OSError, AttributeError):
        library, opened = None, None
    try:
        yield opened
    finally:
        if library is not None and opened is not None:
            library.nvmlShutdown()


def _torch_uses_gpus() -> bool:
    """Tell whether the installed torch was built for GPUs, from the one file that says so."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return True
    try:
        build = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    except Exception:  # whatever the file holds, it is torch's own; the ranks will tell
        return True
    return any(build.get(name) is not None for name in ("cuda", "hip")) or "cuda" not in build


def _ask_torch(env: Mapping[str, str]) -> tuple[Gpu, ...]:
    answer = subprocess.run(
        [sys.executable, "-c", _COUNT], env=dict(env), capture_output=True, text=True, check=False
    )
    count = int(answer.stdout) if answer.returncode == 0 else 0
    names = env.get(VISIBLE)
    entries = names.split(",") if names else [str(index) for index in range(count)]
    return tuple(Gpu(name.strip()) for name in entries[:count])
