"""Blocks may be compiled: by the engine, or by the user in either of the two ways of torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import zeroshard
from forked import run_ranks
from reference import Setting, compare
from zoo import ZOO, Case, Checkpointing

# Tracing looks at the gradient of every input, those that are no leaves included.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


def compile_forward(block: nn.Module) -> None:
    """Compiles what lies between the hooks."""
    block.forward = torch.compile(block.forward, backend="aot_eager")


def compile_call(block: nn.Module) -> None:
    """Compiles the whole call, hooks included."""
    block.compile(backend="aot_eager")


def compiled(case: Case, compile_block: Callable[[nn.Module], None]) -> Case:
    def build(seed: int, checkpointing: Checkpointing = "none") -> nn.Module:
        model = case.build(seed, checkpointing)
        for block in dict.fromkeys(model.blocks):
            compile_block(block)
        return model

    return replace(case, build=build)


# aot_eager runs the same kernels, but it cuts the joint graph where it likes and adds gradients up
# in its own order, so the comparison is with the compiled model in plain PyTorch.
@pytest.mark.parametrize(
    ("name", "stage", "compile_block"),
    [
        ("block_called_twice", 3, compile_forward),
        ("frozen_weight_in_each_block", 1, compile_call),
        ("low_rank_adapters", 3, compile_forward),
        ("tied_head", 2, compile_call),
        ("tied_head", 3, compile_call),
    ],
)
def test_compiled_blocks_train_as_in_plain_pytorch(
    name: str, stage: int, compile_block: Callable[[nn.Module], None]
) -> None:
    case = compiled(ZOO[name], compile_block)
    settings = [
        Setting(stage, world=2, accumulation=2, checkpointing=checkpointing)
        for checkpointing in ("none", "non_reentrant")
    ]
    for comparison in compare(case, settings, timeout=100):
        assert comparison.differences == []


def test_transformers_train_and_evaluate_with_one_graph_for_layers_and_one_for_the_loss() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 32}
    layout = {"num_hidden_layers": 5, "num_attention_heads": 2, "num_key_value_heads": 1}

    def rank(rank: int, _: int) -> None:
        results: list[list[Tensor]] = []
        generator = torch.Generator().manual_seed(rank)
        ids = torch.randint(0, 32, (3, 2, 8), generator=generator)
        for backend in (None, CompileCounterWithBackend("aot_eager")):
            torch.manual_seed(0)
            model = LlamaForCausalLM(LlamaConfig(**sizes, **layout, use_cache=False))
            model.gradient_checkpointing_enable({"use_reentrant": False})
            config = {
                "train_micro_batch_size_per_gpu": 2,
                "bf16": {"enabled": True},
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
                "zero_optimization": {"stage": 3},
            }
            engine, *_ = zeroshard.initialize(model=model, config=config)
            if backend is not None:
                engine.compile(backend)
            made: list[Tensor] = []
            for batch in ids:
                loss = engine(input_ids=batch, labels=batch).loss
                engine.backward(loss)
                engine.step()
                made.append(loss.detach())
            if backend is not None:
                assert backend.frame_count == 2
            engine.eval()
            model.gradient_checkpointing_disable()
            with torch.no_grad():
                made.append(engine(input_ids=ids[0], labels=ids[0]).loss)
                options = {"max_new_tokens": 3, "do_sample": False, "use_cache": True}
                made.append(engine.module.generate(input_ids=ids[0], pad_token_id=0, **options))
            if backend is not None:
                assert backend.frame_count == 5
            results.append(made)
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)

    run_ranks(rank)


def test_layers_that_fill_a_cache_while_they_train_are_not_compiled_and_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sizes = {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 32, "n_positions": 8}

    def rank(_: int, __: int) -> None:
        backend = CompileCounterWithBackend("eager")
        engine, *_ = zeroshard.initialize(
            model=GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)),
            config={"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}},
        )
        engine.compile(backend)
        caplog.clear()
        ids = torch.arange(8)[None]
        for _ in range(2):
            engine(input_ids=ids)
        (text,) = [record.getMessage() for record in caplog.records]
        assert text.startswith("GPT2Block runs uncompiled")
        assert "use_cache = False" in text
        assert backend.frame_count == 0
        engine.module.config.use_cache = False
        engine(input_ids=ids)
        assert backend.frame_count == 1

    run_ranks(rank, 1)


@pytest.mark.parametrize("stage", [3])
def test_a_whole_compiled_model_trains_as_in_plain_pytorch(stage: int) -> None:
    case = ZOO["plain"]

    def build(seed: int, checkpointing: Checkpointing = "none") -> nn.Module:
        model = case.build(seed, checkpointing)
        model.compile(backend="aot_eager")
        return model

    settings = [Setting(stage, world=2, accumulation=2)]
    for comparison in compare(replace(case, build=build), settings, timeout=100):
        assert comparison.differences == []
