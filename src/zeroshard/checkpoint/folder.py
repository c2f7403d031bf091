"""Where a checkpoint lies on the disk, and how it appears there whole or not at all.

    DIR/latest                    the tag of the newest checkpoint
    DIR/zero_to_fp32.py           makes plain weights of it
    DIR/TAG/manifest.json         what there is, and which range of it is in which file
    DIR/TAG/rank_00000.safetensors   what rank 0 has written
    DIR/TAG/common.safetensors    tensors of state that all ranks have, the caller's among it
    DIR/TAG/objects.pt            what of it is no data; absent if there is no such thing

While it is written, the folder has a hidden name. It is renamed when every rank is done, after
which ``latest`` is replaced, so both show a checkpoint before or after, never one in between.
"""

from __future__ import annotations

import os
import shutil
from fnmatch import fnmatch
from pathlib import Path

from zeroshard.errors import CheckpointError, UsageError, compose

__all__ = [
    "COMMON",
    "LATEST",
    "MANIFEST",
    "OBJECTS",
    "SCRIPT",
    "abandon",
    "begin",
    "check_tag",
    "finish",
    "leftovers",
    "mark_latest",
    "newest_tag",
    "rank_file",
    "recover",
    "standing",
    "sync_folder",
    "unfinished_folder",
    "write_text",
]

LATEST = "latest"
MANIFEST = "manifest.json"
COMMON = "common.safetensors"
OBJECTS = "objects.pt"
SCRIPT = "zero_to_fp32.py"
_WRITTEN = (MANIFEST, COMMON, OBJECTS, "rank_*.safetensors", "*_states.pt")


def check_tag(tag: str) -> None:
    """Refuse a tag that names no folder of its own; that of all checkpoints would be replaced.

    Raises:
        UsageError: it does not.
    """
    path = Path(tag)
    if path.is_absolute() or not path.parts or ".." in path.parts or tag in {LATEST, SCRIPT}:
        raise UsageError(
            compose(
                f"a checkpoint cannot have the tag {tag!r}, which is no name of a new folder.",
                hint='pass a name such as tag="epoch3", or none to count steps.',
            )
        )


def rank_file(rank: int) -> str:
    """The name of the file that a rank writes."""
    return f"rank_{rank:05d}.safetensors"


def _hidden(folder: Path, what: str) -> Path:
    # Hidden, so that whoever looks for "global_step*" does not take it for a checkpoint.
    return folder.with_name(f".{folder.name}.{what}")


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can say so."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass  # not every file system knows it for folders
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    unfinished = _hidden(path, "unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def begin(folder: Path) -> Path:
    """Make the empty folder to write a checkpoint in, without what an earlier attempt left.

    Raises:
        UsageError: there is a file of the checkpoint's name.
    """
    if folder.is_file():
        raise UsageError(
            compose(f"{folder} is a file, which no checkpoint replaces.", hint="use another tag.")
        )
    unfinished = _hidden(folder, "unfinished")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    sync_folder(folder.parent.parent)  # for the case that the folder of all of them is new
    return unfinished


def unfinished_folder(folder: Path) -> Path:
    """The folder that a checkpoint is written in."""
    return _hidden(folder, "unfinished")


def leftovers(root: Path) -> list[str]:
    """The names of folders in which a save has been begun that is not finished."""
    return sorted(path.name for path in root.glob(".*.unfinished") if path.is_dir())


def abandon(folder: Path) -> None:
    """Remove what was written of a checkpoint that cannot be finished."""
    shutil.rmtree(_hidden(folder, "unfinished"), ignore_errors=True)


def finish(folder: Path) -> None:
    """Give a checkpoint that is written its name, in place of an older one of that name.

    What else lies in the older one's folder, such as a tokenizer's files, stays there.
    """
    unfinished, replaced = _hidden(folder, "unfinished"), _hidden(folder, "replaced")
    sync_folder(unfinished)
    if os.path.lexists(folder):
        _dissolve(replaced, into=folder)  # of an earlier program, which ended here
        folder.rename(replaced)
    unfinished.rename(folder)
    sync_folder(folder.parent)
    _dissolve(replaced, into=folder)


def _dissolve(replaced: Path, into: Path) -> None:
    """Remove a replaced checkpoint; what in its folder is no part of one goes to the new one."""
    if replaced.is_symlink():
        replaced.unlink()  # what it leads to is another checkpoint
    if not replaced.exists():
        return
    for path in list(replaced.iterdir()):
        is_ours = any(fnmatch(path.name, pattern) for pattern in _WRITTEN)
        if not is_ours and not (into / path.name).exists():
            path.rename(into / path.name)
    shutil.rmtree(replaced, ignore_errors=True)


def recover(folder: Path) -> bool:
    """Bring back a checkpoint that was being replaced when the process ended; say whether."""
    replaced = _hidden(folder, "replaced")
    if folder.exists() or not replaced.exists():
        return False
    replaced.rename(folder)
    return True


def standing(folder: Path) -> Path:
    """Where the checkpoint of that name is: aside, if its replacement never got the name."""
    replaced = _hidden(folder, "replaced")
    return replaced if replaced.exists() and not folder.exists() else folder


def mark_latest(root: Path, tag: str) -> None:
    """Let the newest checkpoint be the one with this tag."""
    write_text(root / LATEST, tag)
    sync_folder(root)


def newest_tag(root: Path) -> str | None:
    """The tag of the newest checkpoint; None if the folder names none.

    Raises:
        CheckpointError: the file that names it cannot be read.
    """
    try:
        tag = (root / LATEST).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{root / LATEST} cannot be read: {error}") from error
    if not tag:
        raise CheckpointError(
            compose(
                f"{root / LATEST} is empty.", hint="name a tag, as in load_checkpoint(dir, TAG)."
            )
        )
    return tag
