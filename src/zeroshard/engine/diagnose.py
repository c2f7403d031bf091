"""Turning torch's complaints in backward into what to call instead."""

from __future__ import annotations

from zeroshard.errors import compose

__all__ = ["explain_backward"]


def explain_backward(error: Exception) -> str | None:
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
            f"parameters were freed: {text}",
            hint="return what the loss needs as an output of the module that computes it, instead "
            "of keeping it as an attribute. Double backward is not supported while parameters are "
            "freed after use.",
        )
    return None
