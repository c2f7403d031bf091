"""Turning torch's complaints into what to do instead."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch

from zeroshard.config import Batch
from zeroshard.core.unit import Unit
from zeroshard.errors import compose

__all__ = ["explain_backward", "explain_memory"]


def explain_memory(
    error: Exception,
    batch: Batch,
    units: Sequence[Unit],
    *,
    has_budget: bool = False,
    came_back: bool = False,
) -> None:
    """Add to an out-of-memory error what would make room; it stays the error that it is.

    Programs that try smaller batches after one look at its type and at its words.

    Args:
        error: what was raised.
        batch: the numbers of samples.
        units: those of the model.
        has_budget: whether an activation budget decides what is kept for backward.
        came_back: whether state was brought back to the device by what the first steps needed.
    """
    if not isinstance(error, torch.OutOfMemoryError) or len(error.args) != 1:
        return
    advice: list[str] = []
    if batch.micro > 1:
        advice.append(
            '"train_micro_batch_size_per_gpu": 1 with "gradient_accumulation_steps": '
            f"{batch.micro * batch.accumulation} computes the same in smaller pieces"
        )
    advice.append(
        '"zeroshard": {"activation_budget": 0} keeps no activations of blocks'
        if has_budget
        else '"zeroshard": {"activation_budget": "auto"}, model.gradient_checkpointing_enable() or '
        "zeroshard.checkpointing computes activations twice instead of keeping them"
    )
    if came_back:
        advice.append(
            '"zeroshard": {"gpu_budget": ...} with a number of GiB keeps less optimizer state on '
            'the device than "auto" does, which goes by the memory that the first steps needed'
        )
    elif any(unit.is_trained and unit.state.is_near for unit in units):
        advice.append(
            '"zero_optimization": {"offload_optimizer": {"device": "cpu"}} keeps optimizer state '
            "in host memory between steps"
        )
    if all(unit.lifetime.params_stay for unit in units):
        advice.append('"zero_optimization": {"stage": 3} on several GPUs shards the weights, too')
    else:
        advice.append("more GPUs make smaller shards")
    error.args = (f"{error.args[0]}\n\nhint: {'; '.join(advice)}.",)


def explain_backward(error: Exception, units: Iterable[Unit]) -> str | None:
    """Say what to do instead, for the mistakes that only show in backward; None for others."""
    text = str(error)
    if "backward through the graph a second time" in text:
        return compose(
            "engine.backward() was called on a graph that an earlier backward used up.",
            hint="call engine(...) again for a new graph, or keep the old one with "
            "backward(loss, retain_graph=True).",
        )
    if "storage of size 0" in text:
        return compose(
            "backward entered a module before the gradient of any of its outputs, while its "
            f"parameters were freed{_candidates(text, units)}.",
            hint="return what the loss needs as an output of the module that computes it, instead "
            "of keeping it as an attribute.",
        )
    return None


def _candidates(text: str, units: Iterable[Unit]) -> str:
    """The freed parameters that a complaint about a tensor of some shape can mean."""
    found = re.search(r"sizes \[([\d, ]*)\]", text)
    if found is None:
        return ""
    shape = sorted(int(size) for size in found.group(1).split(",") if size.strip())
    names = [
        member.name
        for unit in units
        if not unit.is_full
        for member, own_shape in zip(unit.members, unit.shapes, strict=True)
        if sorted(own_shape) == shape
    ]
    if not names:
        return ""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f" (by its shape, one of: {', '.join(names[:5])}{more})"
