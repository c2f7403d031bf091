"""Loading: each rank reads the ranges that it owns now, wherever they were written."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zeroshard.checkpoint import folder as disk
from zeroshard.checkpoint.encoding import Decoder
from zeroshard.checkpoint.generators import restore_generators
from zeroshard.checkpoint.manifest import GRADIENTS, STATE, UNREDUCED, WEIGHTS
from zeroshard.checkpoint.matching import Match, check_extras, match
from zeroshard.checkpoint.moments import check_kind, decoded, group_of
from zeroshard.checkpoint.reader import Reader
from zeroshard.checkpoint.tensors import TensorFile
from zeroshard.checkpoint.together import check_equal, from_rank_0
from zeroshard.checkpoint.training import Place, Progress, Training, present
from zeroshard.checkpoint.writing import PRIVATE
from zeroshard.core.access import companions_on_host, reshow
from zeroshard.core.agreed import agreed
from zeroshard.core.transport import rewriting
from zeroshard.core.unit import Unit
from zeroshard.errors import CheckpointError, compose
from zeroshard.optim.sharded import ShardedOptimizer

__all__ = ["Loaded", "Wanted", "load"]

_log = logging.getLogger(__name__)
_EXTRA_STATE = "_extra_state"  # torch's name for what get_extra_state() gives


@dataclass(frozen=True, slots=True)
class Wanted:
    """What of a checkpoint is loaded; the caller's state always is.

    ``weights`` is false where the caller loads them in a way of its own.
    """

    strict: bool = True
    optimizer: bool = True
    schedule: bool = True
    only_model: bool = False
    weights: bool = True


@dataclass(frozen=True, slots=True)
class Loaded:
    """What was loaded: ``progress`` is None if only the model was wanted."""

    folder: Path
    client: dict[str, Any]
    progress: Progress | None
    world: int


def load(training: Training, root: Path, tag: str | None, wanted: Wanted) -> Loaded | None:
    """Load a checkpoint. A collective; an error of one rank is raised on all.

    Nothing is changed before all files have been looked at.

    Returns:
        None if no tag is given and the folder names none.
    """
    mesh, started = training.mesh, time.monotonic()
    asked = f"{str(root)!r}, {tag!r}, {wanted}"
    check_equal(asked, mesh, "load_dir, tag or another argument of load_checkpoint")
    folder = _find(root, tag, training)
    if folder is None:
        return None
    with agreed(mesh, f"read {folder}"):
        reader = Reader(folder, mesh.rank, mesh.world)
    with reader:
        digest = hashlib.sha256(reader.manifest.to_json().encode()).hexdigest()
        check_equal(digest, mesh, f"the digest of {folder / disk.MANIFEST}")
        companions = dict[Tensor, Tensor]()
        if reader.manifest.extras and not reader.manifest.without_frozen:
            companions = companions_on_host(training.units, wanted=True)
        with agreed(mesh, f"load {folder}"):
            strict = wanted.strict and wanted.weights
            found = match(training, reader.manifest, folder, strict=strict)
            _check(training, reader, found, wanted, companions)
            for rank in _ranks_to_read(found, reader, _same_rank(training, reader)):
                reader.rank(rank)
            client = reader.common.decode(reader.manifest.client)
        with agreed(mesh, f"load {folder}"), torch.no_grad():
            changed: list[Unit] = []
            if wanted.weights:
                changed = _read_model(training, found, reader)
            progress = (
                None if wanted.only_model else _read_training(training, reader, found, wanted)
            )
        for unit in changed:
            reshow(unit)
        loaded = Loaded(folder, client, progress, reader.manifest.writer.world)
    _log.info("%s loaded in %.1f s", folder, time.monotonic() - started)
    return loaded


def _find(root: Path, tag: str | None, training: Training) -> Path | None:
    """The folder of a checkpoint, which rank 0 chooses."""
    mesh = training.mesh
    with agreed(mesh, f"find a checkpoint in {root}"):
        chosen = tag
        if mesh.rank == 0:
            if left := disk.leftovers(root):
                _log.warning(
                    "%s holds %s of saves that were killed. They are never read: remove them, "
                    "unless another program is saving there now.",
                    root,
                    ", ".join(left),
                )
            chosen = disk.newest_tag(root) if tag is None else tag
            if chosen is not None and disk.recover(root / chosen):
                _log.warning(
                    "%s was being replaced when its program ended; the older one is used.",
                    root / chosen,
                )
    told = from_rank_0(json.dumps(chosen).encode(), mesh, f"to know the newest tag in {root}")
    chosen = json.loads(told)
    if chosen is None:
        _log.warning(
            "%s has no file %r that names a checkpoint, so nothing was loaded. Pass a tag to load "
            "one by its name.",
            root,
            disk.LATEST,
        )
        return None
    return root / chosen


def _check(
    training: Training,
    reader: Reader,
    found: Match,
    wanted: Wanted,
    companions: Mapping[Tensor, Tensor],
) -> None:
    """Refuse what does not fit, before anything is changed."""
    manifest, sharded = reader.manifest, training.sharded
    extras = {name: reader.common.decode(value) for name, value in manifest.extras.items()}
    if extras and not manifest.without_frozen:
        state = training.model.state_dict(keep_vars=True)
        own = {name: present(value, companions) for name, value in state.items()}
        check_extras(own, extras, reader.folder)
    if wanted.schedule and not wanted.only_model:
        reader.common.decode(manifest.schedule)
    if sharded is None or wanted.only_model or not wanted.optimizer:
        return
    if manifest.optimizer is None:
        _log.warning("%s holds no state of an optimizer; it starts anew.", reader.folder)
    else:
        check_kind(sharded.inner, manifest.optimizer, reader.folder)
        groups = group_of(sharded.inner)
        for place, name in _stepped(sharded.inner, found):
            _check_state(reader, name, place, groups[id(place.slice)])


def _ranks_to_read(found: Match, reader: Reader, same_rank: int | None) -> set[int]:
    """The ranks whose files this rank needs something of; rank 0 has the buffers."""
    own = {0} if same_rank is None else {0, same_rank}
    return own | {
        piece.rank
        for place, name in found.parameters
        for piece in reader.manifest.parameters[name].pieces
        if piece.range.start < place.owned().stop and place.owned().start < piece.range.stop
    }


# The model


def _read_model(training: Training, found: Match, reader: Reader) -> list[Unit]:
    """Read weights and buffers; give the units that changed."""
    by_unit: dict[Unit, list[tuple[Place, str]]] = {}
    for place, name in found.parameters:
        by_unit.setdefault(place.unit, []).append((place, name))
    with rewriting(unit.transport for unit in by_unit):
        for unit, members in by_unit.items():
            kept = unit.read_kept()
            for place, name in members:
                _read_slice(reader, WEIGHTS, name, place, place.of(kept))
            unit.load_kept(kept)
    rank = _same_rank(training, reader)
    for name, buffer in found.buffers.items():
        buffer.copy_(_buffer(reader, name, rank))
    modules = dict(training.model.named_modules(remove_duplicate=False))
    for name, encoded in reader.manifest.extras.items():
        path, _, last = name.rpartition(".")
        if last == _EXTRA_STATE and path in modules:
            modules[path].set_extra_state(reader.common.decode(encoded))
    return list(by_unit)


def _buffer(reader: Reader, name: str, rank: int | None) -> Tensor:
    """A buffer as this rank had it, if it had another one than rank 0."""
    key = f"buffers/{name}"
    own = reader.rank(rank) if rank is not None else None
    return (own if own is not None and key in own else reader.rank(0)).read(key)


def _read_slice(reader: Reader, kind: str, name: str, place: Place, out: Tensor) -> None:
    reader.read_range(kind, name, place.owned(), out)


def _same_rank(training: Training, reader: Reader) -> int | None:
    """This rank, if as many ranks wrote the checkpoint; then it goes on where it stood itself."""
    mesh = training.mesh
    return mesh.rank if mesh.world == reader.manifest.writer.world else None


# Everything else


def _read_training(training: Training, reader: Reader, found: Match, wanted: Wanted) -> Progress:
    manifest, sharded = reader.manifest, training.sharded
    progress = Progress(**manifest.progress)
    if sharded is not None and wanted.optimizer and manifest.optimizer is not None:
        _read_optimizer(sharded, reader, found)
        if sharded.scaler is not None and manifest.scaler is not None:
            sharded.scaler.load_state_dict(manifest.scaler)
        progress = _read_gradients(training, reader, found, progress)
        rank = _same_rank(training, reader)
        if rank is not None:
            _read_private(training, reader.rank(rank))
    else:
        for unit in training.units:
            unit.clear_gradients()
        progress = _without_accumulation(progress)
    if wanted.schedule and training.schedule is not None:
        if manifest.schedule is None:
            _log.warning("%s holds no state of a schedule; it starts anew.", reader.folder)
        else:
            training.schedule.load_state_dict(reader.common.decode(manifest.schedule))
    return progress


def _read_private(training: Training, file: TensorFile) -> None:
    private: dict[str, Any] = json.loads(file.metadata[PRIVATE])
    restore_generators(Decoder(file.read).decode(private["generators"]), training.mesh.device)
    if training.watch is not None:
        training.watch.resume(private.get("seen", ()))


def _read_optimizer(sharded: ShardedOptimizer, reader: Reader, found: Match) -> None:
    optimizer, saved = sharded.inner, reader.manifest.optimizer
    assert saved is not None, "there is state of an optimizer"
    by_unit: dict[Unit, list[tuple[Place, str]]] = {}
    for place, name in _stepped(optimizer, found):
        by_unit.setdefault(place.unit, []).append((place, name))
    sharded.let_go_of_state()
    for unit, members in by_unit.items():  # which is all that is there twice
        for place, name in members:
            optimizer.state.pop(place.slice, None)
            if state := _read_state(reader, name, place):
                optimizer.state[place.slice] = state
        sharded.keep(unit)
    sharded.seal()
    for group, values in zip(optimizer.param_groups, saved["groups"], strict=True):
        for key, value in reader.common.decode(values).items():
            if isinstance(own := group.get(key), Tensor) and isinstance(value, Tensor):
                own.copy_(value)  # a schedule may hold on to it
            else:
                group[key] = value


def _stepped(optimizer: torch.optim.Optimizer, found: Match) -> list[tuple[Place, str]]:
    """The parameters that the optimizer steps, with their saved names."""
    groups = group_of(optimizer)
    return [
        (place, name)
        for place, name in found.parameters
        if place.unit.is_trained and id(place.slice) in groups
    ]


def _check_state(reader: Reader, name: str, place: Place, group: int) -> None:
    """Refuse state of a parameter that was in another group, or cut in a way that does not fit."""
    entry = reader.manifest.parameters[name]
    if entry.group is not None and entry.group != group:
        raise CheckpointError(
            compose(
                f"{name} was in param group {entry.group} of the optimizer when {reader.folder} "
                f"was written, and is in group {group}.",
                hint="make the groups as they were, or pass load_optimizer_states=False.",
            )
        )
    if entry.blocks and place.owned().numel:
        _owner_of_blocks(reader, name, place)


def _read_state(reader: Reader, name: str, place: Place) -> dict[str, Any]:
    """The optimizer's state for this rank's slice; none if the parameter was never stepped."""
    entry, piece, device = reader.manifest.parameters[name], place.slice, place.unit.mesh.device
    if entry.blocks:
        return _read_blocks(reader, name, place)
    state: dict[str, Any] = {}
    for key in entry.slices:
        kind = STATE + key
        dtype = reader.dtype(kind, name)
        if dtype == reader.dtype(WEIGHTS, name):
            dtype = piece.dtype  # an optimizer that makes it like the weights expects it so
        flat = torch.empty(piece.numel(), dtype=dtype, device=piece.device)
        _read_slice(reader, kind, name, place, flat)
        state[key] = flat.view(piece.shape)
    state |= {k: decoded(spec, reader.common, device) for k, spec in entry.numbers.items()}
    return state


def _owner_of_blocks(reader: Reader, name: str, place: Place) -> int:
    """The rank that had the same slice, whose state fits this rank's slice only."""
    entry, owned = reader.manifest.parameters[name], place.owned()
    same = [each.rank for each in entry.pieces if each.range == owned]
    if not same:
        raise CheckpointError(
            compose(
                f"the optimizer's state of {name} holds "
                f"{', '.join(next(iter(entry.blocks.values())))}, which cannot be cut anew: it "
                "belongs to slices that were cut for "
                f"{reader.manifest.writer.world} ranks, and these are others.",
                hint="resume on as many ranks as saved it, at the same configuration, or pass "
                "load_optimizer_states=False.",
            )
        )
    return same[0]


