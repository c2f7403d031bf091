"""Whether Triton runs here, which is no dependency and needs a compiler of the host's."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

__all__ = ["if_it_runs"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


def if_it_runs(device: torch.device, load: Callable[[], _T], instead: str) -> _T | None:
    """What ``load`` gives after it has run a kernel on the device; None where it cannot.

    Args:
        device: where.
        load: imports what needs Triton, runs it once, and returns what is wanted of it.
        instead: what is done without it, in the words of a warning.
    """
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    try:
        found = load()
        torch.cuda.synchronize(device)
    except Exception as error:
        # Triton compiles its launcher with the host's C compiler, which may not be there.
        _log.warning("Triton cannot run here, so %s: %s", instead, error)
        return None
    return found
