"""A tracking server that demands credentials, starts late, goes away, or has lost students."""

import base64
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from conftest import SECRET, SHIPPED, free_port, mlflow_server
from faults import Faulty
from mlflow import MlflowClient

from pipeline.tracking import connect

NAMES = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
BASIC = {"MLFLOW_TRACKING_USERNAME": "somebody", "MLFLOW_TRACKING_PASSWORD": SECRET}
TOKEN = {"MLFLOW_TRACKING_TOKEN": SECRET}
ENCODED = base64.b64encode(f"somebody:{SECRET}".encode()).decode()


@pytest.fixture
def train(workplace, run, monkeypatch):
    """Train one small student with a server: ``code, out, err = train(uri, "--seed", 1, NAME="value")``."""

    def call(uri, *arguments, **environment):
        common = ("--vectors", SHIPPED, "--epochs", 2, "--concepts", 40, "--no-report")
        with monkeypatch.context() as patch:
            for name in NAMES:
                patch.delenv(name, raising=False)
            for name, value in {"MLFLOW_TRACKING_URI": uri, **environment}.items():
                patch.setenv(name, value)
            return run("train", *common, *arguments)

    return call


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The port of a real tracking server, and its folder."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    with mlflow_server(port, folder):
        yield port, folder


@pytest.fixture
def locked(server, request, monkeypatch):
    """A proxy that can demand credentials, and the address of the server behind it; each test has an experiment."""
    port, _ = server
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", request.node.name)
    proxy = Faulty(port)
    yield proxy, f"http://127.0.0.1:{port}"
    proxy.close()


def found_runs(client, name="activation-distillation"):
    experiment = client.get_experiment_by_name(name)
    return client.search_runs([experiment.experiment_id]) if experiment else []


def test_credentials_are_used_and_written_nowhere(locked, server, workplace, train, request):
    proxy, behind = locked
    for number, (right, authorization) in enumerate(((BASIC, f"Basic {ENCODED}"), (TOKEN, f"Bearer {SECRET}"))):
        proxy.authorization, proxy.refused = authorization, 0
        for wrong in ({}, {name: f"not-{value}" for name, value in right.items()}):
            code, out, err = train(proxy.url, **wrong)
            assert code == 2
            assert "the server denies access" in err.splitlines()[-1]
            assert "MLFLOW_TRACKING_TOKEN" in err.splitlines()[-1]
            assert not any(secret in out + err for secret in (SECRET, ENCODED, "Traceback"))
        before = proxy.refused
        report = "--no-report" if number else "--report"
        code, out, err = train(proxy.url, "--seed", number, "--output", f"student{number}", report, **right)
        assert code == 0, err
        assert proxy.refused == before > 0
        assert not any(secret in out + err for secret in (SECRET, ENCODED))
    runs = found_runs(MlflowClient(behind), request.node.name)
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert len(runs) == 4  # two sweeps of one cell
    _, folder = server
    files = [path for place in (workplace, folder) for path in place.rglob("*") if path.is_file()]
    assert {"server.db", "model.safetensors", "student0"} <= {name for path in files for name in path.parts}
    for path in files:  # database, artifacts, students, reports
        held = path.read_bytes()
        assert SECRET.encode() not in held, path
        assert ENCODED.encode() not in held, path


def test_a_token_that_expires_during_training_is_reported_in_one_line_and_loses_nothing(locked, train, request):
    proxy, behind = locked
    proxy.authorization = f"Bearer {SECRET}"
    client = MlflowClient(behind)

    def expire():
        while not found_runs(client, request.node.name):
            time.sleep(0.1)
        proxy.authorization = "Bearer of-tomorrow"

    thread = threading.Thread(target=expire, daemon=True)
    thread.start()
    code, _, err = train(proxy.url, **TOKEN)
    thread.join(60)
    assert code == 1
    assert "the server denies access" in err.splitlines()[-1]
    assert "Traceback" not in err
    code, _, err = train(proxy.url, MLFLOW_TRACKING_TOKEN="of-tomorrow")
    assert code == 0, err
    assert [run.info.status for run in found_runs(client, request.node.name)] == ["FINISHED"] * 2


