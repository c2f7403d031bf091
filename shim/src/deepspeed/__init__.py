"""The name ``deepspeed`` for zeroshard: programs written for DeepSpeed run on it unchanged."""

from __future__ import annotations

__version__ = "0.19.8+zeroshard.0.1"
