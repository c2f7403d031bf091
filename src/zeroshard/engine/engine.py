"""The engine: what a training loop calls. It knows steps and batches, nothing about sharding."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import Sampler, SequentialSampler

from zeroshard.checkpoint.export import Weights, weights_in
from zeroshard.checkpoint.reader import Reader
from zeroshard.checkpoint.reading import Wanted, load
from zeroshard.checkpoint.training import Progress, Training
from zeroshard.checkpoint.writing import Common, save
from zeroshard.config import Batch, Config, resolve
from zeroshard.core import tree
from zeroshard.core.agreed import agreed
from zeroshard.core.hook import while_alive
from zeroshard.core.hooks import Runtime, in_backward
from zeroshard.core.mesh import Mesh
from zeroshard.core.scaling import ScaledLoss
from zeroshard.core.usage import GradientWatch
from zeroshard.engine.activations import ActivationPlan, Activations
from zeroshard.engine.compiled import Compiled, advise, compile_blocks, objection
from zeroshard.engine.data import ShardedLoader, make_loader
from zeroshard.engine.depots import Depots
from zeroshard.engine.diagnose import explain_backward, explain_memory
from zeroshard.engine.export import load_weights, save_weights, weights_of
from zeroshard.engine.getters import Getters
from zeroshard.engine.misuse import ScheduleWatch, check_members, refuse_foreign_steps
from zeroshard.engine.offload import Offloaded, OffloadStateTypeEnum, offload, states_named
from zeroshard.engine.optimizer import ZeroOptimizer
from zeroshard.engine.promotion import Promotion
from zeroshard.errors import Error, OffloadError, UsageError, compose
from zeroshard.optim.sharded import ShardedOptimizer

__all__ = ["Engine", "MemoryReport", "Settings"]

_log = logging.getLogger(__name__)
_NOTHING: Mapping[str, Any] = MappingProxyType({})
_WATCHED_STEPS = 3  # a loop that edits weights does so from its start


@dataclass(frozen=True, slots=True)
class Settings:
    """What the engine itself needs of the configuration."""

    batch: Batch
    config: Config
    steps_per_print: int | None = None
    cast_inputs_to: torch.dtype | None = None
    autocast: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Bytes of model state of this rank.

    Parameters, optimizer state and gradients are those on the device: the first two as they are
    now, gradients as they were at the end of the last backward, since the step frees them, and what
    is kept for other ranks to read them in. What is kept off the device is counted apart.
    """

    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    host_bytes: int = 0
    """Master weights, optimizer state and shards in host memory, and buffers of those in files."""

    file_bytes: int = 0
    """Master weights, optimizer state and shards in files."""

    pinned_bytes: int = 0
    """Host memory that is page-locked for what is in it."""

    @property
    def total_bytes(self) -> int:
        """Sum of what is on the device."""
        return self.parameters_bytes + self.gradients_bytes + self.optimizer_bytes


