"""``deepspeed.checkpointing``, and models of transformers that checkpoint their own layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import deepspeed
from forked import run_ranks

STAGES = (1, 2, 3)
LAYERS = 2

Switch = Callable[[GPT2LMHeadModel], object]

SWITCHES: dict[str, Switch] = {
    "as it is by default": lambda model: model.gradient_checkpointing_enable(),
    "reentrant": lambda model: model.gradient_checkpointing_enable({"use_reentrant": True}),
    "not reentrant": lambda model: model.gradient_checkpointing_enable({"use_reentrant": False}),
    "every second layer": lambda model: model.gradient_checkpointing_enable(every_n_layers=2),
    "by deepspeed.checkpointing": lambda model: model._set_gradient_checkpointing(
        gradient_checkpointing_func=deepspeed.checkpointing.checkpoint
    ),
}


def config(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }


def gpt(**options: Any) -> GPT2LMHeadModel:
    """A model with dropout at three places."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64,
            n_embd=32,
            n_layer=LAYERS,
            n_head=2,
            n_positions=8,
            bos_token_id=0,
            eos_token_id=0,
            **options,
        )
    )


def train(model: nn.Module, stage: int, loss_of: Callable[[Any, Tensor], Tensor]) -> list[float]:
    """Losses and gradient norms of three steps, and the next random number."""
    engine, *_ = deepspeed.initialize(model=model, config=config(stage))
    torch.manual_seed(10 + dist.get_rank())
    numbers = []
    for _ in range(6):
        loss = loss_of(engine, torch.randint(64, (2, 8)))
        engine.backward(loss)
        engine.step()
        numbers += [loss.item(), float(engine.get_global_grad_norm() or 0)]
    engine.destroy()
    return [*numbers, torch.rand(()).item()]


def test_a_model_that_checkpoints_its_layers_trains_to_the_numbers_it_has_without() -> None:
    """Whichever way it does so, with dropout, at every stage."""

    def language(engine: Any, ids: Tensor) -> Tensor:
        return engine(input_ids=ids, labels=ids).loss

    def work(rank: int, world: int) -> None:
        for stage in STAGES:
            want = train(gpt(), stage, language)
            for way, switch in SWITCHES.items():
                model = gpt()
                switch(model)
                assert model.is_gradient_checkpointing, way
                got = train(model, stage, language)
                assert got == pytest.approx(want, rel=1e-5), (stage, way)
                assert got[-1] == want[-1], (stage, way)

    run_ranks(work)


class Layers(nn.Module):
    """A model of a script's own, which checkpoints as Megatron's do, dropout streams included."""

    def __init__(self, checkpoint: Callable[..., Any] | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.checkpoint = checkpoint
        self.config = GPT2Config(n_layer=3)
        self.embedding = nn.Embedding(64, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(self.config.num_hidden_layers))
        self.head = nn.Linear(16, 64)

    @staticmethod
    def block(layer: nn.Module, h: Tensor, mask: Tensor) -> Tensor:
        with deepspeed.checkpointing.get_cuda_rng_tracker().fork():
            inner = F.dropout(torch.tanh(layer(h)), 0.2)
        return h + F.dropout(inner * mask, 0.1)

    def forward(self, ids: Tensor) -> Tensor:
        h, mask = self.embedding(ids), (ids > 3).unsqueeze(-1)
        for layer in self.layers:
            if self.checkpoint is None:
                h = self.block(layer, h, mask)
            else:
                h = self.checkpoint(self.block, layer, h, mask)
        return F.cross_entropy(self.head(h).flatten(0, 1), ids.flatten())


def by_class(function: Callable[..., Tensor], *args: Any) -> Any:
    outputs: list[Tensor] = []
    returned = deepspeed.checkpointing.CheckpointFunction.apply(function, outputs, *args)
    assert outputs == [returned]
    return returned


def test_a_script_configures_and_checkpoints_as_tutorials_print_it() -> None:
    def work(rank: int, world: int) -> None:
        checkpointing = deepspeed.checkpointing

        def numbers(checkpoint: Callable[..., Any] | None, stage: int) -> list[float]:
            checkpointing.model_parallel_cuda_manual_seed(1234 + rank)
            got = train(Layers(checkpoint), stage, lambda engine, ids: engine(ids))
            with checkpointing.get_cuda_rng_tracker().fork():
                return [*got, torch.rand(()).item()]

        for stage in STAGES:
            want = numbers(None, stage)
            model = Layers(None)
            deepspeed.checkpointing.configure(num_checkpoints=model.config.num_hidden_layers)
            assert checkpointing.is_configured()
            for checkpoint in (
                checkpointing.checkpoint,
                checkpointing.non_reentrant_checkpoint,
                by_class,
            ):
                assert numbers(checkpoint, stage) == want
            checkpointing.configure(
                None, {"activation_checkpointing": {"cpu_checkpointing": True}, **config(stage)}
            )
            assert numbers(checkpointing.checkpoint, stage) == want
            checkpointing.reset()

    run_ranks(work)


def test_configure_takes_every_argument_of_deepspeed() -> None:
    assert [*inspect.signature(deepspeed.checkpointing.configure).parameters] == [
        *("mpu_", "deepspeed_config", "partition_activations", "contiguous_checkpointing"),
        *("num_checkpoints", "checkpoint_in_cpu", "synchronize", "profile"),
    ]

    def work(rank: int, world: int) -> None:
        checkpointing = deepspeed.checkpointing
        assert not checkpointing.is_configured()
        checkpointing.configure(
            None,
            deepspeed_config=config(1),
            partition_activations=True,
            contiguous_checkpointing=True,
            num_checkpoints=4,
            checkpoint_in_cpu=True,
            synchronize=True,
            profile=True,
        )
        checkpointing.partition_activations_in_checkpoint(False)
        checkpointing.set_num_layers(3)
        x = torch.ones(4, requires_grad=True)
        checkpointing.checkpoint(torch.exp, x * 1).sum().backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad, torch.exp(x.detach()))

    run_ranks(work, 1)


def test_the_tracker_is_there_by_megatrons_names() -> None:
    """Streams are added, left, saved with a checkpoint and set again after it is loaded."""
    tracker = deepspeed.checkpointing.CudaRNGStatesTracker()
    tracker.add("model-parallel-rng", 7)
    states = tracker.get_states()
    before = torch.get_rng_state()
    with tracker.fork():
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    with tracker.fork():
        assert not torch.equal(torch.rand(3), first)
    tracker.set_states(states)
    with tracker.fork():
        assert torch.equal(torch.rand(3), first)
    tracker.reset()
    assert tracker.get_states() == {}
    assert type(deepspeed.checkpointing.get_cuda_rng_tracker()) is type(tracker)
    from deepspeed.runtime.activation_checkpointing import checkpointing

    assert checkpointing.get_cuda_rng_tracker is deepspeed.checkpointing.get_cuda_rng_tracker
