"""What runs on under the computation, and that nobody sees it before it has ended."""

from __future__ import annotations

import ast
import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import zeroshard
from forked import run_ranks
from reference import Setting, batch_of, make_engine, reference_run, relative_difference, train
from zeroshard.core import collectives, reducer, transport
from zeroshard.core.collectives import Ticket
from zeroshard.core.mesh import Aside, Axis
from zoo import ZOO

PLAIN = ZOO["plain"]


class Late:
    """A gather that brings nothing until it is waited for; new values are NaN until then."""

    def __init__(self, full: Tensor, shard: Tensor, axis: Axis) -> None:
        self.full, self.values = full, torch.empty_like(full)
        collectives.all_gather(self.values, shard, axis).wait()
        # A unit in use is gathered again where another rank needs it, and stays what it is.
        if not torch.equal(full, self.values):
            full.fill_(torch.nan)

    def wait(self) -> None:
        self.full.copy_(self.values)


@contextmanager
def late_gathers() -> Iterator[None]:
    def start(full: Tensor, shard: Tensor, axis: Axis) -> Ticket:
        return Late(full, shard, axis)

    with mock.patch.object(transport, "all_gather", start):
        yield


def saved(model: nn.Module) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return torch.load(file)


def within_gathered(model: nn.Module) -> dict[str, Tensor]:
    with zeroshard.gathered(model):
        return {name: param.detach().clone() for name, param in model.named_parameters()}


def printed(param: nn.Parameter) -> Tensor:
    with torch._tensor_str.printoptions(precision=12, threshold=1000, sci_mode=True):
        text = repr(param)
    text = text[text.index("[") : text.rindex("]") + 1]
    return torch.tensor(ast.literal_eval(text))


READS: dict[str, Callable[[nn.Module], dict[str, Tensor]]] = {
    "state dict": lambda model: dict(model.state_dict()),
    "torch.save": saved,
    "safetensors": lambda model: safetensors.torch.load(
        safetensors.torch.save(dict(model.state_dict()))
    ),
    "data": lambda model: {name: param.data for name, param in model.named_parameters()},
    "deep copy": lambda model: dict(copy.deepcopy(model).named_parameters()),
    "deep copy of each": lambda model: {
        name: copy.deepcopy(param) for name, param in model.named_parameters()
    },
    "pickle": lambda model: {
        name: pickle.loads(pickle.dumps(param)) for name, param in model.named_parameters()
    },
    "arithmetic": lambda model: {name: 1 * param for name, param in model.named_parameters()},
    "list operation": lambda model: dict(
        zip(
            dict(model.named_parameters()),
            torch._foreach_mul(list(model.parameters()), 1.0),
            strict=True,
        )
    ),
    "in an argument by name": lambda model: {
        name: torch.stack(tensors=[param])[0] for name, param in model.named_parameters()
    },
    "NumPy": lambda model: {
        name: torch.from_numpy(param.detach().numpy().copy())
        for name, param in model.named_parameters()
    },
    "gathered": within_gathered,
    "print": lambda model: {
        name: printed(param) for name, param in model.named_parameters() if param.numel() < 1000
    },
}


@pytest.mark.parametrize("stage", [1, 2])
def test_whoever_reads_a_stepped_parameter_waits_for_its_values(stage: int) -> None:
    setting = Setting(stage, steps=len(READS))

    def work(rank: int, world: int) -> dict[str, float]:
        wants = [
            reference_run(PLAIN, Setting(stage, steps=count)).weights
            for count in range(1, 1 + setting.steps)
        ]
        worst: dict[str, float] = {}
        with late_gathers():
            engine = make_engine(PLAIN, setting)
            for step, (how, read) in enumerate(READS.items()):
                train(engine, PLAIN, setting, rank, steps=[step])
                got = read(engine.module)
                worst[how] = max(
                    relative_difference(got[name].detach(), want)
                    for name, want in wants[step].items()
                    if name in got
                )
                assert got
            engine.destroy()
        return worst

    for worst in run_ranks(work, world=2):
        assert {how: off for how, off in worst.items() if not off <= 1e-6} == {}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.filterwarnings("ignore:To copy construct")
def test_no_reader_finds_old_values_that_torch_does_not_tell_the_class_of(stage: int) -> None:
    def work(rank: int, world: int) -> list[bool]:
        setting = Setting(stage, steps=2)
        want = reference_run(PLAIN, setting).weights
        with late_gathers():
            engine = make_engine(PLAIN, setting)
            train(engine, PLAIN, setting, rank)
            weights = dict(engine.module.named_parameters())
            copied = torch.tensor(weights["head.weight"])
            strides = [param.stride() for param in weights.values()]
            dense = [param.is_contiguous() for param in weights.values()]
            is_right = relative_difference(weights["head.weight"].detach(), want["head.weight"])
        return [
            copied.shape == want["head.weight"].shape,
            bool(copied.isnan().all()),
            strides == [param.stride() for param in weights.values()],
            all(dense),
            is_right <= 1e-6,
            "_zeroshard_coming" not in vars(weights["head.weight"]),
        ]

    for found in run_ranks(work, world=2):
        assert all(found), found


@pytest.mark.parametrize("kinds", [None, ["hp_params"], ["optim_states"]])
def test_state_that_is_offloaded_under_a_gather_comes_back_with_the_new_values(
    kinds: list[str] | None,
) -> None:
    def work(rank: int, world: int) -> list[float]:
        setting, found = Setting(1, steps=2), []
        with late_gathers():
            engine = make_engine(PLAIN, setting)
            for step in range(setting.steps):
                train(engine, PLAIN, setting, rank, steps=[step])
                engine.offload_states(include=kinds)
                engine.reload_states()
                want = reference_run(PLAIN, Setting(1, steps=1 + step)).weights
                found += [
                    relative_difference(param.detach(), want[name])
                    for name, param in engine.module.named_parameters()
                ]
            engine.destroy()
        return found

    for found in run_ranks(work, world=2):
        assert [off for off in found if not off <= 1e-6] == []


