"""initialize(): from a model and a configuration to an engine. Reads top to bottom.

The only place that turns configuration into core objects.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from zeroshard import config as configuration
from zeroshard.core import world
from zeroshard.core.agreed import agreed
from zeroshard.core.building import build_unit, hand_back
from zeroshard.core.collectives import MEAN, Exchange, all_reduce_, broadcast_
from zeroshard.core.hooks import Runtime, Site
from zeroshard.core.host import trim
from zeroshard.core.init import suspended
from zeroshard.core.leaves import CONTAINERS, marked
from zeroshard.core.lifetime import Lifetime, Offload, lifetime
from zeroshard.core.mesh import Mesh, build_mesh, default_mesh
from zeroshard.core.pulled import UnavailableError, share
from zeroshard.core.reductions import reduce_by_pulls
from zeroshard.core.schedule import Limits, Schedule
from zeroshard.core.slots import full_nbytes, is_waiting, slot_of
from zeroshard.core.trial import least_bytes
from zeroshard.core.unit import Unit
from zeroshard.core.usage import GradientWatch
from zeroshard.core.waiting import Waiting, settle
from zeroshard.core.wrap import Group, Kind, choose_groups, find_leaves, find_persistent
from zeroshard.engine import compiled, quantized
from zeroshard.engine.activations import Activations, forget, layers_of
from zeroshard.engine.arguments import collect_facts
from zeroshard.engine.budget import GIB
from zeroshard.engine.data import ShardedLoader, make_loader
from zeroshard.engine.depots import Depots, staging_bytes
from zeroshard.engine.engine import Engine, Settings
from zeroshard.engine.headroom import Claim, Folder, check_room
from zeroshard.engine.meter import meter_of
from zeroshard.engine.optimizer import ZeroOptimizer
from zeroshard.engine.placement import (
    Home,
    Placed,
    Sizes,
    averages,
    buffer_bytes,
    describe,
    file_bytes,
    host_bytes,
    plan,
    update_bytes,
    wishes,
)
from zeroshard.engine.precision import (
    DTYPES,
    autocast_dtype,
    compute_dtypes,
    make_scaler,
    precision,
)
from zeroshard.engine.progress import Progress
from zeroshard.engine.promotion import Promotion
from zeroshard.engine.recompute import CAN_COUNT
from zeroshard.engine.space import Fixed, Measured, Space
from zeroshard.errors import ConfigError, OffloadError, UsageError, compose
from zeroshard.host.memory import bytes_free
from zeroshard.logs import show_messages
from zeroshard.optim.factory import make_optimizer
from zeroshard.optim.fused import is_adam
from zeroshard.optim.schedules import make_schedule
from zeroshard.optim.sharded import (
    ShardedOptimizer,
    StepPolicy,
    check_optimizer,
    numel_at_once,
    optimizer_parameters,
)

__all__ = ["initialize"]

_log = logging.getLogger(__name__)

# Torch's own ways to train one model on several devices.
_WRAPPERS = {
    "DataParallel",
    "DistributedDataParallel",
    "FullyShardedDataParallel",
}

ConfigSource = str | Path | Mapping[str, object]


@suspended()
def initialize(  # noqa: PLR0913, PLR0915, PLR0917 - the signature is DeepSpeed's
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer] | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: object = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: object = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: ConfigSource | None = None,
    mesh_param: object = None,
    config_params: ConfigSource | None = None,
) -> tuple[Engine, ZeroOptimizer | None, ShardedLoader | None, Any]:
    """Shard a model over all ranks and return the engine that trains it. A collective.

    Args:
        args: parsed arguments that may hold ``deepspeed_config``, a path.
        model: the model, on any device; it becomes ``engine.module`` with the weights of rank 0.
        optimizer: an optimizer over the model's parameters, or a class or callable that makes one;
            without it the configuration's ``optimizer`` block is used.
        model_parameters: parameters or param groups to train; default all that require gradients.
        training_data: a torch dataset to make the returned loader from.
        lr_scheduler: a scheduler over ``optimizer``, or a callable that makes one from it.
        distributed_port: port for the first contact where the environment names none.
        mpu: not supported; must be None.
        dist_init_required: accepted; a process group is made when there is none.
        collate_fn: for the returned loader.
        config: a dict, a path, or base64 of JSON.
        mesh_param: not supported; must be None.
        config_params: older name of ``config``.

    Returns:
        The engine; the optimizer, as :class:`~zeroshard.engine.optimizer.ZeroOptimizer`, or None;
        the loader, or None; the scheduler, or None.

    Raises:
        ConfigError: the configuration cannot be used.
        UsageError: the arguments do not fit together.
    """
    show_messages(world.rank_so_far)
    if not isinstance(model, nn.Module):
        raise UsageError(
            compose(
                f"initialize() needs a model, a torch.nn.Module, not a {type(model).__name__}.",
                hint="pass the module itself; several models that train together can be one, as "
                "in torch.nn.ModuleList(models).",
            )
        )
    if mpu is not None or mesh_param is not None:
        raise UsageError(
            compose(
                "initialize(): mpu and mesh_param are not supported, as all ranks shard one model.",
                hint="leave them out.",
            )
        )
    facts = collect_facts(
        args, model, model_parameters, optimizer=optimizer, lr_scheduler=lr_scheduler
    )
    settings = configuration.load(_config_source(args, config, config_params), facts)
    world.init_distributed(distributed_port=distributed_port)
    settle(model)
    device = world.device()
    batch = settings.batch(dist.get_world_size())
    trains = optimizer is not None or settings.optimizer is not None
    life = lifetime(
        settings.zero_optimization.stage,
        dist.get_world_size(),
        _offloads(settings, trains=trains),
    )
    _take_over(model, device, trains=trains)
    inner = _resolve_optimizer(optimizer, model, model_parameters, settings)
    trained = set(optimizer_parameters(inner)) if inner is not None else set[nn.Parameter]()
    _check_model(model, trained if inner is not None else None)

    shard_size = dist.get_world_size() if life.sharded else 1
    if inner is not None:
        allowed = settings.zero_allow_untested_optimizer
        check_optimizer(inner, model, shard_size, allow_untested=allowed)
    scheduler = _resolve_scheduler(lr_scheduler, inner, settings)
    loader = None
    if training_data is not None:
        loader = make_loader(
            training_data,
            batch_size=batch.micro,
            rank=dist.get_rank(),
            world=dist.get_world_size(),
            collate_fn=collate_fn,
            drop_last=settings.dataloader_drop_last,
            pin_memory=device.type == "cuda",
        )
    quantized.settle(model, device)
    groups = _choose_groups(model, trained, life, settings, device)
    placed = _place(groups, life, shard_size, inner, settings, device)

    _check_compile(settings.compile, frees=not life.params_stay)

    mesh = build_mesh(shard_size, device, timeout=world.patience())
    depots = _make_depots(model, placed, settings, mesh)

    # From here on the model changes, and nothing is refused but by hosts and drives.
    forget(model)
    compiled.forget(model)
    sharded = None
    scaler = make_scaler(settings, device)
    with _given_back_on_failure(depots, mesh) as undo:
        runtime = _shard(model, placed, mesh, life, settings, depots, undo)
        if inner is not None:
            with _agreed_if_far(depots, mesh, "make room for the optimizer's state"):
                sharded = ShardedOptimizer(
                    inner,
                    runtime.units,
                    mesh,
                    policy=_policy(settings, batch, can_overflow=scaler is not None),
                    scaler=scaler,
                )
            undo.callback(sharded.release)
        _seal(depots, placed, settings, mesh)
    engine = Engine(
        model,
        runtime,
        mesh,
        Settings(
            batch=batch,
            config=settings,
            steps_per_print=settings.steps_per_print,
            cast_inputs_to=torch.float16
            if settings.fp16.enabled and settings.fp16.auto_cast
            else None,
            autocast=autocast_dtype(settings, device),
        ),
        depots,
        sharded=sharded,
        watch=None
        if settings.zero_optimization.ignore_unused_parameters
        else GradientWatch(runtime.units, mesh),
        lr_scheduler=scheduler,
        training_dataloader=loader,
        local_rank=world.local_rank(),
    )
    if settings.compile.enabled:
        engine.compile(settings.compile.backend, settings.compile.kwargs)
    _limit_activations(engine, settings)
    _bring_state_back(engine, sharded, settings)
    return engine, engine.optimizer, loader, scheduler


def _policy(
    settings: configuration.Config, batch: configuration.Batch, *, can_overflow: bool
) -> StepPolicy:
    """What happens between backward and the optimizer."""
    return StepPolicy(
        clip=settings.gradient_clipping,
        skip_on_overflow=can_overflow
        or (settings.bf16.enabled and settings.bf16.check_grad_overflow),
        most_numel=settings.zero_optimization.sub_group_size,
        kernels=settings.zeroshard.optimizer_step,
        num_buffers=wishes(settings, trains=True).num_buffers,
        update=settings.zeroshard.offload_update,
        cores=settings.zero_optimization.offload_optimizer.cpuadam_cores_perc,
        sums=batch.accumulation > 1,
    )


def _bring_state_back(
    engine: Engine, sharded: ShardedOptimizer | None, settings: configuration.Config
) -> None:
    """Let state come back where it left the device only until it is known how much fits."""
    if settings.zeroshard.gpu_budget != "auto" or sharded is None or not sharded.far_bytes:
        return
    meter = meter_of(engine.mesh.device)
    if meter is None:
        _log.warning(
            'zeroshard.gpu_budget "auto" measures the memory of a GPU, and there is none: no state '
            "comes back from where it is. Name a number of GiB instead."
        )
        return
    engine.bring_state_back(Promotion(sharded, meter, engine.mesh))


def _limit_activations(engine: Engine, settings: configuration.Config) -> None:
    """Put the activation budget into effect, if there is one."""
    if settings.zeroshard.activation_budget is None or engine.basic_optimizer is None:
        return
    blocks = _blocks(engine.module, settings)
    if blocks:
        space, runtime = _space(settings, engine.mesh), engine.runtime
        engine.limit_activations(
            Activations(engine.module, blocks, space, lambda: runtime.num_backwards)
        )


def _blocks(model: nn.Module, settings: configuration.Config) -> dict[nn.Module, str]:
    """What the activation budget may checkpoint."""
    blocks = layers_of(model, settings.zeroshard.units)
    if not blocks:
        _log.warning(
            "zeroshard.activation_budget has no effect: no blocks that repeat were found in the "
            'model. Name their class in "units" beside it.'
        )
    elif not CAN_COUNT:
        _log.warning(
            "zeroshard.activation_budget checkpoints every block: to count what a block would "
            "keep takes torch 2.8, and this is %s.",
            torch.__version__,
        )
    if any(getattr(block, "_compiled_call_impl", None) is not None for block in blocks):
        _log.warning(
            "zeroshard.activation_budget has no effect on blocks whose call is compiled, hooks "
            "included, by block.compile(). Call engine.compile() instead."
        )
    return blocks


def _space(settings: configuration.Config, mesh: Mesh) -> Space:
    """How much blocks may keep for backward."""
    budget = settings.zeroshard.activation_budget
    if isinstance(budget, float):
        return Fixed(int(budget * GIB))
    meter = meter_of(mesh.device)
    if meter is not None:
        exchange = Exchange(mesh, 1)
        return Measured(meter, lambda room: min(exchange([room]))[0])
    _log.warning(
        'zeroshard.activation_budget "auto" measures the memory of a GPU, and there is none: every '
        "block is checkpointed. Name a number of GiB instead."
    )
    return Fixed(0)


def _config_source(
    args: Any, config: ConfigSource | None, config_params: ConfigSource | None
) -> ConfigSource:
    from_args = [getattr(args, name, None) for name in ("deepspeed_config", "deepscale_config")]
    given = [source for source in (*from_args, config, config_params) if source is not None]
    if len(given) > 1:
        raise ConfigError(
            compose(
                "initialize() was given more than one configuration: of args.deepspeed_config, "
                "config and config_params only one may be set.",
                hint="pass exactly one.",
            )
        )
    if not given:
        raise ConfigError(
            compose(
                "initialize() was given no configuration.",
                hint="pass config=... (a dict or a path), or --deepspeed_config PATH in args.",
            )
        )
    return given[0]


def _resolve_optimizer(
    optimizer: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer] | None,
    model: nn.Module,
    model_parameters: Iterable[Any] | None,
    settings: configuration.Config,
) -> torch.optim.Optimizer | None:
    """An optimizer over the model's own parameters, whichever way it was asked for."""
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    if optimizer is not None and not callable(optimizer):
        raise UsageError(
            compose(
                f"initialize() was given {optimizer!r} as an optimizer.",
                hint="pass a torch optimizer, or a class or callable that makes one; an optimizer "
                'is chosen by name in the "optimizer" block of the configuration.',
            )
        )
    params = _trainable(model.parameters() if model_parameters is None else model_parameters)
    if optimizer is None and settings.optimizer is None:
        return None
    if not params:
        raise UsageError(
            compose(
                "initialize() was asked for an optimizer, but no parameter is trainable.",
                hint="leave requires_grad of some parameters true, or leave the optimizer out.",
            )
        )
    if optimizer is not None:
        made: object = optimizer(params)
        if not isinstance(made, torch.optim.Optimizer):
            raise UsageError(
                compose(
                    f"initialize() was given a callable as an optimizer, which returned {made!r}.",
                    hint="pass a callable that returns a torch optimizer.",
                )
            )
        return made
    assert settings.optimizer is not None, "there is an optimizer, or a block that describes it"
    return make_optimizer(settings.optimizer.type, params, settings.optimizer.params, model)