class Engine(Getters):
    """A model, its optimizer and its accumulation: ``engine(...)``, ``backward``, ``step``.

    Made by :func:`zeroshard.initialize`. Attributes that the engine does not have are looked up in
    the model.
    """

    def __init__(  # noqa: PLR0913 - the parts it is made of
        self,
        module: nn.Module,
        runtime: Runtime,
        mesh: Mesh,
        settings: Settings,
        depots: Depots,
        *,
        sharded: ShardedOptimizer | None,
        watch: GradientWatch | None = None,
        lr_scheduler: Any = None,
        training_dataloader: ShardedLoader | None = None,
        local_rank: int = 0,
    ) -> None:
        super().__init__()
        self._depots = depots
        self.module = module
        self.runtime, self.mesh, self.settings = runtime, mesh, settings
        self.lr_scheduler, self.training_dataloader = lr_scheduler, training_dataloader
        self.local_rank, self.global_rank, self.world_size = local_rank, mesh.rank, mesh.world
        self.device = mesh.device
        self.micro_steps = self.global_steps = self.global_samples = 0
        self._num_skipped_before = 0  # steps, by the engine whose training this one resumed
        self.batch, self.configuration = settings.batch, settings.config
        self._sharded, self._watch = sharded, watch
        self._activations: Activations | None = None
        self._promotion: Promotion | None = None
        self._boundary_override: bool | None = None
        self._counts_from = 0  # the micro-step from which accumulations are counted
        self._is_step_due = False  # a coalesced group of micro-steps has ended
        self._is_in_no_sync = False
        self._offloaded: Offloaded | None = None
        self._compiled: tuple[Compiled, ...] = ()
        self._num_backwards_seen = 0
        self._num_steps_taken = 0  # since the engine was made, whatever it resumed
        self._has_stepped = self._is_destroyed = False
        self._failure: str | None = None  # of a host or a drive, which ends the training
        for unit in runtime.units:
            unit.engine = weakref.ref(self)
        self._optimizer: ZeroOptimizer | None = None
        self._schedule_watch = ScheduleWatch()
        if sharded is not None:
            self._optimizer = ZeroOptimizer(sharded, self._step_now, self.zero_grad)
            # The gradients are here, so forgetting them is, too.
            sharded.inner.zero_grad = self.zero_grad
            runtime.before_step = while_alive(sharded.read_ahead)
        self._shown_optimizer: Any = self._optimizer
        self._allow_foreign_steps = weakref.finalize(self, refuse_foreign_steps().remove)
        self._allow_foreign_steps.atexit = False
        self._refresh()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UsageError(
            compose(
                "an engine cannot be copied or pickled: it is one process's part of a job.",
                hint="save engine.module_state_dict(), which every rank calls, or the whole "
                "training with engine.save_checkpoint(folder).",
            )
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
        try:
            return getattr(self.module, name)
        except AttributeError:
            raise AttributeError(
                f"neither the engine nor its module, a {type(self.module).__name__}, has an "
                f"attribute {name!r}",
                name=name,
                obj=self,
            ) from None

    # Forward and backward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model.

        Raises:
            UsageError: the engine is destroyed, and the call is one of training.
        """
        if self._is_destroyed and self.training and torch.is_grad_enabled():
            self.check_present("engine(...)")
        self._check_whole("engine(...)")
        if (dtype := self.settings.cast_inputs_to) is not None:
            args, kwargs = tree.replace((args, kwargs), lambda t: _cast(t, dtype))
        try:
            with self._casting():
                return self.module(*args, **kwargs)
        except Exception as error:
            # Recomputation ends in an exception of torch's own once it has what it needs.
            if not in_backward():
                self._note_shortage(error)
                self._recover(word=self._note_failure(error))
                if isinstance(error, RuntimeError) and not isinstance(error, Error):
                    self._check_untouched()  # which may be the cause
            raise

    def _casting(self) -> AbstractContextManager[object]:
        if self.settings.autocast is None:
            return nullcontext()
        # Autocast's own cache of cast weights would keep units full that were freed.
        stays = all(unit.lifetime.params_stay for unit in self.runtime.units)
        kind, dtype = self.device.type, self.settings.autocast
        return torch.autocast(kind, dtype, cache_enabled=stays)

    def backward(
        self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True
    ) -> Tensor:
        """Accumulate the gradients of ``loss``; ``loss.backward()`` does the same.

        The loss is a mean over the micro-batch. Gradients are averaged over ranks and over the
        micro-steps of an accumulation when the optimizer steps.

        Args:
            loss: a scalar that depends on the engine's output.
            retain_graph: keep the graph for another backward.
            scale_wrt_gas: false to add up micro-steps instead of averaging them.

        Returns:
            The loss divided by the number of micro-steps, without graph.

        Raises:
            UsageError: the loss is no scalar with a graph, or its graph is used up.
        """
        if self._sharded is None:
            raise UsageError(
                compose(
                    "engine.backward() needs an optimizer, and initialize() was given none.",
                    hint='pass optimizer=..., or add an "optimizer" block to the configuration.',
                )
            )
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise UsageError(
                compose(
                    f"engine.backward() takes a scalar loss, not {shape}.",
                    hint="reduce it first, for example with .mean().",
                )
            )
        if not loss.requires_grad:
            raise UsageError(
                compose(
                    "engine.backward() got a loss without a graph: no gradient can flow from it.",
                    hint="compute it from engine(...) outside of torch.no_grad(), with some "
                    "parameter of the model trainable.",
                )
            )
        self.check_present("engine.backward()")
        steps = self.gradient_accumulation_steps()
        weight = 1.0 if scale_wrt_gas else float(steps)
        try:
            with ScaledLoss.by(self.loss_scale):
                self.runtime.scaled = True
                root = loss.float() if self.loss_scale > 1 else loss
                seed = torch.full_like(root, weight * self.loss_scale)
                root.backward(seed, retain_graph=retain_graph)
        except Exception as error:
            explanation = explain_backward(error, self.runtime.units)
            self._note_shortage(error)
            self._give_up(in_backward=True, word=self._note_failure(error))
            if explanation is not None:
                raise UsageError(explanation) from error
            raise
        return loss.detach() / (steps if scale_wrt_gas else 1)

    def step(self, lr_kwargs: Mapping[str, Any] | None = None) -> None:
        """End a micro-step; at an accumulation boundary, step the optimizer and the schedule.

        Args:
            lr_kwargs: for the ``step`` of the schedule, such as the ``metrics`` that
                ReduceLROnPlateau wants.

        Raises:
            UsageError: no backward came before it, or it is inside ``no_sync``.
        """
        if isinstance(self.lr_scheduler, ReduceLROnPlateau) and "metrics" not in (lr_kwargs or {}):
            raise UsageError(
                compose(
                    "ReduceLROnPlateau decides by a figure that engine.step() was not given.",
                    hint='call engine.step(lr_kwargs={"metrics": loss}).',
                )
            )
        num_before = self.global_steps
        self._end_micro_step()
        if self.lr_scheduler is not None and self.was_step_applied():
            self._schedule_watch.check(self.lr_scheduler)
            self.lr_scheduler.step(**(lr_kwargs or {}))
            self._schedule_watch.note(self.lr_scheduler)
        if self.global_steps > num_before:
            self._report()

    def _step_now(self) -> None:
        """Step the optimizer, wherever the accumulation stands; the schedule is the caller's."""
        before, self._boundary_override = self._boundary_override, True
        try:
            self._end_micro_step()
        finally:
            self._boundary_override = before
        self._counts_from = self.micro_steps
        self._report()
        self._refresh()

    def _end_micro_step(self) -> None:
        if self._sharded is None:
            raise UsageError("engine.step() needs an optimizer, and initialize() was given none.")
        if self._is_in_no_sync:
            raise UsageError(
                compose(
                    "engine.step() was called inside no_sync(), where gradients are not reduced.",
                    hint="leave the no_sync() block before the last backward and step after it.",
                )
            )
        self.check_present("engine.step()")
        if self.runtime.num_backwards == self._num_backwards_seen:
            raise UsageError(
                compose(
                    f"engine.step() number {self.micro_steps + 1} came without a backward: there "
                    "is no gradient to step with.",
                    hint="call engine.backward(loss) (or loss.backward()) before every step().",
                )
            )
        self._check_scaled()
        if self._num_steps_taken == 0:
            check_members(self.module)
            advise(self.runtime.sites)
        self.runtime.check_replaced()
        self._check_untouched()
        self._num_backwards_seen = self.runtime.num_backwards
        self._has_stepped = False
        if self.is_gradient_accumulation_boundary():
            self._take_step(self._sharded)
        self.micro_steps += 1
        if self._is_step_due:
            self._is_step_due, self._counts_from = False, self.micro_steps
        self._refresh()

    def _check_untouched(self) -> None:
        for unit in self.runtime.units:
            unit.check_untouched()

    def _take_step(self, sharded: ShardedOptimizer) -> None:
        self.runtime.keep_edits()
        has_files = self._depots.has_files
        try:
            with agreed(self.mesh, "step") if has_files else nullcontext():
                self.runtime.flush(thorough=self._num_steps_taken < _WATCHED_STEPS)
        except OffloadError as error:
            self._note_failure(error)
            raise
        self._num_steps_taken += 1
        if self._watch is not None:
            self._watch.check()
        # Drives may fail in every step; what is taken later than at the start is in the first one
        # that is not skipped.
        may_fail = has_files or (
            not self._depots.is_empty and self._num_steps_taken == 1 + sharded.num_skipped
        )
        try:
            with agreed(self.mesh, "step") if may_fail else nullcontext():
                sharded.queue_step(divide_by=self.gradient_accumulation_steps())
            if self._promotion is not None:
                self._promotion.end_step()
        except torch.OutOfMemoryError as error:
            self._explain_memory(error)
            raise
        except OffloadError as error:
            self._note_failure(error)
            raise
        # Torch's schedules look for it on the optimizer they were made from.
        vars(self._optimizer)["_opt_called"] = True
        self._has_stepped = True
        self.global_steps += 1
        self.global_samples += self.train_batch_size()
        if self._activations is not None:
            self._activations.end_step()

    def _report(self) -> None:
        every = self.settings.steps_per_print
        if every and self.global_steps % every == 0 and self.global_rank == 0:
            _log.info(
                "step=%d, skipped=%d, lr=%s, loss_scale=%g",
                self.global_steps,
                self.skipped_steps,
                self.get_lr(),
                self.loss_scale,
            )

    def _check_scaled(self) -> None:
        if self.runtime.loss_scale is not None and not self.runtime.scaled:
            self.reset()
            raise UsageError(
                compose(
                    "fp16 gradients were computed without loss scaling: the loss did not pass "
                    "through the outputs of the engine, so small gradients were lost.",
                    hint="compute the loss from the result of engine(...), not of a submodule.",
                )
            )

    def _refresh(self) -> None:
        """Tell the runtime what the next backward is."""
        self.runtime.boundary = self.is_gradient_accumulation_boundary()
        if self._sharded is not None and (scaler := self._sharded.scaler) is not None:
            # A copy from the host would make it wait for the device.
            self.runtime.loss_scale = torch.full(
                (), scaler.scale, dtype=torch.float32, device=self.device
            )
            self.runtime.scaled = False

    def _note_shortage(self, error: Exception) -> None:
        """If the device ran out of memory, say what would make room, and make some if possible."""
        self._explain_memory(error)
        if self._activations is not None:
            self._activations.fail(error)

    def _explain_memory(self, error: Exception) -> None:
        explain_memory(
            error,
            self.batch,
            self.runtime.units,
            has_budget=self._activations is not None,
            came_back=self._promotion is not None and self._promotion.num_units > 0,
        )

    def _note_failure(self, error: Exception) -> str:
        """If a host or a drive has failed, train no more; what other ranks are told of it."""
        if not isinstance(error, OffloadError):
            return ""
        self._failure = self._failure or str(error)
        return str(error)

    def _recover(self, in_backward: bool = False, word: str = "") -> None:
        if self._activations is not None:
            self._activations.reset()
        try:
            self.runtime.reset(in_backward, word)
        except Exception:
            _log.exception("recovery failed; the ranks are out of step and the job should end")

    def reset(self) -> None:
        """Give up the optimizer step under way: drop its gradients and start its accumulation anew.

        For use after an exception in forward or backward that the training loop wants to survive.
        """
        self._give_up()

    def _give_up(self, in_backward: bool = False, word: str = "") -> None:
        self._recover(in_backward, word)
        self.zero_grad()
        self.micro_steps -= self._num_accumulated
        self._is_step_due = False
        self._num_backwards_seen = self.runtime.num_backwards
        self._refresh()

    # Accumulation

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the micro-step under way is the last of its accumulation."""
        if self._is_in_no_sync:
            return False
        if self._boundary_override is not None:
            return self._boundary_override
        if self._is_step_due:
            return True
        return self._num_accumulated + 1 == self.gradient_accumulation_steps()

    @property
    def _num_accumulated(self) -> int:
        return (self.micro_steps - self._counts_from) % self.gradient_accumulation_steps()

    def set_gradient_accumulation_boundary(self, is_boundary: bool | None) -> None:
        """Decide by hand whether micro-steps are boundaries; None returns to counting them."""
        self._boundary_override = is_boundary
        self._refresh()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Only accumulate inside: where full gradients stay, nothing is reduced."""
        if self._is_in_no_sync:
            raise UsageError("no_sync() is already active; it cannot be nested.")
        self._is_in_no_sync = True
        self._refresh()
        try:
            yield
        finally:
            self._is_in_no_sync = False
            self._refresh()

    @contextmanager
    def coalesce_grad_reduction(self) -> Iterator[None]:
        """Several backwards inside belong to one optimizer step: the ``step`` that follows.

        Inside no ``step`` is called, and where full gradients stay nothing is reduced.
        """
        with self.no_sync():
            yield
        self._is_step_due = True
        self._refresh()

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the number of micro-steps per optimizer step; loaders stay as they are.

        Raises:
            ConfigError: it is no multiple of samples per micro-step times ranks.
            UsageError: an accumulation is under way.
        """
        self._check_between_steps("set_train_batch_size()")
        self.batch = resolve(train_batch_size, self.batch.micro, None, self.world_size)
        self._counts_from = self.micro_steps
        self._refresh()

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Change the samples per micro-step, as for reports; loaders stay as they are.

        Raises:
            ConfigError: it is no positive number.
            UsageError: an accumulation is under way.
        """
        self._check_between_steps("set_train_micro_batch_size()")
        self.batch = resolve(None, micro_batch_size, self.batch.accumulation, self.world_size)

    def _check_between_steps(self, call: str) -> None:
        done = self._num_accumulated
        if done or self.runtime.num_backwards != self._num_backwards_seen:
            raise UsageError(
                compose(
                    f"{call} was called in the middle of an accumulation, after {done} of "
                    f"{self.gradient_accumulation_steps()} micro-steps.",
                    hint="call it right after an engine.step() that has stepped the optimizer.",
                )
            )

    def scale(self, loss: Tensor) -> Tensor:
        """The loss itself, for ``engine.scale(loss).backward()``.

        The loss scale enters where backward reaches the outputs of the model, so nothing is left to
        be done to the loss.
        """
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients accumulated since the last optimizer step."""
        if self._sharded is not None:
            self._sharded.clear_gradients()
            if self._watch is not None:
                self._watch.forget()
            self._num_backwards_seen = self.runtime.num_backwards

    def limit_activations(self, activations: Activations) -> None:
        """Let a budget decide which blocks keep their activations, until ``destroy``."""
        self._activations = activations
        activations.install()

    def bring_state_back(self, promotion: Promotion) -> None:
        """Let optimizer state come back to the device once steps have shown what is free there."""
        self._promotion = promotion

    @property
    def activation_plan(self) -> ActivationPlan | None:
        """How many blocks kept their activations in the last pass; None without a budget."""
        return None if self._activations is None else self._activations.plan

    def was_step_applied(self) -> bool:
        """Whether the last call of ``step`` changed the weights.

        Where gradients may overflow, the host waits until it knows.
        """
        return self._has_stepped and self._sharded is not None and not self._sharded.overflow

    @property
    def skipped_steps(self) -> int:
        """How many optimizer steps were skipped because gradients overflowed."""
        own = self._sharded.num_skipped if self._sharded is not None else 0
        return self._num_skipped_before + own

    @skipped_steps.setter
    def skipped_steps(self, count: int) -> None:
        self._num_skipped_before += count - self.skipped_steps

    def memory(self) -> MemoryReport:
        """Bytes of model state of this rank, on its device and off it."""
        units = self.runtime.units
        return MemoryReport(
            parameters_bytes=sum(unit.parameter_bytes for unit in units),
            gradients_bytes=self.runtime.gradient_bytes
            + max((unit.reducer.nbytes for unit in units), default=0),
            optimizer_bytes=self._sharded.state_bytes() if self._sharded else 0,
            host_bytes=self._depots.host_bytes,
            file_bytes=self._depots.file_bytes,
            pinned_bytes=self._depots.pinned_bytes,
        )

    # Weights in full

    def module_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Any]:
        """The model's state dict with full parameters in host memory; a collective.

        Returns:
            The dict on rank 0, an empty one on the others.
        """
        return self._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters) or {}

    def _zero3_consolidated_16bit_state_dict(
        self, exclude_frozen_parameters: bool = False
    ) -> dict[str, Any] | None:
        return weights_of(
            self.module,
            self.runtime.units,
            is_writer=self.global_rank == 0,
            with_frozen=not exclude_frozen_parameters,
        )

    _consolidated_16bit_state_dict = _zero3_consolidated_16bit_state_dict

    def load_module_state_dict(
        self,
        state_dict: Mapping[str, Any] | None,
        strict: bool = True,
        custom_load_fn: Callable[..., object] | None = None,
        fetch_z3_params: bool = False,
    ) -> None:
        """Load the state dict of rank 0 into the model of all ranks; a collective.

        Args:
            state_dict: as from ``module_state_dict``; what other ranks pass is ignored.
            strict: false to accept names that are missing or unknown.
            custom_load_fn: called with ``src=state_dict, dst=model`` in place of that.
            fetch_z3_params: accepted; parameters that are freed are always gathered.

        Raises:
            UsageError: on rank 0, the state dict does not fit; others raise DistributedError.
        """
        load_weights(self.module, state_dict, self.mesh, strict=strict, custom_load=custom_load_fn)

    def save_16bit_model(
        self,
        save_dir: str | Path,
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write the model's state dict to a file, in the dtype it computes in; a collective.

        Args:
            save_dir: a folder, made if need be.
            save_filename: a name; one that ends in ``.safetensors`` chooses that format.
            exclude_frozen_parameters: leave out what does not train.

        Returns:
            False if nothing was written, as gathering for that is not configured.
        """
        if not self.may_save_weights():
            _log.warning(
                "save_16bit_model() wrote nothing: parameters are freed after use, and to gather "
                'them is off. Set "stage3_gather_16bit_weights_on_model_save": true under '
                '"zero_optimization".'
            )
            return False
        state = self._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters)
        save_weights(state, Path(save_dir) / save_filename, self.mesh)
        return True

    save_fp16_model = save_16bit_model

    # State of training in files

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: Mapping[str, Any] = _NOTHING,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write everything that training goes on from; a collective.

        Args:
            save_dir: a folder for checkpoints, made if need be.
            tag: name of this one, a folder in it; ``global_step`` and the number by default.
            client_state: what ``load_checkpoint`` is to give back; that of rank 0.
            save_latest: whether it is the one to be loaded where no tag is given.
            exclude_frozen_parameters: leave out what does not train.

        Returns:
            True.

        Raises:
            UsageError: state is offloaded, or ranks were given different arguments.
            DistributedError: another rank could not write its part. An older checkpoint of the
                same name is still there then.
        """
        self.check_present("save_checkpoint()")
        self.runtime.schedule.meet()
        self.runtime.keep_edits()
        save(
            self._training,
            Path(save_dir),
            f"global_step{self.global_steps}" if tag is None else str(tag),
            Common(
                client=client_state or {},
                progress=self._progress,
                with_frozen=not exclude_frozen_parameters,
            ),
            save_latest=save_latest,
        )
        return True

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., object] | None = None,
    ) -> tuple[str | None, dict[str, Any]]:
        """Go on from a checkpoint of any stage and number of ranks; a collective.

        Nothing is changed if it does not fit.

        Args:
            load_dir: the folder that ``save_checkpoint`` was given.
            tag: name of the checkpoint; the one saved last by default.
            load_module_strict: false to accept names that are missing or unknown.
            load_optimizer_states: false to leave the optimizer, the loss scale and the generators
                of random numbers as they are.
            load_lr_scheduler_states: false to leave the schedule as it is.
            load_module_only: load the weights and buffers and nothing else.
            custom_load_fn: called with ``src=state_dict, dst=model`` in place of loading the
                weights; see ``load_module_state_dict``.

        Returns:
            The checkpoint's folder and the client state; None and an empty dict if no tag is given
            and the folder names none.

        Raises:
            CheckpointError: there is no such checkpoint, or it is damaged, or of another model.
            UsageError: state is offloaded, or ranks were given different arguments.
            DistributedError: another rank could not load it.
        """
        self.check_present("load_checkpoint()")
        self.runtime.schedule.meet()
        self.runtime.keep_edits()
        wanted = Wanted(
            strict=load_module_strict,
            optimizer=load_optimizer_states,
            schedule=load_lr_scheduler_states,
            only_model=load_module_only,
            weights=custom_load_fn is None,
        )
        loaded = load(self._training, Path(load_dir), None if tag is None else str(tag), wanted)
        if loaded is None:
            return None, {}
        self.loaded_checkpoint_dp_world_size = loaded.world
        if custom_load_fn is not None:
            with Reader(loaded.folder) as reader:
                weights = Weights(weights_in(reader, half=None))
                self.load_module_state_dict(weights, custom_load_fn=custom_load_fn)
        if loaded.progress is not None:
            self._resume(loaded.progress)
        return str(loaded.folder), loaded.client

    @property
    def _training(self) -> Training:
        return Training(
            model=self.module,
            units=self.runtime.units,
            mesh=self.mesh,
            sharded=self._sharded,
            watch=self._watch,
            schedule=self.lr_scheduler,
            accumulation=self.gradient_accumulation_steps(),
            writer=self.writer(),
        )

    @property
    def _progress(self) -> Progress:
        return Progress(
            micro_steps=self.micro_steps,
            global_steps=self.global_steps,
            global_samples=self.global_samples,
            skipped_steps=self.skipped_steps,
            accumulated=self._num_accumulated,
            accumulation=self.gradient_accumulation_steps(),
            is_step_due=self._is_step_due,
            has_run_backward=self.runtime.num_backwards != self._num_backwards_seen,
        )

    def _resume(self, progress: Progress) -> None:
        self.micro_steps, self.global_steps = progress.micro_steps, progress.global_steps
        self.global_samples, self.skipped_steps = progress.global_samples, progress.skipped_steps
        self._counts_from = progress.micro_steps - progress.accumulated
        self._is_step_due = progress.is_step_due
        self._num_backwards_seen = self.runtime.num_backwards - progress.has_run_backward
        if any(unit.has_gradient for unit in self.runtime.units):
            self.runtime.owe_reduction()
        self._refresh()

    # State that makes room for a while

    def offload_states(
        self,
        include: Iterable[object] | None = None,
        device: str | torch.device = "cpu",
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        """Move model state to host memory, until ``reload_states``; between two passes.

        Optimizer state and master weights that the configuration keeps off the device stay there.

        Args:
            include: kinds of state, members of ``zero.OffloadStateTypeEnum`` or their names; all by
                default. State that shares memory goes together.
            device: "cpu".
            pin_memory: use pinned host memory for state of GPUs.
            non_blocking: do not make the host wait for the copies.

        Raises:
            UsageError: the device is another one, a kind is unknown, a pass is under way, or state
                is offloaded already.
        """
        kinds = states_named(include)
        name = str(getattr(device, "value", device))
        if name != "cpu":
            raise UsageError(
                compose(
                    f"offload_states() cannot move state to {name!r}.",
                    hint='pass device="cpu"; host memory is the only place.',
                )
            )
        self.check_present("offload_states()")
        units, optimizer = self.runtime.units, self.basic_optimizer
        if self._sharded is not None and OffloadStateTypeEnum.optim_states in kinds:
            self._sharded.let_go_of_state()
        self._offloaded = offload(
            units, optimizer, kinds, pin=pin_memory, non_blocking=non_blocking
        )

    def reload_states(self, non_blocking: bool = False) -> None:
        """Bring back what ``offload_states`` moved; nothing if nothing is offloaded.

        A collective where ranks read each other's memory.
        """
        if (offloaded := self._bring_back(non_blocking)) is not None:
            offloaded.share()

    def _bring_back(self, non_blocking: bool = False) -> Offloaded | None:
        offloaded, self._offloaded = self._offloaded, None
        if offloaded is not None:
            offloaded.reload(non_blocking)
        return offloaded

    def check_present(self, call: str) -> None:
        """Refuse a call that needs state which is offloaded, or given back.

        Raises:
            UsageError: some is.
        """
        if self._is_destroyed:
            raise UsageError(
                compose(
                    f"{call} was called after engine.destroy(), or after the model was given to "
                    "another engine.",
                    hint="use the engine that the last zeroshard.initialize() returned. Hugging "
                    "Face's Trainer is used up by train(): make a new one.",
                )
            )
        self._check_whole(call)
        if self._offloaded is not None:
            raise UsageError(
                compose(
                    f"{call} was called while state is offloaded to host memory.",
                    hint="call engine.reload_states() first.",
                )
            )

    def _check_whole(self, call: str) -> None:
        if self._failure is not None:
            fact = self._failure.partition("\n\nhint: ")[0]
            raise OffloadError(
                compose(
                    f"{call} was called after an error that ended this engine's training, as parts "
                    f"of its state are lost or of another step: {fact}",
                    hint="destroy() it, make another engine, and load the last checkpoint.",
                )
            )

    # Other calls of scripts

    def compile(
        self,
        backend: str | Callable[..., Any] = "inductor",
        compile_kwargs: Mapping[str, Any] | None = None,
        schedule: object = None,
        compiled_autograd_enabled: bool = False,
    ) -> None:
        """Compile the model's blocks, those of one class as one graph, until ``destroy``.

        The loss of a model of transformers is compiled with them.

        Args:
            backend: of ``torch.compile``.
            compile_kwargs: further arguments of ``torch.compile``.
            schedule: not supported; must be None.
            compiled_autograd_enabled: not supported; must be false.

        Raises:
            UsageError: ``torch.compile`` has no such backend or argument.
        """
        if schedule is not None or compiled_autograd_enabled:
            raise UsageError(
                compose(
                    "engine.compile() has no passes to schedule, and no graph of a whole backward: "
                    "blocks are compiled, and communication stays outside of their graphs.",
                    hint="leave schedule and compiled_autograd_enabled out.",
                )
            )
        self.check_present("engine.compile()")
        sites, options = self.runtime.sites, compile_kwargs or {}
        frees = any(site.frees for site in sites)
        if (problem := objection(backend, options, frees=frees)) is not None:
            raise UsageError(problem)
        with nullcontext() if self._activations is None else self._activations.lifted():
            self._uncompile()
            self._compiled = compile_blocks(self.module, sites, backend, options)

    @property
    def is_compiled(self) -> bool:
        """Whether blocks are compiled."""
        return bool(self._compiled)

    def _uncompile(self) -> None:
        for compiled in self._compiled:
            compiled.remove()
        self._compiled = ()

    def deepspeed_io(
        self,
        dataset: object,
        batch_size: int | None = None,
        route: str | None = None,
        pin_memory: bool | None = None,
        data_sampler: Sampler[Any] | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_local_io_workers: int | None = None,
    ) -> ShardedLoader:
        """A loader like the one that ``initialize(training_data=...)`` returns.

        Args:
            dataset: a torch dataset.
            batch_size: samples per batch; those of a micro-step by default.
            route: "eval" and "predict" take all samples on every rank, in their order.
            pin_memory: whether batches are in pinned memory; by default if the device is a GPU.
            data_sampler: says which samples this rank sees.
            collate_fn: makes a batch of samples.
            num_local_io_workers: worker processes.

        Raises:
            UsageError: ``dataset`` is not a torch dataset.
        """
        sized: Any = dataset
        if data_sampler is None and route in {"eval", "predict"}:
            data_sampler = SequentialSampler(sized)
        return make_loader(
            dataset,
            batch_size=batch_size or self.batch.micro,
            rank=self.global_rank,
            world=self.world_size,
            collate_fn=collate_fn,
            drop_last=self.configuration.dataloader_drop_last,
            pin_memory=self.device.type == "cuda" if pin_memory is None else pin_memory,
            sampler=data_sampler,
            num_workers=num_local_io_workers or 0,
        )

    def set_dataloader(self, loader: Any) -> None:
        """Make another loader the one in ``training_dataloader``."""
        self.training_dataloader = loader

    def allreduce_gradients(self, bucket_size: int | None = None) -> None:
        """Accepted: gradients are averaged while backward runs."""

    def empty_partition_cache(self) -> None:
        """Accepted: between two passes no parameters are kept gathered that could be freed."""

    def destroy(self) -> None:
        """Remove the hooks, give gradients and process groups back; the engine is used up.

        The model can be given to ``initialize`` again, and the optimizer with it, without its
        state. Weights stay as they were computed with: digits that only the master weights had are
        gone. Parameters that are freed after use stay in shards.

        Raises:
            OffloadError: the last step failed on its way, and no call has said so before. The
                engine is used up all the same.
        """
        if self._is_destroyed:
            return
        failure: OffloadError | None = None
        for unit in self.runtime.units:
            try:
                unit.end_step()
            except OffloadError as error:  # of each unit that was still to be stepped
                failure = failure or error
        self._bring_back()
        self.zero_grad()
        if self._activations is not None:
            self._activations.remove()
        self._uncompile()
        self.runtime.let_go()
        self._allow_foreign_steps()
        if self._watch is not None:
            self._watch.detach()
        if self._sharded is not None:
            self._sharded.release()
            vars(self._sharded.inner).pop("zero_grad", None)
        self._depots.close()
        self.mesh.destroy()
        self._is_destroyed = True
        if failure is not None and self._failure is None:
            raise failure


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
