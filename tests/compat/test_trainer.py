"""Hugging Face's Trainer, unchanged, on the package named deepspeed.

Most references are the same Trainer without a configuration: plain PyTorch, with its data parallel
wrapper on two ranks.
"""

from __future__ import annotations

import gc
import itertools
import json
import logging
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerState,
)
from transformers.integrations.deepspeed import (
    HfDeepSpeedConfig,
    deepspeed_config,
    is_deepspeed_zero3_enabled,
)
from transformers.trainer_pt_utils import get_model_param_count
from transformers.trainer_utils import HPSearchBackend

import deepspeed
from compat.golden import MEASURED, Log, Recipe, Tokens, arguments, llama, logged, run
from deepspeed.runtime.engine import DeepSpeedEngine
from forked import run_ranks
from zeroshard.errors import UsageError

STAGES = (0, 1, 2, 3)
BLOCKS = ((), ("optimizer",), ("scheduler",), ("optimizer", "scheduler"))
ROUNDING = 2e-6

# The ranks are forked from this process: what they all need is imported here, once.
assert callable(deepspeed.initialize)


@pytest.fixture(autouse=True)
def _only_errors_are_logged() -> None:
    transformers.logging.set_verbosity_error()


def each_rank(body: Callable[[Path], Any], world: int = 2, timeout: float = 60) -> list[Any]:
    """What ``body`` returns on each rank; it gets a folder that the ranks share."""
    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(lambda rank, world: body(Path(folder)), world, timeout)


def train(
    folder: Path,
    config: Recipe | dict[str, Any] | str | None,
    *,
    data: Dataset[Any] | None = None,
    model: nn.Module | None = None,
    kind: type[Trainer] = Trainer,
    resume: str | None = None,
    **changes: Any,
) -> Trainer:
    """A Trainer that has trained."""
    trainer = kind(
        model=llama() if model is None else model,
        args=arguments(folder, config, **changes),
        train_dataset=Tokens() if data is None else data,
        eval_dataset=Tokens(rows=10),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def close(one: Log, other: Log, tolerance: float = ROUNDING) -> bool:
    """Whether two logs have the same numbers; norms count where both have them."""
    pairs = [
        *zip(one.loss, other.loss, strict=True),
        *zip(one.lr, other.lr, strict=True),
        *zip(one.grad_norm, other.grad_norm, strict=True),
    ]
    return all(
        a is None or b is None or math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)
        for a, b in pairs
    )


def full_weights(trainer: Trainer) -> dict[str, Tensor]:
    """Whole weights on rank 0, nothing elsewhere."""
    return trainer.deepspeed.module_state_dict()


# What DeepSpeed logs


@pytest.mark.parametrize("world", [1, 2])
def test_losses_norms_and_learning_rates_are_those_of_deepspeed(world: int) -> None:
    recipes = [
        Recipe(stage, dtype, blocks)
        for of_world, dtype, blocks in MEASURED
        for stage in ((1, 3) if blocks else STAGES)
        if of_world == world
    ]

    def body(folder: Path) -> list[Log]:
        return [run(recipe) for recipe in recipes]

    ranks = each_rank(body, world)
    assert ranks == [ranks[0]] * world
    for recipe, log in zip(recipes, ranks[0], strict=True):
        measured = MEASURED[world, recipe.dtype, recipe.blocks]
        tolerance = 1e-4 if recipe.dtype == "fp32" else 1e-3
        assert None not in log.grad_norm
        assert close(log, measured, tolerance), f"{recipe}: {log} instead of {measured}"


# Configurations


