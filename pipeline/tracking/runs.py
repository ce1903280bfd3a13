"""One MLflow run: parameters, metrics, artifacts and the student, in few, large requests."""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from mlflow import MlflowClient, pyfunc
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, LoggedModelStatus, Metric, Param, RunTag
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from pipeline.reading import Part, Reading, Table
from pipeline.student import Student
from pipeline.tokenization import Ragged

DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # of the two the one in C takes a tenth of the time
ENTRIES_PER_CALL = 1000  # MLflow's limit of metrics, and with 100 parameters and 100 tags of all, for one request
# What a logged student carries: the rooms that turn text into vectors, without torch.
STUDENT_CODE = ("__init__", "errors", "storage", "tokenization", "reading", "inference", "folders", "student", "served")
EXAMPLE = ("volcano", "slow cooking")  # what a logged student may be asked
STUDENT_PLACE = "artifacts/student"  # in the folder of a logged model
STUDENT_NEEDS = ("mlflow", "numpy", "safetensors", "tokenizers")


@dataclass(frozen=True)
class Run:
    """An open MLflow run, written to in few, large requests."""

    client: MlflowClient
    id: str
    experiment_id: str

    def log_params(self, params: Mapping[str, object]) -> None:
        """Log what is not there yet: parameters cannot change, and ``mlflow run`` and other workers log them too."""

        def log_missing() -> None:
            known = self.client.get_run(self.id).data.params
            self.log(params={key: value for key, value in params.items() if key not in known})

        _whoever_is_faster(log_missing)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set all tags in one request."""
        self.log(tags=tags)

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Log values that belong to no step."""
        now = int(time.time() * 1000)
        self.log(metrics=[Metric(key, value, now, 0) for key, value in metrics.items()])

    def log(
        self,
        *,
        params: Mapping[str, object] | None = None,
        tags: Mapping[str, str] | None = None,
        metrics: Sequence[Metric] = (),
    ) -> None:
        """Log everything in one request, or in few where it is more than MLflow takes. It may be repeated."""
        all_params = [Param(key, str(value)) for key, value in (params or {}).items() if value is not None]
        all_tags = [RunTag(key, value) for key, value in (tags or {}).items()]
        first = ENTRIES_PER_CALL - len(all_params) - len(all_tags)
        if all_params or all_tags or metrics:
            self.client.log_batch(self.id, metrics[:first], all_params, all_tags)
        for start in range(first, len(metrics), ENTRIES_PER_CALL):
            self.client.log_batch(self.id, metrics[start : start + ENTRIES_PER_CALL])

    def last_step(self, metric: str) -> int:
        """The highest step of a metric that is logged; 0 without one."""
        return max((entry.step for entry in self.client.get_metric_history(self.id, metric)), default=0)

    def log_artifact(self, path: Path) -> None:
        """Upload a file."""
        self.client.log_artifact(self.id, str(path))

    def log_json(self, name: str, content: object, indent: int | None = 1, there: MlflowRun | None = None) -> None:
        """Upload plain values as a JSON file.

        Args:
            name: of the file.
            content: the values.
            indent: None is written many times faster.
            there: the run as it stands, where that is known.
        """
        there = there or self.client.get_run(self.id)
        self._upload(there.info.artifact_uri, name, json.dumps(content, indent=indent))

    def _store(self, place: str) -> ArtifactRepository:
        return get_artifact_repository(place, tracking_uri=self.client.tracking_uri)

    def _upload(self, place: str, name: str, text: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, name).write_text(text, encoding="utf-8")
            self._store(place).log_artifact(str(Path(folder, name)))

    def log_dataset(self, name: str, digest: str, source: str, profile: str, use: str) -> None:
        """Name the data that the run used or made; ``use`` is MLflow's context, such as "training"."""
        dataset = Dataset(name, digest[:36], "local", source, profile=profile)
        inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", use)])]
        _whoever_is_faster(lambda: self.client.log_inputs(self.id, inputs))

    def log_student(self, folder: Path, there: MlflowRun) -> str:
        """Log a student folder as an MLflow model that carries its code and needs no pickle; returns its id.

        What `mlflow.pyfunc.log_model` does, with the parts that all students share made once. A model that an earlier
        try has begun is used again: ``there`` is the run as it stands.
        """
        if there.outputs and there.outputs.model_outputs:
            model = self.client.get_logged_model(there.outputs.model_outputs[0].model_id)
        else:
            model = self.client.create_logged_model(self.experiment_id, "student", self.id)
            self.client.log_outputs(self.id, [LoggedModelOutput(model.model_id, step=0)])
        frame, description = _frame()
        described = copy.copy(description)
        described.run_id, described.model_id, described.model_uuid = self.id, model.model_id, model.model_id
        described.artifact_path = model.artifact_location
        store = self._store(model.artifact_location)
        store.log_artifacts(frame.name)
        store.log_artifacts(str(folder), STUDENT_PLACE)
        self._upload(model.artifact_location, "MLmodel", yaml.dump(described.to_dict(), Dumper=DUMPER))
        self.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        return str(model.model_id)

    def leave(self) -> None:
        """Leave the run open for others, who are not at work now: SCHEDULED."""
        self.client.update_run(self.id, status="SCHEDULED")

    def end(self, status: str) -> None:
        """Close the run: "FINISHED", "FAILED" or "KILLED"."""
        self.client.set_terminated(self.id, status)


