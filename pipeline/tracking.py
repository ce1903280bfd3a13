"""MLflow: the only room that knows it. Runs, metrics, models, and the ``host`` backend of ``mlflow run``."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import re
import signal
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow import MlflowClient, pyfunc
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import ExecutionException, MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.projects.backend.abstract_backend import AbstractBackend
from mlflow.projects.submitted_run import LocalSubmittedRun
from mlflow.projects.utils import (
    fetch_and_validate_project,
    get_entry_point_command,
    get_or_create_run,
    get_run_env_vars,
    load_project,
)
from mlflow.tracking.context import registry as context
from mlflow.types import ColSpec, Schema, TensorSpec
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

from pipeline.errors import InputError
from pipeline.students import Student

EXPERIMENT = "activation-distillation"
DEFAULT_URI = "sqlite:///mlflow.db"
METRICS_PER_CALL = 1000  # MLflow's limit for one request
STUDENT_NEEDS = ("numpy", "safetensors", "snowballstemmer", "torch")
STOP_SECONDS = 30  # how long an interrupted project may take to close its runs


@dataclass(frozen=True)
class Run:
    """An open MLflow run, written to in few, large requests."""

    client: MlflowClient
    id: str
    experiment_id: str

    def log_params(self, params: Mapping[str, object]) -> None:
        """Log what is not there yet (MLflow's parameters cannot change, and ``mlflow run`` logs some itself)."""
        known = self.client.get_run(self.id).data.params
        new = [Param(key, str(value)) for key, value in params.items() if key not in known and value is not None]
        if new:
            self.client.log_batch(self.id, params=new)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set all tags in one request."""
        self.client.log_batch(self.id, tags=[RunTag(key, value) for key, value in tags.items()])

    def log_metrics(self, metrics: Mapping[str, float], curves: Mapping[str, Sequence[float]] | None = None) -> None:
        """Log curves, whose first value belongs to step (epoch) 1, and final values at the last step.

        A final value comes after the curve of its name, so it is the one that MLflow shows and sorts by: the value
        at the best epoch, not at the last.
        """
        now = int(time.time() * 1000)
        last = max((len(values) for values in (curves or {}).values()), default=0)
        entries = [
            Metric(key, value, now, step)
            for key, values in (curves or {}).items()
            for step, value in enumerate(values, start=1)
        ]
        entries += [Metric(key, value, now + 1, last) for key, value in metrics.items()]
        for start in range(0, len(entries), METRICS_PER_CALL):
            self.client.log_batch(self.id, metrics=entries[start : start + METRICS_PER_CALL])

    def log_artifact(self, path: Path) -> None:
        """Upload a file."""
        self.client.log_artifact(self.id, str(path))

    def log_json(self, name: str, content: object) -> None:
        """Upload plain values as a JSON file."""
        self.client.log_text(self.id, json.dumps(content, indent=1), name)

    def log_dataset(self, name: str, digest: str, source: str, profile: str, use: str) -> None:
        """Name the data that the run used or made; ``use`` is MLflow's context, such as "training"."""
        dataset = Dataset(name, digest[:36], "local", source, profile=profile)
        self.client.log_inputs(self.id, [DatasetInput(dataset, [InputTag("mlflow.data.context", use)])])

    def log_student(self, student: Student, d_model: int) -> str:
        """Log a student as an MLflow model that carries its code and needs no pickle; returns its URI."""
        signature = ModelSignature(
            Schema([ColSpec("string", "concept")]), Schema([TensorSpec(np.dtype("float32"), (-1, d_model))])
        )
        # Made by hand: left to itself, Model.log files the model in the process's active experiment, not in the run's.
        model = self.client.create_logged_model(self.experiment_id, "student", self.id)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*input example.*")
            student.save(Path(folder) / "student")
            logged = Model.log(
                artifact_path=None,
                model_id=model.model_id,
                flavor=pyfunc,
                run_id=self.id,
                loader_module="pipeline.students.pyfunc",
                data_path=str(Path(folder) / "student"),
                code_paths=[str(Path(__file__).parent)],
                signature=signature,
                pip_requirements=[f"{name}=={_public_version(name)}" for name in STUDENT_NEEDS],
            )
        return str(logged.model_uri)

    def end(self, status: str) -> None:
        """Close the run: "FINISHED", "FAILED" or "KILLED"."""
        self.client.set_terminated(self.id, status)


def _public_version(package: str) -> str:
    return importlib.metadata.version(package).split("+")[0]  # "+cpu" names a build that indexes do not offer


@contextmanager
def closing(run: Run) -> Iterator[Run]:
    """Close the run as its work ends: KILLED on an interruption, FAILED on any other error."""
    try:
        yield run
    except KeyboardInterrupt:
        run.end("KILLED")
        raise
    except BaseException:
        run.end("FAILED")
        raise
    run.end("FINISHED")


@dataclass(frozen=True)
class Tracker:
    """A reachable tracking server or database, and the project's experiment on it."""

    client: MlflowClient
    experiment_id: str

    def open_run(self, name: str, tags: Mapping[str, str]) -> Run:
        """The run of this command: the one that ``mlflow run`` opened, where it did, or a new one."""
        if run_id := os.environ.get("MLFLOW_RUN_ID"):
            self.client.update_run(run_id, name=name)
            run = self._reopen(self.client.get_run(run_id))
            run.set_tags(tags)
            return run
        return self._create(name, tags, self.experiment_id)

    def open_sweep(self, sweep_id: str, name: str, tags: Mapping[str, str]) -> Run:
        """The parent run of a sweep; a sweep of the same id goes on in the same run."""
        if "MLFLOW_RUN_ID" not in os.environ and (known := self.find_sweep(sweep_id)):
            return self._reopen(known)
        return self.open_run(name, {**tags, "sweep_id": sweep_id})

    def open_child(self, parent: Run, name: str, tags: Mapping[str, str]) -> Run:
        """A new run below another."""
        return self._create(name, {**tags, MLFLOW_PARENT_RUN_ID: parent.id}, parent.experiment_id)

    def find_sweep(self, sweep_id: str) -> MlflowRun | None:
        """The newest parent run of that sweep id."""
        query = f"tags.sweep_id = '{sweep_id}' and tags.role = 'sweep'"
        found = self.client.search_runs([self.experiment_id], query, max_results=1)
        return found[0] if found else None

    def finished_cells(self, experiment_id: str) -> dict[str, MlflowRun]:
        """All finished cells of an experiment by their ``cell_key``."""
        found: dict[str, MlflowRun] = {}
        token = None
        while True:
            page = self.client.search_runs(
                [experiment_id], "attributes.status = 'FINISHED' and tags.role = 'cell'", page_token=token
            )
            found |= {run.data.tags["cell_key"]: run for run in page}
            if not (token := page.token):
                return found

    def artifact(self, run_id: str, name: str) -> str:
        """The text of one of a run's artifacts."""
        with tempfile.TemporaryDirectory() as folder:
            return Path(self.client.download_artifacts(run_id, name, folder)).read_text(encoding="utf-8")

    def newest_artifact(self, run_id: str, part: str) -> tuple[str, str]:
        """Stem and text of the JSON artifact whose name contains ``part`` and sorts last."""
        names = [item.path for item in self.client.list_artifacts(run_id) if part in item.path]
        names = sorted(name for name in names if name.endswith(".json"))
        if not names:
            raise InputError(f"run {run_id} has no results file; the sweep did not finish")
        return Path(names[-1]).stem, self.artifact(run_id, names[-1])

    def student_of(self, run_id: str) -> Student:
        """The student that a run logged."""
        outputs = self.client.get_run(run_id).outputs
        models = outputs.model_outputs if outputs else []
        if not models:
            raise InputError(f"run {run_id} has no logged student")
        with tempfile.TemporaryDirectory() as folder:
            path = mlflow.artifacts.download_artifacts(f"models:/{models[0].model_id}", dst_path=folder)
            return Student.load(next(Path(path).glob("data/*")))

    def _create(self, name: str, tags: Mapping[str, str], experiment_id: str) -> Run:
        own = {**context.resolve_tags(), MLFLOW_RUN_NAME: name, **tags}
        run = self.client.create_run(experiment_id, tags=own, run_name=name)
        return Run(self.client, run.info.run_id, experiment_id)

    def _reopen(self, run: MlflowRun) -> Run:
        self.client.update_run(run.info.run_id, status="RUNNING")
        return Run(self.client, run.info.run_id, run.info.experiment_id)


def connect() -> Tracker:
    """Reach the tracking server of the environment, or ``sqlite:///mlflow.db`` without one.

    Raises:
        InputError: it does not answer, or it refuses.
    """
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # one for every small file
    uri = os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
    mlflow.set_tracking_uri(uri)
    try:
        with _impatient():
            client = MlflowClient()
            return Tracker(client, _experiment(client))
    except Exception as error:  # every store and driver raises its own kind; all mean that tracking is out of reach
        reason = (str(error).strip().split("\n") or [""])[-1][:200]
        message = (
            f"MLFLOW_TRACKING_URI {uri}: no MLflow server or database answers there "
            f"({type(error).__name__}: {reason}); start it, or unset the variable to track to {DEFAULT_URI}"
        )
        raise InputError(_without_password(message)) from error


def fetch(uri: str) -> Path:
    """A local path for a file named by a local path or by ``runs:/<run id>/<artifact>``.

    Raises:
        InputError: MLflow has no such artifact, or the place is of another kind.
    """
    if "://" in uri or uri.startswith("models:"):
        raise InputError(f"{uri}: expected a local path or runs:/<run id>/<artifact>")
    if not uri.startswith("runs:"):
        return Path(uri)
    connect()
    try:
        return Path(mlflow.artifacts.download_artifacts(uri, dst_path=tempfile.mkdtemp(prefix="artifact-")))
    except (MlflowException, OSError) as error:
        raise InputError(f"{uri}: MLflow has no such artifact ({error})") from error


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


def _experiment(client: MlflowClient) -> str:
    """The experiment's id; whoever comes first creates it."""
    if named := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return named
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException:  # another process was faster
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


class HostBackend(AbstractBackend):
    """``mlflow run . --backend host``: the MLproject command in the current environment, without the container."""

    def run(
        self,
        project_uri: str,
        entry_point: str,
        params: dict[str, Any],
        version: str | None,
        backend_config: dict[str, Any],
        tracking_uri: str,
        experiment_id: str,
    ) -> LocalSubmittedRun:
        """Run the entry point to its end.

        ``mlflow run`` does not wait for the backends of plugins, so this one waits itself.

        Raises:
            ExecutionException: the tracking server does not answer, or the command failed.
        """
        os.environ.setdefault("MLFLOW_TRACKING_URI", tracking_uri)
        try:
            tracker = connect()
        except InputError as error:
            raise ExecutionException(str(error)) from None
        with contextlib.suppress(MlflowException):
            if tracker.client.get_experiment(experiment_id).name != "Default":
                tracker = Tracker(tracker.client, experiment_id)
        work_dir = fetch_and_validate_project(project_uri, version, entry_point, params)
        project = load_project(work_dir)
        run = get_or_create_run(None, project_uri, tracker.experiment_id, work_dir, version, entry_point, params)
        command = get_entry_point_command(project, entry_point, params, backend_config.get("STORAGE_DIR"))
        environment = {**os.environ, **get_run_env_vars(run.info.run_id, tracker.experiment_id)}
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        process = subprocess.Popen(
            ["bash", "-c", " && ".join(command)], cwd=work_dir, env=environment, start_new_session=True
        )
        submitted = _HostRun(run.info.run_id, process)
        try:
            succeeded = submitted.wait()
        except KeyboardInterrupt:
            submitted.cancel()
            _end_if_open(tracker.client, run.info.run_id, "KILLED")
            raise
        if not succeeded:
            _end_if_open(tracker.client, run.info.run_id, "FAILED")
            raise ExecutionException(f"the command of run {run.info.run_id} failed")
        return submitted


def _end_if_open(client: MlflowClient, run_id: str, status: str) -> None:
    """For a command that ended before it could take over its run."""
    if client.get_run(run_id).info.status == "RUNNING":
        client.set_terminated(run_id, status)


class _HostRun(LocalSubmittedRun):
    """A project in a process group of its own, which is interrupted as a whole and given time to close its runs."""

    def cancel(self) -> None:
        group = self.command_proc.pid
        deadline = time.monotonic() + STOP_SECONDS
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGINT)
            while time.monotonic() < deadline:
                self.command_proc.poll()
                os.killpg(group, 0)
                time.sleep(0.1)
            os.killpg(group, signal.SIGKILL)
        self.command_proc.wait()
