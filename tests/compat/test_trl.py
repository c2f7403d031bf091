"""TRL's trainers, unchanged, on two CPU ranks: with ZeRO they log what they log with DDP."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset, load_from_disk
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from forked import run_ranks

DDP = None  # in place of a stage
LORA = LoraConfig(r=4, target_modules="all-linear")

Log = dict[str, float]

# A model and its data ----------------------------------------------------------------------------

_WORDS = [f"w{number}" for number in range(50)]
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' [end] ' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)


def chat(number: int, length: int) -> list[dict[str, str]]:
    """A question and an answer."""
    answer = " ".join(_WORDS[number : number + length])
    return [
        {"role": "user", "content": f"w{number} w{number + 1}"},
        {"role": "assistant", "content": answer},
    ]


CHATS = [{"messages": chat(number, 3 + number % 3)} for number in range(16)]
PROMPTS = [{"prompt": chat(number, 0)[:1]} for number in range(16)]
PAIRS = [
    {
        "prompt": chat(number, 0)[:1],
        "chosen": chat(number, 4)[1:],
        "rejected": chat(number + 9, 2)[1:],
    }
    for number in range(16)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a language model and a reward model with their tokenizer, and preferences."""
    folder = tmp_path_factory.mktemp("trl")
    vocab = {word: n for n, word in enumerate(["[pad]", "[end]", "user", "assistant", *_WORDS])}
    words = Tokenizer(WordLevel(vocab, unk_token="[pad]"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[pad]", eos_token="[end]", chat_template=_TEMPLATE
    )
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        num_labels=1,
    )
    torch.manual_seed(0)
    for kind in (LlamaForCausalLM, LlamaForSequenceClassification):
        kind(config).save_pretrained(folder / kind.__name__)
        tokenizer.save_pretrained(folder / kind.__name__)
    Dataset.from_list(PAIRS).save_to_disk(folder / "pairs")
    return folder


# Trainers ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Job:
    """What a script has: its folder, and the arguments that it passes on."""

    folder: Path
    arguments: dict[str, Any]

    @property
    def model(self) -> str:
        return str(self.folder / "LlamaForCausalLM")

    def make(self, trainer: Any, kind: Any, data: Any, **more: Any) -> Any:
        """A trainer; arguments that its class of arguments knows go there."""
        known = {field.name for field in dataclasses.fields(kind)}
        own = {key: more.pop(key) for key in list(more) if key in known}
        args = kind(**{**self.arguments, **own})
        data = Dataset.from_list(data) if isinstance(data, list) else data
        return trainer(more.pop("model", self.model), args=args, train_dataset=data, **more)


def sft(job: Job, **more: Any) -> Any:
    return job.make(SFTTrainer, SFTConfig, CHATS, **more)


def sft_of_adapters_with_checkpointing(job: Job) -> Any:
    return sft(job, peft_config=LORA, gradient_checkpointing=True)


def sft_of_a_stream(job: Job) -> Any:
    data = Dataset.from_list(CHATS).to_iterable_dataset()
    return job.make(SFTTrainer, SFTConfig, data)


def dpo(job: Job, **more: Any) -> Any:
    # From a file, as what is computed beforehand is cached beside it.
    return job.make(DPOTrainer, DPOConfig, load_from_disk(job.folder / "pairs"), **more)


def dpo_of_adapters(job: Job) -> Any:
    return dpo(job, peft_config=LORA)


def dpo_with_references_computed_beforehand(job: Job) -> Any:
    """The model is in an engine for that, and in another one when it trains."""
    return dpo(job, precompute_ref_log_probs=True)


def kto(job: Job) -> Any:
    rows = [
        {"prompt": pair["prompt"], "completion": pair[kind], "label": kind == "chosen"}
        for pair in PAIRS
        for kind in ("chosen", "rejected")
    ]
    return job.make(KTOTrainer, KTOConfig, rows)


def reward(job: Job) -> Any:
    model = str(job.folder / "LlamaForSequenceClassification")
    return job.make(RewardTrainer, RewardConfig, PAIRS, model=model)


def score(completions: list[Any], **_: Any) -> list[float]:
    """A reward that differs from one completion to the next."""
    return [sum(map(ord, str(completion))) % 17 / 17 for completion in completions]


GENERATION = {"max_completion_length": 6, "num_generations": 2, "reward_funcs": score}


