"""Adapters of PEFT on bases that are whole or in shards: made, trained, counted, saved, resumed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("peft")

import peft
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from deepspeed import initialize
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.zero import GatheredParameters, Init
from forked import run_ranks

LR = 0.2


def config_of(stage: int, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0,
        "zero_optimization": {"stage": stage},
        **more,
    }


def tiny() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=32,
        use_cache=False,
        tie_word_embeddings=False,
        pad_token_id=0,
    )


def plain_base() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny())


def sharded_base(stage: int) -> Any:
    """A base with the weights of the plain one, in shards from its construction on at stage 3."""
    if stage < 3:
        return plain_base()
    with Init(config_dict_or_path=config_of(stage)):
        model = LlamaForCausalLM(tiny())
    weights = plain_base().state_dict()
    with GatheredParameters(model.parameters(), modifier_rank=0):
        if dist.get_rank() == 0:
            model.load_state_dict(weights)
    return model


def start(model: Any, stage: int, **more: Any) -> Any:
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.SGD(params, lr=LR)
    return initialize(model=model, optimizer=optimizer, config=config_of(stage, **more))[0]


def batches(number: int = 2) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(number):
        yield torch.randint(1, 64, (4, 8), generator=generator)


def loss_of(model: Any, x: Tensor) -> Tensor:
    return model(input_ids=x, labels=x).loss


def step(engine: Any, x: Tensor, update: Any = None) -> float:
    loss = loss_of(engine, x.chunk(dist.get_world_size())[dist.get_rank()])
    engine.backward(loss)
    if update is not None:
        update()
    engine.step()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return mean.item() / dist.get_world_size()


def train(engine: Any) -> list[float]:
    return [step(engine, x) for x in batches()]


def plain_train(model: Any, update: Any = None, number: int = 2) -> list[float]:
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer, losses = torch.optim.SGD(params, lr=LR), list[float]()
    for x in batches(number):
        loss = loss_of(model, x)
        loss.backward()
        if update is not None:
            update()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adapted(model: Any, config: Any, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return get_peft_model(model, config).train()


def lora(**more: Any) -> LoraConfig:
    return LoraConfig(r=4, **{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **more})


CONFIGS = {
    "LoRA": lora(init_lora_weights=False),
    "LoRA and a head that is trained whole": lora(
        init_lora_weights=False, modules_to_save=["lm_head"], target_modules=["q_proj", "v_proj"]
    ),
    "PiSSA": lora(init_lora_weights="pissa"),
    "OLoRA": lora(init_lora_weights="olora"),
    "DoRA": lora(use_dora=True),
    "IA3": IA3Config(task_type="CAUSAL_LM", init_ia3_weights=False),
    "VeRA": VeraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"]),
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_adapters_on_a_sharded_base_train_as_on_a_whole_one(config: Any) -> None:
    def on_rank(rank: int, world: int) -> tuple[list[float], list[float]]:
        alive = HfDeepSpeedConfig(config_of(3))  # what makes PEFT gather what it reads
        model = adapted(sharded_base(3), config)
        del alive
        want = adapted(plain_base(), config)
        assert model.get_nb_trainable_parameters() == want.get_nb_trainable_parameters()
        engine = start(model, 3)
        assert model.get_nb_trainable_parameters() == want.get_nb_trainable_parameters()
        return train(engine), plain_train(want) if rank == 0 else []

    got, want = run_ranks(on_rank, 2)[0]
    assert got == pytest.approx(want, rel=2e-5)


def test_adapters_may_be_added_while_modules_are_built_in_shards() -> None:
    # PEFT hands attributes on to the model inside, and is built while there is none yet.
    def on_rank(rank: int, world: int) -> tuple[list[float], list[float]]:
        config = lora(init_lora_weights=False)
        with Init(config_dict_or_path=config_of(3)):
            model = adapted(plain_base(), config)
        assert {param.numel() for param in model.parameters()} == {0}
        want = adapted(plain_base(), config) if rank == 0 else None
        return train(start(model, 3)), plain_train(want) if want is not None else []

    got, want = run_ranks(on_rank, 2)[0]
    assert got == pytest.approx(want, rel=2e-5)


def test_initial_values_of_loftq_are_computed_from_the_gathered_base(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loftq(weight: Tensor, *, num_bits: int, reduced_rank: int, **_: Any) -> tuple[Tensor, ...]:
        """What PEFT computes on GPUs alone: a coarser base, and adapters for the rest."""
        step = weight.abs().max() / 2 ** (num_bits - 1)
        coarse = (weight / step).round() * step
        left, values, right = torch.linalg.svd(weight - coarse, full_matrices=False)
        rank = slice(reduced_rank)
        return coarse.detach(), right[rank].detach(), (left[:, rank] * values[rank]).detach()

    monkeypatch.setattr(peft.tuners.lora.layer, "loftq_init", loftq)
    config = lora(init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1})

    def on_rank(rank: int, world: int) -> tuple[list[float], list[float]]:
        alive = HfDeepSpeedConfig(config_of(3))
        model = adapted(sharded_base(3), config)
        del alive
        losses = train(start(model, 3))
        return losses, plain_train(adapted(plain_base(), config)) if rank == 0 else []

    got, want = run_ranks(on_rank, 2)[0]
    assert got == pytest.approx(want, rel=2e-5)


def test_lora_has_one_trajectory_at_all_stages_with_recomputation_or_without() -> None:
    def on_rank(rank: int, world: int) -> tuple[dict[int, list[float]], list[float]]:
        def model(stage: int, reentrant: bool | None) -> Any:
            made = adapted(sharded_base(stage), lora(init_lora_weights=False))
            if reentrant is not None:
                made.gradient_checkpointing_enable({"use_reentrant": reentrant})
                made.enable_input_require_grads()
            return made

        ways = [(0, None), (1, True), (2, False), (3, None), (3, True), (3, False)]
        found = {stage: train(start(model(stage, how), stage)) for stage, how in ways}
        return found, plain_train(model(0, None)) if rank == 0 else []

    found, want = run_ranks(on_rank, 2)[0]
    for losses in found.values():
        assert losses == pytest.approx(want, rel=1e-6)


def test_masters_of_adapters_in_fp32_keep_what_bf16_rounds_away() -> None:
    def on_rank(rank: int, world: int) -> None:
        model = adapted(plain_base().to(torch.bfloat16), lora(init_lora_weights=False))
        adapters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert {param.dtype for param in adapters.values()} == {torch.float32}
        before = {name: param.detach().clone() for name, param in adapters.items()}
        engine = start(model, 3, bf16={"enabled": True})
        for name, param in adapters.items():
            assert param.dtype == torch.bfloat16
            master = safe_get_full_fp32_param(param)
            assert torch.equal(master, before[name])
        train(engine)

    run_ranks(on_rank, 2)


def test_adalora_reads_gradients_and_gives_up_directions_in_a_gather() -> None:
    config = AdaLoraConfig(
        init_r=4,
        target_r=2,
        tinit=0,
        tfinal=1,
        deltaT=1,
        total_step=4,
        init_lora_weights=False,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )

    def updating(model: Any, *, gathers: bool) -> Any:
        numbers = iter(range(1, 9))

        def update() -> None:
            with GatheredParameters(model.parameters() if gathers else None, modifier_rank=0):
                model.base_model.update_and_allocate(next(numbers))

        return update

    def on_rank(rank: int, world: int) -> tuple[dict[int, list[float]], list[float]]:
        found: dict[int, list[float]] = {}
        patterns: list[Any] = []
        for stage in (1, 2, 3):
            alive = HfDeepSpeedConfig(config_of(stage))
            model = adapted(sharded_base(stage), config)
            engine, update = start(model, stage), updating(model, gathers=True)
            found[stage] = [step(engine, x, update) for x in batches(3)]
            patterns.append(model.peft_config["default"].rank_pattern)
            del alive
        if rank:
            return found, []
        model = adapted(plain_base(), config)
        want = plain_train(model, updating(model, gathers=False), 3)
        pattern = model.peft_config["default"].rank_pattern
        assert not all(all(kept) for kept in pattern.values())
        assert patterns == [pattern] * 3
        return found, want

    found, want = run_ranks(on_rank, 2)[0]
    for losses in found.values():
        assert losses == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_adapters_are_added_and_switched_before_the_engine_and_saved_alone(
    stage: int, tmp_path: Path
) -> None:
    def on_rank(rank: int, world: int) -> tuple[list[float], list[float]]:
        alive = HfDeepSpeedConfig(config_of(stage))
        model = adapted(sharded_base(stage), lora(init_lora_weights=False))
        model.add_adapter("second", lora())
        model.set_adapter("second")
        model.set_adapter("default")
        engine = start(model, stage)
        losses = train(engine)
        state = (
            engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
            if stage == 3
            else model.state_dict()
        )
        if rank == 0:
            model.save_pretrained(tmp_path, state_dict=state, selected_adapters=["default"])
        dist.barrier()
        del alive
        saved = PeftModel.from_pretrained(plain_base(), str(tmp_path))
        x = next(batches())
        with torch.no_grad():
            want = loss_of(saved, x).item()
            return [loss_of(engine.module.eval(), x).item()], [want, *losses]

    (got,), (want, *_) = run_ranks(on_rank, 2)[0]
    assert got == pytest.approx(want, rel=1e-6)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".safetensors", ".json", ".md"}
    weights = peft.utils.load_peft_weights(str(tmp_path), device="cpu")
    assert all("lora_" in name for name in weights)
