"""Models that are awkward to shard, each a few hundred parameters, each fully deterministic.

A model subclasses :class:`Awkward` and is registered by :func:`awkward`; what a test uses is the
:class:`Case` in `ZOO`, found by the class name in snake case. The data of a case depends on the
step, the micro-step and the rank alone, so a single process can replay what all ranks do.

Three rules keep comparisons within 1e-6 honest. Every parameter starts at a random value, so no
norm is close to zero. No parameter has a gradient that is zero up to rounding (a key bias in
attention, a bias in front of a normalisation), since Adam would blow its noise up to a full step.
And what draws random numbers while it runs seeds them from its batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

__all__ = ["ZOO", "Awkward", "Batch", "Block", "Case", "Checkpointing", "Model"]

Checkpointing = Literal["none", "non_reentrant", "reentrant"]
Batch = tuple[Any, ...]
Model = Callable[..., Any]

NO_CHECKPOINTING: tuple[Checkpointing, ...] = ("none",)
NON_REENTRANT: tuple[Checkpointing, ...] = ("none", "non_reentrant")
EVERY_CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "non_reentrant", "reentrant")

WIDTH = 12
VOCABULARY = 31
BATCH, LENGTH = 2, 5


@dataclass(frozen=True)
class Case:
    """One awkward model, and how to train it."""

    name: str
    build: Callable[..., nn.Module]
    """`build(seed, checkpointing="none")` makes the model; equal seeds make equal models."""
    batch: Callable[[int, int, int], Batch]
    """`batch(step, micro, rank)` makes what `losses` wants."""
    losses: Callable[[Model, Batch], Iterator[Tensor]]
    """Runs the model and yields scalars, each of which wants its backward before the next."""
    units: tuple[str, ...]
    """Classes or paths of the modules that are to be gathered on their own."""
    num_blocks: int
    checkpointing: tuple[Checkpointing, ...]
    retain_graph: bool
    """Whether the losses share one graph, so that all backwards but the last must keep it."""

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """The sum of all losses, for models that are content with one backward."""
        return sum(self.losses(model, batch), start=torch.zeros(()))


ZOO: dict[str, Case] = {}


class Awkward(nn.Module):
    """A model in the zoo: by default token ids in, one logit per token of the vocabulary out."""

    units: ClassVar[tuple[str, ...]] = ("Block",)
    num_blocks: ClassVar[int] = 3
    checkpointing_modes: ClassVar[tuple[Checkpointing, ...]] = NO_CHECKPOINTING
    retain_graph: ClassVar[bool] = False
    checkpointing: Checkpointing = "none"

    @staticmethod
    def batch(step: int, micro: int, rank: int) -> Batch:
        return (tokens(step, micro, rank),)

    @staticmethod
    def losses(model: Model, batch: Batch) -> Iterator[Tensor]:
        yield cross_entropy(model(*batch), batch[0])

    def run(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call a block, under activation checkpointing if the case asks for it."""
        if self.checkpointing == "none":
            return block(*args, **kwargs)
        reentrant = self.checkpointing == "reentrant"
        return checkpoint(block, *args, use_reentrant=reentrant, **kwargs)


AwkwardClass = TypeVar("AwkwardClass", bound=type[Awkward])


def awkward(model: AwkwardClass) -> AwkwardClass:
    """Register a model in the zoo."""

    def build(seed: int, checkpointing: Checkpointing = "none") -> nn.Module:
        # The constructors draw from torch's global generator; their values are overwritten.
        net = model()
        randomise(net, seed)
        net.checkpointing = checkpointing
        return net

    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", model.__name__).lower()
    ZOO[name] = Case(
        name=name,
        build=build,
        batch=model.batch,
        losses=model.losses,
        units=model.units,
        num_blocks=model.num_blocks,
        checkpointing=model.checkpointing_modes,
        retain_graph=model.retain_graph,
    )
    return model


