"""MLflow, which no other room knows.

Parameters, metrics, files and students come in; runs go out, and what earlier runs hold. What is worth tracking is
decided elsewhere.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.entities import Run as MlflowRun

    from pipeline.tracking.backend import HostBackend
    from pipeline.tracking.runs import Run
    from pipeline.tracking.server import TrackingError, retry_tracking
    from pipeline.tracking.students import fetch, load_student
    from pipeline.tracking.tracker import Tracker, closing, connect

__all__ = [
    "HostBackend", "Metric", "MlflowRun", "Run", "Tracker", "TrackingError", "closing", "connect", "fetch",
    "load_student", "retry_tracking",
]  # fmt: skip
MODULES = ("runs", "server", "students", "tracker", "backend")


def __getattr__(name: str) -> Any:
    """Load a name when asked for: MLflow imports `plugins`, and so this package, while MLflow itself is half loaded."""
    for module in MODULES if name in __all__ else ():
        found = vars(importlib.import_module(f"pipeline.tracking.{module}"))
        if name in found:
            return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
