"""What `mlflow run` of this project needs before it begins: the experiment, and a container that can run.

MLflow loads the module with itself, so it imports nothing heavy until it is asked.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

NAME = "activation-distillation"
HOST = "or run in the current environment: add --backend host"


class ProjectExperiment:
    """MLflow's default experiment for ``mlflow run`` of this project; a plugin of ``default_experiment_provider``."""

    def in_context(self) -> bool:
        """Whether the command is ``mlflow run`` of a folder with this project."""
        is_run = "mlflow" in sys.argv[0] and sys.argv[1:2] == ["run"]
        return is_run and any(_project(folder) is not None for folder in sys.argv[2:])

    def get_experiment_id(self) -> str:
        """The experiment; leaves with one line of advice where the run could not begin."""
        from pipeline.errors import InputError
        from pipeline.tracking import connect

        try:
            experiment_id = connect().experiment_id
            folder = next(Path(folder) for folder in sys.argv[2:] if _project(folder) is not None)
            if not {"-b", "--backend", "--backend=host"} & set(sys.argv):
                check_container(folder)
        except InputError as error:
            sys.exit(f"error: {error}")
        return experiment_id


def _project(folder: str) -> str | None:
    """The image of the project in a folder, where it is this one."""
    try:
        found = yaml.safe_load((Path(folder) / "MLproject").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return str(found["docker_env"]["image"]) if found.get("name") == NAME else None


def check_container(folder: Path) -> None:
    """Check that ``docker run`` of the project will work, as far as can be told beforehand.

    Raises:
        InputError: a folder with a space, no Docker, no image, or a database that the container cannot see.
    """
    from pipeline.errors import InputError

    image = _project(str(folder))
    if " " in str(folder.resolve()):
        raise InputError(f"{folder.resolve()}: MLflow mounts no folder with a space in its name; rename it, {HOST}")
    if shutil.which("docker") is None:
        raise InputError(f"docker: not found; install it, {HOST}")
    engine = subprocess.run(["docker", "info"], capture_output=True, text=True, check=False)
    if engine.returncode:
        reason = (engine.stderr.strip().splitlines() or ["no answer"])[-1]
        raise InputError(f"docker: the engine does not answer ({reason}); start it, {HOST}")
    if subprocess.run(["docker", "image", "inspect", str(image)], capture_output=True, check=False).returncode:
        raise InputError(f"docker image {image}: not here; build it with: make image, {HOST}")
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    path = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:") and not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(
            f"MLFLOW_TRACKING_URI {uri}: the container sees the project's folder only; "
            f"use a database in it or a tracking server, {HOST}"
        )
