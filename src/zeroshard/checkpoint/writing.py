"""Saving: each rank writes what only it has, rank 0 writes what all have and the manifest."""

from __future__ import annotations

import json
import logging
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from zeroshard.checkpoint import folder as disk
from zeroshard.checkpoint.encoding import Encoder
from zeroshard.checkpoint.generators import states_of_generators
from zeroshard.checkpoint.manifest import (
    GRADIENTS,
    STATE,
    UNREDUCED,
    WEIGHTS,
    Entry,
    Manifest,
)
from zeroshard.checkpoint.moments import describe, group_of, moments_of, scalar_keys
from zeroshard.checkpoint.objects import save_objects
from zeroshard.checkpoint.signposts import facts_of, write_script, write_signposts
from zeroshard.checkpoint.tensors import memory_of, name_of_dtype, on_host, write_tensors
from zeroshard.checkpoint.together import check_equal, from_rank_0
from zeroshard.checkpoint.training import (
    Place,
    Progress,
    Training,
    named_buffers,
    places,
    present,
)
from zeroshard.core.access import companions_on_host
from zeroshard.core.agreed import agreed
from zeroshard.core.collectives import Answered, gather_bytes
from zeroshard.core.freed import FreedParameter

__all__ = ["PRIVATE", "Common", "save"]

_log = logging.getLogger(__name__)
PRIVATE = "zeroshard"
"""Where in the header of a rank's file is what concerns that rank alone."""


@dataclass(frozen=True, slots=True)
class Common:
    """What rank 0 saves for all ranks, and whether frozen parameters are saved.

    ``companions`` are those of quantised parameters, by what is shown in their place.
    """

    client: Mapping[str, Any]
    progress: Progress
    with_frozen: bool = True
    companions: Mapping[Tensor, Tensor] = field(default_factory=dict[Tensor, Tensor])


@dataclass(slots=True)
class _Share:
    """What a rank contributes: tensors for its own file, and facts for the manifest."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    private: dict[str, Any] = field(default_factory=dict)
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    has_gradients: bool = False


def save(training: Training, root: Path, tag: str, content: Common, *, save_latest: bool) -> Path:
    """Write a checkpoint. A collective; an error of one rank is raised on all.

    What is already under the same name is replaced when all is written.

    Returns:
        Its folder.
    """
    mesh, folder, started = training.mesh, root / tag, time.monotonic()
    asked = [str(folder), save_latest, content.with_frozen]
    check_equal(json.dumps(asked), mesh, "save_dir, tag, save_latest or exclude_frozen_parameters")
    disk.check_tag(tag)
    with _abandoned_on_error(folder, mesh.rank):
        with agreed(mesh, f"make {folder}"):
            if mesh.rank == 0:
                disk.begin(folder)
            buffers = named_buffers(training.model, training.model.state_dict(keep_vars=True))
            digests = _digests(buffers)
        if content.with_frozen:
            companions = companions_on_host(training.units, wanted=mesh.rank == 0)
            content = replace(content, companions=companions)
        common = from_rank_0(digests, mesh, "to compare buffers with rank 0")
        with agreed(mesh, f"write its part of {folder}"):
            share = _share_of(training, buffers, json.loads(common), content.with_frozen)
            path = disk.unfinished_folder(folder) / disk.rank_file(mesh.rank)
            private = {PRIVATE: json.dumps(share.private)}
            nbytes = write_tensors(path, share.tensors, private)
            _write_facts(training, path.parent, content)
            facts = {"bytes": nbytes, "entries": share.entries}
            told = json.dumps({**facts, "has_gradients": share.has_gradients}).encode()
        with Answered(mesh.rank, f"to tell rank 0 what it wrote to {folder}"):
            shares = [json.loads(each) for each in gather_bytes(told, mesh)]
        with agreed(mesh, f"finish {folder}"):
            if mesh.rank == 0:
                _finish(root, tag, training, shares, content, save_latest=save_latest)
    _log.info("%s saved in %.1f s", folder, time.monotonic() - started)
    return folder


@contextmanager
def _abandoned_on_error(folder: Path, rank: int) -> Iterator[None]:
    try:
        yield
    except Exception:
        if rank == 0:
            disk.abandon(folder)
        raise


@dataclass(frozen=True, slots=True)
class _Model:
    """What of a model is saved: parameters, buffers, and entries that are neither.

    ``names`` are those of its state dict, each with that of the parameter or buffer it stands for.
    """

    places: list[Place]
    names: dict[str, str]
    buffers: dict[str, Tensor]
    extras: dict[str, Any]

    @classmethod
    def of(cls, training: Training, with_frozen: bool) -> _Model:
        state = training.model.state_dict(keep_vars=True)
        buffers = named_buffers(training.model, state)
        everywhere = list(places(training))
        saved = [p for p in everywhere if with_frozen or p.param.requires_grad]
        known = {id(place.param): place.name for place in everywhere}
        known |= {id(buffer): name for name, buffer in buffers.items()}
        kept = {place.name for place in saved} | buffers.keys()
        return cls(
            places=saved,
            names={
                name: known[id(value)]
                for name, value in state.items()
                if known.get(id(value)) in kept
            },
            buffers=buffers,
            extras={name: value for name, value in state.items() if id(value) not in known},
        )


# What every rank writes


def _digests(buffers: Mapping[str, Tensor]) -> bytes:
    return json.dumps({name: _digest(buffer) for name, buffer in buffers.items()}).encode()


def _digest(tensor: Tensor) -> int:
    host = on_host(tensor)
    return zlib.crc32(memory_of(host))


def _share_of(
    training: Training,
    buffers: Mapping[str, Tensor],
    digests: Mapping[str, int],
    with_frozen: bool,
) -> _Share:
    """Everything of this rank: no copies yet but of what is small."""
    share, encoder = _Share(), Encoder("value/")
    optimizer = training.sharded.inner if training.sharded else None
    scalars = scalar_keys(optimizer) if optimizer else set[str]()
    groups = group_of(optimizer) if optimizer else {}
    for unit in training.units:
        unit.settle()
    for place in places(training):
        if place.unit.is_trained:
            _add_gradient(share, place)
        if not place.is_written_here or not (with_frozen or place.param.requires_grad):
            continue
        share.tensors[f"{WEIGHTS}/{place.name}"] = place.of(place.unit.read_kept())
        if optimizer is not None and place.unit.is_trained:
            share.entries[place.name] = facts = {"group": groups.get(id(place.slice))}
            state = optimizer.state.get(place.slice)
            if state:
                found = moments_of(state, place, scalars, encoder)
                for key, value in found.slices.items():
                    share.tensors[f"{STATE}{key}/{place.name}"] = value.reshape(-1)
                facts |= {"slices": [*found.slices], "numbers": found.numbers}
                facts["blocks"] = found.blocks
    rank = training.mesh.rank
    for name, buffer in buffers.items():
        if rank == 0 or _digest(buffer) != digests.get(name):
            share.tensors[f"buffers/{name}"] = buffer.detach()
    share.private["generators"] = encoder.encode(states_of_generators(training.mesh.device))
    if training.watch is not None:
        share.private["seen"] = training.watch.seen
    share.tensors |= encoder.tensors
    return share


def _write_facts(training: Training, folder: Path, content: Common) -> None:
    """Write what programs look for that know DeepSpeed's files."""
    model = _Model.of(training, content.with_frozen)
    entries = {place.name: _entry(place, []) for place in model.places}
    facts = facts_of(training.writer, content.progress, entries, model.names)
    write_signposts(folder, training.mesh.rank, training.writer, facts, content.client)


