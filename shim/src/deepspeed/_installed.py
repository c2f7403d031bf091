"""Whether this package is the only one by its name: two mixed would be neither.

pip replaces one by the other, since both are the distribution ``deepspeed``. But a package of
another installer, of another folder on the path, or left over by a broken uninstall stays.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

__all__ = ["check"]

_HERE = Path(__file__).resolve().parent
_NAME = _HERE.name
_MARK = "_names.py"  # a file that only this package has
_THEIRS = ("git_version_info.py", "inference", "module_inject", "pipe")


def check() -> None:
    """Refuse to be imported beside DeepSpeed itself.

    Raises:
        ImportError: it is on the path, too, or what is left of it is in this folder.
    """
    conflict = _leftovers() or _other_package() or _other_metadata()
    if conflict:
        raise ImportError(
            f"{conflict}, and zeroshard's package of that name is in {_HERE}: one of the two has "
            "to go.\n\nhint: to run on zeroshard, repeat `python -m pip uninstall -y deepspeed` "
            "until nothing is found, delete what is left of the folder, and then run `python -m "
            "pip install . ./shim` in a checkout of zeroshard. To run on DeepSpeed itself, do the "
            "same with `python -m pip install deepspeed` at the end.",
            name=_NAME,
        )


def _leftovers() -> str:
    found = [name for name in _THEIRS if (_HERE / name).exists()]
    return f"files of DeepSpeed itself ({', '.join(found)}) are in the same folder" if found else ""


def _found() -> list[Path]:
    """What begins with the name in the folders that Python imports from."""
    found: list[Path] = []
    for folder in dict.fromkeys(sys.path):
        with suppress(OSError):  # what cannot be read is not imported from, either
            found += [each for each in Path(folder).iterdir() if each.name.startswith(_NAME)]
    return found


def _other_package() -> str:
    for package in _found():
        is_package = package.name == _NAME and (package / "__init__.py").is_file()
        if is_package and not (package / _MARK).is_file():
            return f"DeepSpeed itself is in {package.resolve()}"
    return ""


def _other_metadata() -> str:
    """What another distribution of this name is registered by; ours says so in its version."""
    for info in _found():  # of wheels, and of eggs
        if info.match(f"{_NAME}-*.*-info") and "+zeroshard" not in info.name:
            return f"DeepSpeed itself is registered by {info.resolve()}"
    return ""
