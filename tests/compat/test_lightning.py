"""Lightning's Trainer and Fabric with the strategy "deepspeed", unchanged, on CPU ranks.

The strategy insists on GPUs. `on_cpu` takes that away, and nothing else: it lets the CPU pass where
the strategy asks for CUDA, and devices without an index.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import socket
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import ANY, Mock, patch

import lightning
import pytest
import pytorch_lightning  # the same under its older name, with classes of its own
import torch
from lightning.fabric.plugins import DeepSpeedPrecision
from lightning.fabric.strategies import DeepSpeedStrategy as FabricStrategy
from lightning.fabric.utilities.types import Steppable
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_summary import DeepSpeedSummary
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import deepspeed
from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer
from forked import run_ranks

STAGES = (1, 2, 3)
SAMPLES, MICRO, WORLD, ACCUMULATE = 32, 2, 2, 2
BATCH = MICRO * WORLD * ACCUMULATE
STEPS_PER_EPOCH = SAMPLES // BATCH
LR, CLIP = 0.1, 0.3

NAMES = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        strategies, accelerators = modules(name)
        monkeypatch.setattr(strategies, "CUDAAccelerator", accelerators.CPUAccelerator)
        monkeypatch.setattr(strategies, "_validate_device_index_selection", lambda devices: None)


def layers() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 4))


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(
        torch.randn(SAMPLES, 8, generator=generator), torch.randn(SAMPLES, 4, generator=generator)
    )


class Steps:
    """What a Lightning module does here; the module itself is of either package."""

    def __init__(self) -> None:
        super().__init__()
        self.net: nn.Module | None = None
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.net is None:
            self.net = layers()

    def forward(self, x: Tensor) -> Tensor:
        assert self.net is not None
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.mse_loss(self(x).float(), y)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("loss", F.mse_loss(self(x).float(), y), sync_dist=True)  # type: ignore[attr-defined]

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=LR, momentum=0.9)  # type: ignore[attr-defined]
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "rate"},
        }

    def train_dataloader(self) -> DataLoader[Any]:
        # Lightning's own sampler would shuffle.
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        sampler = DistributedSampler(data(), world, rank, shuffle=False)
        return DataLoader(data(), batch_size=MICRO, sampler=sampler)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Model(Steps, LightningModule):
    """Its layers are made in `configure_model`, so in shards at stage 3."""


class Early(Model):
    """Its layers are made in the constructor."""

    def __init__(self) -> None:
        super().__init__()
        self.net = layers()


class OlderModel(Steps, pytorch_lightning.LightningModule):
    """A module of the package pytorch_lightning."""


def trainer(strategy: Any, kind: Any = Trainer, **options: Any) -> Any:
    return kind(
        **{
            "accelerator": "cpu",
            "devices": WORLD,
            "strategy": strategy,
            "max_epochs": 1,
            "accumulate_grad_batches": ACCUMULATE,
            "gradient_clip_val": CLIP,
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        }
    )


def plain(*fits: int) -> tuple[list[Tensor], list[float]]:
    """Weights and learning rates of the same training without any library, on the whole batch.

    Lightning divides the loss by the number of micro-steps before it calls an engine that averages
    over them itself, so with DeepSpeed gradients are smaller by that factor; here, too.

    Args:
        fits: epochs of each fit, which has an optimizer of its own.
    """
    net, (x, y) = layers(), data().tensors
    rates = []
    for epochs in fits:
        optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
        for number in [*range(STEPS_PER_EPOCH)] * epochs:
            at = slice(number * BATCH, (number + 1) * BATCH)
            optimizer.zero_grad()
            (F.mse_loss(net(x[at]), y[at]) / ACCUMULATE).backward()
            nn.utils.clip_grad_norm_(net.parameters(), CLIP)
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    return [param.detach() for param in net.parameters()], rates


WITH_OPTIMIZER = {
    "optimizer": {"type": "SGD", "params": {"lr": 3e-5}},
    "scheduler": {
        "type": "WarmupLR",
        "params": {
            "last_batch_iteration": -1,
            "warmup_min_lr": 0,
            "warmup_max_lr": 3e-5,
            "warmup_num_steps": 100,
        },
    },
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 2},
}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def modules(name: str) -> tuple[Any, Any]:
    """The modules of a package that hold its strategy and its accelerators."""
    strategies = importlib.import_module(f"{name}.strategies.deepspeed")
    return strategies, importlib.import_module(f"{name}.accelerators")


def assert_close(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    torch.testing.assert_close([*got], [*want])


def weights(module: nn.Module) -> list[Tensor]:
    with deepspeed.zero.GatheredParameters(module.parameters()):
        return [param.detach().float().clone() for param in module.parameters()]


class Watch(Callback):
    """Compares the engine with the trainer at every batch, and keeps the learning rates."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        assert trainer.strategy.model.global_steps == trainer.global_step
        assert trainer.strategy.model.lr_scheduler is None
        if index % ACCUMULATE == 0:
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def judge_plainly(weights: list[Tensor]) -> tuple[Tensor, float]:
    """Outputs for all data, and the loss."""
    net, (x, y) = layers(), data().tensors
    with torch.no_grad():
        for param, value in zip(net.parameters(), weights, strict=True):
            param.copy_(value)
        outputs = net(x)
    return outputs, F.mse_loss(outputs, y).item()


