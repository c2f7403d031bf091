"""What the tutorials leave to their readers: a model, a tokenizer and data, small and made here.

No file is fetched: the model is built from a configuration, the tokenizer reads bytes, and the text
is a module of Python's standard library.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

__all__ = ["Windows", "byte_tokenizer", "or_as_on_the_command_line", "small_llama"]


def small_llama() -> LlamaForCausalLM:
    """A Llama with 0.1 million parameters, the same one on every rank."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=258,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            pad_token_id=256,
            bos_token_id=None,
            eos_token_id=257,
        )
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each byte, and two of its own."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<pad>", "<eos>"]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


class Windows(Dataset[dict[str, Tensor]]):
    """Windows of a text as Hugging Face's models take them: the labels are the inputs."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, num_tokens: int = 32) -> None:
        text = Path(argparse.__file__).read_text(encoding="utf-8")
        tokens = torch.tensor(tokenizer(text)["input_ids"])
        self._windows = tokens[: len(tokens) // num_tokens * num_tokens].view(-1, num_tokens)[:256]

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._windows[index], "labels": self._windows[index]}


def or_as_on_the_command_line(printed: TrainingArguments) -> TrainingArguments:
    """The printed arguments, except for those that the command line names."""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    parser.add_argument("--deepspeed", metavar="JSON", help="DeepSpeed's configuration")
    parser.add_argument("--per_device_train_batch_size", type=int)
    parser.add_argument("--gradient_accumulation_steps", type=int)
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--max_steps", type=int)
    parser.add_argument("--logging_steps", type=int)
    parser.add_argument("--output_dir")
    return replace(printed, **vars(parser.parse_args()))