def randomise(model: nn.Module, seed: int) -> None:
    """Give every parameter random values of the size that its use asks for."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            if name.endswith(("norm.weight", "scale")) or param.numel() == 1:
                param.copy_(1 + 0.1 * noise)
            elif param.ndim > 1:
                param.copy_(noise * max(param.shape[-1], 1) ** -0.5)
            else:
                param.copy_(0.3 * noise)


def generator_of(step: int, micro: int, rank: int) -> torch.Generator:
    """A source of random numbers of its own for each micro-step of each rank."""
    return torch.Generator().manual_seed(10_000 * step + 100 * micro + rank)


def tokens(step: int, micro: int, rank: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator_of(step, micro, rank))


def features(step: int, micro: int, rank: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator_of(step, micro, rank))


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())


class Block(nn.Module):
    """A residual feed-forward block."""

    def __init__(self, width: int = WIDTH, inner: int = 20) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Stack(Awkward):
    """An embedding, some blocks, a head."""

    checkpointing_modes = EVERY_CHECKPOINTING

    def __init__(self, make_block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(make_block() for _ in range(self.num_blocks))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        for block in self.blocks:
            h = self.run(block, h)
        return self.head(h)


@awkward
class CheckpointedSegments(Stack):
    """Activation checkpointing recomputes two blocks at a time."""

    num_blocks = 4

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        for start in range(0, self.num_blocks, 2):
            h = self.run(nn.Sequential(*self.blocks[start : start + 2]), h)
        return self.head(h)


@awkward
class CheckpointedTwice(Stack):
    """Activation checkpointing around all blocks, and around each inside that."""

    checkpointing_modes = NON_REENTRANT  # the other kind warns about itself
    num_blocks = 4

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.run(self.all_blocks, self.embedding(ids)))

    def all_blocks(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            h = self.run(block, h)
        return h


@awkward
class CheckpointedWhole(Stack):
    """The caller checkpoints the whole model."""

    @staticmethod
    def losses(model: Model, batch: Batch) -> Iterator[Tensor]:
        (ids,) = batch
        mode = getattr(model, "module", model).checkpointing
        if mode == "none":
            yield cross_entropy(model(ids), ids)
            return
        reentrant = mode == "reentrant"
        # Reentrant checkpointing wants an input that takes a gradient.
        start = torch.zeros((), requires_grad=True)
        logits = checkpoint(lambda x: model(ids) + x, start, use_reentrant=reentrant)
        yield cross_entropy(logits, ids)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


# Sharing ----------------------------------------------------------------------------------------


@awkward
class Plain(Stack):
    """Nothing awkward: what every other case is compared with in one's head."""


@awkward
class TiedHead(Stack):
    """The embedding is the head's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embedding.weight


@awkward
class TiedHeadWithOwnUnits(TiedHead):
    """The tied modules are units of their own, so two sites share one parameter."""

    units = ("Block", "embedding", "head")


@awkward
class TiedHeadUsedFirst(TiedHead):
    """The head runs before the embedding that owns its weight."""

    @staticmethod
    def batch(step: int, micro: int, rank: int) -> Batch:
        return tokens(step, micro, rank), features(step, micro, rank, BATCH, LENGTH, WIDTH)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        guess = self.head(x)
        h = self.embedding(ids)
        for block in self.blocks:
            h = self.run(block, h)
        return self.head(h) + guess


@awkward
class WeightReadByParent(Stack):
    """The root reads the weights of layers, and calls the layers only afterwards."""

    @staticmethod
    def batch(step: int, micro: int, rank: int) -> Batch:
        return tokens(step, micro, rank), features(step, micro, rank, BATCH, LENGTH, WIDTH)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        h = x @ self.head.weight.t() @ self.embedding.weight
        for block in self.blocks:
            h = self.run(block, h)
        return self.head(h + self.embedding(ids))


class ReadingBlock(Block):
    """A block that reads the weights of a module which is not inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.elsewhere: list[nn.Module] = []  # in a list, so that it is no child

    def forward(self, x: Tensor) -> Tensor:
        (other,) = self.elsewhere
        return super().forward(x) + F.linear(torch.tanh(x), other.weight, other.bias)


@awkward
class WeightReadBySibling(Stack):
    """Blocks read the weights of a layer that never runs itself, and of one that runs first."""

    units = ("ReadingBlock", "shared", "first")

    def __init__(self) -> None:
        super().__init__(ReadingBlock)
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH)
        for block, other in zip(self.blocks, (self.shared, self.first, self.shared), strict=True):
            block.elsewhere.append(other)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.first(self.embedding(ids))
        for block in self.blocks:
            h = self.run(block, h)
        return self.head(h)


@awkward
class TiedBlockAndRoot(Stack):
    """A weight is owned by a block and used by the root after the block."""

    def __init__(self) -> None:
        super().__init__(lambda: Block(inner=VOCABULARY))
        self.head.weight = self.blocks[1].up.weight