def test_every_auto_is_what_the_trainer_was_told() -> None:
    def body(folder: Path) -> list[dict[str, Any]]:
        config = Recipe(3, blocks=("optimizer", "scheduler")).config()
        path = folder / f"config-{dist.get_rank()}.json"
        path.write_text(json.dumps(config))
        changes = {
            "max_grad_norm": 0.5,
            "adam_beta1": 0.8,
            "adam_beta2": 0.9,
            "adam_epsilon": 1e-6,
            "weight_decay": 0.1,
        }
        facts = []
        for source in (config, str(path)):
            trainer = train(folder, source, bf16=True, **changes)
            group = trainer.optimizer.param_groups[0]
            facts.append(
                {
                    "config": trainer.deepspeed.config,
                    "group": {key: group[key] for key in ("betas", "eps", "weight_decay")},
                    "type": type(trainer.optimizer.optimizer.optimizer),
                    "log": logged(trainer),
                }
            )
        return facts

    from_dict, from_path = each_rank(body)[0]
    assert from_dict == from_path
    config = from_dict["config"]
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 2
    assert config["train_batch_size"] == 8
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"]["enabled"]
    assert not config["fp16"]["enabled"]
    zero = config["zero_optimization"]
    assert zero["reduce_bucket_size"] == 32 * 32
    assert zero["stage3_prefetch_bucket_size"] == int(0.9 * 32 * 32)
    assert zero["stage3_param_persistence_threshold"] == 10 * 32
    params = config["scheduler"]["params"]
    assert {**params} == {
        "warmup_min_lr": 0,
        "warmup_max_lr": 1e-2,
        "warmup_num_steps": 1,
        "total_num_steps": 4,
    }
    assert from_dict["type"] is torch.optim.AdamW
    assert from_dict["group"] == {"betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}


def test_what_a_configuration_leaves_out_is_deepspeeds_default_not_the_trainers() -> None:
    def body(folder: Path) -> list[Log]:
        config = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2}}
        ours = train(folder, config, max_grad_norm=0.1, gradient_accumulation_steps=1)
        plain = train(folder, None, max_grad_norm=1.0, gradient_accumulation_steps=1)
        return [logged(ours), logged(plain)]

    ours, plain = each_rank(body)[0]
    assert close(ours, plain)


def test_numbers_that_contradict_the_arguments_are_all_named_at_once() -> None:
    def body(folder: Path) -> str:
        config = Recipe(2, blocks=("optimizer",)).config()
        config["train_micro_batch_size_per_gpu"] = 7
        config["optimizer"]["params"] |= {"lr": 1}
        with pytest.raises(ValueError, match="mismatch TrainingArguments") as error:
            train(folder, config)
        return str(error.value)

    (message,) = each_rank(body, world=1)
    assert "train_micro_batch_size_per_gpu=7 vs hf per_device_train_batch_size=2" in message
    assert "optimizer.params.lr=1 vs hf learning_rate=0.01" in message


def test_a_configuration_is_forgotten_with_the_trainer_that_used_it() -> None:
    def body(folder: Path) -> None:
        logs = []
        for stage in (2, 3, 2):
            trainer = train(folder, Recipe(stage))
            assert deepspeed_config() is not None
            assert is_deepspeed_zero3_enabled() == (stage == 3)
            logs.append(logged(trainer))
            del trainer
            AcceleratorState._reset_state(reset_partial_state=True)
            gc.collect()
            assert deepspeed_config() is None
        assert logs[0] == logs[2]
        assert close(logs[0], logs[1])
        by_hand = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
        assert is_deepspeed_zero3_enabled()
        del by_hand
        assert not is_deepspeed_zero3_enabled()

    each_rank(body)


def test_the_log_says_that_deepspeed_runs_at_the_level_of_the_trainer() -> None:
    def body(folder: Path) -> list[list[str]]:
        said: list[list[str]] = []
        handler = logging.Handler()
        handler.emit = lambda record: said[-1].append(record.getMessage())  # type: ignore[method-assign]
        deepspeed.utils.logger.addHandler(handler)
        for level in ("info", "error"):
            said.append([])
            train(folder, Recipe(2), max_steps=1, log_level=level)
        return said

    informed, quiet = each_rank(body, world=1)[0]
    assert any("DeepSpeed info" in message for message in informed)
    assert quiet == []


