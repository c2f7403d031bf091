"""Any torch optimizer over this rank's slices of the parameters.

The user's optimizer object is kept, with its classes, groups, hyper-parameters and schedulers; only
the tensors it steps are exchanged: each parameter for the slice of its fp32 master weights that
this rank owns. One step is

    norm of the averaged gradients -> unscale, clip and step -> publish, unit by unit

The factor by which gradients are unscaled and clipped stays on the device, and kernels that take it
apply it themselves. Where a step may be skipped, kernels that take a flag are queued before the
host reads the norm, so the device has work while the host waits for it.
"""

# Torch's list operations have no public name.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zeroshard.core.agreed import agreed
from zeroshard.core.collectives import DONE, Answered, Exchange, Ticket, all_reduce_
from zeroshard.core.depot import Depot, DeviceDepot
from zeroshard.core.files import FileDepot
from zeroshard.core.hook import while_alive
from zeroshard.core.mesh import Mesh
from zeroshard.core.norm import squared
from zeroshard.core.slots import slot_of
from zeroshard.core.transport import rewriting
from zeroshard.core.unit import Unit
from zeroshard.errors import OffloadError, UsageError, compose
from zeroshard.optim.adam import Update
from zeroshard.optim.factory import ELEMENTWISE
from zeroshard.optim.far_state import FarState
from zeroshard.optim.flat_state import FlatState
from zeroshard.optim.fused import FusedAdam, is_adam, is_watched, triton_update
from zeroshard.optim.host_update import HostUpdate
from zeroshard.optim.lamb import Lamb
from zeroshard.optim.muon import Muon
from zeroshard.optim.on_its_way import OnItsWay
from zeroshard.optim.packages import is_quantized_elementwise
from zeroshard.optim.pipeline import Pipeline
from zeroshard.optim.scaler import LossScaler
from zeroshard.optim.update_choice import Where, stepped_on_host
from zeroshard.optim.whole import ALONE, Sharded, WholeOptimizer

__all__ = [
    "Kernels",
    "ShardedOptimizer",
    "StepPolicy",
    "check_optimizer",
    "numel_at_once",
    "optimizer_parameters",
]

Kernels = Literal["auto", "fused", "torch"]
"""Who steps the slices: one pass over each shard, or the optimizer's own step."""

_log = logging.getLogger(__name__)
_PAGE_NUMEL = 4096
_MOST_NUMEL = 2**24  # elements that come from elsewhere at once: some 200 MB of Adam's state
# Whose fused kernels take scalars of the device. A first step of SGD that is skipped leaves its
# momentum undefined.
_SKIPPING: Set[type] = {torch.optim.Adam, torch.optim.AdamW}
_SCALING: Set[type] = {*_SKIPPING, torch.optim.SGD, torch.optim.Adagrad}
# A step over some parameters asks nothing about others, so it may be made in parts by ranks that
# make the same parts.
_DIVISIBLE: Set[type] = {Lamb, Muon}
_SHARDABLE = ELEMENTWISE | _DIVISIBLE
_TORCH_MUON = getattr(torch.optim, "Muon", None)  # since torch 2.9
_UNFIT: Mapping[type, str] = {
    torch.optim.LBFGS: "computes the loss several times in one step, which engine.step() cannot do",
    torch.optim.SparseAdam: "takes sparse gradients only, and gradients are dense here",
}
_LOOKS_FURTHER: Mapping[type, str] = {
    torch.optim.Adafactor: "keeps averages over the rows and columns of whole matrices",
}


def optimizer_parameters(optimizer: torch.optim.Optimizer) -> Iterable[nn.Parameter]:
    """All parameters an optimizer steps."""
    for group in optimizer.param_groups:
        yield from group["params"]


