"""The command ``ds_report``, and ``python -m deepspeed.env_report``: that of ``zeroshard env``."""

from __future__ import annotations

import sys

from deepspeed._names import names
from zeroshard.launch.cli import main

__all__ = ["cli_main"]


def cli_main() -> int:
    """Show versions, devices, limits and optional features; return the exit code."""
    return main(["env", *sys.argv[1:]])


__getattr__, __dir__ = names(__name__)

if __name__ == "__main__":
    sys.exit(cli_main())
