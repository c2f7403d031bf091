"""Objects that are no data: the one thing that is pickled, and read back with care."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from zeroshard.errors import CheckpointError, UsageError, compose

__all__ = ["load_objects", "save_objects"]

_log = logging.getLogger(__name__)


def save_objects(path: Path, objects: Mapping[str, Any]) -> int:
    """Write a dict for ``torch.load`` and wait until it is on the disk.

    Returns:
        The size of the file in bytes.

    Raises:
        UsageError: something in it cannot be pickled.
    """
    with path.open("wb") as file:
        try:
            torch.save(dict(objects), file)
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            raise UsageError(
                compose(
                    f"client_state holds something that cannot be saved: {error}",
                    hint="pass what it is made of: numbers, text, tensors, lists and dicts.",
                )
            ) from error
        file.flush()
        os.fsync(file.fileno())
    return path.stat().st_size


def load_objects(path: Path) -> dict[str, Any]:
    """Read such a dict; code in it is only run if there is no other way, and that is said.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing.") from error
    except pickle.UnpicklingError:
        _log.warning(
            "%s holds objects of the program's own classes, so it is unpickled, which runs what "
            "its writer put in. They come from client_state, or from the schedule: save data "
            "instead of them, and nothing is unpickled.",
            path,
        )
    except Exception as error:
        raise _unreadable(path, error) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        compose(
            f"{path} cannot be read: {type(error).__name__}: {error}",
            hint="define the classes of what was saved where they were then, or use another "
            "checkpoint.",
        )
    )