@dataclass(frozen=True, slots=True)
class StepPolicy:
    """What happens between backward and the optimizer: ``clip`` 0 does not clip.

    ``most_numel``: elements of this rank's master weights that are stepped at once, at least those
    of one unit; None steps all at once. ``kernels``: "auto" is "fused" where Triton runs, for there
    it is faster, and "torch" elsewhere. ``num_buffers``: through which state passes that is kept
    off the device; None goes by what is free. ``update``: where that state is stepped; on the host
    with a part ``cores`` of this rank's CPUs, None for the engine's choice. ``sums``: whether
    gradients are summed over micro-steps.
    """

    clip: float = 0.0
    skip_on_overflow: bool = False
    most_numel: int | None = None
    kernels: Kernels = "auto"
    num_buffers: int | None = None
    update: Where = "gpu"
    cores: float | None = None
    sums: bool = False


def numel_at_once(most_numel: int | None) -> int:
    """Elements that come from elsewhere at once, whole pages of files, if one pass steps a shard.

    ``most_numel``: as in `StepPolicy`.
    """
    most = min(most_numel or _MOST_NUMEL, _MOST_NUMEL)
    return -(-most // _PAGE_NUMEL) * _PAGE_NUMEL


@dataclass(frozen=True, slots=True)
class _Scaling:
    """What becomes of the gradients before they are stepped with; scalars in fp32 on the device.

    They are divided by ``divisor`` and multiplied by ``clip``, where that is not None; nothing is
    stepped if ``found_inf``, which is 0 or 1, is 1.
    """

    divisor: float
    clip: Tensor | None = None
    found_inf: Tensor | None = None

    def factor(self, device: torch.device) -> Tensor:
        """What gradients are multiplied by, for kernels that do it themselves."""
        if self.clip is not None:
            return self.clip / self.divisor
        return torch.full((), 1.0 / self.divisor, dtype=torch.float32, device=device)

    def inverse(self, device: torch.device) -> Tensor | None:
        """What gradients are divided by, for kernels of torch's; None to leave them."""
        if self.clip is not None:
            return self.divisor / self.clip
        if self.divisor == 1.0:
            return None
        return torch.full((), self.divisor, dtype=torch.float32, device=device)

    def apply_(self, shards: list[Tensor]) -> None:
        """Scale gradients before a step that knows nothing of it.

        The bits are those of torch's kernels: hooks may be on some of the ranks that hold replicas.
        """
        if self.clip is not None:
            inverse = self.divisor / self.clip
            for shard in shards:
                shard.div_(inverse)
        elif self.divisor != 1.0:
            torch._foreach_div_(shards, self.divisor)


def check_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    num_shards: int,
    *,
    allow_untested: bool = False,
) -> None:
    """Refuse an optimizer that cannot step slices of this model's parameters.

    Raises:
        UsageError: it holds other parameters, or its update is not known to be element-wise.
    """
    own = set(model.parameters())
    for number, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            if param not in own:
                raise UsageError(
                    compose(
                        f"param group {number} of the optimizer holds a parameter of shape "
                        f"{tuple(param.shape)} that is not a parameter of the model.",
                        hint="make the optimizer from model.parameters() of the very model that "
                        "initialize() is given, after its last change.",
                    )
                )
    kind = type(optimizer)
    if kind in _UNFIT:
        raise UsageError(
            compose(f"{kind.__name__} {_UNFIT[kind]}.", hint="use another optimizer, such as Adam.")
        )
    if num_shards == 1 or kind in _SHARDABLE or is_quantized_elementwise(kind):
        return
    if kind is _TORCH_MUON:
        raise UsageError(
            compose(
                "torch.optim.Muon steps whole matrices, and every rank here steps "
                f"1/{num_shards} of each parameter.",
                hint='name it in the configuration, "optimizer": {"type": "Muon"}, or pass a '
                "zeroshard.optim.Muon: it takes all parameters, and gathers what it needs.",
            )
        )
    reason = _LOOKS_FURTHER.get(kind, "is not known to update each element on its own")
    fact = (
        f"{kind.__name__} {reason}, and every rank here steps 1/{num_shards} of each parameter: "
        "numbers could be wrong."
    )
    if not allow_untested:
        raise UsageError(
            compose(
                fact,
                hint='use "stage": 0, or set "zero_allow_untested_optimizer": true if the '
                "update of an element depends on that element alone.",
            )
        )
    # Hugging Face's libraries allow it for every optimizer, so nobody may have decided it.
    _log.warning('%s "zero_allow_untested_optimizer" lets it train all the same.', fact)


