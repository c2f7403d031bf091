"""What an engine leaves behind, and models that meet more than one engine."""

from __future__ import annotations

import gc
import io
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

import zeroshard
from unit.engine.small import (
    LR,
    STAGES,
    Net,
    assert_equal_weights,
    batch,
    config_of,
    config_without,
    loss_of,
    make,
    on_ranks,
    train,
    weights_of,
)
from zeroshard import UsageError


@contextmanager
def shown() -> Iterator[Callable[[], str]]:
    """What this rank logs in the block."""
    handler = logging.StreamHandler(stream := io.StringIO())
    logger = logging.getLogger("zeroshard")
    logger.addHandler(handler)
    try:
        yield stream.getvalue
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize("world", [1, 2])
def test_a_model_trains_on_with_a_new_engine_after_the_old_one_is_destroyed(world: int) -> None:
    @on_ranks(world, STAGES)
    def check(stage: int) -> None:
        whole, first = make(stage), make(stage)
        train(whole, steps=4)
        train(first, steps=2)
        model = first.module
        first.destroy()
        first.destroy()
        second, *_ = zeroshard.initialize(model=model, config=config_of(stage))
        assert list(model.parameters()) == list(second.parameters())
        for number in (2, 3):
            second.backward(loss_of(second, number))
            second.step()
        assert_equal_weights(weights_of(second), weights_of(whole))

    check()


@on_ranks(2, (1, 2, 3))
def test_a_model_may_go_from_one_stage_to_another(stage: int) -> None:
    engine, whole = make(stage), make(0)
    train(engine, steps=1)
    model = engine.module
    engine.destroy()
    second, *_ = zeroshard.initialize(model=model, config=config_of(3 if stage < 3 else 1))
    train(whole, steps=1)
    assert_equal_weights(weights_of(second), weights_of(whole))


@on_ranks(2, STAGES)
def test_an_optimizer_gets_its_parameters_back_and_can_be_used_again(stage: int) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.5)
    engine, *_ = zeroshard.initialize(model=model, optimizer=optimizer, config=config_of(stage))
    train(engine, steps=1)
    engine.destroy()
    assert optimizer.param_groups[0]["params"] == list(model.parameters())
    assert not optimizer.state
    again, *_ = zeroshard.initialize(model=model, optimizer=optimizer, config=config_of(stage))
    train(again, steps=1)


@on_ranks(2, (0, 1, 2))
def test_full_parameters_are_ordinary_again(stage: int) -> None:
    engine = make(stage)
    train(engine, steps=1)
    want = weights_of(engine)
    engine.destroy()
    model = engine.module
    model(batch(0)).sum().backward()
    assert all(param.grad is not None for param in model.parameters())
    assert_equal_weights({name: p.detach() for name, p in model.named_parameters()}, want)


@on_ranks(2)
def test_parameters_in_shards_can_be_gathered_after_their_engine_is_destroyed() -> None:
    engine = make(3)
    want = weights_of(engine)
    engine.destroy()
    with zeroshard.gathered(engine.module):
        assert_equal_weights({n: p.detach() for n, p in engine.module.named_parameters()}, want)
    with pytest.raises(UsageError, match=r"pass it to zeroshard\.initialize\(\) first"):
        engine.module(batch(0))


@on_ranks(2, STAGES)
def test_a_destroyed_engine_says_so_when_it_is_to_train(stage: int) -> None:
    engine = make(stage)
    loss = loss_of(engine)
    engine.destroy()
    with pytest.raises(UsageError, match=r"engine\.backward\(\) was called after"):
        engine.backward(loss)
    with pytest.raises(UsageError, match=r"engine\.step\(\) was called after engine\.destroy"):
        engine.step()
    with pytest.raises(UsageError, match=r"engine\(\.\.\.\) was called after engine\.destroy"):
        engine(batch(0))


@on_ranks(2, STAGES)
def test_an_engine_without_optimizer_gives_its_model_to_one_that_trains(stage: int) -> None:
    model = Net()
    judge, *_ = zeroshard.initialize(model=model, config=config_without("optimizer", stage))
    with torch.no_grad():
        judge(batch(0))
    engine, *_ = zeroshard.initialize(model=model, config=config_of(stage))
    other = make(stage)
    train(engine, steps=2)
    train(other, steps=2)
    assert_equal_weights(weights_of(engine), weights_of(other))
    with pytest.raises(UsageError, match="the model was given to another engine"):
        judge.check_present("judge")


@on_ranks(2, STAGES)
def test_an_engine_that_trains_keeps_its_model_from_one_that_does_not(stage: int) -> None:
    engine = make(stage)
    with pytest.raises(UsageError, match=r"which trains it(.|\n)*hint: (.|\n)*destroy\(\)"):
        zeroshard.initialize(model=engine.module, config=config_without("optimizer", stage))
    train(engine, steps=1)
    assert dist.is_initialized()


@on_ranks(2, STAGES)
def test_a_model_trains_in_the_last_engine_it_was_given_to(stage: int) -> None:
    """As when a trainer fits the same model twice."""
    whole, first = make(stage), make(stage)
    train(whole, steps=4)
    train(first, steps=2)
    with shown() as text:
        second, *_ = zeroshard.initialize(model=first.module, config=config_of(stage))
    assert "an engine that made 2 steps gives the model to a new one" in text()
    for number in (2, 3):
        second.backward(loss_of(second, number))
        second.step()
    assert_equal_weights(weights_of(second), weights_of(whole))
    with pytest.raises(UsageError, match="hint: use the engine that the last"):
        first.step()


@on_ranks(2, STAGES)
def test_an_engine_whose_hooks_were_cleared_gives_its_model_up(stage: int) -> None:
    engine = make(stage)
    train(engine, steps=1)
    want = weights_of(engine)
    for module in engine.module.modules():
        module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
    judge, *_ = zeroshard.initialize(model=engine.module, config=config_without("optimizer", stage))
    assert_equal_weights(weights_of(judge), want)
    with torch.no_grad():
        judge(batch(0))


@on_ranks(2, STAGES)
def test_a_model_whose_engine_is_gone_can_be_given_to_another(stage: int) -> None:
    engine = make(stage)
    train(engine, steps=1)
    want, model, gone = weights_of(engine), engine.module, weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None
    second, *_ = zeroshard.initialize(model=model, config=config_of(stage))
    assert_equal_weights(weights_of(second), want)
    train(second, steps=1)


@on_ranks(2, STAGES)
def test_an_engine_that_was_dropped_is_gone_on_all_ranks_alike(stage: int) -> None:
    model = make(stage).module  # the engine is a cycle, which ranks collect when they will
    if dist.get_rank() == 0:
        gc.collect()
    judge, *_ = zeroshard.initialize(model=model, config=config_without("optimizer", stage))
    with torch.no_grad():
        assert judge(batch(0)).isfinite().all()


@on_ranks(2, STAGES)
def test_an_engine_that_one_rank_alone_keeps_is_an_error_on_all(stage: int) -> None:
    engine = make(stage)
    model, kept = engine.module, [engine][: dist.get_rank()]
    del engine
    with pytest.raises(UsageError, match=r"another engine(.|\n)*destroy\(\)"):
        zeroshard.initialize(model=model, config=config_without("optimizer", stage))
    assert len(kept) == dist.get_rank()
