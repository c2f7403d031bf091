"""Calls of scripts written for DeepSpeed on the engine, beside those of the training loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import zeroshard
from unit.engine.small import (
    LR,
    STAGES,
    Block,
    Net,
    assert_equal_weights,
    batch,
    loss_of,
    make,
    on_ranks,
    train,
    weights_of,
)
from zeroshard import ConfigError, DistributedError, UsageError
from zeroshard.engine.data import RepeatingLoader

SAVING = "stage3_gather_16bit_weights_on_model_save"


def sgd(numbers: list[list[int]], over: int) -> dict[str, Tensor]:
    """What SGD makes of groups of batches, the gradients of each divided by a number."""
    model = Net()
    for group in numbers:
        model.zero_grad()
        for number in group:
            (loss_of(model, number) / over).backward()
        with torch.no_grad():
            for param in model.parameters():
                param -= LR * param.grad
    return {name: param.detach() for name, param in model.named_parameters()}


# Batches ----------------------------------------------------------------------------------------


@on_ranks(2, STAGES)
def test_the_batch_size_changes_the_number_of_micro_steps(stage: int) -> None:
    engine = make(stage)
    assert engine.get_batch_info() == (2, 1, 1)
    train(engine, 1)
    engine.set_train_batch_size(4)
    assert engine.get_batch_info() == (4, 1, 2)
    for number in (1, 2):
        engine.backward(loss_of(engine, number))
        engine.step()
    assert (engine.global_steps, engine.global_samples) == (2, 6)
    want = Net()
    want.load_state_dict(sgd([[0]], 1))
    for number in (1, 2):
        (loss_of(want, number) / 2).backward()
    plain = {name: p.detach() - LR * p.grad for name, p in want.named_parameters()}
    assert_equal_weights(weights_of(engine), plain)
    engine.set_train_micro_batch_size(3)
    assert engine.get_batch_info() == (12, 3, 2)
    assert engine.config["train_batch_size"] == 12


@on_ranks(2)
def test_a_batch_size_that_does_not_come_out_is_refused_with_those_that_do() -> None:
    engine = make(2, train_micro_batch_size_per_gpu=2)
    with pytest.raises(ConfigError, match=r"train_batch_size 6 is not a multiple(.|\n)*4 or 8"):
        engine.set_train_batch_size(6)
    with pytest.raises(ConfigError, match="at least 1"):
        engine.set_train_micro_batch_size(0)
    assert engine.get_batch_info() == (4, 2, 1)


@on_ranks(2, STAGES)
def test_the_batch_size_stays_within_an_accumulation(stage: int) -> None:
    engine = make(stage, gradient_accumulation_steps=2)
    engine.backward(loss_of(engine))
    with pytest.raises(UsageError, match=r"after 0 of 2 micro-steps(.|\n)*right after"):
        engine.set_train_batch_size(8)
    engine.step()
    with pytest.raises(UsageError, match="after 1 of 2 micro-steps"):
        engine.set_train_micro_batch_size(8)


@on_ranks(2, STAGES)
def test_micro_steps_may_be_coalesced_into_one_step(stage: int) -> None:
    engine = make(stage, gradient_accumulation_steps=2)
    for numbers in ((0, 1), (2, 3)):
        with engine.coalesce_grad_reduction():
            for number in numbers:
                engine.backward(loss_of(engine, number))
        engine.step()
    assert engine.global_steps == 2
    assert_equal_weights(weights_of(engine), sgd([[0, 1], [2, 3]], over=2))


# Answers ----------------------------------------------------------------------------------------


@on_ranks(2, STAGES)
def test_an_engine_answers_by_the_names_that_scripts_use(stage: int) -> None:
    engine = make(stage, gradient_clipping=0.5)
    assert engine.zero_optimization_stage() == stage
    assert engine.zero_optimization() is (stage > 0)
    assert engine.config["zero_optimization"]["stage"] == stage
    assert (engine.dp_world_size, engine.mp_world_size) == (2, 1)
    assert engine.gradient_clipping() == 0.5
    assert engine.basic_optimizer is engine.optimizer.optimizer
    assert engine.loaded_checkpoint_dp_world_size is None
    assert not engine.fp16_enabled()
    assert not engine.bfloat16_enabled()
    assert not engine.dynamic_loss_scale()
    assert engine.steps_per_print() is None
    assert (engine.optimizer_name(), engine.optimizer_params()) == ("SGD", {"lr": LR})
    assert engine.scheduler_name() is engine.scheduler_params() is None
    assert engine.zero_optimization_partition_gradients() is (stage >= 2)
    assert engine.zero_optimization_partition_weights() is (stage >= 3)
    assert engine.zero_reduce_scatter() is engine.postscale_gradients() is True
    assert engine.zero_sub_group_size() is engine.communication_data_type is None
    engine.allreduce_gradients()
    assert (engine.get_lr(), engine.get_mom(), engine.get_type()) == ([LR], [0], [0.0])
    assert engine.train() is engine.eval() is engine
    assert not engine.module.training


def test_an_engine_that_is_not_made_yet_has_no_attributes() -> None:
    assert not hasattr(zeroshard.Engine.__new__(zeroshard.Engine), "anything")


@on_ranks(1)
def test_momentum_is_that_of_the_optimizer_or_its_betas() -> None:
    adam = {"type": "Adam", "params": {"betas": [0.8, 0.9]}}
    assert make(optimizer=adam).get_mom() == [(0.8, 0.9)]
    assert make(optimizer={"type": "SGD", "params": {"lr": 1, "momentum": 0.7}}).get_mom() == [0.7]
    assert make(fp16={"enabled": True}).dynamic_loss_scale()
    assert not make(fp16={"enabled": True, "loss_scale": 8}).dynamic_loss_scale()
    assert make(bf16={"enabled": True}).bfloat16_enabled()


@pytest.mark.parametrize("more", [{}, {"fp16": {"enabled": True, "initial_scale_power": 8}}])
@on_ranks(2, STAGES)
def test_a_scaled_loss_may_run_backward_itself(more: dict[str, Any], stage: int) -> None:
    engine, other = make(stage, **more), make(stage, **more)
    half = batch(0, engine.module.head.weight.dtype)
    engine.scale((engine(half).float() - 1).square().mean()).backward()
    other.backward((other(half).float() - 1).square().mean())
    engine.step()
    other.step()
    assert_equal_weights(weights_of(engine), weights_of(other))


# Loaders ----------------------------------------------------------------------------------------


@on_ranks(2)
def test_a_loader_is_made_like_the_one_of_initialize() -> None:
    engine = make(train_micro_batch_size_per_gpu=2)
    data = TensorDataset(torch.arange(8))
    mine = torch.cat([batch for (batch,) in engine.deepspeed_io(data)])
    pieces: list[Any] = [None, None]
    dist.all_gather_object(pieces, mine)
    assert sorted(torch.cat(pieces).tolist()) == list(range(8))
    (whole,) = engine.deepspeed_io(data, batch_size=8, route="eval")
    assert whole[0].tolist() == list(range(8))
    (some,) = engine.deepspeed_io(data, data_sampler=[5, 3], num_local_io_workers=0)  # type: ignore
    assert some[0].tolist() == [5, 3]
    engine.set_dataloader(data)
    assert engine.training_dataloader is data


def test_a_repeating_loader_begins_again_after_the_last_batch() -> None:
    loader = RepeatingLoader([1, 2, 3])
    assert [next(loader) for _ in range(7)] == [1, 2, 3, 1, 2, 3, 1]
    assert len(loader) == 3
    for used_up in (RepeatingLoader([]), RepeatingLoader(iter([1]))):
        with pytest.raises(UsageError, match="iterated again"):
            [next(used_up) for _ in range(2)]


# Weights in full --------------------------------------------------------------------------------


class Rich(Net):
    """Has a buffer, one that is not saved, a tied weight, a frozen one, and state of its own."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.blocks[1].up.weight = self.blocks[0].up.weight
        self.blocks[0].down.bias.requires_grad_(False)
        self.register_buffer("seen", torch.tensor(seed))
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"version": 3}


