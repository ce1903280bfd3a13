"""Students in MLflow: find those that runs have logged, read one, and fetch whatever stands at a place."""

from __future__ import annotations

import functools
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from pipeline import hub, storage
from pipeline.errors import InputError
from pipeline.student.folder import CONFIG, MODEL
from pipeline.student.student import Student
from pipeline.tracking.experiment import artifact_folder, look_up
from pipeline.tracking.server import reach, retry_tracking

MODELS_PER_SEARCH = 100  # MLflow gives as many in one page
STUDENT_PLACE = "artifacts/student"  # in the folder of a logged model
NEEDED = (MLMODEL_FILE_NAME, *(f"{STUDENT_PLACE}/{name}" for name in (CONFIG, MODEL)))


def logged_models(client: MlflowClient, runs: Sequence[MlflowRun]) -> dict[str, list[LoggedModel]]:
    """Find the models that runs have logged and nobody has deleted, by run id; one request per hundred runs."""
    experiments = sorted({run.info.experiment_id for run in runs})
    found: dict[str, list[LoggedModel]] = defaultdict(list)
    for model in _models_where(client, experiments, "source_run_id", [run.info.run_id for run in runs]):
        found[str(model.source_run_id)].append(model)
    return found


def runs_of_students(client: MlflowClient, experiment_id: str, cell_keys: Collection[str]) -> set[str]:
    """Find the ids of the runs that have logged students of some cell keys; one request per hundred keys."""
    models = _models_where(client, [experiment_id], "model_type", sorted(cell_keys))
    return {str(model.source_run_id) for model in models}


def _models_where(client: MlflowClient, experiments: list[str], field: str, values: Sequence[str]) -> list[LoggedModel]:
    """Find the models of which a field has one of some values."""
    found: list[LoggedModel] = []
    for start in range(0, len(values), MODELS_PER_SEARCH):
        listed = ", ".join(f"'{value}'" for value in values[start : start + MODELS_PER_SEARCH])
        found += all_pages(functools.partial(client.search_logged_models, experiments, f"{field} IN ({listed})"))
    return found


def all_pages(search: Callable[..., Any]) -> list[Any]:
    """Collect all that a search of MLflow's client finds, page by page."""
    page = search()
    found = list(page)
    while page.token:
        page = search(page_token=page.token)
        found += page
    return found


def intact_students(client: MlflowClient, runs: Sequence[MlflowRun]) -> dict[str, list[LoggedModel]]:
    """Find the logged students that nobody has deleted and whose files exist, by run id."""
    # Local files are checked one by one. Elsewhere one request lists the folder of an experiment's models, and a model
    # counts as intact if its own folder exists.

    @functools.cache
    def names_in(folder: str) -> set[str]:
        store = get_artifact_repository(folder, tracking_uri=client.tracking_uri)
        return {Path(item.path).name for item in store.list_artifacts()}

    def is_intact(model: LoggedModel) -> bool:
        if (folder := artifact_folder(model.artifact_location)) is not None:
            return all((folder / name).is_file() for name in NEEDED)
        parent, _, rest = model.artifact_location.partition(f"/{model.model_id}/")
        return not rest or model.model_id in names_in(parent)  # no rest: a server with another layout of its store

    found = {run_id: list(filter(is_intact, models)) for run_id, models in logged_models(client, runs).items()}
    return {run_id: models for run_id, models in found.items() if models}


def read_student(client: MlflowClient, run_id: str) -> Student:
    """Read the student that a run has logged; an InputError says that it has none, several, or a damaged one."""
    run = look_up(client.get_run, run_id, f"runs:/{run_id}: {client.tracking_uri} has no such run")
    models = intact_students(client, [run]).get(run_id, [])
    if not models and run.outputs and run.outputs.model_outputs:
        raise InputError(f"run {run_id}: its student is gone from MLflow; the same sweep again trains it again")
    if not models:
        raise InputError(f"run {run_id} has no logged student")
    if len(models) > 1:  # a sweep of several blocks or splits
        named = ", ".join(f"models:/{model.model_id} ({model.name})" for model in models)
        raise InputError(f"run {run_id} has several logged students; name one of {named}")
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = mlflow.artifacts.download_artifacts(f"models:/{models[0].model_id}", dst_path=folder)
            return Student.load(Path(path) / STUDENT_PLACE)
    except InputError as error:
        advice = f"to train it again: mlflow runs delete --run-id {run_id}, then the same sweep"
        raise InputError(f"run {run_id}: its student in MLflow is damaged ({error}); {advice}") from error


def fetch(uri: str) -> Path:
    """Copy what stands at a place to this machine. Copies are removed as the process ends.

    Args:
        uri: a local path, ``s3://bucket/key``, ``hf://…`` (the Hugging Face hub), ``runs:/<run id>/<artifact>``, or a
            logged or registered student: ``models:/<name>@<alias>``.

    Returns:
        The local path.

    Raises:
        InputError: there is no such file or artifact, or the place is of another kind.
        WorkError: the store does not answer.
    """
    if uri.startswith(hub.SCHEME):
        return hub.fetch(uri)
    if not uri.startswith(("runs:", "models:")):
        if "://" in uri and not storage.is_remote(uri):
            remote = "s3://bucket/key, hf://owner/name, runs:/<run id>/<artifact> or models:/<name>@<alias>"
            raise InputError(f"{uri}: expected a local path, {remote}")
        return storage.fetch(uri)
    _reach_any_experiment()
    try:
        path = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(storage.temporary_folder())))
    except (MlflowException, OSError) as error:
        raise InputError(f"{uri}: MLflow has no such artifact ({error})") from error
    return path / STUDENT_PLACE if (path / MLMODEL_FILE_NAME).is_file() else path


def load_student(place: str) -> Student:
    """Load the student at a place: one that `fetch` knows, or an MLflow run that has logged one, ``runs:/<run id>``."""
    run_id = place.removeprefix("runs:/")
    if place.startswith("runs:/") and "/" not in run_id:
        client = _reach_any_experiment()
        return retry_tracking(lambda: read_student(client, run_id))
    return Student.load(fetch(place))


def _reach_any_experiment() -> MlflowClient:
    """Reach the tracking server for what belongs to no experiment in particular."""
    client, _ = reach(lambda client: client.search_experiments(max_results=1))
    return client
