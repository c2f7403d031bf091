"""Accelerate as it is released, with its DeepSpeed plugin, on zeroshard."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import bitsandbytes  # noqa: F401 - Accelerate imports it where it is, and ranks share this import
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, ParallelismConfig, PartialState
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    DummyOptim,
    DummyScheduler,
    TorchDynamoPlugin,
)
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper, DeepSpeedSchedulerWrapper
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations import is_deepspeed_zero3_enabled

import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine
from forked import run_ranks
from zeroshard.errors import UsageError
from zeroshard.optim import WarmupDecayLR

RATE = 1e-2
AUTO = "auto"
OPTIMIZER = {"type": "AdamW", "params": {"lr": AUTO, "weight_decay": AUTO}}
SCHEDULER = {
    "type": "WarmupDecayLR",
    "params": {
        "warmup_min_lr": AUTO,
        "warmup_max_lr": AUTO,
        "warmup_num_steps": AUTO,
        "total_num_steps": AUTO,
    },
}


def config_of(stage: int, **more: object) -> dict[str, Any]:
    """Give a file for this stage whose every open value is filled by Accelerate."""
    return {
        "train_batch_size": AUTO,
        "train_micro_batch_size_per_gpu": AUTO,
        "gradient_accumulation_steps": AUTO,
        "gradient_clipping": AUTO,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": AUTO,
            "stage3_prefetch_bucket_size": AUTO,
            "stage3_param_persistence_threshold": AUTO,
            "stage3_gather_16bit_weights_on_model_save": AUTO,
        },
        **more,
    }


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def samples(number: int = 16) -> list[dict[str, Tensor]]:
    ids = torch.randint(0, 64, (number, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


class Line(nn.Module):
    """Two parameters without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"hidden_size": 4})()
        self.a, self.b = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * x + self.b


def started(plugin: DeepSpeedPlugin | dict[str, Any], **arguments: Any) -> Accelerator:
    """Begin as a new program would, on ranks of the CPU, with one plugin or several.

    A configuration stands for the plugin that is made of it.
    """
    AcceleratorState._reset_state()
    PartialState(cpu=True)
    if isinstance(plugin, dict) and "zero_optimization" in plugin:
        plugin = DeepSpeedPlugin(hf_ds_config=plugin)
    return Accelerator(deepspeed_plugin=plugin, **arguments)


def train(
    accelerator: Accelerator, model: Any, optimizer: Any, scheduler: Any, batches: Iterable[Any]
) -> list[float]:
    """Run the loop that Accelerate's users write; give the mean loss over ranks of each batch."""
    losses: list[float] = []
    for batch in batches:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    return losses


def reference(
    world: int, schedule: Callable[[Optimizer], LRScheduler], strides: int
) -> tuple[list[float], Mapping[str, Tensor]]:
    """Train in plain torch on the batches of all ranks, as one process would."""
    model = llama()
    optimizer = AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    scheduler = schedule(optimizer)
    batches = list(DataLoader(samples(), batch_size=2))
    losses: list[float] = []
    for first in range(0, len(batches), world):
        parts = [model(**batch).loss for batch in batches[first : first + world]]
        loss = torch.stack(parts).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for _ in range(strides):
            scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model.state_dict()


def slower(optimizer: Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 1 / (1 + step))


def scheduled_by(kind: str, optimizer: Any) -> Any:
    if kind == "real":
        return slower(optimizer)
    if kind == "dummy":
        return DummyScheduler(optimizer, total_num_steps=16)
    return DummyScheduler(optimizer, lr_scheduler_callable=slower)