# The Trainer


@pytest.mark.usefixtures("on_cpu")
def test_the_trainer_fits_as_plain_training_does_and_judges_and_predicts_afterwards() -> None:
    def work(rank: int, world: int) -> None:
        want, rates = plain(2)
        outputs, loss = judge_plainly(want)
        for stage, kind in ((1, Early), (2, Model), (3, Early), (3, Model)):
            model, watch = kind(), Watch()
            run = trainer(f"deepspeed_stage_{stage}", max_epochs=2, callbacks=[watch])
            run.fit(model)
            assert type(run.strategy.model) is deepspeed.DeepSpeedEngine
            assert run.global_step == 2 * STEPS_PER_EPOCH
            assert run.callback_metrics["loss"].item() == pytest.approx(loss, rel=1e-5)
            assert watch.rates == pytest.approx(rates)
            assert_close(weights(model), want)
            for judge in (run.test, run.validate):
                (metrics,) = judge(model, verbose=False)
                assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
            predicted = torch.cat(run.predict(model))
            torch.testing.assert_close(predicted, outputs[rank::world])

    run_ranks(work, WORLD)


@pytest.mark.usefixtures("on_cpu")
def test_a_model_is_fitted_again_by_one_trainer_and_by_another() -> None:
    """Each time with a new optimizer, which the module makes."""

    def work(rank: int, world: int) -> None:
        want, _ = plain(1, 1, 1)
        for stage in (2, 3):
            model, first = Model(), trainer(f"deepspeed_stage_{stage}")
            first.fit(model)
            first.fit_loop.max_epochs = 2
            first.fit(model)
            trainer(f"deepspeed_stage_{stage}").fit(model)
            assert_close(weights(model), want)

    run_ranks(work, WORLD)


@pytest.mark.usefixtures("on_cpu")
def test_the_older_package_fits_the_same_model_and_starts_ranks_itself() -> None:
    """Without a process group, so the strategy asks for one, by DeepSpeed's function."""
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(free_port())

    def work(rank: int, world: int) -> None:
        model = OlderModel()
        trainer("deepspeed_stage_3", pytorch_lightning.Trainer).fit(model)
        assert_close(weights(model), plain(1)[0])

    run_ranks(work, WORLD, process_group=False)


class ByHand(Model):
    """Optimizes by hand."""

    automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.lr_schedulers().step()


@pytest.mark.usefixtures("on_cpu")
def test_modules_that_optimize_by_hand_train_the_same() -> None:
    def work(rank: int, world: int) -> None:
        options = {"accumulate_grad_batches": 1, "gradient_clip_val": None}
        for stage in (2, 3):
            by_hand, automatic = ByHand(), Model()
            run = trainer(f"deepspeed_stage_{stage}", **options)
            run.fit(by_hand)
            assert run.global_step == run.strategy.model.global_steps == SAMPLES // MICRO // WORLD
            trainer(f"deepspeed_stage_{stage}", **options).fit(automatic)
            assert by_hand.losses == automatic.losses
            assert_close(weights(by_hand), weights(automatic))

    run_ranks(work, WORLD)