@on_ranks(3, STAGES)
def test_a_state_dict_in_full_is_that_of_the_model_on_rank_0(stage: int) -> None:
    engine, want = make(stage, Rich()), Rich().state_dict()
    state = engine.module_state_dict()
    consolidated = engine._zero3_consolidated_16bit_state_dict()
    assert (consolidated is None) == (dist.get_rank() > 0)
    assert list(state) == ([] if dist.get_rank() else list(want))
    assert not any(unit.is_full and not unit.lifetime.params_stay for unit in engine.runtime.units)
    if state:
        extra, tensors = state.pop("_extra_state"), dict(state)
        assert extra == want.pop("_extra_state")
        assert_equal_weights(tensors, want)
        assert state["blocks.0.up.weight"] is state["blocks.1.up.weight"]
    few = engine.module_state_dict(exclude_frozen_parameters=True)
    assert ("blocks.0.down.bias" in few, "blocks.0.up.bias" in few) == (
        False,
        dist.get_rank() == 0,
    )


@on_ranks(3, STAGES)
def test_a_state_dict_is_loaded_on_all_ranks_from_rank_0(stage: int) -> None:
    engine = make(stage, Rich())
    other = Rich(seed=1)
    engine.load_module_state_dict(other.state_dict() if dist.get_rank() == 0 else None)
    want = {name: param.detach() for name, param in other.named_parameters()}
    assert_equal_weights(weights_of(engine), want)
    assert engine.module.seen.item() == 1
    engine.backward(0 * loss_of(engine))
    engine.step()
    assert_equal_weights(weights_of(engine), want)
    engine.load_module_state_dict(
        {}, custom_load_fn=lambda src, dst: dst.load_state_dict(Rich(seed=2).state_dict())
    )
    assert_equal_weights(weights_of(engine), dict(Rich(seed=2).named_parameters()))


