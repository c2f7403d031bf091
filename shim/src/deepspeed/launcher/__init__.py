"""``deepspeed.launcher``: the command that starts ranks."""

from deepspeed._names import names

__getattr__, __dir__ = names(
    __name__,
    {"runner": "deepspeed.launcher.runner"},
    {"launch": "start ranks with the command deepspeed, or with torchrun"},
)