@pytest.mark.usefixtures("on_cpu")
def test_precisions_of_the_trainer_are_those_of_the_engine() -> None:
    def work(rank: int, world: int) -> None:
        whole = Model()
        trainer("deepspeed_stage_2").fit(whole)
        for stage, precision in (
            *((1, "16-mixed"), (2, "bf16-true")),
            *((3, "16-true"), (3, "bf16-mixed")),
        ):
            dtype = torch.bfloat16 if precision.startswith("b") else torch.float16
            model = Model()
            strategy = DeepSpeedStrategy(stage=stage, loss_scale=64)
            run = trainer(strategy, precision=precision)
            run.fit(model)
            assert {param.dtype for param in model.parameters()} == {dtype}
            assert run.strategy.model.loss_scale == (64 if dtype == torch.float16 else 1)
            assert model.losses == pytest.approx(whole.losses, rel=0.05)
            masters = run.optimizers[0].single_partition_of_fp32_groups
            assert {part.dtype for part in masters} == {torch.float32}
            run.test(model, verbose=False)

    run_ranks(work, WORLD)


class Rates(Callback):
    """Learning rates at the start of every batch, and the kinds of what was made of the file."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        from deepspeed.runtime.lr_schedules import WarmupLR
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        assert isinstance(trainer.optimizers[0], DeepSpeedZeroOptimizer)
        assert isinstance(trainer.optimizers[0].optimizer, torch.optim.SGD)
        assert isinstance(trainer.lr_scheduler_configs[0].scheduler, WarmupLR)
        assert trainer.lr_scheduler_configs[0].interval == "step"

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.usefixtures("on_cpu")
def test_a_file_may_bring_the_optimizer_and_the_schedule(tmp_path: Path) -> None:
    (path := tmp_path / "ds.json").write_text(json.dumps(WITH_OPTIMIZER))

    def work(rank: int, world: int) -> None:
        watch, monitor = Rates(), LearningRateMonitor()
        run = trainer(
            DeepSpeedStrategy(config=str(path)),
            accumulate_grad_batches=1,
            callbacks=[watch, monitor],
            logger=lightning.pytorch.loggers.CSVLogger(tmp_path / str(rank)),
            log_every_n_steps=1,
        )
        run.fit(Model())
        steps = SAMPLES // MICRO // WORLD
        assert watch.rates == monitor.lrs["lr-SGD"] == sorted(watch.rates)
        assert watch.rates[:2] == [0, 0]  # as in DeepSpeed: before the schedule, and at its start
        assert len(set(watch.rates)) == steps - 1

    run_ranks(work, WORLD)


@pytest.mark.usefixtures("on_cpu")
def test_strategies_that_offload_or_shard_nothing_train_the_same() -> None:
    def work(rank: int, world: int) -> None:
        for strategy in (
            DeepSpeedStrategy(zero_optimization=False, logging_batch_size_per_gpu=MICRO),
            DeepSpeedStrategy(stage=1, offload_optimizer=True),  # the Trainer has no name for it
            "deepspeed_stage_2_offload",
            "deepspeed_stage_3_offload",
        ):
            model = Model()
            trainer(strategy).fit(model)
            assert_close(weights(model), plain(1)[0])

    run_ranks(work, WORLD)


@pytest.mark.usefixtures("on_cpu")
def test_every_argument_of_the_strategy_is_accepted() -> None:
    arguments = {
        "remote_device": "cpu",
        "offload_optimizer": True,
        "partition_activations": True,
        "cpu_checkpointing": True,
        "contiguous_memory_optimization": True,
        "synchronize_checkpoint_boundary": True,
        "contiguous_gradients": False,
        "overlap_comm": False,
        "allgather_partitions": False,
        "reduce_scatter": False,
        "sub_group_size": 100,
        "logging_batch_size_per_gpu": 4,
        "logging_level": 20,
        "pin_memory": True,
        "exclude_frozen_parameters": True,
    }

    def work(rank: int, world: int) -> None:
        for stage in STAGES:
            model = Model()
            with patch("deepspeed.checkpointing.configure", wraps=configure) as configured:
                strategy = DeepSpeedStrategy(
                    stage=stage, offload_parameters=stage == 3, **arguments
                )
                trainer(strategy).fit(model)
            configured.assert_called_once_with(
                mpu_=None,
                partition_activations=True,
                contiguous_checkpointing=True,
                checkpoint_in_cpu=True,
                profile=None,
            )
            assert_close(weights(model), plain(1)[0])

    configure = deepspeed.checkpointing.configure
    run_ranks(work, WORLD)


@pytest.mark.usefixtures("on_cpu")
def test_the_summary_of_a_sharded_model_counts_whole_parameters_and_parts() -> None:
    numel = sum(param.numel() for param in layers().parameters())

    def work(rank: int, world: int) -> int:
        model = Model()
        run = trainer("deepspeed_stage_3", limit_train_batches=1, enable_model_summary=True)
        run.fit(model)
        summary = DeepSpeedSummary(model)
        assert summary.total_parameters == summary.trainable_parameters == numel
        (part,) = summary.parameters_per_layer
        return part

    assert sum(run_ranks(work, WORLD)) == numel


@pytest.mark.usefixtures("on_cpu")
def test_zero_init_is_asked_for_at_every_stage_and_shards_at_the_last() -> None:
    class Looking(Model):
        def configure_optimizers(self) -> Any:
            self.are_empty = {param.numel() == 0 for param in self.parameters()}
            return super().configure_optimizers()

    def work(rank: int, world: int) -> None:
        for stage in STAGES:
            model = Looking()
            with patch("deepspeed.zero.Init", wraps=deepspeed.zero.Init) as made:
                trainer(f"deepspeed_stage_{stage}", limit_train_batches=2).fit(model)
            made.assert_called_once_with(
                enabled=stage == 3, remote_device=None, config_dict_or_path=ANY
            )
            assert model.are_empty == {stage == 3}

    run_ranks(work, WORLD)


# Checkpoints of the Trainer


def checkpointed(folder: Path, stage: int, **options: Any) -> tuple[Any, Any]:
    """A model fitted for two epochs, with a checkpoint after each, and its trainer."""
    saving = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    model = Early()
    run = trainer(
        f"deepspeed_stage_{stage}",
        max_epochs=2,
        callbacks=[saving],
        enable_checkpointing=True,
        **options,
    )
    run.fit(model)
    return model, run


@pytest.mark.usefixtures("on_cpu")
def test_a_resumed_fit_goes_on_to_the_bits_of_one_that_was_not_stopped(tmp_path: Path) -> None:
    def work(rank: int, world: int) -> None:
        for stage, precision in ((1, "32-true"), (2, "bf16-mixed"), (3, "bf16-mixed")):
            folder = tmp_path / str(stage)
            whole, run = checkpointed(folder, stage, precision=precision)
            assert {*folder.iterdir()} == {folder / "epoch=0.ckpt", folder / "epoch=1.ckpt"}
            half = SAMPLES // MICRO // WORLD
            model = Model()
            resumed = trainer(f"deepspeed_stage_{stage}", max_epochs=2, precision=precision)
            resumed.fit(model, ckpt_path=folder / "epoch=0.ckpt")
            assert (resumed.current_epoch, resumed.global_step) == (2, run.global_step)
            assert model.losses == whole.losses[half:]
            assert all(map(torch.equal, weights(model), weights(whole)))
            (config,), (resumed_config,) = run.lr_scheduler_configs, resumed.lr_scheduler_configs
            assert resumed_config.scheduler.state_dict() == config.scheduler.state_dict()

    run_ranks(work, WORLD)


@pytest.mark.usefixtures("on_cpu")
def test_checkpoints_are_judged_converted_and_loaded_by_programs_without_ranks(
    tmp_path: Path,
) -> None:
    def work(rank: int, world: int) -> None:
        for stage in STAGES:
            folder = tmp_path / str(stage)
            model, run = checkpointed(folder, stage)
            path, file = folder / "epoch=1.ckpt", folder / "single.pt"
            assert {each.name for each in path.iterdir()} == {
                "latest",
                "checkpoint",
                "zero_to_fp32.py",
            }
            (want,) = run.test(model, verbose=False)
            (got,) = trainer(f"deepspeed_stage_{stage}").test(
                Model(), ckpt_path=path, verbose=False
            )
            assert got == want
            values = weights(model)
            if rank == 0:
                convert_zero_checkpoint_to_fp32_state_dict(path, file)
                loaded = Early.load_from_checkpoint(file, map_location="cpu", weights_only=False)
                assert all(map(torch.equal, loaded.parameters(), values))
                content = torch.load(file, weights_only=False)
                assert content["global_step"] == run.global_step
                assert len(content["lr_schedulers"]) == 1
            run.strategy.barrier()
            if stage == 3:
                strategy = DeepSpeedStrategy(stage=3, load_full_weights=True)
                (got,) = trainer(strategy).test(Model(), ckpt_path=file, verbose=False)
                assert got == want
            else:
                with pytest.raises(FileNotFoundError, match="not a valid DeepSpeed checkpoint"):
                    trainer(f"deepspeed_stage_{stage}").test(Model(), ckpt_path=file)

    run_ranks(work, WORLD)


@pytest.mark.usefixtures("on_cpu")
def test_a_single_file_of_another_strategy_is_fitted_further_in_shards(tmp_path: Path) -> None:
    file = tmp_path / "single.pt"

    def alone(rank: int, world: int) -> None:
        run = trainer("auto", devices=1, limit_train_batches=2)
        run.fit(Early())
        run.save_checkpoint(file)

    def work(rank: int, world: int) -> None:
        strategy = DeepSpeedStrategy(stage=3, load_full_weights=True)
        model, run = Model(), trainer(strategy, max_epochs=2)
        with warnings.catch_warnings(record=True) as said:
            run.fit(model, ckpt_path=file)
        texts = [str(each.message) for each in said]
        assert any("optimizer states cannot be restored" in text for text in texts) == (rank == 0)
        assert run.current_epoch == 2

    run_ranks(alone, 1)
    run_ranks(work, WORLD)


@pytest.mark.usefixtures("on_cpu")
def test_the_only_checkpoint_that_is_kept_is_the_last(tmp_path: Path) -> None:
    def work(rank: int, world: int) -> None:
        saving = ModelCheckpoint(tmp_path, "{epoch}_{step}", save_top_k=1)
        options = {"max_epochs": 2, "limit_train_batches": 2, "enable_checkpointing": True}
        run = trainer("deepspeed_stage_2", callbacks=[saving], **options)
        run.fit(Model())
        run.strategy.barrier()
        assert [each.name for each in tmp_path.iterdir()] == ["epoch=1_step=2.ckpt"]

    run_ranks(work, WORLD)


# Refusals


class ReturnsNothing(Model):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        return None


class ClipsItself(Model):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, *args, **kwargs)


class GoesBackItself(Model):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward()


@pytest.mark.usefixtures("on_cpu")
def test_what_the_strategy_does_not_support_is_said_by_it() -> None:
    def work(rank: int, world: int) -> None:
        one = {"devices": 1, "limit_train_batches": 1}
        with pytest.raises(MisconfigurationException, match=r"returning `None` .*not supported"):
            trainer("deepspeed", **one).fit(ReturnsNothing())
        with pytest.raises(MisconfigurationException, match="clipping gradients by value"):
            trainer("deepspeed", gradient_clip_algorithm="value", **one).fit(Model())
        with pytest.warns(UserWarning, match="handles gradient clipping internally"):
            trainer("deepspeed", **one).fit(ClipsItself())
        with pytest.warns(UserWarning, match="will be ignored since DeepSpeed handles"):
            trainer("deepspeed", **one).fit(GoesBackItself())
        with pytest.raises(MisconfigurationException, match="Do not set `gradient_accum"):
            strategy = DeepSpeedStrategy(config={"gradient_accumulation_steps": 2})
            trainer(strategy, **one).fit(Model())

    run_ranks(work, 1)


# Fabric


def fabric(strategy: Any, **options: Any) -> lightning.Fabric:
    made = lightning.Fabric(accelerator="cpu", devices=WORLD, strategy=strategy, **options)
    made.launch()
    return made


def fabric_config(stage: int) -> dict[str, Any]:
    return {
        "zero_optimization": {"stage": stage},
        "gradient_clipping": CLIP,
        "zero_allow_untested_optimizer": True,
    }


@dataclass
class Setup:
    """A model that Fabric has set up, its optimizer, and a schedule of torch's on top."""

    run: lightning.Fabric
    model: Any
    optimizer: Any
    scheduler: Any

    @classmethod
    def by(cls, run: lightning.Fabric) -> Setup:
        with run.init_module():
            net = layers()
        optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9)
        model, wrapped = run.setup(net, optimizer)
        scheduler = torch.optim.lr_scheduler.StepLR(wrapped, step_size=3, gamma=0.5)
        return cls(run, model, wrapped, scheduler)

    @property
    def engine(self) -> Any:
        """The engine, which Fabric wraps once more."""
        return self.model._forward_module

    def parts(self) -> dict[str, Any]:
        """What a checkpoint is made of."""
        return {"model": self.model, "optimizer": self.optimizer}

    def epoch(self) -> list[float]:
        """One epoch as Fabric's loops are written, with the optimizer's own step; its rates."""
        run, rates = self.run, []
        x, y = (tensor[run.global_rank :: WORLD] for tensor in data().tensors)
        for number, (inputs, targets) in enumerate(
            zip(x.split(MICRO), y.split(MICRO), strict=True)
        ):
            accumulates = number % ACCUMULATE != ACCUMULATE - 1
            with run.no_backward_sync(self.model, enabled=accumulates):
                loss = F.mse_loss(self.model(inputs), targets)
                run.backward(loss / ACCUMULATE**2, model=self.model)  # by two, as the Trainer does
            if not accumulates:
                rates.append(self.optimizer.param_groups[0]["lr"])
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.scheduler.step()
        return rates


