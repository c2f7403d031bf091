"""A unit: parameters that are gathered, reduced and freed together, in one flat buffer.

[Note: flat units]
Five tensors, and no others, hold a unit on a rank:

    full           the whole flat buffer in the compute dtype; the parameters are views into it
    shard          this rank's range of it, kept by the store; part of ``full`` where that stays
    master         this rank's range in the master dtype, which the optimizer steps; the memory of
                   ``shard`` itself where the two dtypes are equal
    full gradient  a flat buffer like ``full``; exists only while gradients are full
    grad shard     the average over ranks of this rank's range, summed over micro-steps

``full`` and the full gradient own one storage for ever and give its memory back by resizing it to
zero. Views of it, those that autograd saved included, become valid again when the storage is
refilled: that is why backward needs no replacement parameters and no copy out of the collective. A
freed storage must never be reachable from outside (an operation on it reads unmapped memory), so a
freed parameter points at an empty placeholder instead; its ``nn.Parameter`` object stays the same.

The optimizer sees one slice of ``master`` per parameter, never the flat tensor: hyper-parameters
and state stay per parameter, and a frozen parameter cannot decay. For the same reason a unit is
uniform in dtype and in whether it is trained.

[Note: byte units]
A unit of frozen parameters may be made of bytes instead. Its flat buffer is of ``uint8``, each
parameter lies there as it is, of whatever dtype, and is never cast. Quantised weights need that, as
their dtype says nothing about their values, and so do their *companions*: statistics that are plain
tensors in some object of the quantiser's. They lie in the same buffer, so that one gather brings a
block's weights and statistics, and are shown and hidden where the quantiser reads them.
"""

# Torch's list operations have no public name.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors
from torch.autograd.graph import increment_version
from torch.nn import functional
from torch.overrides import handle_torch_function
from torch.profiler import record_function
from torch.utils.weak import WeakIdKeyDictionary

from zeroshard.core import tree
from zeroshard.core.collectives import (
    DONE,
    MEAN,
    Answered,
    Averaging,
    Ticket,
    all_gather,
    broadcast_,
    reduce_mean,
)
from zeroshard.core.layout import Layout, Range
from zeroshard.core.lifetime import Lifetime
from zeroshard.core.mesh import Mesh
from zeroshard.core.store import DeviceStore, Store
from zeroshard.core.values import deal, pass_round, put
from zeroshard.errors import UsageError, compose

__all__ = [
    "Companion",
    "FlatBuffer",
    "FreedData",
    "FreedParameter",
    "Keeper",
    "Member",
    "Precision",
    "Slot",
    "Unit",
    "attribute",
    "build_unit",
    "freed_read",
    "full_nbytes",
    "full_shape",
    "hand_back",
    "is_waiting",
    "keep_until_engine",
    "plain",
    "restore",
    "share_values",
    "shows_shape",
    "slot_of",
    "stand_in",
]

_ALIGN_BYTES = 16


@dataclass(frozen=True, slots=True)
class Precision:
    """Dtypes of training; ``compute`` None keeps each parameter's own dtype.

    Gradients are averaged over ranks in ``reduce``, in the way of ``averaging``, and summed over
    micro-steps in ``accumulate``.
    """

    compute: torch.dtype | None = None
    master: torch.dtype = torch.float32
    reduce: torch.dtype = torch.float32
    accumulate: torch.dtype = torch.float32
    averaging: Averaging = MEAN


@dataclass(frozen=True, slots=True)
class Companion:
    """A tensor without which a parameter cannot be used: it is gathered and freed with it.

    It is no parameter itself; ``get`` reads it where it is kept, and ``put`` replaces it there. One
    that is the memory of the parameter itself, under another name, costs nothing.
    """

    name: str
    get: Callable[[], Tensor]
    put: Callable[[Tensor], object]


@dataclass(frozen=True, slots=True)
class Member:
    """A parameter with its full name in the model, and what it cannot be used without."""

    name: str
    param: nn.Parameter
    companions: tuple[Companion, ...] = ()


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

    def leave(self) -> None:
        """Leave the memory to whoever kept views of it, and go on with a copy."""
        self._lay(self.tensor.clone())


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
    if func in _HARMLESS:
        return True
    name = attribute(func)
    if name == "data" and func.__name__ == "__set__":
        # As when a module is moved. Anything else, a cast included, would be lost.
        with torch._C.DisableTorchFunctionSubclass():
            is_same = args[-1].numel() == 0 and args[-1].dtype == args[0].dtype
            return is_same and isinstance(args[0], FreedParameter)
    return name not in {None, "H", "T", "data", "imag", "mH", "mT", "real"}


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
def _freed_class(own_class: type[nn.Parameter]) -> type[FreedParameter]:
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


