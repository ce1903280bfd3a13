"""The students that runs have logged: which of them are there, whole, and one of them read."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from pipeline.errors import InputError
from pipeline.student.folder import CONFIG, MODEL
from pipeline.student.student import Student
from pipeline.tracking.experiment import artifact_folder
from pipeline.tracking.server import is_unknown

RUNS_PER_SEARCH = 100  # as many models as MLflow gives in one page
STUDENT_PLACE = "artifacts/student"  # in the folder of a logged model
NEEDED = ("MLmodel", *(f"{STUDENT_PLACE}/{name}" for name in (CONFIG, MODEL)))


def logged_models(client: MlflowClient, runs: Sequence[MlflowRun]) -> dict[str, list[LoggedModel]]:
    """The models that runs have logged and nobody has deleted, by run id; one request for a hundred runs."""
    found: dict[str, list[LoggedModel]] = defaultdict(list)
    for start in range(0, len(runs), RUNS_PER_SEARCH):
        some = runs[start : start + RUNS_PER_SEARCH]
        listed = ", ".join(f"'{run.info.run_id}'" for run in some)
        experiments, token = sorted({run.info.experiment_id for run in some}), None
        while True:
            page = client.search_logged_models(experiments, f"source_run_id IN ({listed})", page_token=token)
            for model in page:
                found[str(model.source_run_id)].append(model)
            if not (token := page.token):
                break
    return found


def whole_students(client: MlflowClient, runs: Sequence[MlflowRun]) -> dict[str, list[LoggedModel]]:
    """Of the runs that have logged students, by id, those that nobody has deleted and whose files are there.

    Local files are looked at one by one; elsewhere one request lists the folder in which an experiment has its models,
    and a model is there if its own folder is.
    """
    found = logged_models(client, runs)
    listed: dict[str, Collection[str]] = {}

    def is_there(model: LoggedModel) -> bool:
        if (folder := artifact_folder(model.artifact_location)) is not None:
            return all((folder / name).is_file() for name in NEEDED)
        home, _, rest = model.artifact_location.partition(f"/{model.model_id}/")
        if not rest:  # of a server with another order in its store
            return True
        if home not in listed:
            listing = get_artifact_repository(home, tracking_uri=client.tracking_uri).list_artifacts()
            listed[home] = {Path(item.path).name for item in listing}
        return model.model_id in listed[home]

    there = {run_id: [model for model in models if is_there(model)] for run_id, models in found.items()}
    return {run_id: models for run_id, models in there.items() if models}


def read_student(client: MlflowClient, run_id: str) -> Student:
    """The student that a run has logged.

    Raises:
        InputError: no such run, or it has no student, several, or one that is gone or damaged.
    """
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if not is_unknown(error):
            raise
        raise InputError(f"runs:/{run_id}: {client.tracking_uri} has no such run") from error
    models = whole_students(client, [run]).get(run_id, [])
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
            return Student.load(student_folder(Path(path)))
    except InputError as error:
        raise InputError(
            f"run {run_id}: its student in MLflow is damaged ({error}); to train it again: mlflow runs delete --run-id "
            f"{run_id}, then the same sweep"
        ) from error


def student_folder(model: Path) -> Path:
    """The student in the folder of a logged model."""
    return model / STUDENT_PLACE
