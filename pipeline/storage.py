"""Where bytes go: files that are either whole or absent, on this machine and in S3.

A place is a local path or ``s3://bucket/key``. S3 is whatever boto3 finds in the environment: credentials, region,
and with ``AWS_ENDPOINT_URL`` (or MLflow's ``MLFLOW_S3_ENDPOINT_URL``) a store other than Amazon's. An object appears
when its upload is complete; its SHA-256 travels with it and is checked when it is read, and by the store unless
boto3 is told that the store knows no checksums (``AWS_REQUEST_CHECKSUM_CALCULATION=when_required``).
"""

from __future__ import annotations

import errno
import functools
import hashlib
import logging
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, WorkError
from pipeline.interrupts import undo_on_exit

log = logging.getLogger(__name__)
S3 = "s3://"
ATTEMPTS = 8  # of each request, with exponential backoff: about a minute in all
PART_BYTES = 16 << 20  # of an upload or download in parts; four are in flight
TRANSFER = {"multipart_threshold": PART_BYTES, "multipart_chunksize": PART_BYTES, "max_concurrency": 4}
MISSING = ("NoSuchKey", "NotFound", "404")  # codes of what is not there
FIRST = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")  # of a condition: another one was first
NO_CONDITIONS = ("NotImplemented", "501", "InvalidArgument", "InvalidRequest", "400")  # of a store that knows none
# What stores say of the checksum headers that boto3 sends since 2025, and of the encoding that comes with them.
UNKNOWN_CHECKSUM = re.compile(r"checksum|trailer|aws-chunked|content-sha256|header you provided", re.IGNORECASE)
SETTINGS = ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION")  # as boto3 documents them
OFF = "when_required"
CHANGED = "the copy is not what was uploaded; try again"
ADVICE: dict[str, tuple[type[Exception], str]] = {
    "NoSuchBucket": (InputError, "no such bucket; make it or name another"),
    "NoSuchKey": (InputError, "not found"),
    "NotFound": (InputError, "not found"),
    "404": (InputError, "not found"),
    "AccessDenied": (InputError, "access denied; the credentials lack the right"),
    "403": (InputError, "access denied; the credentials are wrong or lack the right"),
    "InvalidAccessKeyId": (InputError, "the store does not know the AWS_ACCESS_KEY_ID"),
    "SignatureDoesNotMatch": (InputError, "the AWS_SECRET_ACCESS_KEY does not fit the AWS_ACCESS_KEY_ID"),
    "ExpiredToken": (InputError, "the credentials have expired"),
    "RequestTimeTooSkewed": (WorkError, "the clock of this machine is off by more than the store allows; set it"),
    "QuotaExceeded": (WorkError, "no space left in the store"),
    "InsufficientStorage": (WorkError, "no space left in the store"),
    "XMinioStorageFull": (WorkError, "no space left in the store"),
    "507": (WorkError, "no space left in the store"),
}


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` on a temporary name beside ``path`` and rename it when it is whole and on disk.

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
            mode = part.stat().st_mode  # that the user's files have
            write(part)
            if part.stat().st_mode != mode:  # safetensors puts a file there that only its owner can read
                part.chmod(mode)
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
    except OSError as error:
        raise _of_disk(path, error) from error
    finally:
        with suppress(OSError):  # a file system that cannot be written at all refuses even to remove what is not there
            remove()


def _of_disk(path: Path, error: OSError) -> InputError | WorkError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return (WorkError if full else InputError)(f"cannot write {path}: {error.strerror or error}")


def write_to_stdout(lines: Iterable[str] = ()) -> None:
    """Write lines to standard output, and all that waits to be written there.

    Raises:
        BrokenPipeError: nobody reads on.
        WorkError: it takes no more.
    """
    if sys.stdout is None:  # closed by who started the process
        return
    try:
        sys.stdout.writelines(lines)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise WorkError(f"cannot write to standard output: {error.strerror or error}") from error


def writable(path: str | Path) -> Path:
    """The path, once its folder exists and takes files; asked before long work, not after it.

    Raises:
        InputError: it names another kind of place, a folder, or one that cannot be written.
    """
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
    """The tracking server of the environment, or ``mlflow.db`` here; of an SQLite database the whole path.

    MLflow takes a relative path for one below the root.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    path = uri.removeprefix("sqlite:///")
    return uri if path in (uri, "") or path.startswith(":") else f"sqlite:///{Path(path).resolve()}"


def base_name(path: Path) -> str:
    """The last part of a path, also of ``.`` and ``..``; a link has a name of its own."""
    return path.name if path.name not in ("", "..") else path.resolve().name


def file_name(name: str) -> str:
    """A name as files can begin with it: in no folder, and not hidden."""
    name = name.replace("/", "--")
    return name if name and not name.startswith(".") else f"_{name}"


def is_remote(place: str | Path) -> bool:
    """Whether a place is in S3."""
    return str(place).startswith(S3)


def write_if_absent(place: str, text: str) -> str:
    """Write a small file where none stands; what stands there then, for of several workers one is the first."""
    if not is_remote(place):
        return _create_here(Path(place), text)
    bucket, key = _split(place)
    condition = {"IfNoneMatch": "*"}
    with _told(place):
        client = _client()
        for _ in range(ATTEMPTS):
            try:
                return str(client.get_object(Bucket=bucket, Key=key)["Body"].read().decode())
            except client.exceptions.ClientError as error:
                if _code(error) not in MISSING:
                    raise
            try:
                client.put_object(Bucket=bucket, Key=key, Body=text.encode(), **condition)
            except client.exceptions.ClientError as error:
                if condition and _code(error) in NO_CONDITIONS:
                    condition = {}  # workers that start together write the same
                elif _code(error) not in FIRST:
                    raise
    raise WorkError(f"{place}: the store shows nothing of what it took; try again")


def _create_here(path: Path, text: str) -> str:
    if not path.is_file():
        own = path.with_name(f"{path.stem}-{secrets.token_hex(8)}{path.suffix}")
        write_atomically(own, lambda part: part.write_text(text, encoding="utf-8"))
        try:
            os.link(own, path)  # the first one wins
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links; workers that start together write the same
            own.replace(path)
        own.unlink(missing_ok=True)
    return path.read_text(encoding="utf-8")


def fetch(place: str) -> Path:
    """A local path for what stands at a place: a file, or a folder of files. Copies are removed as the process ends.

    Raises:
        InputError: nothing is there, or it may not be read.
        WorkError: the store does not answer, or the copy is not what was uploaded.
    """
    if not is_remote(place):
        return Path(place)
    bucket, key = _split(place)
    path = temporary_folder() / (Path(key).name or bucket)
    names = [name for name in object_names(place) if name]
    for name in names:
        download(f"{place.rstrip('/')}/{name}", path / name)
    if not names:
        download(place, path)
    return path


def download(url: str, path: Path) -> None:
    """Copy an object to a file, whole or not at all, and check that it is what was uploaded."""
    bucket, key = _split(url)

    def write(part: Path) -> None:
        from boto3.s3.transfer import TransferConfig

        with _told(url):
            told = _client().head_object(Bucket=bucket, Key=key)
            _client().download_file(bucket, key, str(part), Config=TransferConfig(**TRANSFER))
        claimed = {name.lower(): value for name, value in told["Metadata"].items()}.get("sha256")
        if claimed is None and _client().meta.config.response_checksum_validation == OFF:
            _warn_once(f"files from elsewhere are checked by their size alone ({SETTINGS[1]}={OFF})")
        if part.stat().st_size != told["ContentLength"] or claimed not in (None, sha256_of(part)):
            raise WorkError(f"{url}: {CHANGED}")

    write_atomically(path, write)


def upload(path: Path, url: str) -> None:
    """Copy a file to an object, which appears when it is whole."""
    from boto3.exceptions import S3UploadFailedError
    from boto3.s3.transfer import TransferConfig

    bucket, key = _split(url)
    extra: dict[str, Any] = {"Metadata": {"sha256": sha256_of(path)}}
    with _told(url):
        if _client().meta.config.request_checksum_calculation == OFF:
            _warn_once(
                f"the store does not check what it receives ({SETTINGS[0]}={OFF}); files are checked when they are read"
            )
        else:
            extra["ChecksumAlgorithm"] = "SHA256"
        try:
            _client().upload_file(str(path), bucket, key, ExtraArgs=extra, Config=TransferConfig(**TRANSFER))
        except S3UploadFailedError as error:
            raise error.__context__ or error from None


def first_bytes(url: str, number: int) -> bytes | None:
    """The first so many bytes of an object, or all if it is shorter; None where there is none."""
    bucket, key = _split(url)
    with _told(url):
        client = _client()
        try:
            found = client.get_object(Bucket=bucket, Key=key, Range=f"bytes=0-{number - 1}")
        except client.exceptions.ClientError as error:
            if _code(error) in MISSING:
                return None
            if _code(error) in ("InvalidRange", "416"):  # an empty object
                return b""
            raise
        return bytes(found["Body"].read(number))


def object_names(url: str) -> set[str]:
    """Names of the objects below a folder, relative to it."""
    bucket, key = _split(url)
    prefix = f"{key.rstrip('/')}/" if key else ""
    with _told(url):
        pages = _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return {entry["Key"].removeprefix(prefix) for page in pages for entry in page.get("Contents", [])}


def remove_objects(url: str) -> None:
    """Remove all objects below a folder."""
    bucket, _ = _split(url)
    for name in sorted(object_names(url)):
        with _told(url):
            _client().delete_object(Bucket=bucket, Key=_split(f"{url.rstrip('/')}/{name}")[1])


def staging_path(place: str) -> Path:
    """The local path at which what will stand at a place in S3 is made; the same for a command that is repeated."""
    home = Path(tempfile.gettempdir(), f"activation-distillation-{os.getuid()}")
    bucket, key = _split(place)
    return home / hashlib.sha256(place.encode()).hexdigest()[:16] / (Path(key).name or bucket)


@contextmanager
def output_folder(place: str) -> Iterator[Path]:
    """A local folder for files that stand at the place when all has gone well; hidden ones are for going on later.

    Raises:
        InputError: files cannot be written there.
        WorkError: the store does not answer.
    """
    if not is_remote(place):
        yield Path(place)
        return
    with _told(place):
        bucket, key = _split(place)
        _client().list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)  # is it there at all? asked before long work
    folder = staging_path(place)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    yield folder
    if int(os.environ.get("RANK", "0")) > 0:  # of the processes that accelerate has launched, one writes files
        return
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not str(name).startswith(".") and before.get(path) != path.stat().st_mtime_ns:
            upload(path, f"{place.rstrip('/')}/{name}")
    if not any(folder.glob(".*")):
        shutil.rmtree(folder.parent, ignore_errors=True)


@dataclass(frozen=True)
class Output:
    """Where a file will be: here, or in S3 with a place here where it is made.

    Attributes:
        path: the local file.
        url: its place in S3.
    """

    path: Path
    url: str | None = None

    @classmethod
    def at(cls, place: str) -> Output:
        """The output at a local path or in S3, once it can be written.

        Raises:
            InputError: it cannot.
        """
        return cls(writable(staging_path(place)), place) if is_remote(place) else cls(writable(place))

    def __str__(self) -> str:
        return self.url or str(self.path)

    def publish(self) -> None:
        """Put the finished file where it belongs."""
        if self.url is not None:
            upload(self.path, self.url)

    def remove_local_copy(self) -> None:
        """Remove what was here only to be put into S3."""
        if self.url is not None:
            shutil.rmtree(self.path.parent, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """Hash of a file's bytes, in memory that does not grow with it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _split(url: str) -> tuple[str, str]:
    bucket, _, key = url.removeprefix(S3).partition("/")
    if not bucket:
        raise InputError(f"{url}: expected s3://bucket/key")
    return bucket, key


def temporary_folder() -> Path:
    """A new folder for copies of what stands elsewhere, removed as the process ends."""
    return Path(tempfile.mkdtemp(dir=_copies().name))


@functools.cache
def _copies() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="activation-distillation-")


@functools.cache
def _client() -> Any:
    """The S3 client; boto3 is loaded when the first place in S3 is named."""
    import boto3
    from botocore.config import Config

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    endpoint = endpoint or os.environ.get("MLFLOW_S3_ENDPOINT_URL")
    session = boto3.Session()
    config = Config(
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        connect_timeout=10,
        read_timeout=60,
        # Stores other than Amazon's seldom have a name for each bucket.
        s3={"addressing_style": "path" if endpoint else "auto"},
    )
    return session.client("s3", endpoint_url=endpoint, region_name=session.region_name or "us-east-1", config=config)


def _code(error: Any) -> str:
    """The store's code of an error of boto3."""
    return str(error.response["Error"].get("Code", ""))


@functools.cache
def _warn_once(line: str) -> None:
    log.warning("warning: %s", line)


@contextmanager
def _told(place: str) -> Iterator[None]:
    """Turn boto3's errors into ours: one line that says what to do."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        ConfigParseError,
        FlexibleChecksumError,
        InvalidChecksumConfigError,
        InvalidConfigError,
        NoCredentialsError,
        PartialCredentialsError,
        ProfileNotFound,
    )

    try:
        yield
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise InputError(
            f"{place}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile in ~/.aws"
        ) from error
    except ClientError as error:
        code, message = _code(error), str(error.response["Error"].get("Message", ""))
        kind, advice = ADVICE.get(code, (WorkError, f"the store answers {code}: {message}"))
        if code in NO_CONDITIONS and UNKNOWN_CHECKSUM.search(message):
            kind, advice = InputError, f"{advice}; set {' and '.join(f'{name}={OFF}' for name in SETTINGS)}"
        raise kind(f"{place}: {advice}") from error
    except FlexibleChecksumError as error:
        raise WorkError(f"{place}: {CHANGED}") from error
    except (ProfileNotFound, ConfigParseError, InvalidConfigError, InvalidChecksumConfigError) as error:
        raise InputError(f"{place}: {error}") from error
    except ValueError as error:  # of boto3, for an address that is none
        if "endpoint" not in str(error):
            raise
        raise InputError(f"{place}: {error}; check AWS_ENDPOINT_URL") from error
    except (BotoCoreError, Boto3Error, ConnectionError, TimeoutError) as error:
        raise WorkError(f"{place}: the store does not answer ({error})") from error
