"""Finds trained parameters that got no gradient, where that is meant to be an error."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from zeroshard.core.collectives import Answered, Exchange
from zeroshard.core.mesh import Mesh
from zeroshard.core.unit import Member, Unit
from zeroshard.errors import UsageError, compose

__all__ = ["GradientWatch"]

_SHOWN = 8  # parameters of each rank that an error can name


class GradientWatch:
    """Takes note of the parameters that gradients arrive at, from one check to the next."""

    def __init__(self, units: Sequence[Unit], mesh: Mesh) -> None:
        self._members: list[Member] = [
            member for unit in units if unit.is_trained for member in unit.members
        ]
        self._mesh = mesh
        self._show = Exchange(mesh, 1 + _SHOWN)
        self._seen: set[Tensor] = set()
        self._handles = [
            member.param.register_post_accumulate_grad_hook(self._seen.add)
            for member in self._members
        ]

    def detach(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def seen(self) -> list[str]:
        """Names of the parameters that gradients arrived at since the last check."""
        return [member.name for member in self._members if member.param in self._seen]

    def resume(self, names: Collection[str]) -> None:
        """Go on from where these parameters had been seen."""
        self._seen.clear()
        self._seen.update(member.param for member in self._members if member.name in names)

    def forget(self) -> None:
        """Start anew."""
        self._seen.clear()

    def check(self) -> None:
        """Refuse to go on if a parameter got no gradient on some rank. A collective.

        Raises:
            UsageError: on every rank, with the names of parameters and ranks.
        """
        missing = [at for at, member in enumerate(self._members) if member.param not in self._seen]
        self.forget()
        shown = [*missing[:_SHOWN], *([0] * (_SHOWN - len(missing)))]
        with Answered(self._mesh.rank, "to know which parameters got no gradient"):
            answers = self._show([len(missing), *shown])
        lines = [
            f"rank {rank}: "
            + ", ".join(self._members[at].name for at in found[:count])
            + (f" and {count - _SHOWN} more" if count > _SHOWN else "")
            for rank, (count, *found) in enumerate(answers)
            if count
        ]
        if lines:
            raise UsageError(
                compose(
                    "trained parameters got no gradient in this step, and "
                    "zero_optimization.ignore_unused_parameters is false.\n" + "\n".join(lines),
                    hint="freeze them, leave them out of the optimizer, or set "
                    '"ignore_unused_parameters": true.',
                )
            )
