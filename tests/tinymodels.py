"""Tiny random models of every family, saved as folders as their owners' are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tinygguf
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

# What configurations call their sizes, and the tiny ones.
SIZES = {
    # widths
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "emb_dim": 32, "embedding_size": 32, "word_embed_proj_dim": 32,
    "intermediate_size": 48, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "ffn_dim": 48, "dim_ff": 48, "dff": 48,
    "d_ff": 48, "n_inner": 48, "ffn_hidden_size": 48, "intermediate_size_mlp": 48, "d_inner": 32,
    # depths
    "num_hidden_layers": 4, "n_layer": 4, "n_layers": 4, "num_layers": 4, "encoder_layers": 4, "decoder_layers": 4,
    "num_encoder_layers": 4, "num_decoder_layers": 4,
    # heads
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "attention_heads": 4, "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "dim_head": 8, "d_kv": 8,
    "attention_head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "index_head_dim": 8, "index_n_heads": 2, "rotary_dim": 8,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_topk": 2, "moe_k": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24, "expert_ffn_hidden_size": 24, "n_group": 1, "topk_group": 1,
    # state-space models and linear attention
    "state_size": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_head_dim": 8, "linear_num_heads": 4, "mamba_n_heads": 8, "mamba_d_head": 8,
    "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_d_ssm": 64, "mamba_num_heads": 8, "mamba_head_dim": 8,
    "ssm_state_size": 8, "chunk_size": 8, "mamba_dt_rank": 4, "time_step_rank": 4, "conv_kernel": 3,
    # lengths
    "vocab_size": 600, "max_position_embeddings": 128, "n_positions": 128, "max_target_positions": 128,
    "max_source_positions": 128, "n_ctx": 128, "sliding_window": 6, "attention_window": 6, "window_size": 6,
    "attention_chunk_size": 6, "index_topk": 6,
    "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0, "decoder_start_token_id": 1, "unk_token_id": 0,
    # pictures
    "image_size": 16, "patch_size": 8, "out_hidden_size": 32, "embed_dim": 32, "depth": 4, "text_hidden_size": 32,
    "alignment_intermediate_size": 32, "projection_dim": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Attributes:
        name: what the row is called.
        special: what distinguishes it.
        save: makes the model below a folder; gives what a user names as the teacher, and the folder of the plain pass.
        load: loads the plain pass's model; `AutoModelForCausalLM.from_pretrained` by default.
        blocks: the name of the list of blocks, where the library's hidden states do not tell.
    """

    name: str
    special: str
    save: Callable[[Path, Any], tuple[Path, Path]]
    load: Any = None
    blocks: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def tiny_config(kind: type[PreTrainedConfig], own: dict[str, Any]) -> PreTrainedConfig:
    """A configuration with the tiny sizes wherever it names one, and ``own`` values over them."""
    try:
        plain = kind()
    except Exception:  # noqa: BLE001 (a class without defaults)
        plain = None
    renamed = getattr(kind, "attribute_map", {})
    given = {}
    for name, value in SIZES.items():
        if renamed.get(name) in SIZES or isinstance(getattr(kind, name, None), property):
            continue
        try:
            has = name in getattr(kind, "__annotations__", {}) or hasattr(plain, name)
        except Exception:  # noqa: BLE001 (one that differs between blocks)
            has = True
        if has:
            given[name] = value
    if "kv_lora_rank" in given:
        given["num_key_value_heads"] = given["num_attention_heads"]
    inner = getattr(kind, "sub_configs", {})
    for name, declared in inner.items():
        default = getattr(plain, name, None)
        found = type(default) if isinstance(default, PreTrainedConfig) else declared
        if found is not None and found.__name__ != "AutoConfig":
            given[name] = tiny_config(found, own.get(name, {})).to_dict()
    given |= {name: value for name, value in own.items() if name not in inner or name not in given}
    return kind(**{name: value for name, value in given.items() if value is not ...})


