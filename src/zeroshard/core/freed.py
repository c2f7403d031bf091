"""What a parameter is while its unit is freed, and what may be done with it meanwhile."""

# Names of torch's own functions, and the class of a parameter before.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import handle_torch_function

from zeroshard.core import tree
from zeroshard.core.slots import full_shape, slot_of
from zeroshard.errors import UsageError, compose

__all__ = [
    "FreedData",
    "FreedParameter",
    "attribute",
    "freed_class",
    "freed_read",
    "shows_no_values",
    "shows_shape",
    "stand_in",
]

_HARMLESS = frozenset(
    {
        Tensor.__hash__,
        Tensor.__repr__,
        Tensor.data_ptr,
        Tensor.dim,
        Tensor.element_size,
        Tensor.is_complex,
        Tensor.is_contiguous,
        Tensor.is_floating_point,
        Tensor.nelement,
        Tensor.numel,
        Tensor.register_hook,
        Tensor.register_post_accumulate_grad_hook,
        Tensor.requires_grad_,
        Tensor.size,
        Tensor.stride,
        Tensor.untyped_storage,
        torch._has_compatible_shallow_copy_type,
        torch.is_floating_point,
    }
)

# Where values are, for programs that write them without another call, as safetensors does.
_ADDRESSES = frozenset({Tensor.data_ptr, Tensor.untyped_storage})

# What shows the shape alone.
_OUTLINE = frozenset(
    {
        Tensor.__len__,
        Tensor.dim,
        Tensor.is_contiguous,
        Tensor.ndimension,
        Tensor.nelement,
        Tensor.numel,
        Tensor.size,
        Tensor.stride,
        torch.numel,
    }
)
_OUTLINE_ATTRIBUTES = frozenset({"nbytes", "ndim", "shape"})

# A whole module is moved by these, one parameter after another.
_MOVES = frozenset({Tensor.cpu, Tensor.cuda})

# A whole module is cast by these, one parameter after another.
_CASTS = frozenset({Tensor.bfloat16, Tensor.double, Tensor.float, Tensor.half, Tensor.type})


def shows_shape(func: Callable[..., Any]) -> bool:
    """Whether a function of a tensor shows its shape alone."""
    return func in _OUTLINE or attribute(func) in _OUTLINE_ATTRIBUTES


def stand_in(tensor: Tensor) -> Tensor:
    """A tensor without data that has the shape of a freed parameter; others as they are."""
    if not isinstance(tensor, _FREED):
        return tensor
    param = tensor.parameter if isinstance(tensor, FreedData) else tensor
    return torch.empty(full_shape(param), dtype=param.dtype, device="meta")


def _is_harmless(func: Callable[..., Any], args: Sequence[Any]) -> bool:
    """Whether a function of freed parameters neither shows values nor changes them."""
    if attribute(func) == "data" and func.__name__ == "__set__":
        # As when a module is moved. Anything else, a cast included, would be lost.
        with torch._C.DisableTorchFunctionSubclass():
            is_same = args[-1].numel() == 0 and args[-1].dtype == args[0].dtype
            return is_same and isinstance(args[0], FreedParameter)
    return func in _HARMLESS or shows_no_values(func)


def shows_no_values(func: Callable[..., Any]) -> bool:
    """Whether a function of tensors neither shows values, or where they are, nor changes them."""
    if func in _HARMLESS:
        return func not in _ADDRESSES
    return attribute(func) not in {None, "H", "T", "data", "imag", "mH", "mT", "real"}


def attribute(func: Callable[..., Any]) -> str | None:
    """The attribute of a tensor that is read or set, if that is what ``func`` does."""
    if type(func).__name__ != "method-wrapper":
        return None
    return getattr(getattr(func, "__self__", None), "__name__", "")


