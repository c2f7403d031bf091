"""Command line arguments that a training script shares with the launcher."""

from __future__ import annotations

import argparse

__all__ = ["add_config_arguments"]


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--deepspeed`` and ``--deepspeed_config`` to a script's parser, and return it."""
    group = parser.add_argument_group("zeroshard")
    group.add_argument(
        "--deepspeed", action="store_true", help="accepted for scripts written for DeepSpeed"
    )
    group.add_argument("--deepspeed_config", metavar="PATH", help="configuration file (JSON)")
    return parser
