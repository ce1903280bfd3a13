"""GGUF files, unpacked once for all: to read one takes `transformers` forty times as long as to load its weights."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf import GGUFReader
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from pipeline import hub
from pipeline.errors import InputError
from pipeline.teacher_tokenizer import load_tokenizer

FORM = 3  # of what is kept; raised when a file that was kept before should be looked at again
# Architectures whose vectors differ from those of the same weights in a folder (docs/families.md).
READ_WRONGLY = ("starcoder2",)  # whose rotary base is not read
MOST_BYTES = 500_000_000  # of a file that is kept unpacked, in which it takes up to eight times as many


def _check_readable(path: Path) -> None:
    """Check that `transformers` reads all of a GGUF file that decides vectors.

    Raises:
        InputError: it does not.
    """
    reader = GGUFReader(path)
    architecture = _text(reader, "general.architecture")
    scaling = _text(reader, f"{architecture}.rope.scaling.type")
    factors = [tensor for tensor in reader.tensors if tensor.name.startswith("rope_")]
    if architecture in READ_WRONGLY:
        reason = f"a file of this architecture ({architecture}) rightly"
    elif scaling not in ("", "none") or any((own.data != 1).any() for own in factors):
        reason = f"its rotary scaling ({scaling or factors[0].name})"
    else:
        return
    raise InputError(
        f"--teacher {path}: transformers does not read {reason}; give the model's folder or hub id instead"
    )


def _text(reader: GGUFReader, field: str) -> str:
    found = reader.get_field(field)
    return str(found.contents()) if found is not None else ""


def _save_as_it_is(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer by a class that adds nothing: its own might make it anew, without the <bos> in front."""
    special = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    plain: Any = PreTrainedTokenizerFast
    plain(tokenizer_object=tokenizer.backend_tokenizer, **special).save_pretrained(folder)


def unpacked(
    path: Path, revision: str, config: Any, options: dict[str, Any], check: Callable[[Any, dict[str, Any]], None]
) -> Path | None:
    """The folder with the weights of a GGUF file in float32, which is exact, and its tokenizer, in the hub's cache.

    Args:
        path: the file.
        revision: a hash of it.
        config: the model's configuration.
        options: what `transformers` needs to read the file.
        check: raises where weights are missing, given the model and what the library says of loading it.

    Returns:
        None where the file is large or the cache cannot be written: then it is read anew each time.

    Raises:
        InputError: the library would read the file wrongly.
    """
    folder = hub.cache() / "unpacked" / f"{revision[:32]}-{transformers.__version__}-{FORM}"
    if folder.is_dir():
        return folder
    _check_readable(path)
    if path.stat().st_size > MOST_BYTES:
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
        check(read, found)
        whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        whole.load_state_dict(read.state_dict())  # what was read counts as quantised, and cannot be saved
        _save_as_it_is(tokenizer, part)
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