def assert_close(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# Optimizer and schedule


def test_every_pairing_of_real_and_dummy_trains_as_plain_torch_does_at_every_stage() -> None:
    def rank(_: int, world: int) -> None:
        # Accelerate steps a real schedule once per rank, and divides the number of all steps.
        plain = reference(world, slower, world)
        by_callable = reference(world, slower, 1)
        warm = reference(
            world, lambda optimizer: WarmupDecayLR(optimizer, 16 // world, 0, RATE, 1), 1
        )
        for stage in range(4):
            for optimizer, scheduler, (losses, weights) in (
                ("real", "real", plain),
                ("real", "dummy", warm),
                ("dummy", "dummy", warm),
                ("dummy", "callable", by_callable),
            ):
                config = config_of(stage)
                if optimizer == "dummy":
                    config["optimizer"] = OPTIMIZER
                if scheduler == "dummy":
                    config["scheduler"] = SCHEDULER
                config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
                accelerator = started(copy.deepcopy(config))
                model = llama()
                make = DummyOptim if optimizer == "dummy" else AdamW
                given: Any = make(model.parameters(), lr=RATE, weight_decay=0.0)
                schedule = scheduled_by(scheduler, given)
                prepared = accelerator.prepare(
                    model, given, schedule, DataLoader(samples(), batch_size=2)
                )
                engine, stepped, scheduled, loader = prepared
                assert type(engine) is DeepSpeedEngine
                assert type(stepped) is DeepSpeedOptimizerWrapper
                wrapped = AcceleratedScheduler if scheduler == "real" else DeepSpeedSchedulerWrapper
                assert type(scheduled) is wrapped
                assert_close(train(accelerator, engine, stepped, scheduled, loader), losses)
                state = accelerator.get_state_dict(engine)
                assert (state is None) is (stage == 3 and dist.get_rank() > 0)
                if state is not None:
                    assert_close(dict(state), dict(weights))
                assert accelerator.unwrap_model(engine) is model
                accelerator.free_memory()

    run_ranks(rank, timeout=110)


def test_what_does_not_fit_together_is_refused_in_accelerates_words() -> None:
    def rank(_: int, __: int) -> None:
        def prepare(make: Any, schedule: Any, **more: object) -> None:
            model = llama()
            optimizer = make(model.parameters(), lr=RATE)
            started(config_of(2, **more)).prepare(
                model, optimizer, schedule(optimizer), DataLoader(samples(), batch_size=2)
            )

        with pytest.raises(ValueError, match="cannot specify an optimizer in the config file and"):
            prepare(AdamW, slower, optimizer=OPTIMIZER)
        with pytest.raises(ValueError, match="cannot create a `DummyOptim` without specifying"):
            prepare(DummyOptim, DummyScheduler)
        with pytest.raises(ValueError, match="cannot specify a scheduler in the config file and"):
            prepare(AdamW, slower, scheduler=SCHEDULER)
        with pytest.raises(ValueError, match="Either specify a scheduler in the config file or"):
            prepare(AdamW, DummyScheduler)
        with pytest.raises(ValueError, match=r"only specify `accelerate.utils.DummyScheduler`"):
            prepare(DummyOptim, lambda _: slower(AdamW(llama().parameters())), optimizer=OPTIMIZER)
        model = llama()
        loader = DataLoader(samples(), batch_sampler=[[0, 1], [2, 3]])
        with pytest.raises(ValueError, match="has `None` as batch size"):
            started(config_of(2)).prepare(model, SGD(model.parameters(), lr=RATE), loader)
        model, loader = nn.Linear(2, 2), DataLoader(samples(), batch_size=2)
        with pytest.raises(ValueError, match=r"Can't find `model.config` entry"):
            started(config_of(2)).prepare(model, SGD(model.parameters(), lr=RATE), loader)

    run_ranks(rank, 1)


def test_sequence_parallelism_is_refused_with_what_to_do_instead() -> None:
    def rank(_: int, world: int) -> None:
        parallel = ParallelismConfig(sp_backend="deepspeed", sp_size=world)
        accelerator = started(config_of(2), parallelism_config=parallel)
        model = llama()
        with pytest.raises(UsageError, match=r"no sequence parallelism.\n\nhint: leave"):
            accelerator.prepare(
                model, SGD(model.parameters(), lr=RATE), DataLoader(samples(), batch_size=2)
            )

    run_ranks(rank)


# Values that are left to Accelerate


def test_open_values_are_filled_and_the_engine_works_by_them() -> None:
    def rank(_: int, world: int) -> None:
        config = config_of(3, optimizer=OPTIMIZER, scheduler=SCHEDULER)
        accelerator = started(config, gradient_accumulation_steps=2, mixed_precision="bf16")
        model = llama()
        optimizer = DummyOptim(model.parameters(), lr=0.5, weight_decay=0.25)
        scheduler = DummyScheduler(optimizer, total_num_steps=20, warmup_num_steps=4)
        engine, *_ = accelerator.prepare(
            model, optimizer, scheduler, DataLoader(samples(), batch_size=2)
        )
        filled = accelerator.deepspeed_config
        assert filled["train_micro_batch_size_per_gpu"] == 2
        assert filled["gradient_accumulation_steps"] == 2
        assert filled["train_batch_size"] == 2 * 2 * world
        assert filled["gradient_clipping"] == 1.0
        assert filled["zero_optimization"] == {
            "stage": 3,
            "reduce_bucket_size": 32 * 32,
            "stage3_prefetch_bucket_size": int(0.9 * 32 * 32),
            "stage3_param_persistence_threshold": 10 * 32,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
        assert filled["optimizer"]["params"] == {"lr": 0.5, "weight_decay": 0.25}
        assert filled["scheduler"]["params"] == {
            "warmup_min_lr": 0,
            "warmup_max_lr": 0.5,
            "warmup_num_steps": 4,
            "total_num_steps": 10,
        }
        assert filled["bf16"]["enabled"] is True
        assert engine.bfloat16_enabled()
        assert engine.train_batch_size() == 2 * 2 * world
        assert engine.gradient_accumulation_steps() == 2
        assert engine.gradient_clipping() == 1.0
        assert engine.optimizer.param_groups[0]["weight_decay"] == 0.25
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
        assert all(
            piece.dtype == torch.float32
            for pieces in engine.optimizer.fp32_partitioned_groups_flat
            for piece in pieces
        )
        with pytest.raises(ValueError, match="`stage3_gather_16bit_weights_on_model_save`"):
            accelerator.get_state_dict(engine)

    run_ranks(rank)


@pytest.mark.parametrize("world", [1, 2])
def test_parameters_without_dimensions_train_at_stage_3(world: int) -> None:
    def rank(_: int, world: int) -> None:
        accelerator = started(config_of(3))
        model = Line()
        optimizer = SGD(model.parameters(), lr=0.1)
        data = [(float(x), 2.0 * x + 1) for x in range(4)]
        engine, optimizer, loader = accelerator.prepare(
            model, optimizer, DataLoader(data, batch_size=4 // world)
        )
        for x, y in loader:
            accelerator.backward((engine(x.float()) - y.float()).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        plain = Line()
        x = torch.arange(4.0)
        (plain(x) - (2 * x + 1)).square().mean().backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        SGD(plain.parameters(), lr=0.1).step()
        with deepspeed.zero.GatheredParameters(model.parameters()):
            assert_close(model.state_dict(), plain.state_dict())

    run_ranks(rank, world)


def test_the_schedule_may_warm_up_for_no_step() -> None:
    def rank(_: int, __: int) -> None:
        scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 0}}
        accelerator = started(config_of(2, optimizer=OPTIMIZER, scheduler=scheduler))
        model = llama()
        optimizer = DummyOptim(model.parameters(), lr=RATE)
        *_, scheduled, _ = accelerator.prepare(
            model, optimizer, DummyScheduler(optimizer), DataLoader(samples(), batch_size=2)
        )
        assert scheduled.get_last_lr() == [RATE]

    run_ranks(rank, 1)


def test_models_are_sharded_as_they_are_built_whatever_the_flag_says() -> None:
    def rank(_: int, __: int) -> None:
        config = llama().config
        for flag in (False, True):
            accelerator = started(DeepSpeedPlugin(hf_ds_config=config_of(3), zero3_init_flag=flag))
            assert is_deepspeed_zero3_enabled()
            model: Any = LlamaForCausalLM._from_config(config)
            assert {weight.numel() for weight in model.parameters()} == {0}
            engine, *_ = accelerator.prepare(
                model, SGD(model.parameters(), lr=0.1), DataLoader(samples(4), batch_size=2)
            )
            # Small parameters stay whole, by the threshold that Accelerate has filled in.
            assert {weight.numel() for weight in engine.parameters()} == {0, 32}

    run_ranks(rank)


def test_a_step_that_overflows_in_fp16_is_skipped_and_the_schedule_waits() -> None:
    def rank(_: int, __: int) -> None:
        for stage in (2, 3):
            scaling = {"enabled": AUTO, "initial_scale_power": 19, "hysteresis": 1}
            accelerator = started(config_of(stage, fp16=scaling), mixed_precision="fp16")
            model = llama()
            optimizer = AdamW(model.parameters(), lr=RATE)
            engine, optimizer, scheduler, loader = accelerator.prepare(
                model, optimizer, slower(optimizer), DataLoader(samples(), batch_size=2)
            )
            assert engine.fp16_enabled()
            skipped: list[bool] = []
            for batch in loader:
                before = scheduler.get_last_lr()
                train(accelerator, engine, optimizer, scheduler, [batch])
                skipped.append(accelerator.optimizer_step_was_skipped)
                assert (scheduler.get_last_lr() == before) == skipped[-1]
            assert skipped == [True, True, False, False]

    run_ranks(rank)


# Accumulation and clipping


def test_accumulated_micro_steps_are_one_step_and_the_norm_is_told() -> None:
    def rank(_: int, world: int) -> None:
        for stage in range(4):
            results: list[Tensor] = []
            for steps, size in ((1, 4), (2, 2)):
                accelerator = started(config_of(stage), gradient_accumulation_steps=steps)
                model = llama()
                optimizer = SGD(model.parameters(), lr=0.5)
                engine, optimizer, loader = accelerator.prepare(
                    model, optimizer, DataLoader(samples(), batch_size=size)
                )
                flags: list[bool] = []
                norms: list[float] = []
                for batch in loader:
                    with accelerator.accumulate(engine):
                        accelerator.backward(engine(**batch).loss)
                        flags.append(accelerator.sync_gradients)
                        if accelerator.sync_gradients:
                            norms.append(accelerator.clip_grad_norm_(engine.parameters(), 1.0))
                        optimizer.step()
                        optimizer.zero_grad()
                assert flags == [False, True][-steps:] * (16 // (size * steps * world))
                assert engine.global_steps == len(norms)
                assert all(isinstance(norm, float) and norm > 0 for norm in norms)
                with deepspeed.zero.GatheredParameters(model.parameters()):
                    flat = [weight.detach().flatten() for weight in model.parameters()]
                    results.append(torch.cat([*flat, torch.tensor(norms)]))
                accelerator.free_memory()
            # Who sees which sample differs, but not which samples a step is made of.
            assert_close(*results)

    run_ranks(rank)


# Saving


@pytest.mark.parametrize("scheduler", ["real", "dummy"])
def test_training_goes_on_from_a_saved_state_as_if_it_had_not_stopped(
    tmp_path: Path, scheduler: str
) -> None:
    def rank(_: int, __: int) -> None:
        for stage in (0, 1, 2, 3) if scheduler == "real" else (1, 3):
            config = config_of(stage, **({"scheduler": SCHEDULER} if scheduler == "dummy" else {}))

            def begin(config: dict[str, Any] = config) -> tuple[Accelerator, Any, list[Any]]:
                accelerator = started(copy.deepcopy(config), mixed_precision="bf16")
                model = llama()
                optimizer = AdamW(model.parameters(), lr=RATE)
                schedule = scheduled_by(scheduler, optimizer)
                loader = DataLoader(samples(), batch_size=2)
                *prepared, loader = accelerator.prepare(model, optimizer, schedule, loader)
                return accelerator, loader, prepared

            folder = str(tmp_path / f"stage{stage}")
            accelerator, loader, prepared = begin()
            batches = list(loader)
            train(accelerator, *prepared, batches[:2])
            accelerator.save_state(folder)
            losses = train(accelerator, *prepared, batches[2:])
            rates = prepared[2].get_last_lr()
            accelerator.free_memory()
            accelerator, loader, prepared = begin()
            train(accelerator, *prepared, batches[3:])  # leads elsewhere
            accelerator.wait_for_everyone()
            accelerator.load_state(folder)
            assert prepared[0].global_steps == 2
            assert train(accelerator, *prepared, batches[2:]) == losses
            assert prepared[2].get_last_lr() == rates
            accelerator.free_memory()

    run_ranks(rank, timeout=100)


def test_a_saved_model_is_one_that_other_programs_load(tmp_path: Path) -> None:
    def rank(_: int, __: int) -> None:
        for stage in (0, 2, 3):
            config = config_of(stage)
            config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
            accelerator = started(config)
            model, folder = llama(), tmp_path / str(stage)
            engine, *_ = accelerator.prepare(
                model, SGD(model.parameters(), lr=0.1), DataLoader(samples(4), batch_size=2)
            )
            accelerator.save_model(engine, str(folder))
            accelerator.wait_for_everyone()
            saved, wanted = load_file(folder / "model.safetensors"), llama().state_dict()
            assert saved.keys() == wanted.keys()
            assert all(torch.equal(saved[name], wanted[name]) for name in wanted)

    run_ranks(rank)


# Several models


def test_two_plugins_drive_two_models_one_of_which_only_runs() -> None:
    def rank(_: int, __: int) -> None:
        plugins = {
            "student": DeepSpeedPlugin(hf_ds_config=config_of(2)),
            "teacher": DeepSpeedPlugin(
                hf_ds_config={
                    "train_micro_batch_size_per_gpu": 1,
                    "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}},
                }
            ),
        }
        accelerator = started(plugins)
        assert accelerator.state.distributed_type is DistributedType.DEEPSPEED
        assert accelerator.deepspeed_plugin is plugins["student"]
        assert not is_deepspeed_zero3_enabled()
        student = llama()
        student, optimizer, loader = accelerator.prepare(
            student, SGD(student.parameters(), lr=0.1), DataLoader(samples(), batch_size=2)
        )
        accelerator.state.select_deepspeed_plugin("teacher")
        assert accelerator.deepspeed_plugin is plugins["teacher"]
        assert is_deepspeed_zero3_enabled()
        teacher = accelerator.prepare(llama())
        assert type(teacher) is DeepSpeedEngine
        assert {weight.numel() for weight in teacher.module.parameters()} == {0}
        teacher.eval()
        accelerator.state.select_deepspeed_plugin("student")
        for batch in loader:
            with torch.no_grad():
                target = teacher(**batch).logits
            output = student(**batch)
            accelerator.backward(output.loss + (output.logits - target).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        assert student.global_steps == len(loader)

    run_ranks(rank)


def test_two_models_train_side_by_side() -> None:
    def rank(_: int, __: int) -> None:
        accelerator = started(config_of(2))
        first, second = llama(), llama()
        engine, optimizer, loader = accelerator.prepare(
            first, SGD(first.parameters(), lr=0.1), DataLoader(samples(), batch_size=2)
        )
        other = Accelerator()
        other_engine, other_optimizer = other.prepare(second, SGD(second.parameters(), lr=0.1))
        for batch in loader:
            accelerator.backward(engine(**batch).loss)
            other.backward(other_engine(**batch).loss)
            for each in (optimizer, other_optimizer):
                each.step()
                each.zero_grad()
        assert_close(first.state_dict(), second.state_dict())

    run_ranks(rank)


def test_a_model_is_prepared_again_after_memory_was_freed() -> None:
    def rank(_: int, __: int) -> None:
        for stage in (0, 1, 2, 3):
            accelerator = started(config_of(stage))
            model = llama()
            for _ in range(2):
                engine, optimizer, loader = accelerator.prepare(
                    model, SGD(model.parameters(), lr=0.1), DataLoader(samples(4), batch_size=2)
                )
                for batch in loader:
                    accelerator.backward(engine(**batch).loss)
                    optimizer.step()
                engine, optimizer, loader = accelerator.free_memory(engine, optimizer, loader)
                assert engine is None

    run_ranks(rank)


# Options


def test_a_model_that_is_compiled_block_by_block_trains_alike() -> None:
    def rank(_: int, __: int) -> None:
        losses: list[list[float]] = []
        for plugin in (None, TorchDynamoPlugin(backend="eager", use_regional_compilation=True)):
            accelerator = started(config_of(3), dynamo_plugin=plugin)
            model = llama()
            optimizer = AdamW(model.parameters(), lr=RATE)
            prepared = accelerator.prepare(
                model, optimizer, slower(optimizer), DataLoader(samples(8), batch_size=2)
            )
            losses.append(train(accelerator, *prepared))
        assert_close(*losses)

    run_ranks(rank, 1)


def test_state_and_parameters_are_offloaded_and_deepspeeds_optimizer_steps() -> None:
    def rank(_: int, __: int) -> None:
        plugin = DeepSpeedPlugin(
            zero_stage=3, offload_optimizer_device="cpu", offload_param_device="cpu"
        )
        accelerator = started(plugin)
        model = llama()
        optimizer = AdamW(model.parameters(), lr=RATE, betas=(0.5, 0.75))
        engine, optimizer, scheduler, loader = accelerator.prepare(
            model, optimizer, slower(optimizer), DataLoader(samples(4), batch_size=2)
        )
        base = engine.optimizer.optimizer
        assert type(base) is deepspeed.ops.adam.DeepSpeedCPUAdam
        assert base.param_groups[0]["betas"] == (0.5, 0.75)
        train(accelerator, engine, optimizer, scheduler, loader)
        held = engine.memory()
        assert (held.parameters_bytes, held.optimizer_bytes) == (0, 0)
        assert held.host_bytes > 0

    run_ranks(rank)


def test_layers_of_experts_are_marked_by_their_class() -> None:
    def rank(_: int, __: int) -> None:
        plugin = DeepSpeedPlugin(
            hf_ds_config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": {"stage": 3},
            },
            transformer_moe_cls_names="LlamaMLP",
        )
        engine = started(plugin).prepare(llama())
        assert type(engine) is DeepSpeedEngine
        assert all(layer.mlp._z3_leaf for layer in engine.module.model.layers)
        assert torch.isfinite(engine(torch.ones(1, 4, dtype=torch.long)).logits).all()

    run_ranks(rank)


def test_without_a_launcher_a_program_is_a_world_of_one() -> None:
    def rank(_: int, __: int) -> None:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            del os.environ[name]
        accelerator = started(config_of(3))
        model = llama()
        engine, *_ = accelerator.prepare(
            model, SGD(model.parameters(), lr=0.1), DataLoader(samples(4), batch_size=2)
        )
        assert (engine.world_size, accelerator.num_processes) == (1, 1)
        assert "mpi4py" not in sys.modules

    run_ranks(rank, 1, process_group=False)


# Launched

PORTABLE = """
import json, sys
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
ids = torch.randint(0, 64, (16, 8), generator=torch.Generator().manual_seed(1))
dataloader = DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=2)

from accelerate import Accelerator

accelerator = Accelerator()
model, optimizer, dataloader, scheduler = accelerator.prepare(
    model, optimizer, dataloader, scheduler
)

for batch in dataloader:
    outputs = model(**batch)
    loss = outputs.loss
    accelerator.backward(loss)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()

if accelerator.is_main_process:
    told = {
        "class": type(model).__module__,
        "ranks": [accelerator.num_processes, model.world_size],
        "stage": model.zero_optimization_stage(),
        "steps": model.global_steps,
        "bf16": model.bfloat16_enabled(),
        "gradient_clipping": model.gradient_clipping(),
        "lr": scheduler.get_last_lr(),
    }
    with open(sys.argv[1], "w") as file:
        json.dump(told, file)
"""
# Accelerate starts DeepSpeed's ranks on GPUs alone, unless the program has chosen the CPU before.
ON_CPU = """
import runpy, sys
from accelerate import PartialState

PartialState(cpu=True)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def launched(folder: Path, config: ClusterConfig) -> dict[str, Any]:
    """Launch the portable loop with what `accelerate config` has written; give what it tells."""
    (folder / "on_cpu.py").write_text(ON_CPU)
    (folder / "train.py").write_text(PORTABLE)
    home = folder / "home"
    (home / "accelerate").mkdir(parents=True)
    config.to_yaml_file(str(home / "accelerate" / "default_config.yaml"))
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--num_processes=2"]
    ended = subprocess.run(
        [*command, "--main_process_port=0", "on_cpu.py", "train.py", "told.json"],
        cwd=folder,
        env={**os.environ, "HF_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads((folder / "told.json").read_text())


def cluster(processes: int, precision: str | None, **fields: object) -> ClusterConfig:
    return ClusterConfig(
        compute_environment="LOCAL_MACHINE",
        distributed_type=DistributedType.DEEPSPEED,
        mixed_precision=precision,
        use_cpu=False,
        debug=False,
        num_processes=processes,
        deepspeed_config=fields,
    )


def test_the_portable_loop_is_launched_by_what_accelerate_config_wrote(tmp_path: Path) -> None:
    config = cluster(
        2,
        "bf16",
        zero_stage=3,
        gradient_accumulation_steps=1,
        gradient_clipping=0.5,
        offload_optimizer_device="none",
        offload_param_device="none",
        zero3_init_flag=True,
        zero3_save_16bit_model=True,
    )
    told = launched(tmp_path, config)
    assert told == {
        "class": "zeroshard.engine.engine",
        "ranks": [2, 2],
        "stage": 3,
        "steps": 4,
        "bf16": True,
        "gradient_clipping": 0.5,
        "lr": [pytest.approx(RATE / 9)],
    }


def test_a_file_of_deepspeeds_form_that_the_yaml_names_is_followed_on_all_ranks(
    tmp_path: Path,
) -> None:
    file, yaml = tmp_path / "ds_config.json", tmp_path / "accelerate.yaml"
    file.write_text(json.dumps(config_of(2, bf16={"enabled": True})))
    config = cluster(2, None, deepspeed_config_file=str(file), zero3_init_flag=False)
    config.to_yaml_file(str(yaml))
    environment: dict[str, str] = {}
    with mock.patch("torch.distributed.run.run", lambda _: environment.update(os.environ)):
        launch_command(launch_command_parser().parse_args(["--config_file", str(yaml), "train.py"]))

    def rank(_: int, world: int) -> None:
        os.environ.update({k: v for k, v in environment.items() if k.startswith("ACCELERATE_")})
        PartialState(cpu=True)
        accelerator = Accelerator()
        model = llama()
        optimizer = AdamW(model.parameters(), lr=RATE)
        prepared = accelerator.prepare(
            model, optimizer, slower(optimizer), DataLoader(samples(), batch_size=2)
        )
        engine = prepared[0]
        train(accelerator, *prepared)
        assert accelerator.num_processes == engine.world_size == world
        assert (engine.zero_optimization_stage(), engine.bfloat16_enabled()) == (2, True)
        assert (engine.gradient_clipping(), engine.global_steps) == (1.0, 4)

    run_ranks(rank)
