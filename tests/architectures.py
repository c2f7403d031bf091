"""Tiny models of many transformers architectures, each with a batch and a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

__all__ = ["ARCHITECTURES", "Architecture"]

VOCABULARY = 64
HIDDEN = 32

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "embedding_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 32}
_SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}
_VISION = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_SPEECH = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "conv_dim": (16, 16),
    "conv_kernel": (3, 3),
    "conv_stride": (2, 2),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "group",
    "mask_time_prob": 0.0,
    "pad_token_id": 0,
    "ctc_zero_infinity": True,
    "classifier_proj_size": 16,
}


def _ids(generator: torch.Generator, length: int = 8) -> Tensor:
    return torch.randint(3, VOCABULARY, (2, length), generator=generator)


def _causal(generator: torch.Generator) -> dict[str, Tensor]:
    ids = _ids(generator)
    return {"input_ids": ids, "labels": ids}


def _masked(generator: torch.Generator) -> dict[str, Tensor]:
    return {"input_ids": _ids(generator), "labels": _ids(generator)}


def _pixels(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(2, 3, 16, 16, generator=generator),
        "labels": torch.tensor([0, 1]),
    }


def _pairs(generator: torch.Generator) -> dict[str, Any]:
    return {
        "input_ids": _ids(generator),
        "pixel_values": torch.randn(2, 3, 16, 16, generator=generator),
        "return_loss": True,
    }


def _audio(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "input_values": torch.randn(2, 200, generator=generator),
        "labels": torch.tensor([0, 1]),
    }


def _mel(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "input_features": torch.randn(2, 8, 32, generator=generator),
        "labels": _ids(generator),
    }


def _series(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "past_values": torch.randn(2, 32, 2, generator=generator),
        "future_values": torch.randn(2, 8, 2, generator=generator),
    }


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model class with the configuration of a tiny model, and what to train it on."""

    name: str
    config: str
    model: str
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    batch: Callable[[torch.Generator], dict[str, Any]] = _causal
    tolerance: float = 1e-6

    def make_config(self) -> Any:
        """A new configuration."""
        return getattr(transformers, self.config)(**self.settings)

    @property
    def model_class(self) -> Any:
        """The class of the model."""
        return getattr(transformers, self.model)


def _causal_lm(name: str, prefix: str, **more: Any) -> Architecture:
    return Architecture(name, f"{prefix}Config", f"{prefix}ForCausalLM", {**_DECODER, **more})


def _encoder(name: str, prefix: str, **more: Any) -> Architecture:
    settings = {**_ENCODER, **more}
    return Architecture(name, f"{prefix}Config", f"{prefix}ForMaskedLM", settings, _masked)


def _speech(name: str, prefix: str, **more: Any) -> Architecture:
    return Architecture(
        name,
        f"{prefix}Config",
        f"{prefix}ForSequenceClassification",
        {**_SPEECH, **more},
        _audio,
    )


