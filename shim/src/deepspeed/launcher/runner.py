"""The command ``deepspeed``, and ``python -m deepspeed.launcher.runner``: zeroshard's launcher."""

from __future__ import annotations

import os
import sys

from deepspeed._names import names
from zeroshard.launch.cli import main
from zeroshard.launch.env_file import FILE_NAME

__all__ = ["DEEPSPEED_ENVIRONMENT_NAME", "main"]

DEEPSPEED_ENVIRONMENT_NAME = os.environ.get(FILE_NAME) or ".deepspeed_env"
"""The file whose variables the launcher hands to the ranks."""

__getattr__, __dir__ = names(__name__)

if __name__ == "__main__":
    sys.exit(main())
