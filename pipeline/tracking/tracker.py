"""The project's experiment: the runs of extractions and sweeps in it, and what they hold."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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

from pipeline import hub, interrupts, storage
from pipeline.errors import InputError
from pipeline.interrupts import close_on_interrupt
from pipeline.student.student import Student
from pipeline.tracking.experiment import RUN, find_experiment, held
from pipeline.tracking.runs import Run
from pipeline.tracking.server import TrackingError, reach, retry_tracking
from pipeline.tracking.students import read_student, student_folder, whole_students

SETTLE_SECONDS = 1.0  # longer than it takes a worker to look for a run and, where there is none, to make one

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tracker:
    """A reachable tracking server or database, and the project's experiment on it."""

    client: MlflowClient
    experiment_id: str

    def open_run(self, name: str, tags: Mapping[str, str]) -> Run:
        """The run of this command: the one that ``mlflow run`` opened, where it did, or a new one."""
        if run_id := os.environ.get(RUN):
            self.client.update_run(run_id, name=name)
            run = self._reopen(self.client.get_run(run_id))
            run.set_tags(tags)
            return run
        return self._create(name, tags, self.experiment_id)

    def open_sweep(
        self, sweep_id: str, name: str, tags: Mapping[str, str], is_at_work: Callable[[MlflowRun], bool]
    ) -> Run:
        """The parent run of a sweep, the same for all workers that ask at the same time.

        A sweep of the same id goes on in the same run. Under ``mlflow run`` the run that it opened is the parent,
        unless others are at work on the sweep.

        Args:
            sweep_id: the sweep.
            name: the run's name.
            tags: the run's tags.
            is_at_work: whether somebody works below a parent run.
        """
        begin = time.monotonic()
        opened = os.environ.get(RUN)
        before = self._parents(sweep_id)
        self._check_opened(opened, sweep_id)
        known = {run.info.run_id for run in before}
        going_on = before if opened is None or opened in known else [run for run in before if is_at_work(run)]
        if going_on:
            same = [run for run in going_on if run.info.run_id == opened]
            parent = max(same or going_on, key=lambda run: (run.info.start_time, run.info.run_id))
        else:
            own = self.open_run(name, {**tags, "sweep_id": sweep_id, "role": "candidate"})
            with close_on_interrupt(lambda: own.end("KILLED")):
                wait_for_peers(begin)
                parent = self._elect(sweep_id, known, is_at_work)
        run = Run(self.client, parent.info.run_id, parent.info.experiment_id)
        with close_on_interrupt(lambda: None if is_at_work(self.client.get_run(run.id)) else run.end("KILLED")):
            self._reopen(parent)
            # What its first worker recorded stays.
            run.set_tags({key: value for key, value in tags.items() if key not in parent.data.tags} | {"role": "sweep"})
            for candidate in self._candidates(sweep_id):
                self.discard(candidate, f"took part in sweep {sweep_id}, whose cells are below run {run.id}")
            finished = {old.info.run_id for old in before if old.info.status == "FINISHED"} | {run.id}
            # Only where no parent is left, or one that was left before it was finished.
            has_orphans = not before or not {old.info.run_id for old in before} <= finished
            for cell in self.cells(sweep_id) if has_orphans else []:
                if cell.data.tags[MLFLOW_PARENT_RUN_ID] not in finished:
                    self.client.set_tag(cell.info.run_id, MLFLOW_PARENT_RUN_ID, run.id)
            if opened not in (None, run.id):
                self.discard(self.client.get_run(opened), f"sweep {sweep_id} goes on in run {run.id}")
        return run

    def _check_opened(self, run_id: str | None, sweep_id: str) -> None:
        """Check that the run of the environment does not hold another sweep that is finished."""
        run = self.client.get_run(run_id) if run_id else None
        if run and run.info.status == "FINISHED" and run.data.tags.get("sweep_id", sweep_id) != sweep_id:
            raise held(run)

    def _elect(self, sweep_id: str, known: set[str], is_at_work: Callable[[MlflowRun], bool]) -> MlflowRun:
        """One parent of several workers that have each made a candidate.

        Runs have no unique names, and workers do not see the same candidates: a slow one comes late, a quick one has
        looked early. So each marks the least candidate that it sees and waits until everyone has; then all see the same
        marks, and of several that one stands below which there is work already, or the least.
        """

        def marked() -> list[MlflowRun]:
            return [run for run in self._parents(sweep_id) if run.info.run_id not in known]

        def least(runs: Sequence[MlflowRun]) -> MlflowRun:
            return min(runs, key=lambda run: str(run.info.run_id))

        found: list[MlflowRun] = []
        while not found:
            begin = time.monotonic()
            if standing := marked() or self._candidates(sweep_id):
                with contextlib.suppress(MlflowException):  # a worker that saw a lesser one has removed this one
                    self.client.set_tag(least(standing).info.run_id, "role", "sweep")
            wait_for_peers(begin)
            found = marked()
        parent = least([run for run in found if is_at_work(run)] or found)
        for run in found:
            if run is not parent:
                self.discard(run, f"took part in sweep {sweep_id}, whose cells are below run {parent.info.run_id}")
        return parent

    def discard(self, run: MlflowRun, why: str) -> None:
        """Remove a run that lost against another; one that ``mlflow run`` opened stays, with a note."""
        left = Run(self.client, run.info.run_id, run.info.experiment_id)
        if MLFLOW_PROJECT_ENTRY_POINT in run.data.tags:
            left.set_tags({"role": "worker", MLFLOW_RUN_NOTE: why})
            left.end("FINISHED")
            return
        with contextlib.suppress(MlflowException):  # somebody else has done it
            left.end("KILLED")
            self.client.delete_run(left.id)

    def open_child(self, parent: Run, name: str, tags: Mapping[str, str]) -> Run:
        """A new run below another."""
        return self._create(name, {**tags, MLFLOW_PARENT_RUN_ID: parent.id}, parent.experiment_id)

    def reopen_child(self, run: MlflowRun, tags: Mapping[str, str]) -> Run:
        """A run that was left before it was finished."""
        again = self._reopen(run)
        again.set_tags(tags)
        return again

    def cells(self, sweep_id: str) -> list[MlflowRun]:
        """All runs of a sweep's cells, whatever has become of them."""
        return self._search(f"tags.sweep_id = {_quoted(sweep_id)} and tags.role = 'cell'")

    def _parents(self, sweep_id: str) -> list[MlflowRun]:
        return self._search(f"tags.sweep_id = {_quoted(sweep_id)} and tags.role = 'sweep'")

    def _candidates(self, sweep_id: str) -> list[MlflowRun]:
        return self._search(f"tags.sweep_id = {_quoted(sweep_id)} and tags.role = 'candidate'")

    def under_way(self, work_key: str) -> list[MlflowRun]:
        """The RUNNING parent runs of sweeps of the same cells and data, whatever their ids."""
        return self._search(f"tags.work_key = '{work_key}' and tags.role = 'sweep' and attributes.status = 'RUNNING'")

    def find_sweep(self, sweep_id: str) -> MlflowRun | None:
        """The newest parent run of that sweep id."""
        return next(iter(self._parents(sweep_id)), None)

    def is_concluded(self, sweep_id: str, cells: int) -> bool:
        """Whether results and report of a sweep of so many cells stand in its parent run."""
        parent = self.find_sweep(sweep_id)
        if parent is None or parent.data.metrics.get("cells") != cells:
            return False
        return any(tag.startswith("best_run_id") for tag in parent.data.tags)  # one for each block and split

    def finished_cells(self, keys: Collection[str] | None = None) -> tuple[dict[str, MlflowRun], list[MlflowRun]]:
        """Finished cells of the experiment: by ``cell_key`` those with a student, and a list of those without.

        A student may have been deleted, or its files removed.

        Args:
            keys: of the cells to look for; all by default.
        """
        found = self._search("attributes.status = 'FINISHED' and tags.role = 'cell'")
        if keys is not None:
            found = [run for run in found if run.data.tags["cell_key"] in keys]
        there = whole_students(self.client, found)
        whole = {run.data.tags["cell_key"]: run for run in found if run.info.run_id in there}
        return whole, [run for run in found if run.info.run_id not in there]

    def _search(self, query: str) -> list[MlflowRun]:
        found: list[MlflowRun] = []
        token = None
        while True:
            page = self.client.search_runs([self.experiment_id], query, page_token=token)
            found += page
            if not (token := page.token):
                return found

    def artifact(self, run: MlflowRun, name: str) -> str:
        """The text of one of a run's artifacts.

        Raises:
            InputError: it is gone.
        """
        store = get_artifact_repository(run.info.artifact_uri, tracking_uri=self.client.tracking_uri)
        with tempfile.TemporaryDirectory() as folder:
            try:
                return Path(store.download_artifacts(name, folder)).read_text(encoding="utf-8")
            except (*TrackingError, OSError) as error:
                if name in [item.path for item in store.list_artifacts()]:
                    raise
                raise InputError(f"run {run.info.run_id}: its artifact {name} is gone from MLflow") from error

    def newest_artifact(self, run: MlflowRun, part: str) -> tuple[str, str]:
        """Stem and text of the JSON artifact whose name contains ``part`` and sorts last.

        Raises:
            InputError: there is none.
        """
        names = [item.path for item in self.client.list_artifacts(run.info.run_id) if part in item.path]
        names = sorted(name for name in names if name.endswith(".json"))
        if not names:
            raise InputError(
                f"run {run.info.run_id} has no results file: the sweep did not finish, or its artifacts were removed; "
                "run it again"
            )
        return Path(names[-1]).stem, self.artifact(run, names[-1])

    def students_below(self, run_id: str) -> tuple[str, str, list[str]]:
        """Of a cell's run or a sweep's: its name, its grid, and the run of each finished cell.

        Raises:
            InputError: there is no such run.
        """
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
        """The student that a run has logged; see `read_student`."""
        return retry_tracking(lambda: read_student(self.client, run_id))

    def register(self, name: str, model_id: str, alias: str) -> str:
        """Make a logged model the newest version of a registered one, and give it an alias; the version.

        Raises:
            InputError: MLflow takes no such name, or its database has no registry.
        """
        try:
            made = mlflow.register_model(f"models:/{model_id}", name)
            self.client.set_registered_model_alias(name, alias, made.version)
        except MlflowException as error:
            raise InputError(f"--register {name}: {error}") from error
        return str(made.version)

    def _create(self, name: str, tags: Mapping[str, str], experiment_id: str) -> Run:
        own = {**_context(self.client), MLFLOW_RUN_NAME: name, **tags}
        run = self.client.create_run(experiment_id, tags=own, run_name=name)
        return Run(self.client, run.info.run_id, experiment_id)

    def _reopen(self, run: MlflowRun) -> Run:
        self.client.update_run(run.info.run_id, status="RUNNING")
        return Run(self.client, run.info.run_id, run.info.experiment_id)


