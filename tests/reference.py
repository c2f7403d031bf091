"""What training must compute, by plain PyTorch in one process, and the same through zeroshard.

:func:`reference_run` replays on one process what all ranks do together: the gradient of a step is
the mean over ranks and micro-steps. :func:`engine_run` does the steps on this rank through an
engine. :func:`differences` compares the two records.

One convention is deliberate: a trainable parameter that nobody used in a step counts as one with a
gradient of zeros, so momentum and weight decay move it. A shard has no way to say "no gradient",
and ranks do not agree on who used what.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

import zeroshard
from forked import run_ranks
from zoo import Case, Checkpointing

__all__ = [
    "LOOSE_CLIP",
    "TIGHT_CLIP",
    "TOLERANCE",
    "Comparison",
    "Record",
    "Setting",
    "compare",
    "config_of",
    "differences",
    "engine_run",
    "make_engine",
    "make_optimizer",
    "pairwise",
    "reference_run",
    "relative_difference",
    "train",
]

TOLERANCE = 1e-6
TIGHT_CLIP = 0.1  # below every norm in the zoo
LOOSE_CLIP = 1000.0  # above every norm in the zoo
SEED = 7

LOSS_SCALE = 128

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# AdamW turns a gradient g into a step of about lr * g / (|g| + eps). With its default eps of 1e-8
# an element whose gradient is zero up to rounding takes a whole step in a random direction: the
# fp32 reference is then up to 7e-6 from its own fp64 twin on some of the zoo, and a comparison at
# 1e-6 would test luck. With eps at lr / 10 the noise is passed on at most tenfold, the twin is
# within 6e-7 everywhere, and the step depends on the scale of the gradient, so a wrong factor
# shows. `test_adamw_with_its_own_epsilon_...` keeps the default on a case without such elements.
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": (
        torch.optim.AdamW,
        {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.1},
    ),
    "adamw_default": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
}
CONFIG_NAMES = {"adamw": "AdamW", "adamw_default": "AdamW", "sgd": "SGD"}


@dataclass(frozen=True)
class Setting:
    """One way to train a case."""

    stage: int = 3
    world: int = 2
    accumulation: int = 1
    clip: float = 0.0
    checkpointing: Checkpointing = "none"
    optimizer: Literal["adamw", "adamw_default", "sgd"] = "adamw"
    optimizer_from: Literal["config", "caller"] = "config"
    units: Literal["named", "chosen"] = "named"
    backward: Literal["engine", "loss"] = "engine"
    lookahead_bytes: int | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    steps: int = 3
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of the configuration."""

    @property
    def reference_key(self) -> tuple[Any, ...]:
        """Two settings with equal keys must compute the same."""
        return (
            self.world,
            self.accumulation,
            self.clip,
            self.optimizer,
            self.precision,
            self.steps,
        )

    def __str__(self) -> str:
        shown = (
            f"{name}={value}"
            for name, value in vars(self).items()
            if value != getattr(Setting, name, None) and name != "extra"
        )
        return " ".join([f"stage={self.stage}", *(s for s in shown if not s.startswith("stage"))])


@dataclass(frozen=True)
class Record:
    """What a run leaves behind."""

    losses: list[float]
    """Per step, the mean over micro-steps and ranks."""
    norms: list[float]
    """Per step, the norm of the whole gradient before it is clipped."""
    weights: dict[str, Tensor]
    buffers: list[dict[str, Tensor]]
    """Per rank; an engine knows its own rank's only."""


# Plain PyTorch ----------------------------------------------------------------------------------


def make_optimizer(name: str, params: Iterable[Any]) -> torch.optim.Optimizer:
    """The optimizer that a setting names."""
    kind, arguments = OPTIMIZERS[name]
    return kind(params, **arguments)


def reference_run(case: Case, setting: Setting) -> Record:
    """Train without shards and without checkpointing, on the batches of all ranks in turn.

    In fp32 the model itself is trained. In bf16 and fp16 the model is a copy, made after each step,
    of fp32 master weights; gradients leave the copy's dtype before they are added up. In fp16 the
    loss is scaled so that they survive in it.
    """
    model = case.build(SEED).to(None if setting.precision == "fp32" else DTYPES[setting.precision])
    trainable = [p for p in model.parameters() if p.requires_grad]
    masters = _masters(trainable, setting)
    optimizer = make_optimizer(setting.optimizer, masters)
    buffers = [_copy(model.named_buffers()) for _ in range(setting.world)]
    record = Record([], [], {}, buffers)
    share = 1 / (setting.world * setting.accumulation)
    scale = LOSS_SCALE if setting.precision == "fp16" else 1
    for step in range(setting.steps):
        total = 0.0
        for master in masters:
            master.grad = torch.zeros_like(master)
        for micro, rank in itertools.product(range(setting.accumulation), range(setting.world)):
            _restore(model, buffers[rank])
            for loss in case.losses(model, batch_of(case, setting, step, micro, rank)):
                total += loss.item() * share
                (loss * (share * scale)).backward(retain_graph=case.retain_graph)
            buffers[rank] = _copy(model.named_buffers())
            if setting.precision != "fp32":
                _move_gradients(trainable, masters, scale)
        clip = setting.clip or torch.inf
        norm = torch.nn.utils.clip_grad_norm_(masters, clip)
        record.losses.append(total)
        record.norms.append(norm.item())
        optimizer.step()
        with torch.no_grad():
            for param, master in zip(trainable, masters, strict=True):
                if master is not param:
                    param.copy_(master)
    record.weights.update(_copy(model.named_parameters()))
    return record