def _trainable(given: Any) -> list[Any]:
    """Parameters, named parameters or param groups as a list, frozen parameters left out."""
    hint = 'pass parameters, or param groups such as [{"params": [...], "lr": 1e-4}].'
    if not isinstance(given, Iterable) or isinstance(given, (str, Mapping, torch.Tensor)):
        fact = f"initialize(): model_parameters is no list but of type {type(given).__name__}."
        raise UsageError(compose(fact, hint=hint))
    items: list[Any] = list(given)
    for item in items:
        is_named = isinstance(item, tuple) and len(item) == 2
        tensor = item[1] if is_named else item
        is_group = isinstance(item, Mapping) and "params" in item
        if not is_group and not isinstance(tensor, torch.Tensor):
            fact = f"initialize(): model_parameters holds {item!r}, which is no parameter."
            raise UsageError(compose(fact, hint=hint))
    return [item for item in items if not isinstance(item, torch.Tensor) or item.requires_grad]


def _resolve_scheduler(
    scheduler: Any, optimizer: torch.optim.Optimizer | None, settings: configuration.Config
) -> Any:
    """A schedule over the optimizer, whichever way it was asked for."""
    if scheduler is None and settings.scheduler is None:
        return None
    if optimizer is None:
        if scheduler is None:
            # Programs that only evaluate keep the configuration of the training.
            _log.info('there is no optimizer, so the "scheduler" block is not used.')
            return None
        raise UsageError(
            compose(
                "initialize() was given a learning rate schedule but no optimizer.",
                hint="give it an optimizer, too, or leave the schedule out.",
            )
        )
    if scheduler is None:
        assert settings.scheduler is not None, "there is a schedule, or a block that describes it"
        return make_schedule(settings.scheduler.type, optimizer, settings.scheduler.params)
    if isinstance(scheduler, type) or not hasattr(scheduler, "step"):
        if not callable(scheduler):
            raise UsageError(
                compose(
                    f"initialize() was given {scheduler!r} as a learning rate schedule.",
                    hint="pass a scheduler of the optimizer, or a callable that makes one from it.",
                )
            )
        scheduler = scheduler(optimizer)
        if not hasattr(scheduler, "step"):
            raise UsageError(
                compose(
                    "initialize() was given a callable as a learning rate schedule, which returned "
                    f"{scheduler!r}.",
                    hint="pass a callable that returns a scheduler of the optimizer.",
                )
            )
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise UsageError(
            compose(
                "the learning rate schedule belongs to another optimizer.",
                hint="make it from the optimizer that initialize() is given, or pass a callable "
                "that makes one from it.",
            )
        )
    return scheduler


