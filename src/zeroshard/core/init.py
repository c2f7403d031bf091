"""Shards the parameters of modules as they are built, so that no rank ever holds a whole model.

[Note: noticing construction]
A module is finished when the outermost ``__init__`` of that object returns: only then have all
classes of it made their parameters. That moment belongs to ``type.__call__``, and ``nn.Module`` has
no metaclass where one could stand in; a wrapped ``nn.Module.__init__`` returns too early, as a
constructor calls ``super().__init__()`` first. So, while a context is active, the ``__init__`` of
every module class is wrapped, those of classes made meanwhile included, and the wrapper that was
entered first for an object knows when it is finished. A copy is made without ``__init__``; it is
finished by ``__setstate__``. The outermost context undoes everything.

[Note: reading inside constructors]
Constructors read and edit parameters of modules that are finished: to initialise them, to tie or
reparametrise them, to copy them. Inside a context a read makes the parameters of that module
ordinary and full again, and they are sharded anew, with the values of rank 0, before the next such
read, at the end of the constructor that is running, or later where somebody still keeps a view of
their memory. So an edit is never lost, and about one module is full at a time. The shape of a
parameter is known without its data.

All ranks run the same constructors: every step here is a collective.
"""

# Reference counts of storages have no public name.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import functools
import gc
import itertools
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from zeroshard.core import tree
from zeroshard.core.building import build_unit, restore
from zeroshard.core.collectives import all_reduce_
from zeroshard.core.freed import FreedParameter, attribute, shows_shape, stand_in
from zeroshard.core.host import trim
from zeroshard.core.lifetime import Lifetime
from zeroshard.core.mesh import Mesh
from zeroshard.core.slots import is_waiting, slot_of
from zeroshard.core.store import ON_DEVICE, Place
from zeroshard.core.unit import Member, Precision
from zeroshard.core.waiting import Waiting

__all__ = ["Sharding", "shard_module", "sharded_construction", "suspended"]


@dataclass(frozen=True, slots=True)
class Sharding:
    """How parameters are sharded: over which ranks, and in which dtype given their own.

    ``shards`` is where their shards wait, and ``waiting`` keeps them until there is an engine.
    """

    mesh: Mesh
    lifetime: Lifetime
    dtype_of: Callable[[torch.dtype], torch.dtype]
    shards: Place = ON_DEVICE
    waiting: Waiting = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "waiting", Waiting(self.mesh))


# Free memory that the process may keep while a model is built.
_TRIM_BYTES: Final = 32 * 2**20
# Ranks gather units in the order of names, so names must be unique and equal on all ranks.
_NUMBERS: Final = itertools.count(1)


def shard_module(module: nn.Module, sharding: Sharding) -> None:
    """Shard an existing module in place, one module inside it at a time. A collective."""
    for each in module.modules():
        _shard(_own(each), sharding)
        trim()


def _own(module: nn.Module) -> list[Member]:
    """The ordinary parameters that a module itself holds, with new names."""
    own = [(n, p) for n, p in module.named_parameters(recurse=False) if _is_ordinary(p)]
    if not own:
        return []
    label = f"{type(module).__name__}#{next(_NUMBERS)}"
    return [Member(f"{label}.{name}", param) for name, param in own]


def _is_ordinary(param: Tensor) -> bool:
    """Whether there is a full parameter to shard.

    Those without values and those of other classes, lazy and quantised ones, wait for the engine.
    """
    return type(param) is nn.Parameter and not param.is_meta and slot_of(param) is None


def _shard(members: Iterable[Member], sharding: Sharding) -> None:
    groups: dict[torch.dtype, list[Member]] = {}
    for member in members:
        groups.setdefault(member.param.dtype, []).append(member)
    mesh, lifetime = sharding.mesh, sharding.lifetime
    for own_dtype, group in groups.items():
        dtype = sharding.dtype_of(own_dtype)
        if lifetime.params_stay:
            # A shard would be the whole: the parameters remain those of an ordinary model.
            for member in group:
                member.param.data = member.param.data.to(mesh.device, dtype)
            continue
        precision = Precision(compute=dtype)
        unit = build_unit(
            group,
            trained=False,
            lifetime=lifetime,
            mesh=mesh,
            precision=precision,
            shards=sharding.shards,
        )
        sharding.waiting.add(unit)


# Reading ------------------------------------------------------------------------------------------

# What shows neither values nor shape.
_BLIND: Final = frozenset(
    {
        Tensor.__hash__,
        Tensor.__repr__,
        Tensor.element_size,
        Tensor.is_complex,
        Tensor.is_floating_point,
        Tensor.register_hook,
        Tensor.register_post_accumulate_grad_hook,
        Tensor.requires_grad_,
        torch._has_compatible_shallow_copy_type,
        torch.is_complex,
        torch.is_floating_point,
    }
)
_VALUE_ATTRIBUTES: Final = frozenset({"H", "T", "data", "imag", "mH", "mT", "real"})


