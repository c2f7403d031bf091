"""``zeroshard.zero.Init``: build a model in shards, with DeepSpeed's arguments."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType

import torch
import torch.distributed as dist
from torch import nn

from zeroshard.config import Config, ConfigSource, peek
from zeroshard.core import world
from zeroshard.core.init import Sharding, shard_module, sharded_construction
from zeroshard.core.lifetime import lifetime
from zeroshard.core.mesh import default_mesh
from zeroshard.core.slab import HostDepot
from zeroshard.core.store import ON_DEVICE, OnHost
from zeroshard.errors import ConfigError, UsageError, compose
from zeroshard.logs import show_messages

__all__ = ["Init"]


class Init:
    """A context in which every module is sharded over all ranks as soon as it is built.

    No rank ever holds more of the model than its shards and one module. Pass the model to
    ``zeroshard.initialize`` afterwards, whatever the stage there; until then,
    ``zeroshard.gathered`` makes parameters full. With one rank there is nothing to shard, and
    parameters are only cast; unless they wait in host memory, so that a model can be built that
    does not fit on the device. All ranks build the same modules; the values are those of rank 0.

    The dtype of floating-point parameters is ``dtype`` if that is given. Else, with a
    configuration, it is that of its fp16 or bf16 block if one is enabled, and at least fp32 if none
    is. Else every parameter keeps its own. Buffers keep theirs.

    Args:
        module: a model that exists, to be sharded in place, one module at a time.
        data_parallel_group: None, or a group of all ranks.
        mem_efficient_linear: accepted; no layer is replaced here, so there is nothing to undo.
        remote_device: where shards wait for ``initialize``: "cpu" and "nvme" are host memory, and
            "none" is the device. By default what ``offload_param`` of the configuration says. It is
            the configuration of ``initialize`` that decides where they are afterwards.
        pin_memory: accepted; what waits is not page-locked, as it is read once.
        config_dict_or_path: the configuration that ``initialize`` is given, too.
        config: older name of ``config_dict_or_path``.
        enabled: false to do nothing at all.
        dtype: a floating-point dtype.
        mpu: not supported; must be None.
        zero_param_parallel_group: None, or a group of all ranks.
        zero_quantized_weights: not supported; must be false.
        zero_quantized_nontrainable_weights: not supported; must be false.
        sequence_data_parallel_group: None, or a group of all ranks.
        param_swapper: not supported; must be None.

    Raises:
        ConfigError: the configuration cannot be used.
        UsageError: an argument cannot be honoured.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the signature is DeepSpeed's
        self,
        module: nn.Module | None = None,
        data_parallel_group: object = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: ConfigSource | None = None,
        config: ConfigSource | None = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: object = None,
        zero_param_parallel_group: object = None,
        zero_quantized_weights: bool = False,
        zero_quantized_nontrainable_weights: bool = False,
        sequence_data_parallel_group: object = None,
        param_swapper: object = None,
    ) -> None:
        self._sharding: Sharding | None = None
        self._entered: list[ExitStack] = []
        if not enabled:
            return
        show_messages(world.rank_so_far)
        if module is not None and not isinstance(module, nn.Module):
            raise UsageError(f"zero.Init: module must be a torch.nn.Module, not {module!r}.")
        for name, value in (
            ("mpu", mpu),
            ("zero_quantized_weights", zero_quantized_weights),
            ("zero_quantized_nontrainable_weights", zero_quantized_nontrainable_weights),
            ("param_swapper", param_swapper),
        ):
            if value:
                raise UsageError(
                    compose(f"zero.Init: {name} is not supported.", hint=f"leave {name} out.")
                )
        settings = _load(config_dict_or_path, config)
        dtype_of = _dtype_rule(dtype, settings)
        is_remote = _is_remote(remote_device, settings)
        world.init_distributed()
        _check_world()
        for name, group in (
            ("data_parallel_group", data_parallel_group),
            ("zero_param_parallel_group", zero_param_parallel_group),
            ("sequence_data_parallel_group", sequence_data_parallel_group),
        ):
            _check_group(name, group)
        mesh = default_mesh(world.device())
        life = lifetime(3, mesh.world, ["parameters"] if is_remote else [])
        # Not page-locked, so that memory goes back to the system as shards leave it, one by one.
        host = HostDepot(mesh.device, pin=False, name="parameters that wait for initialize()")
        shards = OnHost(host) if is_remote else ON_DEVICE
        self._sharding = Sharding(mesh, life, dtype_of, shards)
        if module is not None:
            shard_module(module, self._sharding)

    def __enter__(self) -> Init:
        stack = ExitStack()
        if self._sharding is not None:
            # A module that is built for a GPU is built there, not in host memory first.
            stack.enter_context(self._sharding.mesh.device)
            stack.enter_context(sharded_construction(self._sharding))
        self._entered.append(stack)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._entered.pop().__exit__(kind, error, traceback)


def _load(source: ConfigSource | None, older: ConfigSource | None) -> Config | None:
    if source is not None and older is not None:
        raise ConfigError(
            compose(
                "zero.Init was given both config_dict_or_path and config, its older name.",
                hint="pass config_dict_or_path alone.",
            )
        )
    source = older if source is None else source
    # What it means and what of it is ignored is said by initialize(), which gets it, too.
    return None if source is None else peek(source)


def _dtype_rule(
    dtype: torch.dtype | None, settings: Config | None
) -> Callable[[torch.dtype], torch.dtype]:
    """The dtype of a parameter, given the one that its module made it in."""
    if dtype is not None:
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise UsageError(
                compose(
                    f"zero.Init: dtype must be a floating-point torch.dtype, not {dtype!r}.",
                    hint="pass torch.float32, torch.bfloat16 or torch.float16, or leave it out.",
                )
            )
        asked = dtype
    elif settings is None:
        return lambda own: own
    elif settings.fp16.enabled or settings.bf16.enabled:
        asked = torch.float16 if settings.fp16.enabled else torch.bfloat16
    else:
        return lambda own: torch.float32 if own in _HALF else own
    # A byte holds no number of its own but a part of a quantised one.
    return lambda own: asked if own.is_floating_point and own.itemsize > 1 else own


_HALF = frozenset({torch.float16, torch.bfloat16})


def _is_remote(remote_device: str | None, settings: Config | None) -> bool:
    """Whether shards wait in host memory."""
    if remote_device not in {None, "none", "cpu", "nvme"}:
        raise UsageError(
            compose(
                f"zero.Init: remote_device cannot be {remote_device!r}.",
                hint='pass "cpu" or "nvme", or leave it out.',
            )
        )
    if remote_device is None and settings is not None:
        remote_device = settings.zero_optimization.offload_param.device
    return remote_device in {"cpu", "nvme"}


def _check_world() -> None:
    """Refuse a world of one where the launcher started more: every rank would hold everything.

    Raises:
        UsageError: the process group has one rank, but WORLD_SIZE says otherwise.
    """
    started = os.environ.get(world.WORLD_SIZE, "1")
    if dist.get_world_size() == 1 and started.isdecimal() and int(started) > 1:
        raise UsageError(
            compose(
                f"zero.Init: the process group has one rank, but {started} were started, so every "
                "one of them would hold the whole model.",
                hint="leave the process group to zeroshard.init_distributed().",
            )
        )


def _check_group(name: str, group: object) -> None:
    if group is None:
        return
    if isinstance(group, dist.ProcessGroup) and dist.get_world_size(group) == dist.get_world_size():
        return
    raise UsageError(
        compose(
            f"zero.Init: {name} must hold all ranks, as all ranks shard one model.",
            hint=f"leave {name} out.",
        )
    )
