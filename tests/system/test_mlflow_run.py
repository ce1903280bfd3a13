"""`mlflow run` in the container, by a user who is not root, as the README has it."""

import os
import pwd
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT, SHIPPED, SMALL_GRID, free_port, mlflow_server
from containers import IMAGE
from mlflow import MlflowClient

from pipeline.extraction.vocabulary import beside

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="session")
def account():
    """The name of a user who is not root and may use Docker: this one, or one that is made."""
    if os.getuid():
        return pwd.getpwuid(os.getuid()).pw_name
    if subprocess.run(["id", "tester"], capture_output=True, check=False).returncode:
        subprocess.run(["useradd", "--create-home", "--groups", "docker", "tester"], check=True)
    return "tester"


def run_as(account, command, folder, **environment):
    """Run a line of bash as the README has it, in a login of that user's."""
    user = pwd.getpwnam(account)
    inherited = {name: value for name, value in os.environ.items() if "MLFLOW" not in name and "PYTHON" not in name}
    variables = inherited | {
        "HOME": user.pw_dir, "USER": account, "LOGNAME": account, "PATH": "/usr/local/bin:/usr/bin:/bin", **environment,
    }  # fmt: skip
    switch = [shutil.which("runuser"), "-u", account, "--"] if os.getuid() == 0 else []
    return subprocess.run(
        [*switch, "bash", "-c", f"umask 022; {command}"],
        cwd=folder, capture_output=True, text=True, timeout=800, check=False, env=variables,
    )  # fmt: skip


def copy_project(folder, account=None):
    """The project as a fresh clone has it; for an account, with the vocabulary that its first sweep leaves."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
    if account is not None:
        shutil.copy(beside(str(SHIPPED)), folder / "data" / "vectors")
        subprocess.run(["chown", "-R", account, folder], check=True)
    return folder


@pytest.fixture(scope="session")
def clone(account):
    """A clone of that user's, with a commit, in a path with letters beyond ASCII; MLflow as the README installs it."""
    home = Path(tempfile.mkdtemp(dir="/tmp"))
    home.chmod(0o755)
    folder = copy_project(home / "größe-計画")
    subprocess.run(["chown", "-R", account, home], check=True)
    done = run_as(
        account,
        "git init -q . && git add -A && git -c user.name=me -c user.email=me@example.com commit -qm begin "
        "&& make --silent client PYTHON=/usr/bin/python3",
        folder,
    )
    assert done.returncode == 0, done.stderr
    yield folder
    subprocess.run(["rm", "-rf", home], check=True)


def found_runs(uri, experiment=IMAGE):
    client = MlflowClient(uri)
    return client, client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


def foreign_files(folder, account):
    return subprocess.run(["find", folder, "!", "-user", account], capture_output=True, text=True, check=True).stdout


def test_a_user_who_is_not_root_runs_every_entry_point_and_owns_all_that_is_left(image, clone, account):
    (clone / "small.yaml").write_text(SMALL_GRID)
    shutil.chown(clone / "small.yaml", account)
    parameters = "-P grid=small.yaml -P epochs=1 -P report=no-report"
    done = run_as(account, f". .venv/bin/activate && mlflow run . -e sweep {parameters}", clone)
    assert done.returncode == 0, done.stderr
    assert "it/s]" not in done.stderr  # no bars of other libraries in a log
    assert not any("\r" in line for line in done.stderr.splitlines())
    client, runs = found_runs(f"sqlite:///{clone}/mlflow.db")
    [parent] = [run for run in runs if run.data.tags["role"] == "sweep"]
    cells = [run for run in runs if run.data.tags["role"] == "cell"]
    assert len(cells) == 4
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {run.data.tags["mlflow.parentRunId"] for run in cells} == {parent.info.run_id}
    assert parent.data.tags["mlflow.project.env"] == "docker"
    head = run_as(account, "git rev-parse HEAD", clone).stdout.strip()
    for run in runs:
        assert run.data.tags["mlflow.user"] == run.info.user_id == account
        assert run.data.tags["mlflow.source.git.commit"] == head
    for run in cells:
        assert Path(run.info.artifact_uri, "cell.json").is_file()
        model = client.get_logged_model(run.outputs.model_outputs[0].model_id)
        assert next(Path(model.artifact_location).rglob("model.safetensors")).stat().st_size
    for entry, *parameters in (
        ("extract", "teacher=smollm2-135m", "num_concepts=30", "layers=2", "output=few.safetensors"),
        ("report",),
        ("train", "epochs=1", "concepts=40", "report=no-report", "output=my-student"),
    ):
        options = " ".join(f"-P {parameter}" for parameter in parameters)
        command = f". .venv/bin/activate && MLFLOW_EXPERIMENT_NAME=mine mlflow run . -e {entry} {options}"
        done = run_as(account, command, clone)
        assert done.returncode == 0, done.stderr
    assert (clone / "few.safetensors").is_file()
    assert len(list((clone / "results").glob("*.png"))) > 4
    assert (clone / "my-student" / "model.safetensors").is_file()
    others = found_runs(f"sqlite:///{clone}/mlflow.db", "mine")[1]
    assert {run.data.tags.get("role") for run in others} >= {"extract", "sweep", "cell"}
    assert {run.info.status for run in others} == {"FINISHED"}
    assert foreign_files(clone, account) == ""
    assert not Path("/mlflow.db").exists()  # where MLflow looks for a relative database


