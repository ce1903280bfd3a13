"""MLflow, of which no other room knows anything.

Parameters, metrics, files and students come in; runs go out, and what earlier runs hold. What is worth tracking is
decided elsewhere.
"""

from mlflow.entities import Metric
from mlflow.entities import Run as MlflowRun

from pipeline.tracking.backend import HostBackend
from pipeline.tracking.runs import Run, curve_metrics, final_metrics
from pipeline.tracking.server import TrackingError, retry_tracking
from pipeline.tracking.tracker import Tracker, closing, connect, fetch, student_at, wait_for_peers

__all__ = [
    "HostBackend", "Metric", "MlflowRun", "Run", "Tracker", "TrackingError", "closing", "connect", "curve_metrics",
    "fetch", "final_metrics", "retry_tracking", "student_at", "wait_for_peers",
]  # fmt: skip
