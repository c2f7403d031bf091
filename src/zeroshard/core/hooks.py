"""When units are gathered, freed and reduced: hooks on modules and tensors, and nothing else.

[Note: brackets]
A *site* is a module that uses units. Each call of it in forward opens a bracket that closes after
forward; each such use has a bracket in backward too:

* it opens when the gradient of one of the call's outputs arrives;
* it closes when the gradient of one of its inputs arrives. Autograd runs ready nodes in the reverse
  order of their creation, and every node of the call was created after those of its inputs, so by
  then all nodes of the call have run.

Outputs are the tensors that a call returns or leaves in a container it was given.

While a bracket is open its units are full. A call whose inputs take no gradient closes at the end
of backward. A unit's gradient is complete when the last of its uses has closed; what arrives later
(a module used in two graphs, say) is reduced at the end of backward, so completeness is only a
matter of memory and overlap, never of right numbers.

Checkpointing runs forward again inside backward. That is a forward like any other, with brackets of
its own. Reentrant: the original call ran without gradients and left no hooks, so the hooks of the
recomputed graph are those that fire. Non-reentrant: gradients take the original graph, and the
recomputed one is dropped with its hooks.

A backward that is to be differentiated itself (a gradient penalty) is a graph as well. Backward
through it enters at what was the gradient of a call's input, so there the bracket opens again.

Hooks are invisible to torch.compile, which compiles what lies between them.
"""

# Autograd's callback and graph task have no public name.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from zeroshard.core import tree
from zeroshard.core.access import guard_state_dict
from zeroshard.core.building import hand_back
from zeroshard.core.edges import apart, on_gradient
from zeroshard.core.external import declared, unwatch, watch
from zeroshard.core.hook import Hook
from zeroshard.core.mesh import default_mesh
from zeroshard.core.scaling import ScaledLoss, rescale
from zeroshard.core.schedule import Schedule
from zeroshard.core.slots import slot_of
from zeroshard.core.transport import rewriting
from zeroshard.core.unit import Unit
from zeroshard.core.waiting import Waiting
from zeroshard.errors import OffloadError, UsageError, compose

__all__ = ["Runtime", "Site", "in_backward"]


def in_backward() -> bool:
    """Whether this thread is inside a backward, as a forward that recomputes activations is."""
    return torch._C._current_graph_task_id() != -1


class Site:
    """A module at whose boundary units are gathered and freed."""

    def __init__(self, name: str, module: nn.Module, units: Sequence[Unit]) -> None:
        self.name, self.module, self.units = name, module, tuple(units)
        self.own_units = self.units  # others are added to them
        self.calls: list[_Use] = []  # calls in forward now, innermost last

    @property
    def reads_in_backward(self) -> bool:
        """Whether backward needs more than shapes: the gradient of an embedding is indices alone.

        Asked each time, because a hook of the user's may read the weight, and may come late.
        """
        module = self.module
        is_bare = (
            type(module) is nn.Embedding
            and set(module._parameters) == {"weight"}
            and len(module._forward_pre_hooks) == len(module._forward_hooks) == 1  # our own
            and self.units == self.own_units
        )
        return not is_bare

    @property
    def frees(self) -> bool:
        """Whether some of its units are freed after use."""
        return not all(unit.lifetime.params_stay for unit in self.units)


