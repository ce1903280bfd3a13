"""The families of the table in docs/families.md."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tinymodels import Save, adapter, folder_of, fp8, gguf_of, packed, said_to_be_packed
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Attributes:
        name: what the row is called.
        save: makes the model; see `tinymodels`.
        auto: the class that loads the plain pass's model.
        dtypes: the precisions to read it in; the second is compared with float32.
        is_packed: the plain pass in the second precision has the teacher's packed weights.
        special: what the model itself does not tell of how it is special.
    """

    name: str
    save: Save
    auto: Any = AutoModelForCausalLM
    dtypes: tuple[str, str] = ("float32", "bfloat16")
    is_packed: bool = False
    special: str = ""


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

LONG_ROPE = {
    "original_max_position_embeddings": 16,
    "rope_parameters": ROPE | {
        "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 4.0, 8.0],
        "original_max_position_embeddings": 16,
    },
}  # fmt: skip

# What a model's parts do not tell of how it is special.
SIDE_BY_SIDE = "attention and MLP side by side"
DECODER = "decoder of an encoder-decoder by itself"
ENCODER = "encoder"
SPECIAL = {
    **dict.fromkeys(("codegen", "cohere", "cohere2", "falcon", "gpt_neox", "gptj", "phi"), SIDE_BY_SIDE),
    **dict.fromkeys(
        ("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart",
         "prophetnet", "trocr", "whisper"), DECODER,
    ),
    **dict.fromkeys(
        ("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
         "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta", "xlm-roberta-xl",
         "xmod"), ENCODER,
    ),
    "blt": "bytes in patches", "cpmant": "prompt tokens of its own in front", "ctrl": "sinusoidal positions",
    "deepseek_v4": "several residual streams", "emu3": "images as tokens", "gemma3n_text": "several residual streams",
    "gpt_neo": "local attention in every second block", "hrm_text": "blocks that run several times",
    "hy_v4": "several residual streams", "longcat_flash": "two layers a block",
    "mllama": "attention to images", "openai-gpt": "norms after the sum", "qwen4_exp": "several residual streams",
    "qwen4_exp_text": "several residual streams", "reformer": "attention within hashed buckets",
    "rwkv": "recurrent", "xglm": "sinusoidal positions", "xlnet": "relative positions, tokens see those behind",
    "xlstm": "recurrent", "zamba": "blocks that share an attention", "zamba2": "blocks that share an attention",
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
    "dots3_note": {
        "text_config": DOTS_3,
        "vision_config": {"mlp_layer_types": ["dense"] * 4, "adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 8},
    },
    "dots3_note_text": DOTS_3,
    "gemma3": {"text_config": {"layer_types": WINDOWS}},
    "gemma3_text": {"layer_types": WINDOWS},
    "gemma3n_text": GEMMA_3N,
    "gemma4_text": GEMMA_4,
    "gemma4": {"text_config": GEMMA_4, "vision_config": {"position_embedding_size": 16}},
    "gemma4_unified": {
        "text_config": GEMMA_4,
        "vision_config": {"mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 32, "patch_size": 4},
    },
    "gemma4_unified_text": GEMMA_4,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": HYBRID},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": HYBRID},
    "kolibri1": {"layer_types": WINDOWS},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "ministral": {"layer_types": WINDOWS},
    "phi4_multimodal": {
        "audio_config": {
            "nemo_conv_channels": 8, "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "num_blocks": 2,
        },
        "vision_config": {"crop_size": 16},
    },
    "qwen4_exp": {"text_config": QWEN_4},
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
    "phi3, LongRoPE": ("phi3", LONG_ROPE),
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

MROPE = {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}}
# Models that read images too, with a text model inside.
IMAGES: dict[str, dict[str, Any]] = {
    "aria": {}, "aya_vision": {}, "blip-2": {}, "cohere2_vision": {}, "deepseek_vl": {}, "gemma3": {},
    "gemma4": OWN["gemma4"], "glm4v": {"text_config": MROPE}, "idefics2": {}, "idefics3": {}, "internvl": {},
    "kimi_k25": {}, "kosmos-2": {}, "lfm2_vl": {}, "llava": {}, "llava_next": {}, "llava_onevision": {},
    "minicpmv4_6": {}, "mistral3": {}, "mllama": {}, "ovis2": {}, "paligemma": {},
    "qwen2_5_omni_thinker": {"text_config": MROPE}, "qwen2_5_vl": {"text_config": MROPE},
    "qwen2_vl": {"text_config": MROPE, "vision_config": {"hidden_size": 32}}, "qwen3_5": {}, "qwen3_vl": {},
    "qwen3_vl_moe": {}, "smolvlm": {}, "video_llava": {},
}  # fmt: skip
WHOLE = ("bart", "blenderbot", "led", "m2m_100", "marian", "mbart", "mt5", "pegasus", "t5", "umt5")
ENCODERS = ("albert", "deberta-v2", "distilbert", "esm", "longformer", "modernbert", "mpnet")

BASE = {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}}  # which is not the library's own
# GGUF files, with values that are not the library's own as far as files can tell them.
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {}),
    "cohere": ("cohere", {}),
    "falcon": ("falcon", {"ffn_hidden_size": 128}),
    "gemma2": ("gemma2", {}),
    "gemma3_text": ("gemma3_text", {"num_hidden_layers": 6}),
    "gpt2": ("gpt2", {"n_positions": 1024, "n_inner": 128}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_oss": ("gpt_oss", {}),
    "granite": ("granite", {}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False}),
    "llama": ("llama", BASE | {"rms_norm_eps": 1e-3}),
    "llama, Llama 3 rotary scaling": ("llama", LLAMA_3),
    "llama, YaRN": ("llama", YARN),
    "mamba": ("mamba", {}),
    "minimax_m2": ("minimax_m2", {}),
    "mistral": ("mistral", BASE | {"sliding_window": None}),
    "nemotron": ("nemotron", {}),
    "olmo2": ("olmo2", {}),
    "phi": ("phi", {}),
    "phi3": ("phi3", BASE | {"sliding_window": None}),
    "phi3, LongRoPE": ("phi3", LONG_ROPE | {"sliding_window": None}),
    "qwen2": ("qwen2", BASE),
    "qwen2_moe": ("qwen2_moe", BASE | {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}),
    "qwen3": ("qwen3", BASE | {"head_dim": 128}),
    "qwen3_moe": ("qwen3_moe", BASE | {"moe_intermediate_size": 768, "norm_topk_prob": True}),
    "smollm3": ("smollm3", {}),
    "stablelm": ("stablelm", {}),
    "starcoder2": ("starcoder2", BASE | {"sliding_window": None}),
}  # fmt: skip
# Folders of weights that another package unpacks, which the project does not install.
PACKAGES: dict[str, dict[str, Any]] = {
    "AWQ": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {}},
    "GPTQ": {"quant_method": "gptq", "bits": 4, "group_size": 32},
    "HQQ": {"quant_method": "hqq", "quant_config": {}},
    "TorchAO": {"quant_method": "torchao", "quant_type": "int8_weight_only"},
}
# Types of the library that are not tried: they make no text by themselves, or need a package that is not installed.
LEFT_OUT = ("gemma3n", "gemma4_assistant", "gemma4_unified_assistant", "musicgen", "musicgen_melody")


