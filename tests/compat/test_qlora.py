"""Quantised bases of bitsandbytes under LoRA: one trajectory, every byte, statistics sharded."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")

import peft
import transformers
from bitsandbytes.nn import Int8Params, Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from forked import run_ranks
from zeroshard import gathered, initialize
from zeroshard.errors import CheckpointError

QUANTISED = (Params4bit, Int8Params)
STEPS = 2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with biases in its attention, saved unquantised."""
    path = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=32,
        attention_bias=True,
        use_cache=False,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@dataclass(frozen=True)
class Case:
    """How a base is quantised and trained."""

    storage: torch.dtype | None = torch.uint8  # None: 8 bits
    compute: torch.dtype = torch.bfloat16
    kind: str = "nf4"
    double: bool = True
    reentrant: bool | None = None  # activation checkpointing, and which
    stages: tuple[int, ...] = (1, 2, 3)

    @property
    def quantisation(self) -> BitsAndBytesConfig:
        if self.storage is None:
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.kind,
            bnb_4bit_use_double_quant=self.double,
            bnb_4bit_compute_dtype=self.compute,
            bnb_4bit_quant_storage=self.storage,
        )


def load(base: Path, case: Case) -> Any:
    transformers.utils.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=case.quantisation, dtype=case.compute, device_map={"": "cpu"}
    )
    torch.manual_seed(1)
    adapters = LoraConfig(
        r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    model = get_peft_model(model, adapters)
    if case.reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": case.reentrant})
        model.enable_input_require_grads()
    return model.train()


def trained(model: Any) -> list[Any]:
    return [param for param in model.parameters() if param.requires_grad]


def config_of(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0,
        "zero_optimization": {"stage": stage},
    }


def start(model: Any, case: Case, stage: int) -> Any:
    half = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(case.compute)
    config = config_of(stage)
    if half:
        config[half] = {"enabled": True}
    if half == "fp16":
        config[half]["initial_scale_power"] = 8
    optimizer = torch.optim.SGD(trained(model), lr=0.5)
    return initialize(model=model, optimizer=optimizer, config=config)[0]


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        yield torch.randint(0, 64, (4, 8), generator=generator)


def loss_of(model: Any, x: Tensor) -> Tensor:
    return model(input_ids=x, labels=x).loss


def engine_losses(engine: Any) -> list[float]:
    """The mean loss over ranks of every step, and of an evaluation after each."""
    rank, world, losses = dist.get_rank(), dist.get_world_size(), list[Tensor]()
    for x in batches():
        mine = x.chunk(world)[rank]
        loss = loss_of(engine, mine)
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach().float())
        engine.module.eval()
        with torch.no_grad():
            losses.append(loss_of(engine.module, mine).float())
        engine.module.train()
    means = torch.stack(losses)
    dist.all_reduce(means)
    return (means / world).tolist()


