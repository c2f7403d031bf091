"""Blocks may be compiled, by either of the two ways that torch offers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

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
