"""The tracking server: reaching it, and patience while it is away."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException, RestException
from requests import RequestException
from sqlalchemy import make_url

from pipeline import interrupts
from pipeline.errors import InputError, WorkError
from pipeline.storage import tracking_uri, write_atomically

MOST_PAUSE_SECONDS = 10.0  # between two tries
NOTICE_SECONDS = 15.0  # between two lines that report the waiting
PATIENCE = "TRACKING_PATIENCE_SECONDS"
# Of a first look: enough to find out whether a server is there at all.
ONE_SHORT_TRY = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
DENIED = ("UNAUTHENTICATED", "PERMISSION_DENIED")
TRANSIENT = ("TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED")

TrackingError = (MlflowException, RequestException)
T = TypeVar("T")
log = logging.getLogger(__name__)


def reach(look_up: Callable[[MlflowClient], T]) -> tuple[MlflowClient, T]:
    """Reach the tracking server of the environment, or ``sqlite:///mlflow.db`` without one.

    Only if TRACKING_PATIENCE_SECONDS is set does the command wait for a server that does not answer: in a cluster both
    may start together, at a terminal a wrong address is better reported at once.

    Args:
        look_up: the first request, which may be repeated.

    Returns:
        The server's client, and the answer to the request.

    Raises:
        InputError: the server does not answer, or it refuses.
        WorkError: the server has not answered for TRACKING_PATIENCE_SECONDS.
    """
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)  # warns of an image without pip
    logging.getLogger("mlflow.models.signature").setLevel(logging.ERROR)  # warns of the model template, without student
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # the command says where its run is
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # one for every small file
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # `retry_tracking` does the rest
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")  # MLflow's own default
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # the lines of `_retry` say what its warnings do, and how long
    uri = tracking_uri()
    mlflow.set_tracking_uri(uri)
    patience = float(os.environ.get(PATIENCE, "0"))

    def look() -> tuple[MlflowClient, T]:
        _make_sqlite_file(uri)
        before = {name: os.environ[name] for name in ONE_SHORT_TRY}
        os.environ.update(ONE_SHORT_TRY)
        try:
            client = MlflowClient()
            return client, look_up(client)
        finally:
            os.environ.update(before)

    try:
        return _retry(look, patience, (Exception,), f"waiting for the tracking server {without_password(uri)}")
    except (InputError, WorkError):
        raise
    except Exception as error:  # every store and driver raises its own kind; all mean that tracking is out of reach
        raise InputError(_refusal(uri, error)) from error


def _retry(work: Callable[[], T], patience: float, transient: tuple[type[Exception], ...], notice: str) -> T:
    """Do work; after transient errors log a notice and try again, for ``patience`` seconds (0: try once)."""
    begin, pause, noticed = time.monotonic(), 0.5, -NOTICE_SECONDS
    while True:
        try:
            return work()
        except transient as error:
            if not patience or _is_final(error):
                raise
            if (waited := time.monotonic() - begin) > patience:
                uri = without_password(mlflow.get_tracking_uri())
                why = f"has not answered for {patience:.0f} s ({_reason(error)})"
                raise WorkError(f"MLFLOW_TRACKING_URI {uri}: {why}") from error
            if waited - noticed >= NOTICE_SECONDS:
                noticed = waited
                log.warning("%s (%s): %.0f of at most %.0f s", notice, _reason(error), waited, patience)
            interrupts.sleep(pause)
            pause = min(2 * pause, MOST_PAUSE_SECONDS)


def _is_final(error: Exception) -> bool:
    """Whether another try will not change the error."""
    if isinstance(error, MlflowException):
        return error.error_code in DENIED or (_is_of_mlflow(error) and error.error_code not in TRANSIENT)
    return isinstance(error, (InputError, WorkError))


def _is_of_mlflow(error: MlflowException) -> bool:
    """Whether MLflow itself has answered; before it may stand an ingress that answers with an empty or HTML page."""
    return isinstance(error, RestException) or not str(error).startswith("API request to endpoint")


def is_unknown(error: MlflowException) -> bool:
    """Whether MLflow answers that the requested id does not exist or is no id."""
    return _is_of_mlflow(error) and error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


def _reason(error: Exception) -> str:
    """Shorten a library's error to a few words."""
    if found := re.search(r"failed with error code (\d+)", str(error)):
        return f"HTTP {found[1]}"
    if re.search(r"NewConnectionError|Connection refused|RemoteDisconnected|NameResolutionError", str(error)):
        return "nothing answers there"
    return without_password((str(error).strip().splitlines() or [type(error).__name__])[0][:120])


def _refusal(uri: str, error: Exception) -> str:
    lines = str(error).strip().split("\n") or [""]
    if isinstance(error, MlflowException) and error.error_code in DENIED:
        return without_password(
            f"MLFLOW_TRACKING_URI {uri}: the server denies access ({lines[0][:200]}); check MLFLOW_TRACKING_USERNAME "
            "and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    return without_password(
        f"MLFLOW_TRACKING_URI {uri}: no MLflow server or database answers there "
        f"({type(error).__name__}: {lines[-1][:200]}); start it, or unset the variable to track to mlflow.db"
    )


def _make_sqlite_file(uri: str) -> None:
    """Make the database of a ``sqlite`` address if it is missing, whole or not at all.

    MLflow migrates a new file table by table; two processes at once, or a kill in the middle, leave a broken file.
    """
    url = make_url(uri) if uri.startswith("sqlite") else None
    if url is None or not url.database or Path(url.database).exists():
        return
    path = Path(url.database)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        if not path.exists():
            write_atomically(path, lambda part: MlflowClient(f"sqlite:///{part}").search_experiments())
    finally:
        os.close(folder)


def retry_tracking(work: Callable[[], T]) -> T:
    """Do work on the tracking server; while it is out of reach, try again, for TRACKING_PATIENCE_SECONDS (300).

    Args:
        work: may be done again after it has failed half-way.

    Returns:
        What the work returns.

    Raises:
        WorkError: the server stayed away, artifacts cannot be written, or the run was deleted.
        MlflowException: another refusal of the server.
        RequestException: another error of the connection.
    """
    patience = float(os.environ.get(PATIENCE, "300"))
    try:
        return _retry(work, patience, TrackingError, "tracking is out of reach, training goes on; trying again")
    except MlflowException as error:
        if error.error_code in DENIED:  # a token that has expired meanwhile
            raise WorkError(_refusal(mlflow.get_tracking_uri(), error)) from error
        is_deleted = error.error_code == "RESOURCE_DOES_NOT_EXIST" or "must be in the 'active' state" in str(error)
        if is_deleted and _is_of_mlflow(error):
            raise WorkError(f"deleted from MLflow meanwhile ({_reason(error)}); run the command again") from error
        raise
    except RequestException:
        raise
    except OSError as error:  # artifacts on a disk that is full, or that may not be written
        raise WorkError(f"artifacts of MLflow: {error}") from error


def without_password(text: str) -> str:
    """Hide the names and passwords of addresses in a text."""
    return re.sub(r"//[^/@\s]*@", "//***@", text)