def _read_blocks(reader: Reader, name: str, place: Place) -> dict[str, Any]:
    """State that fits one slice only."""
    entry, piece, device = reader.manifest.parameters[name], place.slice, place.unit.mesh.device
    if not place.owned().numel:
        return {}
    rank = _owner_of_blocks(reader, name, place)
    file, decoder = reader.rank(rank), reader.decoder(rank)
    state: dict[str, Any] = {}
    for key in entry.slices:
        flat = file.read(f"{STATE}{key}/{name}").to(piece.device)
        state[key] = flat.view(piece.shape)
    own = entry.blocks.get(str(rank), {})
    state |= {key: decoded(spec, decoder, device) for key, spec in own.items()}
    return state | {k: decoded(spec, decoder, device) for k, spec in entry.numbers.items()}


# An accumulation under way


def _without_accumulation(progress: Progress) -> Progress:
    return replace(
        progress,
        micro_steps=progress.micro_steps - progress.accumulated,
        accumulated=0,
        is_step_due=False,
        has_run_backward=False,
    )


def _read_gradients(
    training: Training, reader: Reader, found: Match, progress: Progress
) -> Progress:
    """Go on with the gradients that were accumulated, as far as they still mean the same."""
    for unit in training.units:
        unit.clear_gradients()
    if not reader.manifest.has_gradients:
        return progress
    if progress.accumulation != training.accumulation:
        _log.warning(
            "%s was saved after %d of %d micro-steps of a step, which now has %d: that step starts "
            "anew.",
            reader.folder,
            progress.accumulated,
            progress.accumulation,
            training.accumulation,
        )
        return _without_accumulation(progress)
    theirs = reader.manifest.scaler["scale"] if reader.manifest.scaler else 1.0
    own = training.sharded.scaler.scale if training.sharded and training.sharded.scaler else 1.0
    if theirs != own:
        _log.warning(
            "%s was saved within a step, with gradients for a loss scale of %g, which now is %g: "
            "that step starts anew.",
            reader.folder,
            theirs,
            own,
        )
        return _without_accumulation(progress)
    by_unit: dict[Unit, list[tuple[Place, str]]] = {}
    for place, name in found.parameters:
        if place.unit.is_trained:
            by_unit.setdefault(place.unit, []).append((place, name))
    rank = _same_rank(training, reader)
    for unit, members in by_unit.items():
        if rank is not None and unit.lifetime.grads_stay:
            _resume_own(unit, members, reader, rank)
        else:
            _resume_average(unit, members, reader)
    return progress