def _take_over(model: nn.Module, device: torch.device, *, trains: bool) -> None:
    """End what held the model before, where the new engine may take its place.

    That is an engine that is gone, one without an optimizer, one whose hooks were cleared, and, if
    the new one trains, one that trained this very model: a model trains in the last engine that it
    was given to. If another one holds it, nothing ends on any rank.

    Raises:
        UsageError: another rank alone has such an engine; `_check_model` refuses it there.
    """
    slots = [slot_of(param) for param in model.parameters()]
    units = dict.fromkeys(slot.unit for slot in slots if slot is not None)
    held = [unit for unit in units if unit.let_go is not None]  # others wait for their first engine
    if not held:
        return
    gc.collect()  # an engine that was dropped is a cycle, and should be gone on all ranks
    keeps = any(_keeps(_holder(unit), model, trains=trains) for unit in held)
    flag = torch.tensor([keeps], dtype=torch.int32, device=device)
    if all_reduce_(flag, default_mesh(device).shard, dist.ReduceOp.MAX).item():
        if keeps:
            return
        raise UsageError(
            compose(
                "the model belongs to another engine on another rank, though not on this one.",
                hint="call destroy() of the other engine on every rank first, or drop it on all.",
            )
        )
    for unit in held:
        if unit.let_go is None:
            continue  # it has ended with another unit of the same engine
        holder = _holder(unit)
        if holder is None:
            mesh = unit.mesh
            unit.let_go()
            mesh.destroy()
        elif holder.basic_optimizer is None:
            _log.info("an engine without optimizer gives the model to a new one, and ends.")
            holder.destroy()
        else:
            _log.log(
                logging.WARNING if trains and holder.global_steps else logging.INFO,
                "an engine that made %d steps gives the model to a new one, and ends with the "
                "optimizer's state; its weights go on.",
                holder.global_steps,
            )
            holder.destroy()


