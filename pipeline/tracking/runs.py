"""One MLflow run: parameters, metrics, artifacts and the student, in few, large requests."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mlflow
import yaml
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, LoggedModelStatus, Metric, Param, RunTag
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from pipeline import storage
from pipeline.student.folder import CARD, CONFIG, MODEL, TOKENIZER
from pipeline.tracking.server import without_password
from pipeline.tracking.students import STUDENT_PLACE, logged_models

ENTRIES_PER_CALL = 1000  # MLflow's limit for one request: metrics, parameters and tags together
# The code that a logged student carries: the room `student`, and the ground files that it imports.
STUDENT_CODE = ("__init__.py", "errors.py", "interrupts.py", "s3.py", "storage.py", "student")
MODEL_ENTRY_POINT = "mlflow_model.py"  # of that room
EXAMPLE = ["volcano", "slow cooking"]  # the input example that MLflow shows
STUDENT_NEEDS = ("mlflow", "numpy", "safetensors", "tokenizers")
EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Run:
    """An open MLflow run, written to in few, large requests."""

    client: MlflowClient
    id: str
    experiment_id: str

    @property
    def address(self) -> str:
        """Where a person finds the run."""
        uri = without_password(self.client.tracking_uri)
        if uri.startswith("http"):
            return f"{uri.rstrip('/')}/#/experiments/{self.experiment_id}/runs/{self.id}"
        return f"run {self.id} at {uri} (see it with: make ui)"

    def log_params(self, params: Mapping[str, object]) -> None:
        """Log parameters that the run lacks: they cannot change, and ``mlflow run`` and other workers log them too."""

        def log_missing() -> None:
            known = self.client.get_run(self.id).data.params
            self.log(params={key: value for key, value in params.items() if key not in known})

        _retry_once(log_missing)

    @property
    def tags(self) -> dict[str, str]:
        """The run's tags, read from the server at each call."""
        return dict(self.client.get_run(self.id).data.tags)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set all tags in one request."""
        self.log(tags=tags)

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Log values that belong to no step."""
        now = int(time.time() * 1000)
        self.log(metrics=[Metric(key, value, now, 0) for key, value in metrics.items()])

    def log(
        self, *, params: Mapping[str, object] = EMPTY, tags: Mapping[str, str] = EMPTY, metrics: Sequence[Metric] = ()
    ) -> None:
        """Log all in one request, or in more where MLflow's limit demands it. A repetition changes nothing."""
        all_params = [Param(key, str(value)) for key, value in params.items() if value is not None]
        all_tags = [RunTag(key, value) for key, value in tags.items()]
        first = ENTRIES_PER_CALL - len(all_params) - len(all_tags)
        if all_params or all_tags or metrics:
            self.client.log_batch(self.id, metrics[:first], all_params, all_tags)
        for start in range(first, len(metrics), ENTRIES_PER_CALL):
            self.client.log_batch(self.id, metrics[start : start + ENTRIES_PER_CALL])

    def last_step(self, metric: str) -> int:
        """The highest step of a metric that is logged; 0 without one."""
        return max((entry.step for entry in self.client.get_metric_history(self.id, metric)), default=0)

    def log_artifact(self, path: Path, current: MlflowRun | None = None) -> None:
        """Upload a file; ``current`` is the run as it stands on the server, where the caller has read it."""
        self._store((current or self.client.get_run(self.id)).info.artifact_uri).log_artifact(str(path))

    def log_json(self, name: str, content: object) -> None:
        """Upload plain values as a JSON file."""
        self.client.log_text(self.id, json.dumps(content, indent=1), name)

    def _store(self, place: str) -> ArtifactRepository:
        return get_artifact_repository(place, tracking_uri=self.client.tracking_uri)

    def log_dataset(self, name: str, digest: str, source: str, profile: str, use: str) -> None:
        """Log the data that the run used or made; ``use`` is MLflow's context, such as "training"."""
        dataset = Dataset(name, digest[:36], "local", source, profile=profile)
        inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", use)])]
        _retry_once(lambda: self.client.log_inputs(self.id, inputs))

    def log_student(self, folder: Path, current: MlflowRun, name: str = "student", cell_key: str | None = None) -> str:
        """Log a student folder as an MLflow model that carries its code and needs no pickle; returns the model's id."""
        has_begun = current.outputs and current.outputs.model_outputs
        begun = logged_models(self.client, [current])[self.id] if has_begun else []  # without those that were deleted
        model = next((model for model in begun if model.name == name), None)  # which an earlier try began
        if model is None:
            # MLflow cannot look for runs with one of many tags, but for models with one of many types.
            model = self.client.create_logged_model(self.experiment_id, name, self.id, model_type=cell_key)
            self.client.log_outputs(self.id, [LoggedModelOutput(model.model_id, step=0)])
        place, store = model.artifact_location, self._store(model.artifact_location)
        files, description = _model_template()
        store.log_artifacts(str(files))
        for part in (MODEL, TOKENIZER, CARD, CONFIG):  # and nothing else that stands in the folder
            if (folder / part).is_file():
                store.log_artifact(str(folder / part), STUDENT_PLACE)
        own = {"run_id": self.id, "model_id": model.model_id, "model_uuid": model.model_id, "artifact_path": place}
        own["utc_time_created"] = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S.%f}"
        with tempfile.TemporaryDirectory() as own_folder:
            described = Path(own_folder, MLMODEL_FILE_NAME)
            described.write_text(yaml.safe_dump(description | own), encoding="utf-8")
            store.log_artifact(str(described))  # last: with it the model is whole
        self.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        return str(model.model_id)

    def mark_scheduled(self) -> None:
        """Mark the run SCHEDULED: unfinished, and no worker is at it now."""
        self.client.update_run(self.id, status="SCHEDULED")

    def end(self, status: str) -> None:
        """Close the run: "FINISHED", "FAILED" or "KILLED"."""
        self.client.set_terminated(self.id, status)