def test_offload_changes_no_number_whoever_makes_the_optimizer() -> None:
    def body(folder: Path) -> list[Log]:
        logs = []

        def run(config: dict[str, Any], kind: type) -> None:
            trainer = train(folder, config, bf16=True)
            assert type(trainer.deepspeed.optimizer.optimizer) is kind
            logs.append(logged(trainer))

        for blocks in ((), ("optimizer",)):
            config = Recipe(3, "bf16", blocks).config()
            run(config, torch.optim.AdamW)
            to_host = {"device": "cpu", "pin_memory": True}
            config["zero_optimization"] |= {"offload_optimizer": to_host, "offload_param": to_host}
            run(config, torch.optim.AdamW if blocks else deepspeed.ops.adam.DeepSpeedCPUAdam)
            if not blocks:
                run({**config, "zero_force_ds_cpu_optimizer": False}, torch.optim.AdamW)
        return logs

    theirs, theirs_offloaded, theirs_kept, ours, ours_offloaded = each_rank(body)[0]
    assert theirs == theirs_offloaded == theirs_kept
    assert ours == ours_offloaded


# Precision


def test_models_compute_in_their_precision_and_masters_are_fp32() -> None:
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

    def body(folder: Path) -> list[tuple[Any, ...]]:
        facts = []
        for stage, dtype in itertools.product(STAGES, dtypes):
            trainer = train(folder, Recipe(stage, dtype), max_steps=1)
            engine = trainer.deepspeed
            assert type(engine) is DeepSpeedEngine
            assert engine is trainer.model_wrapped
            assert trainer.accelerator.unwrap_model(engine) is engine.module is trainer.model
            optimizer = engine.optimizer
            groups = (
                optimizer.fp32_partitioned_groups_flat
                if stage == 3
                else [optimizer.single_partition_of_fp32_groups]
            )
            masters = {piece.dtype for group in groups for piece in group}
            facts.append((stage, dtype, {p.dtype for p in trainer.model.parameters()}, masters))
            numel = sum(p.numel() for p in llama().parameters())
            assert get_model_param_count(engine, trainable_only=True) == numel
        return facts

    for stage, dtype, computes_in, masters in each_rank(body)[0]:
        assert computes_in == {dtypes[dtype]}, (stage, dtype)
        assert masters == {torch.float32}, (stage, dtype)