@pytest.mark.usefixtures("on_cpu")
def test_fabric_steps_the_optimizer_itself_and_trains_as_plain_training_does() -> None:
    def work(rank: int, world: int) -> None:
        want, rates = plain(2)
        for stage in STAGES:
            made = Setup.by(fabric(FabricStrategy(config=fabric_config(stage))))
            assert isinstance(made.optimizer, torch.optim.Optimizer)
            assert isinstance(made.optimizer.optimizer.optimizer, torch.optim.SGD)
            assert made.epoch() + made.epoch() == pytest.approx(rates)
            assert_close(weights(made.model), want)
            with pytest.raises(NotImplementedError, match="handles gradient clipping"):
                made.run.clip_gradients(made.model, made.optimizer, max_norm=1.0)

    run_ranks(work, WORLD)


@pytest.mark.usefixtures("on_cpu")
def test_fabric_trains_several_models_in_turn() -> None:
    def work(rank: int, world: int) -> None:
        want, _ = plain(2)
        for stage in (2, 3):
            run = fabric(FabricStrategy(config=fabric_config(stage)))
            several = [Setup.by(run) for _ in range(2)]
            for _ in range(2):
                for made in several:
                    made.epoch()
            for made in several:
                assert_close(weights(made.model), want)

    run_ranks(work, WORLD)


