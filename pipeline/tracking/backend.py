"""The ``host`` backend of ``mlflow run``: it runs the project's command without the container."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import ExecutionException
from mlflow.projects import utils
from mlflow.projects.backend.abstract_backend import AbstractBackend
from mlflow.projects.submitted_run import LocalSubmittedRun

from pipeline.errors import InputError
from pipeline.tracking.tracker import connect

STOP_SECONDS = 30  # how long an interrupted project may take to close its runs


class HostBackend(AbstractBackend):
    """``mlflow run . --backend host``: the MLproject command in the current environment, without the container."""

    def run(
        self,
        project_uri: str,
        entry_point: str,
        params: dict[str, Any],
        version: str | None,
        backend_config: dict[str, Any],
        tracking_uri: str,
        experiment_id: str,
    ) -> LocalSubmittedRun:
        """Run the entry point to its end: ``mlflow run`` does not wait for the backends of plugins."""
        os.environ.setdefault("MLFLOW_TRACKING_URI", tracking_uri)
        try:
            tracker = connect(experiment_id=experiment_id)
        except InputError as error:
            raise ExecutionException(str(error)) from None
        work_dir = utils.fetch_and_validate_project(project_uri, version, entry_point, params)
        project = utils.load_project(work_dir)
        run = utils.get_or_create_run(None, project_uri, tracker.experiment_id, work_dir, version, entry_point, params)
        lines = utils.get_entry_point_command(project, entry_point, params, backend_config.get("STORAGE_DIR"))
        command = ["bash", "-c", " && ".join(lines)]
        environment = {**os.environ, **utils.get_run_env_vars(run.info.run_id, tracker.experiment_id)}
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        process = subprocess.Popen(command, cwd=work_dir, env=environment, start_new_session=True)
        submitted = _HostRun(run.info.run_id, process)
        try:
            succeeded = submitted.wait()
        except KeyboardInterrupt:
            submitted.cancel()
            _end_if_running(tracker.client, run.info.run_id, "KILLED")
            raise
        if not succeeded:
            _end_if_running(tracker.client, run.info.run_id, "FAILED")
            raise ExecutionException(f"the command of run {run.info.run_id} failed")
        return submitted


def _end_if_running(client: MlflowClient, run_id: str, status: str) -> None:
    """End the run of a command that ended before it could take the run over."""
    if client.get_run(run_id).info.status == "RUNNING":
        client.set_terminated(run_id, status)


class _HostRun(LocalSubmittedRun):
    """A project in a process group of its own, to interrupt it as a whole; it gets time to close its runs."""

    def cancel(self) -> None:
        group = self.command_proc.pid
        deadline = time.monotonic() + STOP_SECONDS
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGINT)
            while time.monotonic() < deadline:
                self.command_proc.poll()
                os.killpg(group, 0)
                time.sleep(0.1)
            os.killpg(group, signal.SIGKILL)
        self.command_proc.wait()