def _holder(unit: Unit) -> Engine | None:
    holder = unit.engine() if unit.engine is not None else None
    return holder if isinstance(holder, Engine) else None


def _keeps(holder: Engine | None, model: nn.Module, *, trains: bool) -> bool:
    """Whether an engine does not give way to a new one for the model."""
    if holder is None or holder.basic_optimizer is None or not holder.runtime.is_attached:
        return False
    return not (trains and holder.module is model)


def _check_model(model: nn.Module, trained: set[nn.Parameter] | None) -> None:
    ignored: list[str] = []
    for name, param in model.named_parameters():
        slot = slot_of(param)
        if slot is not None and not is_waiting(param):
            raise UsageError(
                compose(
                    f"{name} belongs to another engine already, which trains it.",
                    hint="give each engine a model of its own, or call destroy() of the other "
                    "engine first.",
                )
            )
        if slot is not None and slot.unit.is_full:
            raise UsageError(
                compose(
                    f"{name} is gathered, and edits made to it would be lost.",
                    hint="leave zeroshard.gathered(...) before initialize().",
                )
            )
        if param.is_meta:
            raise UsageError(
                compose(
                    f"{name} is on the meta device and has no values.",
                    hint="materialise the model before initialize(), for example with "
                    "model.to_empty() and its initialisation.",
                )
            )
        if type(param).__name__ == "DTensor":  # to import the class would take half a second
            raise UsageError(
                compose(
                    f"{name} is a DTensor: fully_shard() or tensor parallelism has divided it "
                    "already.",
                    hint="pass the model as it was before that.",
                )
            )
        if param.is_complex():
            raise UsageError(
                compose(
                    f"{name} is complex, but master weights and gradients are real numbers here.",
                    hint="hold its real and imaginary parts as a real parameter, and use "
                    "torch.view_as_complex in forward.",
                )
            )
        if trained is not None and param.requires_grad and param not in trained:
            ignored.append(name)
    for name, module in model.named_modules():
        if type(module).__name__ in _WRAPPERS and type(module).__module__.startswith("torch."):
            raise UsageError(
                compose(
                    f"{name or 'the model'} is wrapped in {type(module).__name__}, which gathers "
                    "and reduces on its own, as the engine does.",
                    hint="pass the model without it: model.module, or do not wrap it.",
                )
            )
        if getattr(module, "max_norm", None) is not None and isinstance(
            module, (nn.Embedding, nn.EmbeddingBag)
        ):
            raise UsageError(
                compose(
                    f"{name or 'the model'} is an embedding with max_norm, which edits its weight "
                    "in forward; every rank would edit other rows.",
                    hint="leave max_norm out, and clip the rows after engine.step() inside "
                    "zeroshard.gathered(weight, modifier_rank=0).",
                )
            )
    if ignored:
        _log.warning(
            "%d parameters require gradients but no optimizer steps them; their gradients are "
            "dropped: %s",
            len(ignored),
            ", ".join(ignored[:5]),
        )


