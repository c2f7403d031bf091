"""What there is to save of a training, and what it is called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from zeroshard.checkpoint.manifest import Piece, Writer
from zeroshard.core.layout import Range
from zeroshard.core.mesh import Mesh
from zeroshard.core.unit import Unit
from zeroshard.core.usage import GradientWatch
from zeroshard.optim.sharded import ShardedOptimizer

__all__ = ["Place", "Progress", "Training", "named_buffers", "places", "present"]


@dataclass(frozen=True, slots=True)
class Progress:
    """Counters of the engine.

    ``accumulated`` of the ``accumulation`` micro-steps of a step are done. ``is_step_due`` and
    ``has_run_backward`` say what the engine waits for.
    """

    micro_steps: int = 0
    global_steps: int = 0
    global_samples: int = 0
    skipped_steps: int = 0
    accumulated: int = 0
    accumulation: int = 1
    is_step_due: bool = False
    has_run_backward: bool = False


@dataclass(frozen=True, slots=True)
class Training:
    """The objects whose state a checkpoint holds."""

    model: nn.Module
    units: Sequence[Unit]
    mesh: Mesh
    sharded: ShardedOptimizer | None
    watch: GradientWatch | None
    schedule: Any
    accumulation: int
    writer: Writer


@dataclass(frozen=True, slots=True)
class Place:
    """A parameter of the model: its name, its unit and its position there."""

    name: str
    unit: Unit
    index: int
    writer_row: int
    """The row of the mesh, of those with equal shards, that writes the unit."""

    @property
    def param(self) -> nn.Parameter:
        """The parameter itself."""
        return self.unit.members[self.index].param

    @property
    def slice(self) -> nn.Parameter:
        """What the optimizer steps of it on this rank."""
        return self.unit.slices[self.index]

    def owned(self) -> Range:
        """The range of the parameter that this rank owns."""
        return self.unit.owned(self.index, self.unit.mesh.shard.rank)

    def of(self, shard: Tensor) -> Tensor:
        """The part of this rank's shard that belongs to the parameter, flat."""
        return self.unit.part_of(shard, self.index)

    @property
    def is_written_here(self) -> bool:
        """Whether this rank writes a range of it."""
        return any(piece.rank == self.unit.mesh.rank for piece in self.pieces())

    def pieces(self) -> tuple[Piece, ...]:
        """All its ranges, with the ranks that write them; one without elements if it has none."""
        layout, size = self.unit.layout, self.unit.mesh.shard.size
        first = self.writer_row * size
        if not layout.numels[self.index]:
            return (Piece(first, Range(0, 0)),)
        owned = [self.unit.owned(self.index, rank) for rank in range(size)]
        return tuple(Piece(first + rank, part) for rank, part in enumerate(owned) if part.numel)


def present(value: Any, companions: Mapping[Tensor, Tensor]) -> Any:
    """A value of a state dict; the companion itself where it is what is shown in its place."""
    return companions.get(value, value) if isinstance(value, Tensor) else value


def places(training: Training) -> Iterator[Place]:
    """Every parameter once, by the name under which the model has it first.

    Ranks with equal shards divide the units among them by size, so that all of them write.
    """
    loads = [0] * training.mesh.replicate.size
    names = {param: name for name, param in training.model.named_parameters()}
    for unit in training.units:
        row = loads.index(min(loads))
        loads[row] += unit.layout.shard_numel
        for index, member in enumerate(unit.members):
            yield Place(names.get(member.param, member.name), unit, index, row)


def named_buffers(model: nn.Module, state: dict[str, Any]) -> dict[str, Tensor]:
    """The buffers that are part of the model's state dict, each once."""
    return {name: buffer for name, buffer in model.named_buffers() if name in state}