def batch_of(case: Case, setting: Setting, step: int, micro: int, rank: int) -> tuple[Any, ...]:
    """A batch whose floating-point members have the dtype the model computes in."""
    batch = case.batch(step, micro, rank)
    if setting.precision == "fp32":
        return batch
    dtype = DTYPES[setting.precision]
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in batch
    )


def _masters(trainable: list[nn.Parameter], setting: Setting) -> list[nn.Parameter]:
    if setting.precision == "fp32":
        return trainable
    return [nn.Parameter(param.detach().float()) for param in trainable]


def _move_gradients(
    trainable: list[nn.Parameter], masters: list[nn.Parameter], scale: float
) -> None:
    for param, master in zip(trainable, masters, strict=True):
        if param.grad is not None and master.grad is not None:
            master.grad += param.grad.float() / scale
            param.grad = None


def _copy(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in named}


def _restore(model: nn.Module, buffers: dict[str, Tensor]) -> None:
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


# zeroshard --------------------------------------------------------------------------------------


def config_of(case: Case, setting: Setting) -> dict[str, Any]:
    """The configuration of a run, as a user would write it."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": setting.accumulation,
        "gradient_clipping": setting.clip,
        "zero_optimization": {"stage": setting.stage},
        "zero_allow_untested_optimizer": True,
    }
    if setting.optimizer_from == "config":
        config["optimizer"] = {
            "type": CONFIG_NAMES[setting.optimizer],
            "params": OPTIMIZERS[setting.optimizer][1],
        }
    if setting.precision == "bf16":
        config["bf16"] = {"enabled": True}
    if setting.precision == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": LOSS_SCALE}
    extension: dict[str, Any] = {"lookahead_bytes": setting.lookahead_bytes}
    if setting.units == "named" and case.units:
        extension["units"] = list(case.units)
    return {**config, "zeroshard": extension, **setting.extra}


def make_engine(case: Case, setting: Setting) -> Any:
    """A zeroshard engine around a fresh model of the case."""
    model = case.build(SEED, setting.checkpointing)
    optimizer = None
    if setting.optimizer_from == "caller":
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = make_optimizer(setting.optimizer, trainable)
    return zeroshard.initialize(model=model, optimizer=optimizer, config=config_of(case, setting))[
        0
    ]


def engine_run(
    case: Case,
    setting: Setting,
    rank: int,
    *,
    make_engine: Callable[[Case, Setting], Any] = make_engine,
    weights_of: Callable[[Any], dict[str, Tensor]] | None = None,
) -> Record:
    """Train on this rank through an engine; every rank calls it."""
    engine = make_engine(case, setting)
    losses, norms = train(engine, case, setting, rank)
    weights = (weights_of or full_weights)(engine)
    buffers = _copy(engine.module.named_buffers())
    engine.destroy()
    return Record(losses, norms, weights, [buffers])


def train(
    engine: Any, case: Case, setting: Setting, rank: int, steps: Iterable[int] | None = None
) -> tuple[list[float], list[float]]:
    """Take the steps of a setting; return the mean loss and the gradient's norm of each."""
    losses, norms = [], []
    for step in range(setting.steps) if steps is None else steps:
        total = torch.zeros((), dtype=torch.float64)
        for micro in range(setting.accumulation):
            batch = batch_of(case, setting, step, micro, rank)
            for loss in case.losses(engine, batch):
                total += loss.detach().double()
                if setting.backward == "engine" and not case.retain_graph:
                    engine.backward(loss)
                elif setting.backward == "engine":
                    engine.backward(loss, retain_graph=True)
                else:
                    loss.backward(retain_graph=case.retain_graph)
            engine.step()
        dist.all_reduce(total)
        losses.append(total.item() / (setting.world * setting.accumulation))
        norms.append(float(engine.get_global_grad_norm()))
    return losses, norms


def full_weights(engine: Any) -> dict[str, Tensor]:
    """Copies of all parameters in full; every rank calls it."""
    with zeroshard.gathered(engine.module):
        return _copy(engine.module.named_parameters())


# Comparison -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """How training in one setting compares with the reference."""

    setting: Setting
    differences: list[str]
    """All deviations beyond the tolerance, and all deviations between ranks, in words."""
    record: Record | None = None
    """What rank 0 has, where that was asked for."""


