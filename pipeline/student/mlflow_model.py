"""The door through which MLflow loads a student that it holds: text in, vectors out. Code and numbers, no pickle.

MLflow runs this file (its "models from code"); the type hints are the model's signature, and what does not fit them is
refused before it comes here.
"""

from __future__ import annotations

from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import BAD_REQUEST
from mlflow.pyfunc.model import PythonModel

from pipeline.errors import InputError
from pipeline.student.student import Student

MOST_TEXTS = 100_000  # of one request


class ServedStudent(PythonModel):
    """A student as MLflow calls it."""

    def load_context(self, context: Any) -> None:
        """Load the student folder that was logged with the model."""
        self.student = Student.load(context.artifacts["student"])

    def predict(self, model_input: list[str]) -> list[list[float]]:  # type: ignore[override]
        """Activation vectors of texts, ``[n, d_model]``, not centred.

        Raises:
            MlflowException: no texts, too many, or one that is none; a server answers 400 with the reason.
        """
        try:
            if not 0 < len(model_input) <= MOST_TEXTS:
                raise InputError(f"{len(model_input):,} texts; expected 1 to {MOST_TEXTS:,}")
            vectors: list[list[float]] = self.student.encode(model_input).tolist()
        except InputError as error:
            raise MlflowException(str(error), error_code=BAD_REQUEST) from error
        return vectors


set_model(ServedStudent())
