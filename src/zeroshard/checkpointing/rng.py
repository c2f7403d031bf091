"""Random-number states: those that a recomputation has to find again, and named streams of them.

Dropout is drawn from the generator of the device. A function that runs again draws the same numbers
only if every generator it may draw from is set back to where it was. DeepSpeed's tracker adds
states by name, so that ranks of one model-parallel group can draw equal numbers at some places and
different ones at others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from zeroshard.errors import UsageError, compose

__all__ = ["MODEL_PARALLEL", "RandomStates", "RngTracker", "device_generator"]

MODEL_PARALLEL = "model-parallel-rng"
"""The stream that differs between the ranks of a model-parallel group."""


def device_generator() -> torch.Generator:
    """The generator that dropout draws from: the current GPU's, or the CPU's without a GPU."""
    if not torch.cuda.is_available():
        return torch.default_generator
    torch.cuda.init()
    return torch.cuda.default_generators[torch.cuda.current_device()]


class RngTracker:
    """Named streams of random numbers, each a state of the device's generator."""

    def __init__(self) -> None:
        self._states: dict[str, Tensor] = {}
        self._seeds: set[int] = set()

    def add(self, name: str, seed: int) -> None:
        """Start a stream from a seed, which no other stream may have."""
        if name in self._states:
            raise UsageError(
                compose(
                    f'the RNG tracker has a stream "{name}" already.',
                    hint="call get_cuda_rng_tracker().reset() to start over.",
                )
            )
        if seed in self._seeds:
            raise UsageError(
                compose(
                    f"seed {seed} belongs to another stream of the RNG tracker, and two streams "
                    f'with one seed are the same numbers; "{name}" was not added.',
                    hint="choose another seed.",
                )
            )
        generator = device_generator()
        before = generator.get_state()
        generator.manual_seed(seed)
        self._states[name] = generator.get_state()
        generator.set_state(before)
        self._seeds.add(seed)

    @contextlib.contextmanager
    def fork(self, name: str = MODEL_PARALLEL) -> Iterator[None]:
        """Draw from a stream inside the block, and go on with the usual one after it."""
        if name not in self._states:
            raise UsageError(
                compose(
                    f'the RNG tracker has no stream "{name}"; it has {sorted(self._states)}.',
                    hint="call model_parallel_cuda_manual_seed(seed) or "
                    "get_cuda_rng_tracker().add(name, seed) first.",
                )
            )
        generator = device_generator()
        before = generator.get_state()
        generator.set_state(self._states[name])
        try:
            yield
        finally:
            self._states[name] = generator.get_state()
            generator.set_state(before)

    def get_states(self) -> dict[str, Tensor]:
        """The state of every stream by its name, for a checkpoint."""
        return dict(self._states)

    def set_states(self, states: Mapping[str, Tensor]) -> None:
        """Replace all streams by saved ones."""
        self._states = dict(states)

    def reset(self) -> None:
        """Forget all streams and seeds."""
        self._states, self._seeds = {}, set()


@dataclass(frozen=True, slots=True)
class RandomStates:
    """Where all generators and streams are at one moment."""

    generators: tuple[tuple[torch.Generator, Tensor], ...]
    tracker: RngTracker
    streams: Mapping[str, Tensor]

    @classmethod
    def now(cls, tracker: RngTracker, devices: Iterable[torch.device]) -> RandomStates:
        """Record the CPU's generator, the current GPU's, and those of other ``devices``."""
        gpus = {device.index for device in devices if device.type == "cuda"}
        if torch.cuda.is_initialized():
            gpus.add(torch.cuda.current_device())
        generators = [torch.default_generator]
        generators += [torch.cuda.default_generators[index] for index in sorted(gpus)]
        states = tuple((generator, generator.get_state()) for generator in generators)
        return cls(states, tracker, tracker.get_states())

    def apply(self) -> None:
        """Set everything back to that moment."""
        for generator, state in self.generators:
            generator.set_state(state)
        self.tracker.set_states(self.streams)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Be at that moment inside the block, and where one was before it afterwards."""
        devices = [generator.device for generator, _ in self.generators]
        before = RandomStates.now(self.tracker, devices)
        self.apply()
        try:
            yield
        finally:
            before.apply()