@dataclass(frozen=True)
class _Finding:
    """What one rank reports of one setting; weights stay with it, since they are slow to send."""

    differences: list[str]
    fingerprint: str
    buffers: list[dict[str, Tensor]]
    record: Record | None


def compare(
    case: Case,
    settings: Sequence[Setting],
    *,
    tolerance: float = TOLERANCE,
    keep_records: bool = False,
    timeout: float = 60,
    **engine: Any,
) -> list[Comparison]:
    """Run settings that share one world in one fork, each against its reference."""
    worlds = {setting.world for setting in settings}
    assert len(worlds) == 1, f"settings of several worlds in one fork: {worlds}"

    def work(rank: int, world: int) -> list[_Finding]:
        references: dict[tuple[Any, ...], Record] = {}
        findings = []
        for setting in settings:
            try:
                if rank == 0 and setting.reference_key not in references:
                    references[setting.reference_key] = reference_run(case, setting)
                record = engine_run(case, setting, rank, **engine)
            except Exception as error:
                raise RuntimeError(f"{case.name} failed [{setting}]") from error
            want = references.get(setting.reference_key)
            findings.append(
                _Finding(
                    differences(record, want, tolerance) if want else [],
                    _fingerprint(record.weights),
                    [*record.buffers, *(want.buffers if want else [])],
                    record if rank == 0 and keep_records else None,
                )
            )
        return findings

    ranks = run_ranks(work, worlds.pop(), timeout)
    return [
        _comparison(setting, list(findings), tolerance)
        for setting, *findings in zip(settings, *ranks, strict=True)
    ]


def _comparison(setting: Setting, findings: list[_Finding], tolerance: float) -> Comparison:
    first = findings[0]
    found = list(first.differences)
    for rank, finding in enumerate(findings):
        if finding.fingerprint != first.fingerprint:
            found.append(f"rank {rank} has other weights than rank 0")
        what, want = f"buffer of rank {rank}", first.buffers[1 + rank]
        found += _compare_tensors(what, finding.buffers[0], want, tolerance)
    return Comparison(setting, [f"[{setting}] {text}" for text in found], first.record)


def _fingerprint(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def differences(got: Record, want: Record, tolerance: float = TOLERANCE) -> list[str]:
    """Every loss, norm and weight that is further off than the tolerance, in words."""
    found = []
    for what, ours, theirs in (
        ("loss", got.losses, want.losses),
        ("norm", got.norms, want.norms),
    ):
        found += [
            f"{what} of step {step} is {a!r}, should be {b!r} (off by {abs(a - b) / abs(b):.1e})"
            for step, (a, b) in enumerate(zip(ours, theirs, strict=True))
            if not abs(a - b) <= tolerance * abs(b)
        ]
    return found + _compare_tensors("weight", got.weights, want.weights, tolerance)


def relative_difference(got: Tensor, want: Tensor) -> float:
    """`||got - want|| / ||want||`, in fp64; zero where both are zero or have no elements."""
    distance = (got.double() - want.double()).norm().item()
    return distance / want.double().norm().item() if distance else 0.0


def _compare_tensors(
    what: str, got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float
) -> list[str]:
    if got.keys() != want.keys():
        return [f"{what}s are named {sorted(got)}, should be {sorted(want)}"]
    found = []
    for name, tensor in want.items():
        if got[name].shape != tensor.shape or got[name].dtype != tensor.dtype:
            ours, theirs = (f"{x.dtype} {tuple(x.shape)}" for x in (got[name], tensor))
            found.append(f"{what} {name} is {ours}, should be {theirs}")
        elif not (off := relative_difference(got[name], tensor)) <= tolerance:
            found.append(f"{what} {name} is off by {off:.1e}")
    return found


# Selection --------------------------------------------------------------------------------------


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """A short list of settings in which every two values of different factors meet.

    Greedy and deterministic: each round starts from the first pair not yet met, then gives each
    other factor the value that meets most new pairs.
    """
    names = list(factors)
    missing = dict.fromkeys(
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x in range(len(factors[a]))
        for y in range(len(factors[b]))
    )
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for index, name in enumerate(names):
            if name not in row:
                # Rotating the candidates spreads the values of factors that are long satisfied.
                count = len(factors[name])
                turned = [(x + len(rows) + index) % count for x in range(count)]
                row[name] = max(turned, key=lambda x: _new_pairs(row, name, x, missing, names))
        for pair in itertools.combinations(((name, row[name]) for name in names), 2):
            missing.pop(pair, None)
        rows.append({name: factors[name][row[name]] for name in names})
    return rows


def _new_pairs(
    row: dict[str, int], name: str, value: int, missing: dict[Any, None], names: list[str]
) -> int:
    def pairs() -> Iterator[tuple[tuple[str, int], tuple[str, int]]]:
        for other, chosen in row.items():
            pair = ((other, chosen), (name, value))
            yield pair if names.index(other) < names.index(name) else pair[::-1]

    return sum(pair in missing for pair in pairs())
