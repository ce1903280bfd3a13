"""The experiment and the run that a command tracks to, as the environment names them, checked."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from mlflow import MlflowClient
from mlflow.entities import Experiment, LifecycleStage
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException

from pipeline.errors import InputError
from pipeline.tracking.server import is_unknown

EXPERIMENT = "activation-distillation"
ID, NAME, RUN = "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"
SWEEPS = ("sweep", "candidate", "worker")  # roles of runs that are or might have been a sweep's parent
ROLES = (*SWEEPS, "cell", "extract", "evaluate")
UNSET = "; unset the variable"
T = TypeVar("T")


def find_experiment(client: MlflowClient, experiment_id: str | None = None, role: str | None = None) -> str:
    """Find the id of the experiment for a run of a role, or to read; check it, and the run of the environment."""
    run_id, uri = os.environ.get(RUN) if role else None, client.tracking_uri
    run = look_up(client.get_run, run_id, f"{RUN} {run_id}: {uri} has no such run{UNSET}") if run_id else None
    named, name = experiment_id or os.environ.get(ID), os.environ.get(NAME)
    if named or (run is not None and not name):
        variable = f"{ID} {named}" if named else f"{RUN} {run_id}"
        wanted = named or run.info.experiment_id  # type: ignore[union-attr]
        found = look_up(client.get_experiment, wanted, f"{variable}: {uri} has no experiment {wanted}{UNSET}")
    else:
        found = _by_name(client, name or EXPERIMENT)
    _check_experiment(client, found)
    if run is not None:
        _check_run(run, found, str(role))
    elif experiment_id is None and named and name not in (None, "", found.name) and RUN not in os.environ:
        raise InputError(f"{ID} {named}: is the experiment {found.name!r}, and {NAME} {name!r} another; unset one")
    return str(found.experiment_id)


def look_up(get: Callable[[str], T], identity: str, message: str) -> T:
    """Get a run or an experiment; an InputError with the message where MLflow answers that it does not exist."""
    try:
        return get(identity)
    except MlflowException as error:
        if is_unknown(error):
            raise InputError(message) from error
        raise


def _by_name(client: MlflowClient, name: str) -> Experiment:
    if (found := client.get_experiment_by_name(name)) is not None:
        return found
    try:
        return client.get_experiment(client.create_experiment(name, _artifact_location(client, name)))
    except MlflowException:  # another process was faster
        if (found := client.get_experiment_by_name(name)) is None:
            raise
        return found


def _check_experiment(client: MlflowClient, found: Experiment) -> None:
    """Check that the experiment was not deleted and that the artifact folder of a database was not renamed."""
    if found.lifecycle_stage == LifecycleStage.DELETED:
        raise InputError(
            f"experiment {found.name!r}: was deleted; bring it back with: mlflow experiments restore --experiment-id "
            f"{found.experiment_id}, or name another with {NAME}"
        )
    folder, uri = artifact_folder(found.artifact_location), client.tracking_uri
    if folder is not None and uri.startswith("sqlite:///") and not folder.absolute().parent.parent.exists():
        raise InputError(
            f"MLFLOW_TRACKING_URI {uri}: its runs keep their artifacts in {folder}, which is gone; give the folder its "
            "old name again, or begin a new database: remove mlflow.db, or name another with MLFLOW_TRACKING_URI"
        )


def _check_run(run: MlflowRun, experiment: Experiment, role: str) -> None:
    """Check that the environment's run can take what the command has to track."""
    run_id, before = run.info.run_id, run.data.tags.get("role")
    if run.info.experiment_id != experiment.experiment_id:
        raise InputError(
            f"{RUN} {run_id}: is a run of experiment {run.info.experiment_id}, and not of {experiment.name!r} "
            f"({experiment.experiment_id}); unset the variable, or name its experiment with {ID}"
        )
    if run.info.lifecycle_stage == LifecycleStage.DELETED:
        back = f"bring it back with: mlflow runs restore --run-id {run_id}, or unset the variable"
        raise InputError(f"{RUN} {run_id}: was deleted; {back}")
    is_same = before == role or (role in SWEEPS and before in SWEEPS)
    if before in ROLES and (not is_same or (role not in SWEEPS and run.info.status == "FINISHED")):
        raise occupied(run)


def occupied(run: MlflowRun) -> InputError:
    """The error for a run of the environment that holds finished work or that of another command."""
    name = run.info.run_name
    return InputError(f"{RUN} {run.info.run_id}: holds what an earlier command tracked ({name}){UNSET}")


def artifact_folder(location: str) -> Path | None:
    """The local folder of an artifact location; None if it is on a server or in a store."""
    url = urlsplit(location)
    return Path(unquote(url.path) if url.scheme else location) if url.scheme in ("", "file") else None


def _artifact_location(client: MlflowClient, name: str) -> str | None:
    """The folder beside an SQLite database elsewhere; None where MLflow or its server chooses one itself."""
    path = Path(client.tracking_uri.removeprefix("sqlite:///"))
    if not path.is_absolute() or path.parent == Path.cwd():
        return None
    return str(path.parent / "mlruns" / name)
