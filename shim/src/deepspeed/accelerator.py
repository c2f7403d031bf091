"""``deepspeed.accelerator``: the device that ranks compute on, by DeepSpeed's calls."""

from __future__ import annotations

from functools import cache
from typing import Any

import psutil
import torch

from deepspeed._names import names
from zeroshard.core import world

__all__ = ["Accelerator", "get_accelerator"]


class Accelerator:
    """The kind of device that this process computes on: the GPU that belongs to it, or the CPU.

    What torch calls by one name for all kinds is looked up in its module for this one, such as
    ``synchronize``, ``empty_cache``, ``Stream`` and ``memory_allocated`` in ``torch.cuda``.
    """

    def __init__(self, kind: str) -> None:
        self._name = kind
        self._module: Any = getattr(torch, kind)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return getattr(self._module, name)
        except AttributeError:
            raise AttributeError(
                f"get_accelerator().{name}: torch.{self._name} has no such name."
                "\n\nhint: call torch itself.",
                name=name,
                obj=self,
            ) from None

    def device_name(self, device_index: int | None = None) -> str:
        """Return the name that torch knows the device by, as in ``tensor.to(name)``."""
        if device_index is None or self._name == "cpu":
            return self._name
        return f"{self._name}:{device_index}"

    def current_device(self) -> int | str:
        """Return the number of this process's device, or "cpu"."""
        return self._name if self._name == "cpu" else world.device().index

    def current_device_name(self) -> str:
        """Return the name of this process's device."""
        return str(world.device())

    def communication_backend_name(self) -> str:
        """Return the backend that ranks on this kind of device talk over."""
        return "gloo" if self._name == "cpu" else "nccl"

    def is_available(self) -> bool:
        """Tell whether there is a device, which there is."""
        return True

    def is_synchronized_device(self) -> bool:
        """Tell whether work is done when a call returns."""
        return self._name == "cpu"

    def is_bf16_supported(self) -> bool:
        """Tell whether the device computes in bf16."""
        return self._name == "cpu" or torch.cuda.is_bf16_supported()

    def is_fp16_supported(self) -> bool:
        """Tell whether the device trains in fp16: each does."""
        return True

    def supported_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes that parameters may be computed in."""
        always = [torch.float32, torch.float16]
        return [*always, torch.bfloat16] if self.is_bf16_supported() else always

    def manual_seed(self, seed: int) -> None:
        """Seed the random numbers of this device."""
        torch.manual_seed(seed) if self._name == "cpu" else self._module.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        """Seed the random numbers of all devices of this kind."""
        torch.manual_seed(seed) if self._name == "cpu" else self._module.manual_seed_all(seed)

    def pin_memory(self, tensor: torch.Tensor, align_bytes: int = 1) -> torch.Tensor:
        """Return the tensor in host memory from which copies to the device need no detour."""
        del align_bytes
        return tensor if self._name == "cpu" else tensor.pin_memory()

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        """Tell whether a tensor is on a device of this kind."""
        return tensor.device.type == self._name

    def memory_allocated(self, device_index: int | None = None) -> int:
        """Return the bytes that tensors take on the device, or this process in host memory."""
        if self._name == "cpu":
            return psutil.Process().memory_info().rss
        return self._module.memory_allocated(device_index)

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        """Return the most bytes that tensors have taken on the device, or now in host memory."""
        if self._name == "cpu":
            return self.memory_allocated()
        return self._module.max_memory_allocated(device_index)

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        """Begin anew to look for the most bytes taken."""
        if self._name != "cpu":
            self._module.reset_peak_memory_stats(device_index)

    def empty_cache(self) -> None:
        """Give memory back that no tensor takes."""
        if self._name != "cpu":
            self._module.empty_cache()

    def total_memory(self, device_index: int | None = None) -> int:
        """Return the bytes of memory of the device."""
        if self._name == "cpu":
            return psutil.virtual_memory().total
        return self._module.mem_get_info(device_index)[1]

    def available_memory(self, device_index: int | None = None) -> int:
        """Return the bytes of memory that are free."""
        if self._name == "cpu":
            return psutil.virtual_memory().available
        return self._module.mem_get_info(device_index)[0]

    def range_push(self, text: str) -> None:
        """Begin a range that profilers of the device show."""
        if self._name != "cpu":
            self._module.nvtx.range_push(text)

    def range_pop(self) -> None:
        """End the range begun last."""
        if self._name != "cpu":
            self._module.nvtx.range_pop()


@cache
def get_accelerator() -> Accelerator:
    """Return the kind of device that this process computes on."""
    return Accelerator(world.device().type)


__getattr__, __dir__ = names(__name__)