@pytest.mark.usefixtures("on_cpu")
def test_what_fabric_loads_goes_on_to_the_bits_of_what_it_saved(tmp_path: Path) -> None:
    def work(rank: int, world: int) -> None:
        for stage in STAGES:
            folder = tmp_path / str(stage)
            run = fabric(FabricStrategy(config=fabric_config(stage)))
            made, other = Setup.by(run), Setup.by(run)
            made.epoch()
            rates = made.scheduler.state_dict()
            run.save(folder, {**made.parts(), "epoch": 1, "rates": rates})
            state = {**other.parts(), "epoch": 0, "rates": {}}
            run.load(folder, state)
            assert (state["epoch"], state["rates"]) == (1, rates)
            assert made.engine.global_steps == other.engine.global_steps == STEPS_PER_EPOCH
            other.scheduler.load_state_dict(state["rates"])
            assert made.epoch() == other.epoch()
            assert all(map(torch.equal, weights(made.model), weights(other.model)))

    run_ranks(work, WORLD)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-true"])
def test_fabric_computes_in_the_precision_it_is_given(precision: Any) -> None:
    def work(rank: int, world: int) -> None:
        dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float16
        for stage in STAGES:
            strategy = FabricStrategy(stage=stage, loss_scale=64)
            made = Setup.by(fabric(strategy, precision=precision))
            assert {param.dtype for param in made.model.parameters()} == {dtype}
            outputs = made.model(data().tensors[0])
            assert outputs.dtype == torch.float32
            before = weights(made.model)
            made.run.backward(outputs.square().mean(), model=made.model)
            made.optimizer.step()
            assert not any(map(torch.equal, weights(made.model), before))

    run_ranks(work, WORLD)


