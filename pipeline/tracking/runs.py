"""One MLflow run: parameters, metrics, artifacts and the student, in few, large requests."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import yaml
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, LoggedModelStatus, Metric, Param, RunTag
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from pipeline.student.folder import CARD, CONFIG, MODEL, TOKENIZER
from pipeline.tracking.server import without_password
from pipeline.tracking.students import STUDENT_PLACE, logged_models

DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # of the two the one in C takes a tenth of the time
ENTRIES_PER_CALL = 1000  # MLflow's limit of metrics, and with 100 parameters and 100 tags of all, for one request
# The code that a logged student carries: the room `student`, and the files below all rooms that it imports.
STUDENT_CODE = ("__init__.py", "errors.py", "interrupts.py", "s3.py", "storage.py", "student")
MODEL_ENTRY_POINT = "mlflow_model.py"  # of that room
EXAMPLE = ("volcano", "slow cooking")  # what a logged student may be asked
STUDENT_NEEDS = ("mlflow", "numpy", "safetensors", "tokenizers")


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
        """Log what is not there yet: parameters cannot change, and ``mlflow run`` and other workers log them too."""

        def log_missing() -> None:
            known = self.client.get_run(self.id).data.params
            self.log(params={key: value for key, value in params.items() if key not in known})

        _whoever_is_faster(log_missing)

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

    def log_artifact(self, path: Path, there: MlflowRun | None = None) -> None:
        """Upload a file; ``there`` is the run as it stands, where that is known."""
        there = there or self.client.get_run(self.id)
        self._store(there.info.artifact_uri).log_artifact(str(path))

    def log_json(self, name: str, content: object) -> None:
        """Upload plain values as a JSON file."""
        self._upload(self.client.get_run(self.id).info.artifact_uri, name, json.dumps(content, indent=1))

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

    def log_student(self, folder: Path, there: MlflowRun, name: str = "student") -> str:
        """Log a student folder as an MLflow model that carries its code and needs no pickle; returns its id.

        What `mlflow.pyfunc.log_model` does, with the parts that all students share made once. A model of that name that
        an earlier try has begun is used again: ``there`` is the run as it stands.
        """
        has_begun = there.outputs and there.outputs.model_outputs
        begun = logged_models(self.client, [there])[self.id] if has_begun else []  # none of those that were deleted
        model = next((model for model in begun if model.name == name), None)
        if model is None:
            model = self.client.create_logged_model(self.experiment_id, name, self.id)
            self.client.log_outputs(self.id, [LoggedModelOutput(model.model_id, step=0)])
        store = self._store(model.artifact_location)
        store.log_artifacts(_frame().name)
        for part in (MODEL, TOKENIZER, CARD, CONFIG):  # and nothing else that stands in the folder
            if (folder / part).is_file():
                store.log_artifact(str(folder / part), STUDENT_PLACE)
        described = _description(self.id, model.model_id, model.artifact_location)
        self._upload(model.artifact_location, "MLmodel", described)
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
def _frame() -> tempfile.TemporaryDirectory[str]:
    """A model folder without student and description: code, requirements and what MLflow shows as an example.

    `mlflow.pyfunc.save_model` would write the same after it has searched all installed packages for these four, which
    takes as long as training some students. The folder is removed as the process ends.
    """
    frame = tempfile.TemporaryDirectory(prefix="student-model-")
    package, home = Path(__file__).parent.parent, Path(frame.name)
    code = home / "code" / "pipeline"
    code.mkdir(parents=True)
    for name in STUDENT_CODE:
        if (package / name).is_dir():
            shutil.copytree(package / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(package / name, code)
    shutil.copy(package / "student" / MODEL_ENTRY_POINT, home)
    needs = [f"{name}=={_public_version(name)}" for name in STUDENT_NEEDS]
    python = platform.python_version()
    conda = {"channels": ["conda-forge"], "dependencies": [f"python={python}", "pip", {"pip": needs}]}
    tools = ["pip", "setuptools", "wheel"]
    texts = {
        "requirements.txt": "\n".join(needs),
        "conda.yaml": yaml.dump(conda, Dumper=DUMPER),
        "python_env.yaml": yaml.dump(
            {"python": python, "build_dependencies": tools, "dependencies": ["-r requirements.txt"]}, Dumper=DUMPER
        ),
        "input_example.json": json.dumps(EXAMPLE),
        "serving_input_example.json": json.dumps({"inputs": EXAMPLE}),
    }
    for name, text in texts.items():
        (home / name).write_text(text, encoding="utf-8")
    return frame


def _description(run_id: str, model_id: str, artifact_path: str) -> str:
    """The ``MLmodel`` file of a logged student: texts in, vectors out, loaded from code."""
    door = {
        "loader_module": "mlflow.pyfunc.loaders.code_model",
        "model_code_path": MODEL_ENTRY_POINT,
        "code": "code",
        "artifacts": {"student": {"path": STUDENT_PLACE, "uri": STUDENT_PLACE}},
        "env": {"conda": "conda.yaml", "virtualenv": "python_env.yaml"},
        "python_version": platform.python_version(),
        "streamable": False,
    }
    description = {
        "artifact_path": artifact_path,
        "flavors": {"python_function": door},
        "mlflow_version": importlib.metadata.version("mlflow"),
        "model_id": model_id,
        "model_uuid": model_id,
        "run_id": run_id,
        "utc_time_created": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S.%f}",
        "is_signature_from_type_hint": True,
        "type_hint_from_example": False,
        "signature": {
            "inputs": json.dumps([{"type": "string", "required": True}]),
            "outputs": json.dumps([{"type": "array", "items": {"type": "double"}, "required": True}]),
        },
        "saved_input_example_info": {
            "artifact_path": "input_example.json",
            "serving_input_path": "serving_input_example.json",
            "type": "json_object",
        },
    }
    return str(yaml.dump(description, Dumper=DUMPER))


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
