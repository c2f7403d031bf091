"""A flat buffer: one tensor, the memory of many, which comes and goes under views of it."""

# Reference counts of storages have no public name.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from zeroshard.core.layout import Layout

__all__ = ["FlatBuffer"]

_PATIENCE_S = 1.0
_PAUSE_S = 20e-6


class FlatBuffer:
    """A flat tensor with one view per parameter; its memory comes and goes under the views.

    Views are of the tensor's dtype, or, in a tensor of bytes, of those that are named.
    """

    def __init__(
        self,
        tensor: Tensor,
        layout: Layout,
        shapes: Sequence[torch.Size],
        dtypes: Sequence[torch.dtype] | None = None,
    ) -> None:
        self.layout, self._shapes = layout, shapes
        self.is_bytes = dtypes is not None
        self._dtypes = [tensor.dtype] * len(shapes) if dtypes is None else dtypes
        self.nbytes_full = tensor.nbytes
        self._lay(tensor)

    def _lay(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.views = [
            tensor[self.layout.full(index).slice()].view(dtype).view(shape)
            for index, (shape, dtype) in enumerate(zip(self._shapes, self._dtypes, strict=True))
        ]
        self.gaps = [tensor[gap.slice()] for gap in self.layout.gaps()]

    @property
    def is_allocated(self) -> bool:
        """Whether there is memory behind the views."""
        return self.tensor.untyped_storage().nbytes() > 0

    def allocate(self) -> None:
        """Back the views with memory of undefined content."""
        if not self.is_allocated:
            self.tensor.untyped_storage().resize_(self.nbytes_full)

    def release(self) -> None:
        """Give the memory back; the views must not be read until the next allocation."""
        if not self.tensor.untyped_storage().resizable():
            # NumPy has seen it, and its arrays may still do so.
            self._lay(torch.empty_like(self.tensor))
        self.tensor.untyped_storage().resize_(0)

    @property
    def num_users(self) -> int:
        """How many tensors and other objects refer to the memory, views included."""
        return torch._C._storage_Use_Count(self.tensor.untyped_storage()._cdata)

    def await_users(self, num_users: int) -> None:
        """Wait until no more refer to the memory than did before a collective on it.

        A thread of gloo's lets go of a tensor only after it has said that the tensor is filled. To
        whoever counts users meanwhile, it would hide a view that somebody keeps. What is waited for
        on the stream of a GPU has let go.
        """
        if self.tensor.is_cuda:
            return
        deadline = time.monotonic() + _PATIENCE_S
        while self.num_users > num_users and time.monotonic() < deadline:
            time.sleep(_PAUSE_S)

    def leave(self) -> None:
        """Leave the memory to whoever kept views of it, and go on with a copy."""
        self._lay(self.tensor.clone())
