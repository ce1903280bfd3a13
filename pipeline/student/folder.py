"""A student's folder as files: whole, of a known format, and safe to read from a stranger.

``config.json`` describes the student, ``model.safetensors`` holds its tensors, ``tokenizer.json`` is the teacher's
tokenizer, and ``README.md`` the card. ``config.json`` has the checksums of the tensors, the tokenizer and itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save
from tokenizers import Tokenizer

from pipeline.errors import InputError
from pipeline.storage import write_atomically

FORMAT = "student-5"
CONFIG, MODEL, TOKENIZER, CARD = "config.json", "model.safetensors", "tokenizer.json", "README.md"
MAX_BYTES = {CONFIG: 1 << 23, TOKENIZER: 1 << 27, MODEL: 1 << 36}  # no student's file is larger


@dataclass(frozen=True)
class Folder:
    """Contents of a student's folder."""

    config: dict[str, Any]  # plain JSON values
    tensors: dict[str, NDArray[Any]]
    tokenizer: Tokenizer | None  # the teacher's; None where the student knows its concepts only
    card: str  # the text of its README, or ""


def pack(folder: Folder) -> dict[str, bytes]:
    """Encode the files, by name; ``config.json`` comes last: a folder that has it is whole.

    Returns:
        Contents by file name.

    Raises:
        InputError: a file that is too large to be loaded again.
    """
    contents = {MODEL: save({name: np.ascontiguousarray(value) for name, value in folder.tensors.items()})}
    if folder.tokenizer is not None:
        contents[TOKENIZER] = folder.tokenizer.to_str().encode()
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    config = folder.config | {"format": FORMAT, "files": sums}
    config["sha256"] = _sha256(config)
    encoded = json.dumps(config, indent=1, ensure_ascii=False).encode()
    contents |= {CARD: folder.card.encode(), CONFIG: encoded}
    for name in contents.keys() & MAX_BYTES.keys():
        _check_size(name, len(contents[name]))
    return contents


def write_folder(place: Path, contents: Mapping[str, bytes]) -> None:
    """Write the files, each whole or not at all."""
    for name, content in contents.items():
        if content:
            write_atomically(place / name, partial(Path.write_bytes, data=content))


def read_folder(place: Path) -> Folder:
    """Read the files; raises what `unpack` raises."""
    card = place / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return unpack(lambda name: _read_file(place, name), text)


def unpack(read_file: Callable[[str], bytes], card: str) -> Folder:
    """Decode and check the files, whose contents ``read_file`` finds by name.

    Returns:
        The contents.

    Raises:
        InputError: damaged, of another format, or with content that has no place in a student. Files that are not a
            student's cause OSError, ValueError, KeyError, TypeError or SafetensorError.
    """
    config = json.loads(read_file(CONFIG))
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise InputError(f"format {found!r}, expected {FORMAT!r}; train it again")
    claimed = {CONFIG: config.pop("sha256"), **config["files"]}
    contents = {name: read_file(name) for name in config["files"]}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    for name, digest in ({CONFIG: _sha256(config)} | digests).items():
        if digest != claimed[name]:
            raise InputError(f"{name} is damaged (it does not match its checksum)")
    del config["files"]
    tensors = load(contents[MODEL])
    for name, value in tensors.items():
        if value.dtype not in (np.int8, np.int64, np.float16, np.float32):
            raise InputError(f"tensor {name}: {value.dtype}, expected int8, int64, float16 or float32")
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise InputError(f"tensor {name}: values that are not finite")
    return Folder(config, tensors, _tokenizer(contents[TOKENIZER]) if TOKENIZER in contents else None, card)


def _sha256(config: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in config.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_file(folder: Path, name: str) -> bytes:
    if name not in MAX_BYTES:
        raise InputError(f"names the file {name!r}; expected {', '.join(sorted(MAX_BYTES))}")
    _check_size(name, (folder / name).stat().st_size)
    return (folder / name).read_bytes()


def _check_size(name: str, size: int) -> None:
    if size > MAX_BYTES[name]:
        raise InputError(f"{name} has {size:,} bytes; expected {MAX_BYTES[name]:,} at the most")


def _tokenizer(content: bytes) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(content.decode())
    except BaseException as error:  # the library's own panics are no Exceptions
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise InputError(f"{TOKENIZER} is no tokenizer ({str(error)[:100]})") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
