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
from collections.abc import Callable, Iterable, Iterator, Sequence
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


class _Tree:
    """Ancestors of modules, and who holds which parameter."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parent: dict[nn.Module, nn.Module] = {}
        self.holders: dict[nn.Parameter, list[nn.Module]] = {}
        for module in model.modules():
            for child in module.children():
                self.parent.setdefault(child, module)
            for param in module.parameters(recurse=False):
                self.holders.setdefault(param, []).append(module)

    def above(self, module: nn.Module) -> Iterator[nn.Module]:
        """The module and its ancestors, innermost first."""
        at: nn.Module | None = module
        while at is not None:
            yield at
            at = self.parent.get(at)

    def callable_above(self, module: nn.Module) -> nn.Module:
        """The innermost module around this one that has a forward of its own."""
        return next((m for m in self.above(module) if not isinstance(m, _CONTAINERS)), self.model)


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
    tree = _Tree(model)
    blocks = set(_named_blocks(model, units) if units else find_blocks(model))
    total = sum(param.nbytes for param in model.parameters())
    groups: dict[tuple[object, ...], Group] = {}
    open_bytes: Counter[tuple[object, ...]] = Counter()
    for name, param in model.named_parameters():
        primary = _primary_site(param, tree, blocks, total)
        key: tuple[object, ...] = (primary, param.dtype, is_trained(param))
        if primary is model and model not in blocks:
            # Left-overs of all layers meet here: cut them into units of moderate size.
            key = (*key, open_bytes[key] // _GROUP_BYTES)
            open_bytes[key[:3]] += param.nbytes
        group = groups.setdefault(key, Group(trained=is_trained(param)))
        group.members.append(Member(name, param))
        for site in _sites(param, primary, tree, blocks):
            if not any(site is known for known in group.sites):
                group.sites.append(site)
    return list(groups.values())


def _primary_site(
    param: nn.Parameter, tree: _Tree, blocks: set[nn.Module], total_bytes: int
) -> nn.Module:
    holder = tree.holders[param][0]
    for module in tree.above(holder):
        if module in blocks:
            return module
    layer = tree.callable_above(holder)
    layer_bytes = sum(p.nbytes for p in layer.parameters(recurse=False))
    is_leaf = not any(True for _ in layer.children())
    if is_leaf and layer_bytes > total_bytes * _LARGE_SHARE:
        return layer
    return tree.model


def _sites(
    param: nn.Parameter, primary: nn.Module, tree: _Tree, blocks: set[nn.Module]
) -> Iterable[nn.Module]:
    """The primary site, and one for every holder outside it."""
    yield primary
    for holder in tree.holders[param][1:]:
        path = list(tree.above(holder))
        if primary not in path:
            yield next((m for m in path if m in blocks), tree.callable_above(holder))


def describe(groups: Sequence[Group], names: dict[nn.Module, str]) -> str:
    """One line per unit: where it is gathered, how many parameters and bytes it has."""
    lines: list[str] = []
    for group in groups:
        sites = ", ".join(names.get(site) or "(model)" for site in group.sites)
        numel = sum(member.param.numel() for member in group.members)
        kind = "trained" if group.trained else "frozen"
        dtype = str(group.members[0].param.dtype).removeprefix("torch.")
        lines.append(f"{sites}: {len(group.members)} parameters, {numel} elements, {dtype}, {kind}")
    return "\n".join(lines)