def _check_compile(wanted: configuration.CompileConfig, *, frees: bool) -> None:
    problem = None
    if wanted.enabled:
        problem = compiled.objection(wanted.backend, wanted.kwargs, frees=frees)
    if problem is not None:
        raise ConfigError(f'"compile": {problem}')


def _choose_groups(
    model: nn.Module,
    trained: set[nn.Parameter],
    life: Lifetime,
    settings: configuration.Config,
    device: torch.device,
) -> list[Group]:
    """Divide the parameters into units, as the configuration wants it, in the order of use."""
    zero = settings.zero_optimization
    leaf = zero.leaf_module
    leaves = find_leaves(model, classes=leaf.classes, names=leaf.names, suffixes=leaf.name_suffixes)
    if not leaves and (leaf.classes or leaf.names or leaf.name_suffixes):
        _log.warning("zero_optimization.leaf_module: no module of the model matches.")
    for module in leaves:
        if isinstance(module, CONTAINERS):
            _log.warning(
                "zero_optimization.leaf_module: %s is a %s, which is never called itself, so "
                "nothing is gathered there. Name the module around it, or those inside it.",
                next(path for path, each in model.named_modules() if each is module),
                type(module).__name__,
            )
    persistent = set[nn.Parameter]()
    largest = zero.stage3_param_persistence_threshold
    if largest and not life.params_stay:
        persistent = find_persistent(model, largest, zero.stage3_model_persistence_threshold)
    buckets = (zero.reduce_bucket_size, zero.allgather_bucket_size)
    compute_dtype = compute_dtypes(model, settings, device)
    companions = quantized.companions_in(model)
    groups = choose_groups(
        model,
        kind_of=lambda param: Kind(
            trained=param.requires_grad and param in trained,
            compute=None if param in companions else compute_dtype(param),
            persistent=param in persistent,
            as_bytes=param in companions,
        ),
        units=settings.zeroshard.units,
        leaves=[*leaves, *marked(model)],
        most_numel=min((size for size in buckets if size is not None), default=None),
        companions=companions,
    )
    # A module comes before those inside it: it runs first, and waits for its own parameters then.
    position = {module: at for at, module in enumerate(model.modules())}
    return sorted(groups, key=lambda group: min(position[site] for site in group.sites))