class Keeper(Protocol):
    """Who answers for the units that no engine manages yet."""

    def add(self, unit: Unit) -> None:
        """Take a unit in."""
        ...

    def read(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Call a function that needs the values of freed parameters."""
        ...


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


@dataclass(frozen=True, slots=True)
class _Beside:
    """A companion, which view of the flat buffer it is, and what is shown while that is freed."""

    companion: Companion
    at: int
    placeholder: Tensor


@dataclass(frozen=True, slots=True)
class Holdings:
    """The tensors that hold a unit on this rank now. See [Note: flat units]."""

    parameters: tuple[Tensor, ...]
    master: Tensor | None
    grad_shard: Tensor | None
    full_gradient: Tensor | None


@dataclass(frozen=True, slots=True)
class _Reduction:
    """An averaging under way; keeps its two ends alive."""

    ticket: Ticket
    out: Tensor
    wire: Tensor


class Unit:
    """Parameters that are gathered, reduced and freed together. See [Note: flat units].

    All verbs but ``gather`` and ``reduce`` are local. Those two are collectives: every rank of the
    mesh issues them in the same order, which is the schedule's business.
    """

    def __init__(
        self,
        members: Sequence[Member],
        lifetime: Lifetime,
        mesh: Mesh,
        *,
        full: FlatBuffer,
        store: Store,
        master: Tensor | None,
        gradient: FlatBuffer | None,
        precision: Precision,
        companions: Sequence[tuple[Companion, int]] = (),
    ) -> None:
        self.members = tuple(members)
        self.layout, self.lifetime, self.mesh = full.layout, lifetime, mesh
        self.master, self.precision = master, precision
        self._full, self._store, self._gradient = full, store, gradient
        self._params = [member.param for member in members]
        self._classes = [type(param) for param in self._params]
        self._require_grad = [param.requires_grad for param in self._params]
        self.shapes = [view.shape for view in full.views[: len(members)]]
        self._cut_sizes, self._cut_at = full.layout.cuts(mesh.shard.rank)
        is_cut = mesh.shard.size > 1 or master is None
        self._cut_shapes = None if is_cut else self._shape_cuts()
        self._is_bytes = full.is_bytes
        self._placeholders = [view.new_empty(0) for view in full.views[: len(members)]]
        self._beside = [
            _Beside(companion, at, full.views[at].new_empty(0)) for companion, at in companions
        ]
        self._wants_gather, self._wants_reduce = f"to gather {self.name}", f"to reduce {self.name}"
        self._gathering: Ticket = DONE
        self._is_readable = self._is_outlined = False
        self._reducing: _Reduction | None = None
        self.has_gradient = False
        self.grad_shard: Tensor | None = None
        # Set by the runtime, for modules that use the unit without holding its parameters.
        self.add_use: Callable[[nn.Module], object] | None = None
        self.drop_use: Callable[[nn.Module], object] | None = None
        self.use_here: Callable[[], bool] | None = None
        self.let_go: Callable[[], None] | None = None
        self.engine: Callable[[], Any] | None = None  # a weak reference, set by the engine
        self.is_parked = False  # the memory of its parameters is elsewhere for a while
        self.keeper: Keeper | None = None  # until an engine takes the parameters over
        self.number = 0  # among the units that wait, the same on all ranks
        self._num_holds = 0
        self.modifier_rank: int | None = None  # whose edits the access under way keeps
        self._versions = self._count_edits()
        self.slices = () if master is None else self._make_slices(master)

    def _make_slices(self, master: Tensor) -> tuple[nn.Parameter, ...]:
        return tuple(nn.Parameter(part) for part in self._cut(master))

    def _shape_cuts(self) -> list[Tensor]:
        """What the pieces of an uncut shard look like, gaps included."""
        shapes = [torch.Size([size]) for size in self._cut_sizes]
        for at, shape in zip(self._cut_at, self.shapes, strict=True):
            shapes[at] = shape
        return [torch.empty(shape, device="meta") for shape in shapes]

    def _cut(self, shard: Tensor) -> list[Tensor]:
        """Views of a shard, one for each parameter's slice."""
        if self._cut_shapes is None:
            parts = shard.split_with_sizes(self._cut_sizes)
        else:
            # Whole parameters keep their shape, so optimizers that need matrices work unsharded.
            parts = _unflatten_dense_tensors(shard, self._cut_shapes)
        return [parts[at] for at in self._cut_at]

    def __repr__(self) -> str:
        kind = "trained" if self.is_trained else "frozen"
        return (
            f"Unit({self.name}: {len(self.members)} parameters, {self.nbytes_full} bytes, {kind})"
        )

    @property
    def name(self) -> str:
        """Name of the first parameter, with how many others there are."""
        more = len(self.members) - 1
        return self.members[0].name + (f" (+{more})" if more else "")

    @property
    def is_trained(self) -> bool:
        """Whether an optimizer steps this unit."""
        return self.master is not None

    @property
    def is_full(self) -> bool:
        """Whether memory for full parameters is allocated; they can be read after ``wait``."""
        return self._full.is_allocated

    @property
    def is_readable(self) -> bool:
        """Whether the parameters are full and can be read now."""
        return self._is_readable

    @property
    def nbytes_full(self) -> int:
        """Bytes of the full parameters."""
        return self._full.nbytes_full

    @property
    def address(self) -> int:
        """Where the full parameters are in memory now."""
        return self._full.tensor.untyped_storage().data_ptr()

    @property
    def _mine(self) -> Tensor:
        """This rank's range of the full buffer."""
        return self._full.tensor[self.layout.shard(self.mesh.shard.rank).slice()]

    # Parameters

    def stored(self, index: int) -> Tensor:
        """This rank's slice of a parameter, as gathers read it."""
        shard = self._store.read(self._full.tensor.new_empty(self.layout.shard_numel))
        return self.part_of(shard, index)

    def part_of(self, shard: Tensor, index: int) -> Tensor:
        """What belongs to a parameter in a tensor that is laid out as a shard is, flat."""
        part = shard[self.layout.slice_of(index, self.mesh.shard.rank).slice()]
        return part.view(self._placeholders[index].dtype) if self._is_bytes else part

    def owned(self, index: int, rank: int) -> Range:
        """The part of a parameter that a rank owns, in the parameter's own elements."""
        start, stop = self.layout.owned(index, rank)
        size = self._placeholders[index].element_size() if self._is_bytes else 1
        return Range(start // size, stop // size)

    def gather(self) -> None:
        """Start making the parameters full. A collective over the shard axis."""
        self.check_present()
        self._end_gather()
        with record_function(f"zeroshard::gather ({self.name})"):
            self._full.allocate()
            shard = self._store.read(self._mine)
            with Answered(self.mesh.rank, self._wants_gather):
                self._gathering = all_gather(self._full.tensor, shard, self.mesh.shard)

    def _end_gather(self) -> None:
        if self._gathering is not DONE:
            gathering, self._gathering = self._gathering, DONE
            with Answered(self.mesh.rank, self._wants_gather):
                gathering.wait()

    def wait(self) -> None:
        """Make the parameters readable; the unit must be full or on the way."""
        self._end_gather()
        if not self._is_readable:
            self._show_full()
            self._is_readable = True

    def _show_full(self) -> None:
        self._show(self._full.views[: len(self._params)])
        for each in self._beside:
            each.companion.put(self._full.views[each.at])

    def await_views(self) -> Sequence[Tensor]:
        """The full parameters, which must be on the way, while the parameters stay empty."""
        self._end_gather()
        return self._full.views[: len(self._params)]

    def free(self) -> None:
        """Give the memory of full parameters back, where the lifetime says so."""
        if self.lifetime.params_stay or not (self.is_full or self._is_outlined):
            return
        if self._num_holds:
            return
        self.hide()
        self._full.release()

    def hide(self) -> None:
        """Let nothing that can be reached from outside refer to the full parameters."""
        self._end_gather()
        placeholders = self._placeholders
        for param, own_class, placeholder in zip(
            self._params, self._classes, placeholders, strict=True
        ):
            param.data = placeholder
            param.__class__ = _freed_class(own_class)
        for each in self._beside:
            each.companion.put(each.placeholder)
        self._is_readable = self._is_outlined = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the parameters full inside, whatever runs there; views of them may be kept for ever.

        For a unit that is full.
        """
        num_users = self._full.num_users
        if not self._num_holds:
            self._versions = self._count_edits()
        self._num_holds += 1
        try:
            yield
        finally:
            self._num_holds -= 1
            may_leave = not (self._num_holds or self.lifetime.params_stay)
            if may_leave and self._full.num_users > num_users:
                self._end_gather()
                self._full.leave()
                self._show_full()

    @property
    def companions(self) -> list[tuple[Tensor, Tensor]]:
        """What is shown of each companion while the unit is freed, and while it is full."""
        return [(each.placeholder, self._full.views[each.at]) for each in self._beside]

    @property
    def holdings(self) -> Holdings:
        """The tensors whose memory may be moved between two passes, after :meth:`park`."""
        self.settle()
        self._end_gather()
        full = (self._full.tensor,) if self.is_full else ()
        has_buffer = self._gradient is not None and self._gradient.is_allocated
        return Holdings(
            parameters=(*full, *self._store.tensors),
            master=self.master,
            grad_shard=self.grad_shard,
            full_gradient=self._buffer.tensor if has_buffer else None,
        )

    def check_present(self) -> None:
        """Refuse to read parameters whose memory has been moved.

        Raises:
            UsageError: it has.
        """
        if self.is_parked:
            raise UsageError(
                compose(
                    f"{self.name} was wanted while parameters are offloaded to host memory.",
                    hint="call engine.reload_states() first.",
                )
            )

    def park(self) -> None:
        """Let nothing outside refer to parameters whose memory is about to be moved."""
        self.hide()
        self.is_parked = True

    def unpark(self) -> None:
        """Go on with the memory as it was."""
        self.is_parked = False
        if self.is_full:
            self.wait()

    def show_slices(self, master: Tensor) -> None:
        """Let the optimizer's slices be those of this copy of the master weights."""
        for piece, part in zip(self.slices, self._cut(master), strict=True):
            piece.data = part

    @property
    def num_users(self) -> int:
        """How many tensors and other objects refer to the full parameters' memory."""
        return self._full.num_users

    @property
    def is_held(self) -> bool:
        """Whether the parameters are kept full, which they are on all ranks then."""
        return self._num_holds > 0

    def _count_edits(self) -> list[int]:
        with torch._C.DisableTorchFunctionSubclass():
            return [param._version for param in self._params]

    @property
    def edited(self) -> list[str]:
        """Names of parameters that were edited in place since they are held.

        Autograd counts such edits, but not those of ``param.data``.
        """
        counts = zip(self.members, self._versions, self._count_edits(), strict=True)
        return [member.name for member, before, now in counts if now != before]

    def outline(self) -> None:
        """Give freed parameters their shapes back, without memory and without a gather.

        For modules whose backward never reads the weight: autograd wants to see its shape, no more.
        """
        if self.is_full:
            return
        self._show(
            [
                empty.new_full((), torch.nan if empty.is_floating_point() else 0).expand(shape)
                for empty, shape in zip(self._placeholders, self.shapes, strict=True)
            ]
        )
        self._is_outlined = True

    def _show(self, tensors: Sequence[Tensor]) -> None:
        for param, own_class, tensor in zip(self._params, self._classes, tensors, strict=True):
            param.__class__ = own_class
            param.data = tensor

    def publish(self) -> None:
        """Put the stepped master weights where gathers read; start one where parameters stay."""
        self.write_master()
        if self.lifetime.params_stay or self._num_holds:
            self.gather()
        else:
            self.free()

    def write_master(self) -> None:
        """Put the master weights where gathers read."""
        assert self.master is not None, f"{self.name} is frozen and has no master weights"
        self._store.write(self.master)
        # A graph from before the step must not be run backward with the weights after it.
        increment_version(self._params)
        self._versions = self._count_edits()

    def check_untouched(self) -> None:
        """Refuse to go on with parameters that were moved, cast, frozen or unfrozen meanwhile.

        Raises:
            UsageError: one was; what training does would not reach it.
        """
        with torch._C.DisableTorchFunctionSubclass():
            changed = [param.requires_grad for param in self._params] != self._require_grad
            first, view = self._params[0], self._full.views[0]
            # Frozen ones that stay are only read, and a module may cast its own, as of a bias.
            is_ours = self.is_trained or not self.lifetime.params_stay
            moved = is_ours and self._is_readable and first.data_ptr() != view.data_ptr()
        if changed or moved:
            what = "requires_grad was changed" if changed else "data was replaced"
            raise UsageError(
                compose(
                    f"{self.name}: {what} after initialize(), and training would not follow.",
                    hint="move, cast, freeze or unfreeze the model before initialize(), or "
                    "initialize a new engine.",
                )
            )

    def differs_from_master(self) -> bool:
        """Whether this rank's part of full parameters is not what the master weights make of it.

        It was edited through ``param.data`` then, which autograd does not count. Where the two are
        one memory there is nothing to tell, and nothing is lost.
        """
        dtype = self._full.tensor.dtype
        if self.master is None or self.master.dtype == dtype or not self.lifetime.params_stay:
            return False
        made = self.master.to(dtype)
        return bool(((self._mine != made) & ~made.isnan()).any())

    def adopt(self, edit: Callable[[Tensor], object]) -> None:
        """Edit the full parameters in place and keep the result in shard and master weights.

        Raises:
            UsageError: at the end, data of another shape or dtype was given to a parameter.
        """
        assert self.is_full, f"{self.name} is edited while freed"
        misfits = self._take_replaced()
        edit(self._full.tensor)
        mine = self._mine
        self._store.write(mine)
        if self.master is not None and self.master.data_ptr() != mine.data_ptr():
            # What was not edited keeps the digits that the compute dtype cannot hold.
            same = self.master.to(mine.dtype) == mine
            self.master.copy_(torch.where(same, self.master, mine.to(self.master.dtype)))
        self._versions = self._count_edits()
        if misfits:
            hint = "give the module a new parameter instead."
            raise UsageError(compose(misfits[0], hint=hint))

    # Saving and loading

    def read_kept(self) -> Tensor:
        """This rank's range with all digits that are kept: master weights, or a frozen shard."""
        if self.master is not None:
            return self.master
        numel = self.layout.shard_numel
        return self._store.read(self._mine if self.is_full else self._full.tensor.new_empty(numel))

    def load_kept(self, values: Tensor) -> None:
        """Replace this rank's range by what has been read; gathers see it from now on."""
        if self.master is not None:
            if values.data_ptr() != self.master.data_ptr():
                self.master.copy_(values)
            self.write_master()
        else:
            self._store.write(values)
            self._versions = self._count_edits()

    def resume_gradient(self, reduced: Tensor) -> None:
        """Go on with an accumulation, of which ranks have averaged what came before."""
        assert self.is_trained, f"{self.name} is frozen and takes no gradients"
        self.grad_shard = reduced.to(self._wide(self.precision.accumulate))

    def resume_unreduced(self) -> Sequence[Tensor]:
        """Go on with an accumulation, of which this rank alone has what came before.

        Returns:
            The full gradient of each parameter, zeros, to be filled.
        """
        self._fresh_gradient().tensor.zero_()
        self.has_gradient = True
        return self._buffer.views

    def _take_replaced(self) -> list[str]:
        """Take in what somebody gave a parameter as its ``data``, in place of the view of it.

        Returns:
            What is wrong with those that have another shape or dtype; they are as before.
        """
        misfits: list[str] = []
        for member, view in zip(self.members, self._full.views, strict=False):
            if isinstance(member.param, FreedParameter):
                continue
            given = plain(member.param)
            if given.data_ptr() == view.data_ptr():
                continue
            if given.shape == view.shape and given.dtype == view.dtype:
                view.copy_(given)
            else:
                misfits.append(
                    f"{member.name}: its data was replaced while it was gathered, by a "
                    f"{given.dtype} tensor of shape {tuple(given.shape)}."
                )
            member.param.data = view
        return misfits

    # Gradients

    def collect(self) -> bool:
        """Add the gradients that arrived to the full gradient; say whether there were any."""
        with torch._C.DisableTorchFunctionSubclass():
            grads = [param.grad for param in self._params]
        arrived = [index for index, grad in enumerate(grads) if grad is not None]
        if not arrived:
            return False
        given = [self._checked(index, grad) for index, grad in enumerate(grads) if grad is not None]
        with torch._C.DisableTorchFunctionSubclass():
            for index in arrived:
                self._params[index].grad = None
        if self.has_gradient:
            torch._foreach_add_([self._buffer.views[index] for index in arrived], given)
            return True
        buffer = self._fresh_gradient()
        zeroed = buffer.gaps
        if len(arrived) < len(grads):
            zeroed = zeroed + [
                view for view, grad in zip(buffer.views, grads, strict=True) if grad is None
            ]
        if zeroed:
            torch._foreach_zero_(zeroed)
        torch._foreach_copy_([buffer.views[index] for index in arrived], given)
        self.has_gradient = True
        return True

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Dtype of the full gradient."""
        return self._buffer.tensor.dtype

    def unreduced(self, index: int) -> Tensor | None:
        """What this rank alone has of a parameter's gradient since the last reduction, if any."""
        return self._buffer.views[index] if self.has_gradient else None

    def _checked(self, index: int, grad: Tensor) -> Tensor:
        if grad.layout != torch.strided:
            grad = grad.to_dense()
        name, shape = self.members[index].name, self.shapes[index]
        assert grad.shape == shape, f"{name}: gradient {tuple(grad.shape)}, weight {tuple(shape)}"
        return grad

    @property
    def _buffer(self) -> FlatBuffer:
        assert self._gradient is not None, f"{self.name} is frozen and takes no gradients"
        return self._gradient

    def _fresh_gradient(self) -> FlatBuffer:
        """The full gradient's memory with undefined content, once nothing else uses it."""
        self.settle()
        if self.grad_shard is not None and self.lifetime.grads_stay:
            # The last reduction of this step left its result in the buffer.
            self.grad_shard = self.grad_shard.clone()
        self._buffer.allocate()
        return self._buffer

    def reduce(self) -> None:
        """Start averaging the full gradient over all ranks, zeros if none. A collective."""
        with record_function(f"zeroshard::reduce ({self.name})"):
            if not self.has_gradient:
                self._fresh_gradient().tensor.zero_()
            self.settle()
            full = self._buffer.tensor
            wire = full.to(self._wide(self.precision.reduce))
            mine = wire[self.layout.shard(self.mesh.shard.rank).slice()]
            # A gradient that stays is reduced in place; one that goes leaves its shard behind.
            in_place = wire is full and self.lifetime.grads_stay
            out = mine if in_place else torch.empty_like(mine)
            with Answered(self.mesh.rank, self._wants_reduce):
                ticket = reduce_mean(out, wire, self.mesh, self.precision.averaging)
            self._reducing = _Reduction(ticket, out, wire)
        self.has_gradient = False

    def _wide(self, dtype: torch.dtype) -> torch.dtype:
        """``dtype``, or float64 for parameters that are float64 themselves."""
        return torch.float64 if self._full.tensor.dtype == torch.float64 else dtype

    def settle(self) -> None:
        """Wait for the reduction under way and add its result to the grad shard."""
        if self._reducing is None:
            return
        reduction, self._reducing = self._reducing, None
        with Answered(self.mesh.rank, self._wants_reduce):
            reduction.ticket.wait()
        out = reduction.out.to(self._wide(self.precision.accumulate))
        self.grad_shard = out if self.grad_shard is None else self.grad_shard.add_(out)
        if not self.lifetime.grads_stay:
            self._buffer.release()

    def clear_gradients(self) -> None:
        """Forget everything accumulated since the last optimizer step."""
        self.settle()
        self.grad_shard = None
        self.has_gradient = False
        for piece in self.slices:
            piece.grad = None
        with torch._C.DisableTorchFunctionSubclass():
            for param in self._params:
                param.grad = None
        if self._gradient is not None:
            self._gradient.release()

    def expose_gradients(self) -> None:
        """Show the optimizer each slice's part of the grad shard."""
        assert self.grad_shard is not None and self.master is not None, f"{self.name}: no gradient"
        self.grad_shard = self.grad_shard.to(self.master.dtype)
        for piece, grad in zip(self.slices, self._cut(self.grad_shard), strict=True):
            piece.grad = grad

    # Accounting

    @property
    def parameter_bytes(self) -> int:
        """Bytes of parameters on this rank now."""
        full = self.nbytes_full if self.is_full else 0
        return full if self.lifetime.params_stay else full + self._store.nbytes

    @property
    def gradient_bytes(self) -> int:
        """Bytes of full gradients and gradient shards on this rank now."""
        full = self._gradient is not None and self._gradient.is_allocated
        total = self._gradient.nbytes_full if full and self._gradient is not None else 0
        if self.grad_shard is not None and not (full and self.lifetime.grads_stay):
            total += self.grad_shard.nbytes
        return total

    @property
    def master_bytes(self) -> int:
        """Bytes of master weights kept beside the parameters."""
        if self.master is None or self.master.dtype == self._full.tensor.dtype:
            return 0
        return self.master.nbytes


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a parameter lives: its unit and its place there."""

    unit: Unit
    index: int


# The one registry: from a parameter, whoever holds it, to its place. It owns neither of the two.
_SLOTS: MutableMapping[Tensor, tuple[weakref.ref[Unit], int]] = WeakIdKeyDictionary()


def slot_of(param: Tensor) -> Slot | None:
    """The parameter's place, or None if no engine manages it."""
    entry = _SLOTS.get(param)
    unit = entry[0]() if entry else None
    return None if entry is None or unit is None else Slot(unit, entry[1])


# The attribute by which a parameter keeps its unit until an engine takes the parameter over.
_OWNER = "_zeroshard_owner"


class _Owner:
    """Owns a unit that no engine owns yet; a pickled parameter leaves it behind."""

    __slots__ = ("unit",)

    def __init__(self, unit: Unit) -> None:
        self.unit = unit

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def keep_until_engine(unit: Unit, keeper: Keeper) -> None:
    """Let the parameters own their unit: there is data as long as there is a parameter of it."""
    owner = _Owner(unit)
    unit.keeper = keeper
    for member in unit.members:
        setattr(member.param, _OWNER, owner)


def _disown(param: Tensor) -> None:
    if hasattr(param, _OWNER):
        delattr(param, _OWNER)


def is_waiting(param: Tensor) -> bool:
    """Whether a parameter lives in shards but no engine manages it yet."""
    return vars(param).get(_OWNER) is not None


def plain(param: Tensor) -> Tensor:
    """The tensor that a parameter of any class is, detached: no method of the class is called."""
    with torch._C.DisableTorchFunctionSubclass():
        return Tensor.detach(param)


def full_shape(param: Tensor) -> torch.Size:
    """The shape of a parameter, whether it is full or freed."""
    slot = slot_of(param)
    return param.shape if slot is None else slot.unit.shapes[slot.index]


def full_nbytes(param: Tensor) -> int:
    """Bytes of a parameter when it is full."""
    return full_shape(param).numel() * param.dtype.itemsize


def restore(unit: Unit) -> Tensor:
    """Make the parameters of a unit ordinary and full again. A collective.

    Returns:
        The flat tensor that they are views of.
    """
    unit.gather()
    unit.wait()
    for param in unit._params:
        _SLOTS.pop(param)
        _disown(param)
    return unit._full.tensor


@dataclass(frozen=True, slots=True)
class _Piece:
    """What a unit is built of: a parameter, or a companion of one.

    ``own`` are its values, or None where those wait in shards: of ``unit``, as number ``index``.
    """

    shape: torch.Size
    dtype: torch.dtype
    own: Tensor | None = None
    unit: Unit | None = None
    index: int = 0


@dataclass(frozen=True, slots=True)
class _Pieces:
    """All that a unit is built of, parameters first, and where among that its companions are."""

    all: Sequence[_Piece]
    companions: Sequence[tuple[Companion, int]]

    def layout(self, mesh: Mesh, dtype: torch.dtype, *, as_bytes: bool) -> Layout:
        """Where they lie in a flat buffer of a dtype, or of bytes."""
        sizes = [piece.dtype.itemsize if as_bytes else 1 for piece in self.all]
        return Layout(
            numels=tuple(p.shape.numel() * size for p, size in zip(self.all, sizes, strict=True)),
            world=mesh.shard.size,
            align=max(1, _ALIGN_BYTES // dtype.itemsize),
        )

    def buffer(self, tensor: Tensor, layout: Layout, *, as_bytes: bool = False) -> FlatBuffer:
        """A flat tensor with views of them."""
        dtypes = [piece.dtype for piece in self.all] if as_bytes else None
        return FlatBuffer(tensor, layout, [piece.shape for piece in self.all], dtypes)

    def without_values(self) -> _Pieces:
        """The same without a hold on anything."""
        return replace(self, all=[replace(piece, own=None, unit=None) for piece in self.all])


def _pieces_of(members: Sequence[Member]) -> _Pieces:
    pieces = [_piece(member.param) for member in members]
    companions: list[tuple[Companion, int]] = []
    for index, member in enumerate(members):
        for companion in member.companions:
            piece = _companion_piece(companion.get(), pieces[index].unit)
            if _is_same(piece, pieces[index]):
                companions.append((companion, index))
            else:
                companions.append((companion, len(pieces)))
                pieces.append(piece)
    return _Pieces(pieces, companions)


def _piece(param: Tensor) -> _Piece:
    slot = slot_of(param) if is_waiting(param) else None
    if slot is None:
        return _Piece(param.shape, param.dtype, plain(param))
    return _Piece(slot.unit.shapes[slot.index], param.dtype, unit=slot.unit, index=slot.index)


def _companion_piece(tensor: Tensor, unit: Unit | None) -> _Piece:
    if unit is not None:
        for each in unit._beside:
            if tensor is each.placeholder:
                view = unit._full.views[each.at]
                return _Piece(view.shape, view.dtype, unit=unit, index=each.at)
    return _Piece(tensor.shape, tensor.dtype, tensor.detach())


def _is_same(one: _Piece, other: _Piece) -> bool:
    """Whether two are one memory."""
    if one.own is None or other.own is None:
        return one.own is other.own and one.unit is other.unit and one.index == other.index
    return one.own.data_ptr() == other.own.data_ptr() and one.shape == other.shape


def hand_back(unit: Unit, keeper: Keeper | None) -> None:
    """End an engine's hold of a unit: full parameters become ordinary, freed ones wait for another.

    Local, and the process groups of the unit's mesh may end afterwards. Without a keeper, nobody
    can gather what is freed any more.
    """
    unit.clear_gradients()
    unit._end_gather()
    unit.add_use = unit.drop_use = unit.use_here = unit.let_go = unit.engine = None
    if unit.lifetime.params_stay:
        unit.wait()
        for param in unit._params:
            _SLOTS.pop(param, None)
    elif keeper is not None:
        unit.free()
        unit.master, unit.slices, unit._gradient = None, (), None
        keeper.add(unit)


def build_unit(
    members: Sequence[Member],
    *,
    trained: bool,
    lifetime: Lifetime,
    mesh: Mesh,
    precision: Precision,
    as_bytes: bool = False,
) -> Unit:
    """Move parameters into a new unit, with the values of rank 0. A collective.

    Master weights are taken before the cast to the compute dtype, so nothing is rounded away.
    Parameters that wait for an engine are taken out of the shards in which they wait. Where
    parameters do not stay full, nothing here is larger than a shard.

    Args:
        members: the parameters.
        trained: whether an optimizer steps them.
        lifetime: when full parameters and gradients exist.
        mesh: the ranks.
        precision: the dtypes of parameters and gradients.
        as_bytes: keep parameters and companions as they are, each in its dtype; for frozen ones.
            See [Note: byte units].
    """
    assert not (trained and as_bytes), f"{members[0].name}: only frozen parameters are bytes"
    params = [member.param for member in members]
    pieces = _pieces_of(members)
    own_dtype = torch.uint8 if as_bytes else params[0].dtype
    compute = precision.compute if own_dtype.is_floating_point and precision.compute else own_dtype
    wide = torch.float64 if own_dtype == torch.float64 else precision.master
    layout = pieces.layout(mesh, compute, as_bytes=as_bytes)
    mine = layout.shard(mesh.shard.rank)
    part = Range(0, layout.full_numel) if lifetime.params_stay else mine
    full = gradient = None
    with torch.no_grad():
        # Without master weights, nobody asks for more digits than the compute dtype has.
        values = _values(pieces.all, layout, part, mesh, own_dtype if trained else compute)
        if lifetime.params_stay:
            full = values.to(compute)
            shard, values = full[mine.slice()], values[mine.slice()]
        else:
            shard = values.to(compute)
        pieces = pieces.without_values()
        _vacate(members, mesh)
        if full is None:
            full = torch.empty(layout.full_numel, dtype=compute, device=mesh.device)
        master = shard
        if trained and compute != wide:
            # Of a larger buffer only a part is kept, which must not keep the rest.
            master = values.to(wide, copy=lifetime.params_stay)
        if trained:
            kept = precision.accumulate if lifetime.grads_stay else precision.reduce
            buffer_dtype = torch.float64 if own_dtype == torch.float64 else kept
            flat = torch.empty(layout.full_numel, dtype=buffer_dtype, device=mesh.device)
            gradient = pieces.buffer(flat, layout)
            gradient.release()
    unit = Unit(
        members,
        lifetime,
        mesh,
        full=pieces.buffer(full, layout, as_bytes=as_bytes),
        store=DeviceStore(shard),
        master=master if trained else None,
        gradient=gradient,
        precision=precision,
        companions=pieces.companions,
    )
    for index, param in enumerate(params):
        _SLOTS[param] = (weakref.ref(unit), index)
    if lifetime.params_stay:
        unit.wait()
    else:
        unit.free()
    return unit


def _values(
    pieces: Sequence[_Piece], layout: Layout, part: Range, mesh: Mesh, dtype: torch.dtype
) -> Tensor:
    """The values of this rank's shard, or of the whole flat buffer."""
    own = [None if piece.own is None else _flat(piece.own, dtype) for piece in pieces]
    out = torch.zeros(part.numel, dtype=dtype, device=mesh.device)
    if any(values is not None for values in own):
        if part == layout.shard(mesh.shard.rank):
            deal(own, layout, out, mesh)
        else:
            for index, values in enumerate(own):
                if values is not None:
                    put(out, part, layout, index, values, 0)
            broadcast_(out, mesh)
    waiting: dict[Unit, list[tuple[int, int]]] = {}
    for index, piece in enumerate(pieces):
        if piece.unit is not None:
            waiting.setdefault(piece.unit, []).append((index, piece.index))
    for unit, places in waiting.items():
        old = unit.layout
        shard = unit._store.read(out.new_empty(old.shard_numel))
        for given, row in pass_round(shard, old, unit.mesh):
            for index, old_index in places:
                inside = old.within(old_index, given)
                start = old.full(old_index).start + inside.start - given.start
                values = row[start : start + inside.numel]
                put(out, part, layout, index, values, inside.start)
    return out


def _flat(values: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as a flat one, seen as bytes where those are wanted."""
    flat = values.reshape(-1)
    return flat.contiguous().view(dtype) if dtype == torch.uint8 else flat


def share_values(param: Tensor, mesh: Mesh) -> Tensor:
    """This rank's even share of a parameter that waits, or of rank 0's ordinary one. A collective.

    Parameters of one shape are divided alike, whatever units they are in.
    """
    layout = Layout(numels=(full_shape(param).numel(),), world=mesh.shard.size, align=1)
    with torch.no_grad():
        return _values([_piece(param)], layout, layout.shard(mesh.shard.rank), mesh, param.dtype)


def _vacate(members: Sequence[Member], mesh: Mesh) -> None:
    """Give back the memory that parameters have: their own, or the shards in which they wait."""
    for member in members:
        param = member.param
        if isinstance(param, FreedParameter):
            object.__setattr__(param, "__class__", type(param)._own_class)
        param.data = torch.empty(0, dtype=param.dtype, device=mesh.device)
        param.grad = None
        _disown(param)
        for companion in member.companions:
            companion.put(torch.empty(0, device=mesh.device))