@on_ranks(2, STAGES)
def test_a_state_dict_that_does_not_fit_is_refused_on_every_rank(stage: int) -> None:
    engine = make(stage)
    state = Net(seed=1).state_dict()
    state["head.weight"] = torch.ones(2, 2)
    state["tail.weight"] = torch.ones(2, 2)
    del state["blocks.0.up.bias"]
    error = UsageError if dist.get_rank() == 0 else DistributedError
    asks = "size mismatch for head.weight|rank 0 could not load the weights"
    with pytest.raises(error, match=asks) as raised:
        engine.load_module_state_dict(state)
    if dist.get_rank() == 0:
        assert "no blocks.0.up.bias" in str(raised.value)
        assert "unknown tail.weight" in str(raised.value)
    del state["head.weight"]
    engine.load_module_state_dict(state, strict=False)
    train(engine)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@on_ranks(2, STAGES)
def test_weights_are_written_by_rank_0_in_the_dtype_computed_in(
    name: str, tmp_path: Path, stage: int
) -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.blocks[1].up.weight = self.blocks[0].up.weight

    engine = make(
        stage,
        Tied(),
        bf16={"enabled": True},
        zero_optimization={"stage": stage, SAVING: True},
    )
    folder = tmp_path / f"new{stage}"
    assert engine.save_16bit_model(str(folder), name) is True
    assert [path.name for path in folder.iterdir()] == [name]
    path = folder / name
    saved = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    assert_equal_weights(saved, Tied().bfloat16().state_dict())


@on_ranks(2)
def test_freed_weights_are_gathered_for_saving_only_if_that_is_configured(tmp_path: Path) -> None:
    engine = make(3)
    assert engine.save_fp16_model(tmp_path) is False
    assert list(tmp_path.iterdir()) == []


@on_ranks(2, (0, 3))
def test_a_file_that_cannot_be_written_is_an_error_on_every_rank(
    tmp_path: Path, stage: int
) -> None:
    engine = make(stage, zero_optimization={"stage": stage, SAVING: True})
    taken = tmp_path / "taken"
    taken.touch()
    with pytest.raises(FileExistsError if dist.get_rank() == 0 else DistributedError):
        engine.save_16bit_model(taken)
    train(engine)


@on_ranks(2)
def test_saving_holds_one_unit_at_a_time_on_the_device() -> None:
    """Six blocks; while one is gathered no other is."""
    model = nn.Sequential(*(Block() for _ in range(6)))
    engine = make(3, model)
    full: list[int] = []
    for unit in engine.runtime.units:
        gather = unit.gather

        def counted(gather: Any = gather) -> None:
            gather()
            full.append(sum(each.is_full for each in engine.runtime.units))

        unit.gather = counted
    engine.module_state_dict()
    assert full == [1] * 6
