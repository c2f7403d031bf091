"""What a script gets to see that does something it should not: the guide's table, row by row.

Each row is provoked here, and its error holds the words that the guide quotes.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import deepspeed
from forked import run_ranks
from unit.engine.small import Net, batch, config_of, loss_of, train, weights_of

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "misuse.md"
ALL = (0, 1, 2, 3)
KEPT = (0, 1, 2)  # where full parameters stay
BF16 = {"bf16": {"enabled": True}}


@dataclass(frozen=True)
class Row:
    """What a script does at some stages; None is returned where it works."""

    did: str
    stages: Sequence[int]
    run: Callable[[int], None]


ROWS: list[Row] = []


def row(did: str, *stages: int) -> Callable[[Callable[[int], None]], Callable[[int], None]]:
    def add(run: Callable[[int], None]) -> Callable[[int], None]:
        ROWS.append(Row(did, stages or ALL, run))
        return run

    return add


def engine_of(stage: int, model: Any = None, **more: Any) -> Any:
    config = config_of(stage, **more)
    return deepspeed.initialize(model=Net() if model is None else model, config=config)[0]


def given(stage: int, model: nn.Module, optimizer: Any, **more: Any) -> Any:
    """An engine with the script's own optimizer."""
    config = config_of(stage)
    del config["optimizer"]
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, **more)[0]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.125)


def moved(engine: Any, run: Callable[[], object]) -> bool:
    """Whether the weights are others afterwards."""
    before = weights_of(engine)
    run()
    return not torch.equal(weights_of(engine)["head.weight"], before["head.weight"])


# Steps -------------------------------------------------------------------------------------------


@row("called the model instead of the engine, and `loss.backward()`")
def _(stage: int) -> None:
    engine = engine_of(stage)

    def step() -> None:
        loss_of(engine.module).backward()
        engine.step()

    assert moved(engine, step)


@row("stepped an optimizer that `initialize` was not given")
def _(stage: int) -> None:
    model = Net()
    optimizer = sgd(model)
    engine = engine_of(stage, model)
    loss_of(engine).backward()
    optimizer.step()


@row("stepped the optimizer that `initialize` was given, not the one it returned")
def _(stage: int) -> None:
    model = Net()
    optimizer = sgd(model)
    loss_of(given(stage, model, optimizer)).backward()
    optimizer.step()


@row("stepped the optimizer that `initialize` returned, instead of the engine")
def _(stage: int) -> None:
    engine = engine_of(stage)

    def step() -> None:
        engine.backward(loss_of(engine))
        engine.optimizer.step()

    assert moved(engine, step)


@row("called `engine.step()` without a backward")
def _(stage: int) -> None:
    engine_of(stage).step()


@row("called `engine.backward()` twice on one loss")
def _(stage: int) -> None:
    engine = engine_of(stage)
    loss = loss_of(engine)
    engine.backward(loss)
    engine.backward(loss)


@row("passed a loss to `engine.backward()` that was computed under `no_grad`")
def _(stage: int) -> None:
    engine = engine_of(stage)
    with torch.no_grad():
        loss = loss_of(engine)
    engine.backward(loss)


@row("scaled the loss with torch's `GradScaler`, and called `scaler.step(optimizer)`")
def _(stage: int) -> None:
    engine, scaler = engine_of(stage), torch.amp.GradScaler("cpu")
    engine.backward(scaler.scale(loss_of(engine)))
    scaler.step(engine.optimizer)


