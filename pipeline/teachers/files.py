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

import torch
from safetensors import safe_open
from transformers.utils import logging as transformers_logging

from pipeline import hub
from pipeline.errors import InputError, WorkError

LFS_POINTER = b"version https://git-lfs"

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
    """The local files that hold the weights, in the format that `transformers` prefers.

    Args:
        name: the teacher's.
        source: a folder, a GGUF file, or a hub id, which has none.

    Returns:
        The files.

    Raises:
        InputError: a file that the folder's index names is missing, or a GGUF file is one of several.
    """
    if isinstance(source, str):
        return []
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


def check_weight_file(name: str, file: Path) -> None:
    """Check that a local file of weights is whole: no pointer of Git LFS, and not cut short.

    Raises:
        InputError: it is not.
    """
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


def hash_files(files: Sequence[Path]) -> str:
    """Hash of the contents of files, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()[:16]}"


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
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings(action="ignore"))
            if downloads and sys.stderr.isatty():
                hub.show_bars()
            else:  # logging goes on: its handlers hold the stream itself
                stack.enter_context(redirect_stderr(stack.enter_context(Path(os.devnull).open("w"))))
            yield
    finally:
        transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
