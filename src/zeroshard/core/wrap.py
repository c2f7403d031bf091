"""Which parameters form a unit, and at which modules each unit is gathered.

1. Blocks: modules the user names, or else modules of one class that repeat side by side and consist
   of several layers. One block, one unit. The outermost repetition counts, unless what repeats is
   a large part of the model: such a *section* is divided into the blocks inside it.
2. Outside blocks, a large layer (an embedding, an output projection) is a unit of its own.
3. What is left of a section or of the model is gathered there as long as it is small. Else it is
   grouped in runs of neighbouring layers, and each run is gathered at its layers.

Modules marked as leaves are blocks, unless a block that was found automatically is around them, and
nothing inside a leaf is a block. Small parameters that are to stay full form a group of their own
at the model.

Every group is split further until it is uniform in kind and, unless it is made of bytes, in dtype.
A parameter belongs to the first block that reaches it; a module outside that block that holds it
too (tied weights) becomes another place where its unit is gathered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from zeroshard.core.leaves import CONTAINERS
from zeroshard.core.slots import full_nbytes, full_shape
from zeroshard.core.unit import Companion, Member
from zeroshard.errors import ConfigError, compose

__all__ = [
    "Group",
    "Kind",
    "choose_groups",
    "cut",
    "find_blocks",
    "find_leaves",
    "find_persistent",
]

_REPEATED_IN = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
# Attributes repeat from this number on: a pair (encoder and decoder) is no stack of layers.
_REPEATED_ATTRIBUTES = 3
# A block of a larger share of the model is a section if it can be divided. About three units are
# full at once, so none should be a third of the model; a transformer of a dozen layers, each with
# experts inside, should keep one unit for each layer.
_SECTION_SHARE = 1 / 8
# A layer outside blocks is large from this share of the model on; below, a gather of its own would
# cost more than it saves ...
_LARGE_SHARE = 1 / 50
# ... unless it has this size, at which the time of a gather is that of its bytes, not of its start.
# Smaller layers are gathered together up to this size.
_LAYER_BYTES = 16 * 2**20
# What stays full while a section or the model runs, besides the parameters it holds itself. Less is
# not worth a hook for each layer, in particular in a small model.
_GROUP_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Kind:
    """What the parameters of a unit have in common, beside the place where they are gathered.

    ``trained``: an optimizer steps them. ``compute``: the dtype to compute in, None for their own.
    ``persistent``: they stay full. ``as_bytes``: they are kept as they are, each in its dtype.
    """

    trained: bool
    compute: torch.dtype | None = None
    persistent: bool = False
    as_bytes: bool = False


@dataclass(slots=True)
class Group:
    """The parameters of one unit and the modules that use them."""

    kind: Kind
    members: list[Member] = field(default_factory=list[Member])
    sites: list[nn.Module] = field(default_factory=list[nn.Module])


def cut(group: Group, at: int) -> tuple[Group, Group]:
    """Two groups in place of one: its first so many parameters, and the others.

    Both are gathered wherever the one was.
    """
    first, second = group.members[:at], group.members[at:]
    return Group(group.kind, first, list(group.sites)), Group(group.kind, second, group.sites)


def find_blocks(model: nn.Module, names: Sequence[str] = ()) -> list[nn.Module]:
    """The outermost modules that repeat side by side and have several layers, sections divided.

    Args:
        model: the outermost module.
        names: class names or module paths of blocks to use instead.

    Raises:
        ConfigError: a name matches nothing.
    """
    return _named_blocks(model, names) if names else _find_blocks(model, _nbytes(model), set())[0]


def _find_blocks(
    module: nn.Module, model_bytes: int, leaves: set[nn.Module]
) -> tuple[list[nn.Module], list[nn.Module]]:
    """The blocks inside a module, and the sections that hold some of them."""
    blocks: list[nn.Module] = []
    sections: list[nn.Module] = []
    repeated = _repeated(module)
    for child in module.children():
        if child in leaves:
            blocks.append(child)
            continue
        inner_blocks, inner_sections = _find_blocks(child, model_bytes, leaves)
        if type(child) in repeated and _is_composite(child):
            if _is_section(child, inner_blocks, model_bytes):
                inner_sections.append(child)
            else:
                inner_blocks, inner_sections = [child], []
        blocks += inner_blocks
        sections += inner_sections
    return blocks, sections


def _repeated(module: nn.Module) -> set[type[nn.Module]]:
    """The classes of which a module has several children that are one stack."""
    counts = Counter(type(child) for child in module.children())
    if isinstance(module, _REPEATED_IN):
        return {kind for kind, count in counts.items() if count > 1}
    nbytes: Counter[type[nn.Module]] = Counter()
    for child in module.children():
        nbytes[type(child)] += _nbytes(child)
    # Attributes may be many and tiny, and that several are Sequential says little.
    return {
        kind
        for kind, count in counts.items()
        if count >= _REPEATED_ATTRIBUTES
        and nbytes[kind] > _GROUP_BYTES
        and kind is not nn.Sequential
    }


def _is_composite(module: nn.Module) -> bool:
    """Whether the module can be called and has layers with parameters inside."""
    if isinstance(module, CONTAINERS):
        return False
    return any(any(True for _ in child.parameters()) for child in module.children())


def _is_section(module: nn.Module, inner_blocks: list[nn.Module], model_bytes: int) -> bool:
    """Whether a module is too large for one unit, and most of it lies in blocks inside."""
    nbytes = _nbytes(module)
    is_large = nbytes > max(model_bytes * _SECTION_SHARE, _GROUP_BYTES)
    return is_large and 2 * sum(map(_nbytes, inner_blocks)) > nbytes


def _nbytes(module: nn.Module) -> int:
    return sum(full_nbytes(param) for param in module.parameters())


def _named_blocks(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    blocks: list[nn.Module] = []
    for name in names:
        found = [
            module
            for path, module in model.named_modules()
            if path == name or type(module).__name__ == name
        ]
        if not found:
            classes = sorted({type(module).__name__ for module in model.modules()})
            raise ConfigError(
                compose(
                    f'zeroshard.units names "{name}", but the model has no such class or module.',
                    hint=f"name a module path or one of the classes {', '.join(classes)}.",
                )
            )
        if any(isinstance(module, CONTAINERS) for module in found):
            raise ConfigError(
                compose(
                    f'zeroshard.units names "{name}", a container that is never called itself.',
                    hint="name the class of the modules inside it.",
                )
            )
        blocks += [module for module in found if not any(module is block for block in blocks)]
    return blocks


_Path = tuple[nn.Module, ...]


def _holders(model: nn.Module) -> dict[nn.Parameter, list[_Path]]:
    """For each parameter every way down to it: the module that holds it, then those around."""
    holders: dict[nn.Parameter, list[_Path]] = {}

    def visit(module: nn.Module, around: _Path) -> None:
        path = (module, *around)
        for param in module.parameters(recurse=False):
            holders.setdefault(param, []).append(path)
        for child in module.children():
            visit(child, path)

    visit(model, ())
    return holders


def _callable_in(path: _Path) -> nn.Module:
    """The innermost module of a path that has a forward of its own."""
    return next((m for m in path if not isinstance(m, CONTAINERS)), path[-1])


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a parameter is gathered; those of one ``key`` are gathered together."""

    site: nn.Module
    key: tuple[object, ...]


