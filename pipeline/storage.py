"""Files that are complete or absent, on this machine and in S3.

A place is a local path or ``s3://bucket/key``; `pipeline.s3` reads and writes the latter.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline import s3
from pipeline.errors import InputError, WorkError
from pipeline.interrupts import undo_on_exit


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` on a temporary name beside ``path`` and rename the file when it is complete and on disk.

    Raises:
        InputError: the folder cannot be made or written.
        WorkError: the disk is full.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    remove = functools.partial(part.unlink, missing_ok=True)
    try:
        with undo_on_exit(remove):
            path.parent.mkdir(parents=True, exist_ok=True)
            part.touch()
            mode = part.stat().st_mode
            write(part)
            if part.stat().st_mode != mode:  # safetensors makes files that only their owner can read
                part.chmod(mode)
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
    except OSError as error:
        kind = WorkError if error.errno in (errno.ENOSPC, errno.EDQUOT) else InputError
        raise kind(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # a file system that cannot be written refuses even to remove a missing file
            remove()


def write_to_stdout(lines: Iterable[str] = ()) -> None:
    """Write lines to standard output and flush it; BrokenPipeError if the reader is gone, WorkError on other errors."""
    if sys.stdout is None:  # closed by the parent process
        return
    try:
        sys.stdout.writelines(lines)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise WorkError(f"cannot write to standard output: {error.strerror or error}") from error


def writable(path: str | Path) -> Path:
    """The output path, checked before long work: a local file that can be written; its folder is made."""
    if "://" in str(path):
        raise InputError(f"--output {path}: expected a local path or s3://bucket/key")
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


def tracking_uri() -> str:
    """The tracking server of the environment, else ``mlflow.db`` here; SQLite paths are made absolute."""
    # MLflow reads a relative path as one below the root.
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    path = uri.removeprefix("sqlite:///")
    return uri if path in (uri, "") or path.startswith(":") else f"sqlite:///{Path(path).resolve()}"


def base_name(path: Path) -> str:
    """The last part of a path, also of ``.`` and ``..``; links are not followed."""
    return path.name if path.name not in ("", "..") else path.resolve().name


def file_name(name: str) -> str:
    """A name as the start of a file name: without slashes, and not hidden."""
    name = name.replace("/", "--")
    return name if name and not name.startswith(".") else f"_{name}"


def is_remote(place: str | Path) -> bool:
    """Whether a place is in S3."""
    return str(place).startswith(s3.SCHEME)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, which is not read into memory as a whole."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_if_absent(place: str, text: str) -> str:
    """Write a small file unless it exists; the text that it then has, the same for all workers."""
    if is_remote(place):
        return s3.write_if_absent(place, text)
    path = Path(place)
    if not path.is_file():
        own = path.with_name(f"{path.stem}-{secrets.token_hex(8)}{path.suffix}")
        write_atomically(own, lambda part: part.write_text(text, encoding="utf-8"))
        try:
            os.link(own, path)  # fails if another worker was first
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links; workers that start together write the same
            own.replace(path)
        own.unlink(missing_ok=True)
    return path.read_text(encoding="utf-8")


def download(url: str, path: Path) -> None:
    """Copy an object in S3 to a file, complete or not at all, and check its SHA-256 where that was stored with it."""

    def write(part: Path) -> None:
        if s3.download(url, part) not in (None, sha256_of(part)):
            raise WorkError(f"{url}: {s3.CHANGED}")

    write_atomically(path, write)


def upload(path: Path, url: str) -> None:
    """Copy a file to an object in S3, which appears when it is complete."""
    s3.upload(path, url, sha256_of(path))


def fetch(place: str) -> Path:
    """The local path of a file or folder; from S3 it is copied, and the copy removed when the process ends."""
    if not is_remote(place):
        return Path(place)
    path = temporary_folder() / Path(*s3.split_url(place)).name
    names = [name for name in s3.object_names(place) if name]
    for name in names:
        download(f"{place.rstrip('/')}/{name}", path / name)
    if not names:
        download(place, path)
    return path


def temporary_folder() -> Path:
    """A new folder for copies of remote files, removed when the process ends."""
    return Path(tempfile.mkdtemp(dir=_temporary_home().name))


@functools.cache
def _temporary_home() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="activation-distillation-")


def staging_path(place: str) -> Path:
    """The local path of an output before its upload; a repeated command finds its own files there."""
    home = Path(tempfile.gettempdir(), f"activation-distillation-{os.getuid()}")
    return home / hashlib.sha256(place.encode()).hexdigest()[:16] / Path(*s3.split_url(place)).name


@contextmanager
def output_folder(place: str) -> Iterator[Path]:
    """A local folder for output files, uploaded at the end where the place is in S3."""
    if not is_remote(place):
        yield Path(place)
        return
    s3.check_access(place)  # before long work
    folder = staging_path(place)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    yield folder
    if int(os.environ.get("RANK", "0")) > 0:  # only the main process of accelerate writes files
        return
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        # Hidden files are not uploaded, and keep the local folder for a later command that resumes.
        if path.is_file() and not str(name).startswith(".") and before.get(path) != path.stat().st_mtime_ns:
            upload(path, f"{place.rstrip('/')}/{name}")
    if not any(folder.glob(".*")):
        shutil.rmtree(folder.parent, ignore_errors=True)


@dataclass(frozen=True)
class Output:
    """An output file: local, or in S3 with a local path at which it is made."""

    path: Path
    url: str | None = None  # its place in S3

    @classmethod
    def at(cls, place: str) -> Output:
        """The output at a local path or in S3, checked to be writable."""
        return cls(writable(staging_path(place)), place) if is_remote(place) else cls(writable(place))

    def __str__(self) -> str:
        return self.url or str(self.path)

    def publish(self) -> None:
        """Upload the finished file where its place is in S3."""
        if self.url is not None:
            upload(self.path, self.url)

    def remove_local_copy(self) -> None:
        """Remove the local files that were made only to be uploaded."""
        if self.url is not None:
            shutil.rmtree(self.path.parent, ignore_errors=True)
