"""Objects in S3 (``s3://bucket/key``): the only module that knows boto3.

S3 is what boto3 finds in the environment: credentials, region, and with ``AWS_ENDPOINT_URL`` (or MLflow's
``MLFLOW_S3_ENDPOINT_URL``) a store other than Amazon's. An object appears when its upload is complete. Its SHA-256
is stored with it and checked after a download; the store checks uploads too, unless boto3 is set not to send it
checksums (``AWS_REQUEST_CHECKSUM_CALCULATION=when_required``).
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, WorkError

warn_once = functools.cache(logging.getLogger(__name__).warning)
SCHEME = "s3://"
ATTEMPTS = 8  # of each request, with exponential backoff: about a minute in all
PART_BYTES = 16 << 20  # of an upload or download in parts; four are in flight
TRANSFER = {"multipart_threshold": PART_BYTES, "multipart_chunksize": PART_BYTES, "max_concurrency": 4}
CHANGED = "the copy is not what was uploaded; try again"
# boto3's settings for checksums, and the value that turns them off.
CHECKSUM_SETTINGS = ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION")
OFF = "when_required"
# Error codes of stores.
MISSING = ("NoSuchKey", "NotFound", "404")
EXISTS = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")  # another worker wrote the object first
UNSUPPORTED = ("NotImplemented", "501", "InvalidArgument", "InvalidRequest", "400")  # such as conditions, checksums
FULL = ("QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "507")
ADVICE: dict[str, tuple[type[Exception], str]] = {
    **dict.fromkeys(MISSING, (InputError, "not found")),
    **dict.fromkeys(FULL, (WorkError, "no space left in the store")),
    "NoSuchBucket": (InputError, "no such bucket; make it or name another"),
    "AccessDenied": (InputError, "access denied; the credentials lack the right"),
    "403": (InputError, "access denied; the credentials are wrong or lack the right"),
    "InvalidAccessKeyId": (InputError, "the store does not know the AWS_ACCESS_KEY_ID"),
    "SignatureDoesNotMatch": (InputError, "the AWS_SECRET_ACCESS_KEY does not fit the AWS_ACCESS_KEY_ID"),
    "ExpiredToken": (InputError, "the credentials have expired"),
    "RequestTimeTooSkewed": (WorkError, "the clock of this machine is off by more than the store allows; set it"),
}
# In messages about the checksum headers that boto3 sends since 2025, or about the encoding that comes with them.
UNKNOWN_CHECKSUM = re.compile(r"checksum|trailer|aws-chunked|content-sha256|header you provided", re.IGNORECASE)


def split_url(url: str) -> tuple[str, str]:
    """Bucket and key of ``s3://bucket/key``; the key may be empty."""
    bucket, _, key = url.removeprefix(SCHEME).partition("/")
    if not bucket:
        raise InputError(f"{url}: expected s3://bucket/key")
    return bucket, key


def upload(path: Path, url: str, sha256: str) -> None:
    """Copy a file to an object, which appears when it is complete; its hash is stored with it."""
    from boto3.exceptions import S3UploadFailedError
    from boto3.s3.transfer import TransferConfig

    extra: dict[str, Any] = {"Metadata": {"sha256": sha256}}
    with _request(url) as (store, bucket, key):
        if store.meta.config.request_checksum_calculation == OFF:
            warn_once(f"warning: the store does not check what it receives ({CHECKSUM_SETTINGS[0]}={OFF}); files are "
                      "checked when they are read")  # fmt: skip
        else:
            extra["ChecksumAlgorithm"] = "SHA256"
        try:
            store.upload_file(str(path), bucket, key, ExtraArgs=extra, Config=TransferConfig(**TRANSFER))
        except S3UploadFailedError as error:
            raise error.__context__ or error from None


def download(url: str, path: Path) -> str | None:
    """Copy an object to a file and check its size; the SHA-256 that was stored with it, or None."""
    from boto3.s3.transfer import TransferConfig

    with _request(url) as (store, bucket, key):
        head = store.head_object(Bucket=bucket, Key=key)
        store.download_file(bucket, key, str(path), Config=TransferConfig(**TRANSFER))
        sha256: str | None = {name.lower(): value for name, value in head["Metadata"].items()}.get("sha256")
        if sha256 is None and store.meta.config.response_checksum_validation == OFF:
            warn_once(f"warning: files from elsewhere are checked by their size alone ({CHECKSUM_SETTINGS[1]}={OFF})")
    if path.stat().st_size != head["ContentLength"]:
        raise WorkError(f"{url}: {CHANGED}")
    return sha256


