"""What a training loop may do with an engine besides forward, backward, step."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import zeroshard
from forked import run_ranks
from reference import (
    SEED,
    TIGHT_CLIP,
    TOLERANCE,
    Record,
    Setting,
    config_of,
    differences,
    full_weights,
    make_engine,
    make_optimizer,
    reference_run,
    relative_difference,
    train,
)
from zoo import ZOO, Case, Checkpointing

STAGES = (0, 1, 2, 3)
every_stage = pytest.mark.parametrize("stage", STAGES)
sharding_stages = pytest.mark.parametrize("stage", (1, 2, 3))


class InjectedError(Exception):
    """What a test makes a model raise."""


def reference_of(case: Case, setting: Setting, steps: list[int] | None = None) -> Record:
    """The plain PyTorch record of a setting, over chosen steps only where they are given."""
    if steps is not None:
        case = replace(case, batch=lambda step, *rest, of=case.batch: of(steps[step], *rest))
        setting = replace(setting, steps=len(steps))
    (record,) = run_ranks(lambda *_: reference_run(case, setting), 1, process_group=False)
    return record


def assert_same_weights(weights: list[dict[str, Tensor]], want: dict[str, Tensor]) -> None:
    for ours in weights:
        off = {name: relative_difference(ours[name], want[name]) for name in want}
        assert {name: by for name, by in off.items() if by > TOLERANCE} == {}


def plain_copy(case: Case, weights: dict[str, Tensor]) -> nn.Module:
    model = case.build(SEED)
    model.load_state_dict(weights, strict=False)
    return model


# Parameters -------------------------------------------------------------------------------------


@every_stage
def test_parameter_objects_stay_the_same_for_ever(stage: int) -> None:
    case, setting = ZOO["tied_head"], Setting(stage)

    def work(rank: int, world: int) -> None:
        model = case.build(SEED)
        before = {name: (id(p), p.shape) for name, p in model.named_parameters()}
        optimizer = make_optimizer("adamw", model.parameters())
        config = config_of(case, replace(setting, optimizer_from="caller"))
        engine = zeroshard.initialize(model=model, optimizer=optimizer, config=config)[0]

        def check_identity() -> None:
            assert engine.module is model
            assert {name: id(p) for name, p in model.named_parameters()} == {
                name: identity for name, (identity, _) in before.items()
            }
            assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in model.parameters())

        for step in range(3):
            check_identity()
            train(engine, case, setting, rank, steps=[step])
        with zeroshard.gathered(model):
            check_identity()
            for name, param in model.named_parameters():
                assert param.shape == before[name][1]
        engine.destroy()
        check_identity()

    run_ranks(work, world=2)


@every_stage
@pytest.mark.parametrize(
    "name",
    ["frozen_weight_in_each_block", "frozen_block_between", "frozen_front", "low_rank_adapters"],
)
def test_frozen_weights_do_not_decay(name: str, stage: int) -> None:
    case = ZOO[name]

    def work(rank: int, world: int) -> None:
        start = dict(case.build(SEED).named_parameters())
        frozen = {name for name, p in start.items() if not p.requires_grad}
        assert frozen
        for optimizer in ("adamw", "sgd"):
            setting = Setting(stage, optimizer=optimizer)
            engine = make_engine(case, setting)
            train(engine, case, setting, rank)
            weights = full_weights(engine)
            moved = {name for name, p in start.items() if not torch.equal(p, weights[name])}
            assert moved == start.keys() - frozen

    run_ranks(work, world=2)


@every_stage
def test_training_starts_from_the_weights_of_rank_0(stage: int) -> None:
    setting = Setting(stage, world=3)

    def work(rank: int, world: int) -> dict[str, Tensor]:
        case = replace(ZOO["plain"], build=lambda seed, mode: ZOO["plain"].build(seed + rank, mode))
        engine = make_engine(case, setting)
        train(engine, case, setting, rank)
        return full_weights(engine)

    want = reference_of(ZOO["plain"], setting)
    assert_same_weights(run_ranks(work, world=3), want.weights)


@every_stage
def test_an_edit_of_gathered_weights_lasts(stage: int) -> None:
    case, setting = ZOO["plain"], Setting(stage)

    def edit(model: nn.Module, factor: float) -> None:
        with torch.no_grad():
            model.blocks[0].up.weight.mul_(factor)
            model.head.bias.zero_()

    def build(seed: int, mode: Any = "none") -> nn.Module:
        model = case.build(seed, mode)
        edit(model, 2.0)
        return model

    def work(rank: int, world: int) -> dict[str, Tensor]:
        engine = make_engine(case, setting)
        with zeroshard.gathered(engine.module, modifier_rank=1):
            edit(engine.module, 2.0 if rank == 1 else -1.0)
        train(engine, case, setting, rank)
        return full_weights(engine)

    want = reference_of(replace(case, build=build), setting)
    assert_same_weights(run_ranks(work, world=2), want.weights)


@every_stage
def test_param_groups_of_the_caller_are_respected(stage: int) -> None:
    case, setting = ZOO["frozen_weight_in_each_block"], Setting(stage)

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        trainable = [p for p in model.parameters() if p.requires_grad]
        return [
            {"params": [p for p in trainable if p.ndim > 1], "lr": 3e-2, "weight_decay": 0.5},
            {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
        ]

    def work(rank: int, world: int) -> dict[str, Tensor]:
        model = case.build(SEED)
        config = config_of(case, replace(setting, optimizer_from="caller"))
        engine = zeroshard.initialize(
            model=model, optimizer=make_optimizer("adamw", groups(model)), config=config
        )[0]
        assert [group["lr"] for group in engine.optimizer.param_groups] == [3e-2, 1e-2]
        train(engine, case, setting, rank)
        return full_weights(engine)

    def plain(rank: int, world: int) -> dict[str, Tensor]:
        model = case.build(SEED)
        optimizer = make_optimizer("adamw", groups(model))
        for step in range(setting.steps):
            optimizer.zero_grad()
            for other in range(2):
                (case.loss(model, case.batch(step, 0, other)) / 2).backward()
            optimizer.step()
        return {name: p.detach() for name, p in model.named_parameters()}

    (want,) = run_ranks(plain, 1, process_group=False)
    assert_same_weights(run_ranks(work, world=2), want)


@every_stage
def test_a_schedule_moves_the_learning_rate_once_per_step(stage: int) -> None:
    case = ZOO["plain"]
    setting = Setting(stage, accumulation=2, optimizer="sgd", optimizer_from="caller")

    def work(rank: int, world: int) -> list[list[float]]:
        model = case.build(SEED)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        engine, _, _, returned = zeroshard.initialize(
            model=model, optimizer=optimizer, lr_scheduler=schedule, config=config_of(case, setting)
        )
        assert returned is schedule
        rates = [engine.get_lr()]
        for step in range(3):
            train(engine, case, setting, rank, steps=[step])
            rates.append(engine.get_lr())
        return rates

    for rates in run_ranks(work, world=2):
        assert rates == [[1.0], [0.5], [0.25], [0.125]]


class ReadsIntoBlock(nn.Module):
    """Reads a weight in the middle of a block of the model it wraps, before the block runs."""

    def __init__(self, inner: nn.Module, how: str) -> None:
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, ids: Tensor) -> Tensor:
        weight = self.inner.blocks[1].up.weight
        return self.inner(ids) + (weight.sum() if self.how == "sum" else weight[0, 0])


def reading_case(how: str = "index") -> Case:
    def build(seed: int, checkpointing: Checkpointing = "none") -> nn.Module:
        return ReadsIntoBlock(ZOO["plain"].build(seed, checkpointing), how)

    return replace(ZOO["plain"], build=build)


@pytest.mark.parametrize("how", ["index", "sum"])
def test_reading_a_freed_weight_of_a_block_says_what_to_do(how: str) -> None:
    """The sum over an empty tensor raises nothing by itself, and would be silently wrong."""
    case = reading_case(how)

    def work(rank: int, world: int) -> None:
        engine = make_engine(case, Setting(3))
        for _ in range(2):
            with pytest.raises(zeroshard.UsageError, match=r"blocks\.1\.up\.weight") as caught:
                engine.backward(case.loss(engine, case.batch(0, 0, rank)))
            assert "register_external_parameter" in str(caught.value)
            engine.reset()

    run_ranks(work, world=2)


@every_stage
@pytest.mark.parametrize("checkpointing", ["none", "reentrant"])
def test_a_weight_of_a_block_may_be_read_elsewhere_once_that_is_declared(
    checkpointing: Checkpointing, stage: int
) -> None:
    case = reading_case()
    setting = Setting(stage, accumulation=2, checkpointing=checkpointing)

    def work(rank: int, world: int) -> dict[str, Tensor]:
        engine = make_engine(case, setting)
        model = engine.module
        zeroshard.register_external_parameter(model, model.inner.blocks[1].up.weight)
        train(engine, case, setting, rank)
        return full_weights(engine)

    assert_same_weights(run_ranks(work, world=2), reference_of(case, setting).weights)


# Evaluation -------------------------------------------------------------------------------------


def evaluate_by_engine(engine: Any, ids: Tensor) -> Tensor:
    return engine(ids)


def evaluate_by_module(engine: Any, ids: Tensor) -> Tensor:
    return engine.module(ids)


def evaluate_by_parts(engine: Any, ids: Tensor) -> Tensor:
    module = engine.module
    h = module.embedding(ids)
    for block in module.blocks:
        h = block(h)
    return module.head(h)


@every_stage
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_evaluation_is_right_and_leaves_training_alone(mode: Callable[[], Any], stage: int) -> None:
    case, setting = ZOO["plain"], Setting(stage, accumulation=2)
    # Every module that is called on its own must be able to gather its parameters.
    parts = ["embedding", "blocks.0", "blocks.1", "blocks.2", "head"]
    setting = replace(setting, extra={"zeroshard": {"units": parts}})

    def work(rank: int, world: int) -> tuple[list[float], dict[str, Tensor]]:
        engine = make_engine(case, setting)
        ids = case.batch(90, 0, rank)[0]
        off = []
        for step, micro in itertools.product(range(setting.steps), range(2)):
            with torch.no_grad():
                want = plain_copy(case, full_weights(engine))(ids)
            for evaluate in (evaluate_by_engine, evaluate_by_module, evaluate_by_parts):
                engine.eval()
                assert not engine.module.training
                with mode():
                    got = evaluate(engine, ids).detach().clone()
                engine.train()
                assert engine.module.training
                off.append(relative_difference(got, want))
            engine.backward(case.loss(engine, case.batch(step, micro, rank)))
            engine.step()
        return off, full_weights(engine)

    results = run_ranks(work, world=2)
    assert max(itertools.chain(*(off for off, _ in results))) <= TOLERANCE
    want = reference_of(case, setting).weights
    assert_same_weights([weights for _, weights in results], want)


# Accumulation -----------------------------------------------------------------------------------


@every_stage
def test_counters_follow_micro_steps_and_steps(stage: int) -> None:
    case, setting = ZOO["plain"], Setting(stage, accumulation=3)

    def work(rank: int, world: int) -> list[tuple[bool, int, int, int]]:
        engine = make_engine(case, setting)
        assert (engine.global_rank, engine.local_rank, engine.world_size) == (rank, rank, world)
        assert engine.train_batch_size() == 3 * world
        assert engine.train_micro_batch_size_per_gpu() == 1
        assert engine.gradient_accumulation_steps() == 3
        seen = []
        for micro in range(6):
            boundary = engine.is_gradient_accumulation_boundary()
            engine.backward(case.loss(engine, case.batch(0, micro, rank)))
            assert engine.is_gradient_accumulation_boundary() == boundary
            engine.step()
            seen.append((boundary, engine.micro_steps, engine.global_steps, engine.global_samples))
        assert engine.skipped_steps == 0
        return seen

    want = [
        (False, 1, 0, 0),
        (False, 2, 0, 0),
        (True, 3, 1, 6),
        (False, 4, 1, 6),
        (False, 5, 1, 6),
        (True, 6, 2, 12),
    ]
    assert run_ranks(work, world=2) == [want, want]


@every_stage
def test_boundaries_set_by_hand_do_what_counted_ones_do(stage: int) -> None:
    case, setting = ZOO["plain"], Setting(stage, accumulation=2)

    def work(rank: int, world: int) -> dict[str, Tensor]:
        engine = make_engine(case, setting)
        for step, micro in itertools.product(range(setting.steps), range(2)):
            engine.set_gradient_accumulation_boundary(micro == 1)
            assert engine.is_gradient_accumulation_boundary() == (micro == 1)
            engine.backward(case.loss(engine, case.batch(step, micro, rank)))
            engine.step()
            assert engine.global_steps == step + micro
        engine.set_gradient_accumulation_boundary(None)
        assert not engine.is_gradient_accumulation_boundary()
        return full_weights(engine)

    assert_same_weights(run_ranks(work, world=2), reference_of(case, setting).weights)


@every_stage
def test_backwards_inside_no_sync_add_up(stage: int) -> None:
    case, setting = ZOO["two_backwards"], Setting(stage)

    def work(rank: int, world: int) -> dict[str, Tensor]:
        engine = make_engine(case, setting)
        for step in range(setting.steps):
            first, second = case.losses(engine, case.batch(step, 0, rank)), None
            with engine.no_sync():
                assert not engine.is_gradient_accumulation_boundary()
                engine.backward(next(first))
            second = next(first)
            engine.backward(second)
            engine.step()
        return full_weights(engine)

    assert_same_weights(run_ranks(work, world=2), reference_of(case, setting).weights)


@every_stage
def test_zero_grad_forgets_what_was_accumulated(stage: int) -> None:
    case, setting = ZOO["plain"], Setting(stage, accumulation=2)

    def work(rank: int, world: int) -> dict[str, Tensor]:
        engine = make_engine(case, setting)
        for step in range(setting.steps):
            for micro in (5, 0):  # the gradient of micro-step 5 is dropped
                engine.backward(case.loss(engine, case.batch(step, micro, rank)))
                if micro == 5:
                    engine.zero_grad()
                    continue
                engine.step()
                engine.backward(case.loss(engine, case.batch(step, 1, rank)))
                engine.step()
        return full_weights(engine)

    assert_same_weights(run_ranks(work, world=2), reference_of(case, setting).weights)


@every_stage
def test_a_step_without_a_backward_is_refused(stage: int) -> None:
    def work(rank: int, world: int) -> None:
        engine = make_engine(ZOO["plain"], Setting(stage))
        with pytest.raises(zeroshard.UsageError, match="backward"):
            engine.step()
        train(engine, ZOO["plain"], Setting(stage), rank)
        with pytest.raises(zeroshard.UsageError, match="backward"):
            engine.step()

    run_ranks(work, world=2)


@every_stage
def test_the_module_itself_may_be_called_for_training(stage: int) -> None:
    case, setting = ZOO["plain"], Setting(stage, accumulation=2, clip=TIGHT_CLIP)

    def work(rank: int, world: int) -> dict[str, Tensor]:
        engine = make_engine(case, setting)
        for step, micro in itertools.product(range(setting.steps), range(2)):
            case.loss(engine.module, case.batch(step, micro, rank)).backward()
            engine.step()
        return full_weights(engine)

    assert_same_weights(run_ranks(work, world=2), reference_of(case, setting).weights)


@every_stage
def test_two_runs_are_equal_to_the_last_bit(stage: int) -> None:
    case = ZOO["mixture_of_experts"]
    setting = Setting(stage, world=3, accumulation=2, clip=TIGHT_CLIP)

    def work(rank: int, world: int) -> None:
        records = []
        for _ in range(2):
            engine = make_engine(case, setting)
            losses, norms = train(engine, case, setting, rank)
            records.append(Record(losses, norms, full_weights(engine), []))
        assert differences(*records, tolerance=0) == []

    run_ranks(work, world=3)


# Exceptions -------------------------------------------------------------------------------------


class Bomb:
    """Raises inside a chosen module, in forward or in backward, when it is armed."""

    def __init__(self, module: nn.Module) -> None:
        self.armed = ""
        module.register_forward_hook(self._after_forward)

    def _after_forward(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self.armed == "forward":
            raise InjectedError
        if self.armed == "backward":
            output.register_hook(self._in_backward)

    def _in_backward(self, gradient: Tensor) -> None:
        raise InjectedError


PLACES = ("embedding", "blocks.0", "blocks.1", "blocks.2")


@every_stage
@pytest.mark.parametrize("when", ["forward", "backward", "loss"])
def test_training_goes_on_after_an_exception_on_all_ranks(when: str, stage: int) -> None:
    case, setting = ZOO["plain"], Setting(stage)
    failing = (0, 2, 3)

    def work(rank: int, world: int) -> list[dict[str, Tensor]]:
        return [survive(place, rank) for place in PLACES]

    def survive(place: str, rank: int) -> dict[str, Tensor]:
        engine = make_engine(case, setting)
        bomb = Bomb(engine.module.get_submodule(place))
        for step in range(6):
            bomb.armed = when if step in failing else ""
            try:
                loss = case.loss(engine, case.batch(step, 0, rank))
                if bomb.armed == "loss":
                    raise InjectedError
                engine.backward(loss)
            except InjectedError:
                continue
            engine.step()
        bomb.armed = ""
        assert engine.global_steps == 3
        return full_weights(engine)

    want = reference_of(case, setting, [1, 4, 5])
    for weights in run_ranks(work, world=2):
        assert_same_weights(weights, want.weights)


@every_stage
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_reset_starts_an_accumulation_anew(when: str, stage: int) -> None:
    case, setting = ZOO["plain"], Setting(stage, accumulation=3)

    def work(rank: int, world: int) -> dict[str, Tensor]:
        engine = make_engine(case, setting)
        bomb = Bomb(engine.module.blocks[1])
        for step in range(4):
            bomb.armed = ""
            for micro in range(3):
                if (step, micro) == (1, 1):
                    bomb.armed = when
                try:
                    engine.backward(case.loss(engine, case.batch(step, micro, rank)))
                except InjectedError:
                    engine.reset()
                    break
                engine.step()
        assert engine.global_steps == 3
        return full_weights(engine)

    want = reference_of(case, setting, [0, 2, 3])
    assert_same_weights(run_ranks(work, world=2), want.weights)


@every_stage
@pytest.mark.parametrize("place", PLACES)
def test_all_ranks_may_skip_a_batch_that_failed_on_one(place: str, stage: int) -> None:
    """The ranks know the order of their modules from the steps before, so none waits for another.

    In the very first step they still agree on it block by block, and a rank that leaves its forward
    then leaves the others waiting.
    """
    case, setting = ZOO["plain"], Setting(stage, world=3)

    def work(rank: int, world: int) -> dict[str, Tensor]:
        engine = make_engine(case, setting)
        bomb = Bomb(engine.module.get_submodule(place))
        for step in range(6):
            bomb.armed = "forward" if step in (2, 3) and rank == 1 else ""
            failed = torch.zeros(())
            try:
                loss = case.loss(engine, case.batch(step, 0, rank))
            except InjectedError:
                failed += 1
            dist.all_reduce(failed)
            if failed:
                engine.reset()
                continue
            engine.backward(loss)
            engine.step()
        return full_weights(engine)

    want = reference_of(case, setting, [0, 1, 4, 5])
    assert_same_weights(run_ranks(work, world=3, timeout=30), want.weights)


# More than one engine ---------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [(3, 3), (1, 3), (2, 0)])
def test_two_engines_train_side_by_side(stages: tuple[int, int]) -> None:
    cases = (ZOO["plain"], ZOO["tied_head"])
    settings = [Setting(stage, clip=TIGHT_CLIP) for stage in stages]

    def work(rank: int, world: int) -> list[dict[str, Tensor]]:
        pairs = list(zip(cases, settings, strict=True))
        engines = [make_engine(*pair) for pair in pairs]
        for step in range(3):
            losses = [
                case.loss(engine, case.batch(step, 0, rank))
                for engine, case in zip(engines, cases, strict=True)
            ]
            for engine, loss in reversed(list(zip(engines, losses, strict=True))):
                engine.backward(loss)
            for engine in engines:
                engine.step()
        return [full_weights(engine) for engine in engines]

    results = run_ranks(work, world=2)
    for index, (case, setting) in enumerate(zip(cases, settings, strict=True)):
        want = reference_of(case, setting).weights
        assert_same_weights([weights[index] for weights in results], want)


@pytest.mark.parametrize("stages", [(3, 3), (2, 3), (1, 1), (0, 2)])
def test_one_loss_may_train_two_engines(stages: tuple[int, int]) -> None:
    """A generator feeds a critic; one backward goes through both."""
    case = ZOO["input_without_gradient"]
    settings = [Setting(stage) for stage in stages]

    def loss_of(generator: Any, critic: Any, x: Tensor) -> Tensor:
        return (critic(generator(x)) - 1).square().mean()

    def work(rank: int, world: int) -> list[dict[str, Tensor]]:
        engines = [make_engine(case, setting) for setting in settings]
        for step in range(3):
            loss_of(*engines, *case.batch(step, 0, rank)).backward()
            for engine in engines:
                engine.step()
        return [full_weights(engine) for engine in engines]

    def plain(rank: int, world: int) -> list[dict[str, Tensor]]:
        models = [case.build(SEED) for _ in settings]
        optimizers = [make_optimizer("adamw", model.parameters()) for model in models]
        for step in range(3):
            for other in range(2):
                (loss_of(*models, *case.batch(step, 0, other)) / 2).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return [{n: p.detach() for n, p in model.named_parameters()} for model in models]

    (wants,) = run_ranks(plain, 1, process_group=False)
    results = run_ranks(work, world=2)
    for index, want in enumerate(wants):
        assert_same_weights([weights[index] for weights in results], want)


@sharding_stages
def test_an_engine_may_follow_another_in_one_process(stage: int) -> None:
    case, setting = ZOO["plain"], Setting(stage)

    def work(rank: int, world: int) -> dict[str, Tensor]:
        for _ in range(3):
            engine = make_engine(case, setting)
            train(engine, case, setting, rank)
            weights = full_weights(engine)
            engine.destroy()
        return weights

    assert_same_weights(run_ranks(work, world=2), reference_of(case, setting).weights)


# Ranks that differ ------------------------------------------------------------------------------


DIVERGENT = (
    "block_skipped_on_some_ranks",
    "depth_varies_by_rank",
    "mixture_of_experts",
    "order_varies_by_rank",
    "used_on_some_ranks",
)


@pytest.mark.parametrize(
    ("name", "lookahead_bytes"),
    [
        *((name, None) for name in DIVERGENT),
        ("depth_varies_by_rank", 0),
        ("mixture_of_experts", 1 << 30),
        ("order_varies_by_rank", 0),
        ("order_varies_by_rank", 1 << 30),
    ],
)
def test_ranks_that_run_different_blocks_do_not_hang(
    name: str, lookahead_bytes: int | None
) -> None:
    case = ZOO[name]
    setting = Setting(3, world=4, accumulation=2, lookahead_bytes=lookahead_bytes, steps=4)

    def work(rank: int, world: int) -> dict[str, Tensor]:
        engine = make_engine(case, setting)
        train(engine, case, setting, rank)
        return full_weights(engine)

    want = reference_of(case, setting)
    assert_same_weights(run_ranks(work, world=4, timeout=60), want.weights)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("name", DIVERGENT)
def test_ranks_that_evaluate_different_blocks_do_not_hang(name: str, stage: int) -> None:
    """Whatever the ranks do together after an evaluation, none is left behind in it."""
    case, setting = ZOO[name], Setting(stage, world=4, steps=4)

    def work(rank: int, world: int) -> dict[str, Tensor]:
        engine = make_engine(case, setting)
        for step in range(setting.steps):
            train(engine, case, setting, rank, steps=[step])
            with torch.no_grad():
                loss = case.loss(engine, case.batch(step + 1, 7, rank))
            dist.all_reduce(loss)
        with torch.no_grad():
            case.loss(engine, case.batch(0, 7, rank))
        return full_weights(engine)

    want = reference_of(case, setting)
    assert_same_weights(run_ranks(work, world=4, timeout=30), want.weights)


@every_stage
@pytest.mark.parametrize("name", ["plain", *DIVERGENT])
def test_a_collective_of_the_caller_may_come_between_forward_and_backward(
    name: str, stage: int
) -> None:
    case, setting = ZOO[name], Setting(stage, world=3, steps=4)

    def work(rank: int, world: int) -> dict[str, Tensor]:
        engine = make_engine(case, setting)
        for step in range(setting.steps):
            loss = case.loss(engine, case.batch(step, 0, rank))
            dist.all_reduce(loss.detach().clone())
            engine.backward(loss)
            engine.step()
        return full_weights(engine)

    want = reference_of(case, setting)
    assert_same_weights(run_ranks(work, world=3, timeout=30), want.weights)


@every_stage
@pytest.mark.parametrize("name", ["plain", "depth_varies_by_rank"])
def test_weights_may_be_gathered_between_forward_and_backward(name: str, stage: int) -> None:
    case, setting = ZOO[name], Setting(stage, world=3, steps=4)

    def work(rank: int, world: int) -> dict[str, Tensor]:
        engine = make_engine(case, setting)
        for step in range(setting.steps):
            loss = case.loss(engine, case.batch(step, 0, rank))
            start = full_weights(engine)
            engine.backward(loss)
            engine.step()
            assert any(not torch.equal(start[n], w) for n, w in full_weights(engine).items())
        return full_weights(engine)

    want = reference_of(case, setting)
    assert_same_weights(run_ranks(work, world=3, timeout=30), want.weights)


@pytest.mark.parametrize("missing", ["forward", "backward", "step"])
@pytest.mark.parametrize("stage", [1, 3])
def test_a_rank_that_leaves_its_loop_is_reported_by_the_others(stage: int, missing: str) -> None:
    case = ZOO["plain"]
    setting = Setting(stage)

    def work(rank: int, world: int) -> str:
        engine = make_engine(case, setting)
        train(engine, case, setting, rank, steps=range(1))

        def leaves_before(part: str) -> bool:
            if rank == 1 and missing == part:
                engine.destroy()  # as it does when its process ends
                return True
            return False

        try:
            if leaves_before("forward"):
                return ""
            loss = case.loss(engine, case.batch(1, 0, rank))
            if leaves_before("backward"):
                return ""
            engine.backward(loss)
            if leaves_before("step"):
                return ""
            engine.step()
        except zeroshard.DistributedError as error:
            return str(error)
        return "no error"

    said, _ = run_ranks(work, 2)
    assert "rank 0" in said and "hint: look at the first error" in said


@pytest.mark.parametrize("accumulation", [1, 2])
@every_stage
def test_ranks_may_run_different_numbers_of_backwards_before_a_step(
    stage: int, accumulation: int
) -> None:
    case = ZOO["plain"]
    setting = Setting(stage, accumulation=accumulation, clip=TIGHT_CLIP, world=3)

    def losses(model: Any, micro: int, rank: int) -> list[Tensor]:
        """One backward on rank 0, two on rank 1, three on rank 2."""
        return [case.loss(model, case.batch(10 * part, micro, rank)) for part in range(rank + 1)]

    def plain() -> dict[str, Tensor]:
        model = case.build(SEED)
        optimizer = make_optimizer(setting.optimizer, model.parameters())
        for micro, rank in itertools.product(range(accumulation), range(3)):
            for loss in losses(model, micro, rank):
                (loss / 3 / accumulation).backward()
        nn.utils.clip_grad_norm_(model.parameters(), setting.clip)
        optimizer.step()
        return {name: param.detach() for name, param in model.named_parameters()}

    def work(rank: int, world: int) -> dict[str, Tensor]:
        engine = make_engine(case, setting)
        for micro in range(accumulation):
            for part in range(rank + 1):
                engine.backward(case.loss(engine, case.batch(10 * part, micro, rank)))
            engine.step()
        return full_weights(engine)

    (want,) = run_ranks(lambda *_: plain(), 1, process_group=False)
    assert_same_weights(run_ranks(work, 3), want)