def test_a_parameter_that_outlives_its_engine_gets_the_values_of_the_last_step() -> None:
    def work(rank: int, world: int) -> tuple[bool, bool, float]:
        setting = Setting(1, steps=2)
        want = reference_run(PLAIN, setting).weights
        with late_gathers():
            engine = make_engine(PLAIN, setting)
            train(engine, PLAIN, setting, rank)
            head, model = engine.module.head, weakref.ref(engine.module)
            kept = head.weight
            del engine, head
            gc.collect()
            is_gone = model() is None
            off = relative_difference(kept.detach(), want["head.weight"])
        return is_gone, type(kept) is nn.Parameter, off

    for is_gone, is_plain, off in run_ranks(work, world=2):
        assert is_gone
        assert is_plain
        assert off <= 1e-6


@pytest.mark.parametrize("stage", [1, 2])
def test_each_block_waits_for_its_own_parameters_alone(stage: int) -> None:
    def work(rank: int, world: int) -> list[list[bool]]:
        setting = Setting(stage)
        pending: list[list[bool]] = []

        with late_gathers():
            engine = make_engine(PLAIN, setting)
            train(engine, PLAIN, setting, rank, steps=[0])
            blocks = list(engine.module.blocks)
            for block in blocks:
                block.register_forward_hook(
                    lambda *_: pending.append(
                        [type(b.up.weight) is not nn.Parameter for b in blocks]
                    )
                )
            # Neither names and shapes nor what an optimizer does by habit need values.
            shapes = [tuple(p.shape) for p in engine.module.parameters()]
            assert len({*engine.module.parameters()}) == len(shapes)
            engine.module.zero_grad()
            engine.module.train()
            train(engine, PLAIN, setting, rank, steps=[1])
        return pending

    for pending in run_ranks(work, world=2):
        num_blocks = len(pending[0])
        want = [[later > now for later in range(num_blocks)] for now in range(num_blocks)]
        assert pending == want


@pytest.mark.parametrize("stage", [1, 2])
def test_a_view_that_was_kept_has_the_new_values_once_the_step_returns(stage: int) -> None:
    def work(rank: int, world: int) -> list[float]:
        setting = Setting(stage)
        want = reference_run(PLAIN, Setting(stage, steps=2)).weights["head.weight"]
        with late_gathers():
            engine = make_engine(PLAIN, setting)
            kept = engine.module.head.weight.detach()
            train(engine, PLAIN, setting, rank, steps=[0, 1])
            first = relative_difference(kept, want)
            del kept
            train(engine, PLAIN, setting, rank, steps=[2])
            still = type(engine.module.head.weight) is not nn.Parameter
            engine.module.state_dict()  # so that nothing is under way at the end
        return [first, still]

    for first, is_late_again in run_ranks(work, world=2):
        assert first <= 1e-6
        assert is_late_again


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_late_gathers_change_no_number(stage: int) -> None:
    """Also a module whose weight another one reads first, an evaluation, and two engines."""

    def work(rank: int, world: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for name in ("plain", "weight_read_by_parent", "tied_head_used_first", "never_used"):
            case, setting = ZOO[name], Setting(stage, accumulation=2)
            want = reference_run(case, setting)
            with late_gathers():
                engine = make_engine(case, setting)
                for step in range(setting.steps):
                    train(engine, case, setting, rank, steps=[step])
                    engine.eval()
                    with torch.no_grad():
                        case.losses(engine, batch_of(case, setting, step, 0, rank))
                    engine.train()
                got = within_gathered(engine.module)
                engine.destroy()
            found[name] = max(
                relative_difference(got[each], tensor) for each, tensor in want.weights.items()
            )
        return found

    for found in run_ranks(work, world=2):
        assert {name: off for name, off in found.items() if not off <= 1e-6} == {}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_that_are_copied_behind_the_computation_live_until_they_are_reduced(
    stage: int,
) -> None:
    """On a CPU nothing runs behind anything; who is alive when is the same."""

    def work(rank: int, world: int) -> tuple[float, list[int], list[bool]]:
        case, setting = ZOO["plain"], Setting(stage, accumulation=2)
        want = reference_run(case, setting).weights
        sources: list[weakref.ref[Tensor]] = []
        before: list[int] = []

        def reduce_mean(out: Tensor, full: Tensor, *rest: Any) -> Ticket:
            before.append(sum(source() is not None for source in sources))
            return collectives.reduce_mean(out, full, *rest)

        with (
            mock.patch.object(Aside, "exists", True),
            mock.patch.object(reducer, "reduce_mean", reduce_mean),
        ):
            engine = make_engine(case, setting)
            for param in engine.module.parameters():
                param.register_post_accumulate_grad_hook(
                    lambda param: sources.append(weakref.ref(param.grad))
                )
            train(engine, case, setting, rank)
            got = within_gathered(engine.module)
        worst = max(relative_difference(got[name], tensor) for name, tensor in want.items())
        return worst, before, [source() is not None for source in sources]

    for worst, before, after in run_ranks(work, world=2):
        assert worst <= 1e-6
        assert min(before) > 0
        assert max(before) <= 6  # those of one block
        assert not any(after)
