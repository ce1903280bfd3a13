"""Tiny GGUF files, with names and layouts as llama.cpp's converter writes them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np

# What the files call a family.
ARCHITECTURES = {
    "mistral": "llama", "smollm3": "smollm3", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3",
    "gpt_oss": "gpt-oss", "cohere": "command-r", "gpt_neox": "gptneox", "minimax_m2": "minimax-m2", "phi": "phi2",
}  # fmt: skip
# Keys of the files after the architecture's name, and what configurations call the same.
KEYS = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_epsilon", "attention.key_length": "head_dim",
    "attention.value_length": "head_dim", "attention.sliding_window": "sliding_window",
    "expert_used_count": "num_experts_per_tok", "expert_feed_forward_length": "moe_intermediate_size",
    "ssm.conv_kernel": "conv_kernel", "ssm.inner_size": "intermediate_size", "ssm.state_size": "state_size",
    "ssm.time_step_rank": "time_step_rank", "shortconv.l_cache": "conv_L_cache", "vocab_size": "vocab_size",
}  # fmt: skip
EXPERTS = ("num_experts", "num_local_experts")
NORMS_FROM_ZERO = ("gemma", "gemma2", "gemma3", "nemotron")  # whose files hold the whole factor


def write(model: Any, tokenizer: Any, path: Path) -> None:
    """Write a model of `transformers` in float32, with its tokenizer."""
    config = model.config
    kind = config.model_type
    architecture = ARCHITECTURES.get(kind, kind)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    for key, named in KEYS.items():
        value = getattr(config, named, None)
        if key == "feed_forward_length" and value is None:
            value = 4 * config.hidden_size
        if isinstance(value, list):
            value = value[0]
        if kind == "lfm2" and key.endswith("head_count_kv"):
            writer.add_array(f"lfm2.{key}", [value if "full" in layer else 0 for layer in config.layer_types])
        elif isinstance(value, float):
            writer.add_float32(f"{architecture}.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"{architecture}.{key}", value)
    for named in EXPERTS:
        if value := getattr(config, named, None):
            writer.add_uint32(f"{architecture}.expert_count", value)
    if epsilon := next((v for n in ("layer_norm_eps", "norm_eps", "norm_epsilon") if (v := getattr(config, n, 0))), 0):
        kinds = ("rms_",) if kind == "lfm2" else ("", "rms_") if kind == "nemotron" else ("",)
        for norm in kinds:
            writer.add_float32(f"{architecture}.attention.layer_norm_{norm}epsilon", epsilon)
    _add_rotary(writer, architecture, config)
    (_add_sentencepiece if kind.startswith("gemma") else _add_tokenizer)(writer, tokenizer)
    blocks = config.num_hidden_layers
    names = gguf.get_tensor_name_map(_arch(architecture), blocks)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, tensor in model.state_dict().items():
        if tied and name.startswith(("lm_head", "output_projection")):
            continue
        for named, value in _converted(kind, config, name, tensor.float().numpy(), names):
            writer.add_tensor(named, np.ascontiguousarray(value, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _arch(name: str) -> gguf.MODEL_ARCH:
    return next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def _add_rotary(writer: Any, architecture: str, config: Any) -> None:
    rotary = getattr(config, "rope_parameters", None) or {}
    rotary = rotary.get("full_attention", rotary)
    if "rope_theta" not in rotary:
        return
    writer.add_float32(f"{architecture}.rope.freq_base", float(rotary["rope_theta"]))
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_uint32(f"{architecture}.rope.dimension_count", int(head * rotary.get("partial_rotary_factor", 1.0)))
    scaling = rotary.get("rope_type", "default")
    if scaling == "llama3":  # its factor for each frequency is a tensor
        frequencies = rotary["rope_theta"] ** -(np.arange(0, head, 2) / head)
        length = 2 * np.pi / frequencies
        low = rotary["original_max_position_embeddings"] / rotary["low_freq_factor"]
        high = rotary["original_max_position_embeddings"] / rotary["high_freq_factor"]
        smooth = (rotary["original_max_position_embeddings"] / length - rotary["low_freq_factor"]) / (
            rotary["high_freq_factor"] - rotary["low_freq_factor"]
        )
        between = 1 / ((1 - smooth) / rotary["factor"] + smooth)
        factors = np.where(length > low, rotary["factor"], np.where(length < high, 1.0, between))
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    elif scaling != "default":
        writer.add_string(f"{architecture}.rope.scaling.type", scaling)
        writer.add_float32(f"{architecture}.rope.scaling.factor", float(rotary["factor"]))
        if original := rotary.get("original_max_position_embeddings"):
            writer.add_uint32(f"{architecture}.rope.scaling.original_context_length", original)


def _add_tokenizer(writer: Any, tokenizer: Any) -> None:
    held = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(held["vocab"].items(), key=lambda item: item[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    special = set(tokenizer.all_special_tokens)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if token in special else normal for token in tokens])
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in held["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.pad_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(True)


def _add_sentencepiece(writer: Any, tokenizer: Any) -> None:
    """The same vocabulary as far as it is ASCII, in the manner of SentencePiece."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    tokens = [token.replace("\u0120", "\u2581") for token, _ in vocabulary]
    tokens = [token if token.replace("\u2581", " ").isascii() else f"<unused{n}>" for n, token in enumerate(tokens)]
    unused = [number for number, token in enumerate(tokens) if token.startswith("<unused")]
    tokens[unused[0]], tokens[unused[1]] = "<unk>", "<eos>"
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(number) for number in range(len(tokens))])
    writer.add_token_types([control if token.startswith("<") and len(token) > 2 else normal for token in tokens])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_unk_token_id(unused[0])
    writer.add_eos_token_id(unused[1])
    writer.add_add_bos_token(True)