def _place(
    groups: Sequence[Group],
    life: Lifetime,
    num_shards: int,
    optimizer: torch.optim.Optimizer | None,
    settings: configuration.Config,
    device: torch.device,
) -> list[Placed]:
    """Decide what of each group leaves the device.

    Raises:
        ConfigError: what cannot leave takes more than the budget.
    """
    world = dist.get_world_size()
    wished = wishes(settings, trains=optimizer is not None)
    dtypes = precision(settings, world)
    alone = world == 1 and dtypes.averaging == MEAN and settings.batch(world).accumulation == 1
    sizes = Sizes(life, dtypes, num_shards, averages(optimizer), has_one_addend=alone)
    # Adam's state comes in parts of units where one pass steps flat tensors.
    kernels = settings.zeroshard.optimizer_step
    passes = kernels == "fused" or (kernels == "auto" and device.type == "cuda")
    most_numel = None
    if passes and optimizer is not None and is_adam(optimizer):
        most_numel = numel_at_once(settings.zero_optimization.sub_group_size)
    return plan(groups, sizes.of, wished, partial(buffer_bytes, wished, most_numel))


def _offloads(settings: configuration.Config, *, trains: bool) -> list[Offload]:
    """What may leave the device."""
    wished = wishes(settings, trains=trains)
    homes: Mapping[Offload, Home] = {"parameters": wished.shards, "state": wished.state}
    return [kind for kind, home in homes.items() if home != "none"]


def _shard(
    model: nn.Module,
    placed: Sequence[Placed],
    mesh: Mesh,
    life: Lifetime,
    settings: configuration.Config,
    depots: Depots,
    undo: ExitStack,
) -> Runtime:
    """Move the model's parameters into units and hook its modules; ``undo`` gives them back."""
    buffer_dtype = settings.data_types.buffer_dtype
    _place_buffers(model, mesh, DTYPES[buffer_dtype] if buffer_dtype else None)
    dtypes = precision(settings, mesh.world)
    if any(is_waiting(param) for param in model.parameters()):
        gc.collect()  # waiting parameters that were replaced keep their shards in a cycle
    units: list[Unit] = []
    undo.callback(_hand_back, units, mesh)
    sizes = [sum(full_nbytes(member.param) for member in each.group.members) for each in placed]
    progress = Progress("sharded", len(placed), sum(sizes))
    for each, nbytes in zip(placed, sizes, strict=True):
        group = each.group
        # On one rank, a shard that stays on the device is better off as a unit that stays full.
        stays = group.kind.persistent or (mesh.shard.size == 1 and each.shard == "none")
        unit = build_unit(
            group.members,
            trained=group.kind.trained,
            lifetime=life.with_params_that_stay() if stays else life,
            mesh=mesh,
            precision=replace(dtypes, compute=group.kind.compute),
            state=depots.state(each.state),
            shards=depots.shards(each.shard),
            as_bytes=group.kind.as_bytes,
            together=partial(_agreed_if_far, depots, mesh, "make room for parameters"),
        )
        units.append(unit)
        trim()
        progress.tell(nbytes)
    _share(units, mesh, settings.zeroshard.gather)
    _share_gradients(units, mesh, settings.zeroshard.reduce)
    schedule = Schedule(units, mesh, _limits(units, settings))
    groups = [each.group for each in placed]
    runtime = Runtime(model, _make_sites(model, groups, units), units, schedule)
    undo.callback(runtime.detach)
    runtime.attach()
    return runtime


@contextmanager
def _given_back_on_failure(depots: Depots, mesh: Mesh) -> Iterator[ExitStack]:
    """Around what changes the model: if a host or a drive refuses, what is put on the stack is run.

    Depots and process groups are given back after that.

    Raises:
        OffloadError: with what has become of the model.
    """
    undo = ExitStack()
    undo.callback(mesh.destroy)
    undo.callback(depots.close)
    try:
        yield undo
    except OffloadError as error:
        undo.close()
        fact, _, hint = str(error).partition("\n\nhint: ")
        raise OffloadError(
            compose(
                f"{fact} The model was being divided by then; it is given back as by "
                "engine.destroy(), and can be given to initialize() again.",
                hint=hint,
            )
        ) from error