def _families() -> Iterator[Family]:
    for kind in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(LEFT_OUT)):
        yield Family(kind, folder_of(kind, OWN.get(kind, {})), special=SPECIAL.get(kind, ""))
    for name, (kind, own) in VARIANTS.items():
        yield Family(name, folder_of(kind, own))
    for kind, own in IMAGES.items():
        auto = AutoModelForImageTextToText
        yield Family(f"{kind}, with images", folder_of(kind, own, auto), auto, special="text model beside others")
    for kind in WHOLE:
        auto = AutoModelForSeq2SeqLM
        yield Family(f"{kind}, whole", folder_of(kind, {}, auto), auto, special="encoder and decoder")
    for kind in ENCODERS:
        yield Family(kind, folder_of(kind, {}, AutoModelForMaskedLM), AutoModelForMaskedLM, special="encoder")
    for name, (kind, own) in FILES.items():
        yield Family(f"{name}, GGUF", gguf_of(kind, own), special="GGUF file")
    yield Family("llama, --dtype int8", folder_of("llama", {}), dtypes=("float32", "int8"), special="bitsandbytes")
    yield Family("llama, 4-bit weights", packed(load_in_4bit=True), special="bitsandbytes")
    yield Family("llama, 8-bit weights", packed(True, load_in_8bit=True), is_packed=True, special="bitsandbytes")
    yield Family("llama, FP8 weights", fp8, special="float8 with a scale for each tile")
    for name, values in PACKAGES.items():
        yield Family(f"llama, {name} weights", said_to_be_packed(**values), special="another package's weights")
    yield Family("llama, adapter", adapter, special="PEFT folder")


FAMILIES = {family.name: family for family in _families()}