def _resume_own(unit: Unit, members: list[tuple[Place, str]], reader: Reader, rank: int) -> None:
    """Take back what this rank accumulated alone, and what all had averaged."""
    file = reader.rank(rank)
    if any(f"{UNREDUCED}/{name}" in file for _, name in members):
        views = unit.resume_unreduced()
        for place, name in members:
            file.read_range(f"{UNREDUCED}/{name}", 0, views[place.index].view(-1))
    _resume_average(unit, members, reader, with_unreduced=False)


def _resume_average(
    unit: Unit, members: list[tuple[Place, str]], reader: Reader, with_unreduced: bool = True
) -> None:
    """Take what all ranks had averaged, and the average of what each had alone."""
    dtype = torch.float64 if unit.read_kept().dtype == torch.float64 else torch.float32
    shard = torch.zeros(unit.layout.shard_numel, dtype=dtype, device=unit.mesh.device)
    world, has_any = reader.manifest.writer.world, False
    for place, name in members:
        out, owned = place.of(shard), place.owned()
        if reader.has(GRADIENTS, name):
            _read_slice(reader, GRADIENTS, name, place, out)
            has_any = True
        for rank in range(world) if with_unreduced else ():
            if f"{UNREDUCED}/{name}" in reader.rank(rank):
                own = torch.empty_like(out)
                reader.rank(rank).read_range(f"{UNREDUCED}/{name}", owned.start, own)
                out.add_(own, alpha=1 / world)
                has_any = True
    if has_any:
        unit.resume_gradient(shard)