class _Use:
    """One call of a site, from its forward to the end of its backward. See [Note: brackets]."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.opened_in = -1  # the backward in which the bracket was opened last
        self.closed = False
        self.arguments: Any = ()
        # The tensors in them, with their nodes at that time: an operation in place adds one.
        self.inputs: list[tuple[Tensor, object]] = []


class _Counts:
    """How often a unit is in use now, and how many uses of this pass have not ended in backward."""

    def __init__(self) -> None:
        self.open = 0
        self.uses = 0


class Runtime:
    """Drives the units of one model; owns no tensor.

    ``boundary`` says whether the next backward ends an accumulation. ``loss_scale``, a tensor or
    None, multiplies every gradient that enters the model through the outputs of ``root``.
    """

    def __init__(
        self, root: nn.Module, sites: Sequence[Site], units: Sequence[Unit], schedule: Schedule
    ) -> None:
        self.root, self.sites, self.units, self.schedule = (
            root,
            tuple(sites),
            tuple(units),
            schedule,
        )
        self.trained = tuple(unit for unit in units if unit.is_trained)
        self.boundary = True
        self.loss_scale: Tensor | None = None
        self.num_backwards = 0
        self.gradient_bytes = 0  # held on this rank at the end of the last backward
        self.scaled = False
        # Called in a backward that ends an accumulation, when the gradients of a unit are there.
        self.before_step: Callable[[], object] | None = None
        self._unreduced = False
        self._stray = [
            member.param
            for unit in units
            if not unit.is_trained
            for member in unit.members
            if member.param.requires_grad
        ]
        self._counts = {unit: _Counts() for unit in units}
        self._training = False
        self._finish_queued = self._is_listening = self._is_quiet = False
        self._active: list[Site] = []  # sites whose forward is running, innermost last
        self._edited: set[Unit] = set()
        self._held: set[Unit] = set()  # full until the end of backward
        self._handles: list[RemovableHandle] = []
        # Layers that are units of their own; a block's parameters are the block's own business.
        self._watched = [
            site.module
            for site in sites
            if site.module is not root
            and not any(True for _ in site.module.children())
            and site.frees
        ]
        self._trained = [
            (module, name, param)
            for module in root.modules()
            for name, param in module.named_parameters(recurse=False)
            if (slot := slot_of(param)) is not None and slot.unit.is_trained
        ]

    def check_replaced(self) -> None:
        """Refuse to go on with a module that was given a parameter which nobody trains.

        Raises:
            UsageError: one was, in place of a trained one.
        """
        for module, name, param in self._trained:
            new = module._parameters.get(name)
            if new is param or new is None or slot_of(new) is not None:
                continue
            slot = slot_of(param)
            was = name if slot is None else slot.unit.members[slot.index].name
            raise UsageError(
                compose(
                    f"{was} was replaced after initialize(), and the new parameter, of shape "
                    f"{tuple(new.shape)}, is not trained.",
                    hint="change the model (resize its embeddings, say) before initialize(), or "
                    "call engine.destroy() first and initialize() again.",
                )
            )

    def attach(self) -> None:
        """Register the hooks."""
        for site in self.sites:
            self._attach_site(site)
        watch(self._watched, self._on_read)
        self._handles += guard_state_dict(self.root, self._edited.add)
        for unit in self.units:
            unit.note_users()
            unit.add_use = partial(self.add_use, unit=unit)
            unit.drop_use = partial(self._drop_use, unit=unit)
            unit.use_here = partial(self._use_here, unit)
            unit.let_go = self.let_go
        for module, param in declared(self.root):
            slot = slot_of(param)
            if slot is not None and slot.unit.add_use is not None:
                slot.unit.add_use(module)

    def _attach_site(self, site: Site) -> None:
        @apart
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            # A shallow copy of the module shares its hooks.
            is_ours = module is site.module and not self._is_quiet
            return self._before_forward(site, args, kwargs) if is_ours else None

        @apart
        def after(module: nn.Module, args: Any, output: Any) -> Any:
            is_ours = module is site.module and not self._is_quiet
            return self._after_forward(site, output) if is_ours else None

        module = site.module
        self._handles += [
            module.register_forward_pre_hook(Hook(before), prepend=True, with_kwargs=True),
            module.register_forward_hook(Hook(after), always_call=True),
        ]

    def detach(self) -> None:
        """Remove the hooks; the model keeps whatever parameters are full now."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        unwatch(self._watched)

    def let_go(self) -> None:
        """Remove the hooks and end the hold of all units; see `hand_back`."""
        self.detach()
        device = self.units[0].mesh.device if self.units else torch.device("cpu")
        keeper = Waiting(default_mesh(device)) if dist.is_initialized() else None
        for unit in self.units:
            hand_back(unit, keeper)

    @property
    def is_attached(self) -> bool:
        """Whether all hooks are there: some libraries clear those of a model they pass on."""
        return all(handle.id in (handle.hooks_dict_ref() or ()) for handle in self._handles)

    def mute(self) -> None:
        """Do nothing in forward from now on; for units that are held, and without gradients."""
        self._is_quiet = True

    def unmute(self) -> None:
        """Take back ``mute``."""
        self._is_quiet = False

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Do nothing in forward; for units that are held. Gradients are off."""
        was_quiet = self._is_quiet
        self.mute()
        try:
            with torch.no_grad():
                yield
        finally:
            self._is_quiet = was_quiet

    def add_use(self, module: nn.Module, unit: Unit) -> Site:
        """Gather a unit whenever ``module`` runs, too."""
        for site in self.sites:
            if site.module is module:
                if unit not in site.units:
                    site.units = (*site.units, unit)
                return site
        site = Site(type(module).__name__, module, ())
        site.units = (unit,)
        self.sites = (*self.sites, site)
        self._attach_site(site)
        return site

    def _drop_use(self, module: nn.Module, unit: Unit) -> None:
        """Take back ``add_use``."""
        for site in self.sites:
            if site.module is module and unit not in site.own_units:
                site.units = tuple(used for used in site.units if used is not unit)

    def _on_read(self, param: nn.Parameter) -> None:
        """A parameter was looked up; if it is freed, the module that runs uses it from now on."""
        if not self._active or in_backward():
            return
        slot = slot_of(param)
        site = self._active[-1]
        if slot is not None and not self._counts[slot.unit].open:
            self._use_in(site, slot.unit)

    # Forward

    def _before_forward(
        self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        recomputes = in_backward()
        if not recomputes:
            if site.module is self.root and self._active:
                self._forget_calls()  # an earlier forward was left by an exception
            if not self._active:
                self._begin_forward()
                # Reentrant checkpointing turns gradients off inside; the outermost module knows.
                self._training = torch.is_grad_enabled()
                self.schedule.begin(self._kind())
        use = _Use(site)
        site.calls.append(use)
        self._active.append(site)
        for unit in site.units:
            self._counts[unit].open += 1
            # A recomputation belongs to a use that was counted in forward.
            self._counts[unit].uses += self._training and not recomputes
            self.schedule.need(unit)
        if torch.is_grad_enabled():
            if site.module is self.root and self.loss_scale is not None:
                args, kwargs = tree.replace((args, kwargs), lambda t: rescale(t, self._leaving))
            args, kwargs = self._watch_inputs(use, args, kwargs)
            use.arguments = (args, kwargs)
        return args, kwargs

    def _begin_forward(self) -> None:
        for unit in self.units:
            unit.check_present()
        if self._finish_queued:
            raise UsageError(
                compose(
                    "the last backward ended in an exception, and its gradients are incomplete.",
                    hint="call engine.reset() on every rank, then go on with the next batch.",
                )
            )
        self.keep_edits()

    def keep_edits(self) -> None:
        """Take over weights that were loaded into full parameters since the last pass."""
        if not self._edited:
            return
        edited = [unit for unit in self._edited if unit.is_full]
        self._edited.clear()
        with torch.no_grad(), rewriting(unit.transport for unit in edited):
            for unit in edited:
                unit.adopt(lambda full: full)

    def _kind(self) -> str:
        if not self._training:
            return "forward"
        return "boundary" if self.boundary else "accumulation"

    def _watch_inputs(
        self, use: _Use, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Close the use's bracket when the gradient of one of the inputs arrives."""

        def arrived(grad: Tensor | None) -> None:
            self._close(use)
            if grad is not None and grad.grad_fn is not None:
                # The backward of this call is a graph, too, whose backward enters it here and
                # goes on into the call.
                on_gradient(grad, begin=lambda _: self._open(use))

        aliases: dict[int, Tensor] = {}
        for tensor in tree.find((args, kwargs)).tensors:
            if not tensor.requires_grad or tensor.layout != torch.strided:
                continue
            use.inputs.append((tensor, tensor.grad_fn))
            if tensor.grad_fn is not None:
                on_gradient(tensor, end=arrived)
            elif not isinstance(tensor, nn.Parameter) and id(tensor) not in aliases:
                # A leaf has no node, and its gradient arrives before other nodes of the call run.
                alias = aliases[id(tensor)] = tensor.view_as(tensor)
                use.inputs.append((alias, alias.grad_fn))
                on_gradient(alias, end=arrived)
        if aliases:  # in place of the arguments themselves; inside containers nothing is exchanged
            args = tuple(aliases.get(id(value), value) for value in args)
            kwargs = {name: aliases.get(id(value), value) for name, value in kwargs.items()}
        return args, kwargs

    def _after_forward(self, site: Site, output: Any) -> Any:
        if not site.calls:
            return output
        use = site.calls.pop()
        self._active.pop()
        recomputes = in_backward()
        outermost = not self._active and not recomputes
        if site.frees:
            output = self._lend(site, output)
        # A recomputation that is cut short has all that backward, which goes on here, wants of it.
        keep = recomputes and output is None
        if torch.is_grad_enabled():
            made = self._made(use, output)
            for tensor in made.tensors:
                on_gradient(tensor, begin=lambda _: self._open(use))
                # The outermost module is the first that backward needs.
                keep = keep or outermost
            if made.opaque and not made.tensors:
                # Backward may enter through what cannot be looked into, and open no bracket.
                self._held.update(site.units)
                if outermost:
                    self._listen_to_parameters()
        use.inputs, use.arguments = [], ()
        for unit in site.units:
            self._counts[unit].open -= 1
        if not keep:
            self._free_unused(site)
        if outermost:
            self.schedule.end_forward(self._kind())
        if site.module is self.root and self.loss_scale is not None and torch.is_grad_enabled():
            return tree.replace(output, lambda tensor: rescale(tensor, self._entering))
        return output

    def _made(self, use: _Use, output: Any) -> tree.Found:
        """The tensors that a call made, in what it returned and in containers that it was given."""
        found = tree.find((output, use.arguments))
        made = [
            tensor
            for tensor in found.tensors
            if tensor.grad_fn is not None
            and not any(tensor is given and tensor.grad_fn is node for given, node in use.inputs)
        ]
        return tree.Found(made, found.opaque)

    def _lend(self, site: Site, output: Any) -> Any:
        """Keep units full while the caller runs, too, if their own memory is among the outputs."""
        owners = {
            unit.address: unit
            for unit in site.units
            if not unit.lifetime.params_stay and unit.nbytes_full
        }

        def owner(tensor: Tensor) -> Unit | None:
            return owners.get(tensor.untyped_storage().data_ptr())

        lent = {unit for tensor in tree.find(output).tensors if (unit := owner(tensor))}
        if not lent:
            return output
        if not self._active:
            return tree.replace(output, lambda tensor: tensor.clone() if owner(tensor) else tensor)
        for unit in lent:
            self._use_in(self._active[-1], unit)
        return output

    def _use_in(self, site: Site, unit: Unit) -> None:
        """The call of a site that runs now uses a unit that it has not used so far."""
        if unit in site.units:
            return
        self.add_use(site.module, unit)
        self._counts[unit].open += 1
        self._counts[unit].uses += self._training and not in_backward()
        self.schedule.need(unit)

    def _use_here(self, unit: Unit) -> bool:
        """If a forward is running, let its innermost call use the unit, in backward too."""
        if not self._active:
            return False
        if not self._counts[unit].open:
            self._use_in(self._active[-1], unit)
        return True

    def _entering(self) -> Tensor:
        assert self.loss_scale is not None, "a scaled output outlived its loss scaler"
        self.scaled = True
        return self.loss_scale / ScaledLoss.factor

    def _leaving(self) -> Tensor:
        assert self.loss_scale is not None, "a scaled input outlived its loss scaler"
        return ScaledLoss.factor / self.loss_scale

    def _free_unused(self, site: Site) -> None:
        for unit in site.units:
            in_use = self._counts[unit].open > 0 or unit in self._held
            if not in_use and not self.schedule.keeps(unit):
                unit.free()

    # Backward

    def _queue_finish(self) -> None:
        if not self._finish_queued:
            self._finish_queued = True
            Variable._execution_engine.queue_callback(self._finish)

    def _listen_to_parameters(self) -> None:
        """Notice a backward that enters through outputs that cannot be looked into."""
        if not self._is_listening:
            self._is_listening = True
            hook = apart(lambda _: self._queue_finish())
            self._handles += [
                member.param.register_post_accumulate_grad_hook(hook)
                for unit in self.trained
                for member in unit.members
            ]

    def _open(self, use: _Use) -> None:
        self._queue_finish()
        backward = torch._C._current_graph_task_id()
        if use.opened_in == backward:
            return
        # A graph that is kept runs backward again.
        use.opened_in, use.closed = backward, False
        for unit in use.site.units:
            self._counts[unit].open += 1
            if use.site.reads_in_backward:
                self.schedule.need(unit)
            elif not self.schedule.take(unit):
                unit.outline()

    def _close(self, use: _Use) -> None:
        if use.closed or use.opened_in < 0:
            return
        use.closed = True
        for unit in use.site.units:
            counts = self._counts[unit]
            counts.open -= 1
            counts.uses -= 1
        self._free_unused(use.site)
        for unit in use.site.units:
            counts = self._counts[unit]
            reduces = self._reduces(unit)
            if counts.uses <= 0 and unit.is_trained and unit.collect(behind=reduces) and reduces:
                self.schedule.ready(unit)
                if self.boundary and self.before_step is not None:
                    self.before_step()

    def _reduces(self, unit: Unit) -> bool:
        return self.boundary or not unit.lifetime.grads_stay

    @torch.no_grad()
    def _finish(self) -> None:
        """End of backward: nothing is open, every gradient is collected and, if due, reduced."""
        self._finish_queued = False
        if self._active:
            return  # inside forward; the backward that follows forward ends the pass
        for unit in self.units:
            if unit.is_trained:
                unit.collect(behind=self._reduces(unit))
            unit.free()
        for param in self._stray:
            param.grad = None
        self._forget_calls()
        reducible = [unit for unit in self.trained if self._reduces(unit)]
        self._unreduced = len(reducible) < len(self.trained)
        if reducible or any(not unit.lifetime.params_stay for unit in self.units):
            self.schedule.finish(reducible)
        self.gradient_bytes = sum(unit.gradient_bytes for unit in self.trained)
        self.num_backwards += 1

    def flush(self, thorough: bool = False) -> None:
        """Before a step: reduce what backwards outside a boundary left. A collective.

        Ranks may have run different numbers of backwards. Parameters that all ranks have edited
        are taken over.

        Args:
            thorough: look for edits that autograd does not count, too.

        Raises:
            OffloadError: at the end, on this rank: master weights could not be read or edited.
        """
        stay = [unit for unit in self.trained if unit.lifetime.params_stay and not unit.is_held]
        edited = [unit for unit in stay if unit.edited]
        overlooked: list[Unit] = []
        failure: OffloadError | None = None
        try:
            overlooked += [
                unit
                for unit in (stay if thorough else ())
                if unit not in edited and unit.differs_from_master()
            ]
        except OffloadError as error:  # the other ranks are on their way to the step
            failure = error
        self.schedule.meet(edited, overlooked)
        with torch.no_grad():
            for unit in edited:
                try:
                    unit.adopt(lambda full: full)
                except OffloadError as error:
                    failure = error
        if self._unreduced:
            self._unreduced = False
            self.schedule.finish(self.trained)
        if failure is not None:
            raise failure

    def owe_reduction(self) -> None:
        """Take note that gradients of earlier backwards are there that were not reduced."""
        self._unreduced = True

    def _forget_calls(self) -> None:
        for counts in self._counts.values():
            counts.open = counts.uses = 0
        for site in self.sites:
            site.calls.clear()
        self._active.clear()
        self._held.clear()

    def reset(self, in_backward: bool = False, word: str = "") -> None:
        """Return to the state between two passes after an exception in forward or backward.

        Args:
            in_backward: the exception ended a backward, also if that had not come to the model yet.
            word: what is lost for good, of which all ranks learn; they all leave the pass then.
        """
        was_in_backward, self._finish_queued = in_backward or self._finish_queued, False
        self._forget_calls()
        self.schedule.reset(was_in_backward or bool(word), word)
        for unit in self.units:
            unit.free()
            for member in unit.members:
                member.param.grad = None
