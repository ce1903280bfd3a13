"""The tracking server: reaching it, and patience while it is away."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
NOTICE_SECONDS = 15.0  # between two lines that say that it is waited
PATIENCE = "TRACKING_PATIENCE_SECONDS"
DENIED = ("UNAUTHENTICATED", "PERMISSION_DENIED")
PASSING = ("TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED")

TrackingError = (MlflowException, RequestException)
T = TypeVar("T")
log = logging.getLogger(__name__)


def reach(look_up: Callable[[MlflowClient], T]) -> tuple[MlflowClient, T]:
    """Reach the tracking server of the environment, or ``sqlite:///mlflow.db`` without one.

    A server that is not there yet is waited for if TRACKING_PATIENCE_SECONDS is set: in a cluster it may start together
    with those who need it; at a terminal an address that is wrong is better said at once.

    Args:
        look_up: what to ask of it first, which may be asked again.

    Returns:
        The server's client, and what it answered.

    Raises:
        InputError: it does not answer, or it refuses.
        WorkError: it has not answered for so long.
    """
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)  # warns of an image without pip
    logging.getLogger("mlflow.models.signature").setLevel(logging.ERROR)  # warns of the model template, without student
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # the command says where its run is
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # one for every small file
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # `retry_tracking` does the rest
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # the lines of `_retry` say what its warnings do, and how long
    uri = tracking_uri()
    mlflow.set_tracking_uri(uri)
    patience = float(os.environ.get(PATIENCE, "0"))

    def look() -> tuple[MlflowClient, T]:
        _make_sqlite_file(uri)
        with _impatient():
            client = MlflowClient()
            return client, look_up(client)

    try:
        return _retry(look, patience, Exception, f"waiting for the tracking server {without_password(uri)}")
    except (InputError, WorkError):
        raise
    except Exception as error:  # every store and driver raises its own kind; all mean that tracking is out of reach
        raise InputError(_refusal(uri, error)) from error


def _retry(
    work: Callable[[], T], patience: float, passing: type[Exception] | tuple[type[Exception], ...], what: str
) -> T:
    """Do work; while the tracking server is out of reach, say so and try again.

    Args:
        work: may be done again after it has failed half-way.
        patience: for how many seconds; 0 tries once.
        passing: the errors after which it is tried again, unless they are a server's refusal.
        what: the beginning of the line that says so, a first time and every `NOTICE_SECONDS`.

    Raises:
        WorkError: the server has stayed away.
    """
    begin, pause, noticed = time.monotonic(), 0.5, -NOTICE_SECONDS
    while True:
        try:
            return work()
        except passing as error:
            if not patience or _is_final(error):
                raise
            if (waited := time.monotonic() - begin) > patience:
                raise _stayed_away(patience, error) from error
            if waited - noticed >= NOTICE_SECONDS:
                noticed = waited
                log.warning("%s (%s): %.0f of at most %.0f s", what, _reason(error), waited, patience)
            interrupts.sleep(pause)
            pause = min(2 * pause, MOST_PAUSE_SECONDS)


def _is_final(error: Exception) -> bool:
    """Whether the error is an answer of MLflow itself, or of a guard before it, that another try will not change.

    An empty or HTML answer is of something that stands before a server that is not there yet, such as an ingress.
    """
    if isinstance(error, (InputError, WorkError)):
        return True
    if not isinstance(error, MlflowException):
        return False
    return error.error_code in DENIED or not (error.error_code in PASSING or not _is_of_mlflow(error))


def _is_of_mlflow(error: MlflowException) -> bool:
    """Whether MLflow itself has answered, and not something before it."""
    return isinstance(error, RestException) or not str(error).startswith("API request to endpoint")


def is_unknown(error: MlflowException) -> bool:
    """Whether MLflow says that it has nothing of the id that it was asked for, or that it is no id."""
    return _is_of_mlflow(error) and error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


def _is_deleted(error: MlflowException) -> bool:
    """Whether MLflow says that what it was to change was deleted."""
    is_inactive = "must be in the 'active' state" in str(error)
    return _is_of_mlflow(error) and (error.error_code == "RESOURCE_DOES_NOT_EXIST" or is_inactive)


def _reason(error: Exception) -> str:
    """A library's error in a few words."""
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


def _stayed_away(patience: float, error: Exception) -> WorkError:
    uri = without_password(mlflow.get_tracking_uri())
    return WorkError(f"MLFLOW_TRACKING_URI {uri}: has not answered for {patience:.0f} s ({_reason(error)})")


def _make_sqlite_file(uri: str) -> None:
    """Make the database of a ``sqlite`` address where there is none, whole or not at all.

    MLflow migrates a new file table by table, and two processes at once, or a kill in the middle, leave a file that
    nobody can open again.
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

    Raises:
        WorkError: the server stayed away, artifacts cannot be written, or what is written to was deleted.
    """
    patience = float(os.environ.get(PATIENCE, "300"))
    try:
        return _retry(work, patience, TrackingError, "tracking is out of reach, training goes on; trying again")
    except MlflowException as error:
        if error.error_code in DENIED:  # a token that has expired meanwhile
            raise WorkError(_refusal(mlflow.get_tracking_uri(), error)) from error
        if _is_deleted(error):
            raise WorkError(f"deleted from MLflow meanwhile ({_reason(error)}); run the command again") from error
        raise
    except RequestException:
        raise
    except OSError as error:  # artifacts on a disk that is full, or that may not be written
        raise WorkError(f"artifacts of MLflow: {error}") from error


def without_password(text: str) -> str:
    """A text that holds addresses, without the names and passwords in them."""
    return re.sub(r"//[^/@\s]*@", "//***@", text)


@contextmanager
def _impatient() -> Iterator[None]:
    """One try of a few seconds, for finding out whether a server is there at all."""
    names = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
