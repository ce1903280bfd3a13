"""The project's experiment on the tracking server: its runs, and their artifacts and students."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking.context import registry as context
from mlflow.utils.mlflow_tags import (
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_PROJECT_ENTRY_POINT,
    MLFLOW_RUN_NAME,
    MLFLOW_RUN_NOTE,
    MLFLOW_USER,
)

from pipeline.errors import InputError
from pipeline.interrupts import close_on_interrupt
from pipeline.student.student import Student
from pipeline.tracking.experiment import RUN, find_experiment
from pipeline.tracking.runs import Run
from pipeline.tracking.server import TrackingError, reach, retry_tracking
from pipeline.tracking.students import all_pages, intact_students, read_student, runs_of_students

RUNS_PER_SEARCH = 200  # of known ids, in one query


@dataclass(frozen=True)
class Tracker:
    """A reachable tracking server or database, and the project's experiment on it."""

    client: MlflowClient
    experiment_id: str

    def open_run(self, name: str, tags: Mapping[str, str]) -> Run:
        """Open the run of this command: the one that ``mlflow run`` opened, where it did, or a new one."""
        if run_id := os.environ.get(RUN):
            self.client.update_run(run_id, name=name)
            return self.reopen(self.client.get_run(run_id), tags)
        return self.create_run(name, tags)

    def create_run(self, name: str, tags: Mapping[str, str]) -> Run:
        """Open a new run."""
        all_tags = {**_context_tags(self.client), MLFLOW_RUN_NAME: name, **tags}
        return self.as_run(self.client.create_run(self.experiment_id, tags=all_tags, run_name=name))

    def reopen(self, run: MlflowRun, tags: Mapping[str, str]) -> Run:
        """Set a run that exists to RUNNING, with further tags."""
        self.client.update_run(run.info.run_id, status="RUNNING")
        again = self.as_run(run)
        again.set_tags(tags)
        return again

    def as_run(self, run: MlflowRun) -> Run:
        """Give a run of MLflow the methods of ours."""
        return Run(self.client, run.info.run_id, run.info.experiment_id)

    def log_metrics(self, run_id: str, metrics: Mapping[str, float]) -> None:
        """Log values in a run of the experiment that may have ended."""
        Run(self.client, run_id, self.experiment_id).log_metrics(metrics)

    def discard(self, run: MlflowRun, why: str) -> None:
        """Remove a run that lost against another; one that ``mlflow run`` opened stays, with a note."""
        lost = self.as_run(run)
        if MLFLOW_PROJECT_ENTRY_POINT in run.data.tags:
            lost.set_tags({"role": "worker", MLFLOW_RUN_NOTE: why})
            lost.end("FINISHED")
            return
        with contextlib.suppress(MlflowException):  # another worker has removed it
            lost.end("KILLED")
            self.client.delete_run(lost.id)

    def runs(self, role: str, status: str | None = None, **tags: str) -> list[MlflowRun]:
        """Find all runs of a role ("sweep", "candidate", "cell"), with a status and tags."""
        parts = [f"tags.`{key}` = {_quoted(value)}" for key, value in {"role": role, **tags}.items()]
        return self._search(" and ".join([*parts, f"attributes.status = '{status}'"] if status else parts))

    def find_sweep(self, sweep_id: str) -> MlflowRun | None:
        """Find the newest parent run of a sweep."""
        return next(iter(self.runs("sweep", sweep_id=sweep_id)), None)

    def has_results(self, sweep_id: str, cells: int) -> bool:
        """Whether a sweep's parent run holds the results of so many cells."""
        parent = self.find_sweep(sweep_id)
        if parent is None or parent.data.metrics.get("cells") != cells:
            return False
        return any(tag.startswith("best_run_id") for tag in parent.data.tags)  # one for each block and split

    def finished_cells(self, keys: Collection[str], sweep_id: str) -> tuple[dict[str, MlflowRun], list[MlflowRun]]:
        """Find the finished cells of some keys: by key with their student, and the sweep's own that have lost it."""
        # The number of requests grows with the keys and the sweep's cells, not with the runs of the experiment.
        own = self.runs("cell", "FINISHED", sweep_id=sweep_id)
        known = {run.info.run_id for run in own}
        others = self._runs_by_id(runs_of_students(self.client, self.experiment_id, keys) - known)
        found = [run for run in (*own, *others) if is_cell(run, keys) and run.info.status == "FINISHED"]
        intact = intact_students(self.client, found)
        complete = {run.data.tags["cell_key"]: run for run in found if run.info.run_id in intact}
        return complete, [run for run in found if run.info.run_id not in intact]

    def cells(self, keys: Collection[str], sweep_id: str, also: Collection[str] = ()) -> list[MlflowRun]:
        """Find a sweep's runs of some cell keys: unfinished, with a student, or ``also`` those of some ids."""
        # The number of requests grows with the keys and the unfinished cells, not with the cells of the sweep.
        # Unfinished runs first: one that is finished meanwhile has its student by then.
        query = f"tags.role = 'cell' and tags.sweep_id = {_quoted(sweep_id)} and attributes.status != 'FINISHED'"
        found = {run.info.run_id: run for run in self._search(query)}
        ids = runs_of_students(self.client, self.experiment_id, keys) | set(also)
        found |= {run.info.run_id: run for run in self._runs_by_id(ids - set(found))}
        return [run for run in found.values() if is_cell(run, keys) and run.data.tags.get("sweep_id") == sweep_id]

    def _runs_by_id(self, ids: Collection[str]) -> list[MlflowRun]:
        """Find runs that nobody has deleted; one request per `RUNS_PER_SEARCH`."""
        listed, found = sorted(ids), []
        for start in range(0, len(listed), RUNS_PER_SEARCH):
            some = ", ".join(f"'{run_id}'" for run_id in listed[start : start + RUNS_PER_SEARCH])
            found += self._search(f"attributes.run_id IN ({some})")
        return found

    def _search(self, query: str) -> list[MlflowRun]:
        return all_pages(functools.partial(self.client.search_runs, [self.experiment_id], query))

    def artifact(self, run: MlflowRun, name: str) -> str:
        """Read the text of a run's artifact; an InputError says that it was removed."""
        store = get_artifact_repository(run.info.artifact_uri, tracking_uri=self.client.tracking_uri)
        with tempfile.TemporaryDirectory() as folder:
            try:
                return Path(store.download_artifacts(name, folder)).read_text(encoding="utf-8")
            except (*TrackingError, OSError) as error:
                if name in [item.path for item in store.list_artifacts()]:
                    raise
                raise InputError(f"run {run.info.run_id}: its artifact {name} is gone from MLflow") from error

    def newest_artifact(self, run: MlflowRun, part: str) -> tuple[str, str]:
        """Read stem and text of a sweep's JSON artifact whose name contains ``part`` and sorts last."""
        names = [item.path for item in self.client.list_artifacts(run.info.run_id) if part in item.path]
        if not (found := [name for name in names if name.endswith(".json")]):
            why = "the sweep did not finish, or its artifacts were removed; run it again"
            raise InputError(f"run {run.info.run_id} has no results file: {why}")
        return Path(max(found)).stem, self.artifact(run, max(found))

    def students_below(self, run_id: str) -> tuple[str, str, list[str]]:
        """Find name and grid of a sweep's run and the ids of its finished cells; a cell's run stands for itself."""
        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            raise InputError(f"--run {run_id}: neither a student folder nor a run of MLflow") from error
        name = run.info.run_name or run_id
        if run.data.tags.get("role") != "sweep":
            return name, "", [run_id]
        below = self._search(f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{run_id}' and attributes.status = 'FINISHED'")
        return name, run.data.tags["grid"], [own.info.run_id for own in below]

    def student_of(self, run_id: str) -> Student:
        """Read the student that a run has logged; see `read_student`."""
        return retry_tracking(lambda: read_student(self.client, run_id))

    def register(self, name: str, model_id: str, alias: str) -> str:
        """Make a logged model the newest version of a registered one, with an alias; returns the version."""
        try:
            made = mlflow.register_model(f"models:/{model_id}", name)
            self.client.set_registered_model_alias(name, alias, made.version)
        except MlflowException as error:
            raise InputError(f"--register {name}: {error}") from error
        return str(made.version)


def is_cell(run: MlflowRun, keys: Collection[str]) -> bool:
    """Whether a run is that of a cell with one of some keys."""
    return run.data.tags.get("role") == "cell" and run.data.tags.get("cell_key") in keys


def _quoted(value: str) -> str:
    """Quote a value for MLflow's query language, which knows two kinds of quotes and no escapes."""
    quote = '"' if "'" in value else "'"
    if quote in value:
        raise InputError(f"--sweep-id {value}: MLflow cannot look for what has both kinds of quotes; name another")
    return f"{quote}{value}{quote}"


@functools.cache
def _context_tags(client: MlflowClient) -> dict[str, str]:
    """MLflow's tags of user, source and commit, found once: that takes as long as creating a run."""
    found = dict(context.resolve_tags())
    if run_id := os.environ.get(RUN):  # opened by ``mlflow run``; a container knows neither its user nor a repository
        opened = client.get_run(run_id).data.tags
        found |= {key: value for key, value in opened.items() if key == MLFLOW_USER or key.startswith("mlflow.source.")}
    return found


def connect(role: str | None = None, experiment_id: str | None = None) -> Tracker:
    """Connect to the project's experiment, for a run of a role or to read; see `server.reach` and `find_experiment`."""
    return Tracker(*reach(lambda client: find_experiment(client, experiment_id, role)))


@contextmanager
def closing(run: Run) -> Iterator[Run]:
    """Close the run as its work ends: FINISHED, KILLED on an interruption, or FAILED on any other error."""
    try:
        with close_on_interrupt(lambda: run.end("KILLED")):
            yield run
    except KeyboardInterrupt:
        raise
    except BaseException:
        with contextlib.suppress(*TrackingError):  # the error says more than a server that is away too
            run.end("FAILED")
        raise
    retry_tracking(lambda: run.end("FINISHED"))
