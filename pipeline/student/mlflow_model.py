"""The entry point through which MLflow serves a logged student: text in, vectors out, and no pickle.

MLflow runs this file (its "models from code"); the type hints are the model's signature, which MLflow enforces.
"""

from __future__ import annotations

from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import BAD_REQUEST
from mlflow.pyfunc.model import PythonModel

from pipeline.errors import InputError
from pipeline.student.student import Student

MAX_TEXTS = 100_000  # in one request


class ServedStudent(PythonModel):
    """A student with MLflow's model interface."""

    def load_context(self, context: Any) -> None:
        """Load the student folder that was logged with the model."""
        self.student = Student.load(context.artifacts["student"])

    def predict(self, model_input: list[str]) -> list[list[float]]:  # type: ignore[override]
        """Predict activation vectors of ``n`` texts, ``[n, d_model]``, not centred; wrong texts are status 400."""
        if not 0 < len(model_input) <= MAX_TEXTS:
            reason = f"{len(model_input):,} texts; expected 1 to {MAX_TEXTS:,}"
            raise MlflowException(reason, error_code=BAD_REQUEST)
        try:
            vectors: list[list[float]] = self.student.encode(model_input).tolist()
        except InputError as error:
            raise MlflowException(str(error), error_code=BAD_REQUEST) from error
        return vectors


set_model(ServedStudent())
