"""A model's files: which they are, whether they are whole, and the libraries that open them without their chatter."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import logging as transformers_logging

from pipeline import hub
from pipeline.errors import InputError, WorkError
from pipeline.storage import sha256_of

LFS_POINTER = b"version https://git-lfs"
COMPILED = "_orig_mod."  # before the names of a compiled model's weights

log = logging.getLogger(__name__)


def revision_files(name: str, folder: Path) -> list[Path]:
    """The files of a folder that make up a model's revision; an InputError where it is no saved model."""
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"--teacher {name}: the folder holds an adapter (PEFT); merge it into its model and save that: "
            "model.merge_and_unload().save_pretrained(folder)"
        )
    if not (folder / "config.json").is_file():
        raise InputError(f"--teacher {name}: the folder has no config.json, so it is not a saved model")
    patterns = ("*.safetensors", "*.bin", "config.json")
    return sorted(file for pattern in patterns for file in folder.glob(pattern))


def weight_files(name: str, source: Path | str) -> list[Path]:
    """The local files of weights, whole, in the format that `transformers` prefers; of a hub id none."""
    files = _list_weight_files(name, source) if isinstance(source, Path) else []
    for file in files:
        _check_weight_file(name, file)
    return files


def _list_weight_files(name: str, source: Path) -> list[Path]:
    if source.is_file():
        if several := re.search(r"-\d{5}-of-(\d{5})\.gguf$", source.name, re.IGNORECASE):
            raise InputError(
                f"--teacher {name}: one of {int(several[1])} files of a model; join them first: "
                f"llama-gguf-split --merge {source.name} whole.gguf"
            )
        return [source]
    for whole in ("model.safetensors", "pytorch_model.bin"):
        index = source / f"{whole}.index.json"
        if (source / whole).is_file():
            return [source / whole]
        if index.is_file():
            with translate_load_errors(name, str(index)):
                parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            for part in parts:
                if not (source / part).is_file():
                    raise InputError(f"--teacher {name}: {source / part} is missing, which {index.name} names")
            return [source / part for part in parts]
    return []


def _check_weight_file(name: str, file: Path) -> None:
    """Refuse a file of weights that is a pointer of Git LFS, or cut short."""
    with file.open("rb") as opened:
        head = opened.read(len(LFS_POINTER))
    if head == LFS_POINTER:
        raise InputError(
            f"--teacher {name}: {file} is a Git LFS pointer, not the weights; fetch them with: git lfs pull"
        )
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                pass
        except Exception as error:  # the library's own types
            raise InputError(f"--teacher {name}: {file} is not whole ({error}); download it again") from error


def check_loaded(name: str, causal: Any, found: dict[str, Any]) -> None:
    """Refuse missing weights and other shapes, which the library fills at random; the head may be missing."""
    head = causal.get_output_embeddings()
    of_head = {id(weight) for weight in head.parameters()} if head is not None else set()
    own = dict(causal.named_parameters()) | dict(causal.named_buffers())
    shapes = {key: f"{tuple(stored)}, expected {tuple(shape)}" for key, stored, shape in found["mismatched_keys"]}
    missing = sorted(key for key in found["missing_keys"] if key not in own or id(own[key]) not in of_head)
    wrong = sorted([*missing, *shapes])
    if not wrong:
        if found["error_msgs"]:
            raise InputError(f"--teacher {name}: {found['error_msgs'][0]}")
        return
    reason = f"{len(wrong)} of {len(own)} weights are not in its files or do not fit its configuration, "
    reason += f"the first {wrong[0]}" + (f" {shapes[wrong[0]]}" if wrong[0] in shapes else "")
    if any(COMPILED in key for key in found["unexpected_keys"]):
        reason += f"; the files' names contain {COMPILED}, the mark of a compiled model: save model.{COMPILED[:-1]}"
    elif found["unexpected_keys"]:
        reason += f"; the files have {sorted(found['unexpected_keys'])[0]} instead"
    raise InputError(f"--teacher {name}: {reason}")


def hash_files(files: Sequence[Path]) -> str:
    """Hash of the contents of files, one after the other."""
    return short_hash(b"".join(bytes.fromhex(sha256_of(path)) for path in files))


def short_hash(content: bytes) -> str:
    """The beginning of the SHA-256 of bytes, with the name of the hash."""
    return f"sha256:{hashlib.sha256(content).hexdigest()[:16]}"


@contextmanager
def translate_load_errors(name: str, location: str) -> Iterator[None]:
    """Turn any error of a library on a model's files into an InputError of one line, with the way out if known."""
    try:
        yield
    except (InputError, WorkError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # safetensors, pickle, struct, tokenizers and JSON each have their own types
        reason = " ".join(str(error).split())[:400]
        if not isinstance(error, (OSError, ValueError, ImportError, RuntimeError)):
            reason = f"{type(error).__name__} {reason}".strip()
        if "trust_remote_code" in str(error):
            reason = "it brings its own code; add --trust-remote-code if you trust its authors"
        elif isinstance(error, OSError) and not Path(location).exists():
            reason += " To work without a network, name a local folder or a .gguf file."
        raise InputError(f"--teacher {name}: cannot load {location}: {reason}") from error


@contextmanager
def silence_libraries(downloads: bool) -> Iterator[None]:
    """Hide the libraries' messages unless ``--verbose`` is given; ``downloads`` still have their bars on a terminal."""
    if log.isEnabledFor(logging.DEBUG):
        yield
        return
    with ExitStack() as stack:
        for logger in map(logging.getLogger, ("huggingface_hub", "transformers")):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        stack.callback(transformers_logging.enable_progress_bar)
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        if downloads and sys.stderr.isatty():
            hub.show_bars()
        else:  # logging goes on: its handlers hold the stream itself
            stack.enter_context(redirect_stderr(stack.enter_context(Path(os.devnull).open("w"))))
        yield