class Watch(TrainerCallback):
    """Notes after each step whether it overflowed, the loss scale, and a sum over the masters."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, float, float]] = []

    def on_step_end(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        zero = optimizer.optimizer
        masters = sum(p.double().abs().sum().item() for p in zero.single_partition_of_fp32_groups)
        assert optimizer.step_was_skipped == zero.overflow
        self.seen.append((zero.overflow, zero.loss_scale, masters))


def test_a_step_that_overflows_in_fp16_moves_neither_weights_nor_schedule() -> None:
    runs = [*((3, blocks) for blocks in BLOCKS), (1, ())]

    def body(folder: Path) -> list[tuple[Log, list[tuple[bool, float, float]]]]:
        found = []
        for stage, blocks in runs:
            config = Recipe(stage, "fp16", blocks).config()
            config["fp16"] |= {"initial_scale_power": 20, "hysteresis": 1}
            watch = Watch()
            trainer = Trainer(
                model=llama(),
                args=arguments(folder, config, fp16=True, max_steps=5),
                train_dataset=Tokens(),
                callbacks=[watch],
            )
            trainer.train()
            found.append((logged(trainer), watch.seen))
        return found

    logs = each_rank(body)[0]
    for (stage, blocks), (log, seen) in zip(runs, logs, strict=True):
        skipped = [overflow for overflow, _, _ in seen]
        assert skipped == [True, True, False, False, False], (stage, blocks)
        assert [scale for _, scale, _ in seen] == [2.0**19, *[2.0**18] * 4]
        # After the steps that are skipped come one or two with a learning rate of zero.
        masters = [each for _, _, each in seen]
        at_zero = 2 if "scheduler" in blocks else 1
        assert len({*masters[: 2 + at_zero]}) == 1
        assert len({*masters}) == len(masters) - 1 - at_zero
        assert all(math.isfinite(norm or 0.0) for norm in log.grad_norm[2:])
    hugging_face, inside, decay, *_ = (log.lr for log, _ in logs)
    assert hugging_face == pytest.approx((0.0, 0.0, 0.0, 0.01, 0.0075))
    assert inside == pytest.approx((0.0, 0.0, 0.01, 0.0075, 0.005))
    assert decay == pytest.approx((0.0, 0.0, 0.0, 0.01, 0.01))


# Gradients


def test_every_grouping_of_the_same_samples_is_the_same_step() -> None:
    groupings = [
        {"per_device_train_batch_size": micro, "gradient_accumulation_steps": 4 // micro}
        for micro in (1, 2, 4)
    ]

    def body(folder: Path) -> list[Log]:
        return [
            logged(train(folder, Recipe(stage), **grouping))
            for stage in (2, 3)
            for grouping in groupings
        ]

    first, *others = each_rank(body)[0]
    for other in others:
        assert close(first, other)


@pytest.mark.parametrize(
    ("data", "changes"),
    [
        pytest.param(20, {"max_steps": -1, "num_train_epochs": 2}, id="partial-accumulation"),
        pytest.param(
            32,
            {"max_grad_norm": 0.1, "weight_decay": 0.1, "label_smoothing_factor": 0.1},
            id="clipped-decayed-smoothed",
        ),
        pytest.param(32, {"max_grad_norm": 0.0, "neftune_noise_alpha": 5.0}, id="not-clipped"),
    ],
)
def test_training_is_that_of_plain_torch(data: int, changes: dict[str, Any]) -> None:
    recipes = [Recipe(stage) for stage in (0, 2, 3)]

    def body(folder: Path) -> list[Log]:
        return [
            logged(train(folder, config, data=Tokens(data), **changes))
            for config in (None, *recipes)
        ]

    plain, *ours = each_rank(body)[0]
    for recipe, log in zip(recipes, ours, strict=True):
        assert close(plain, log), f"{recipe}: {log} instead of {plain}"


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_number(reentrant: bool) -> None:
    def body(folder: Path) -> list[Log]:
        options = {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
        }
        return [
            logged(train(folder, Recipe(stage, "bf16"), **changes))
            for stage in (2, 3)
            for changes in ({}, options)
        ]

    log, checkpointed, log_freed, checkpointed_freed = each_rank(body)[0]
    assert log == checkpointed
    assert log_freed == checkpointed_freed


def test_a_compiled_model_trains_alike_with_a_graph_for_layers_and_one_for_the_loss() -> None:
    def body(folder: Path) -> list[Log]:
        compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
        logs: list[Log] = []
        counters = torch._dynamo.utils.counters
        for changes in ({}, compiled):
            counters.clear()
            options = {"max_steps": 2, "lr_scheduler_type": "constant", **changes}
            trainer = train(folder, Recipe(3), **options)
            assert counters["stats"]["unique_graphs"] == (2 if changes else 0)
            trainer.evaluate()
            assert not counters["graph_break"]
            logs.append(logged(trainer))
        return logs

    plain, compiled = each_rank(body)[0]
    assert close(plain, compiled)


# Other models


class LineConfig(PretrainedConfig):
    """What a line needs to be known; the Trainer asks for a hidden size."""

    model_type = "line"
    hidden_size = 1


class Line(PreTrainedModel):
    """A straight line, whose two parameters have no dimensions."""

    config_class = LineConfig

    def __init__(self, config: LineConfig) -> None:
        super().__init__(config)
        self.slope, self.height = (nn.Parameter(torch.tensor(value)) for value in (0.5, -1.0))
        self.post_init()

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        y = x * self.slope + self.height
        return nn.functional.mse_loss(y, labels), y


class Points(Dataset[dict[str, Tensor]]):
    """Points near a line."""

    def __init__(self) -> None:
        self.x = torch.linspace(-1, 1, 32)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": 2 * self.x[index] + 3}


def test_parameters_without_dimensions_train_at_every_stage() -> None:
    def body(folder: Path) -> list[tuple[Log, dict[str, Tensor]]]:
        found = []
        for config in (None, *map(Recipe, STAGES)):
            line = Line(LineConfig())
            trainer = train(folder, config, data=Points(), model=line)
            state = line.state_dict() if config is None else full_weights(trainer)
            found.append((logged(trainer), {name: each.clone() for name, each in state.items()}))
        return found

    (plain, weights), *others = each_rank(body)[0]
    for log, state in others:
        assert close(plain, log)
        torch.testing.assert_close(state, weights)
        assert state["slope"].shape == ()


def test_the_first_step_in_fp16_overflows_at_the_initial_scale_and_its_rate_is_told() -> None:
    def body(folder: Path) -> None:
        for stage in (2, 3):
            watch = Watch()
            trainer = Trainer(
                model=Line(LineConfig()),
                args=arguments(
                    folder,
                    Recipe(stage, "fp16"),
                    max_steps=1,
                    lr_scheduler_type="constant",
                    gradient_accumulation_steps=1,
                ),
                train_dataset=Points(),
                callbacks=[watch],
            )
            trainer.train()
            # The scale survives one overflow.
            assert [each[:2] for each in watch.seen] == [(True, 2.0**16)]
            assert logged(trainer).lr == (0.01,)
            weights = full_weights(trainer)
            if dist.get_rank() == 0:
                assert (weights["slope"].item(), weights["height"].item()) == (0.5, -1.0)

    each_rank(body)


# After training


def test_evaluation_prediction_and_generation_use_the_bare_model_after_training() -> None:
    def body(folder: Path) -> list[tuple[float, Tensor, list[list[int]]]]:
        found = []
        for config in (None, Recipe(1), Recipe(3)):
            trainer = train(folder, config)
            loss = trainer.evaluate()["eval_loss"]
            predicted = trainer.predict(Tokens(6))
            prompt = Tokens().rows[:2, :4]
            ids = trainer.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False
            )
            found.append((loss, torch.from_numpy(predicted.predictions), ids.tolist()))
        return found

    (loss, predicted, generated), *ours = each_rank(body)[0]
    for each_loss, each_predicted, each_generated in ours:
        assert each_loss == pytest.approx(loss, rel=ROUNDING)
        torch.testing.assert_close(each_predicted, predicted, rtol=1e-4, atol=1e-5)
        assert each_generated == generated


def test_a_model_is_evaluated_in_shards_without_training() -> None:
    def body(folder: Path) -> list[float]:
        losses = []
        for config in (None, Recipe(3, blocks=("optimizer", "scheduler"))):
            trainer = Trainer(
                model=llama(), args=arguments(folder, config), eval_dataset=Tokens(10)
            )
            losses.append(trainer.evaluate()["eval_loss"])
        assert all(param.numel() == 0 or param.dim() == 1 for param in trainer.model.parameters())
        return losses

    plain, sharded = each_rank(body)[0]
    assert sharded == pytest.approx(plain, rel=ROUNDING)


@pytest.mark.parametrize("before", ["evaluate", "train"])
def test_a_trainer_that_is_used_up_says_so(before: str) -> None:
    # Accelerate has forgotten the engine by then, while the Trainer still holds it.
    def body(folder: Path) -> None:
        trainer = Trainer(
            model=llama(),
            args=arguments(folder, Recipe(3), max_steps=1),
            train_dataset=Tokens(),
            eval_dataset=Tokens(10),
        )
        getattr(trainer, before)()
        with pytest.raises(UsageError, match="Trainer is used up by"):
            trainer.train()

    each_rank(body, world=1)


class TooLarge:
    """Fails inside the model, as a device without memory does, on batches of more than two rows."""

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs[0]) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate more than there is.")


def test_a_batch_size_is_found_by_trial() -> None:
    def body(folder: Path) -> list[Log]:
        logs = []
        for config in (None, Recipe(2)):
            model = llama()
            search = {"auto_find_batch_size": True, "per_device_train_batch_size": 8}
            if config is not None:
                model.lm_head.register_forward_pre_hook(TooLarge())
            trainer = train(
                folder,
                config,
                model=model,
                gradient_accumulation_steps=1,
                **(search if config is not None else {}),
            )
            assert trainer._train_batch_size == 2
            logs.append(logged(trainer))
        return logs

    plain, ours = each_rank(body)[0]
    assert close(plain, ours)


class Trial(dict[str, Any]):
    """Hyper-parameters to try; Optuna's have a number and are told of in ``params``."""

    def __init__(self, number: int, **params: Any) -> None:
        super().__init__(params)
        self.number, self.params = number, params


