"""Which parameters form a unit, and at which modules each unit is gathered.

1. Blocks: modules the user names, or else modules of one class that repeat inside a ModuleList,
   ModuleDict or Sequential and consist of several layers. One block, one unit.
2. Outside blocks, a large layer (an embedding, an output projection) is a unit of its own.
3. What is left is small: it is grouped by bytes and gathered at the outermost module.

Every group is split further until it is uniform in dtype and in whether it is trained. A parameter
belongs to the first block that reaches it; a module outside that block that holds it too (tied
weights) becomes another place where its unit is gathered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn

from zeroshard.core.unit import Member
from zeroshard.errors import ConfigError, compose

__all__ = ["Group", "choose_groups", "find_blocks"]

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_REPEATED_IN = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
# A layer outside blocks is large from this share of the model on; below, a gather of its own would
# cost more than it saves.
_LARGE_SHARE = 1 / 50
_GROUP_BYTES = 64 * 2**20


@dataclass(slots=True)
class Group:
    """The parameters of one unit and the modules that use them."""

    trained: bool
    members: list[Member] = field(default_factory=list[Member])
    sites: list[nn.Module] = field(default_factory=list[nn.Module])


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost modules of one class that repeat in a container and have several layers."""
    blocks: list[nn.Module] = []
    _find_blocks(model, blocks)
    return blocks


def _find_blocks(module: nn.Module, blocks: list[nn.Module]) -> None:
    children = list(module.children())
    counts = Counter(type(child) for child in children)
    for child in children:
        repeats = isinstance(module, _REPEATED_IN) and counts[type(child)] > 1
        if repeats and _is_composite(child):
            blocks.append(child)
        else:
            _find_blocks(child, blocks)


def _is_composite(module: nn.Module) -> bool:
    """Whether the module can be called and has layers with parameters inside."""
    if isinstance(module, _CONTAINERS):
        return False
    return any(any(True for _ in child.parameters()) for child in module.children())


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
        if any(isinstance(module, _CONTAINERS) for module in found):
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
    return next((m for m in path if not isinstance(m, _CONTAINERS)), path[-1])


def choose_groups(
    model: nn.Module, *, units: Sequence[str] = (), is_trained: Callable[[nn.Parameter], bool]
) -> list[Group]:
    """Divide all parameters of a model into groups, in the order of ``named_parameters``.

    Args:
        model: the outermost module.
        units: class names or module paths to use as blocks instead of those found automatically.
        is_trained: whether an optimizer steps the parameter.

    Raises:
        ConfigError: a name in ``units`` matches nothing.
    """
    holders = _holders(model)
    blocks = set(_named_blocks(model, units) if units else find_blocks(model))
    total = sum(param.nbytes for param in model.parameters())
    groups: dict[tuple[object, ...], Group] = {}
    open_bytes: Counter[tuple[object, ...]] = Counter()
    for name, param in model.named_parameters():
        primary = _primary_site(holders[param][0], blocks, total)
        key: tuple[object, ...] = (primary, param.dtype, is_trained(param))
        if primary is model and model not in blocks:
            # Left-overs of all layers meet here: cut them into units of moderate size.
            key = (*key, open_bytes[key] // _GROUP_BYTES)
            open_bytes[key[:3]] += param.nbytes
        group = groups.setdefault(key, Group(trained=is_trained(param)))
        group.members.append(Member(name, param))
        for site in _sites(holders[param], primary, blocks):
            if not any(site is known for known in group.sites):
                group.sites.append(site)
    return list(groups.values())


def _primary_site(path: _Path, blocks: set[nn.Module], total_bytes: int) -> nn.Module:
    for module in path:
        if module in blocks:
            return module
    layer = _callable_in(path)
    layer_bytes = sum(p.nbytes for p in layer.parameters(recurse=False))
    is_leaf = not any(True for _ in layer.children())
    return layer if is_leaf and layer_bytes > total_bytes * _LARGE_SHARE else path[-1]


def _sites(paths: list[_Path], primary: nn.Module, blocks: set[nn.Module]) -> Iterable[nn.Module]:
    """The primary site, and one for every other way to the parameter that does not lead by it."""
    yield primary
    for path in paths[1:]:
        if primary not in path:
            yield next((m for m in path if m in blocks), _callable_in(path))
