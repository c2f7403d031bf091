"""Where the generators of random numbers stand: Python's, numpy's, torch's."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

__all__ = ["restore_generators", "states_of_generators"]


def states_of_generators(device: torch.device) -> dict[str, Any]:
    """The states of the generators that this rank draws from; data, no objects."""
    version, words, gauss = random.getstate()
    states: dict[str, Any] = {
        "python": (version, torch.tensor(words, dtype=torch.int64, device="cpu"), gauss),
        "numpy": np.random.get_state(),
        "cpu": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(states: dict[str, Any], device: torch.device) -> None:
    """Set this rank's generators to saved states."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