def _hand_back(units: Sequence[Unit], mesh: Mesh) -> None:
    keeper = Waiting(default_mesh(mesh.device))
    for unit in units:
        hand_back(unit, keeper)


def _agreed_if_far(depots: Depots, mesh: Mesh, what: str) -> AbstractContextManager[None]:
    """Around work that may fail off the device, on one rank alone."""
    return nullcontext() if depots.is_empty else agreed(mesh, what)


def _make_depots(
    model: nn.Module, placed: Sequence[Placed], settings: configuration.Config, mesh: Mesh
) -> Depots:
    """Make what a plan puts off the device a home, if there is room for it on all ranks.

    Raises:
        OffloadError: on every rank, if there is not; the groups of the mesh are gone then.
    """
    zero, depots = settings.zero_optimization, Depots(settings, mesh)
    files = file_bytes(placed)
    try:
        _check_waiting(model, mesh)
        if any(each.state != "none" or each.shard != "none" for each in placed):
            claim = Claim(
                host_bytes=host_bytes(placed)
                + staging_bytes(placed, settings)
                + _update_bytes(placed, settings, mesh),
                returned_bytes=_bytes_on_host(model) if mesh.device.type != "cpu" else 0,
                folders=[
                    Folder(f"zero_optimization.{name}.nvme_path", block.nvme_path or "", nbytes)
                    for (name, block), nbytes in zip(
                        {
                            "offload_optimizer": zero.offload_optimizer,
                            "offload_param": zero.offload_param,
                        }.items(),
                        files,
                        strict=True,
                    )
                ],
            )
            check_room(claim, mesh, bytes_free)
            with agreed(mesh, "make a home for what leaves its device"):
                depots.make(placed, files)
    except OffloadError:
        depots.discard()
        mesh.destroy()
        raise
    return depots


def _check_waiting(model: nn.Module, mesh: Mesh) -> None:
    """Refuse parameters that wait in files which a rank cannot read any more. A collective then.

    Raises:
        OffloadError: on every rank.
    """
    slots = [slot_of(param) for param in model.parameters() if is_waiting(param)]
    units = dict.fromkeys(slot.unit for slot in slots if slot is not None)
    in_files = [unit for unit in units if unit.store.reader is not None]
    if in_files:
        with agreed(mesh, "read the model's parameters"):
            for unit in in_files:
                _ = unit.store.home


def _update_bytes(placed: Sequence[Placed], settings: configuration.Config, mesh: Mesh) -> int:
    """Bytes that gradients take on the host, where it is certain that state is stepped there."""
    if settings.zeroshard.offload_update != "cpu":
        return 0
    sums = settings.batch(mesh.world).accumulation > 1
    return update_bytes(placed, precision(settings, mesh.world), sums=sums)


def _bytes_on_host(model: nn.Module) -> int:
    """Bytes of parameters in host memory, which they leave one unit after another."""
    full = sum(param.nbytes for param in model.parameters() if param.device.type == "cpu")
    slots = [slot_of(param) for param in model.parameters()]
    waiting = dict.fromkeys(slot.unit for slot in slots if slot is not None)
    return full + sum(unit.store.home.nbytes for unit in waiting if not unit.is_shard_near)


def _seal(
    depots: Depots, placed: Sequence[Placed], settings: configuration.Config, mesh: Mesh
) -> None:
    """Make depots ready for training, and say what is where."""
    zero = settings.zero_optimization
    _warn_of_shards_that_stay(placed, settings)
    if all(each.state == each.shard == "none" for each in placed):
        if settings.zeroshard.offload_update != "auto":
            _log.info(
                'zeroshard.offload_update: "%s" has no effect: no state leaves the device.',
                settings.zeroshard.offload_update,
            )
        return
    with agreed(mesh, "keep state off its device"):
        depots.seal()
    is_gpu = mesh.device.type == "cuda"
    _log.info(
        "each rank: %s.",
        describe(
            placed,
            pins_state=is_gpu and zero.offload_optimizer.pin_memory,
            pins_shards=is_gpu and zero.offload_param.pin_memory,
        ),
    )


def _warn_of_shards_that_stay(placed: Sequence[Placed], settings: configuration.Config) -> None:
    """Say which parameters cannot leave, though they were meant to."""
    zero = settings.zero_optimization
    if zero.offload_param.device == "none" or settings.zeroshard.gpu_budget is not None:
        return
    could = [each for each in placed if each.size.can_free]
    bound = [each for each in could if each.shard == "none"]
    if bound:
        _log.warning(
            "zero_optimization.offload_param: the shards of %d of %d units stay on the device, as "
            "they are the master weights that are stepped there. Offload the optimizer's state, "
            "too, or compute in bf16 or fp16.",
            len(bound),
            len(could),
        )