@dataclass(frozen=True, slots=True, eq=False)
class _Opened:
    """Parameters that were sharded and are ordinary for now."""

    members: Sequence[Member]
    memory: Tensor
    num_users: int

    @property
    def is_aliased(self) -> bool:
        """Whether somebody keeps a view of the memory, and may edit the parameters through it."""
        return _num_users(self.memory) > self.num_users


def _num_users(tensor: Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def _open(param: Tensor) -> _Opened:
    slot = slot_of(param)
    assert slot is not None, "a parameter that waits for an engine has a unit"
    members, memory = slot.unit.members, restore(slot.unit)
    del slot  # and with it the unit, which has views of the memory
    return _Opened(members, memory, _num_users(memory))


# Construction -------------------------------------------------------------------------------------


class _Construction:
    """One active context: which modules are being built, and which it has finished."""

    def __init__(self, sharding: Sharding) -> None:
        self._sharding = sharding
        self._running: list[nn.Module] = []  # innermost last
        self._finished: MutableMapping[nn.Module, None] = WeakIdKeyDictionary()
        self._opened: list[_Opened] = []
        self._freed_bytes = 0  # since they were given back to the operating system
        self._is_over = False

    def is_running(self, module: nn.Module) -> bool:
        """Whether a constructor of this very object has been entered."""
        return any(module is each for each in self._running)

    @contextmanager
    def building(self, module: nn.Module) -> Iterator[None]:
        """Around the outermost constructor of an object."""
        self._running.append(module)
        try:
            yield
        finally:
            self._running.pop()
        self.finish(module)

    def finish(self, module: nn.Module) -> None:
        """Shard what a module holds, and what its constructor added to modules inside it."""
        if self._is_over or "_modules" not in module.__dict__:
            return
        self._finished[module] = None
        self._close(everything=not self._running)
        opened = {member.param for each in self._opened for member in each.members}
        for inner in module.modules():
            # What was built before the context is somebody else's.
            if inner in self._finished and opened.isdisjoint(inner.parameters(recurse=False)):
                self._shard(_own(inner))

    def end(self) -> None:
        """Shard what is left, wherever it is."""
        # Parameters that were replaced keep their shards in a cycle; and modules in cycles must
        # be gone on all ranks or on none.
        gc.collect()
        self._close(everything=True)
        for module in list(self._finished):
            self._shard(_own(module))
        trim()

    def abandon(self) -> None:
        """Shard nothing any more."""
        self._is_over = True
        self._opened.clear()

    def read(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a function of freed parameters, with their shapes if that will do."""
        if shows_shape(func):
            args, kwargs = tree.replace((args, kwargs), stand_in)
        else:
            self.open(tree.find((args, kwargs)).tensors)
        return func(*args, **kwargs)

    def open(self, tensors: Sequence[Tensor]) -> None:
        """Make the freed parameters among some tensors ordinary until nobody uses them."""
        self._close(keep=tensors)
        for tensor in tensors:
            if isinstance(tensor, FreedParameter):  # those of one unit are opened with the first
                self._opened.append(_open(tensor))

    def _close(self, *, keep: Sequence[Tensor] = (), everything: bool = False) -> None:
        """Shard what was opened and is not in use."""
        in_use = set(keep)
        idle = [
            each
            for each in self._opened
            if in_use.isdisjoint(member.param for member in each.members)
        ]
        if idle and not everything:
            idle = self._agree(idle)
        self._opened = [each for each in self._opened if each not in idle]
        while idle:
            members = idle.pop(0).members
            self._shard([each for each in members if _is_ordinary(each.param)])

    def _shard(self, members: Sequence[Member]) -> None:
        self._freed_bytes += sum(member.param.nbytes for member in members)
        _shard(members, self._sharding)
        if self._freed_bytes > _TRIM_BYTES:
            self._freed_bytes = 0
            trim()

    def _agree(self, opened: Sequence[_Opened]) -> list[_Opened]:
        """Those that no rank has views of: when a cycle is collected, ranks may differ."""
        mesh = self._sharding.mesh
        are_idle = torch.tensor([not each.is_aliased for each in opened], dtype=torch.int32)
        are_idle = all_reduce_(are_idle.to(mesh.device), mesh.shard, dist.ReduceOp.MIN).tolist()
        return [each for each, is_idle in zip(opened, are_idle, strict=True) if is_idle]


# Patches ------------------------------------------------------------------------------------------

# What modules are being built under, innermost last; None where nothing is to be sharded. That a
# constructor is patched is a fact about the process, so this is, too.
_ACTIVE: list[_Construction | None] = []
_ABSENT: Final = object()


class _Patches:
    """Attributes of classes, replaced until ``undo``."""

    def __init__(self) -> None:
        self._replaced: list[tuple[type, str, object, object]] = []

    def replace(self, owner: type, name: str, value: object) -> None:
        """Set an attribute and remember what was there."""
        self._replaced.append((owner, name, owner.__dict__.get(name, _ABSENT), value))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Put everything back, except over what somebody else has put there meanwhile."""
        while self._replaced:
            owner, name, before, ours = self._replaced.pop()
            if owner.__dict__.get(name) is not ours:
                continue
            if before is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before)


def _patch_everything(patches: _Patches) -> None:
    """See [Note: noticing construction] and [Note: reading inside constructors]."""
    for kind in _subclasses(nn.Module):
        _patch_init(patches, kind)
    _patch_subclassing(patches)
    _patch_copying(patches)
    _patch_reading(patches)


def _subclasses(kind: type[nn.Module]) -> list[type[nn.Module]]:
    found = {kind: None}
    for each in type.__subclasses__(kind):
        found.update(dict.fromkeys(_subclasses(each)))
    return list(found)


def _patch_init(patches: _Patches, kind: type[nn.Module]) -> None:
    owner = next(base for base in kind.__mro__ if "__init__" in base.__dict__)
    if not issubclass(owner, nn.Module):
        owner = kind  # the constructor is that of a mixin, which other classes may have, too
    init: Callable[..., None] = owner.__init__
    if getattr(init, "_is_ours", False):
        return

    @functools.wraps(init)
    def build(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        construction = _ACTIVE[-1] if _ACTIVE else None
        if construction is None or construction.is_running(module):
            init(module, *args, **kwargs)
            return
        with construction.building(module):
            init(module, *args, **kwargs)

    build.__dict__["_is_ours"] = True
    patches.replace(owner, "__init__", build)


def _patch_subclassing(patches: _Patches) -> None:
    def notice(cls: type[nn.Module], **kwargs: Any) -> None:
        super(nn.Module, cls).__init_subclass__(**kwargs)
        if _ACTIVE:
            _patch_init(patches, cls)

    patches.replace(nn.Module, "__init_subclass__", classmethod(notice))


def _patch_copying(patches: _Patches) -> None:
    set_state: Callable[..., None] = nn.Module.__setstate__

    @functools.wraps(set_state)
    def finish(module: nn.Module, state: Any) -> None:
        set_state(module, state)
        if _ACTIVE and _ACTIVE[-1] is not None:
            _ACTIVE[-1].finish(module)

    patches.replace(nn.Module, "__setstate__", finish)


def _patch_reading(patches: _Patches) -> None:
    refuse: Any = FreedParameter.__dict__["__torch_function__"]
    refuse_copy: Any = FreedParameter.__dict__["__deepcopy__"]

    def read(
        cls: type[FreedParameter],
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        construction = _ACTIVE[-1] if _ACTIVE else None
        name = attribute(func)
        is_blind = func in _BLIND or (
            name not in {None, *_VALUE_ATTRIBUTES} and not shows_shape(func)
        )
        if construction is None or is_blind or not _all_wait(args, kwargs):
            return refuse.__get__(None, cls)(func, types, args, kwargs)
        return construction.read(func, args, kwargs or {})

    def copy(param: FreedParameter, memo: dict[int, Any]) -> Any:
        construction = _ACTIVE[-1] if _ACTIVE else None
        if construction is None or not is_waiting(param):
            return refuse_copy(param, memo)
        construction.open([param])
        return nn.Parameter.__deepcopy__(param, memo)

    patches.replace(FreedParameter, "__torch_function__", classmethod(read))
    patches.replace(FreedParameter, "__deepcopy__", copy)


def _all_wait(args: Any, kwargs: Any) -> bool:
    """Whether no freed parameter among some arguments belongs to an engine."""
    tensors = tree.find((args, kwargs or {})).tensors
    return all(is_waiting(each) for each in tensors if isinstance(each, FreedParameter))


@contextmanager
def sharded_construction(sharding: Sharding) -> Iterator[None]:
    """Shard every module that is built inside. A collective; contexts may be nested."""
    construction = _Construction(sharding)
    with _entered(construction):
        try:
            yield
            construction.end()
        finally:
            construction.abandon()


@contextmanager
def suspended() -> Iterator[None]:
    """Build ordinary modules inside, whatever contexts are active."""
    with _entered(None):
        yield


@contextmanager
def _entered(construction: _Construction | None) -> Iterator[None]:
    patches = _Patches()
    if construction is not None and not any(_ACTIVE):
        _patch_everything(patches)
    _ACTIVE.append(construction)
    try:
        yield
    finally:
        _ACTIVE.pop()
        patches.undo()