@awkward
class TiedBetweenBlocks(Stack):
    """The first and the last block share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[2].up.weight = self.blocks[0].up.weight


@awkward
class BlockCalledTwice(Stack):
    """The middle block runs twice in each forward."""

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        for index in (0, 1, 1, 2):
            h = self.run(self.blocks[index], h)
        return self.head(h)


@awkward
class BlockCalledTwiceApart(Stack):
    """A block runs first and last, with the others between."""

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        for index in (0, 1, 2, 0):
            h = self.run(self.blocks[index], h)
        return self.head(h)


@awkward
class ModuleRegisteredTwice(Stack):
    """One block stands at two places of the module tree."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks.append(self.blocks[0])


# Trainability -----------------------------------------------------------------------------------


@awkward
class FrozenWeightInEachBlock(Stack):
    """One weight per block does not learn."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.up.weight.requires_grad_(False)


@awkward
class FrozenBlockBetween(Stack):
    """The middle block learns nothing but passes gradients on."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].requires_grad_(False)


@awkward
class FrozenFront(Stack):
    """Neither the embedding nor the first two blocks learn, so no gradient ever reaches them."""

    checkpointing_modes = NON_REENTRANT

    def __init__(self) -> None:
        super().__init__()
        self.embedding.requires_grad_(False)
        self.blocks[:2].requires_grad_(False)


class AdaptedBlock(nn.Module):
    """A frozen block with a low-rank adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.base = Block().requires_grad_(False)
        self.lora_a = nn.Linear(WIDTH, 2, bias=False)
        self.lora_b = nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_b(self.lora_a(x))


@awkward
class LowRankAdapters(Stack):
    """All of the model is frozen, apart from one adapter per block."""

    units = ("AdaptedBlock",)
    checkpointing_modes = NON_REENTRANT

    def __init__(self) -> None:
        super().__init__(AdaptedBlock)
        self.embedding.requires_grad_(False)
        self.head.requires_grad_(False)


@awkward
class NeverUsed(Stack):
    """A module of the root and one of a block are never called."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(3, 3)
        self.blocks[1].spare = nn.Linear(5, 3)


@awkward
class BlockNeverUsed(Stack):
    """A whole block is never called."""

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        for block in self.blocks[:2]:
            h = self.run(block, h)
        return self.head(h)


@awkward
class OutputNeverUsed(Stack):
    """A block runs in forward and has no backward, because its output is dropped."""

    def forward(self, ids: Tensor) -> Tensor:
        h = self.run(self.blocks[0], self.embedding(ids))
        self.run(self.blocks[1], h)
        return self.head(self.run(self.blocks[2], h))


# Use that varies --------------------------------------------------------------------------------