def find_leaves(
    model: nn.Module,
    *,
    classes: Sequence[str] = (),
    names: Sequence[str] = (),
    suffixes: Sequence[str] = (),
) -> list[nn.Module]:
    """The modules of some classes, with some names in the model, or whose names end in a suffix.

    A class is given by its name, alone or behind that of its Python module.
    """
    found: list[nn.Module] = []
    for path, module in model.named_modules():
        kind = type(module)
        own_names = {kind.__name__, kind.__qualname__, f"{kind.__module__}.{kind.__qualname__}"}
        is_suffix = any(path == end or path.endswith(f".{end}") for end in suffixes)
        if path in names or is_suffix or own_names.intersection(classes):
            found.append(module)
    return found


def find_persistent(
    model: nn.Module, largest_numel: int, most_numel: int | None = None
) -> set[nn.Parameter]:
    """The parameters of at most ``largest_numel`` elements, ``most_numel`` elements in all.

    In the order of names; one that does not fit any more leaves room for smaller ones after it.
    """
    chosen: set[nn.Parameter] = set()
    total = 0
    for param in model.parameters():
        numel = full_shape(param).numel()
        if numel <= largest_numel and (most_numel is None or total + numel <= most_numel):
            chosen.add(param)
            total += numel
    return chosen


def choose_groups(
    model: nn.Module,
    *,
    kind_of: Callable[[nn.Parameter], Kind],
    units: Sequence[str] = (),
    leaves: Iterable[nn.Module] = (),
    most_numel: int | None = None,
    companions: Mapping[nn.Parameter, Sequence[Companion]] | None = None,
) -> list[Group]:
    """Divide all parameters of a model into groups, in the order of ``named_parameters``.

    Args:
        model: the outermost module.
        kind_of: what a parameter must have in common with those it is gathered with.
        units: class names or module paths to use as blocks instead of those found automatically.
        leaves: modules that are a block each, beside the others.
        most_numel: elements of a group that is put together from several layers.
        companions: what parameters cannot be used without.

    Raises:
        ConfigError: a name in ``units`` matches nothing.
    """
    holders = _holders(model)
    marked = {module for module in leaves if not isinstance(module, CONTAINERS)}
    if units:
        inside = {each for leaf in marked for each in leaf.modules() if each is not leaf}
        named = [*_named_blocks(model, units), *marked]
        found, sections = [each for each in named if each not in inside], list[nn.Module]()
    else:
        found, sections = _find_blocks(model, _nbytes(model), marked)
    blocks = set(found)
    kinds = {param: kind_of(param) for param in holders}
    places = _places(
        {param: paths[0] for param, paths in holders.items() if not kinds[param].persistent},
        blocks,
        set(sections),
        most_numel,
    )
    groups: dict[tuple[object, ...], Group] = {}
    for name, param in model.named_parameters():
        kind = kinds[param]
        place = places.get(param, _Place(model, (model, "persistent")))
        dtype = None if kind.as_bytes else param.dtype
        group = groups.setdefault((*place.key, dtype, kind), Group(kind))
        group.members.append(Member(name, param, tuple((companions or {}).get(param, ()))))
        for site in _sites(holders[param], place.site, blocks):
            if not any(site is known for known in group.sites):
                group.sites.append(site)
    return list(groups.values())


