"""The tracking server: reaching it, its experiment, and patience while it is away."""

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
from mlflow.exceptions import MlflowException
from requests import RequestException
from sqlalchemy import make_url

from pipeline.errors import InputError, WorkError
from pipeline.storage import write_atomically

EXPERIMENT = "activation-distillation"
DEFAULT_URI = "sqlite:///mlflow.db"
POLL_SECONDS = 2.0  # between two looks for a server that is not there yet
PATIENCE = "TRACKING_PATIENCE_SECONDS"
DENIED = ("UNAUTHENTICATED", "PERMISSION_DENIED")
PASSING = ("TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED")

TrackingError = (MlflowException, RequestException)
T = TypeVar("T")
log = logging.getLogger(__name__)


def reach() -> tuple[MlflowClient, str]:
    """Reach the tracking server of the environment, or ``sqlite:///mlflow.db`` without one.

    A server that is not there yet is waited for if TRACKING_PATIENCE_SECONDS is set: in a cluster it may start together
    with those who need it; at a terminal an address that is wrong is better said at once.

    Returns:
        The server's client, and the id of the project's experiment.

    Raises:
        InputError: it does not answer, or it refuses.
        WorkError: it has not answered for so long.
    """
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)  # warns of an image without pip
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # the command says where its run is
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # one for every small file
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # `patiently` does the rest
    uri = _absolute(os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI)
    mlflow.set_tracking_uri(uri)
    patience, begin = float(os.environ.get(PATIENCE, "0")), time.monotonic()
    while True:
        try:
            _make_sqlite_file(uri)
            with _impatient():
                client = MlflowClient()
                return client, _experiment(client)
        except Exception as error:  # every store and driver raises its own kind; all mean that tracking is out of reach
            if not patience or (isinstance(error, MlflowException) and error.error_code not in PASSING):
                raise InputError(_refusal(uri, error)) from error
            if time.monotonic() - begin > patience:
                raise _stayed_away(patience) from error
            log.warning("MLFLOW_TRACKING_URI %s: nothing answers there yet", _without_password(uri))
            time.sleep(POLL_SECONDS)


def _refusal(uri: str, error: Exception) -> str:
    lines = str(error).strip().split("\n") or [""]
    if isinstance(error, MlflowException) and error.error_code in DENIED:
        return _without_password(
            f"MLFLOW_TRACKING_URI {uri}: the server denies access ({lines[0][:200]}); check MLFLOW_TRACKING_USERNAME "
            "and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    return _without_password(
        f"MLFLOW_TRACKING_URI {uri}: no MLflow server or database answers there "
        f"({type(error).__name__}: {lines[-1][:200]}); start it, or unset the variable to track to {DEFAULT_URI}"
    )


def _stayed_away(patience: float) -> WorkError:
    uri = _without_password(mlflow.get_tracking_uri())
    return WorkError(f"MLFLOW_TRACKING_URI {uri}: has not answered for {patience:.0f} s")


def _absolute(uri: str) -> str:
    """The address of an SQLite database by its whole path: MLflow takes a relative one for one below the root."""
    path = uri.removeprefix("sqlite:///")
    return uri if path in (uri, "") or path.startswith(":") else f"sqlite:///{Path(path).resolve()}"


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


def patiently(work: Callable[[], T]) -> T:
    """Do work on the tracking server; while it is out of reach, try again, for TRACKING_PATIENCE_SECONDS (300).

    Args:
        work: may be done again after it has failed half-way.

    Raises:
        WorkError: the server stayed away, or artifacts cannot be written.
    """
    patience = float(os.environ.get(PATIENCE, "300"))
    begin, pause = time.monotonic(), 0.5
    while True:
        try:
            return work()
        except TrackingError as error:
            if isinstance(error, MlflowException) and error.error_code in DENIED:  # a token that has expired meanwhile
                raise WorkError(_refusal(mlflow.get_tracking_uri(), error)) from error
            if isinstance(error, MlflowException) and error.error_code not in PASSING:
                raise
            if time.monotonic() - begin > patience:
                raise _stayed_away(patience) from error
            if pause == 0.5:
                log.warning("tracking is out of reach; trying again for %.0f s, training goes on", patience)
            time.sleep(pause)
            pause = min(2 * pause, 10)
        except OSError as error:  # artifacts on a disk that is full, or that may not be written
            raise WorkError(f"artifacts of MLflow: {error}") from error


def _without_password(text: str) -> str:
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


def _artifact_location(name: str) -> str | None:
    """Beside an SQLite database, wherever the command runs; None where MLflow does so itself, or a server does."""
    path = Path(mlflow.get_tracking_uri().removeprefix("sqlite:///"))
    if not path.is_absolute() or path.parent == Path.cwd():
        return None
    return str(path.parent / "mlruns" / name)


def _experiment(client: MlflowClient) -> str:
    """The experiment's id; whoever comes first creates it."""
    if named := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return named
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, _artifact_location(name)))
        except MlflowException:  # another process was faster
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)
