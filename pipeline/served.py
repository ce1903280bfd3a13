"""The door through which MLflow loads a student that it holds: text in, vectors out. Code and numbers, no pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST

from pipeline.errors import InputError
from pipeline.reading import Floats
from pipeline.student import Student

MOST_TEXTS = 100_000  # of one request


class ServedStudent:
    """A student as MLflow calls it."""

    def __init__(self, student: Student) -> None:
        self.student = student

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> Floats:  # noqa: ARG002 (MLflow's signature)
        """Activation vectors ``[n, d_model]`` of the texts in a table's first column, or in a list.

        Raises:
            MlflowException: what came is not texts that the student can read; a server answers 400 with the reason.
        """
        column = model_input.iloc[:, 0] if hasattr(model_input, "iloc") else model_input
        try:
            texts = [column] if isinstance(column, str) else list(column)
            if not 0 < len(texts) <= MOST_TEXTS:
                raise InputError(f"{len(texts):,} texts; expected 1 to {MOST_TEXTS:,}")
            return self.student.encode(texts)
        except (InputError, TypeError) as error:
            raise MlflowException(str(error), error_code=BAD_REQUEST) from error


def _load_pyfunc(path: str) -> ServedStudent:
    return ServedStudent(Student.load(Path(path)))