def randomise(model: Any) -> None:
    """Weights by which attention, norms and biases all matter, so that nothing is right by accident."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if not value.is_floating_point():
                continue
            if value.dim() > 1 and not any(part in name for part in ("A_log", "conv", "decay", "norm")):
                embeds = any(part in name for part in ("embed", "wte", "wpe"))
                value.normal_(0, 1.0 if embeds else value.shape[-1] ** -0.5)
            else:
                value.add_(0.1 * torch.randn_like(value))


def causal(kind: str, own: dict[str, Any], auto: Any = AutoModelForCausalLM) -> Callable[[Path, Any], tuple[Path, Path]]:
    def save(place: Path, tokenizer: Any) -> tuple[Path, Path]:
        torch.manual_seed(0)
        config = tiny_config(CONFIG_MAPPING[kind], own)
        with torch.device("meta"):
            size = sum(p.numel() for p in auto.from_config(config).parameters())
        assert size < 3e6, f"{kind}: {size:,} parameters"
        model = auto.from_config(config).float()
        randomise(model)
        folder = place / kind
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder, folder

    return save


HYBRID = ["linear_attention", "full_attention"] * 2
WINDOWS = ["sliding_attention", "full_attention"] * 2

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
GEMMA_4 = {
    "vocab_size_per_layer_input": 600, "hidden_size_per_layer_input": 8, "layer_types": WINDOWS, "global_head_dim": 16,
}  # fmt: skip
GEMMA_3N = {
    "num_kv_shared_layers": 0, "layer_types": WINDOWS, "vocab_size_per_layer_input": 600, "laurel_rank": 8,
    "hidden_size_per_layer_input": 8,
}  # fmt: skip
QWEN_4 = {
    "layer_types": ["linear_attention", "indexed_attention"] * 2, "ple_layer_ids": [1, 2], "ple_embed_dim": 32,
    "heads_per_ngram": 4, "ngram_vocab_size_base": 100, "split_ngram_parts": 1, "hc_lowrank": 8,
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}  # fmt: skip
DOTS_3 = {
    "layer_types": ["indexed_attention", "sliding_attention"] * 2, "head_dim": 16, "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8, "shared_experts_intermediate_size": 24,
}  # fmt: skip

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
GEMMA_4 = {
    "vocab_size_per_layer_input": 600, "hidden_size_per_layer_input": 8, "layer_types": WINDOWS, "global_head_dim": 16,
}  # fmt: skip
GEMMA_3N = {
    "num_kv_shared_layers": 0, "layer_types": WINDOWS, "vocab_size_per_layer_input": 600, "laurel_rank": 8,
    "hidden_size_per_layer_input": 8,
}  # fmt: skip
QWEN_4 = {
    "layer_types": ["linear_attention", "indexed_attention"] * 2, "ple_layer_ids": [1, 3], "ple_embed_dim": 32,
    "heads_per_ngram": 4, "ngram_vocab_size_base": 100, "split_ngram_parts": 1, "hc_lowrank": 8,
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}  # fmt: skip
DOTS_3 = {
    "layer_types": ["indexed_attention", "sliding_attention"] * 2, "head_dim": 16, "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8, "shared_experts_intermediate_size": 24,
}  # fmt: skip

YARN = {"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}}
LLAMA_3 = {
    "rope_parameters": ROPE | {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
}  # fmt: skip

# What the tiny sizes alone do not give.
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": HYBRID, "n_group": 1},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "layer_types": WINDOWS, "rope_parameters": {"sliding_attention": ROPE, "full_attention": None}
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": DOTS_3,
    "gemma3n_text": GEMMA_3N,
    "gemma4_text": GEMMA_4,
    "gemma4": {"text_config": GEMMA_4, "vision_config": {"position_embedding_size": 16}},
    "gemma4_unified_text": GEMMA_4,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": HYBRID},
    "kimi_linear": {"layer_types": HYBRID},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "qwen4_exp_text": QWEN_4,
    "reformer": {
        "is_decoder": True, "attn_layers": ["local", "local", "lsh", "local"], "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16], "attention_head_size": 8, "feed_forward_size": 48,
        "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "num_buckets": 4, "hash_seed": 0,
    },
    "roc_bert": {"pronunciation_embed_dim": 8, "shape_embed_dim": 8, "shape_vocab_size": 600},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "adapter_rank": 8, "mamba_d_state": 8},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip

# One family in several ways: the name of the row, the kind, and its values.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, linear rotary scaling": ("llama", {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 4.0}}),
    "llama, dynamic rotary scaling": ("llama", {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 4.0}}),
    "llama, YaRN": ("llama", YARN),
    "llama, Llama 3 rotary scaling": ("llama", LLAMA_3),
    "phi3, LongRoPE": (
        "phi3",
        {
            "original_max_position_embeddings": 16,
            "rope_parameters": ROPE | {
                "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 4.0, 8.0],
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "bert, as a decoder": ("bert", {"is_decoder": True}),
    "roberta, as a decoder": ("roberta", {"is_decoder": True}),
    "xlm, causal": ("xlm", {"causal": True}),
    "falcon, ALiBi": ("falcon", {"alibi": True}),
    "falcon, grouped heads": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, blocks in sequence": ("falcon", {"parallel_attn": False, "multi_query": False, "bias": True}),
    "gpt_neox, blocks in sequence": ("gpt_neox", {"use_parallel_residual": False}),
    "opt, narrow embeddings, norms after": ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "qwen2, sliding windows": ("qwen2", {"use_sliding_window": True, "layer_types": WINDOWS}),
    "mistral, without windows": ("mistral", {"sliding_window": None}),
    "gpt_bigcode, a head of keys for each": ("gpt_bigcode", {"multi_query": False}),
    "gemma4_text, shared keys and experts": (
        "gemma4_text",
        GEMMA_4 | {
            "num_kv_shared_layers": 2, "attention_k_eq_v": True, "enable_moe_block": True, "num_experts": 4,
            "top_k_experts": 2, "moe_intermediate_size": 24,
        },
    ),
    "llama4_text, attention scaled by position": (
        "llama4_text", {"attn_scale": 0.5, "floor_scale": 4, "no_rope_layers": [1, 0, 1, 0]},
    ),
    "granitemoehybrid, rotary": ("granitemoehybrid", {"layer_types": HYBRID, "position_embedding_type": "rope"}),
    "deepseek_v3, whole queries": ("deepseek_v3", {"q_lora_rank": None}),
}  # fmt: skip


# GGUF files: with values that are not the library's own, as far as files tell them.
ROTARY = ("llama", "mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gemma2", "gpt_oss", "starcoder2", "phi3")
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rms_norm_eps": 1e-3}),
    "llama, Llama 3 rotary scaling": ("llama", LLAMA_3),
    "llama, YaRN": ("llama", YARN),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}),
    "gemma2": ("gemma2", {}),
    "gemma3_text": ("gemma3_text", {"layer_types": ["sliding_attention"] * 4}),
    "phi3": ("phi3", {"sliding_window": None}),
    "falcon": ("falcon", {}),
    "bloom": ("bloom", {}),
    "gpt2": ("gpt2", {}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "stablelm": ("stablelm", {}),
    "mamba": ("mamba", {}),
    "nemotron": ("nemotron", {}),
    "lfm2": ("lfm2", {}),
    "gpt_oss": ("gpt_oss", {}),
    "minimax_m2": ("minimax_m2", {}),
    "granite": ("granite", {}),
    "olmo2": ("olmo2", {}),
    "cohere": ("cohere", {}),
    "phi": ("phi", {}),
    "gpt_neox": ("gpt_neox", {}),
    "smollm3": ("smollm3", {}),
}


def _families() -> Iterator[Family]:
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        yield Family(kind, "", causal(kind, OWN.get(kind, {})))
    for name, (kind, own) in VARIANTS.items():
        yield Family(name, "", causal(kind, own))
    for kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        name = f"{kind}, with images"
        made = causal(kind, OWN.get(name, {}), AutoModelForImageTextToText)
        yield Family(name, "", made, AutoModelForImageTextToText.from_pretrained)
    for kind in ("bart", "t5", "mt5", "pegasus", "marian", "mbart", "m2m_100", "umt5", "led", "blenderbot"):
        made = causal(kind, {}, AutoModelForSeq2SeqLM)
        yield Family(f"{kind}, whole", "", made, AutoModelForSeq2SeqLM.from_pretrained)
    for name, (kind, own) in FILES.items():
        yield Family(f"{name}, GGUF", "", packed(kind, own))
    for kind in ("albert", "deberta-v2", "distilbert", "modernbert", "mpnet", "esm", "longformer"):
        yield Family(kind, "", causal(kind, {}, AutoModelForMaskedLM), AutoModelForMaskedLM.from_pretrained)


def packed(kind: str, own: dict[str, Any]) -> Callable[[Path, Any], tuple[Path, Path]]:
    """A GGUF file, beside the folder of the same model."""

    def save(place: Path, tokenizer: Any) -> tuple[Path, Path]:
        theta = {"rope_theta": 50000.0}
        _, folder = causal(kind, {"rope_parameters": ROPE | theta, **own} if kind in ROTARY else own)(place, tokenizer)
        path = place / f"{kind}.gguf"
        tinygguf.write(AutoModelForCausalLM.from_pretrained(folder), tokenizer, path)
        return path, folder

    return save


FAMILIES = {family.name: family for family in _families()}