class BranchingBlock(nn.Module):
    """A block with an expert that runs when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.always = Block()
        self.expert = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, use_expert: bool) -> Tensor:
        return self.always(x) + self.expert(x) if use_expert else self.always(x)


class Flagged(Stack):
    """The batch tells which blocks do something special."""

    def forward(self, ids: Tensor, flags: tuple[bool, ...]) -> Tensor:
        h = self.embedding(ids)
        for block, flag in zip(self.blocks, flags, strict=True):
            h = self.run(block, h, flag)
        return self.head(h)


@awkward
class UsedInSomeSteps(Flagged):
    """Parameters inside blocks are used in some steps only, the same on all ranks."""

    units = ("BranchingBlock",)

    def __init__(self) -> None:
        super().__init__(BranchingBlock)

    @staticmethod
    def batch(step: int, micro: int, rank: int) -> Batch:
        return tokens(step, micro, rank), tuple((step + i) % 2 == 0 for i in range(3))


@awkward
class UsedOnSomeRanks(Flagged):
    """Parameters inside blocks are used on one rank only, another one in each micro-step."""

    units = ("BranchingBlock",)

    def __init__(self) -> None:
        super().__init__(BranchingBlock)

    @staticmethod
    def batch(step: int, micro: int, rank: int) -> Batch:
        flags = tuple((step + micro + rank + i) % 3 == 0 for i in range(3))
        return tokens(step, micro, rank), flags


class Ordered(Stack):
    """The batch tells which blocks run, and in which order."""

    def forward(self, ids: Tensor, order: tuple[int, ...]) -> Tensor:
        h = self.embedding(ids)
        for index in order:
            h = self.run(self.blocks[index], h)
        return self.head(h)


@awkward
class BlockSkippedOnSomeRanks(Ordered):
    """A whole block does not run on some ranks, another one in each step."""

    @staticmethod
    def batch(step: int, micro: int, rank: int) -> Batch:
        skipped = (step + rank) % 4
        return tokens(step, micro, rank), tuple(i for i in range(3) if i != skipped)


@awkward
class OrderVariesByStep(Ordered):
    """All ranks run the blocks in one order, which is another one in each micro-step."""

    @staticmethod
    def batch(step: int, micro: int, rank: int) -> Batch:
        return tokens(step, micro, rank), tuple((step + micro + i) % 3 for i in range(3))


@awkward
class OrderVariesByRank(Ordered):
    """Each rank runs the blocks in another order."""

    @staticmethod
    def batch(step: int, micro: int, rank: int) -> Batch:
        order = tuple((step + rank + i) % 3 for i in range(3))
        return tokens(step, micro, rank), order[::-1] if rank % 2 else order


@awkward
class DepthVariesByRank(Ordered):
    """Ranks run different numbers of blocks, and some run a block twice."""

    @staticmethod
    def batch(step: int, micro: int, rank: int) -> Batch:
        orders = ((0, 1, 2), (2,), (1, 1, 0, 2), ())
        return tokens(step, micro, rank), orders[(step + rank) % 4]


class RoutedBlock(nn.Module):
    """A mixture of experts whose tokens, not whose caller, choose the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.router = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.norm(x)
        chances = self.router(h).softmax(-1)
        best, choice = chances.max(-1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            chosen = choice == index
            if chosen.any():
                y = y.masked_scatter(chosen[..., None], expert(h[chosen]))
        balance = chances.flatten(0, -2).mean(0).square().sum()
        return x + best[..., None] * y, balance


@awkward
class MixtureOfExperts(Stack):
    """Data choose the experts, so ranks differ in them; each block also returns a second loss."""

    units = ("RoutedBlock",)

    def __init__(self) -> None:
        super().__init__(RoutedBlock)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        h = self.embedding(ids)
        balances = []
        for block in self.blocks:
            h, balance = self.run(block, h)
            balances.append(balance)
        return self.head(h), torch.stack(balances).sum()

    @staticmethod
    def losses(model: Model, batch: Batch) -> Iterator[Tensor]:
        logits, balance = model(*batch)
        yield cross_entropy(logits, batch[0]) + 0.1 * balance


# Structure --------------------------------------------------------------------------------------


class OuterBlock(nn.Module):
    """A block with a block inside, and parameters before and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.inner = Block()
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(torch.tanh(self.inner(torch.tanh(self.first(x)))))


@awkward
class NestedUnits(Stack):
    """A unit lies within another unit."""

    units = ("OuterBlock", "Block")

    def __init__(self) -> None:
        super().__init__(OuterBlock)


class AttentionBlock(nn.Module):
    """Attention whose output projection is read as a weight and never called."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 3, bias=False, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.attention(h, h, h, need_weights=False)[0]


@awkward
class Attention(Stack):
    """A module reads the weight of its child without calling the child."""

    units = ("AttentionBlock",)

    def __init__(self) -> None:
        super().__init__(AttentionBlock)


class RecurrentBlock(nn.Module):
    """A recurrent layer, which keeps a private list of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.recurrent(x)[0]


@awkward
class Recurrent(Stack):
    """Parameters are also held in a list that is no part of the module tree."""

    units = ("RecurrentBlock",)

    def __init__(self) -> None:
        super().__init__(RecurrentBlock)


class NormalisedBlock(nn.Module):
    """A block whose weight is computed from two parameters at each use."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


@awkward
class Parametrized(Stack):
    """Weights are parametrized by torch's own mechanism."""

    units = ("NormalisedBlock",)

    def __init__(self) -> None:
        super().__init__(NormalisedBlock)


class OddlyShapedBlock(nn.Module):
    """Scalars, primes, a transposed weight, parameters in a list and in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.transposed = nn.Parameter(torch.ones(7, WIDTH).t())
        self.listed = nn.ParameterList([torch.ones(7, 13), torch.ones(13)])
        self.named = nn.ParameterDict({"out": torch.ones(13, WIDTH), "shift": torch.ones(1, 1)})

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x @ self.transposed)
        h = torch.tanh(h @ self.listed[0] + self.listed[1])
        return x + self.scale * (h @ self.named["out"]) + self.named["shift"]


@awkward
class OddShapes(Stack):
    """No size is a multiple of the world."""

    units = ("OddlyShapedBlock",)

    def __init__(self) -> None:
        super().__init__(OddlyShapedBlock)
        self.temperature_scale = nn.Parameter(torch.ones(()))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.temperature_scale


class HollowBlock(Block):
    """A block with parameters without elements, one used and one not."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Parameter(torch.ones(0, WIDTH))
        self.unused = nn.Parameter(torch.ones(3, 0))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.used.sum()


@awkward
class ZeroSizedParameters(Stack):
    """Some parameters have no elements."""

    units = ("HollowBlock",)

    def __init__(self) -> None:
        super().__init__(HollowBlock)


class CountingBlock(Block):
    """A block whose output depends on the batches this rank has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(WIDTH))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("constant", torch.linspace(0, 1, WIDTH), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.seen.mul_(0.9).add_(x.flatten(0, -2).mean(0), alpha=0.1)
            self.calls += 1
        return super().forward(x) + self.seen.clone() * self.constant


@awkward
class Buffers(Stack):
    """Buffers change in forward, differ between ranks, and enter the output."""

    units = ("CountingBlock",)
    checkpointing_modes = NO_CHECKPOINTING  # a recomputation would count twice

    def __init__(self) -> None:
        super().__init__(CountingBlock)


class DroppingBlock(Block):
    """A block with dropout."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.2)


@awkward
class Dropout(Stack):
    """Forward draws random numbers, which a recomputation must draw again."""

    units = ("DroppingBlock",)

    def __init__(self) -> None:
        super().__init__(DroppingBlock)

    @staticmethod
    def batch(step: int, micro: int, rank: int) -> Batch:
        return tokens(step, micro, rank), 10_000 * step + 100 * micro + rank

    @staticmethod
    def losses(model: Model, batch: Batch) -> Iterator[Tensor]:
        ids, seed = batch
        torch.manual_seed(seed)
        yield cross_entropy(model(ids), ids)


class DoublePrecisionBlock(nn.Module):
    """A block that computes a part in fp64."""

    def __init__(self) -> None:
        super().__init__()
        self.low = Block()
        self.high = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.low(x) + torch.tanh(self.high(x.double())).to(x.dtype)


@awkward
class MixedDtypes(Stack):
    """A module holds parameters of two dtypes."""

    units = ("DoublePrecisionBlock",)

    def __init__(self) -> None:
        super().__init__(DoublePrecisionBlock)


@awkward
class RootParameters(Stack):
    """The root itself owns parameters, one used before and one after the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.ones(LENGTH, WIDTH))
        self.shift = nn.Parameter(torch.ones(VOCABULARY))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids) + self.position
        for block in self.blocks:
            h = self.run(block, h)
        return self.head(h) + self.shift


@awkward
class SingleParameter(Awkward):
    """The whole model is one scalar."""

    units = ()
    num_blocks = 0

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    @staticmethod
    def batch(step: int, micro: int, rank: int) -> Batch:
        return (features(step, micro, rank, 7).abs() + 1,)

    @staticmethod
    def losses(model: Model, batch: Batch) -> Iterator[Tensor]:
        yield F.softplus(-model(*batch)).mean()  # has no minimum, so no gradient close to zero

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@awkward
class ThousandSmallParameters(Awkward):
    """Five hundred layers of two parameters each."""

    units = ()
    num_blocks = 0

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 1) for _ in range(500))

    @staticmethod
    def batch(step: int, micro: int, rank: int) -> Batch:
        return (features(step, micro, rank, 4, 3),)

    @staticmethod
    def losses(model: Model, batch: Batch) -> Iterator[Tensor]:
        yield (model(*batch) - 1).square().mean()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], dim=-1)


# Inputs and outputs -----------------------------------------------------------------------------


class Pair(NamedTuple):
    """What a block with two outputs returns."""

    hidden: Tensor
    extra: Tensor


@dataclass
class Outcome:
    """What a block with a record as its output returns."""

    hidden: Tensor
    extra: Tensor
    note: str = "not a tensor"


class PairBlock(nn.Module):
    """A block with two outputs, from two parts of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.main = Block()
        self.side = nn.Linear(WIDTH, WIDTH)

    def outputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.main(x)
        return h, torch.tanh(self.side(h))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.outputs(x)


class NamedTupleBlock(PairBlock):
    """Returns a named tuple."""

    def forward(self, x: Tensor) -> Pair:
        return Pair(*self.outputs(x))


class DataclassBlock(PairBlock):
    """Returns a dataclass."""

    def forward(self, x: Tensor) -> Outcome:
        return Outcome(*self.outputs(x))


class DictBlock(PairBlock):
    """Returns a dict with a list and with values that are no tensors."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden, extra = self.outputs(x)
        return {"hidden": hidden, "extras": [extra, None], "note": "not a tensor"}


@awkward
class TupleOutputs(Stack):
    """Blocks return tuples, both members of which are used."""

    units = ("PairBlock",)

    def __init__(self) -> None:
        super().__init__(PairBlock)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        for block in self.blocks:
            h, extra = self.run(block, h)
            h = h + extra
        return self.head(h)


@awkward
class OneOfTwoOutputsUsed(Stack):
    """Blocks return tuples; of one block the first member is dropped, of the others the second."""

    units = ("PairBlock",)

    def __init__(self) -> None:
        super().__init__(PairBlock)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        for index, block in enumerate(self.blocks):
            h = self.run(block, h)[index % 2]
        return self.head(h)


@awkward
class NamedTupleOutputs(Stack):
    """Blocks return named tuples."""

    units = ("NamedTupleBlock",)
    checkpointing_modes = NON_REENTRANT

    def __init__(self) -> None:
        super().__init__(NamedTupleBlock)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        for block in self.blocks:
            pair = self.run(block, h)
            h = pair.hidden + pair.extra
        return self.head(h)


@awkward
class DataclassOutputs(Stack):
    """Blocks return dataclasses, and so does the model."""

    units = ("DataclassBlock",)
    checkpointing_modes = NON_REENTRANT

    def __init__(self) -> None:
        super().__init__(DataclassBlock)

    @staticmethod
    def losses(model: Model, batch: Batch) -> Iterator[Tensor]:
        outcome = model(*batch)
        yield cross_entropy(outcome.hidden, batch[0]) + outcome.extra.square().mean()

    def forward(self, ids: Tensor) -> Outcome:
        h = self.embedding(ids)
        for block in self.blocks:
            outcome = self.run(block, h)
            h = outcome.hidden + outcome.extra
        return Outcome(self.head(h), h)


@awkward
class DictOutputs(Stack):
    """Blocks return dicts, and so does the model."""

    units = ("DictBlock",)
    checkpointing_modes = NON_REENTRANT

    def __init__(self) -> None:
        super().__init__(DictBlock)

    @staticmethod
    def losses(model: Model, batch: Batch) -> Iterator[Tensor]:
        yield model(*batch)["loss"]

    def forward(self, ids: Tensor) -> dict[str, Any]:
        h = self.embedding(ids)
        for block in self.blocks:
            outputs = self.run(block, h)
            h = outputs["hidden"] + outputs["extras"][0]
        logits = self.head(h)
        return {"loss": cross_entropy(logits, ids), "logits": logits, "cache": None}


class KeywordBlock(Block):
    """A block that takes its tensors by keyword, some of them inside a dict."""

    def forward(self, *, hidden: Tensor, context: dict[str, Tensor], gain: float = 1.0) -> Tensor:
        return super().forward(hidden) + gain * torch.tanh(context["memory"])


@awkward
class KeywordInputs(Stack):
    """Blocks take keywords only; tensors that need gradients come in a dict as well."""

    units = ("KeywordBlock",)
    checkpointing_modes = NON_REENTRANT

    def __init__(self) -> None:
        super().__init__(KeywordBlock)

    @staticmethod
    def losses(model: Model, batch: Batch) -> Iterator[Tensor]:
        yield cross_entropy(model(ids=batch[0]), batch[0])

    def forward(self, *, ids: Tensor) -> Tensor:
        memory = h = self.embedding(ids)
        for block in self.blocks:
            h = self.run(block, hidden=h, context={"memory": memory}, gain=0.5)
        return self.head(h)


class PassThroughBlock(Block):
    """A block that hands its input on beside its output."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, super().forward(x)


@awkward
class InputIsAnOutput(Stack):
    """A block's input is among its outputs, and the two are used alike."""

    units = ("PassThroughBlock",)
    checkpointing_modes = NON_REENTRANT

    def __init__(self) -> None:
        super().__init__(PassThroughBlock)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        for block in self.blocks:
            same, new = self.run(block, h)
            h = 0.5 * same + new
        return self.head(h)


class EditingBlock(Block):
    """A block that keeps its state in a dict and a list it is given, and returns nothing."""

    def forward(self, state: dict[str, Any]) -> None:  # type: ignore[override]
        state["h"] = super().forward(state["h"])
        state["all"].append(state["h"])


@awkward
class EditedArguments(Stack):
    """Blocks edit the containers that their caller passes, and the caller goes on with them."""

    units = ("EditingBlock",)

    def __init__(self) -> None:
        super().__init__(EditingBlock)

    checkpointing_modes = NO_CHECKPOINTING  # a recomputation would append twice

    def forward(self, ids: Tensor) -> Tensor:
        state: dict[str, Any] = {"h": self.embedding(ids), "all": []}
        for block in self.blocks:
            block(state)
        return self.head(sum(state["all"]))


class ComparingBlock(nn.Module):
    """Attention that takes another way where query and key are the same object."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return q + (self.query(q) if q is k else self.query(q) * torch.tanh(self.key(k)))


@awkward
class SameArgumentTwice(Stack):
    """Blocks ask whether two of their arguments are one object."""

    units = ("ComparingBlock",)
    checkpointing_modes = NON_REENTRANT  # the other kind passes a copy of each argument

    def __init__(self) -> None:
        super().__init__(ComparingBlock)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        for block in self.blocks:
            h = self.run(block, h, h)
        return self.head(h)


class Queries(nn.Module):
    """Returns views of its own parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(LENGTH, WIDTH))

    def forward(self, size: int) -> Tensor:
        return self.weight.expand(size, -1, -1)