def test_a_search_of_hyperparameters_makes_one_engine_after_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What it asks of Optuna, which need not be installed.
    monkeypatch.setattr(transformers.integrations, "hp_params", lambda trial: trial.params)

    def fresh() -> LlamaForCausalLM:
        return llama()

    def body(folder: Path) -> list[Log]:
        logs = []
        args = arguments(folder, Recipe(3))
        searching = Trainer(model_init=fresh, args=args, train_dataset=Tokens())
        searching.hp_search_backend = HPSearchBackend.OPTUNA
        searching.hp_space = dict
        for number, rate in enumerate((1e-2, 3e-2)):
            searching.train(trial=Trial(number, learning_rate=rate))
            logs.append(logged(searching))
            args = arguments(folder, Recipe(3), learning_rate=rate)
            alone = Trainer(model_init=fresh, args=args, train_dataset=Tokens())
            alone.train()
            assert logged(alone) == logs[-1]
        return logs

    one, other = each_rank(body)[0]
    assert one != other


# Checkpoints


def spoiled() -> LlamaForCausalLM:
    """A model whose weights nobody wants, with dropout, so random numbers count."""
    model = llama(attention_dropout=0.1)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(1.0)
    return model


def names_in(folder: Path) -> set[str]:
    dist.barrier()
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def names_of(recipe: Recipe, world: int) -> set[str]:
    """Files by which programs know a checkpoint that the Trainer made after two steps."""
    prefix = "bf16_" if recipe.dtype == "bf16" else ""
    model = [f"zero_pp_rank_{rank}_" for rank in range(world)] if recipe.stage == 3 else [""]
    return {
        *("latest", "zero_to_fp32.py", "config.json", "model.safetensors"),
        *("training_args.bin", "trainer_state.json"),
        *(f"rng_state_{rank}.pth" for rank in range(world)),
        *(f"global_step2/{each}mp_rank_00_model_states.pt" for each in model),
        f"global_step2/{prefix}zero_pp_rank_0_mp_rank_00_optim_states.pt",
        *(() if recipe.blocks else ("scheduler.pt",)),  # else it is the engine's
    }


