"""The door through which MLflow loads a student that it holds: text in, vectors out. No pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.students.student import Student


class PyfuncStudent:
    """A student as MLflow calls it."""

    def __init__(self, student: Student) -> None:
        self.student = student

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> NDArray[np.float32]:  # noqa: ARG002 (MLflow's signature)
        """Activation vectors ``[n, d_model]`` of the concepts in a table's first column, or in a list."""
        column = model_input.iloc[:, 0] if hasattr(model_input, "iloc") else model_input
        return self.student.encode([str(concept) for concept in column])


def _load_pyfunc(path: str) -> PyfuncStudent:
    return PyfuncStudent(Student.load(Path(path)))