def test_vectors_that_come_with_the_project_are_never_replaced(image, clone, account):
    parameters = "-P teacher=smollm2-135m -P num_concepts=20 -P overwrite=overwrite"
    done = run_as(account, f". .venv/bin/activate && mlflow run . -e extract {parameters}", clone)
    assert done.returncode != 0
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "data/vectors/smollm2-135m.safetensors: comes with the project" in line
    assert "concepts 2,238, asked for 20" in line
    assert run_as(account, "git diff --name-only HEAD", clone).stdout == ""
    assert foreign_files(clone, account) == ""


def test_a_folder_with_a_space_is_refused_before_anything_is_written_or_served_by_a_server(
    image, clone, account, workplace
):
    folder = clone.parent / "mit Leerzeichen größe"
    copy_project(folder, account)
    before = sorted(folder.rglob("*"))
    command = f". {shlex.quote(str(clone))}/.venv/bin/activate && mlflow run . -e train -P epochs=1 -P concepts=40"
    command += " -P report=no-report"
    done = run_as(account, command, folder)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "cannot mount a folder with ' ' in its path" in done.stderr.splitlines()[-1]
    assert sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts) == before
    port = free_port()
    with mlflow_server(port):
        uri = f"http://127.0.0.1:{port}"
        done = run_as(account, f"{command} -P output=my-student -A network=host", folder, MLFLOW_TRACKING_URI=uri)
        assert done.returncode == 0, done.stderr
        _, runs = found_runs(uri)
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {run.info.user_id for run in runs} == {account}
    assert (folder / "my-student" / "model.safetensors").is_file()
    assert foreign_files(folder, account) == ""


def test_a_project_that_was_renamed_says_where_its_artifacts_were(image, clone, account):
    command = f". {shlex.quote(str(clone))}/.venv/bin/activate && mlflow run . -e sweep -P dry_run=dry-run"
    before = copy_project(clone.parent / "before", account)
    done = run_as(account, command, before)
    assert done.returncode == 0, done.stderr
    done = run_as(account, command, before.rename(clone.parent / "after"))
    assert done.returncode == 1
    assert "before/mlruns/1, which is gone" in done.stderr.splitlines()[-1]
    assert not (clone.parent / "before").exists()


def test_what_keeps_the_container_from_running_is_said_with_advice(image, clone, account):
    def advice(**environment):
        command = ". .venv/bin/activate && mlflow run . -e sweep -P epochs=1"
        done = run_as(account, command, clone, **environment)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert "--backend host" in done.stderr.splitlines()[-1]
        return done.stderr.splitlines()[-1]

    assert "sees the project's folder only" in advice(MLFLOW_TRACKING_URI="sqlite:////tmp/elsewhere.db")
    assert not Path("/tmp/elsewhere.db").exists()
    path = clone / "MLproject"
    text = path.read_text()
    path.write_text(text.replace(f"image: {IMAGE}", "image: no-such-image"))
    assert "docker image no-such-image: not here; build it with: make image" in advice()
    path.write_text(text)
