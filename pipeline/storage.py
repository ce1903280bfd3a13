"""Where bytes go: files that are either whole or absent."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import InputError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` on a temporary name beside ``path`` and rename it when it is whole and on disk.

    Raises:
        InputError: the folder cannot be made or written.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def writable(path: str | Path) -> Path:
    """The path, once its folder exists and takes files; asked before long work, not after it.

    Raises:
        InputError: it names another kind of place, a folder, or one that cannot be written.
    """
    if "://" in str(path):
        raise InputError(f"--output {path}: expected a local path")
    path = Path(path)
    if path.is_dir():
        raise InputError(f"--output {path}: a folder; expected a file name")
    probe = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"--output {path}: cannot be written ({error.strerror or error})") from error
    return path
