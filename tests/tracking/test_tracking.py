"""A tracking server that demands credentials, one that starts late, and the plugin of ``mlflow run``."""

import base64
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import SECRET, SHIPPED, free_port, mlflow_server
from faults import Faulty
from mlflow import MlflowClient

NAME = "activation-distillation"
NAMES = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
BASIC = {"MLFLOW_TRACKING_USERNAME": "somebody", "MLFLOW_TRACKING_PASSWORD": SECRET}
TOKEN = {"MLFLOW_TRACKING_TOKEN": SECRET}
ENCODED = base64.b64encode(f"somebody:{SECRET}".encode()).decode()


def train(uri, *arguments, **environment):
    common = ["--vectors", SHIPPED, "--epochs", "2", "--concepts", "40", "--no-report"]
    command = [sys.executable, "-m", "pipeline", "train", *common]
    variables = {name: value for name, value in os.environ.items() if name not in NAMES}
    variables |= {"MLFLOW_TRACKING_URI": uri, **environment}
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env=variables, timeout=200, check=False
    )


def test_the_plugin_of_mlflow_run_needs_no_mlflow_to_be_imported():
    # MLflow imports its plugins while it is half imported itself; one that needs it then is dropped with a warning.
    check = "import sys, pipeline.tracking.plugins; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.fixture
def locked(workplace):
    """A proxy that demands credentials, and the address of the real tracking server behind it."""
    port = free_port()
    with mlflow_server(port):
        proxy = Faulty(port)
        yield proxy, f"http://127.0.0.1:{port}"
        proxy.close()


@pytest.mark.system
def test_credentials_are_used_and_written_nowhere(locked, workplace):
    proxy, behind = locked
    for number, (right, authorization) in enumerate(((BASIC, f"Basic {ENCODED}"), (TOKEN, f"Bearer {SECRET}"))):
        proxy.authorization, proxy.refused = authorization, 0
        for wrong in ({}, {name: f"not-{value}" for name, value in right.items()}):
            done = train(proxy.url, **wrong)
            assert done.returncode == 2
            assert "the server denies access" in done.stderr.splitlines()[-1]
            assert "MLFLOW_TRACKING_TOKEN" in done.stderr.splitlines()[-1]
            assert not any(secret in done.stdout + done.stderr for secret in (SECRET, ENCODED, "Traceback"))
        before = proxy.refused
        report = "--no-report" if number else "--report"
        done = train(proxy.url, "--seed", str(number), "--output", f"student{number}", report, **right)
        assert done.returncode == 0, done.stderr
        assert proxy.refused == before > 0
        assert not any(secret in done.stdout + done.stderr for secret in (SECRET, ENCODED))
    client = MlflowClient(behind)
    runs = client.search_runs([client.get_experiment_by_name(NAME).experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert len(runs) == 4  # two sweeps of one cell
    for path in (path for path in workplace.rglob("*") if path.is_file()):  # database, artifacts, students, reports
        held = path.read_bytes()
        assert SECRET.encode() not in held, path
        assert ENCODED.encode() not in held, path


@pytest.mark.system
def test_a_token_that_expires_during_training_is_reported_in_one_line_and_loses_nothing(locked):
    proxy, behind = locked
    proxy.authorization = f"Bearer {SECRET}"
    client = MlflowClient(behind)

    def expire():
        while not (found := client.get_experiment_by_name(NAME)) or not client.search_runs([found.experiment_id]):
            time.sleep(0.1)
        proxy.authorization = "Bearer of-tomorrow"

    thread = threading.Thread(target=expire)
    thread.start()
    done = train(proxy.url, **TOKEN)
    thread.join()
    assert done.returncode == 1
    assert "the server denies access" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    done = train(proxy.url, MLFLOW_TRACKING_TOKEN="of-tomorrow")
    assert done.returncode == 0, done.stderr
    runs = client.search_runs([client.get_experiment_by_name(NAME).experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 2


@pytest.mark.system
def test_a_command_waits_for_a_server_that_starts_late(workplace):
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    begin = time.monotonic()
    done = train(uri, TRACKING_PATIENCE_SECONDS="1")
    assert done.returncode == 1  # not 2, wrong input: a Kubernetes job tries again
    assert f"{uri}: has not answered for 1 s" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    process = threading.Thread(target=lambda: results.append(train(uri, TRACKING_PATIENCE_SECONDS="120")))
    results = []
    process.start()
    time.sleep(time.monotonic() - begin)  # as long as it takes to come to that
    with mlflow_server(port):
        process.join()
        client = MlflowClient(uri)
        runs = client.search_runs([client.get_experiment_by_name(NAME).experiment_id])
    assert results[0].returncode == 0, results[0].stderr
    assert f"waiting for the tracking server {uri} (nothing answers there): 0 of at most 120 s" in results[0].stderr
    assert "Retry" not in results[0].stderr  # our own log lines only
    assert "make ui" not in results[0].stdout  # the run is on a server
    assert f"{uri}/#/experiments/" in results[0].stdout
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert Path("results").is_dir()


@pytest.mark.system
def test_a_command_waits_for_an_ingress_without_a_server_behind_it(locked):
    proxy, behind = locked
    proxy.absent = True
    done = train(proxy.url)
    assert done.returncode == 2  # at a terminal a wrong address is reported at once
    assert "error code 404" in done.stderr.splitlines()[-1]
    done = train(proxy.url, TRACKING_PATIENCE_SECONDS="1")
    assert done.returncode == 1
    assert "has not answered for 1 s (HTTP 404)" in done.stderr.splitlines()[-1]
    results = []
    process = threading.Thread(
        target=lambda: results.append(train(proxy.url, "--epochs", "400", TRACKING_PATIENCE_SECONDS="120"))
    )
    seen = proxy.count
    process.start()
    while proxy.count == seen:
        time.sleep(0.1)
    proxy.absent = False
    client = MlflowClient(behind)
    while process.is_alive() and not (
        (found := client.get_experiment_by_name(NAME)) and client.search_runs([found.experiment_id])
    ):
        time.sleep(0.1)
    proxy.absent = True  # once more while cells train
    time.sleep(5)
    proxy.absent = False
    process.join()
    assert results[0].returncode == 0, results[0].stderr
    assert "(HTTP 404): 0 of at most 120 s" in results[0].stderr
    runs = client.search_runs([found.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 2