def plain_losses(model: Any) -> list[float]:
    optimizer, losses = torch.optim.SGD(trained(model), lr=0.5), list[float]()
    for x in batches():
        loss = loss_of(model, x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        with torch.no_grad():
            losses.append(loss_of(model, x).item())
    return losses


def as_bytes(state: dict[str, Any]) -> dict[str, Tensor]:
    return {
        name: value.detach().cpu().reshape(-1).view(torch.uint8).clone()
        for name, value in state.items()
        if "lora_" not in name
    }


def quantised_bytes(model: Any) -> dict[str, Tensor]:
    """Packed weights and whatever is saved with them."""
    state = model.state_dict()
    names = [name for name, param in model.named_parameters() if isinstance(param, QUANTISED)]
    stems = tuple(name.removesuffix("weight") for name in names)
    quantised = {n: v for n, v in state.items() if n.startswith(stems) and ".bias" not in n}
    assert len(quantised) > len(names)
    return as_bytes(quantised)


def assert_equal_bytes(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


CASES = {
    "4 bits": Case(reentrant=False, stages=(0, 1, 2, 3)),
    "4 bits in bf16, computed in fp32": Case(torch.bfloat16, torch.float32, reentrant=True),
    "4 bits in fp16": Case(torch.float16, double=False, reentrant=True),
    "4 bits in fp32, computed in fp16": Case(torch.float32, torch.float16, kind="fp4"),
    "8 bits": Case(None, reentrant=False),
    "8 bits, computed in fp32": Case(None, torch.float32, stages=(2, 3)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_all_stages_train_like_plain_torch_and_keep_every_byte(base: Path, case: Case) -> None:
    def on_rank(rank: int, world: int) -> tuple[list[float], dict[int, list[float]]]:
        found: dict[int, list[float]] = {}
        for stage in case.stages:
            model = load(base, case)
            params = {n: p for n, p in model.named_parameters() if isinstance(p, QUANTISED)}
            before, classes = quantised_bytes(model), [type(p) for p in params.values()]
            engine = start(model, case, stage)
            if stage == 3:
                assert all(param.numel() == 0 for param in params.values())
                assert all(isinstance(param, QUANTISED) for param in params.values())
                names = {type(param).__name__ for param in params.values()}
                assert names == {kind.__name__ for kind in classes}
            found[stage] = engine_losses(engine)
            with gathered(model):
                now = dict(model.named_parameters())
                assert all(now[name] is param for name, param in params.items())
                assert [type(param) for param in params.values()] == classes
                assert_equal_bytes(quantised_bytes(model), before)
            engine.destroy()
        return plain_losses(load(base, case)) if rank == 0 else [], found

    plain, found = run_ranks(on_rank, 2, timeout=110)[0]
    assert all(losses == pytest.approx(found[3], rel=1e-6) for losses in found.values())
    # Adapters are computed in 16 bits by the engine, and in fp32 by plain torch. An evaluation with
    # 8-bit weights rounds activations to 8 bits, too.
    rounding = 4e-3 if case.compute != torch.float32 else 1e-5 if case.storage else 1e-4
    assert found[3] == pytest.approx(plain, rel=rounding)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("case", [Case(), Case(None)], ids=["4 bits", "8 bits"])
def test_a_rank_holds_its_part_of_weights_and_statistics(case: Case, world: int) -> None:
    def on_rank(rank: int, world: int) -> tuple[int, int, int]:
        config = LlamaConfig(
            hidden_size=512,
            intermediate_size=1024,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=64,
        )
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        model = model.model.layers.to(torch.bfloat16).to_empty(device="cpu")
        transformers.integrations.replace_with_bnb_linear(
            model, quantization_config=case.quantisation
        )
        for module in model.modules():
            if isinstance(getattr(module, "weight", None), QUANTISED):
                kwargs = {k: v for k, v in vars(module.weight).items() if k not in {"CB", "SCB"}}
                values = torch.randn(module.weight.shape, dtype=torch.bfloat16)
                module.weight = type(module.weight)(values, requires_grad=False, **kwargs)
        initialize(model=model, config=config_of(0))[0].destroy()
        whole = held_outside(model)
        engine = initialize(model=model, config=config_of(3))[0]
        units = engine.runtime.units
        blocks = [unit for unit in units if len(unit.members) == 7]
        return whole, sum(u.parameter_bytes for u in units) + held_outside(model), len(blocks)

    for whole, held, num_gathers in run_ranks(on_rank, world):
        assert held <= 1.1 * whole / world
        assert num_gathers == 2  # one of everything quantised in each block


def held_outside(model: Any) -> int:
    """Bytes of the storages behind parameters and all that a quantiser keeps for them."""
    tensors: list[Any] = list(model.parameters())
    for module in model.modules():
        for owner in (module, getattr(module, "weight", None), getattr(module, "state", None)):
            state = getattr(owner, "quant_state", None)
            tensors += [getattr(owner, name, None) for name in ("CB", "SCB")]
            tensors += [
                getattr(each, "absmax", None) for each in (state, getattr(state, "state2", 0))
            ]
    storages = {
        storage.data_ptr(): storage.nbytes()
        for tensor in tensors
        if isinstance(tensor, Tensor)
        for storage in [tensor.untyped_storage()]
    }
    return sum(storages.values())


@pytest.mark.parametrize("stage", [2, 3])
def test_a_saved_model_has_the_statistics_and_saved_adapters_nothing_else(
    base: Path, stage: int, tmp_path: Path
) -> None:
    def on_rank(rank: int, world: int) -> None:
        model = load(base, Case())
        before = as_bytes(model.state_dict())
        engine = start(model, Case(), stage)
        whole = engine._zero3_consolidated_16bit_state_dict() if stage == 3 else model.state_dict()
        if whole is not None:
            quantised = {name for name in before if "absmax" in name or "nested" in name}
            assert len(quantised) == 2 * 7 * 3
            got = as_bytes(whole)
            assert got.keys() == before.keys()
            packed = {n for n, p in model.named_parameters() if isinstance(p, Params4bit)}
            for name in quantised | packed:
                assert torch.equal(got[name], before[name]), name
        if stage == 3:
            alone = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
            assert (alone is None) == (rank != 0)
            if alone is not None:
                assert [name for name in alone if "absmax" in name or "base_layer" in name] == []
                model.save_pretrained(tmp_path, state_dict=alone)
        elif rank == 0:
            model.save_pretrained(tmp_path)

    run_ranks(on_rank, 2)
    files = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files
    assert not any(name.startswith("model") for name in files)
    saved = peft.utils.load_peft_weights(str(tmp_path), device="cpu")
    assert len(saved) == 2 * 2 * 7
    assert all(weight.numel() for weight in saved.values())


@pytest.mark.parametrize("stage", [2, 3])
def test_adapters_are_merged_into_the_quantised_base_inside_a_gather(
    base: Path, stage: int
) -> None:
    def on_rank(rank: int, world: int) -> None:
        want = load(base, Case(compute=torch.float32)).merge_and_unload()
        model = load(base, Case(compute=torch.float32))
        engine = start(model, Case(compute=torch.float32), stage)
        with gathered(model):
            merged = model.merge_and_unload()
            x = next(batches())
            with torch.no_grad():
                assert_equal_bytes(as_bytes(merged.state_dict()), as_bytes(want.state_dict()))
        assert engine is not None
        weights = [m.weight for m in merged.modules() if isinstance(m, Linear4bit)]
        assert all(weight.numel() for weight in weights)  # which are no engine's any more
        assert x is not None

    run_ranks(on_rank, 2)


def test_what_is_not_quantised_yet_is_when_the_model_is_initialized() -> None:
    def on_rank(rank: int, world: int) -> None:
        torch.manual_seed(0)
        layer = Linear4bit(64, 64, quant_type="nf4")
        want = Linear4bit(64, 64, quant_type="nf4")
        want.load_state_dict(layer.state_dict())
        want.to("cpu")
        engine = initialize(model=layer, config=config_of(3))[0]
        x = torch.randn(2, 64)
        with torch.no_grad():
            assert torch.equal(engine(x), want.train()(x))

    run_ranks(on_rank, 2)


@pytest.mark.parametrize("kept", [True, False], ids=["whole", "adapters alone"])
@pytest.mark.parametrize("case", [Case(torch.bfloat16), Case(None)], ids=["4 bits", "8 bits"])
def test_training_goes_on_from_a_checkpoint_at_any_stage(
    base: Path, tmp_path: Path, case: Case, kept: bool
) -> None:
    def on_rank(rank: int, world: int) -> None:
        for before, after in ((3, 3), (3, 2), (2, 3)):
            engine, folder = start(load(base, case), case, before), tmp_path / f"{before}{after}"
            engine_losses(engine)
            engine.save_checkpoint(str(folder), exclude_frozen_parameters=not kept)
            want = engine_losses(engine)
            model = load(base, case)
            untouched = quantised_bytes(model)
            again = start(model, case, after)
            path, _ = again.load_checkpoint(str(folder), load_module_strict=kept)
            assert path is not None
            with gathered(model):
                assert_equal_bytes(quantised_bytes(model), untouched)
            assert engine_losses(again) == pytest.approx(want, rel=1e-6)

    run_ranks(on_rank, 2)


def test_a_checkpoint_of_another_quantised_base_is_refused(base: Path, tmp_path: Path) -> None:
    def on_rank(rank: int, world: int) -> None:
        engine = start(load(base, Case()), Case(), 3)
        engine.save_checkpoint(str(tmp_path))
        other = load(base, Case())
        layer = next(module for module in other.modules() if isinstance(module, Linear4bit))
        layer.weight.quant_state.state2.absmax.mul_(2)
        again = start(other, Case(), 3)
        with pytest.raises(CheckpointError, match=r"other statistics .*nested_absmax"):
            again.load_checkpoint(str(tmp_path))

    run_ranks(on_rank, 2)


# Through the Trainer


def become(rank: int, world: int) -> None:
    """Set what a launcher would have, so that libraries find the process group as theirs."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    os.environ |= dict(zip(names, map(str, (rank, rank, world, world)), strict=True))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def trainer_of(base: Path, folder: Path, stage: int, **changes: Any) -> Trainer:
    """As tutorials print it for fp16 on several GPUs, but for the number of steps."""
    settings = {
        "output_dir": str(folder / "out"),
        "max_steps": 2,
        "learning_rate": 2e-2,
        "fp16": True,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "deepspeed": str(folder / f"zero{stage}.json"),
        "gradient_checkpointing": True,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(**settings | changes)
    transformers.utils.logging.disable_progress_bar()
    case = Case(compute=torch.float16)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=case.quantisation)
    model = prepare_model_for_kbit_training(model)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    rows = [{"input_ids": row, "labels": row} for x in batches() for row in x]
    return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:2])


def history_of(trainer: Trainer) -> list[float]:
    entries = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return [entry[key] for entry in entries for key in ("loss", "grad_norm")]


def write_configs(folder: Path) -> None:
    for stage in (2, 3):
        config = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "fp16": {"enabled": "auto", "initial_scale_power": 8},
            "zero_optimization": {"stage": stage},
        }
        (folder / f"zero{stage}.json").write_text(json.dumps(config))


@pytest.mark.parametrize("world", [1, 2])
def test_the_trainer_trains_adapters_on_a_quantised_base_at_every_stage(
    base: Path, tmp_path: Path, world: int
) -> None:
    write_configs(tmp_path)

    def on_rank(rank: int, world: int) -> dict[int, Any]:
        become(rank, world)
        found: dict[int, Any] = {}
        for stage in (2, 3):
            trainer = trainer_of(base, tmp_path, stage)
            count = trainer.model.get_nb_trainable_parameters()
            trainer.train()
            assert trainer.model.get_nb_trainable_parameters() == count
            found[stage] = [*history_of(trainer), trainer.evaluate()["eval_loss"]]
            trainer.save_model(str(tmp_path / f"adapters{stage}"))
        return found

    found = run_ranks(on_rank, world)[0]
    assert len(found[2]) == 5
    assert found[2] == pytest.approx(found[3], rel=1e-6)
    two, three = (
        peft.utils.load_peft_weights(str(tmp_path / f"adapters{stage}"), device="cpu")
        for stage in (2, 3)
    )
    assert two.keys() == three.keys()
    assert all(torch.equal(two[name].half(), three[name].half()) for name in two)
    assert not (tmp_path / "adapters3" / "model.safetensors").exists()


def test_the_trainer_resumes_adapters_on_a_quantised_base_exactly(
    base: Path, tmp_path: Path
) -> None:
    write_configs(tmp_path)

    def on_rank(rank: int, world: int) -> None:
        become(rank, world)
        for stage in (2, 3):
            saving = {
                "output_dir": str(tmp_path / str(stage)),
                "save_strategy": "steps",
                "save_steps": 1,
            }
            whole = trainer_of(base, tmp_path, stage, **saving)
            whole.train()
            resumed = trainer_of(base, tmp_path, stage, **saving)
            with torch.no_grad():
                for param in trained(resumed.model):
                    param.fill_(1)
            resumed.train(resume_from_checkpoint=str(tmp_path / str(stage) / "checkpoint-1"))
            assert history_of(resumed) == history_of(whole)
            with gathered(whole.model), gathered(resumed.model):
                assert all(map(torch.equal, trained(resumed.model), trained(whole.model)))
                assert_equal_bytes(quantised_bytes(resumed.model), quantised_bytes(whole.model))
            names = {path.name for path in (tmp_path / str(stage) / "checkpoint-2").iterdir()}
            assert names >= {"adapter_model.safetensors", "adapter_config.json", "latest"}
            assert "model.safetensors" not in names

    run_ranks(on_rank, 2)