def _without_values(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """What a function of a freed parameter gives that is only another name of its values."""
    is_data = attribute(func) == "data" and func.__name__ == "__get__"
    moves = func in _MOVES or (func is Tensor.to and _keeps_dtype(args, kwargs))
    if is_data or func is Tensor.detach or moves:
        return FreedData.of(args[0])
    if func is functional.pad:
        # Transformers fits the bias of an output layer to tied embeddings, whose shapes are empty.
        size = args[1] if len(args) > 1 else kwargs.get("pad", (1,))
        return None if any(size) else args[0]
    return None


def _keeps_dtype(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether ``to`` moves a tensor and does not cast it."""
    targets = [*args[1:], *kwargs.values()]
    dtypes = [getattr(each, "dtype", each) for each in targets]
    return all(each == args[0].dtype for each in dtypes if isinstance(each, torch.dtype))


def _present(tensor: Tensor) -> Tensor:
    """The values, if this is the data of a parameter that has been gathered."""
    return tensor.parameter.data if isinstance(tensor, FreedData) else tensor


def _call_with_freed(
    func: Callable[..., Any],
    types: Sequence[type],
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
) -> Any:
    kwargs = kwargs or {}
    given = [each for each in tree.find((args, kwargs)).tensors if isinstance(each, _FREED)]
    params = [each.parameter if isinstance(each, FreedData) else each for each in given]
    if not any(isinstance(param, FreedParameter) for param in params):
        # Gathered since the data was asked for.
        return func(*tree.replace(args, _present), **tree.replace(kwargs, _present))
    slots = [slot_of(param) for param in params if isinstance(param, FreedParameter)]
    keepers = {slot.unit.keeper if slot is not None else None for slot in slots}
    keeper = keepers.pop() if len(keepers) == 1 else None
    if keeper is not None and shows_shape(func) and not torch.is_grad_enabled():
        return keeper.read(func, args, kwargs)
    is_written = keeper is None and func in _ADDRESSES and isinstance(args[0], FreedData)
    if _is_harmless(func, args) and not is_written:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    name = _without_values(func, args, kwargs)
    if name is not None:
        return name
    # Whole models are cast by their parameters; data is cast by who reads a state dict.
    is_cast = (func in _CASTS or func is Tensor.to) and isinstance(args[0], FreedParameter)
    if keeper is None or is_cast or attribute(func) == "data":
        raise freed_read(params[0])
    return keeper.read(func, args, kwargs)


class FreedParameter(nn.Parameter):
    """What a parameter is while its unit is freed: an empty tensor that refuses to be read.

    A parameter changes its class, never its identity, and changes back when it is gathered.
    """

    _own_class: type[nn.Parameter] = nn.Parameter

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return _call_with_freed(func, types, args, kwargs)

    # Torch refuses None before it asks the class.
    def copy_(self, other: Any, non_blocking: bool = False) -> Tensor:
        """Take values over; where those of this rank are not kept, it may have none."""
        if other is None:
            func: Callable[..., Any] = Tensor.copy_
            return handle_torch_function(func, (self,), self, other, non_blocking)
        return super().copy_(other, non_blocking)

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise freed_read(self)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise freed_read(self)


@functools.cache
def freed_class(own_class: type[nn.Parameter]) -> type[FreedParameter]:
    """What a parameter of a class is while it is freed: of that class still, by its name, too."""
    if own_class is nn.Parameter:
        return FreedParameter
    return type(own_class.__name__, (FreedParameter, own_class), {"_own_class": own_class})


class FreedData(Tensor):
    """What ``param.data`` and ``param.detach()`` are while the unit of ``param`` is freed.

    A state dict is made of such, and most that is done with it needs names alone. To read one is to
    read the parameter: it is refused, or has the values once the parameter is gathered.
    """

    parameter: Tensor

    @staticmethod
    def of(freed: Tensor) -> Tensor:
        """The data of a freed parameter."""
        if isinstance(freed, FreedData):
            return freed
        with torch._C.DisableTorchFunctionSubclass():
            data = freed.detach().as_subclass(FreedData)
        data.parameter = freed
        return data

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return _call_with_freed(func, types, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self._present(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._present().__reduce_ex__(protocol)

    def _present(self) -> Tensor:
        if isinstance(self.parameter, FreedParameter):
            raise freed_read(self.parameter)
        return self.parameter.data


_FREED = (FreedParameter, FreedData)


def freed_read(param: Tensor | None) -> UsageError:
    """The error of reading a parameter while its unit is freed."""
    slot = slot_of(param) if param is not None else None
    what, where = "a parameter", ""
    hint = (
        "wrap the read in zeroshard.gathered(...); if a module reads it in forward, "
        "declare that: zeroshard.register_external_parameter(module, parameter)."
    )
    if slot is None:
        where = " Its engine is gone, and with it the data: gather it before engine.destroy()."
    else:
        what = slot.unit.members[slot.index].name
        shape, shards = tuple(slot.unit.shapes[slot.index]), slot.unit.mesh.shard.size
        where = f" Its shape is {shape}; its data lives in {shards} shards."
        if slot.unit.keeper is not None:
            hint = (
                "wrap the read in zeroshard.gathered(...); to run the model, pass it to "
                "zeroshard.initialize() first; to cast it, name a dtype where it is built."
            )
    return UsageError(compose(f"{what} was read while its unit is freed.{where}", hint=hint))