def grpo(job: Job, **more: Any) -> Any:
    return job.make(GRPOTrainer, GRPOConfig, PROMPTS, **{**GENERATION, **more})


def grpo_that_generates_from_shards(job: Job) -> Any:
    return grpo(job, ds3_gather_for_generation=False)


def grpo_with_a_reference_that_follows(job: Job) -> Any:
    return grpo(job, beta=0.1, sync_ref_model=True, ref_model_sync_steps=1)


def grpo_of_adapters(job: Job) -> Any:
    return grpo(job, beta=0.1, peft_config=LORA)


def rloo(job: Job) -> Any:
    return job.make(RLOOTrainer, RLOOConfig, PROMPTS, **GENERATION, beta=0.1)


# Runs --------------------------------------------------------------------------------------------


def config_of(stage: int) -> dict[str, Any]:
    """A configuration as tutorials print it."""
    third = ("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": "auto",
            **dict.fromkeys(third if stage == 3 else (), "auto"),
        },
    }


def on_two_ranks(work: Callable[[Job], Any], folder: Path, stage: int | None) -> list[Any]:
    """What ``work`` returns on each of two ranks."""

    def rank_work(rank: int, world: int) -> Any:
        os.environ["TQDM_DISABLE"] = "1"
        tqdm.set_lock(threading.RLock())  # its own is shared with ranks that were ended
        torch.manual_seed(0)
        arguments = {
            "output_dir": str(folder / "out"),
            "use_cpu": True,
            "bf16": False,
            "per_device_train_batch_size": 2,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "gradient_checkpointing": False,
        }
        if stage is not None:
            arguments["deepspeed"] = config_of(stage)
        return work(Job(folder, arguments))

    return run_ranks(rank_work)


def logs_of(build: Callable[[Job], Any], folder: Path, stage: int | None) -> list[Log]:
    """What a training logs at each of its steps."""

    def work(job: Job) -> list[Log]:
        trainer = build(job)
        trainer.train()
        return [
            {key: value for key, value in log.items() if "time" not in key}
            for log in trainer.state.log_history
            if "loss" in log
        ]

    first, second = on_two_ranks(work, folder, stage)
    assert [log["loss"] for log in first] == [log["loss"] for log in second]
    return first


def assert_alike(ours: list[Log], theirs: list[Log]) -> None:
    """Rounding apart, all that is logged is the same: losses, norms, lengths, rewards."""
    assert len(ours) == len(theirs) == 2
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-5, nan_ok=True)


ALL = [
    *(sft, sft_of_adapters_with_checkpointing, sft_of_a_stream),
    *(dpo, dpo_of_adapters, dpo_with_references_computed_beforehand, kto, reward),
    *(grpo, grpo_that_generates_from_shards, grpo_with_a_reference_that_follows),
    *(grpo_of_adapters, rloo),
]


@pytest.mark.parametrize("build", ALL, ids=lambda build: build.__name__)
def test_a_trainer_logs_with_zero_what_it_logs_with_ddp(build: Any, folder: Path) -> None:
    want = logs_of(build, folder, DDP)
    assert want[0]["grad_norm"] > 0
    for stage in (0, 1, 2, 3) if build is sft else (2, 3):
        assert_alike(logs_of(build, folder, stage), want)


def test_evaluation_alone_generates_from_an_engine_without_optimizer(folder: Path) -> None:
    def work(job: Job) -> dict[str, float]:
        metrics = grpo(job, eval_dataset=Dataset.from_list(PROMPTS[:4])).evaluate()
        return {key: metrics[key] for key in ("eval_reward", "eval_entropy")}

    want, got = (on_two_ranks(work, folder, stage)[0] for stage in (DDP, 3))
    assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("gathers", [True, False])
def test_ranks_may_generate_different_numbers_of_words(folder: Path, gathers: bool) -> None:
    def work(job: Job) -> list[int]:
        lengths: list[int] = []

        def count(completion_ids: list[list[int]], **_: Any) -> list[float]:
            lengths.extend(len(ids) for ids in completion_ids)
            return [float(number) for number in range(len(completion_ids))]

        most = 3 if dist.get_rank() == 0 else 12
        grpo(
            job,
            ds3_gather_for_generation=gathers,
            max_completion_length=most,
            reward_funcs=count,
        ).train()
        return lengths

    few, many = on_two_ranks(work, folder, 3)
    assert max(few) == 3
    assert max(many) == 12