def _quoted(sweep_id: str) -> str:
    """A sweep's id in MLflow's query language, which knows two kinds of quotes and nothing that escapes them."""
    if "'" not in sweep_id:
        return f"'{sweep_id}'"
    if '"' in sweep_id:
        raise InputError(f"--sweep-id {sweep_id}: MLflow cannot look for what has both kinds of quotes; name another")
    return f'"{sweep_id}"'


@functools.cache
def _context(client: MlflowClient) -> dict[str, str]:
    """MLflow's tags of who runs what here: user, source, commit. Asked once: finding them takes as long as a run.

    Under ``mlflow run`` they are those of the run that it opened: a container knows neither its user nor a repository.
    """
    found = dict(context.resolve_tags())
    if run_id := os.environ.get(RUN):
        opened = client.get_run(run_id).data.tags
        found |= {key: value for key, value in opened.items() if key == MLFLOW_USER or key.startswith("mlflow.source.")}
    return found


def connect(role: str | None = None, experiment_id: str | None = None) -> Tracker:
    """The project's experiment on the tracking server of the environment; see `server.reach`.

    Args:
        role: of the run that the command will write; None where it only reads.
        experiment_id: another experiment than that of the environment.

    Raises:
        InputError: the server does not answer, or the environment names what is not there; see `find_experiment`.
    """
    return Tracker(*reach(lambda client: find_experiment(client, experiment_id, role)))


