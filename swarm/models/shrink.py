"""Makes a tiny config out of any: the same peculiarities, a few thousand times fewer weights.

Sizes are recognised by their names. Layers are chosen so that every value of every per-layer list
(sliding or full, dense or sparse, ...) is there, next to its neighbour in the real model.
"""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from swarm.models.families import text_config

HEAD = 16
HEADS = 4
HIDDEN = HEAD * HEADS
VOCAB = 120
WINDOW = 6
MIN_LAYERS = 4
MAX_LAYERS = 16

_NAMES: dict[int, str] = {
    HIDDEN: """hidden_size d_model n_embd dim emb_dim embedding_dim embedding_size lru_width
        word_embed_proj_dim input_embedding_size output_embedding_size ple_embed_dim
        attention_hidden_size""",
    3 * HIDDEN // 2: """intermediate_size moe_intermediate_size ffn_dim ffn_hidden_size n_inner dff
        d_inner dim_ff shared_expert_intermediate_size shared_experts_intermediate_size
        intermediate_size_mlp shared_intermediate_size dense_intermediate_size decoder_ffn_dim
        expert_ffn_hidden_size moe_shared_expert_intermediate_size encoder_ffn_dim
        feed_forward_size""",
    2 * HIDDEN: "mamba_d_ssm",
    HEAD: """head_dim swa_head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim index_head_dim
        linear_key_head_dim linear_value_head_dim linear_head_dim attention_head_dim dim_head d_head
        kv_channels attention_head_size global_head_dim query_pre_attn_scalar rotary_dim
        q_lora_rank kv_lora_rank o_lora_rank adapter_rank gated_norm_rank laurel_rank hc_lowrank
        mamba_d_head mamba_head_dim mamba_headdim mamba_d_state mamba_dt_rank ssm_state_size
        state_size time_step_rank d_rel hidden_size_per_layer_input router_hidden_size
        index_n_heads""",  # with few index heads many scores are exactly zero, and tie
    2 * HEAD: "qk_head_dim",
    HEADS: """num_attention_heads n_head n_heads swa_num_attention_heads attention_heads
        decoder_attention_heads encoder_attention_heads num_query_groups linear_num_key_heads
        linear_num_value_heads linear_num_heads n_groups index_block_size zero_expert_num
        num_experts n_routed_experts num_local_experts moe_num_experts""",
    2 * HEADS: "num_heads mamba_n_heads mamba_num_heads n_mamba_heads index_topk",
    VOCAB: "vocab_size vocab_size_per_layer_input unpadded_vocab_size",
    WINDOW: """sliding_window sliding_window_size window_size attention_window_size local_attention
        attention_chunk_size local_attention_window_len""",
    10: "original_max_position_embeddings",
    512: "max_position_embeddings",
    97: "ngram_vocab_size_base",
    3: "attn_layer_period",
    2: "num_experts_per_tok num_experts_per_token moe_topk moe_k n_group num_expert_group",
    1: "first_k_dense_replace topk_group attn_layer_offset",
}
_SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
_LAYERS = frozenset(
    {"num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"}
    | {"decoder_layers", "encoder_layers"}
)
_LAYER_NUMBERS = frozenset(
    {"mlp_only_layers", "hybrid_layer_ids", "moe_layers", "full_attn_idxs"}
    | {"ple_layer_ids", "attn_layer_indices"}
)


def shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """A tiny config of the same class. Whatever it does not know how to shrink stays as it is."""
    text = text_config(config)
    fields = text.to_dict()
    count: int = text.num_hidden_layers
    chosen = _choose_layers(fields, count)
    for name in ("transformers_version", "architectures", "model_type", "_name_or_path"):
        fields.pop(name, None)
    return type(text)(**_shrink_fields(fields, chosen, count))


def _shrink_fields(fields: dict[str, Any], chosen: list[int], count: int) -> dict[str, Any]:
    small = {name: _shrink_field(name, value, chosen, count) for name, value in fields.items()}
    for name in ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "kv_n_heads"):
        if isinstance(small.get(name), int):
            heads = fields.get("num_attention_heads") or fields.get("n_head") or small[name]
            small[name] = max(1, HEADS * small[name] // heads)
    for name in _NAMES[2].split():
        if isinstance(fields.get(name), int):
            small[name] = min(2, fields[name])
    return small


def _choose_layers(fields: dict[str, Any], count: int) -> list[int]:
    firsts: list[int] = []  # of their kind
    for value in fields.values():
        if isinstance(value, list | tuple) and len(value) == count:
            firsts += [i for i, kind in enumerate(value) if value.index(kind) == i]
    for name in _LAYER_NUMBERS & fields.keys():
        firsts += [i for i in fields[name] or () if i < count][:1]
    shared = count - (fields.get("num_kv_shared_layers") or 0)
    chosen = {*range(MIN_LAYERS), *range(shared, shared + MIN_LAYERS + 1)}
    chosen.update(near for i in firsts for near in (i, i + 1))
    return sorted(i for i in chosen if i < count)[:MAX_LAYERS]


def _shrink_field(name: str, value: Any, chosen: list[int], count: int) -> Any:
    if isinstance(value, dict):
        return _shrink_dict(name, value, chosen)
    if isinstance(value, list | tuple):
        if name in _LAYER_NUMBERS:
            return [chosen.index(i) for i in value if i in chosen]
        if len(value) == count:
            return [_shrink_field(name, value[i], [], -1) for i in chosen]
    if name.endswith("token_id"):
        return min(value, VOCAB - 1) if isinstance(value, int) else None
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        return value
    if name in _LAYERS:
        return len(chosen)
    if name == "num_kv_shared_layers":
        return sum(i >= count - value for i in chosen)
    return _SIZES.get(name, value)


def _shrink_dict(name: str, value: dict[Any, Any], chosen: list[int]) -> dict[Any, Any]:
    if name in ("rope_parameters", "rope_scaling"):
        return _shrink_rope(value)
    if name == "per_layer_config":
        return {
            chosen.index(int(i)): _shrink_fields(own, [], -1)
            for i, own in value.items()
            if int(i) in chosen
        }
    return _shrink_fields(value, [], -1) if name.endswith("_config") else value


def _shrink_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Factors and sections as long as half of a small head's rotated part, thresholds in reach."""
    small: dict[str, Any] = {}
    half = int(HEAD * rope.get("partial_rotary_factor", 1.0)) // 2
    for name, value in rope.items():
        if isinstance(value, dict):
            small[name] = _shrink_rope(value)
        elif name in ("long_factor", "short_factor"):
            small[name] = [value[i % len(value)] for i in range(half)]
        elif name == "mrope_section":
            small[name] = [half - 2 * (half // 3), half // 3, half // 3]
        elif name == "original_max_position_embeddings":
            small[name] = _SIZES[name]
        else:
            small[name] = value
    return small