def _places(
    paths: Mapping[nn.Parameter, _Path],
    blocks: set[nn.Module],
    sections: set[nn.Module],
    most_numel: int | None,
) -> dict[nn.Parameter, _Place]:
    large = min(sum(full_nbytes(param) for param in paths) * _LARGE_SHARE, _LAYER_BYTES)
    places: dict[nn.Parameter, _Place] = {}
    left: dict[nn.Module, list[_LeftOver]] = {}
    for position, (param, path) in enumerate(paths.items()):
        scope = next((m for m in path if m in blocks or m in sections), path[-1])
        layer = _callable_in(path)
        if scope in blocks:
            places[param] = _Place(scope, (scope,))
        elif _is_leaf(layer) and _own_bytes(layer) > large:
            places[param] = _Place(layer, (layer,))
        else:
            left.setdefault(scope, []).append(_LeftOver(param, layer, position))
    for scope, left_overs in left.items():
        inside = [each.param for each in left_overs if each.layer is not scope]
        kept = _Bin(_GROUP_BYTES, most_numel)
        places |= _places_at(scope, left_overs, most_numel, at_layers=not kept.holds(inside))
    return places


@dataclass(frozen=True, slots=True)
class _LeftOver:
    """A parameter in no block and no large layer."""

    param: nn.Parameter
    layer: nn.Module
    position: int  # among all parameters of the model


@dataclass(slots=True)
class _Bin:
    """Parameters that are gathered together, up to a size; then those of the next bin."""

    most_bytes: int
    most_numel: int | None
    number: int = 0
    nbytes: int = 0
    numel: int = 0

    def holds(self, params: Iterable[nn.Parameter]) -> bool:
        """Whether there is room for more."""
        params = list(params)
        nbytes = self.nbytes + sum(full_nbytes(param) for param in params)
        numel = self.numel + sum(full_shape(param).numel() for param in params)
        return nbytes <= self.most_bytes and (self.most_numel is None or numel <= self.most_numel)

    def add(self, params: Iterable[nn.Parameter], *, to_next: bool = False) -> int:
        """Take parameters in, in the next bin if they do not fit; return the bin's number."""
        params = list(params)
        if to_next or (self.numel and not self.holds(params)):
            self.number, self.nbytes, self.numel = self.number + 1, 0, 0
        self.nbytes += sum(full_nbytes(param) for param in params)
        self.numel += sum(full_shape(param).numel() for param in params)
        return self.number


def _places_at(
    scope: nn.Module, left_overs: Sequence[_LeftOver], most_numel: int | None, *, at_layers: bool
) -> dict[nn.Parameter, _Place]:
    """Group what is left of a section or of the model."""
    places: dict[nn.Parameter, _Place] = {}
    own: dict[nn.Module, list[nn.Parameter]] = {}
    for each in left_overs:
        own.setdefault(each.layer, []).append(each.param)
    kept, run = _Bin(_GROUP_BYTES, most_numel), _Bin(_LAYER_BYTES, most_numel)
    runs: dict[nn.Module, int] = {}
    end = 0
    for each in left_overs:
        layer = each.layer
        if not at_layers or layer is scope:
            places[each.param] = _Place(scope, (scope, "kept", kept.add([each.param])))
            continue
        if layer not in runs:
            # Layers with a block or a large layer between them are not used together.
            runs[layer] = run.add(own[layer], to_next=each.position != end)
        places[each.param] = _Place(layer, (scope, "run", runs[layer]))
        end = each.position + 1
    return places


def _is_leaf(module: nn.Module) -> bool:
    return not any(True for _ in module.children())


def _own_bytes(module: nn.Module) -> int:
    return sum(full_nbytes(param) for param in module.parameters(recurse=False))


def _sites(paths: list[_Path], primary: nn.Module, blocks: set[nn.Module]) -> Iterable[nn.Module]:
    """The primary site, and one for every other way to the parameter that does not lead by it."""
    yield primary
    for path in paths[1:]:
        if primary not in path:
            yield next((m for m in path if m in blocks), _callable_in(path))
