"""Tiny random models of every family, saved as folders and files as their owners are.

A function that saves takes a folder and a tokenizer. It gives what a user names as the teacher, and the folder from
which the library itself loads the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tinygguf
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig

Save = Callable[[Path, Any], tuple[Path, Path]]
MOST_PARAMETERS = 5e6
KEPT = ("A_log", "conv", "decay", "norm")  # weights that are no matrix of a product, by parts of their names
TABLES = ("embed", "wte", "wpe")

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


def tiny_config(kind: type[PreTrainedConfig], own: dict[str, Any]) -> PreTrainedConfig:
    """A configuration with the tiny sizes wherever it names one, and ``own`` values over them."""
    try:
        plain = kind()
    except Exception:  # a class without defaults
        plain = None
    renamed = getattr(kind, "attribute_map", {})
    given = {}
    for name, value in SIZES.items():
        if renamed.get(name) in SIZES or isinstance(getattr(kind, name, None), property):
            continue
        try:
            has = name in getattr(kind, "__annotations__", {}) or hasattr(plain, name)
        except Exception:  # a value that differs between blocks
            has = True
        if has:
            given[name] = value
    if "kv_lora_rank" in given:  # latent attention: every head has keys of its own
        given["num_key_value_heads"] = given["num_attention_heads"]
    inner = getattr(kind, "sub_configs", {})
    for name, declared in inner.items():
        default = getattr(plain, name, None)
        found = type(default) if isinstance(default, PreTrainedConfig) else declared
        if found is not None and found.__name__ != "AutoConfig":
            given[name] = tiny_config(found, own.get(name, {})).to_dict()
    given |= {name: value for name, value in own.items() if name not in inner or name not in given}
    return kind(**given)


def randomise(model: Any) -> None:
    """Weights by which attention, norms and biases all matter, so that nothing is right by accident."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() > 1 and not any(part in name for part in KEPT):
                value.normal_(0, 1.0 if any(part in name for part in TABLES) else value.shape[-1] ** -0.5)
            else:
                value.add_(0.1 * torch.randn_like(value))


def folder_of(kind: str, own: dict[str, Any], auto: Any = AutoModelForCausalLM) -> Save:
    """A folder as `save_pretrained` leaves it."""

    def save(place: Path, tokenizer: Any) -> tuple[Path, Path]:
        torch.manual_seed(0)
        config = tiny_config(CONFIG_MAPPING[kind], own)
        with torch.device("meta"):
            size = sum(weight.numel() for weight in auto.from_config(config).parameters())
        assert size < MOST_PARAMETERS, f"{kind}: {size:,} parameters"
        model = auto.from_config(config).float()
        randomise(model)
        folder = place / kind
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder, folder

    return save


def gguf_of(kind: str, own: dict[str, Any]) -> Save:
    """A GGUF file, beside the folder of the same model."""

    def save(place: Path, tokenizer: Any) -> tuple[Path, Path]:
        _, folder = folder_of(kind, own)(place, tokenizer)
        path = place / f"{kind}.gguf"
        tinygguf.write(AutoModelForCausalLM.from_pretrained(folder), tokenizer, path)
        return path, folder

    return save


def packed(beside: bool = False, **how: Any) -> Save:
    """A folder with packed weights of bitsandbytes, to be compared with itself or with the model ``beside`` it."""

    def save(place: Path, tokenizer: Any) -> tuple[Path, Path]:
        _, folder = folder_of("llama", {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16})(place, tokenizer)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**how))
        model.save_pretrained(place / "packed")
        tokenizer.save_pretrained(place / "packed")
        return place / "packed", folder if beside else place / "packed"

    return save


def said_to_be_packed(**values: Any) -> Save:
    """A folder whose configuration asks for another package."""

    def save(place: Path, tokenizer: Any) -> tuple[Path, Path]:
        _, folder = folder_of("llama", {})(place, tokenizer)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": values}))
        return folder, folder

    return save


def fp8(place: Path, tokenizer: Any) -> tuple[Path, Path]:
    """A folder with weights of 8 bits and a scale for each of their tiles, as DeepSeek publishes its models."""
    size = 16
    folder, _ = said_to_be_packed(quant_method="fp8", weight_block_size=[size, size])(place, tokenizer)
    weights = {}
    for name, value in load_file(folder / "model.safetensors").items():
        weights[name] = value
        if name.endswith("proj.weight"):
            rows, columns = (side // size for side in value.shape)
            tiles = value.view(rows, size, columns, size)
            scale = tiles.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
            weights[name] = (tiles / scale[:, None, :, None]).view(value.shape).to(torch.float8_e4m3fn)
            weights[f"{name}_scale_inv"] = scale
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder, folder


def adapter(place: Path, tokenizer: Any) -> tuple[Path, Path]:
    """A folder as PEFT saves it: what was learned beside a model, and where that is."""
    _, folder = folder_of("llama", {})(place, tokenizer)
    learned = place / "adapter"
    learned.mkdir()
    told = {"peft_type": "LORA", "base_model_name_or_path": str(folder), "r": 4, "target_modules": ["q_proj"]}
    (learned / "adapter_config.json").write_text(json.dumps(told))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.zeros(4, 32)}, learned / "adapter_model.safetensors")
    return learned, folder
