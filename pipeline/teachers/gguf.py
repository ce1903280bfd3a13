"""GGUF files, unpacked once: `transformers` takes forty times as long to read one as to load its weights."""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf import GGUFReader
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from pipeline import hub
from pipeline.errors import InputError
from pipeline.teachers.files import check_loaded
from pipeline.teachers.find import TeacherSource
from pipeline.teachers.tokenizer import load_tokenizer

FORM = 4  # of unpacked folders; raised when the files of older ones should be read again
MAX_BYTES = 500_000_000  # of a file that is kept unpacked, which takes up to eight times as many
# Keys of a file that decide vectors, and their names in configurations.
KEYS = {
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "norm_epsilon", "layer_norm_eps"),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps"),
    "attention.key_length": ("head_dim",),
}


def check_read(path: Path, causal: Any) -> None:
    """Refuse a GGUF file whose weights, rotary frequencies or sizes `transformers` has not all read into a model."""
    if fault := _unread(GGUFReader(path), causal):
        raise InputError(
            f"--teacher {path}: transformers {transformers.__version__} does not read all of it: {fault}; give the "
            "model's folder or hub id instead"
        )


def _unread(reader: GGUFReader, causal: Any) -> str | None:
    """The first part of a file that is not in the model, or None."""
    config, architecture = causal.config.get_text_config(), _value(reader, "general.architecture")
    scaling = _value(reader, f"{architecture}.rope.scaling.type")
    factors = [tensor for tensor in reader.tensors if tensor.name.startswith("rope_")]
    if scaling not in (None, "", "none") or any((own.data != 1).any() for own in factors):
        return f"its rotary scaling ({scaling or factors[0].name})"
    base, rotary = _value(reader, f"{architecture}.rope.freq_base"), getattr(config, "rope_parameters", None) or {}
    bases = [own["rope_theta"] for own in (rotary, *rotary.values()) if isinstance(own, dict) and "rope_theta" in own]
    if base is not None and bases and not any(math.isclose(base, own, rel_tol=1e-5) for own in bases):
        return f"rope.freq_base is {base:g}, and was read as {bases[0]:g}"
    for key, names in KEYS.items():
        value, own = _value(reader, f"{architecture}.{key}"), [getattr(config, name, None) for name in names]
        read = [found for found in own if isinstance(found, (int, float))]
        if value is not None and read and not any(math.isclose(value, found, rel_tol=1e-5) for found in read):
            return f"{key} is {value:g}, and was read as {read[0]:g}"
    sizes = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors if not tensor.name.startswith("rope_")}
    read_sizes = {weight.data_ptr(): weight.numel() for weight in causal.state_dict().values()}  # a tied head once
    left = sum(sizes.values()) - sum(read_sizes.values())
    if left > 0 and left != sizes.get("output.weight"):  # the head again, where it is that of the embeddings
        return f"it holds {left:,} weights that are not read"
    return None


def _value(reader: GGUFReader, key: str) -> Any:
    found = reader.get_field(key)
    return None if found is None else found.contents()


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer by a generic class: its own might make it anew, without the <bos> in front."""
    special = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    plain: Any = PreTrainedTokenizerFast
    plain(tokenizer_object=tokenizer.backend_tokenizer, **special).save_pretrained(folder)


def unpack_gguf(source: TeacherSource) -> Path | None:
    """Unpack a teacher's GGUF file to exact float32 weights and a tokenizer, in a folder of the hub's cache.

    Returns:
        The folder; None where the file is large or the cache cannot be written, so that it is read anew each time.
    """
    [path], config, options = source.files, source.config, source.options
    folder = hub.cache() / "unpacked" / f"{source.revision[:32]}-{transformers.__version__}-{FORM}"
    if folder.is_dir():
        return folder
    if path.stat().st_size > MAX_BYTES:
        return None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=folder.parent))
    except OSError:
        return None
    try:
        tokenizer = load_tokenizer(path.stem, str(path.parent), config, options)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, config=config, dtype=torch.float32, output_loading_info=True, **options
        )
        read, found = loaded
        check_loaded(source.name, read, found)
        check_read(path, read)
        whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        whole.load_state_dict(read.state_dict())  # the model that was read counts as quantised, and cannot be saved
        _save_tokenizer(tokenizer, part)
        whole.save_pretrained(part)
        for file in part.iterdir():
            file.chmod(0o644)  # as the hub's files: for every user of the cache
        part.chmod(0o755)
        part.rename(folder)
    except (OSError, SafetensorError):  # no room, or another process was faster
        return folder if folder.is_dir() else None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder
