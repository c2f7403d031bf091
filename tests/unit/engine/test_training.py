"""One rank through an engine against plain PyTorch, and what an engine tells about itself."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import zeroshard
from unit.engine.small import (
    LR,
    STAGES,
    Net,
    batch,
    config_of,
    loss_of,
    make,
    on_ranks,
    train,
    weights_of,
)
from zeroshard import UsageError

ADAMW = {"type": "AdamW", "params": {"lr": 0.01, "betas": [0.9, 0.95], "weight_decay": 0.1}}


def plain_adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        model.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )


@pytest.mark.parametrize("accumulation", [1, 2])
@on_ranks(1)
def test_fp32_on_one_rank_is_plain_pytorch_to_the_last_bit(accumulation: int) -> None:
    engine = make(3, optimizer=ADAMW, gradient_accumulation_steps=accumulation)
    model = Net()
    optimizer = plain_adamw(model)
    for step in range(5):
        for micro in range(accumulation):
            loss, want = loss_of(engine, 10 * step + micro), loss_of(model, 10 * step + micro)
            assert loss.item() == want.item()
            engine.backward(loss)
            engine.step()
            (want / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
        weights = weights_of(engine)
        for name, param in model.named_parameters():
            assert torch.equal(weights[name], param), f"{name} after step {step}"


@on_ranks(2, STAGES)
def test_the_backward_of_the_engine_is_the_backward_of_the_loss(stage: int) -> None:
    weights = []
    for backward in (lambda engine, loss: engine.backward(loss), lambda _, loss: loss.backward()):
        engine = make(stage, gradient_accumulation_steps=2)
        for number in range(4):
            backward(engine, loss_of(engine, number))
            engine.step()
        weights.append(weights_of(engine))
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name])


def as_dict(x: Tensor, y: Tensor) -> Any:
    return {"x": x, "y": [y, None, "text"]}


def as_tuple(x: Tensor, y: Tensor) -> Any:
    return x, (y,)


def as_object(x: Tensor, y: Tensor) -> Any:
    return SimpleNamespace(x=x, y=y)


def total(output: Any) -> Tensor:
    if isinstance(output, dict):
        return output["x"].sum() + output["y"][0].sum()
    if isinstance(output, tuple):
        return output[0].sum() + output[1][0].sum()
    return output.x.sum() + output.y.sum()


class TwoLayers(nn.Module):
    """Layers that are units of their own."""

    def __init__(self, pack: Callable[..., Any]) -> None:
        super().__init__()
        self.pack = pack
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.pack(self.first(x), self.second(x))


class NoLayers(nn.Module):
    """Parameters of the outermost module itself."""

    def __init__(self, pack: Callable[..., Any]) -> None:
        super().__init__()
        self.pack = pack
        self.first, self.second = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Any:
        return self.pack(self.first * x, self.second * x)


@pytest.mark.parametrize(
    ("kind", "pack"),
    [
        (TwoLayers, as_dict),
        (TwoLayers, as_tuple),
        (TwoLayers, as_object),
        (NoLayers, as_dict),
        (NoLayers, as_tuple),
        (NoLayers, as_object),
    ],
)
@on_ranks(2, STAGES)
def test_a_model_may_return(kind: Any, pack: Callable[..., Any], stage: int) -> None:
    engine = make(stage, kind(pack))
    before = weights_of(engine)
    for _ in range(2):
        engine.backward(total(engine(torch.ones(1, 4))))
        engine.step()
    for name, weight in weights_of(engine).items():
        torch.testing.assert_close(weight, before[name] - 2 * LR)


# What an engine tells ---------------------------------------------------------------------------


@on_ranks(1)
def test_the_returned_loss_is_the_share_of_the_micro_step_and_has_no_graph() -> None:
    engine = make(gradient_accumulation_steps=4)
    loss = loss_of(engine)
    returned = engine.backward(loss)
    assert returned.item() == loss.item() / 4
    assert not returned.requires_grad
    loss = loss_of(engine)
    assert engine.backward(loss, scale_wrt_gas=False).item() == loss.item()


@on_ranks(2, STAGES)
def test_the_gradient_norm_is_that_of_the_mean_before_clipping(stage: int) -> None:
    engine = make(stage, gradient_accumulation_steps=2, gradient_clipping=1e-3)
    assert engine.get_global_grad_norm() is None
    model = Net()
    for number in range(2):
        engine.backward(loss_of(engine, number))
        engine.step()
        (loss_of(model, number) / 2).backward()
    want = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    norm = engine.get_global_grad_norm()
    assert want > 1e-2
    torch.testing.assert_close(norm, want, rtol=1e-6, atol=0)


@on_ranks(1)
def test_the_gradient_is_clipped_by_one_unless_the_configuration_says_otherwise() -> None:
    config = config_of()
    del config["gradient_clipping"]
    engine = zeroshard.initialize(model=Net(), config=config)[0]
    before = weights_of(engine)
    engine.backward(100 * loss_of(engine))
    engine.step()
    after = weights_of(engine)
    moved = torch.stack([(after[name] - before[name]).norm() for name in before]).norm()
    assert engine.get_global_grad_norm() > 10
    assert moved.item() == pytest.approx(LR, rel=1e-4)


@on_ranks(1)
def test_was_step_applied_is_true_only_after_a_boundary() -> None:
    engine = make(gradient_accumulation_steps=2)
    seen = [engine.was_step_applied()]
    for number in range(4):
        engine.backward(loss_of(engine, number))
        engine.step()
        seen.append(engine.was_step_applied())
    assert seen == [False, False, True, False, True]


@on_ranks(1)
def test_the_learning_rate_is_that_of_the_param_groups_and_may_be_set_there() -> None:
    model = Net()
    groups = [{"params": model.blocks.parameters()}, {"params": model.head.parameters(), "lr": 0.5}]
    config = config_of()
    engine = zeroshard.initialize(model=model, model_parameters=groups, config=config)[0]
    assert engine.get_lr() == [LR, 0.5]
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    assert engine.get_lr() == [0.0, 0.0]
    before = weights_of(engine)
    engine.backward(loss_of(engine))
    engine.step()
    for name, weight in weights_of(engine).items():
        assert torch.equal(weight, before[name])


@on_ranks(1)
def test_progress_is_logged_every_so_many_steps(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="zeroshard.engine.engine")
    engine = make(steps_per_print=2, gradient_accumulation_steps=2)
    for number in range(10):
        engine.backward(loss_of(engine, number))
        engine.step()
    assert [record.getMessage() for record in caplog.records] == [
        f"step={step}, skipped=0, lr=[{LR}], loss_scale=1" for step in (2, 4)
    ]


@on_ranks(2)
def test_progress_and_warnings_are_written_once_where_the_program_set_up_no_logging() -> None:
    logging.getLogger().handlers.clear()  # those of the test runner
    written = io.StringIO()
    with contextlib.redirect_stderr(written):
        engine = make(steps_per_print=1, wall_clock_breakdown=True)
        train(engine, steps=1)
        logging.getLogger("zeroshard").error("seen on every rank")
    lines = written.getvalue().splitlines()
    if dist.get_rank() == 0:
        assert [line[:20] for line in lines[:-1]] == [
            "zeroshard: warning: ",
            "zeroshard: step=1, s",
        ]
    else:
        assert len(lines) == 1
    assert lines[-1] == "zeroshard: error: seen on every rank"


@on_ranks(1)
def test_the_engine_knows_its_place_and_its_batch() -> None:
    engine = make(train_micro_batch_size_per_gpu=3, gradient_accumulation_steps=2)
    assert (engine.local_rank, engine.global_rank, engine.world_size) == (0, 0, 1)
    assert engine.train_batch_size() == 6
    assert engine.train_micro_batch_size_per_gpu() == 3
    assert engine.gradient_accumulation_steps() == 2
    assert engine.device == next(engine.module.parameters()).device
    assert engine.loss_scale == 1.0


@on_ranks(1)
def test_train_and_eval_reach_the_module() -> None:
    engine = make()
    assert engine.eval() is engine
    assert not engine.module.training
    assert engine.train() is engine
    assert engine.module.blocks[0].training
    engine.train(False)
    assert not engine.module.blocks[0].training


@on_ranks(1)
def test_attributes_that_the_engine_lacks_are_those_of_the_module() -> None:
    class WithAttributes(Net):
        vocabulary = "of the model"

        def greet(self, name: str) -> str:
            return f"{name} {len(self.blocks)}"

    engine = make(model=WithAttributes())
    assert engine.vocabulary == "of the model"
    assert engine.greet("hello") == "hello 2"
    assert engine.head is engine.module.head
    assert not hasattr(engine, "absent")
    with pytest.raises(AttributeError, match="absent"):
        _ = engine.absent


@on_ranks(2, STAGES)
def test_the_optimizer_inside_cannot_be_stepped_behind_the_engine(stage: int) -> None:
    engine = make(stage)
    before = weights_of(engine)
    engine.backward(loss_of(engine))
    with pytest.raises(UsageError, match=r"hint: call engine\.step\(\)"):
        engine.basic_optimizer.step()
    for name, weight in weights_of(engine).items():
        assert torch.equal(weight, before[name])
    engine.step()
    assert engine.was_step_applied()


@on_ranks(2, STAGES)
def test_zero_grad_of_the_optimizer_before_backward_is_harmless(stage: int) -> None:
    engine, model = make(stage), Net()
    for number in range(2):
        engine.optimizer.zero_grad()
        engine.zero_grad()
        engine.backward(loss_of(engine, number))
        engine.step()
        model.zero_grad()
        loss_of(model, number).backward()
        with torch.no_grad():
            for param in model.parameters():
                param -= LR * param.grad
    weights = weights_of(engine)
    for name, param in model.named_parameters():
        torch.testing.assert_close(weights[name], param.detach())


@on_ranks(2, STAGES)
def test_a_copy_of_the_module_is_an_ordinary_module(stage: int) -> None:
    engine = make(stage, fp16={"enabled": True, "loss_scale": 16})
    with zeroshard.gathered(engine.module):
        copied = copy.deepcopy(engine.module)
    plain = Net().half()
    for model in (copied, plain):
        model(batch(0, torch.float16)).float().sum().backward()
    for ours, other in zip(copied.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, other)
        assert torch.equal(ours.grad, other.grad)


# The end ----------------------------------------------------------------------------------------


@on_ranks(2, STAGES)
def test_a_destroyed_engine_leaves_no_hooks_behind(stage: int) -> None:
    plain, model = Net(), Net()
    engine = make(stage, model)
    engine.backward(loss_of(engine))
    engine.step()
    engine.destroy()
    for ours, other in zip(model.modules(), plain.modules(), strict=True):
        kept = {name: value for name, value in vars(ours).items() if name.endswith("hooks")}
        assert kept == {name: value for name, value in vars(other).items() if name in kept}
        assert type(ours._parameters) is dict


@on_ranks(2, STAGES[:3])
def test_where_parameters_stay_the_module_outlives_its_engine(stage: int) -> None:
    model = Net()
    engine = make(stage, model)
    engine.backward(loss_of(engine))
    engine.step()
    want = engine(batch(3))
    engine.destroy()
    assert torch.equal(model(batch(3)), want)


@on_ranks(2)
def test_an_engine_may_be_destroyed_twice() -> None:
    engine = make(3)
    engine.destroy()
    engine.destroy()
