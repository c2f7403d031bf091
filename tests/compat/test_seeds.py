"""The scripts of `examples/seeds`: launched as their tutorials print it, and as forked ranks."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import logging
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import accelerate  # noqa: F401 - imported before forking, for all ranks at once
import bitsandbytes  # noqa: F401
import peft  # noqa: F401
import pytest
import torch
import transformers
from transformers import Trainer, TrainingArguments

import deepspeed
import zeroshard
from deepspeed._local_rank import HostRank
from forked import RankError, run_ranks

ROOT = Path(__file__).resolve().parents[2]
SEEDS = ROOT / "examples" / "seeds"
LAUNCHER_S_WORDS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
PRINTED_OPTIONS = (
    *("--deepspeed", "ds_config.json"),
    *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"),
)


def launch(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the folder of the scripts, on a machine without GPUs."""
    program = shutil.which(command[0], path=Path(sys.executable).parent)
    modules = {"deepspeed": "deepspeed.launcher.runner", "accelerate": "accelerate.commands.launch"}
    start = [program] if program else [sys.executable, "-m", modules[command[0]]]
    return subprocess.run(
        [*start, *command[1:]],
        capture_output=True,
        text=True,
        check=False,
        cwd=SEEDS,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env},
    )


@dataclass(frozen=True)
class Ran:
    """What is left of a script: its names, its output, and our warnings."""

    names: Mapping[str, Any]
    out: str
    warnings: list[str]

    def losses(self) -> list[float]:
        """The losses that were printed, or those that the Trainer logged."""
        if "trainer" not in self.names:
            return losses_of(self.out)
        return [entry["loss"] for entry in self.names["trainer"].state.log_history[:-1]]


def run_script(script: str, *options: str) -> Ran:
    """Run a script in this process."""
    os.chdir(SEEDS)
    transformers.logging.set_verbosity_warning()  # as it is in a new process
    sys.path.insert(0, str(SEEDS))  # as Python does for a script
    sys.argv = [script, *options]
    transformers.logging.set_verbosity_warning()  # whatever other tests have set
    records: SimpleQueue[logging.LogRecord] = SimpleQueue()
    logging.getLogger("zeroshard").addHandler(handler := QueueHandler(records))
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()),
    ):
        names = runpy.run_path(script, run_name="__main__")
    logging.getLogger("zeroshard").removeHandler(handler)
    said = [records.get() for _ in range(records.qsize())]
    warnings = [record.getMessage() for record in said if record.levelno >= logging.WARNING]
    return Ran(names, out.getvalue(), warnings)