def _converted(kind: str, config: Any, name: str, value: Any, names: Any) -> list[tuple[str, Any]]:
    """A weight under the file's names and in its layout."""
    if re.search(r"\.attn\.(masked_)?bias$|rotary_emb", name):
        return []
    block = re.search(r"\.(\d+)\.", name)
    if "experts." in name and (weight := re.search(r"experts\.(gate_up|down)_proj(_bias)?$", name)):
        suffix = "bias" if weight[2] else "weight"
        if kind == "gpt_oss" and not weight[2]:
            value = value.swapaxes(1, 2)
        if weight[1] == "down":
            return [(f"blk.{block[1]}.ffn_down_exps.{suffix}", value)]
        half = value.shape[1] // 2  # gpt-oss alternates between the two
        gate, up = (value[:, ::2], value[:, 1::2]) if kind == "gpt_oss" else (value[:, :half], value[:, half:])
        return [(f"blk.{block[1]}.ffn_{part}_exps.{suffix}", held) for part, held in (("gate", gate), ("up", up))]
    if name.endswith("self_attn.sinks"):
        return [(f"blk.{block[1]}.attn_sinks.weight", value)]
    if name.endswith("e_score_correction_bias"):
        return [(f"blk.{block[1]}.exp_probs_b.bias", value)]
    if kind == "mamba" and name.endswith("A_log"):
        value = -np.exp(value)
    if name.endswith(("conv1d.weight", "conv.conv.weight")):
        value = value.squeeze(1)
    if kind == "gpt2" and re.search(r"(c_attn|c_proj|c_fc)\.weight$", name):
        value = value.T
    if ARCHITECTURES.get(kind, kind) == "llama" and re.search(r"[qk]_proj\.weight$", name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        value = value.reshape(heads, 2, -1, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
    if kind == "bloom" and "query_key_value" in name:
        split = value.reshape(config.n_head, 3, -1, *value.shape[1:])
        value = split.swapaxes(0, 1).reshape(value.shape)
    if ARCHITECTURES.get(kind, kind) in NORMS_FROM_ZERO and name.endswith("norm.weight"):
        value = value + 1
    if name.endswith("shared_expert_gate.weight"):
        value = value[0]
    stem, _, suffix = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "")
    found = names.get_name(stem) or names.get_name(stem.removeprefix("transformer."))
    assert found is not None, f"{kind}: no name for {name} in GGUF files"
    return [(f"{found}.{suffix}" if suffix else found, value)]