def _share(units: Sequence[Unit], mesh: Mesh, how: str) -> None:
    """Let units be gathered by reads of other ranks' memory, where that is wanted and possible."""
    if how == "nccl":
        return
    # Nobody reads host memory of another rank.
    pulled = [unit for unit in units if not unit.lifetime.params_stay and unit.is_shard_near]
    if not pulled:
        if how != "auto":
            _log.info(
                'zeroshard.gather: "copy_engine" has no effect: no parameters are freed after use '
                "whose shards are on the device."
            )
        return
    if how == "auto" and mesh.device.type == "cpu":
        return  # the host would do the copying
    try:
        if how == "auto":
            pulled = _faster_pulled(pulled, mesh)
        if pulled:
            share(pulled, mesh)
    except UnavailableError as reason:
        _log.log(
            logging.INFO if how == "auto" else logging.WARNING,
            "zeroshard.gather: parameters are gathered by collectives, as ranks cannot read each "
            "other's memory: %s",
            reason,
        )


def _faster_pulled(units: Sequence[Unit], mesh: Mesh) -> list[Unit]:
    """Those of which pulls have proved to be faster on these GPUs."""
    least = least_bytes((unit.nbytes_full for unit in units), mesh)
    if least is None:
        return []
    chosen = [unit for unit in units if unit.nbytes_full >= least]
    _log.info(
        "zeroshard.gather: %d of %d units are gathered by reading other ranks' memory, which was "
        "faster than a collective beside matrix products.",
        len(chosen),
        len(units),
    )
    return chosen


def _share_gradients(units: Sequence[Unit], mesh: Mesh, how: str) -> None:
    """Let gradients be averaged by reads of other ranks' memory, where wanted and possible."""
    if how != "copy_engine":
        return  # collectives are as fast, and hold no memory
    pulled = [unit for unit in units if unit.is_trained and not unit.lifetime.grads_stay]
    if not pulled:
        _log.info(
            'zeroshard.reduce: "copy_engine" has no effect: no gradients are reduced in every '
            "backward."
        )
        return
    try:
        if any(unit.precision.averaging != MEAN for unit in pulled):
            raise UnavailableError(
                "prescale_gradients, gradient_predivide_factor and reduce_scatter: false are ways "
                "of collectives"
            )
        reduce_by_pulls(pulled, mesh)
    except UnavailableError as reason:
        _log.warning("zeroshard.reduce: gradients are averaged by collectives: %s", reason)


def _place_buffers(model: nn.Module, mesh: Mesh, dtype: torch.dtype | None) -> None:
    """Move buffers to the device, with the values of rank 0 everywhere."""
    for buffer in model.buffers():
        buffer.data = buffer.data.to(mesh.device, dtype if buffer.is_floating_point() else None)
        broadcast_(buffer.data, mesh)


def _limits(units: Sequence[Unit], settings: configuration.Config) -> Limits:
    """Turn counts of elements into bytes of the units that are gathered."""
    zero = settings.zero_optimization
    freed = [unit for unit in units if not unit.lifetime.params_stay]
    least = max((unit.nbytes_full for unit in freed), default=0)
    is_far = not all(unit.is_shard_near for unit in freed)
    if is_far:
        least *= 2  # while one is copied to the device, the next is in line, however large it is
    numel = sum(unit.layout.full_numel for unit in units)
    per_element = sum(unit.nbytes_full for unit in units) / max(numel, 1)

    def nbytes(elements: int | None) -> int | None:
        return None if elements is None else int(elements * per_element)

    ahead = settings.zeroshard.lookahead_bytes
    if ahead is None and (prefetch := nbytes(zero.stage3_prefetch_bucket_size)) is not None:
        # One unit is always worth it: without any, no gather overlaps the computation.
        ahead = max(prefetch, least) if prefetch else 0
    elif ahead is None and is_far:
        ahead = least
    return Limits(
        ahead=ahead,
        live=nbytes(zero.stage3_max_live_parameters),
        reuse=nbytes(zero.stage3_max_reuse_distance) or 0,
        overlap=zero.overlap_comm is not False,
    )


def _make_sites(model: nn.Module, groups: list[Group], units: list[Unit]) -> list[Site]:
    """One site for each module that uses units, outermost first; the model itself always is one."""
    users: dict[nn.Module, list[Unit]] = {model: []}
    for group, unit in zip(groups, units, strict=True):
        for module in group.sites:
            users.setdefault(module, []).append(unit)
    names = {module: name for name, module in model.named_modules()}
    return [Site(names[module], module, used) for module, used in users.items()]