def _retry_once(work: Callable[[], None]) -> None:
    """Do work that another worker may do at the same moment: the second try finds it done."""
    try:
        work()
    except MlflowException:
        work()


@functools.cache
def _model_template() -> tuple[Path, dict[str, Any]]:
    """Save an MLflow model without its student, once per process: its files, and the content of its ``MLmodel``."""
    # `mlflow.pyfunc.log_model` would make all of it again, and load the model, for each student.
    package, stage = Path(__file__).parent.parent, storage.temporary_folder()

    def is_left_out(folder: str, name: str) -> bool:
        return name == "__pycache__" or (folder == str(package) and name not in STUDENT_CODE)

    shutil.copytree(package, stage / "pipeline", ignore=lambda at, names: {n for n in names if is_left_out(at, n)})
    (stage / "student").mkdir()
    mlflow.pyfunc.save_model(
        stage / "model",
        python_model=str(package / "student" / MODEL_ENTRY_POINT),
        artifacts={"student": str(stage / "student")},
        code_paths=[str(stage / "pipeline")],
        pip_requirements=[f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in STUDENT_NEEDS],
        input_example=EXAMPLE,
    )
    described = stage / "model" / MLMODEL_FILE_NAME
    content: dict[str, Any] = yaml.safe_load(described.read_text(encoding="utf-8"))
    described.unlink()
    del content["model_size_bytes"]
    code = stage / "model" / "code"
    flavor = content["flavors"]["python_function"]
    # Python imports from an archive too, and one file for each student is uploaded instead of twenty.
    flavor["code"] = Path(shutil.make_archive(str(code), "zip", code)).name
    shutil.rmtree(code)
    # Without the paths of this machine.
    flavor["model_code_path"], flavor["artifacts"]["student"]["uri"] = MODEL_ENTRY_POINT, STUDENT_PLACE
    return stage / "model", content