def first_bytes(url: str, number: int) -> bytes | None:
    """At most ``number`` bytes from the start of an object; None if it does not exist."""
    with _request(url) as (store, bucket, key):
        try:
            found = store.get_object(Bucket=bucket, Key=key, Range=f"bytes=0-{number - 1}")
        except store.exceptions.ClientError as error:
            if _code(error) in MISSING:
                return None
            if _code(error) in ("InvalidRange", "416"):  # an empty object
                return b""
            raise
        return bytes(found["Body"].read(number))


def object_names(url: str) -> set[str]:
    """Names of the objects below a folder, relative to it."""
    with _request(url) as (store, bucket, key):
        prefix = f"{key.rstrip('/')}/" if key else ""
        pages = store.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return {entry["Key"].removeprefix(prefix) for page in pages for entry in page.get("Contents", [])}


def remove_objects(url: str) -> None:
    """Remove all objects below a folder."""
    for name in sorted(object_names(url)):
        with _request(f"{url.rstrip('/')}/{name}") as (store, bucket, key):
            store.delete_object(Bucket=bucket, Key=key)


def write_if_absent(url: str, text: str) -> str:
    """Write a small object unless it exists; the text that it then has, the same for all workers."""
    condition = {"IfNoneMatch": "*"}
    with _request(url) as (store, bucket, key):
        for _ in range(ATTEMPTS):
            try:
                return str(store.get_object(Bucket=bucket, Key=key)["Body"].read().decode())
            except store.exceptions.ClientError as error:
                if _code(error) not in MISSING:
                    raise
            try:
                store.put_object(Bucket=bucket, Key=key, Body=text.encode(), **condition)
            except store.exceptions.ClientError as error:
                if condition and _code(error) in UNSUPPORTED:
                    condition = {}  # workers that start together write the same
                elif _code(error) not in EXISTS:
                    raise
    raise WorkError(f"{url}: the store shows nothing of what it took; try again")


def check_access(url: str) -> None:
    """Fail unless the bucket exists and can be listed."""
    with _request(url) as (store, bucket, key):
        store.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)


@functools.cache
def client() -> Any:
    """The S3 client; boto3 is loaded when a place in S3 is named for the first time."""
    import boto3
    from botocore.config import Config

    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL")
    endpoint = next(filter(None, map(os.environ.get, names)), None)
    session = boto3.Session()
    config = Config(
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        connect_timeout=10,
        read_timeout=60,
        # Stores other than Amazon's seldom have a host name for each bucket.
        s3={"addressing_style": "path" if endpoint else "auto"},
    )
    return session.client("s3", endpoint_url=endpoint, region_name=session.region_name or "us-east-1", config=config)


def _code(error: Any) -> str:
    return str(error.response["Error"].get("Code", ""))


@contextmanager
def _request(url: str) -> Iterator[tuple[Any, str, str]]:
    """Client, bucket and key for requests; errors of boto3 become ours: one line that says what to do."""
    bucket, key = split_url(url)
    from boto3.exceptions import Boto3Error
    from botocore import exceptions as failures

    try:
        yield client(), bucket, key
    except (failures.NoCredentialsError, failures.PartialCredentialsError) as error:
        raise InputError(
            f"{url}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile in ~/.aws"
        ) from error
    except failures.ClientError as error:
        code, message = _code(error), str(error.response["Error"].get("Message", ""))
        kind, advice = ADVICE.get(code, (WorkError, f"the store answers {code}: {message}"))
        if code in UNSUPPORTED and UNKNOWN_CHECKSUM.search(message):
            kind, advice = InputError, f"{advice}; set {' and '.join(f'{name}={OFF}' for name in CHECKSUM_SETTINGS)}"
        raise kind(f"{url}: {advice}") from error
    except failures.FlexibleChecksumError as error:
        raise WorkError(f"{url}: {CHANGED}") from error
    except (
        failures.ProfileNotFound, failures.ConfigParseError, failures.InvalidConfigError,
        failures.InvalidChecksumConfigError,
    ) as error:  # fmt: skip
        raise InputError(f"{url}: {error}") from error
    except ValueError as error:  # boto3 refuses an endpoint that is no URL
        if "endpoint" not in str(error):
            raise
        raise InputError(f"{url}: {error}; check AWS_ENDPOINT_URL") from error
    except (failures.BotoCoreError, Boto3Error, ConnectionError, TimeoutError) as error:
        raise WorkError(f"{url}: the store does not answer ({error})") from error
