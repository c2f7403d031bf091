"""``.deepspeed_env``: environment variables of the ranks, one ``KEY=VALUE`` per line."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from zeroshard.errors import UsageError, compose

__all__ = ["FILE_NAME", "EnvFile", "parse", "read_all"]

FILE_NAME = "DS_ENV_FILE"  # names another file than .deepspeed_env
_LINE = re.compile(r"(?:export\s+)?(?P<name>[A-Za-z_]\w*)\s*=\s*(?P<value>.*)")
_QUOTED = re.compile(r"(?P<quote>['\"])(?P<text>.*)(?P=quote)\s*(?:#.*)?")


@dataclass(frozen=True)
class EnvFile:
    """One file that was there, and the variables it sets."""

    path: Path
    variables: Mapping[str, str]


def read_all(env: Mapping[str, str], reserved: Collection[str]) -> list[EnvFile]:
    """Read the file in the home folder, then the one here, which has the last word.

    Args:
        env: the environment, which may name the file and the home folder.
        reserved: variables that the launcher itself sets.
    """
    name = env.get(FILE_NAME) or ".deepspeed_env"
    folders = _folders(env)
    paths = dict.fromkeys(folder / name for folder in folders)  # one path if `name` is absolute
    found = [
        EnvFile(path, parse(_read(path), str(path), reserved)) for path in paths if _is_file(path)
    ]
    if env.get(FILE_NAME) and not found:
        where = " or ".join(map(str, folders))
        raise UsageError(
            compose(
                f"{FILE_NAME} is {name}, but there is no such file in {where}.",
                hint=f"correct the path, or unset {FILE_NAME}.",
            )
        )
    return found


def parse(text: str, path: str, reserved: Collection[str] = ()) -> dict[str, str]:
    """Read KEY=VALUE lines; blank lines, comments, quotes and ``export`` are as in a shell.

    Nothing is expanded: ``$HOME`` stays as it is written.
    """
    variables: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        where = f"{path}, line {number}"
        entry = _LINE.fullmatch(line)
        if entry is None:
            raise UsageError(
                compose(
                    f"{where}: {line!r} is not KEY=VALUE.",
                    hint="write one variable per line; `#` begins a comment.",
                )
            )
        if entry["name"] in reserved:
            raise UsageError(
                compose(
                    f"{where}: {entry['name']} is set by the launcher for each rank.",
                    hint="remove the line; the launcher's options choose ranks, address and port.",
                )
            )
        variables[entry["name"]] = _unquoted(entry["value"], where)
    return variables


def _unquoted(value: str, where: str) -> str:
    quoted = _QUOTED.fullmatch(value)
    if quoted is not None and quoted["quote"] not in quoted["text"]:
        return quoted["text"]
    if value[:1] in ("'", '"'):
        raise UsageError(
            compose(
                f"{where}: the quotes of {value} do not match.",
                hint="quote the whole value, once, or not at all.",
            )
        )
    return re.split(r"\s#", f" {value}", maxsplit=1)[0].strip()


def _folders(env: Mapping[str, str]) -> list[Path]:
    """Return the home folder and this one, as far as there are such folders."""
    found: list[Path] = []
    with contextlib.suppress(RuntimeError):
        found.append(Path(env.get("HOME") or Path.home()))
    with contextlib.suppress(OSError):  # this folder may have been removed
        found.append(Path.cwd())
    return list(dict.fromkeys(found))


def _is_file(path: Path) -> bool:
    """Tell whether there is something to read, such as /dev/null; a folder may be closed to us."""
    with contextlib.suppress(OSError):
        return path.exists() and not path.is_dir()
    return False


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            compose(
                f"{path} cannot be read: {error}.",
                hint=f"correct or remove it; {FILE_NAME}={os.devnull} reads none.",
            )
        ) from error
