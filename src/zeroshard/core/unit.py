"""A unit: parameters that are gathered, reduced and freed together, in one flat buffer.

[Note: flat units]
Five tensors, and no others, hold a unit on a rank:

    full           the whole flat buffer in the compute dtype; the parameters are views into it
    shard          this rank's range of it, kept by the store; part of ``full`` where that stays,
                   and off the device where the store says so
    master         this rank's range in the master dtype, which the optimizer steps; in the unit's
                   state depot, which may be off the device. The memory of ``shard`` itself where
                   the two dtypes are equal and neither is elsewhere
    full gradient  a flat buffer like ``full``; exists only while gradients are full, and not here
                   where the unit's reducer has room for it
    grad shard     the average over ranks of this rank's range, summed over micro-steps

``full`` and the full gradient own one storage for ever and give its memory back by resizing it to
zero. Views of it, those that autograd saved included, become valid again when the storage is
refilled: that is why backward needs no replacement parameters and no copy out of the collective. A
freed storage must never be reachable from outside (an operation on it reads unmapped memory), so a
freed parameter points at an empty placeholder instead; its ``nn.Parameter`` object stays the same.

The optimizer sees one slice of ``master`` per parameter, never the flat tensor: hyper-parameters
and state stay per parameter, and a frozen parameter cannot decay. For the same reason a unit is
uniform in dtype and in whether it is trained.

[Note: steps beside the computation]
Where state is off the device, a step takes as long as the bus takes for it, so it runs on streams
of its own while the computation goes on: the unit has the *ticket* of its step, and every verb that
touches parameters or gradients first makes the computation wait for it. Until then the gradient,
which the step reads, stays allocated. Master weights off the device are current only once the way
back has ended, too: whoever reads or edits them calls `at_home` first.

A step on the host reads the gradient there. It leaves while backward goes on, as soon as it is
reduced, and its memory on the device is given back; it returns for whoever asks for it.

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

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors
from torch.autograd.graph import increment_version
from torch.profiler import record_function

from zeroshard.core.collectives import (
    DONE,
    MEAN,
    Answered,
    Averaging,
    Ticket,
)
from zeroshard.core.depot import Depot
from zeroshard.core.flat import FlatBuffer
from zeroshard.core.layout import Range
from zeroshard.core.lifetime import Lifetime
from zeroshard.core.mesh import Mesh
from zeroshard.core.norm import row_norms
from zeroshard.core.reducer import CollectiveReduction, Reducer
from zeroshard.core.store import DeviceStore, Store
from zeroshard.core.transport import COLLECTIVE, Transport
from zeroshard.errors import OffloadError, UsageError, compose

__all__ = [
    "COMING",
    "Coming",
    "Companion",
    "Holdings",
    "Keeper",
    "Member",
    "Precision",
    "Unit",
    "plain",
]

_NO_SPAN: Final = nullcontext()

COMING: Final = "_zeroshard_coming"
"""The attribute of a parameter that has its values while they are on their way."""


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


class Keeper(Protocol):
    """Who answers for the units that no engine manages yet."""

    def add(self, unit: Unit) -> None:
        """Take a unit in."""
        ...

    def read(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Call a function that needs the values of freed parameters."""
        ...


@dataclass(frozen=True, slots=True)
class _Beside:
    """A companion, which view of the flat buffer it is, and what is shown while that is freed."""

    companion: Companion
    at: int
    placeholder: Tensor


@dataclass(frozen=True, slots=True)
class Holdings:
    """The tensors that hold a unit on the device now. See [Note: flat units]."""

    parameters: tuple[Tensor, ...]
    master: Tensor | None
    grad_shard: Tensor | None
    full_gradient: Tensor | None


@dataclass(frozen=True, slots=True)
class _Reduction:
    """An averaging under way; keeps its two ends alive.

    ``norms`` are those of the rows of ``out``, where they are computed on the way.
    """

    ticket: Ticket
    out: Tensor
    wire: Tensor
    norms: list[Tensor] | None


