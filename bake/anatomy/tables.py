"""What cannot be discovered about architectures, as data: how sizes are named, and what a twin needs.

Keyed by the names that configurations use, then by model type. Nothing here says what is exact: that
is found by experiment and proven on the twin. A new architecture needs a line only where its
configuration ties sizes together in a way that the size names do not show.
"""

from __future__ import annotations

from typing import Any

LAYERS, HIDDEN, HEADS, HEAD_SIZE, FEED_FORWARD, VOCABULARY = 3, 32, 4, 8, 80, 96
EXPERTS, EXPERT_SIZE, WINDOW, POSITIONS = 4, 24, 6, 128


def _each(names: str, value: int) -> dict[str, int]:
    return dict.fromkeys(names.split(), value)


# How configurations call the number of decoder layers, in the order in which a config is asked.
LAYER_COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
)

SIZES: dict[str, int] = {
    **_each(" ".join(LAYER_COUNTS), LAYERS),
    **_each("encoder_layers num_encoder_layers", 2),
    **_each("hidden_size n_embd d_model n_embed word_embed_proj_dim dim dim_model", HIDDEN),
    **_each(
        "embedding_size d_embed emb_dim attention_hidden_size lru_width hidden_size_global",
        HIDDEN,
    ),
    **_each("num_attention_heads n_head n_heads num_heads num_encoder_attention_heads", HEADS),
    **_each("decoder_attention_heads encoder_attention_heads num_decoder_attention_heads", HEADS),
    **_each("swa_num_attention_heads linear_num_heads mamba_n_heads mamba_num_heads", HEADS),
    **_each("linear_num_key_heads index_n_heads", HEADS // 2),
    **_each("adapter_in_dim adapter_out_dim adapter_input_size", HIDDEN),
    "linear_num_value_heads": HEADS,
    **_each("head_dim attention_head_dim dim_head d_kv kv_channels global_head_dim", HEAD_SIZE),
    **_each("swa_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim", HEAD_SIZE),
    **_each("qk_rope_head_dim qk_nope_head_dim v_head_dim swa_v_head_dim", HEAD_SIZE),
    **_each("qk_head_dim index_head_dim mamba_d_head mamba_headdim mamba_head_dim", 2 * HEAD_SIZE),
    **_each("q_lora_rank kv_lora_rank o_lora_rank hidden_size_per_layer_input", 16),
    **_each("intermediate_size n_inner ffn_dim ffn_hidden_size dff dim_ff d_ff", FEED_FORWARD),
    **_each("decoder_ffn_dim encoder_ffn_dim ffn_embed_dim mlp_dim", FEED_FORWARD),
    **_each("dense_intermediate_size intermediate_size_mlp block_ff_dim", FEED_FORWARD),
    **_each("prefix_dense_intermediate_size", FEED_FORWARD),
    **_each("moe_intermediate_size shared_expert_intermediate_size expert_dim", EXPERT_SIZE),
    **_each(
        "shared_intermediate_size expert_ffn_hidden_size router_intermediate_size", EXPERT_SIZE
    ),
    **_each("moe_shared_expert_intermediate_size moe_layer_intermediate_size", EXPERT_SIZE),
    **_each("moe_shared_intermediate_size", EXPERT_SIZE),
    **_each("num_experts num_local_experts n_routed_experts moe_num_experts n_experts", EXPERTS),
    "vocab_size": VOCABULARY,
    **_each("text_vocab_size vocab_size_per_layer_input", VOCABULARY),
    **_each("max_position_embeddings n_positions n_ctx seq_length max_seq_len", POSITIONS),
    **_each("max_target_positions max_source_positions", POSITIONS),
    **_each("sliding_window attention_window_size sliding_window_size window_size", WINDOW),
    **_each("local_attention attention_chunk_size", WINDOW),
    **_each("mamba_d_state state_size ssm_state_size", 8),
    **_each("mamba_dt_rank time_step_rank laurel_rank adapter_rank", 4),
    **_each("mamba_chunk_size chunk_size", 16),
    **_each("n_group topk_group num_expert_group mamba_n_groups mamba_ngroups n_groups", 1),
    "mamba_d_ssm": 2 * HIDDEN,
    **_each("index_topk", 64),
    **_each("num_nextn_predict_layers mtp_num_hidden_layers num_mtp_modules", 0),
    **_each("num_layers_per_stack", LAYERS),
    **_each("zero_expert_num", 2),
    **_each("encoder_hash_byte_group_vocab", 200),
    **_each("image_token_id image_token_index boi_token_id eoi_token_id", 90),
    **_each("audio_token_id video_token_id video_token_index", 91),
}
KEY_VALUE_HEADS = (
    "num_key_value_heads",
    "num_kv_heads",
    "n_kv_heads",
    "kv_n_heads",
    "swa_num_key_value_heads",
)
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
# How many experts a token goes to: one stays one, more become two.
CHOICES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "num_selected_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k",
    "top_k_experts",
)
# Counts of layers from the first on that are of another kind.
PREFIX_COUNTS = (
    "first_k_dense_replace",
    "first_last_k_dense_replace",
    "num_dense_layers",
    "moe_layer_start_index",
    "max_window_layers",
)
# Counts of layers before the end that are of another kind.
SUFFIX_COUNTS = ("num_kv_shared_layers",)
# Lists of the indices of layers that are of another kind.
LAYER_INDICES = (
    "attn_layer_indices",
    "full_attn_idxs",
    "hybrid_layer_ids",
    "moe_layers",
    "cross_attention_layers",
    "mlp_only_layers",
)
# Which part of a head is turned; of a twin's small one at least one pair of dimensions.
ROTARY_PARTS = ("partial_rotary_factor", "rotary_pct", "rotary_percent")
# Lists with one factor for each pair of rotary dimensions.
ROTARY_FACTORS = ("short_factor", "long_factor")

