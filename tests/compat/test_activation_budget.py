"""Models of transformers under an activation budget, which takes their own checkpointing over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import zeroshard
from architectures import ARCHITECTURES, Architecture
from forked import run_ranks
from zeroshard.engine.budget import GIB

Enable = Callable[[nn.Module], object]


def enable(model: Any, **options: Any) -> None:
    model.gradient_checkpointing_enable(**options)


def model_of(architecture: Architecture) -> Any:
    torch.manual_seed(0)
    return architecture.model_class(architecture.make_config())


def engine_of(model: nn.Module, budget: float | None) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": 3},
        "zeroshard": {"activation_budget": budget},
    }
    engine = zeroshard.initialize(model=model, config=config)[0]
    engine.train()
    return engine


def train(engine: Any, architecture: Architecture) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    for seed in range(3):
        torch.manual_seed(seed)
        engine.backward(engine(**architecture.batch(generator)).loss)
        engine.step()
    with zeroshard.gathered(engine.module):
        return {name: param.detach().clone() for name, param in engine.module.named_parameters()}


def test_layers_train_to_the_bits_they_have_with_checkpointing_of_their_own() -> None:
    """Whether that was switched on before the engine was made, after it, or not at all."""

    def check(architecture: Architecture) -> None:
        model = model_of(architecture)
        enable(model)
        want = train(engine_of(model, None), architecture)

        engine = engine_of(model_of(architecture), 1)
        found = [train(engine, architecture)]
        whole = engine.activation_plan
        assert whole.num_kept == whole.num_blocks > 1
        budget = (GIB - whole.most_bytes + 0.7 * whole.kept_bytes) / GIB

        model = model_of(architecture)
        enable(model, gradient_checkpointing_kwargs={"use_reentrant": True})
        engine = engine_of(model, budget)
        found.append(train(engine, architecture))
        assert 0 < engine.activation_plan.num_kept < whole.num_blocks

        engine = engine_of(model_of(architecture), 0)
        enable(engine.module, every_n_layers=2)
        found.append(train(engine, architecture))
        assert engine.activation_plan.num_kept == 0
        for got in found:
            assert all(torch.equal(got[key], want[key]) for key in want)

    def work(rank: int, world: int) -> None:
        for name in ("llama", "qwen3_moe", "t5", "clip"):
            check(ARCHITECTURES[name])

    run_ranks(work, 1)


def test_a_model_has_its_own_switches_again_when_the_engine_is_gone() -> None:
    def work(rank: int, world: int) -> None:
        architecture = ARCHITECTURES["llama"]
        for is_enabled in (True, False):
            model = model_of(architecture)
            if is_enabled:
                enable(model)
            layer = model.model.layers[0]
            before = dict(vars(layer))
            engine = engine_of(model, 0)
            assert vars(layer)["gradient_checkpointing"]
            train(engine, architecture)
            model.eval()
            generated = model.generate(torch.tensor([[3, 5]]), max_new_tokens=3, do_sample=False)
            assert generated.shape == (1, 5)
            engine.destroy()
            for name in ("gradient_checkpointing", "_gradient_checkpointing_func", "forward"):
                assert vars(layer).get(name) is before.get(name), name
            # An engine that nobody ended, followed by one without a budget.
            train(engine_of(model, 0), architecture)
            again = engine_of(model, None)
            for name in ("gradient_checkpointing", "_gradient_checkpointing_func", "forward"):
                assert vars(layer).get(name) is before.get(name), name
            again.destroy()

    run_ranks(work, 1)
