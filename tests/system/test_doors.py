"""The doors: `mlflow run --backend host`, and the runs seen in a real browser."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT, SHIPPED, free_port, wait_for
from mlflow import MlflowClient
from processes import PATIENCE, wait_until


@contextmanager
def mlflow_run(workplace, *parameters):
    pairs = [part for parameter in parameters for part in ("-P", parameter)]
    command = [sys.executable, "-m", "mlflow", "run", str(ROOT), "-e", "sweep", "--backend", "host", *pairs]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "MLFLOW_TRACKING_URI": f"sqlite:///{workplace}/mlflow.db"}
    process = subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


def found_runs():
    client = MlflowClient()
    experiment = client.get_experiment_by_name("activation-distillation")
    runs = client.search_runs([experiment.experiment_id]) if experiment else []
    return [[run for run in runs if run.data.tags.get("role") == role] for role in ("sweep", "cell")]


def test_mlflow_run_on_the_host_tracks_under_the_run_that_it_opened(workplace, small_grid):
    parameters = (f"grid={small_grid}", f"vectors={SHIPPED}", f"output={workplace}/out", "epochs=2")
    with mlflow_run(workplace, *parameters) as process:
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    [parent], children = found_runs()
    assert {run.info.status for run in [parent, *children]} == {"FINISHED"}
    assert parent.info.run_name == "small"
    assert parent.data.tags["mlflow.project.entryPoint"] == "sweep"
    assert parent.data.tags["mlflow.project.backend"] == "host"
    assert parent.data.params["epochs"] == "2"
    assert {run.data.params["epochs"] for run in children} == {"2"}
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert len(list((workplace / "out").glob("*.png"))) == 6


def test_mlflow_run_says_what_is_wrong_in_one_line(workplace):
    with mlflow_run(workplace, "grid=scalling") as process:
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "unknown grid 'scalling'; available: architecture" in err
    assert "Traceback" not in err


def test_mlflow_run_in_a_deleted_experiment_says_what_brings_it_back(workplace, monkeypatch):
    client = MlflowClient()
    deleted = client.create_experiment("mine")
    client.delete_experiment(deleted)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    with mlflow_run(workplace, "dry_run=dry-run") as process:
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert f"bring it back with: mlflow experiments restore --experiment-id {deleted}" in err
    assert "Traceback" not in err


def test_interrupting_mlflow_run_closes_its_runs(workplace):
    grid = workplace / "long.yaml"
    grid.write_text("fixed: {epochs: 2000, concepts: 700}\naxes: {layers: [0, 2]}\n")
    found_runs()  # makes the database
    with mlflow_run(workplace, f"grid={grid}", f"vectors={SHIPPED}", f"output={workplace}/out") as process:
        wait_until(lambda: found_runs()[1], process, step=0.5)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    [parent], children = found_runs()
    assert parent.info.status == "KILLED"
    assert {run.info.status for run in children} == {"KILLED"}


@pytest.fixture
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("needs chromium or chrome on the PATH")
    return found


def test_the_runs_stand_in_the_compare_view_of_the_ui(workplace, run, small_grid, browser):
    code, _, err = run("sweep", "--grid", small_grid, "--vectors", SHIPPED, "--no-report")
    assert code == 0, err
    _, children = found_runs()
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{workplace}/mlflow.db",
         "--port", str(port), "--workers", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(port)
        names = "[" + ",".join(f'"{child.info.run_id}"' for child in children) + "]"
        page = f'http://127.0.0.1:{port}/#/compare-runs?runs={names}&experiments=["{children[0].info.experiment_id}"]'
        shown = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", f"--user-data-dir={workplace}/profile",
             "--window-size=1600,1400", "--virtual-time-budget=60000", "--dump-dom", page],
            capture_output=True, text=True, timeout=PATIENCE, check=False,
        ).stdout  # fmt: skip
    finally:
        os.killpg(server.pid, signal.SIGKILL)
    for child in children:
        assert child.info.run_name in shown
    for part in ("val_cosine", "test_cosine", "hidden_dim"):
        assert part in shown