_HALVES = {"layer_types": ["conv", "full_attention"] * 16}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# What the twin of a model type needs beyond the size names: sizes that depend on each other.
TWINS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_expert_group": 1},
    "codegen": {"rotary_dim": 4},
    "dots3_note_text": {"head_dim": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 12},
    "gptj": {"rotary_dim": 4},
    "mamba2": {"num_heads": 8, "head_dim": HEAD_SIZE},
    "marian": {"decoder_vocab_size": VOCABULARY},
    "phi4_multimodal_audio": {"ext_pw_out_channel": HIDDEN, "nemo_conv_channels": HIDDEN},
    "qwen4_exp_text": {"hc_lowrank": 8, "ple_embed_dim": HIDDEN, "indexer_head_dim": HEAD_SIZE},
    "reformer": {
        "axial_pos_embds": False,
        "attention_head_size": HEAD_SIZE,
        "feed_forward_size": FEED_FORWARD,
        "attn_layers": ["local", "lsh", "local"],
        "hash_seed": 0,
        "num_buckets": 2,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
    },
    "roc_bert": {
        "shape_vocab_size": VOCABULARY,
        "pronunciation_vocab_size": VOCABULARY,
        "shape_embed_dim": HIDDEN,
        "pronunciation_embed_dim": HIDDEN,
    },
    "xlm": {"n_words": VOCABULARY},
    "xlnet": {"d_head": HEAD_SIZE, "d_inner": FEED_FORWARD},
    "xlstm": {
        "mode": "train",
        "return_last_states": False,
        "num_blocks": LAYERS,
        "embedding_dim": HIDDEN,
        "chunk_size": 4,
        "ffn_round_up_to_multiple_of": 8,
    },
    "zamba": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HEAD_SIZE},
    "zamba2": {
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HEAD_SIZE,
        "n_mamba_heads": HEADS,
        "mamba_headdim": 2 * HEAD_SIZE,
        "num_query_groups": HEADS,
    },
    "zaya": {"router_hidden_size": 16},
}

# What a model type's default configuration lacks, so that nothing can be built from it alone, and the
# multipliers that its published checkpoints have and its defaults don't. For the catalogue only.
COMPLETIONS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 20,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 8, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 6, "first_k_dense_replace": 1},
    "dots1": {
        "n_routed_experts": 128,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    **{
        name: {"residual_multiplier": 0.22}
        for name in (
            "granite",
            "granite_swa",
            "granitemoe",
            "granitemoe_swa",
            "granitemoehybrid",
            "granitemoeshared",
        )
    },
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": _HALVES,
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 64,
        "indexer_compress_ratio": 1,
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}
