"""Makes `python -m zeroshard` the same as the command `zeroshard`."""

from __future__ import annotations

import sys

from zeroshard.launch.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