def steps_in_parts(kind: type[torch.optim.Optimizer]) -> bool:
    """Whether several steps over a few parameters each are one step over all of them."""
    return kind in ELEMENTWISE or is_quantized_elementwise(kind)


def _takes_scaling(inner: torch.optim.Optimizer, kinds: Set[type]) -> bool:
    """Whether the optimizer's kernels divide gradients by a scalar on the device, or skip by one.

    It is how torch's own GradScaler talks to the fused optimizers.
    """
    return (
        type(inner) in kinds
        and getattr(inner, "_step_supports_amp_scaling", False)
        and all(group.get("fused") for group in inner.param_groups)
        and not is_watched(inner)
    )


def _bytes_of(tensor: Tensor) -> int:
    """Bytes of memory; quantised state is a tensor that consists of others."""
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.nbytes
    return sum(getattr(tensor, name).nbytes for name in tensor.__tensor_flatten__()[0])


class ShardedOptimizer:
    """Steps the slices of all trained units with a torch optimizer.

    ``inner`` is the user's optimizer; calling its ``step`` directly is refused, because the
    gradients it needs exist only here.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        units: Sequence[Unit],
        mesh: Mesh,
        *,
        policy: StepPolicy,
        scaler: LossScaler | None = None,
    ) -> None:
        self.inner, self.mesh, self.policy, self.scaler = inner, mesh, policy, scaler
        self.units = tuple(unit for unit in units if unit.is_trained)
        self.norm: Tensor | None = None
        self._overflow = False  # whether the last step was skipped for it
        self._num_skipped = 0
        self._pending: OnItsWay | None = None  # the norm that decides about the last step
        self._square = torch.zeros((), dtype=torch.float64, device=mesh.device)
        self._stepping = False
        self._published: set[Unit] = set()  # in the step under way
        self._scalars: tuple[object, ...] = ()  # what a step beside the computation reads
        self._given = [list(group["params"]) for group in inner.param_groups]
        self._adopt()
        self._pipeline = Pipeline(mesh, policy.num_buffers)
        self._states = {unit: FlatState(unit) for unit in self.units}
        self._far = {unit: FarState(unit, self._states[unit], inner) for unit in self._far_units()}
        self._has_files = any(isinstance(unit.state, FileDepot) for unit in self._far)
        self._unsealed: set[Depot] = set()  # in which something was taken since
        self._has_said_what_stays = False
        self._parts = self._divide()
        for unit in self._far:
            unit.recall = while_alive(self.recall)
            self.keep(unit)
        self._num_slices = sum(len(group["params"]) for group in inner.param_groups)
        self._guard = inner.register_step_pre_hook(self._refuse_direct_step)
        self._fused: FusedAdam | None = None
        is_asked_for = policy.kernels == "fused"
        self._host = self._choose_host()
        if self.units and (is_asked_for or (policy.kernels == "auto" and is_adam(inner))):
            update = self._common_update()
            if is_asked_for or update is not None or self._host is not None:
                self._fused = FusedAdam(
                    inner,
                    self._states,
                    mesh.device,
                    update,
                    most_numel=numel_at_once(policy.most_numel),
                    log_level=logging.INFO if is_asked_for else logging.DEBUG,
                )
                self._fused.reserve()
        has_replicas = self._fused is not None and mesh.replicate.size > 1
        self._agree = Exchange(mesh, 1) if has_replicas else None

    def _common_update(self) -> Update | None:
        """The kernel that steps Adam, if it runs on all ranks: replicas must round alike."""
        update = triton_update(self.mesh.device)
        can = torch.tensor(float(update is not None), device=self.mesh.device)
        for axis in (self.mesh.shard, self.mesh.replicate):
            all_reduce_(can, axis, dist.ReduceOp.MIN)
        return update if can.item() else None

    def _choose_host(self) -> HostUpdate | None:
        """Who steps on the host, and which units; they are the same on all ranks."""
        policy = self.policy
        if policy.update == "gpu" or not self._far:
            return None
        chosen = stepped_on_host(
            self.mesh,
            list(self._far),
            policy.update,
            is_adam=is_adam(self.inner) and policy.kernels != "torch",
            cores=policy.cores,
            num_buffers=policy.num_buffers,
        )
        if chosen is None:
            return None
        return HostUpdate(self.mesh, chosen.units, chosen.worker, sums=policy.sums)

    def _adopt(self) -> None:
        """Exchange parameters for slices in every group, and slice the state they already have."""
        needs_whole = isinstance(self.inner, WholeOptimizer)
        if isinstance(self.inner, WholeOptimizer):
            self.inner.whole = Sharded(self.units, self.mesh)
        old_state = dict(self.inner.state)
        self.inner.state.clear()
        for group in self.inner.param_groups:
            slices: list[nn.Parameter] = []
            for param in group["params"]:
                slot = slot_of(param)
                if slot is None or not slot.unit.is_trained:
                    continue  # a frozen parameter is never stepped
                piece = slot.unit.slices[slot.index]
                if piece.numel() or needs_whole:
                    slices.append(piece)
                    if param in old_state:
                        self.inner.state[piece] = self._slice_state(
                            old_state[param], slot.unit, slot.index
                        )
            group["params"] = slices

    def _far_units(self) -> list[Unit]:
        return [unit for unit in self.units if not unit.state.is_near]

    def _divide(self) -> list[list[Unit]]:
        """The units of each part of a step, in order."""
        most = self.policy.most_numel
        if self._far:
            kind = type(self.inner)
            if steps_in_parts(kind) or kind in _DIVISIBLE:
                return [[unit] for unit in self.units]
            _log.warning(
                "%s may look at all parameters in one step, so all of its state that is kept off "
                "the device comes back to it in every step: it saves memory between steps only.",
                kind.__name__,
            )
            return [list(self.units)]
        if most is None or sum(unit.layout.shard_numel for unit in self.units) <= most:
            return [list(self.units)]
        if not steps_in_parts(type(self.inner)):
            _log.warning(
                "zero_optimization.sub_group_size is ignored: %s may look at all parameters in one "
                "step, so it steps all at once.",
                type(self.inner).__name__,
            )
            return [list(self.units)]
        parts: list[list[Unit]] = []
        room = 0
        for unit in self.units:
            if unit.layout.shard_numel > room:
                parts.append([])
                room = most
            parts[-1].append(unit)
            room -= unit.layout.shard_numel
        return parts

    def _slice_state(self, state: Mapping[str, Any], unit: Unit, index: int) -> dict[str, Any]:
        owned = unit.layout.owned(index, self.mesh.shard.rank)
        numel, piece = unit.layout.numels[index], unit.slices[index]
        sliced: dict[str, Any] = {}
        for key, value in state.items():
            is_count = key == "step"  # a scalar whatever the parameter's shape
            if not isinstance(value, Tensor) or is_count:
                pass
            elif value.numel() == numel:
                value = value.reshape(-1)[owned.slice()].to(piece.device).view(piece.shape).clone()
            elif value.dim() and self.mesh.shard.size > 1:
                raise UsageError(
                    compose(
                        f"{unit.members[index].name}: the optimizer's state {key!r} has "
                        f"{value.numel()} elements, so it cannot be cut like the parameter.",
                        hint="pass an optimizer that has not made a step yet.",
                    )
                )
            sliced[key] = value
        return sliced

    def _refuse_direct_step(self, *_: object) -> None:
        if not self._stepping:
            raise UsageError(
                compose(
                    "the optimizer was stepped directly, but its gradients are sharded and not yet "
                    "unscaled or clipped.",
                    hint="call engine.step() instead of optimizer.step().",
                )
            )

    def step(self, divide_by: float) -> bool:
        """Make one step with the accumulated gradients divided by ``divide_by``; a collective.

        Returns:
            False if the gradients overflowed and the step was skipped.
        """
        self.queue_step(divide_by)
        return not self.overflow

    def queue_step(self, divide_by: float) -> None:
        """As ``step``, but where the host need not know whether it is skipped, it does not wait."""
        self._conclude()
        for unit in self.units:
            unit.end_step()
            unit.settle()
        if self._host is not None:
            self._host.send_as_reduced(False)
        self._scalars = ()  # nothing reads them any more
        divisor = divide_by * (self.scaler.scale if self.scaler else 1.0)
        self.norm = norm = self._global_norm() / divisor
        self._check_groups()
        clip: Tensor | None = None
        if self.policy.clip > 0:
            # torch.nn.utils.clip_grad_norm_ has the same epsilon.
            clip = (self.policy.clip / (norm + 1e-6)).clamp(max=1.0)
        fused = self._prepared()
        found_inf: Tensor | None = None
        self._overflow = False
        if self.policy.skip_on_overflow:
            self._pending = OnItsWay(norm)
            if fused is None and not _takes_scaling(self.inner, _SKIPPING):
                # The host waits for backward, and the device for the host.
                self._conclude()
            else:
                found_inf = norm.isfinite().logical_not().float()
        self._update(fused, _Scaling(divisor, clip, found_inf))
        if self.scaler is not None:
            self._conclude()
            self.scaler.update(self._overflow)

    def _prepared(self) -> FusedAdam | None:
        """What makes the next step in one pass, if it can on every rank that holds replicas.

        Something may speak against it on some of them, such as a hook, and bits would differ.
        """
        can = self._fused is not None and self._fused.prepare()
        if self._agree is not None:
            with Answered(self.mesh.rank, "to step"):
                can = all(each for (each,) in self._agree([int(can)]))
        return self._fused if can else None

    @property
    def overflow(self) -> bool:
        """Whether the last step was skipped for it; who asks may have to wait for backward."""
        self._conclude()
        return self._overflow

    @property
    def num_skipped(self) -> int:
        """How many steps were skipped."""
        self._conclude()
        return self._num_skipped

    def _conclude(self) -> None:
        """Learn whether the last step was skipped, if that is not known yet."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._overflow = not isfinite(pending.get())
            self._num_skipped += self._overflow
            if self._fused is not None:
                self._fused.confirm(not self._overflow)

    def _update(self, fused: FusedAdam | None, scaling: _Scaling) -> None:
        """Step all units, unless it is known that they are skipped, and publish them.

        A skipped step publishes, too: other ranks may not know of it yet. So does one that fails
        where state is kept, before it raises: no rank waits for what another one does not send.
        """
        self._published.clear()
        try:
            self._update_units(fused, scaling)
        except OffloadError:
            self._publish_rest()
            raise

    def _publish_rest(self) -> None:
        for unit in self.units:
            if unit not in self._published:
                with suppress(OffloadError):
                    self._publish([unit], is_written=True, step=self._end())

    def _update_units(self, fused: FusedAdam | None, scaling: _Scaling) -> None:
        if self._overflow:
            self._pipeline.forget()
        else:
            if fused is None:
                for unit in self._far:
                    self.keep(unit)
            self._read_ahead(fused)
        # Master weights may be the very shards that other ranks read.
        with rewriting(unit.transport for unit in self.units):
            if self._overflow:
                self._publish(self.units)
            elif fused is not None:
                self._step_shards(fused, scaling)
            else:
                self._step_slices(scaling)
            for unit in self.units:
                if unit.gathers_alone:  # others may read the shard as soon as this ends
                    unit.end_step()
        for unit in self.units:
            unit.catch_up()

    def _check_groups(self) -> None:
        if sum(len(group["params"]) for group in self.inner.param_groups) != self._num_slices:
            raise UsageError(
                compose(
                    "the optimizer's param groups were changed after initialize().",
                    hint="add parameters to the optimizer before initialize().",
                )
            )

    def read_ahead(self) -> None:
        """Send for some of what the next step is expected to need first, if any is elsewhere.

        For a backward to call once for each unit; half of the units are enough to send for all that
        there is room for.
        """
        if self._host is not None and self._fused is not None and self._fused.may_step:
            self._host.send_as_reduced(True)
        if not self._far:
            return
        fused = self._fused if self._fused is not None and self._fused.may_step else None
        if fused is not None and not fused.is_laid_out:
            # What the step will send for is not known yet; that activations take room now, is.
            self._pipeline.look_for_room()
            return
        if not self._pipeline.is_under_way:  # the step itself looks whether it is still right
            self._read_ahead(fused)
        self._pipeline.read_ahead(share=2 / len(self.units))

    def _on_host(self, fused: FusedAdam | None) -> Sequence[Unit]:
        """The units that are stepped on the host."""
        return () if self._host is None or fused is None else self._host.units

    def _read_ahead(self, fused: FusedAdam | None) -> None:
        if not self._far:
            return
        if fused is not None and fused.is_laid_out:
            moved = [unit for unit in self._far if unit not in self._on_host(fused)]
            loads = [part.load for unit in moved for part in fused.parts(unit)]
        else:
            loads = [far.load for far in self._far.values()]
        self._pipeline.start(loads, at_once=max(map(len, self._parts)) if fused is None else 1)

    def recall(self, edits: bool = True) -> None:
        """Wait until all state is where it is kept; nothing read ahead holds if it is edited."""
        for unit in self.units:
            unit.await_step()
        if self._host is not None:
            self._host.settle()
        if edits:
            self._pipeline.forget()
        self._pipeline.settle()

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """Step inside, beside the computation if state comes from elsewhere."""
        self.mesh.parcels.settle()
        if not self._far:
            yield
            self.mesh.parcels.settle()
            return
        for unit in self.units:
            unit.end_gather()
        try:
            with self.mesh.stepping.entered():
                yield
                self.mesh.parcels.settle()  # for the stream that took their memory to wait
            self._pipeline.end()
        except BaseException:
            self.mesh.stepping.join()  # what it reads may be freed now
            if self._host is not None:
                self._host.give_up()
            self._pipeline.forget()
            raise
        finally:
            for unit in self.units:
                unit.show_stepped()

    def _step_shards(self, fused: FusedAdam, scaling: _Scaling) -> None:
        """Step each unit in one pass and publish it, before the next one is stepped."""
        with self._stepping_inside():
            self.inner.step()  # finds no gradients; whoever wraps it knows that there was a step
        scale = (scaling.factor(self.mesh.device), scaling.found_inf)
        self._scalars = scale
        with torch.no_grad(), self._beside():
            ends = {} if self._host is None else self._host.step(fused, *scale)
            for unit in self.units:
                if unit not in ends:
                    out = unit.shard_to_write()
                    for part in fused.parts(unit):
                        with self._pipeline.visiting(part.load) as tensors:
                            fused.update(unit, part, tensors, out, scale)
                    ends[unit] = self._end()
                elif unit.reads_as_published:
                    ends[unit].wait()
                self._publish([unit], is_written=True, step=ends[unit])
        fused.advance(scaling.found_inf)

    def _step_slices(self, scaling: _Scaling) -> None:
        """Let the optimizer step the slices of all units, part by part, and publish them."""
        is_inside = _takes_scaling(self.inner, _SCALING)
        self._scalars = (scaling,)
        with self._beside():
            for units in self._parts:
                with torch.no_grad(), ExitStack() as visits:
                    with self._arriving():
                        for unit in units:
                            if unit in self._far:
                                visits.enter_context(self._far[unit].visiting(self._pipeline))
                    self._step_units(units, scaling, is_inside=is_inside)
                for unit in units:
                    self.keep(unit)
                    end = self._end()
                    self._publish([unit], is_written=unit in self._far, step=end)
        self.seal()
        self._say_what_stays()

    def _arriving(self) -> AbstractContextManager[object]:
        """Around the arrival of state: all ranks learn of a failure before a step that talks."""
        if isinstance(self.inner, WholeOptimizer) and self._has_files:
            return agreed(self.mesh, "read the optimizer's state")
        return nullcontext()

    def _step_units(self, units: Sequence[Unit], scaling: _Scaling, *, is_inside: bool) -> None:
        """Step the slices of some units; torch's optimizers pass over those without gradients.

        ``is_inside``: the optimizer's own kernels scale the gradients.
        """
        shards: list[Tensor] = []
        for unit in units:
            unit.expose_gradients()
            assert unit.grad_shard is not None, f"{unit.name} has no gradient after backward"
            shards.append(unit.grad_shard)
        with self._stepping_inside():
            if is_inside:
                with self._scaling_inside(scaling):
                    self.inner.step()
            else:
                scaling.apply_(shards)
                self.inner.step()

    def _end(self) -> Ticket:
        """The end of a unit's step, which is made on the stream that is current."""
        return self._pipeline.ticket() if self._far else DONE

    def _publish(
        self, units: Sequence[Unit], *, is_written: bool = False, step: Ticket = DONE
    ) -> None:
        """Forget the gradients of units, and let gathers read their master weights."""
        for unit in units:
            unit.clear_gradients(is_read=step is not DONE)
        with torch.no_grad():
            for unit in units:
                self._published.add(unit)
                unit.publish(is_written=is_written or self._overflow, step=step)

    @contextmanager
    def _stepping_inside(self) -> Iterator[None]:
        """Let the optimizer step inside."""
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False

    @contextmanager
    def _scaling_inside(self, scaling: _Scaling) -> Iterator[None]:
        """Let the optimizer's kernels scale and skip inside."""
        inner: Any = self.inner
        inner.grad_scale = scaling.inverse(self.mesh.device)
        inner.found_inf = scaling.found_inf
        try:
            yield
        finally:
            del inner.grad_scale, inner.found_inf

    def _global_norm(self) -> Tensor:
        """L2 norm over all gradients of all ranks, before unscaling and clipping."""
        norms = [norm for unit in self.units for norm in unit.gradient_norms()]
        if norms:
            self._square.copy_(squared(norms))
        else:
            self._square.zero_()
        with Answered(self.mesh.rank, "the gradients' norm for its step"):
            all_reduce_(self._square, self.mesh.shard)
        return self._square.sqrt().float()

    def clear_gradients(self) -> None:
        """Forget all gradients accumulated since the last step, and the step they were for."""
        if self._pipeline.is_under_way:
            self._pipeline.forget()
        if self._host is not None:
            self._host.send_as_reduced(False)
        for unit in self.units:
            unit.clear_gradients()

    def release(self) -> None:
        """Give the optimizer its parameters back; state, which is of slices, is dropped."""
        self._guard.remove()
        if self._host is not None:
            host, self._host = self._host, None
            host.close()
        try:
            self.recall()
        except OffloadError as error:
            _log.warning("optimizer state is given up that cannot be read: %s", error)
        self._pipeline.close()
        self.inner.state.clear()
        if self._fused is not None:
            self._fused.let_go()
        for unit, far in self._far.items():
            far.give_back()
            unit.recall = None
        for group, params in zip(self.inner.param_groups, self._given, strict=True):
            group["params"] = params
        if isinstance(self.inner, WholeOptimizer):
            self.inner.whole = ALONE

    @property
    def far_bytes(self) -> dict[Unit, int]:
        """What the state of each unit that is kept off the device would take there.

        Where it is stepped on the host, the gradient would be on the device for longer, too.
        """
        on_host = () if self._host is None else self._host.units
        return {
            unit: far.nbytes_near + (unit.most_gradient_bytes if unit in on_host else 0)
            for unit, far in self._far.items()
        }

    @property
    def buffer_bytes(self) -> int:
        """Bytes on the device for state that passes through it, between two steps."""
        return self._pipeline.nbytes

    def bring_back(self, units: Sequence[Unit]) -> None:
        """Keep the state of some units that is off the device there from now on; between two steps.

        Units are stepped in the parts in which they were stepped before, which took no more memory
        than is known.

        Raises:
            torch.OutOfMemoryError: there is no room for it.
        """
        self.recall()
        self._pipeline.close()
        if self._host is not None:
            self._host.leave(units)
            if not self._host.units:
                self._host.close()
                self._host = None
        if self.mesh.device.type == "cuda":
            torch.cuda.empty_cache()  # what stays should not lie among what comes and goes
        for unit in units:
            self._far[unit].come_back(DeviceDepot(self.mesh.device))
            del self._far[unit]
            unit.recall = None
            if self._fused is not None:
                self._fused.forget(unit)
            else:
                self._states[unit].give_back()  # the optimizer's own views keep the memory
        if self._fused is not None:
            self._fused.prepare()  # so that reading ahead knows what there is to read

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the optimizer go on with what its ``state_dict`` gave on this rank."""
        self.recall()
        self.inner.load_state_dict(state_dict)
        self.let_go_of_state()
        for unit in self._far:
            for group in self.inner.param_groups:
                if group.get("fused") or group.get("capturable"):
                    self._bring_counts(unit, group["params"])
            self.keep(unit)
        self.seal()

    def _bring_counts(self, unit: Unit, stepped: Sequence[nn.Parameter]) -> None:
        """Move counts to the device, which torch has put beside the slices."""
        own = set(unit.slices)
        for piece in own.intersection(stepped):
            state = self.inner.state.get(piece, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and not value.dim():
                    state[key] = value.to(self.mesh.device)

    def keep(self, unit: Unit) -> None:
        """Move a unit's state that was set in the optimizer to where it is kept; then `seal`."""
        if unit in self._far:
            before = unit.state.nbytes
            self._far[unit].take_in()
            if unit.state.nbytes > before:
                self._unsealed.add(unit.state)

    def seal(self) -> None:
        """Make the homes of state that was new ready for the steps to come.

        Raises:
            OffloadError: the host or the drive refuses.
        """
        while self._unsealed:
            self._unsealed.pop().seal()

    def _say_what_stays(self) -> None:
        if self._has_said_what_stays:
            return
        self._has_said_what_stays = True
        values = [value for far in self._far.values() for value in far.staying]
        kinds = sorted({type(value).__name__ for value in values if type(value) is not Tensor})
        if kinds:
            _log.warning(
                "%s keeps state in tensors of a class of their own (%s), which stay on the device "
                "with %d MiB: only master weights leave it.",
                type(self.inner).__name__,
                ", ".join(kinds),
                sum(map(_bytes_of, values)) >> 20,
            )

    def let_go_of_state(self) -> None:
        """Hold on to no memory of the device for the optimizer's state, so that it can be moved."""
        self.recall()
        self._pipeline.release()
        if self._fused is not None:
            self._fused.let_go()

    def state_bytes(self) -> int:
        """Bytes of state on this rank's device: moments, and master weights beside parameters."""
        moments = [
            value
            for unit in self.units
            if unit not in self._far
            for piece in unit.slices
            for value in self.inner.state.get(piece, {}).values()
            if isinstance(value, Tensor) and value.dim()
        ]
        moments += [value for far in self._far.values() for value in far.staying]
        return sum(map(_bytes_of, moments)) + sum(unit.master_bytes for unit in self.units)
