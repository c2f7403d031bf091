"""Every exception this package raises on purpose.

    Error
    |-- ConfigError        the configuration cannot be used as it stands
    |-- UsageError         a call came at the wrong time, or on the wrong object
    |-- CheckpointError    a checkpoint is missing, damaged, foreign, or of another model
    |-- LossScaleError     fp16 training cannot find a loss scale that works
    |-- OffloadError       memory of the host, or a file of offloaded state, cannot be had or used
    `-- DistributedError   ranks disagree, or one did not answer

A message states the fact, then its cause or consequence, then names the next action after a blank
line and the word "hint:". :func:`compose` builds that shape, so all messages read alike.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DistributedError",
    "Error",
    "LossScaleError",
    "OffloadError",
    "UsageError",
    "compose",
]


class Error(Exception):
    """Base of all errors raised by zeroshard."""


class ConfigError(Error, ValueError):
    """The configuration cannot be used as it stands."""


class UsageError(Error, RuntimeError):
    """A call came at the wrong time, or on the wrong object."""


class CheckpointError(Error, RuntimeError):
    """A checkpoint is missing, damaged, foreign, or of another model."""


class LossScaleError(Error, RuntimeError):
    """fp16 gradients overflow even at the smallest loss scale."""


class OffloadError(Error, RuntimeError):
    """Memory of the host, or a file of offloaded state, cannot be had, read or written."""


class DistributedError(Error, RuntimeError):
    """Ranks disagree about what to do next, or one of them did not answer."""


def compose(fact: str, *, hint: str | None = None) -> str:
    """Join a fact and a hint into the message layout shared by all errors."""
    return fact if hint is None else f"{fact}\n\nhint: {hint}"