def test_a_command_waits_for_a_server_that_starts_late(workplace, train, caplog):
    port, done = free_port(), threading.Event()
    uri = f"http://127.0.0.1:{port}"
    code, _, err = train(uri, TRACKING_PATIENCE_SECONDS="1")
    assert code == 1  # not 2, wrong input: a Kubernetes job tries again
    assert f"{uri}: has not answered for 1 s" in err.splitlines()[-1]
    assert "Traceback" not in err

    def serve():
        time.sleep(1)  # longer than the command needs to look
        with mlflow_server(port):
            done.wait(300)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        code, out, err = train(uri, TRACKING_PATIENCE_SECONDS="120")
        assert code == 0, err
        runs = found_runs(MlflowClient(uri))
    finally:
        done.set()
        thread.join()
    assert f"waiting for the tracking server {uri} (nothing answers there): 0 of at most 120 s" in caplog.text
    assert "Retry" not in err + caplog.text  # our own log lines only
    assert "make ui" not in out  # the run is on a server
    assert f"{uri}/#/experiments/" in out
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert Path("results").is_dir()


def test_a_command_waits_for_an_ingress_without_a_server_behind_it(locked, train, request, caplog):
    proxy, behind = locked
    proxy.absent = True
    code, _, err = train(proxy.url)
    assert code == 2  # at a terminal a wrong address is reported at once
    assert "error code 404" in err.splitlines()[-1]
    code, _, err = train(proxy.url, TRACKING_PATIENCE_SECONDS="1")
    assert code == 1
    assert "has not answered for 1 s (HTTP 404)" in err.splitlines()[-1]
    client, seen = MlflowClient(behind), proxy.count

    def come_and_go():
        while proxy.count == seen:
            time.sleep(0.1)
        proxy.absent = False
        while not found_runs(client, request.node.name):
            time.sleep(0.1)
        proxy.absent = True  # once more while cells train
        time.sleep(5)
        proxy.absent = False

    thread = threading.Thread(target=come_and_go, daemon=True)
    thread.start()
    code, _, err = train(proxy.url, "--epochs", 400, TRACKING_PATIENCE_SECONDS="120")
    thread.join(60)
    assert code == 0, err
    assert "(HTTP 404): 0 of at most 120 s" in caplog.text
    assert "tracking is out of reach, training goes on" in caplog.text
    assert [run.info.status for run in found_runs(client, request.node.name)] == ["FINISHED"] * 2


def test_lost_students_of_a_server_are_found_in_four_requests(locked, server, workplace, run, monkeypatch, caplog):
    proxy, behind = locked
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
    client = MlflowClient(behind)
    Path("grid.yaml").write_text("axes: {concepts: [20, 30, 40, 50]}\nfixed: {student: ridge}\n")

    def sweep():
        code, _, err = run("sweep", "--grid", "grid.yaml", "--vectors", SHIPPED, "--no-report")
        assert code == 0, err
        experiment = client.get_experiment_by_name(os.environ["MLFLOW_EXPERIMENT_NAME"]).experiment_id
        cells = client.search_runs([experiment], "tags.role = 'cell' and attributes.status = 'FINISHED'")
        models = {model.source_run_id: model for model in client.search_logged_models([experiment])}
        return {cell.info.run_id: cell.data.tags["cell_key"] for cell in cells}, models

    keys, before = sweep()
    sweep_id = client.get_run(next(iter(keys))).data.tags["sweep_id"]
    lost, deleted, *_ = sorted(keys)
    shutil.rmtree(next((server[1] / "artifacts").rglob(before[lost].model_id)))
    client.delete_logged_model(before[deleted].model_id)
    _, after = sweep()
    assert "2 finished cells are trained again" in caplog.text
    assert set(after) == set(before)
    tracker, seen = connect(), proxy.count
    whole, gone = tracker.finished_cells(set(keys.values()), sweep_id)
    assert (len(whole), len(gone)) == (4, 0)
    assert proxy.count - seen == 4  # the sweep's runs, students of the keys, students of the runs, files