def _whoever_is_faster(work: Callable[[], None]) -> None:
    """Do what another worker may do at this moment; where that made it fail, the second try finds it done."""
    try:
        work()
    except MlflowException:
        work()


@functools.cache
def _frame() -> tuple[tempfile.TemporaryDirectory[str], Model]:
    """A model folder without a student (description, code, requirements), and its description.

    The folder is removed as the process ends.
    """
    frame = tempfile.TemporaryDirectory(prefix="student-model-")
    package = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory() as parts:
        code, place = Path(parts) / "pipeline", Path(parts) / "student"
        code.mkdir()
        for name in STUDENT_CODE:
            shutil.copy(package / f"{name}.py", code)
        _smallest_student().save(place)
        pyfunc.save_model(
            frame.name,
            python_model=str(code / "served.py"),
            artifacts={"student": str(place)},
            code_paths=[str(code)],
            input_example=list(EXAMPLE),
            pip_requirements=[f"{name}=={_public_version(name)}" for name in STUDENT_NEEDS],
        )
        shutil.rmtree(Path(frame.name) / STUDENT_PLACE)
    return frame, Model.load(frame.name)


def _smallest_student() -> Student:
    """One that answers for the example only, for MLflow tries what it is to describe."""
    table = Table(np.zeros((1, 1), np.float32))
    reading = Reading((Part("0", "mean"),), {"0": table}, np.zeros(1, np.float32), np.ones(1, np.float32), 1, True)
    return Student({"student": "ridge"}, {}, np.zeros(1, np.float32), reading, EXAMPLE, Ragged.of([[0]] * len(EXAMPLE)))


def curve_metrics(curves: Mapping[str, Mapping[int, float]], times: Mapping[int, int]) -> list[Metric]:
    """Curves as MLflow's entries.

    Args:
        curves: values by epoch, which is the step.
        times: when an epoch ended (ms since 1970), where known; the same time makes a repeated entry the same entry.
    """
    now = int(time.time() * 1000)
    return [
        Metric(key, value, times.get(step, now), step)
        for key, values in curves.items()
        for step, value in values.items()
    ]


def final_metrics(metrics: Mapping[str, float], step: int, model_id: str, now: int) -> list[Metric]:
    """Values of the kept checkpoint, later than any curve's: of two of one name MLflow shows and sorts by the last."""
    return [Metric(key, value, now + 1, step, model_id=model_id) for key, value in metrics.items()]


def _public_version(package: str) -> str:
    return importlib.metadata.version(package).split("+")[0]  # "+cpu" names a build that indexes do not offer
