"""What ``mlflow run`` of this project needs before it begins: the experiment, and a container that can run.

MLflow imports the module while it is itself being imported, so the module imports nothing heavy until it is asked.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from pipeline.errors import InputError
from pipeline.storage import tracking_uri

NAME = "activation-distillation"
HOST = "or run in the current environment: add --backend host"
ARTIFACTS = "EXPERIMENT_ARTIFACTS"  # in the environment of the MLproject's commands: the experiment's local folder
UNMOUNTABLE = r"[^\w@%+=,./~-]"


class ProjectExperiment:
    """MLflow's default experiment for ``mlflow run`` of this project; a plugin of ``default_experiment_provider``."""

    def __init__(self) -> None:
        """Check, before MLflow writes anything, whether the project can run."""
        if not self.in_context():
            return
        os.environ["MLFLOW_TRACKING_URI"] = tracking_uri()
        try:
            if _is_in_container():
                check_container(_folder())
        except InputError as error:
            sys.exit(f"error: {error}")

    def in_context(self) -> bool:
        """Whether the command is ``mlflow run`` of a folder with this project."""
        is_run = "mlflow" in sys.argv[0] and sys.argv[1:2] == ["run"]
        return is_run and any(_image(folder) is not None for folder in sys.argv[2:])

    def get_experiment_id(self) -> str:
        """The default experiment; ends the process with one line of advice if the run cannot begin."""
        from pipeline.tracking.experiment import artifact_folder, find_experiment
        from pipeline.tracking.server import reach

        try:
            client, experiment_id = reach(find_experiment)
            artifacts = artifact_folder(client.get_experiment(experiment_id).artifact_location)
            if _is_in_container() and artifacts is not None:
                _check_visible(artifacts, _folder(), "the experiment's artifacts")
                os.environ[ARTIFACTS] = str(artifacts)
        except InputError as error:
            sys.exit(f"error: {error}")
        return experiment_id


def _is_in_container() -> bool:
    return not {"-b", "--backend", "--backend=host"} & set(sys.argv)


def _folder() -> Path:
    """The folder of the project that the command runs."""
    return next(Path(folder) for folder in sys.argv[2:] if _image(folder) is not None)


def _image(folder: str) -> str | None:
    """The container image of the project in a folder; None where the folder holds no project or another one."""
    try:
        found = yaml.safe_load((Path(folder) / "MLproject").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return str(found["docker_env"]["image"]) if found.get("name") == NAME else None


def check_container(folder: Path) -> None:
    """Check, without writing, whether ``docker run`` of the project can work."""
    image, home, uri = _image(str(folder)), folder.resolve(), tracking_uri()
    is_local = uri.startswith("sqlite:")
    # MLflow quotes nothing where it mounts a database and its artifacts; Docker takes no colon in any path.
    if found := re.search(UNMOUNTABLE if is_local else ":", str(home)):
        advice = "rename the folder, use a tracking server" if is_local and found[0] != ":" else "rename the folder"
        raise InputError(f"{home}: MLflow cannot mount a folder with {found[0]!r} in its path; {advice}, {HOST}")
    if is_local:
        _check_visible(Path(uri.removeprefix("sqlite:///")), home, f"MLFLOW_TRACKING_URI {uri}")
    if shutil.which("docker") is None:
        raise InputError(f"docker: not found; install it, {HOST}")
    engine = subprocess.run(["docker", "info"], capture_output=True, text=True, check=False)
    if engine.returncode:
        reason = (engine.stderr.strip().splitlines() or ["no answer"])[-1]
        raise InputError(f"docker: the engine does not answer ({reason}); start it, {HOST}")
    if subprocess.run(["docker", "image", "inspect", str(image)], capture_output=True, check=False).returncode:
        raise InputError(f"docker image {image}: not here; build it with: make image, {HOST}")


def _check_visible(path: Path, folder: Path, what: str) -> None:
    """Check that a file is in the project's folder, the only one that the container sees."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(
            f"{what}: at {path}, and the container sees the project's folder only; "
            f"use a database in it or a tracking server, {HOST}"
        )