@pytest.mark.usefixtures("on_cpu")
def test_fabric_sets_up_a_model_without_an_optimizer() -> None:
    def work(rank: int, world: int) -> None:
        x, _ = data().tensors
        for stage in STAGES:
            run = fabric(FabricStrategy(stage=stage))
            with run.init_module():
                net = layers()
            model = run.setup(net)
            with torch.no_grad():
                torch.testing.assert_close(model(x), layers()(x))
            with pytest.raises(NotImplementedError, match="independently"):
                run._strategy.setup_optimizer(torch.optim.SGD(net.parameters()))

    run_ranks(work, WORLD)


# What the strategies ask of the names, with nothing trained


@pytest.mark.parametrize("name", NAMES)
def test_the_strategy_is_for_gpus(name: str) -> None:
    strategies, accelerators = modules(name)
    strategy = strategies.DeepSpeedStrategy(accelerator=accelerators.CPUAccelerator())
    with pytest.raises(RuntimeError, match="only supported on CUDA GPUs"):
        strategy.setup_environment()


@pytest.mark.parametrize("name", NAMES)
def test_the_configuration_comes_from_arguments_a_file_or_the_environment(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = modules(name)[0].DeepSpeedStrategy
    assert make().config["zero_optimization"]["stage"] == 2
    assert make(stage=3).config["zero_optimization"]["stage"] == 3
    assert "offload_optimizer" not in make().config["zero_optimization"]
    assert make(offload_optimizer=True).config["zero_optimization"]["offload_optimizer"] == {
        "device": "cpu",
        "nvme_path": "/local_nvme",
        "buffer_count": 4,
        "pin_memory": False,
    }
    assert make(config=WITH_OPTIMIZER).config == WITH_OPTIMIZER
    (path := tmp_path / "ds.json").write_text(json.dumps(WITH_OPTIMIZER))
    assert make(config=path).config == WITH_OPTIMIZER
    with pytest.raises(Exception, match=r"path does not exist: no\.json"):
        make(config="no.json")
    monkeypatch.setenv("PL_DEEPSPEED_CONFIG_PATH", str(path))
    assert make().config == WITH_OPTIMIZER


@pytest.mark.parametrize("name", NAMES)
def test_the_logger_takes_the_level_that_the_strategy_sets(name: str) -> None:
    make = modules(name)[0].DeepSpeedStrategy
    for level in (logging.ERROR, logging.WARNING):
        make(logging_level=level)
        assert deepspeed.utils.logging.logger.level == level


@pytest.mark.parametrize("name", NAMES)
def test_the_strategy_names_the_ranks_in_the_environment_and_starts_them_by_the_function(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    package = importlib.import_module(name.partition(".")[0])
    if "fabric" in name:
        strategy = package.Fabric(accelerator="cpu", strategy="deepspeed_stage_3")._strategy
    else:
        strategy = package.Trainer(
            accelerator="cpu", strategy="deepspeed_stage_3", logger=False
        ).strategy
    assert strategy.parallel_devices == [torch.device("cpu")]
    with patch("deepspeed.init_distributed", autospec=True) as started:
        strategy._init_deepspeed_distributed()
    started.assert_called_once_with("gloo", distributed_port=ANY, timeout=ANY)
    assert os.environ["MASTER_PORT"] == str(started.call_args.kwargs["distributed_port"])
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1")


def test_the_engine_passes_for_one_where_it_is_imitated() -> None:
    with patch("deepspeed.DeepSpeedEngine", autospec=True) as engine:
        assert isinstance(engine, Steppable)
    with patch("deepspeed.initialize", autospec=True) as initialize:
        assert deepspeed.initialize is initialize
    assert isinstance(mock_engine(), deepspeed.DeepSpeedEngine)
    tensor, engine = Mock(), mock_engine()
    DeepSpeedPrecision("32-true").backward(tensor, engine, 1, retain_graph=True)
    engine.backward.assert_called_once_with(tensor, 1, retain_graph=True)


def mock_engine(optimizer: Any = None) -> Any:
    engine = Mock(spec=deepspeed.DeepSpeedEngine, optimizer=optimizer)
    engine.modules.return_value = [engine]
    return engine


def test_fabric_saves_what_is_the_engines_and_what_is_not_apart(tmp_path: Path) -> None:
    strategy, optimizer = FabricStrategy(), Mock()
    for state in ({}, {"optimizer": optimizer}):
        engine = mock_engine(optimizer if state else None)
        strategy.save_checkpoint(tmp_path, {"model": engine, "epoch": 3, **state})
        engine.save_checkpoint.assert_called_once_with(
            tmp_path, client_state={"epoch": 3}, tag="checkpoint", exclude_frozen_parameters=False
        )
    with pytest.warns(UserWarning, match=r"collide with DeepSpeed.*mp_world_size"):
        strategy.save_checkpoint(tmp_path, {"model": mock_engine(), "mp_world_size": 2})
    for state, problem in (
        ({}, "Could not find a DeepSpeed model"),
        ({"model": nn.Linear(1, 1)}, "Could not find a DeepSpeed model"),
        ({"one": mock_engine(), "two": mock_engine()}, "Found multiple DeepSpeed engine modules"),
    ):
        with pytest.raises(ValueError, match=problem):
            strategy.save_checkpoint(tmp_path, state)
    with pytest.raises(TypeError, match="storage_options"):
        strategy.save_checkpoint(tmp_path, {}, storage_options=Mock())


def test_fabric_loads_what_is_the_engines_and_what_is_not_apart(tmp_path: Path) -> None:
    strategy = FabricStrategy()
    (folder := tmp_path / "checkpoint").mkdir()
    (folder / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    for optimizer in (None, Mock(spec=torch.optim.Optimizer), Mock(spec=DeepSpeedOptimizer)):
        engine = mock_engine(optimizer)
        engine.load_checkpoint.return_value = (None, {"epoch": 3, "ds_version": "x"})
        state = {"model": engine, "epoch": 0} | ({"optimizer": optimizer} if optimizer else {})
        assert strategy.load_checkpoint(tmp_path, state) == {"ds_version": "x"}
        assert state["epoch"] == 3
        engine.load_checkpoint.assert_called_once_with(
            tmp_path,
            tag="checkpoint",
            load_optimizer_states=optimizer is not None,
            load_lr_scheduler_states=False,
            load_module_strict=True,
        )
    engine.load_checkpoint.return_value = (None, None)
    with pytest.raises(RuntimeError, match="DeepSpeed was unable to load the checkpoint"):
        strategy.load_checkpoint(tmp_path, {"model": engine})
    with pytest.raises(ValueError, match="at least  a model instance"):
        strategy.load_checkpoint(tmp_path, {})


@pytest.mark.parametrize("indices", [[1], [1, 0], [0, 2]])
def test_devices_are_in_the_order_of_ranks(indices: list[int]) -> None:
    devices = [torch.device("cuda", index) for index in indices]
    accelerator = Mock(spec=lightning.fabric.accelerators.CUDAAccelerator)
    strategy = FabricStrategy(accelerator=accelerator, parallel_devices=devices)
    with pytest.raises(RuntimeError, match="don't match the local rank"):
        strategy.setup_environment()