def test_a_resumed_training_is_the_one_that_was_not_interrupted() -> None:
    recipes = [
        Recipe(0),
        Recipe(1, "fp32", ("optimizer",)),
        Recipe(2, "bf16"),
        Recipe(3, "bf16", ("optimizer", "scheduler")),
        Recipe(3, "fp16"),
    ]

    def body(folder: Path) -> None:
        for number, recipe in enumerate(recipes):
            output = folder / str(number)
            model = llama(attention_dropout=0.1)
            whole = train(output, recipe, model=model, save_strategy="steps", save_steps=2)
            assert names_in(output / "checkpoint-2") >= names_of(recipe, world=2)
            resumed = train(output, recipe, model=spoiled(), resume=str(output / "checkpoint-2"))
            assert logged(resumed) == logged(whole), recipe
            expected = full_weights(whole)
            for name, weight in full_weights(resumed).items():
                assert torch.equal(weight, expected[name]), (recipe, name)

    each_rank(body)


def test_the_best_model_is_loaded_at_the_end() -> None:
    def body(folder: Path) -> None:
        for stage in STAGES:
            trainer = train(
                folder / str(stage),
                Recipe(stage, "bf16"),
                learning_rate=0.3,
                lr_scheduler_type="constant",
                save_strategy="steps",
                save_steps=1,
                eval_strategy="steps",
                eval_steps=1,
                load_best_model_at_end=True,
                save_total_limit=1,
                greater_is_better=True,  # no fit gets ever worse, but any model can be the best
            )
            losses = [
                each["eval_loss"] for each in trainer.state.log_history if "eval_loss" in each
            ]
            assert losses[-1] < max(losses)
            assert trainer.evaluate()["eval_loss"] == max(losses)

    each_rank(body)