def _add_gradient(share: _Share, place: Place) -> None:
    """The gradients of an accumulation that is under way."""
    unit = place.unit
    if unit.grad_shard is not None and place.is_written_here:
        share.tensors[f"{GRADIENTS}/{place.name}"] = place.of(unit.grad_shard)
        share.has_gradients = True
    own = unit.unreduced(place.index)
    if own is not None:
        share.tensors[f"{UNREDUCED}/{place.name}"] = own.reshape(-1)
        share.has_gradients = True


# What rank 0 writes


def _finish(
    root: Path,
    tag: str,
    training: Training,
    shares: list[dict[str, Any]],
    content: Common,
    *,
    save_latest: bool,
) -> None:
    """Write the manifest and what all ranks have, and give the folder its name."""
    folder, encoder = root / tag, Encoder("common/")
    unfinished = disk.unfinished_folder(folder)
    manifest = _manifest(training, shares, content, encoder)
    files = {disk.rank_file(rank): share["bytes"] for rank, share in enumerate(shares)}
    files[disk.COMMON] = write_tensors(unfinished / disk.COMMON, encoder.tensors)
    if encoder.objects:
        files[disk.OBJECTS] = save_objects(unfinished / disk.OBJECTS, encoder.objects)
    manifest = replace(manifest, files=files)
    disk.write_text(unfinished / disk.MANIFEST, manifest.to_json())
    disk.finish(folder)
    if save_latest:
        disk.mark_latest(root, tag)
    write_script(root)


def _manifest(
    training: Training, shares: list[dict[str, Any]], content: Common, encoder: Encoder
) -> Manifest:
    sharded, schedule = training.sharded, training.schedule
    has_schedule = hasattr(schedule, "state_dict")
    model = _Model.of(training, content.with_frozen)
    return Manifest(
        writer=training.writer,
        files={},
        parameters={place.name: _entry(place, shares) for place in model.places},
        names=model.names,
        buffers=tuple(model.buffers),
        extras={
            name: encoder.encode(present(value, content.companions))
            for name, value in model.extras.items()
        },
        without_frozen=not content.with_frozen,
        progress=asdict(content.progress),
        has_gradients=any(share["has_gradients"] for share in shares),
        scaler=sharded.scaler.state_dict() if sharded and sharded.scaler else None,
        schedule=encoder.encode(schedule.state_dict()) if has_schedule else None,
        optimizer=describe(sharded.inner, encoder) if sharded else None,
        client=encoder.encode(dict(content.client)),
    )


def _entry(place: Place, shares: list[dict[str, Any]]) -> Entry:
    pieces = place.pieces()
    told = {
        piece.rank: shares[piece.rank]["entries"][place.name]
        for piece in pieces
        if shares and place.name in shares[piece.rank]["entries"]
    }
    first = next(iter(told.values()), {})
    return Entry(
        shape=tuple(place.unit.shapes[place.index]),
        dtype=name_of_dtype(place.param.dtype),
        is_frozen=not place.param.requires_grad,
        is_opaque=not place.unit.is_trained
        and type(place.param) not in {nn.Parameter, FreedParameter},
        pieces=pieces,
        group=first.get("group"),
        slices=tuple(first.get("slices", ())),
        numbers=first.get("numbers", {}),
        blocks={str(rank): facts["blocks"] for rank, facts in told.items() if facts.get("blocks")},
    )