@row("stepped the schedule that the engine steps")
def _(stage: int) -> None:
    model = Net()
    optimizer = sgd(model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    engine = given(stage, model, optimizer, lr_scheduler=schedule)
    for number in range(3):
        engine.backward(loss_of(engine, number))
        engine.step()
        schedule.step()


@row("called `zero_grad()` of the optimizer to drop a batch")
def _(stage: int) -> None:
    model = Net()
    optimizer = sgd(model)
    engine = given(stage, model, optimizer)
    engine.backward(loss_of(engine, 5))
    optimizer.zero_grad()
    other = engine_of(stage)
    train(engine, 1)
    train(other, 1)
    assert torch.equal(weights_of(engine)["head.weight"], weights_of(other)["head.weight"])


# The model after initialize ----------------------------------------------------------------------


@row("gave one model to two engines, and went on with the first")
def _(stage: int) -> None:
    model = Net()
    first = engine_of(stage, model)
    train(engine_of(stage, model), 1)
    train(first, 1)


@row("used an engine after `destroy()`")
def _(stage: int) -> None:
    engine = engine_of(stage)
    loss = loss_of(engine)
    engine.destroy()
    engine.backward(loss)


@row("cast the model with `half()`", *KEPT)
def _(stage: int) -> None:
    engine = engine_of(stage)
    engine.half()
    train(engine, 1)


@row("cast the model with `half()`", 3)
def _(stage: int) -> None:
    engine_of(stage).half()


@row("froze layers with `requires_grad_(False)`")
def _(stage: int) -> None:
    engine = engine_of(stage)
    engine.module.head.requires_grad_(False)
    train(engine, 1)


@row("replaced a layer, or added one")
def _(stage: int) -> None:
    engine = engine_of(stage)
    engine.module.head = nn.Linear(4, 3)
    train(engine, 1)


@row("edited a parameter in place, on every rank", *KEPT)
def _(stage: int) -> None:
    engine = engine_of(stage, **BF16)
    with torch.no_grad():
        engine.module.head.weight.fill_(1)
    engine.backward((engine(batch(0).bfloat16()) - 1).square().mean())
    engine.step()
    weight = weights_of(engine)["head.weight"]
    assert (weight - 1).abs().max() < 0.25


@row("edited a parameter in place", 3)
def _(stage: int) -> None:
    with torch.no_grad():
        engine_of(stage).module.head.weight.fill_(1)


@row("edited a parameter on one rank", *KEPT)
def _(stage: int) -> None:
    engine = engine_of(stage)
    if dist.get_rank() == 0:
        with torch.no_grad():
            engine.module.head.weight.fill_(1)
    train(engine, 1)


@row("edited 16-bit weights through `.data`", *KEPT)
def _(stage: int) -> None:
    engine = engine_of(stage, **BF16)
    engine.module.head.weight.data.fill_(1)
    engine.backward((engine(batch(0).bfloat16()) - 1).square().mean())
    engine.step()


@row("edited a parameter through `.data`", 3)
def _(stage: int) -> None:
    engine_of(stage).module.head.weight.data.fill_(1)


@row("edited a parameter inside `GatheredParameters` without a `modifier_rank`")
def _(stage: int) -> None:
    engine = engine_of(stage)
    with deepspeed.zero.GatheredParameters(engine.module.parameters()), torch.no_grad():
        engine.module.head.weight.fill_(1)


# Saving ------------------------------------------------------------------------------------------


@row("called `model.state_dict()`, or `torch.save(model)`", *KEPT)
def _(stage: int) -> None:
    engine = engine_of(stage)
    file = io.BytesIO()
    torch.save(engine.module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(batch(0)), engine.module(batch(0)))
    assert engine.module.state_dict().keys() == Net().state_dict().keys()


@row("saved `model.state_dict()`", 3)
def _(stage: int) -> None:
    torch.save(engine_of(stage).module.state_dict(), io.BytesIO())


@row("called `torch.save(model)`", 3)
def _(stage: int) -> None:
    torch.save(engine_of(stage).module, io.BytesIO())


@row("called `model.load_state_dict()`", 3)
def _(stage: int) -> None:
    engine_of(stage).module.load_state_dict(Net().state_dict())


@row("called `save_pretrained` outside `GatheredParameters`", 3)
def _(stage: int) -> None:
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    engine_of(stage, LlamaForCausalLM(config)).module.save_pretrained("never-made")


@row("pickled or copied the engine")
def _(stage: int) -> None:
    torch.save(engine_of(stage), io.BytesIO())


# What initialize is given ------------------------------------------------------------------------


@row("enabled both fp16 and bf16")
def _(stage: int) -> None:
    engine_of(stage, fp16={"enabled": True}, **BF16)


@row("wrapped the model in DistributedDataParallel")
def _(stage: int) -> None:
    engine_of(stage, nn.parallel.DistributedDataParallel(Net()))


@row("passed a tuple or a list of models")
def _(stage: int) -> None:
    engine_of(stage, (Net(), Net()))


@row("passed an optimizer of another model")
def _(stage: int) -> None:
    given(stage, Net(), sgd(Net()))


@row("passed a model on the meta device")
def _(stage: int) -> None:
    with torch.device("meta"):
        model = Net()
    engine_of(stage, model)


# Ranks and memory --------------------------------------------------------------------------------


@row("ran forward on some ranks only", 3)
def _(stage: int) -> None:
    os.environ["ZEROSHARD_TIMEOUT"] = "0.01"  # minutes
    engine = engine_of(stage)
    if dist.get_rank() == 0:
        loss_of(engine)
    raise AssertionError  # what is looked at is rank 0


@row("ran out of memory")
def _(stage: int) -> None:
    class Large(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    engine = engine_of(stage, Large(), train_micro_batch_size_per_gpu=4)
    try:
        loss_of(engine)
    except torch.OutOfMemoryError as error:
        # Programs that look for a batch that fits still know it.
        assert should_reduce_batch_size(error)
        assert '"gradient_accumulation_steps": 4' in str(error)
        raise


# The table ---------------------------------------------------------------------------------------


def table() -> list[tuple[str, tuple[int, ...], str]]:
    """What was done, at which stages, and what is seen, as the guide has it."""
    rows: list[tuple[str, tuple[int, ...], str]] = []
    for line in GUIDE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|") or len(cells) != 3 or not re.match(r"\d|all", cells[1]):
            continue
        first, _, last = cells[1].partition(" to ")
        stages = ALL if first == "all" else tuple(range(int(first), int(last or first) + 1))
        rows.append((cells[0], stages, cells[2]))
    return rows


def test_the_guide_has_a_row_for_each_mistake_that_is_tried_here() -> None:
    assert [row[:2] for row in table()] == [(row.did, tuple(row.stages)) for row in ROWS]


def quoted(text: str) -> list[str]:
    return [part.replace("\\", "") for part in re.findall(r"`([^`]+)`", text)]


@pytest.mark.parametrize("number", range(len(ROWS)), ids=lambda number: ROWS[number].did[:60])
def test_what_the_guide_says_is_what_is_seen(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    case, seen = ROWS[number], table()[number][2]

    def work(rank: int, world: int) -> list[str]:
        texts: list[str] = []
        for stage in case.stages:
            try:
                case.run(stage)
                texts.append("works")
            except Exception as error:
                texts.append(f"{type(error).__name__}: {error}")
        return texts

    for text in run_ranks(work)[0]:
        if seen.startswith("works"):
            assert text == "works"
        else:
            assert "hint: " in text
            for words in quoted(seen):
                assert words in text
    assert not list(tmp_path.rglob("*.safetensors"))