@dataclass(frozen=True, slots=True)
class _Away:
    """A gradient in memory of the host, and the end of its way there."""

    home: Tensor
    left: Ticket


@dataclass(frozen=True, slots=True)
class _Arrived:
    """Gradients that wait for the unit's turn, and of which parameters they are."""

    indices: list[int]
    grads: list[Tensor]


@dataclass(frozen=True, slots=True)
class Coming:
    """The values of a parameter on their way, also for one that outlives its unit."""

    unit: weakref.ref[Unit]
    ticket: Ticket
    values: Tensor

    def arrive(self, param: Tensor) -> None:
        """Wait for the values, and give them to the parameter."""
        unit = self.unit()
        if unit is not None:
            unit.wait()
            return
        self.ticket.wait()
        param.__class__ = nn.Parameter
        param.data = self.values
        del vars(param)[COMING]


class Unit:
    """Parameters that are gathered, reduced and freed together. See [Note: flat units].

    All verbs but ``gather`` and ``reduce`` are local. Those two are collectives: every rank of the
    mesh issues them in the same order, which is the schedule's business. With a transport that
    gathers alone, ``gather`` is local, too.
    """

    _grad_shard: Tensor | None
    _away: _Away | None  # instead of the grad shard
    _norms: list[Tensor] | None  # of its rows, where they are known

    def __init__(  # noqa: PLR0913 - tensors, and what describes them
        self,
        members: Sequence[Member],
        lifetime: Lifetime,
        mesh: Mesh,
        *,
        full: FlatBuffer,
        store: Store,
        master: Tensor | None,
        state: Depot,
        gradient: FlatBuffer | None,
        precision: Precision,
        companions: Sequence[tuple[Companion, int]],
        freed_class: Callable[[type[nn.Parameter]], type[nn.Parameter]],
        pending_class: type[nn.Parameter],
    ) -> None:
        self.members = tuple(members)
        self.layout, self.lifetime, self.mesh = full.layout, lifetime, mesh
        self.master, self.state, self.precision = master, state, precision
        self._full, self._store, self._gradient = full, store, gradient
        self.transport: Transport = COLLECTIVE
        self.reducer: Reducer = CollectiveReduction(mesh, precision.averaging)
        self._params = [member.param for member in members]
        self._classes = [type(param) for param in self._params]
        self._freed_class, self._pending_class = freed_class, pending_class
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
        self._writing: Ticket = DONE  # of master weights, which may not change meanwhile
        self._leaving: Tensor | None = None  # the shard that a step writes, on its way out
        self._num_users = 0  # of the full buffer's memory, before it was gathered
        self._is_readable = self._is_outlined = self._is_deferred = False
        self._own_users = 0  # of that memory; see `note_users`
        self._reducing: _Reduction | None = None
        self._arrived: _Arrived | None = None
        self._sources: list[Tensor] = []  # of copies behind the computation, alive until they end
        self._step: Ticket = DONE  # see [Note: steps beside the computation]
        self._spent: list[Tensor] = []  # gradients that the step under way reads
        # Set by the optimizer: waits until the state of all units is in its depot.
        self.recall: Callable[[bool], object] | None = None
        # Set by the optimizer for a backward that ends an accumulation: takes what was reduced.
        self.on_reduced: Callable[[Unit], object] | None = None
        # Whether there is a full gradient, and whether it may have digits that no addend of it has.
        self.has_gradient = self._is_sum = False
        self._grad_shard = self._away = self._norms = None
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

    @property
    def reads_as_published(self) -> bool:
        """Whether `publish` starts a gather, with other ranks or of a shard that lies elsewhere."""
        if self.gathers_alone:
            return False
        if self.lifetime.params_stay:
            return self.mesh.shard.size > 1
        return self._num_holds > 0

    def stored(self, index: int) -> Tensor:
        """This rank's slice of a parameter, as gathers read it."""
        return self.part_of(self._store.home, index)

    def part_of(self, shard: Tensor, index: int) -> Tensor:
        """What belongs to a parameter in a tensor that is laid out as a shard is, flat."""
        part = shard[self.layout.slice_of(index, self.mesh.shard.rank).slice()]
        return part.view(self._placeholders[index].dtype) if self._is_bytes else part

    def owned(self, index: int, rank: int) -> Range:
        """The part of a parameter that a rank owns, in the parameter's own elements."""
        start, stop = self.layout.owned(index, rank)
        size = self._placeholders[index].element_size() if self._is_bytes else 1
        return Range(start // size, stop // size)

    @property
    def gathers_alone(self) -> bool:
        """Whether a gather asks nothing of the other ranks."""
        return self.transport.memory is not None

    @property
    def store(self) -> Store:
        """What keeps the shard."""
        return self._store

    @property
    def is_shard_near(self) -> bool:
        """Whether the shard is kept on the device."""
        return bool(self._store.tensors)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the shard and of the full buffer: the one computed in, or bytes."""
        return self._full.tensor.dtype

    def rehouse(self, memory: Tensor, transport: Transport) -> None:
        """Keep the shard in other memory from now on, and gather it in another way.

        For units that are freed after use: the shard of others is a part of their full parameters.
        """
        self._end_gather()
        shard = self._store.home
        memory.copy_(shard)
        if self.master is not None and self.master.data_ptr() == shard.data_ptr():
            self.master = memory
            self.show_slices(memory)
        self._store, self.transport = DeviceStore(memory), transport

    @property
    def can_share_master(self) -> bool:
        """Whether the shard can be the master weights, too: it is on the device in their dtype."""
        return (
            self.master is not None
            and self.is_shard_near
            and self.master.dtype == self._full.tensor.dtype
        )

    def rehouse_state(self, state: Depot) -> None:
        """Keep the master weights in a depot of the device from now on, or in the shard itself.

        For the host to call when nothing is on its way to or from the depot that they leave. What
        else the optimizer has of the unit there is left to be brought.
        """
        old, before = self.master, self.state
        assert old is not None and state.is_near, f"{self.name}: state comes to the device only"
        if self.can_share_master:
            (master,) = self._store.tensors
        else:
            master = state.take(old.numel(), old.dtype)
            master.copy_(old)
        self.master, self.state = master, state
        self.show_slices(master)
        before.give_back(old)

    def _span(self, verb: str) -> AbstractContextManager[object]:
        """What a profile shows, if there is one, of what is started inside."""
        if not torch.autograd._profiler_enabled():
            return _NO_SPAN
        return record_function(f"zeroshard::{verb} ({self.name})")

    def gather(self) -> None:
        """Start making the parameters full. A collective over the shard axis, or a pull."""
        self.check_present()
        self._end_gather()
        with self._span("gather"):
            self._full.allocate()
            self._num_users = self._full.num_users
            with Answered(self.mesh.rank, self._wants_gather):
                self._gathering = self._store.feed(self._mine, self._gather_with)

    def _gather_with(self, shard: Tensor) -> Ticket:
        return self.transport.gather(self._full.tensor, shard, self.mesh.shard)

    def end_step(self) -> None:
        """Let the computation wait for a step that runs beside it."""
        if self._step is not DONE:
            step, self._step = self._step, DONE
            step.wait()
            self._spent.clear()
            if self._gradient is not None:
                self._gradient.release()

    def at_home(self, *, edits: bool = False) -> None:
        """Wait until the master weights and the optimizer's state are where they are kept.

        Args:
            edits: they are about to be changed there, so nothing that was read ahead holds.
        """
        self.await_step()
        if self.recall is not None:
            self.recall(edits)

    def await_step(self) -> None:
        """Let the current stream wait for a step under way; the computation still waits, too."""
        self._step.wait()

    def _end_gather(self) -> None:
        self.end_step()
        writing, self._writing = self._writing, DONE
        writing.wait()
        if self._gathering is not DONE:
            gathering, self._gathering = self._gathering, DONE
            with Answered(self.mesh.rank, self._wants_gather):
                gathering.wait()
            if not self.lifetime.params_stay:  # else nobody ever counts
                del gathering
                self._full.await_users(self._num_users)

    def wait(self) -> None:
        """Make the parameters readable; the unit must be full or on the way."""
        self._end_gather()
        self._require_shards()
        if not self._is_readable:
            self._end_deferral()
            self._show_full()
            self._is_readable = True

    def _show_full(self) -> None:
        self._show(self._full.views[: len(self._params)])
        for each in self._beside:
            each.companion.put(self._full.views[each.at])

    def await_views(self) -> Sequence[Tensor]:
        """The full parameters, which must be on the way, while the parameters stay empty."""
        self._end_gather()
        self._require_shards()
        return self._full.views[: len(self._params)]

    def _require_shards(self) -> None:
        """Refuse to read what was gathered without this rank's shard."""
        if self._store.failure is not None:
            raise OffloadError(str(self._store.failure)) from self._store.failure

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
        self._end_deferral()
        placeholders = self._placeholders
        for param, own_class, placeholder in zip(
            self._params, self._classes, placeholders, strict=True
        ):
            param.data = placeholder
            param.__class__ = self._freed_class(own_class)
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
        """The tensors on the device that may be moved between two passes, after :meth:`park`."""
        self.settle()
        self._spill()
        self._rejoin()
        self._end_gather()
        full = (self._full.tensor,) if self.is_full else ()
        has_buffer = self._gradient is not None and self._gradient.is_allocated
        return Holdings(
            parameters=(*full, *self._store.tensors),
            master=self.master if self.state.is_near else None,
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
        edits = self._count_edits()
        if edits == self._versions:  # as in almost every step of almost every loop
            return []
        counts = zip(self.members, self._versions, edits, strict=True)
        return [member.name for member, before, now in counts if now != before]

    def outline(self) -> None:
        """Give freed parameters their shapes back, without memory and without a gather.

        For modules whose backward never reads the weight: autograd wants to see its shape, no more.
        """
        if self.is_full:
            return
        self._show(self._outlines)
        self._is_outlined = True

    @cached_property
    def _outlines(self) -> list[Tensor]:
        """Tensors of the parameters' shapes that have one value in all places: no number."""
        return [
            empty.new_full((), torch.nan if empty.is_floating_point() else 0).expand(shape)
            for empty, shape in zip(self._placeholders, self.shapes, strict=True)
        ]

    def _show(self, tensors: Sequence[Tensor]) -> None:
        for param, own_class, tensor in zip(self._params, self._classes, tensors, strict=True):
            param.__class__ = own_class
            param.data = tensor

    def shard_to_write(self) -> Tensor | None:
        """Where gathers read, now that none does, for a step that writes it and the master weights.

        For a shard off the device it is memory of this step alone, which :meth:`publish` sends.

        Returns:
            None where it is the master weights themselves.
        """
        assert self.master is not None, f"{self.name} is frozen and has no master weights"
        self._end_gather()
        if not self.is_shard_near:
            self._leaving = self._full.tensor.new_empty(self.layout.shard_numel)
            return self._leaving
        (shard,) = self._store.tensors
        return None if shard.data_ptr() == self.master.data_ptr() else shard

    def write_shard(self, shard: Tensor) -> Ticket:
        """Start to put stepped weights where gathers read, in order with the current stream.

        Returns:
            The end of the use of ``shard``, which may not be changed or freed before.
        """
        return self._store.write(shard)

    def publish(self, *, is_written: bool = False, step: Ticket = DONE) -> None:
        """Put the stepped master weights where gathers read; start one where parameters stay.

        The gather may run on under the next forward: whoever reads a parameter waits for it. Where
        this rank gathers alone it does not start, as others may not have published: see `catch_up`.

        Args:
            is_written: the step has put them there itself.
            step: its end, if it runs beside the computation, on the stream that is current. Then
                `show_stepped` follows on the stream of the computation.
        """
        if is_written:
            self._send_shard()
            self._note_edit()
        else:
            self.write_master()
        if self.gathers_alone or not (self.lifetime.params_stay or self._num_holds):
            self.free()
            self._step = step
            return
        self.wait()  # where nobody has touched it since the last step; users are counted alike
        num_users = self._full.num_users
        self.gather()
        self._step = step
        # Who kept a view of the memory reads it without a word; a class of its own has its ways.
        self._own_users = min(self._own_users, num_users)
        is_ours = num_users == self._own_users and set(self._classes) == {nn.Parameter}
        coming = step if self._gathering is DONE else self._gathering
        if is_ours and not self._num_holds and coming is not DONE:
            self._defer(coming)
        elif step is DONE:  # else it is not this stream that is to wait: see `show_stepped`
            self.wait()

    def show_stepped(self) -> None:
        """Let the computation wait for a step that runs beside it, if no reader will."""
        if self.is_full and not self._is_deferred:
            self.wait()

    def _send_shard(self) -> None:
        leaving, self._leaving = self._leaving, None
        if leaving is not None:
            self.mesh.parcels.send(leaving, self._store.write(leaving))

    def _defer(self, coming: Ticket) -> None:
        """Let whoever touches a parameter wait for its values.

        Parameters have no numbers meanwhile, for those who read memory without touching them.
        """
        views = self._full.views[: len(self._params)]
        for param, outline, view in zip(self._params, self._outlines, views, strict=True):
            param.data = outline
            param.__class__ = self._pending_class
            vars(param)[COMING] = Coming(weakref.ref(self), coming, view)
        self._is_readable, self._is_deferred = False, True

    def _end_deferral(self) -> None:
        if self._is_deferred:
            self._is_deferred = False
            for param in self._params:
                vars(param).pop(COMING, None)

    def note_users(self) -> None:
        """Take whoever refers to the full parameters' memory now for a part of the engine."""
        self._own_users = self._full.num_users

    def catch_up(self) -> None:
        """After every rank has published, let what this rank holds full be what was published."""
        if self.gathers_alone and self.is_full:
            self.gather()
            self.wait()

    def write_master(self) -> None:
        """Put the master weights where gathers read."""
        assert self.master is not None, f"{self.name} is frozen and has no master weights"
        self._end_gather()
        self._writing = self._store.write(self.master)
        self._note_edit()

    def end_gather(self) -> None:
        """Let the computation wait for a gather under way, if any."""
        self._end_gather()

    def _note_edit(self) -> None:
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
        if self.master is None or not self.lifetime.params_stay:
            return False
        if self.master.data_ptr() == self._mine.data_ptr():
            return False
        self.at_home()
        made = self.master.to(self._mine.device).to(self._mine.dtype)
        return bool(((self._mine != made) & ~made.isnan()).any())

    def adopt(self, edit: Callable[[Tensor], object]) -> None:
        """Edit the full parameters in place and keep the result in shard and master weights.

        Raises:
            UsageError: at the end, data of another shape or dtype was given to a parameter.
        """
        assert self.is_full, f"{self.name} is edited while freed"
        misfits = self._take_replaced()
        num_users = self._full.num_users
        edit(self._full.tensor)
        if not self.lifetime.params_stay:
            self._full.await_users(num_users)
        mine = self._mine
        self._store.write(mine).wait()
        if self.master is not None and self.master.data_ptr() != mine.data_ptr():
            self.at_home(edits=True)
            # What was not edited keeps the digits that the compute dtype cannot hold.
            master = self.master.to(mine.device)
            same = master.to(mine.dtype) == mine
            self.master.copy_(torch.where(same, master, mine.to(master.dtype)))
        self._versions = self._count_edits()
        if misfits:
            hint = "give the module a new parameter instead."
            raise UsageError(compose(misfits[0], hint=hint))

    # Saving and loading

    def read_kept(self) -> Tensor:
        """This rank's range with all digits that are kept: master weights, or a frozen shard."""
        if self.master is not None:
            self.at_home()
            return self.master
        return self._store.home

    def load_kept(self, values: Tensor) -> None:
        """Replace this rank's range by what has been read; gathers see it from now on."""
        if self.master is not None:
            self.at_home(edits=True)
            if values.data_ptr() != self.master.data_ptr():
                self.master.copy_(values)
            self.write_master()
        else:
            self._store.write(values).wait()
            self._versions = self._count_edits()

    def resume_gradient(self, reduced: Tensor) -> None:
        """Go on with an accumulation, of which ranks have averaged what came before."""
        assert self.is_trained, f"{self.name} is frozen and takes no gradients"
        self.grad_shard = reduced.to(self._wide(self.precision.accumulate))
        self._norms = None

    def resume_unreduced(self) -> Sequence[Tensor]:
        """Go on with an accumulation, of which this rank alone has what came before.

        Returns:
            The full gradient of each parameter, zeros, to be filled.
        """
        self._fresh_gradient().tensor.zero_()
        self.has_gradient = self._is_sum = True
        return self._buffer.views

    def _take_replaced(self) -> list[str]:
        """Take in what somebody gave a parameter as its ``data``, in place of the view of it.

        Returns:
            What is wrong with those that have another shape or dtype; they are as before.
        """
        misfits: list[str] = []
        if not self._is_readable:
            return misfits
        for member, view in zip(self.members, self._full.views, strict=False):
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

    @property
    def grad_shard(self) -> Tensor | None:
        """The average over ranks of this rank's range; what is on the host comes back for it."""
        if self._away is not None:
            away, self._away = self._away, None
            away.left.wait()
            self._grad_shard = torch.empty_like(away.home, device=self.mesh.device)
            self._grad_shard.copy_(away.home)
        return self._grad_shard

    @grad_shard.setter
    def grad_shard(self, value: Tensor | None) -> None:
        self._grad_shard, self._away = value, None

    @property
    def away_gradient(self) -> Tensor | None:
        """The grad shard in memory of the host, if it was sent there."""
        return None if self._away is None else self._away.home

    def send_gradient(self, home: Tensor) -> None:
        """Let the grad shard be in memory of the host, beside the computation.

        Args:
            home: of its length and dtype, and nobody else's until the gradient is cleared.
        """
        grad = self.grad_shard
        assert grad is not None, f"{self.name}: no gradient"
        if self._norms is None:
            self._norms = row_norms(grad)
        outgoing = self.mesh.outgoing
        with outgoing.entered():
            home.copy_(grad, non_blocking=True)
        outgoing.outlive(grad)
        self._grad_shard, self._away = None, _Away(home, outgoing.end())
        if self.lifetime.grads_stay:
            self._buffer.release()

    def collect(self, behind: bool = False) -> bool:
        """Add the gradients that arrived to the full gradient; say whether there were any.

        Args:
            behind: do it behind the computation; for gradients that are reduced at once.
        """
        with torch._C.DisableTorchFunctionSubclass():
            grads = [param.grad for param in self._params]
        arrived = [index for index, grad in enumerate(grads) if grad is not None]
        if not arrived:
            return False
        given = [self._checked(index, grad) for index, grad in enumerate(grads) if grad is not None]
        with torch._C.DisableTorchFunctionSubclass():
            for index in arrived:
                self._params[index].grad = None
        if self.reducer.in_turn and not self.has_gradient:
            self._arrived, self.has_gradient = _Arrived(arrived, given), True
            return True
        self._spill()
        if not self.has_gradient:
            self._fresh_gradient()
        if behind and self.mesh.copying.exists:
            with self.mesh.copying.entered():
                self._fill(arrived, given)
            self._sources += given
        else:
            self._rejoin()
            self._fill(arrived, given)
        self.has_gradient = True
        return True

    def _fill(self, arrived: list[int], given: list[Tensor]) -> None:
        """Copy gradients into the full gradient, or add them to what it has."""
        self._is_sum = self.has_gradient
        if self.has_gradient:
            torch._foreach_add_([self._buffer.views[index] for index in arrived], given)
        else:
            self._write(self._buffer, arrived, given)

    def _write(self, buffer: FlatBuffer, arrived: list[int], given: list[Tensor]) -> None:
        """Copy gradients into a buffer of undefined content; what has none is zero."""
        others = set(range(len(self._params))).difference(arrived)
        zeroed = [*buffer.gaps, *(buffer.views[index] for index in sorted(others))]
        if zeroed:
            torch._foreach_zero_(zeroed)
        torch._foreach_copy_([buffer.views[index] for index in arrived], given)

    def _spill(self) -> None:
        """Copy gradients that wait for the unit's turn into the full gradient of its own."""
        if self._arrived is not None:
            arrived, self._arrived = self._arrived, None
            self._write(self._fresh_gradient(), arrived.indices, arrived.grads)

    def _rejoin(self) -> None:
        """Let the computation wait for gradients that are copied behind it."""
        if self._sources:
            self.mesh.copying.join()
            self._sources.clear()

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Dtype of the full gradient."""
        return self._buffer.tensor.dtype

    def unreduced(self, index: int) -> Tensor | None:
        """What this rank alone has of a parameter's gradient since the last reduction, if any."""
        self._spill()
        self._rejoin()
        self._is_sum = True  # whoever has it may edit it
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
        self.end_step()
        self.settle()
        if self._grad_shard is not None and self.lifetime.grads_stay:
            # The last reduction of this step left its result in the buffer.
            self._grad_shard = self._grad_shard.clone()
        self._buffer.allocate()
        return self._buffer

    def reduce(self) -> None:
        """Start averaging the full gradient over all ranks, zeros if none. A collective."""
        with self._span("reduce"):
            out, wire = self._write_in_turn() if self.reducer.in_turn else self._write_own()
            with Answered(self.mesh.rank, self._wants_reduce), self.mesh.copying.entered():
                ticket = self.reducer.start(out, wire)
                self._reducing = self._watched(ticket, out, wire)
        self.has_gradient = False

    def _write_own(self) -> tuple[Tensor, Tensor]:
        """Memory for the result, and the full gradient to be reduced."""
        if not self.has_gradient:
            self._fresh_gradient().tensor.zero_()
        self.settle()
        full, dtype = self._buffer.tensor, self._wide(self.precision.reduce)
        if full.dtype != dtype:
            self._rejoin()
        wire = full.to(dtype)
        mine = wire[self.layout.shard(self.mesh.shard.rank).slice()]
        # A gradient that stays is reduced in place; one that goes leaves its shard behind.
        in_place = wire is full and self.lifetime.grads_stay
        if in_place:
            return mine, wire
        # Where nothing is averaged, what arrived once has no more digits than it came with.
        is_exact = self.mesh.world == 1 and not self._is_sum and self.precision.averaging == MEAN
        is_wider = dtype.itemsize > self.dtype.itemsize
        return torch.empty_like(mine, dtype=self.dtype if is_exact and is_wider else dtype), wire

    def _write_in_turn(self) -> tuple[Tensor, Tensor]:
        """The same where the reducer has room for the full gradient.

        The result is in the dtype of the accumulation: the sum has digits that the wire has not.
        """
        self.end_step()
        self.settle()
        numel, dtype = self.layout.shard_numel, self._wide(self.precision.accumulate)
        out = torch.empty(numel, dtype=dtype, device=self.mesh.device)
        arrived, self._arrived = self._arrived, None
        with self.mesh.copying.entered():
            with Answered(self.mesh.rank, self._wants_reduce):
                room = self.reducer.room()
            assert room is not None, "there is a place for every turn"
            if arrived is not None:
                self._write(room, arrived.indices, arrived.grads)
            elif self.has_gradient:
                room.tensor.copy_(self._buffer.tensor)
            else:
                room.tensor.zero_()
        if arrived is not None and self.mesh.copying.exists:
            self._sources += arrived.grads
        return out, room.tensor

    def _watched(self, ticket: Ticket, out: Tensor, wire: Tensor) -> _Reduction:
        """A reduction with what follows it beside the computation.

        Unless more is added to it, the norm of what it brings is that of the gradient.
        """
        beside = self.mesh.measuring
        if not beside.exists:
            return _Reduction(ticket, out, wire, None)
        with beside.entered():
            ticket.wait()
            norms = row_norms(out) if self.grad_shard is None else None
        return _Reduction(beside.end(), out, wire, norms)

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
        self._sources.clear()  # copied before the reduction began
        out, wide = reduction.out, self._wide(self.precision.accumulate)
        self._norms = reduction.norms if self.grad_shard is None else None
        if self.grad_shard is not None:
            self.grad_shard = self.grad_shard.to(wide).add_(out)
        else:
            # A single addend loses nothing in a narrower dtype, and whoever steps reads less.
            self.grad_shard = out if out.dtype.itemsize < wide.itemsize else out.to(wide)
        if not self.lifetime.grads_stay:
            self._buffer.release()
        if self.on_reduced is not None:
            self.on_reduced(self)

    def gradient_norms(self) -> Sequence[Tensor]:
        """L2 norms of the rows of the grad shard, none if there is none."""
        if self._norms is not None:
            return self._norms
        return () if self.grad_shard is None else row_norms(self.grad_shard)

    def widen_gradient(self) -> None:
        """Let the grad shard hold values of the accumulation's dtype, for one that edits it."""
        self._norms = None
        if self.grad_shard is not None:
            self.grad_shard = self.grad_shard.to(self._wide(self.precision.accumulate))

    def clear_gradients(self, *, is_read: bool = False) -> None:
        """Forget everything accumulated since the last optimizer step.

        Args:
            is_read: by a step beside the computation, until which the memory stays.
        """
        self.settle()
        self._rejoin()
        if is_read and self._grad_shard is not None:
            self._spent.append(self._grad_shard)
        self.grad_shard = self._norms = self._arrived = None
        self.has_gradient = False
        for piece in self.slices:
            piece.grad = None
        with torch._C.DisableTorchFunctionSubclass():
            for param in self._params:
                param.grad = None
        # While a step is under way there is no other gradient than the one that it reads.
        if self._gradient is not None and not is_read and self._step is DONE:
            self._gradient.release()

    def expose_gradients(self) -> None:
        """Show the optimizer, which is about to step, each slice's part of the grad shard."""
        self._end_gather()  # it may read the master weights
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
        if self._grad_shard is not None and not (full and self.lifetime.grads_stay):
            total += self._grad_shard.nbytes
        return total

    @property
    def most_gradient_bytes(self) -> int:
        """Most bytes of this rank's gradient between backward and step."""
        if self.lifetime.grads_stay:
            return self._buffer.nbytes_full
        dtypes = self.precision.reduce, self.precision.accumulate
        return self.layout.shard_numel * max(self._wide(dtype).itemsize for dtype in dtypes)

    @property
    def master_bytes(self) -> int:
        """Bytes of master weights kept on the device, beside the parameters."""
        if self.master is None or not self.state.is_near:
            return 0
        return 0 if self.can_share_master else self.master.nbytes


def plain(param: Tensor) -> Tensor:
    """The tensor that a parameter of any class is, detached: no method of the class is called."""
    coming: Coming | None = vars(param).get(COMING)
    if coming is not None:
        coming.arrive(param)
    with torch._C.DisableTorchFunctionSubclass():
        return Tensor.detach(param)