def _client() -> MlflowClient:
    """The tracking server, for what belongs to no experiment in particular."""
    client, _ = reach(lambda client: client.search_experiments(max_results=1))
    return client


@contextmanager
def closing(run: Run) -> Iterator[Run]:
    """Close the run as its work ends: KILLED on an interruption, FAILED on any other error."""
    try:
        with close_on_interrupt(lambda: run.end("KILLED")):
            yield run
    except KeyboardInterrupt:
        raise
    except BaseException:
        with contextlib.suppress(*TrackingError):  # the error says more than a server that is gone too
            run.end("FAILED")
        raise
    retry_tracking(lambda: run.end("FINISHED"))


def wait_for_peers(begin: float) -> None:
    """Wait until everyone who looked at the same time as we did has made what was missing.

    Args:
        begin: when we began to look, by `time.monotonic`; how long we took tells how long others may take.
    """
    interrupts.sleep(max(SETTLE_SECONDS, 2 * (time.monotonic() - begin)))


def fetch(uri: str) -> Path:
    """A local path for what stands at a place. Copies are removed as the process ends.

    Args:
        uri: a local path, ``s3://bucket/key``, ``hf://…`` (the Hugging Face hub), ``runs:/<run id>/<artifact>``, or a
            logged or registered student: ``models:/<name>@<alias>``.

    Raises:
        InputError: there is no such file or artifact, or the place is of another kind.
        WorkError: the store does not answer.
    """
    if uri.startswith(hub.SCHEME):
        return hub.fetch(uri)
    if not uri.startswith(("runs:", "models:")):
        if "://" in uri and not storage.is_remote(uri):
            raise InputError(
                f"{uri}: expected a local path, s3://bucket/key, hf://owner/name, runs:/<run id>/<artifact> or "
                "models:/<name>@<alias>"
            )
        return storage.fetch(uri)
    _client()
    try:
        path = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(storage.temporary_folder())))
    except (MlflowException, OSError) as error:
        raise InputError(f"{uri}: MLflow has no such artifact ({error})") from error
    return student_folder(path) if (path / "MLmodel").is_file() else path


def student_at(place: str) -> Student:
    """The student at a place: what `fetch` knows, or a run of MLflow, ``runs:/<run id>``, that has logged one.

    Raises:
        InputError: nothing is there, or no student.
    """
    run_id = place.removeprefix("runs:/")
    if place.startswith("runs:/") and "/" not in run_id:
        client = _client()
        return retry_tracking(lambda: read_student(client, run_id))
    return Student.load(fetch(place))