def test_resuming_from_nothing_is_an_error() -> None:
    def body(folder: Path) -> None:
        trainer = Trainer(model=llama(), args=arguments(folder, Recipe(2)), train_dataset=Tokens())
        with pytest.raises(ValueError, match="No valid checkpoint found in output directory"):
            trainer.train(resume_from_checkpoint=True)
        TrainerState(train_batch_size=2).save_to_json(str(folder / "trainer_state.json"))
        with pytest.raises(ValueError, match="Can't find a valid checkpoint at"):
            trainer.train(resume_from_checkpoint=str(folder))

    each_rank(body, world=1)


@pytest.mark.parametrize("stage", [2, 3])
def test_save_model_writes_weights_that_other_programs_load(stage: int) -> None:
    def body(folder: Path) -> None:
        trainer = train(folder, Recipe(stage, "bf16"), max_steps=2)
        trainer.save_model(str(folder / "model"))
        expected = full_weights(trainer)
        dist.barrier()
        if dist.get_rank() == 0:
            loaded = load_file(folder / "model" / "model.safetensors")
            assert loaded.keys() == expected.keys()
            for name, weight in loaded.items():
                assert torch.equal(weight, expected[name])
                assert weight.dtype == torch.bfloat16

    each_rank(body)


def test_save_model_writes_shards_where_gathering_is_off() -> None:
    def body(folder: Path) -> None:
        config = Recipe(3).config()
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = False
        trainer = train(folder, config, max_steps=2)
        trainer.save_model(str(folder / "model"))
        expected = full_weights(trainer)
        dist.barrier()
        if dist.get_rank() == 0:
            assert not list((folder / "model").glob("*.safetensors"))
            whole = deepspeed.utils.zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(
                str(folder / "model")
            )
            for name, weight in expected.items():
                torch.testing.assert_close(whole[name], weight, rtol=0, atol=0)

    each_rank(body)


def test_fp32_weights_of_a_checkpoint_are_loaded_into_the_model_that_trained() -> None:
    def body(folder: Path) -> None:
        for stage, dtype in ((2, "bf16"), (3, "fp32")):
            output = folder / str(stage)
            saving = {"save_strategy": "steps", "save_steps": 4}
            trainer = train(
                output, Recipe(stage, dtype), model=Line(LineConfig()), data=Points(), **saving
            )
            # Parameters this small are whole on every rank at every stage.
            trained = trainer.model.slope.item(), trainer.model.height.item()
            load = deepspeed.utils.zero_to_fp32.load_state_dict_from_zero_checkpoint
            model = load(trainer.model, str(output / "checkpoint-4"))
            assert (model.slope.item(), model.height.item()) == trained != (0.5, -1.0)

    each_rank(body)
