"""What a parameter is while its new values are on their way from other ranks."""

# Names of torch's own functions.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zeroshard.core import tree
from zeroshard.core.freed import shows_no_values
from zeroshard.core.unit import COMING, Coming

__all__ = ["PendingParameter"]

# What tells of values or of how they lie in memory, which a freed parameter has none of.
_OF_MEMORY = frozenset({Tensor.__repr__, Tensor.is_contiguous, Tensor.stride})


class PendingParameter(nn.Parameter):
    """What a parameter that stays full is between a step and its next use.

    The gather of the stepped values runs on meanwhile. Whoever touches the values first, a module
    or anybody else, waits for it, and the parameter changes its class back. What torch reads
    without asking the class, as `torch.tensor` does, has the shape and NaN in all places.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if shows_no_values(func) and func not in _OF_MEMORY:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        for tensor in tree.find((args, kwargs)).tensors:
            _await(tensor)
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(_await(self), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _await(self).__reduce_ex__(protocol)


def _await(tensor: Tensor) -> Tensor:
    """The same tensor, with its new values."""
    if isinstance(tensor, PendingParameter):
        coming: Coming | None = vars(tensor).get(COMING)
        if coming is not None:
            coming.arrive(tensor)
        else:  # made by somebody as one more of this class
            object.__setattr__(tensor, "__class__", nn.Parameter)
    return tensor