@awkward
class ParameterAsOutput(Stack):
    """A module returns its parameter, which others use after it and in backward."""

    units = ("Block", "queries")

    def __init__(self) -> None:
        super().__init__()
        self.queries = Queries()

    def forward(self, ids: Tensor) -> Tensor:
        queries = self.queries(len(ids))
        h = self.embedding(ids) * torch.tanh(queries)
        for block in self.blocks:
            h = self.run(block, h) + 0.1 * queries * h
        return self.head(h)


@awkward
class SelectiveCheckpointing(Stack):
    """Activation checkpointing that keeps the results of most operations, views included."""

    checkpointing_modes = NO_CHECKPOINTING

    def forward(self, ids: Tensor) -> Tensor:
        def policy(ctx: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
            cheap = op is torch.ops.aten.gelu.default
            return CheckpointPolicy.PREFER_RECOMPUTE if cheap else CheckpointPolicy.MUST_SAVE

        h = self.embedding(ids)
        for block in self.blocks:
            contexts = partial(create_selective_checkpoint_contexts, policy)
            h = checkpoint(block, h, use_reentrant=False, context_fn=contexts)
        return self.head(h)


class StopGradient(torch.autograd.Function):
    """Passes a tensor on, and says in backward that it has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        return None


@awkward
class UndefinedGradients(Stack):
    """Inputs and outputs of blocks whose gradients autograd leaves undefined."""

    checkpointing_modes = NON_REENTRANT

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        first, second = torch.stack([h, 2 * h]).unbind()
        self.run(self.blocks[0], second)  # no loss depends on it
        h = self.run(self.blocks[0], first)
        h = self.run(self.blocks[1], h) + StopGradient.apply(self.run(self.blocks[2], h))
        return self.head(self.run(self.blocks[2], h))


@awkward
class HookedEmbedding(Stack):
    """Hooks read the weight of an embedding, whose own backward does not."""

    checkpointing_modes = NO_CHECKPOINTING
    units = ("Block", "embedding")

    def __init__(self) -> None:
        super().__init__()
        self.embedding.register_forward_hook(
            lambda module, args, output: output * module.weight.square().mean().exp()
        )


class InplaceBlock(nn.Module):
    """A block that overwrites its input."""

    def __init__(self) -> None:
        super().__init__()
        self.activation = nn.LeakyReLU(0.1, inplace=True)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.activation(x))


@awkward
class InplaceOnInput(Stack):
    """Blocks begin with an operation in place on their input."""

    units = ("InplaceBlock",)
    checkpointing_modes = NO_CHECKPOINTING  # a recomputation would apply it twice

    def __init__(self) -> None:
        super().__init__(InplaceBlock)


@awkward
class InplaceOnOutput(Stack):
    """The root changes the blocks' outputs in place."""

    checkpointing_modes = NO_CHECKPOINTING

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        for block in self.blocks:
            h = block(h)
            h += 1
            h.mul_(0.9)
        return self.head(h)


@awkward
class InplaceOnViewOfOutput(Stack):
    """The root changes a part of the blocks' outputs in place."""

    checkpointing_modes = NO_CHECKPOINTING

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        for block in self.blocks:
            h = block(h)
            h[:, 0] *= 0.5
        return self.head(h)


class ViewBlock(Block):
    """A block whose output is a view of its input's memory and of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).transpose(0, 1)


@awkward
class ViewOutputs(Stack):
    """Blocks return views."""

    units = ("ViewBlock",)
    num_blocks = 4

    def __init__(self) -> None:
        super().__init__(ViewBlock)


@awkward
class InputWithoutGradient(Awkward):
    """The first block works on data, so that none of its inputs needs a gradient."""

    checkpointing_modes = NON_REENTRANT
    num_blocks = 2

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(self.num_blocks))

    @staticmethod
    def batch(step: int, micro: int, rank: int) -> Batch:
        return (features(step, micro, rank, BATCH, WIDTH),)

    @staticmethod
    def losses(model: Model, batch: Batch) -> Iterator[Tensor]:
        yield (model(*batch) - 1).square().mean()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.run(block, x)
        return x


@awkward
class InputWithGradient(InputWithoutGradient):
    """The caller's data is a leaf that wants its gradient, and the gradient enters the result."""

    @staticmethod
    def losses(model: Model, batch: Batch) -> Iterator[Tensor]:
        x = batch[0].clone().requires_grad_(True)
        loss = (model(x) - 1).square().mean()
        yield loss
        # The first loss has gone through backward by now; how strongly it depends on the input
        # weighs the second. Gradients carry the caller's factors, which the direction does not.
        assert x.grad is not None, "the input has no gradient"
        direction = x.grad / x.grad.norm()
        yield (model(batch[0] + 0.1 * direction) - 1).square().mean()


# Passes -----------------------------------------------------------------------------------------


class TwoBatches(Stack):
    """The batch holds two sets of tokens."""

    @staticmethod
    def batch(step: int, micro: int, rank: int) -> Batch:
        return tokens(step, micro, rank), tokens(step + 50, micro, rank)


@awkward
class TwoBackwards(TwoBatches):
    """Each micro-step has a forward and a backward, and then another forward and backward."""

    @staticmethod
    def losses(model: Model, batch: Batch) -> Iterator[Tensor]:
        for ids in batch:
            yield cross_entropy(model(ids), ids)


@awkward
class TwoForwardsThenBackward(TwoBatches):
    """Two forwards feed one loss."""

    @staticmethod
    def losses(model: Model, batch: Batch) -> Iterator[Tensor]:
        first, second = (model(ids) for ids in batch)
        yield cross_entropy(first, batch[0]) + cross_entropy(second, batch[1]) * first.std()


@awkward
class TwoForwardsThenTwoBackwards(TwoBatches):
    """Two forwards are followed by their backwards, first in first out."""

    @staticmethod
    def losses(model: Model, batch: Batch) -> Iterator[Tensor]:
        logits = [model(ids) for ids in batch]
        for output, ids in zip(logits, batch, strict=True):
            yield cross_entropy(output, ids)


@awkward
class GraphUsedTwice(Stack):
    """Two losses go back through one graph, one after the other."""

    checkpointing_modes = NO_CHECKPOINTING
    retain_graph = True

    @staticmethod
    def losses(model: Model, batch: Batch) -> Iterator[Tensor]:
        logits = model(*batch)
        yield cross_entropy(logits, batch[0])
        yield logits.square().mean()


class OfFeatures(Stack):
    """Blocks and a head on features, whose gradient is asked for."""

    checkpointing_modes = NON_REENTRANT  # the other kind knows no torch.autograd.grad

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(WIDTH, WIDTH)

    @staticmethod
    def batch(step: int, micro: int, rank: int) -> Batch:
        return (features(step, micro, rank, BATCH, LENGTH, WIDTH),)


@awkward
class GradientPenalty(OfFeatures):
    """The loss depends on the gradient of the output by the input."""

    @staticmethod
    def losses(model: Model, batch: Batch) -> Iterator[Tensor]:
        x = batch[0].clone().requires_grad_()
        out = model(x)
        (slope,) = torch.autograd.grad(out.sigmoid().mean(), x, create_graph=True)
        yield out.sigmoid().mean() + 100 * slope.square().mean()


@awkward
class ForceField(OfFeatures):
    """The model's forward itself differentiates, and the loss depends on the result alone."""

    @staticmethod
    def losses(model: Model, batch: Batch) -> Iterator[Tensor]:
        yield (100 * model(*batch) - 1).square().mean()

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = super().forward(x).sigmoid().mean()
        return torch.autograd.grad(energy, x, create_graph=torch.is_grad_enabled())[0]


@awkward
class ForwardWithoutGradient(Stack):
    """The model first runs without gradients, and what it said then is a target."""

    def forward(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = self.embedding(ids)
            for block in self.blocks:
                teacher = block(teacher)
        h = self.embedding(ids)
        for block in self.blocks:
            h = self.run(block, h)
        return self.head(h + 0.1 * teacher)


@awkward
class ForwardNeverFollowedByBackward(TwoBatches):
    """One of two forwards with gradients has no backward at all."""

    @staticmethod
    def losses(model: Model, batch: Batch) -> Iterator[Tensor]:
        model(batch[1])
        yield cross_entropy(model(batch[0]), batch[0])
