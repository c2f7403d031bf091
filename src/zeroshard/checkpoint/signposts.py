"""Files under the names that DeepSpeed gives its own, for programs that look for those.

They say little, and nothing here reads them. ``torch.load`` reads
them without running code of theirs, unless the caller's state needs it.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from zeroshard.checkpoint.folder import SCRIPT, write_text
from zeroshard.checkpoint.manifest import Entry, Writer
from zeroshard.checkpoint.objects import save_objects
from zeroshard.checkpoint.training import Progress
from zeroshard.errors import CheckpointError

__all__ = [
    "facts_of",
    "get_model_state_file",
    "get_optim_files",
    "write_script",
    "write_signposts",
]

_MODEL, _OPTIMIZER = "mp_rank_00_model_states.pt", "mp_rank_00_optim_states.pt"
_TEXT = '''#!/usr/bin/env python3
"""Makes plain fp32 weights of a checkpoint: python zero_to_fp32.py FOLDER OUTPUT"""

from zeroshard.checkpoint import main

if __name__ == "__main__":
    main()
'''


def _model_file(zero_stage: int, rank: int) -> str:
    # Where parameters are freed after use, DeepSpeed writes a file for each rank.
    return f"zero_pp_rank_{rank}_{_MODEL}" if zero_stage == 3 else _MODEL


def write_signposts(
    folder: Path, rank: int, writer: Writer, facts: Mapping[str, Any], client: Mapping[str, Any]
) -> None:
    """Write this rank's files: facts of the checkpoint, and on rank 0 the caller's state."""
    if rank == 0 or writer.stage == 3:
        content = {**facts, **client} if rank == 0 else dict(facts)
        save_objects(folder / _model_file(writer.stage, rank), content)
    prefix = "bf16_" if writer.precision == "bf16" else ""
    inner = {"zero_stage": writer.stage, "partition_count": writer.world}
    state = {"optimizer_state_dict": inner, "ds_version": facts["ds_version"]}
    save_objects(folder / f"{prefix}zero_pp_rank_{rank}_{_OPTIMIZER}", state)


def facts_of(
    writer: Writer, progress: Progress, entries: Mapping[str, Entry], names: Mapping[str, str]
) -> dict[str, Any]:
    """What there is to know of a checkpoint, by DeepSpeed's keys."""
    shapes = {name: torch.Size(entry.shape) for name, entry in entries.items()}
    trained = {name: shapes[name] for name, entry in entries.items() if not entry.is_frozen}
    return {
        "ds_version": f"zeroshard {writer.zeroshard}",
        "dp_world_size": writer.world,
        "mp_world_size": 1,
        "global_steps": progress.global_steps,
        "global_samples": progress.global_samples,
        "skipped_steps": progress.skipped_steps,
        "buffer_names": list(dict.fromkeys(n for n in names.values() if n not in entries)),
        "param_shapes": [trained],
        "frozen_param_shapes": {name: shapes[name] for name in shapes if name not in trained},
        "shared_params": {name: source for name, source in names.items() if name != source},
        "module": {},
    }


def write_script(root: Path) -> None:
    """Write the program that users of DeepSpeed run to get plain weights."""
    path = root / SCRIPT
    write_text(path, _TEXT)
    path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)


def get_model_state_file(checkpoint_dir: str | Path, zero_stage: int) -> str:
    """The path of the file about the model in a checkpoint's own folder, the one named by its tag.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(checkpoint_dir) / _model_file(zero_stage, 0)
    if not path.exists():
        raise CheckpointError(f"there is no {path.name} in {checkpoint_dir}.")
    return str(path)


def get_optim_files(checkpoint_dir: str | Path) -> list[str]:
    """The paths of the files about the optimizer in a checkpoint's own folder.

    Raises:
        CheckpointError: there are none.
    """
    found = [str(path) for path in sorted(Path(checkpoint_dir).glob("*_optim_states.pt"))]
    if not found:
        raise CheckpointError(f"there are no *_optim_states.pt in {checkpoint_dir}.")
    return found
