"""Tiny GGUF files, with names and layouts as llama.cpp's converter writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
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
EPSILONS = ("layer_norm_eps", "norm_eps", "norm_epsilon")
OWN_NAMES = {"e_score_correction_bias": "exp_probs_b.bias", "self_attn.sinks": "attn_sinks.weight"}
NORMS_FROM_ZERO = ("gemma", "gemma2", "gemma3", "nemotron")  # whose files hold the whole factor


def write(model: Any, tokenizer: Any, path: Path) -> None:
    """Write a model of `transformers` in float32, with its tokenizer."""
    config = model.config
    kind = config.model_type
    architecture = ARCHITECTURES.get(kind, kind)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    _add_sizes(writer, architecture, config)
    _add_rotary(writer, architecture, config)
    (_add_sentencepiece if kind.startswith("gemma") else _add_tokenizer)(writer, tokenizer)
    names = gguf.get_tensor_name_map(_arch(architecture), config.num_hidden_layers)
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, tensor in model.state_dict().items():
        if not (is_tied and name.startswith("lm_head")) and not re.search(r"\.attn\.(masked_)?bias$", name):
            for named, value in _converted(config, name, tensor.float().numpy(), names):
                writer.add_tensor(named, np.ascontiguousarray(value, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_sizes(writer: Any, architecture: str, config: Any) -> None:
    for key, named in KEYS.items():
        value = getattr(config, named, None)
        if isinstance(value, list):
            value = value[0]
        if architecture == "lfm2" and key.endswith("head_count_kv"):
            writer.add_array(f"lfm2.{key}", [value if "full" in layer else 0 for layer in config.layer_types])
        elif isinstance(value, float):
            writer.add_float32(f"{architecture}.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"{architecture}.{key}", value)
    for value in filter(None, (getattr(config, named, None) for named in EXPERTS)):
        writer.add_uint32(f"{architecture}.expert_count", value)
    norms = {"lfm2": ("rms_",), "nemotron": ("", "rms_")}.get(architecture, ("",))  # what some files call the norm
    for value in filter(None, (getattr(config, named, None) for named in EPSILONS)):
        for norm in norms:
            writer.add_float32(f"{architecture}.attention.layer_norm_{norm}epsilon", value)


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
    elif scaling == "longrope":  # its type is not named
        writer.add_uint32(
            f"{architecture}.rope.scaling.original_context_length", config.original_max_position_embeddings
        )
        for length in ("long", "short"):
            writer.add_tensor(f"rope_factors_{length}.weight", np.array(rotary[f"{length}_factor"], np.float32))
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


def _converted(config: Any, name: str, value: Any, names: Any) -> Iterator[tuple[str, Any]]:
    """A weight under the file's names and in its layout."""
    block = re.search(r"\.(\d+)\.", name)
    if expert := re.search(r"experts\.(gate_up|down)_proj(_bias)?$", name):
        suffix = "bias" if expert[2] else "weight"
        parts = {"down": value}
        if config.model_type == "gpt_oss" and not expert[2]:
            parts["down"] = value = value.swapaxes(1, 2)
        if expert[1] == "gate_up":
            half = value.shape[1] // 2
            parts = {"gate": value[:, :half], "up": value[:, half:]}
            if config.model_type == "gpt_oss":  # which alternates between the two
                parts = {"gate": value[:, ::2], "up": value[:, 1::2]}
        yield from ((f"blk.{block[1]}.ffn_{part}_exps.{suffix}", held) for part, held in parts.items())
    elif own := next((own for ending, own in OWN_NAMES.items() if name.endswith(ending)), None):
        yield f"blk.{block[1]}.{own}", value
    else:
        stem, _, suffix = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "")
        found = names.get_name(stem) or names.get_name(stem.removeprefix("transformer."))
        assert found is not None, f"{config.model_type}: no name for {name} in GGUF files"
        yield f"{found}.{suffix}" if suffix else found, _laid_out(config, name, value)


def _laid_out(config: Any, name: str, value: Any) -> Any:
    kind = config.model_type
    architecture = ARCHITECTURES.get(kind, kind)
    if name.endswith("A_log"):
        value = -np.exp(value)
    elif name.endswith(("conv1d.weight", "conv.conv.weight")):
        value = value.squeeze(1)
    elif kind == "gpt2" and re.search(r"(c_attn|c_proj|c_fc)\.weight$", name):
        value = value.T
    elif architecture == "llama" and re.search(r"[qk]_proj\.weight$", name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        value = value.reshape(heads, 2, -1, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
    elif kind == "bloom" and "query_key_value" in name:
        value = value.reshape(config.n_head, 3, -1, *value.shape[1:]).swapaxes(0, 1).reshape(value.shape)
    elif architecture in NORMS_FROM_ZERO and name.endswith("norm.weight"):
        value = value + 1
    elif name.endswith("shared_expert_gate.weight"):
        value = value[0]
    return value