def messages(stderr: str) -> list[str]:
    """The lines that are neither progress bars nor of a library that misses another."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", stderr)]
    bar = re.compile(r"\d+%\|")
    return [
        line
        for line in lines
        if line and not bar.search(line) and not line.startswith("Failed to load CPU gemm")
    ]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def losses_of(text: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss ([\d.]+)", text)]


# Launched as printed


@pytest.mark.timeout(240)
def test_the_trainer_s_script_runs_by_the_printed_command(tmp_path: Path) -> None:
    ended = launch(
        *("deepspeed", "--num_gpus=2", "seed_trainer.py", *PRINTED_OPTIONS),
        *("--max_steps", "4", "--logging_steps", "1", "--learning_rate", "3e-3"),
        *("--output_dir", str(tmp_path)),
    )
    assert ended.returncode == 0, ended.stderr
    losses = [float(loss) for loss in re.findall(r"'loss': '([\d.]+)'", ended.stdout)]
    assert len(losses) == 4, "only rank 0 logs"
    assert losses[-1] < losses[0] - 0.2
    assert messages(ended.stderr) == [
        "zeroshard: starting 2 ranks on the CPU, as no GPU is visible",
        # Accelerate's word about the Trainer, which sets the number twice.
        "[RANK 0] Gradient accumulation steps mismatch: GradientAccumulationPlugin has 1, "
        "DeepSpeed config has 4. Using DeepSpeed's value.",
    ]
    saved = tmp_path / "checkpoint-4"
    assert (saved / "model.safetensors").is_file(), "stage3_gather_16bit_weights_on_model_save"
    assert (saved / "latest").read_text().strip() == "global_step4"


@pytest.mark.timeout(240)
def test_accelerate_s_loop_runs_with_the_file_that_accelerate_config_writes(tmp_path: Path) -> None:
    default = tmp_path / "accelerate" / "default_config.yaml"
    default.parent.mkdir()
    shutil.copy(SEEDS / "accelerate.yaml", default)

    ended = launch(
        *("accelerate", "launch", "--num_processes=2", "seed_accelerate.py", "--lr", "3e-3"),
        HF_HOME=str(tmp_path),
    )

    assert ended.returncode == 0, ended.stderr
    losses = losses_of(ended.stdout)
    assert len(losses) == 256 // (8 * 2), "each rank has half of the data, and one of them prints"
    assert losses[-1] < losses[0] - 1
    assert messages(ended.stderr) == [
        "zeroshard: rank 0 of 2 (torchrun) joined over gloo on cpu",
        f"zeroshard: DeepSpeed info: version={deepspeed.__version__}, "
        f"run by zeroshard {zeroshard.__version__}",
    ]


# In forked ranks


def test_a_script_that_no_launcher_started_is_a_world_of_one() -> None:
    def alone(rank: int, world: int) -> tuple[list[float], int, int]:
        for name in LAUNCHER_S_WORDS:
            del os.environ[name]
        sys.modules["mpi4py"] = None  # type: ignore[assignment] - to import it fails
        ran = run_script("seed_standalone.py", "--lr", "3e-3")
        engine = ran.names["model_engine"]
        return ran.losses(), engine.world_size, engine.train_batch_size()

    [(losses, world, batch)] = run_ranks(alone, 1, process_group=False)
    assert (world, batch) == (1, 8)
    assert len(losses) == 16
    assert losses[-1] < losses[0] - 1


def test_the_standalone_loop_learns_the_same_at_all_stages() -> None:
    def rank(rank: int, world: int) -> list[list[float]]:
        runs: list[list[float]] = []
        for stage in ("0", "1", "2", "3"):
            options = ("--lr", "3e-3", "--steps", "6", "--stage", stage)
            ran = run_script("seed_standalone.py", *options)
            ran.names["model_engine"].destroy()
            runs.append(ran.losses())
        return runs

    first, second = run_ranks(rank)
    assert second == [[]] * 4, "only rank 0 prints"
    assert len(first[0]) == 6
    assert first[0][-1] < first[0][0] - 0.5
    assert first == [first[0]] * 4


def test_the_block_for_fp16_finds_a_scale_by_itself() -> None:
    def rank(rank: int, world: int) -> tuple[list[float], float, int]:
        ran = run_script("seed_standalone.py", "--lr", "3e-3", "--steps", "8", "--fp16")
        engine = ran.names["model_engine"]
        return ran.losses(), engine.loss_scale, engine.skipped_steps

    (losses, scale, skipped), (_, other_scale, _) = run_ranks(rank)
    assert losses[-1] < losses[0] - 0.5
    assert len(losses) == 8 - skipped or len(losses) == 8
    assert scale == other_scale == 2.0 ** (16 - max(0, skipped - 1))


def test_numbers_for_four_ranks_are_refused_on_two_with_what_to_write() -> None:
    tree = ast.parse((SEEDS / "seed_standalone.py").read_text())
    [printed] = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id == "ds_config"
    ]

    def rank(rank: int, world: int) -> None:
        deepspeed.initialize(model=torch.nn.Linear(2, 2), config=printed)

    with pytest.raises(RankError) as caught:
        run_ranks(rank)
    text = str(caught.value)
    assert "train_batch_size 32 != 4 (micro) x 2 (accumulation) x 2 (ranks) = 16" in text
    assert '"train_batch_size": 16' in text
    assert "the number of ranks: 4" in text


def test_offload_changes_no_number(tmp_path: Path) -> None:
    on_nvme = json.loads((SEEDS / "ds_config_7b_nvme.json").read_text())
    on_nvme["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(tmp_path)
    nvme = tmp_path / "nvme.json"
    nvme.write_text(json.dumps(on_nvme))
    options = (
        *("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "8"),
        *("--max_steps", "2", "--logging_steps", "1", "--output_dir", str(tmp_path)),
    )

    def rank(rank: int, world: int) -> list[tuple[list[float], list[str]]]:
        configs = ("ds_config.json", "ds_config_7b.json", str(nvme))
        runs = [run_script("seed_trainer.py", "--deepspeed", name, *options) for name in configs]
        return [(ran.losses(), ran.warnings) for ran in runs]

    ((here, silence), (on_host, as_silent), (in_files, warnings)), _ = run_ranks(rank)
    assert len(here) == 2
    assert here == on_host == in_files
    assert silence == as_silent == []
    [warning] = warnings
    assert "zero_optimization.offload_optimizer.fast_init. Files are preallocated" in warning


def test_qlora_learns_the_same_by_each_printed_configuration(tmp_path: Path) -> None:
    options = (
        *("--max_steps", "2", "--logging_steps", "1", "--learning_rate", "1e-2"),
        *("--gradient_accumulation_steps", "2"),
    )
    configs = ("zero1.json", "zero2.json", "zero3.json")

    def trained(*given: str) -> list[float]:
        folder = ("--output_dir", str(tmp_path / str(os.environ.get("WORLD_SIZE"))))
        return run_script("seed_qlora.py", *given, *options, *folder).losses()

    def alone(rank: int, world: int) -> list[list[float]]:
        for name in LAUNCHER_S_WORDS:
            del os.environ[name]
        return [trained(), trained("--deepspeed", "zero2.json")]

    def together(rank: int, world: int) -> list[list[float]]:
        return [trained("--deepspeed", config) for config in configs]

    [(plain, zero)] = run_ranks(alone, 1, process_group=False)
    of_stages, _ = run_ranks(together)
    assert of_stages == [of_stages[0]] * len(configs)
    assert of_stages[0][-1] < of_stages[0][0]
    assert zero == pytest.approx(plain, abs=2e-3)


def test_gradient_checkpointing_changes_no_loss(tmp_path: Path) -> None:
    def rank(rank: int, world: int) -> str:
        return run_script("seed_checkpointing.py").out

    out, _ = run_ranks(rank)
    losses = re.findall(r"(.+), (without|with): mean loss ([\d.]+)", out)
    assert len(losses) == 6
    for (what, _, loss), (same, _, with_checkpointing) in zip(
        losses[::2], losses[1::2], strict=True
    ):
        assert what == same
        assert loss == with_checkpointing, what


# What stands around them


@pytest.mark.parametrize("joined_by", ["the test", "Accelerate"])
def test_a_trainer_that_is_not_told_of_the_cpu_sees_all_ranks(
    joined_by: str, tmp_path: Path
) -> None:
    config = {"train_batch_size": "auto", "zero_optimization": {"stage": 2}}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def rank(rank: int, world: int) -> tuple[int, int, int, int]:
        os.environ.update(meeting)
        sys.path.insert(0, str(SEEDS))
        small = importlib.import_module("small")
        args = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            max_steps=1,
            deepspeed=config,
            save_strategy="no",
        )
        data = small.Windows(small.byte_tokenizer())
        trainer = Trainer(model=small.small_llama(), args=args, train_dataset=data)
        batches = len(trainer.get_train_dataloader())
        trainer.train()
        batch = trainer.model_wrapped.train_batch_size()
        return args.world_size, args.process_index, batches, batch

    found = run_ranks(rank, process_group=joined_by == "the test")
    assert found == [(2, number, 256 // (2 * 2), 2 * 2) for number in (0, 1)]


def test_a_rank_on_the_host_is_a_number_that_tensors_take_for_the_cpu() -> None:
    rank = HostRank(1)
    tokens = torch.ones(2, dtype=torch.long)
    assert tokens.to(rank).device == tokens.to(device=rank).device == torch.device("cpu")
    assert tokens.to(rank, torch.float32, non_blocking=True).dtype == torch.float32
    assert torch.zeros(1, device=rank).device == torch.device("cpu")
    assert tokens[rank] == 1
    assert torch.full((1,), rank).item() == 1
    assert rank == 1
    assert 1 + rank == HostRank(2)
    assert 0 < rank < 2.5
    assert 0.5 * rank == rank / 2 == 0.5
    assert hash(rank) == hash(1)
    assert (f"{rank:02d}", str(rank), repr(rank)) == ("01", "1", "1")
    assert [*range(rank)] == [0]
    assert not HostRank(0)


def test_the_page_of_versions_names_what_is_pinned() -> None:
    page = (ROOT / "docs" / "reference" / "versions.md").read_text()
    listed = dict(re.findall(r"^\| ([\w-]+) \| ([\d.]+) \|", page, re.MULTILINE))
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M))
    assert set(listed) >= {"accelerate", "bitsandbytes", "lightning", "peft", "transformers", "trl"}
    assert listed == {name: pinned[name] for name in listed}