_ALL = (
    _causal_lm("llama", "Llama"),
    _causal_lm("llama_tied", "Llama", tie_word_embeddings=True),
    _causal_lm("mistral", "Mistral"),
    _causal_lm("qwen2", "Qwen2", tie_word_embeddings=True),
    _causal_lm("qwen3", "Qwen3"),
    _causal_lm(
        "qwen3_moe", "Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    _causal_lm("mixtral", "Mixtral", num_local_experts=4),
    _causal_lm("olmo2", "Olmo2"),
    _causal_lm("phi3", "Phi3"),
    _causal_lm("phi", "Phi"),
    _causal_lm("gemma", "Gemma"),
    _causal_lm("gemma2", "Gemma2", query_pre_attn_scalar=8),
    Architecture("gemma3", "Gemma3TextConfig", "Gemma3ForCausalLM", _DECODER),
    _causal_lm("stablelm", "StableLm"),
    _causal_lm("cohere", "Cohere"),
    _causal_lm("granite", "Granite"),
    _causal_lm("starcoder2", "Starcoder2"),
    _causal_lm("smollm3", "SmolLM3"),
    _causal_lm("gpt_neox", "GPTNeoX"),
    Architecture(
        "falcon",
        "FalconConfig",
        "FalconForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
    ),
    _causal_lm("bloom", "Bloom", n_layer=2, n_head=4),
    _causal_lm(
        "deepseek_v3",
        "DeepseekV3",
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        head_dim=4,
        num_key_value_heads=4,
    ),
    _causal_lm("opt", "OPT", ffn_dim=48, word_embed_proj_dim=HIDDEN),
    Architecture("gpt2", "GPT2Config", "GPT2LMHeadModel", _GPT2),
    Architecture("gptj", "GPTJConfig", "GPTJForCausalLM", {**_GPT2, "rotary_dim": 4}),
    Architecture(
        "gpt_neo",
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 32,
        },
    ),
    Architecture("codegen", "CodeGenConfig", "CodeGenForCausalLM", {**_GPT2, "rotary_dim": 4}),
    _causal_lm("mamba", "Mamba", state_size=4),
    _encoder("bert", "Bert"),
    _encoder("roberta", "Roberta"),
    _encoder("electra", "Electra"),
    _encoder("albert", "Albert"),
    _encoder("deberta_v2", "DebertaV2"),
    _encoder("modernbert", "ModernBert"),
    _encoder("mpnet", "MPNet"),
    Architecture(
        "distilbert",
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        {"vocab_size": VOCABULARY, "dim": HIDDEN, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
        _masked,
    ),
    Architecture(
        "t5",
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": HIDDEN,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
    Architecture("bart", "BartConfig", "BartForConditionalGeneration", _SEQ2SEQ),
    Architecture("pegasus", "PegasusConfig", "PegasusForConditionalGeneration", _SEQ2SEQ),
    Architecture(
        "whisper",
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {
            **_SEQ2SEQ,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 16,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        _mel,
    ),
    Architecture("vit", "ViTConfig", "ViTForImageClassification", _VISION, _pixels),
    Architecture("deit", "DeiTConfig", "DeiTForImageClassification", _VISION, _pixels),
    Architecture("beit", "BeitConfig", "BeitForImageClassification", _VISION, _pixels),
    Architecture(
        "swin",
        "SwinConfig",
        "SwinForImageClassification",
        {
            "image_size": 16,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 4],
            "window_size": 2,
        },
        _pixels,
    ),
    Architecture("dinov2", "Dinov2Config", "Dinov2ForImageClassification", _VISION, _pixels),
    Architecture(
        "resnet",
        "ResNetConfig",
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        _pixels,
    ),
    Architecture(
        "convnext",
        "ConvNextConfig",
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2},
        _pixels,
    ),
    Architecture(
        "clip",
        "CLIPConfig",
        "CLIPModel",
        {
            "text_config": _ENCODER | {"bos_token_id": 1, "eos_token_id": 2},
            "vision_config": _VISION,
            "projection_dim": 16,
        },
        _pairs,
    ),
    Architecture(
        "siglip",
        "SiglipConfig",
        "SiglipModel",
        {
            "text_config": _ENCODER
            | {"projection_size": HIDDEN, "bos_token_id": 1, "eos_token_id": 2},
            "vision_config": _VISION,
        },
        _pairs,
    ),
    _speech("wav2vec2", "Wav2Vec2"),
    _speech("wav2vec2_stable", "Wav2Vec2", do_stable_layer_norm=True, feat_extract_norm="layer"),
    _speech("hubert", "Hubert"),
    _speech("wavlm", "WavLM"),
    _speech("unispeech", "UniSpeech"),
    _speech("unispeech_sat", "UniSpeechSat"),
    _speech("sew", "SEW", squeeze_factor=2),
    _speech("sew_d", "SEWD", squeeze_factor=2, max_position_embeddings=32, position_buckets=8),
    _speech("wav2vec2_conformer", "Wav2Vec2Conformer", conv_depthwise_kernel_size=3),
    _speech("data2vec_audio", "Data2VecAudio"),
    Architecture(
        "patchtst",
        "PatchTSTConfig",
        "PatchTSTForPrediction",
        {
            "num_input_channels": 2,
            "context_length": 32,
            "prediction_length": 8,
            "patch_length": 4,
            "patch_stride": 4,
            "d_model": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 32,
        },
        _series,
    ),
)

ARCHITECTURES = {architecture.name: architecture for architecture in _ALL}
