"""Units are made of parameters here, and parameters are given back."""

# The inside of a unit that is taken apart.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zeroshard.core.collectives import broadcast_
from zeroshard.core.depot import Depot, DeviceDepot
from zeroshard.core.flat import FlatBuffer
from zeroshard.core.freed import FreedParameter, freed_class
from zeroshard.core.layout import Layout, Range
from zeroshard.core.lifetime import Lifetime
from zeroshard.core.mesh import Mesh
from zeroshard.core.pending import PendingParameter
from zeroshard.core.pulled import withdraw
from zeroshard.core.reductions import withdraw_reductions
from zeroshard.core.slots import disown, enrol, full_shape, is_waiting, slot_of, strike
from zeroshard.core.store import ON_DEVICE, Place
from zeroshard.core.unit import Companion, Keeper, Member, Precision, Unit, plain
from zeroshard.core.values import deal, pass_round, put

__all__ = ["build_unit", "hand_back", "restore", "share_values"]

_ALIGN_BYTES = 16


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


def restore(unit: Unit) -> Tensor:
    """Make the parameters of a unit ordinary and full again. A collective.

    Returns:
        The flat tensor that they are views of.
    """
    unit.gather()
    unit.wait()
    strike(unit)
    return unit._full.tensor


def hand_back(unit: Unit, keeper: Keeper | None) -> None:
    """End an engine's hold of a unit: full parameters become ordinary, freed ones wait for another.

    Local, and the process groups of the unit's mesh may end afterwards. Without a keeper, nobody
    can gather what is freed any more.
    """
    unit.clear_gradients()
    unit._end_gather()
    withdraw([unit])
    withdraw_reductions([unit])
    unit.add_use = unit.drop_use = unit.use_here = unit.let_go = unit.engine = None
    if unit.lifetime.params_stay:
        unit.wait()
        strike(unit)
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
    state: Depot | None = None,
    shards: Place = ON_DEVICE,
    as_bytes: bool = False,
    together: Callable[[], AbstractContextManager[object]] = nullcontext,
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
        state: where master weights and the optimizer's state are kept; None is the device.
        shards: where the shard is kept if parameters do not stay full. One that is the master
            weights stays with them.
        as_bytes: keep parameters and companions as they are, each in its dtype; for frozen ones.
            See [Note: byte units].
        together: around what may fail on one rank alone, and raises on all of them then.

    Raises:
        OffloadError: there is no room off the device. The parameters are as they were.
    """
    assert not (trained and as_bytes), f"{members[0].name}: only frozen parameters are bytes"
    state = DeviceDepot(mesh.device) if state is None else state
    params = [member.param for member in members]
    pieces = _pieces_of(members)
    own_dtype = torch.uint8 if as_bytes else params[0].dtype
    compute = precision.compute if own_dtype.is_floating_point and precision.compute else own_dtype
    wide = torch.float64 if own_dtype == torch.float64 else precision.master
    layout = pieces.layout(mesh, compute, as_bytes=as_bytes)
    mine = layout.shard(mesh.shard.rank)
    part = Range(0, layout.full_numel) if lifetime.params_stay else mine
    is_master = trained and compute == wide and state.is_near
    place = ON_DEVICE if lifetime.params_stay or is_master else shards
    full = gradient = None
    with torch.no_grad():
        # Without master weights, nobody asks for more digits than the compute dtype has.
        kept = own_dtype if trained else compute
        is_far = not (place.is_near or (trained and state.is_near))
        values = _values(pieces.all, layout, part, mesh, kept, is_far=is_far)
        if lifetime.params_stay:
            full = values.to(compute)
            shard, values = full[mine.slice()], values[mine.slice()]
        else:
            shard = values.to(compute)
        with together():
            store, master = place.store(shard, mesh), shard
            if trained and not state.is_near:
                master = state.take(values.numel(), wide).copy_(values)
        pieces = pieces.without_values()
        _vacate(members, mesh)
        if full is None:
            full = torch.empty(layout.full_numel, dtype=compute, device=mesh.device)
        buffer = pieces.buffer(full, layout, as_bytes=as_bytes)
        if not lifetime.params_stay:
            buffer.release()
        if trained and state.is_near and compute != wide:
            # Of a larger buffer only a part is kept, which must not keep the rest.
            master = values.to(wide, copy=lifetime.params_stay)
        if trained:
            gradient = pieces.buffer(
                _gradient(own_dtype, layout, lifetime, mesh, precision), layout
            )
            gradient.release()
    unit = Unit(
        members,
        lifetime,
        mesh,
        full=buffer,
        store=store,
        master=master if trained else None,
        state=state,
        gradient=gradient,
        precision=precision,
        companions=pieces.companions,
        freed_class=freed_class,
        pending_class=PendingParameter,
    )
    enrol(unit)
    if lifetime.params_stay:
        unit.wait()
    else:
        unit.hide()
    return unit


def _gradient(
    own: torch.dtype, layout: Layout, lifetime: Lifetime, mesh: Mesh, precision: Precision
) -> Tensor:
    """Memory of the full gradient, in the dtype in which it is added up or sent."""
    dtype = precision.accumulate if lifetime.grads_stay else precision.reduce
    if own == torch.float64:
        dtype = own
    return torch.empty(layout.full_numel, dtype=dtype, device=mesh.device)


def _values(
    pieces: Sequence[_Piece],
    layout: Layout,
    part: Range,
    mesh: Mesh,
    dtype: torch.dtype,
    *,
    is_far: bool = False,
) -> Tensor:
    """The values of this rank's shard, or of the whole flat buffer.

    Those that are kept off the device, as ``is_far`` says, do not pass through it on one rank.
    """
    own = [None if piece.own is None else _flat(piece.own, dtype) for piece in pieces]
    device = torch.device("cpu") if is_far and mesh.world == 1 else mesh.device
    out = torch.zeros(part.numel, dtype=dtype, device=device)
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
        for given, row in pass_round(unit._store.home, old, unit.mesh):
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
        part = layout.shard(mesh.shard.rank)
        return _values([_piece(param)], layout, part, mesh, param.dtype)


def _vacate(members: Sequence[Member], mesh: Mesh) -> None:
    """Give back the memory that parameters have: their own, or the shards in which they wait."""
    for member in members:
        param = member.param
        if isinstance(param, FreedParameter):
            object.__setattr__(param, "__class__", type(param)._own_class)
        param.data = torch.empty(0, dtype=param.dtype, device=mesh.device)
        param.grad = None
        disown(param)
        for companion in member.companions:
            companion.put(torch.empty(0, device=mesh.device))
