"""Tiny random models of the families that must be exact; other rooms' tests use them too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

LAYERS = 6
VOCAB = 160

_LLAMA: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
}
_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}

# Windows are shorter than the texts of the tests.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "mistral": _LLAMA | {"sliding_window": 6},
    "gemma2": _LLAMA | {"sliding_window": 6, "query_pre_attn_scalar": 12},
    "gemma3_text": _LLAMA | {"sliding_window": 6, "query_pre_attn_scalar": 12},
    "mixtral": _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": _LLAMA | _EXPERTS | {"num_experts": 4},
    "gpt_oss": _LLAMA | {"sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": _LLAMA,
    "falcon": {"hidden_size": 48, "num_attention_heads": 4},
    "bloom": {"hidden_size": 48, "n_head": 4},
    "deepseek_v3": _EXPERTS
    | {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
    },
    "gpt2": {"n_embd": 48, "n_head": 4, "n_inner": 96},
    "olmo2": _LLAMA,
    "granite": _LLAMA
    | {"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "logits_scaling": 2.0},
}
FAMILIES = tuple(_FAMILIES)


def tiny_config(family: str) -> PreTrainedConfig:
    """Six blocks and a vocabulary of 160, with the family's peculiarities left in."""
    return AutoConfig.for_model(
        family,
        num_hidden_layers=LAYERS,
        vocab_size=VOCAB,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=family in ("gemma2", "gemma3_text", "gpt2", "bloom", "falcon"),
        **_FAMILIES[family],
    )


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """Float32, with weights large enough that every part of a block shows in the logits."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save_tiny(family: str, folder: Path, seed: int = 0) -> PreTrainedModel:
    """Write a checkpoint (config and one safetensors file) and return the model that is in it."""
    model = tiny_model(family, seed)
    model.save_pretrained(folder)
    return model
