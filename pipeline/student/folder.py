"""A student's folder as files: whole, of a known format, and safe to read from a stranger.

``config.json`` says what the student is, ``model.safetensors`` holds its numbers, ``tokenizer.json`` is the teacher's,
and ``README.md`` its card. Checksums in ``config.json`` cover the others and itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
MOST_BYTES = {CONFIG: 1 << 23, TOKENIZER: 1 << 27, MODEL: 1 << 36}  # more is no student


@dataclass(frozen=True)
class Folder:
    """What a student's folder holds.

    Attributes:
        config: plain JSON values.
        tensors: numbers by name.
        tokenizer: the teacher's; None where the student knows its concepts only.
        card: the text of its README, or "".
    """

    config: dict[str, Any]
    tensors: dict[str, NDArray[Any]]
    tokenizer: Tokenizer | None
    card: str


def pack(folder: Folder) -> dict[str, bytes]:
    """The files, by name."""
    contents = {MODEL: save({name: np.ascontiguousarray(value) for name, value in folder.tensors.items()})}
    if folder.tokenizer is not None:
        contents[TOKENIZER] = folder.tokenizer.to_str().encode()
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    config = folder.config | {"format": FORMAT, "files": sums}
    config["sha256"] = _sha256(config)
    contents[CARD] = folder.card.encode()
    contents[CONFIG] = json.dumps(config, indent=1, ensure_ascii=False).encode()  # last: with it the folder is whole
    return contents


def write_folder(place: Path, contents: Mapping[str, bytes]) -> None:
    """Write the files, each whole or not at all."""
    for name, content in contents.items():
        if content:
            write_atomically(place / name, lambda part, content=content: part.write_bytes(content))  # type: ignore[misc]


def read_folder(place: Path) -> Folder:
    """Read the files.

    Raises:
        InputError: damaged, of another format, or with something in them that has no place in a student.
        OSError, ValueError, KeyError, TypeError, SafetensorError: not a student's folder.
    """
    return unpack(lambda name: _read(place, name), _card(place))


def unpack(content_of: Callable[[str], bytes], card: str) -> Folder:
    """What files hold, given what reads one of them by its name; raises as `read` does."""
    config = _config(content_of(CONFIG))
    contents = {name: _undamaged(name, content_of(name), digest) for name, digest in config.pop("files").items()}
    tensors = load(contents[MODEL])
    for name, value in tensors.items():
        if value.dtype not in (np.int8, np.int64, np.float16, np.float32):
            raise InputError(f"tensor {name}: {value.dtype}, expected int8, int64, float16 or float32")
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise InputError(f"tensor {name}: values that are not finite")
    tokenizer = _tokenizer(contents[TOKENIZER]) if TOKENIZER in contents else None
    return Folder(config, tensors, tokenizer, card)


def _sha256(config: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in config.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read(folder: Path, name: str) -> bytes:
    """The bytes of a file of the folder itself."""
    if name not in MOST_BYTES:
        raise InputError(f"names the file {name!r}; expected {', '.join(sorted(MOST_BYTES))}")
    path = folder / name
    size = path.stat().st_size
    if size > MOST_BYTES[name]:
        raise InputError(f"{name} has {size:,} bytes; expected {MOST_BYTES[name]:,} at the most")
    return path.read_bytes()


def _undamaged(name: str, content: bytes, digest: str) -> bytes:
    """The bytes of a file, once they are known to be what was written."""
    if hashlib.sha256(content).hexdigest() != digest:
        raise InputError(f"{name} is damaged (it does not match its checksum)")
    return content


def _config(content: bytes) -> dict[str, Any]:
    config = json.loads(content)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise InputError(f"format {found!r}, expected {FORMAT!r}; train it again")
    if config.pop("sha256") != _sha256(config):
        raise InputError(f"{CONFIG} is damaged (it does not match its checksum)")
    return config


def _card(folder: Path) -> str:
    path = folder / CARD
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


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
