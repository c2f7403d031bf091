"""The program to run: whether it is there, what it wants to be told, and its command line."""

from __future__ import annotations

import ast
import contextlib
import difflib
import os
import shutil
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from zeroshard.errors import UsageError, compose

__all__ = ["Kind", "Script"]

Kind = Literal["script", "module", "executable"]
_LOCAL_RANK = ("--local_rank", "--local-rank", "local_rank")


@dataclass(frozen=True)
class Script:
    """A script, a module or a program, and the arguments that are its own."""

    name: str
    arguments: tuple[str, ...] = ()
    kind: Kind = "script"

    def command(self, local_rank: int | None) -> list[str]:
        """Return the command line of one rank; None leaves the local rank to the environment."""
        flag = [] if local_rank is None else [f"--local_rank={local_rank}"]
        words = [self.name, *flag, *self.arguments]
        if self.kind == "executable":
            return words
        return [sys.executable, "-u", *(["-m"] if self.kind == "module" else []), *words]

    def declares_local_rank(self) -> bool:
        """Tell whether the script adds a ``--local_rank`` to its parser.

        Only the file itself is read: a call with that name among its arguments, such as
        ``parser.add_argument("--local_rank", ...)``.
        """
        path = self._path()
        try:
            tree = ast.parse(path.read_bytes()) if path else None
        except (OSError, SyntaxError, ValueError):
            return False  # whatever is wrong with the file, its own run says it better
        return tree is not None and any(
            isinstance(argument, ast.Constant) and argument.value in _LOCAL_RANK
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and _declares(node.func)
            for argument in node.args
        )

    def check_exists(self, commands: Collection[str], folders: Sequence[str] = ()) -> None:
        """Report a script that is not there now, rather than once per rank.

        Args:
            commands: the launcher's own commands, one of which may be meant.
            folders: where the ranks look for modules besides this process's own folders.
        """
        if self.kind == "executable" and shutil.which(self.name):
            return
        if self.kind == "module":
            self._check_module(folders)
            return
        path = Path(self.name)
        try:
            is_runnable = (path / "__main__.py").is_file() if path.is_dir() else path.exists()
        except OSError as error:
            raise UsageError(f"{self.kind} {self.name!r}: {error.strerror}.") from error
        if self.kind == "script" and is_runnable:
            return
        looks_like_path = path.suffix == ".py" or os.sep in self.name
        if self.kind == "script" and not looks_like_path:
            fact = f"{self.name!r} is neither a script nor a command of zeroshard."
            near = difflib.get_close_matches(self.name, commands)
        elif path.is_dir():
            raise UsageError(
                compose(f"{self.name!r} is a folder.", hint="name the file in it to run.")
            )
        elif path.exists():
            raise UsageError(
                compose(
                    f"{self.name!r} is not executable.",
                    hint=f"run `chmod +x {self.name}`, or drop --no_python if it is a Python "
                    "script.",
                )
            )
        else:
            fact = f"{self.kind} {self.name!r} does not exist{_looked_in()}."
            near = _near(path)
        raise UsageError(fact + (f" Did you mean {near[0]!r}?" if near else ""))

    def _check_module(self, folders: Sequence[str]) -> None:
        if self.name.endswith(".py") or os.sep in self.name:
            raise UsageError(
                compose(
                    f"{self.name!r} is a path, not a module.",
                    hint="drop --module, or write the module's name, such as `package.train`.",
                )
            )
        package = self.name.partition(".")[0]
        try:
            # The first part of the name is found without importing anything of the user's.
            is_there = PathFinder.find_spec(package, folders) or find_spec(package)
        except (ImportError, ValueError):
            is_there = None
        if not is_there:
            raise UsageError(
                compose(
                    f"module {self.name!r}: there is no {package!r} in this folder, on PYTHONPATH "
                    "or among what is installed.",
                    hint="start it in the folder that holds the package, or install the package.",
                )
            )

    def _path(self) -> Path | None:
        """Return the file that holds the script, as far as it can be found without importing."""
        if self.kind == "script":
            path = Path(self.name)
            return path / "__main__.py" if path.is_dir() else path
        if self.kind == "executable":
            return None
        stem = Path(*self.name.split("."))
        candidates = (
            Path(folder) / file
            for folder in ("", *sys.path)
            for file in (stem.with_suffix(".py"), stem / "__main__.py")
        )
        return next((path for path in candidates if path.is_file()), None)


def _declares(function: ast.expr) -> bool:
    """Recognise argparse's add_argument, click's option and absl's DEFINE_integer."""
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in ("add_argument", "option", "DEFINE_integer")


def _looked_in() -> str:
    try:
        return f" (looked in {Path.cwd()})"
    except OSError:
        return ", nor does the folder that this is run in: it has been removed"


def _near(path: Path) -> list[str]:
    names: list[str] = []
    with contextlib.suppress(OSError):  # the folder may be closed to us, or not be there
        names = [child.name for child in path.parent.iterdir()]
    return [str(path.with_name(name)) for name in difflib.get_close_matches(path.name, names)]
