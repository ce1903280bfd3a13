"""Deleted experiments, runs, students and artifacts, and runs and experiments that the environment names."""

import shutil
from pathlib import Path

import pytest
from conftest import SHIPPED
from mlflow import MlflowClient

from pipeline.errors import WorkError
from pipeline.settings import Cell
from pipeline.sweep.recorder import Recorder
from pipeline.sweep.spool import Spool
from pipeline.tracking import connect, retry_tracking
from pipeline.tracking.claims import Claims

NAME = "activation-distillation"
GRID = "axes: {concepts: [20, 30, 40, 50]}\nfixed: {student: ridge}\n"
UNKNOWN = "0123456789abcdef0123456789abcdef"
TRAIN = ("train", "--vectors", SHIPPED, "--concepts", 30, "--student", "ridge", "--no-report")


def experiment(client, name=NAME):
    return client.get_experiment_by_name(name).experiment_id


def refused(run, *command):
    """Run a command that is refused; returns the line that says why."""
    code, _, err = run(*command)
    assert code == 2, err
    assert "Traceback" not in err
    return err.splitlines()[-1]


@pytest.mark.parametrize("variable", [None, "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"])
def test_a_deleted_experiment_is_one_line_with_what_brings_it_back(workplace, run, monkeypatch, variable):
    client = MlflowClient()
    deleted = client.create_experiment("mine" if variable else NAME)
    client.delete_experiment(deleted)
    if variable:
        monkeypatch.setenv(variable, "mine" if variable.endswith("NAME") else deleted)
    line = refused(run, *TRAIN)
    assert f"was deleted; bring it back with: mlflow experiments restore --experiment-id {deleted}" in line
    assert not list(Path("results").glob("*"))
    client.restore_experiment(deleted)
    code, _, err = run(*TRAIN)
    assert code == 0, err
    assert len(client.search_runs([deleted])) == 2


@pytest.mark.system
def test_a_student_is_read_from_mlflow_though_the_experiment_of_the_command_was_deleted(workplace, run):
    code, _, err = run(*TRAIN)
    assert code == 0, err
    client = MlflowClient()
    [cell] = client.search_runs([experiment(client)], "tags.role = 'cell'")
    other = client.create_experiment("other")
    client.delete_experiment(other)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_EXPERIMENT_NAME", "other")
        patch.setenv("MLFLOW_RUN_ID", UNKNOWN)  # a command that writes no run ignores it
        code, _, err = run("predict", "--run", f"runs:/{cell.info.run_id}", "volcano", "--output", "out.npy")
    assert code == 0, err


@pytest.fixture
def opened(workplace):
    """A run that the environment may name, in an experiment of its own."""
    client = MlflowClient()
    return client, client.create_run(client.create_experiment("mine")).info


def test_a_run_of_the_environment_that_is_not_there_is_one_line(opened, run, monkeypatch):
    client, info = opened
    for run_id in (UNKNOWN, "no/id"):
        monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
        assert f"MLFLOW_RUN_ID {run_id}: sqlite:" in (line := refused(run, *TRAIN))
        assert line.endswith("has no such run; unset the variable")
    monkeypatch.setenv("MLFLOW_RUN_ID", info.run_id)
    client.delete_run(info.run_id)
    assert f"was deleted; bring it back with: mlflow runs restore --run-id {info.run_id}" in refused(run, *TRAIN)
    client.delete_experiment(info.experiment_id)
    assert f"mlflow experiments restore --experiment-id {info.experiment_id}" in refused(run, *TRAIN)
    assert not list(Path("results").glob("*"))


@pytest.mark.system
def test_a_run_of_the_environment_takes_its_experiment_along_unless_another_is_named(opened, run, monkeypatch):
    client, info = opened
    monkeypatch.setenv("MLFLOW_RUN_ID", info.run_id)
    other = client.create_experiment("other")
    for name, value in (("MLFLOW_EXPERIMENT_NAME", "other"), ("MLFLOW_EXPERIMENT_ID", other)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(name, value)
            assert f"is a run of experiment {info.experiment_id}, and not of 'other'" in refused(run, *TRAIN)
    code, _, err = run(*TRAIN)
    assert code == 0, err
    assert {found.data.tags["role"] for found in client.search_runs([info.experiment_id])} == {"sweep", "cell"}
    assert client.get_run(info.run_id).data.tags["role"] == "sweep"


@pytest.mark.system
def test_a_run_of_the_environment_that_holds_other_work_stays_as_it_is(opened, run, monkeypatch):
    client, info = opened
    monkeypatch.setenv("MLFLOW_RUN_ID", info.run_id)
    for _ in range(2):  # a repeated sweep goes on in its own run
        code, _, err = run(*TRAIN)
        assert code == 0, err
    before = client.get_run(info.run_id).to_dictionary()
    [cell] = client.search_runs([info.experiment_id], "tags.role = 'cell'")
    assert "holds what an earlier command tracked (train)" in refused(run, *TRAIN, "--concepts", 20)
    assert "holds what an earlier command tracked (train)" in refused(run, "evaluate", "--run", "results")
    monkeypatch.setenv("MLFLOW_RUN_ID", cell.info.run_id)
    assert "holds what an earlier command tracked (c30" in refused(run, *TRAIN)
    assert client.get_run(info.run_id).to_dictionary() == before


@pytest.mark.system
def test_an_experiment_of_the_environment_that_is_not_there_is_one_line(workplace, run, monkeypatch):
    client = MlflowClient()
    there = client.create_experiment("mine")
    for value in ("99", "mine"):
        monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", value)
        assert f"MLFLOW_EXPERIMENT_ID {value}: sqlite:" in (line := refused(run, *TRAIN))
        assert line.endswith(f"has no experiment {value}; unset the variable")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", there)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "other")
    line = refused(run, *TRAIN)
    assert f"MLFLOW_EXPERIMENT_ID {there}: is the experiment 'mine', and MLFLOW_EXPERIMENT_NAME 'other' another" in line
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    code, _, err = run(*TRAIN)
    assert code == 0, err


@pytest.fixture
def swept(workplace, run):
    """A function that repeats a sweep of four cells, which has run."""
    Path("grid.yaml").write_text(GRID)

    def sweep():
        code, _, err = run("sweep", "--grid", "grid.yaml", "--vectors", SHIPPED, "--no-report")
        assert code == 0, err
        assert "Traceback" not in err

    sweep()
    return sweep


def cells(client):
    return client.search_runs([experiment(client)], "tags.role = 'cell' and attributes.status = 'FINISHED'")


def finished(client):
    """Run id and end time of each finished cell, by name, once its student has been read."""
    found = cells(client)
    assert len(found) == 4
    tracker = connect()
    for one in found:
        assert tracker.student_of(one.info.run_id).config["student"] == "ridge"
    return {one.info.run_name: (one.info.run_id, one.info.end_time) for one in found}


def models(client):
    return {model.source_run_id: model for model in client.search_logged_models([experiment(client)])}


@pytest.mark.system
def test_finished_cells_without_student_or_row_are_trained_again(swept, caplog):
    client = MlflowClient()
    before, held = finished(client), models(client)
    whole, deleted, short, rowless = before
    client.delete_logged_model(held[before[deleted][0]].model_id)
    next(Path(held[before[short][0]].artifact_location).rglob("model.safetensors")).unlink()
    (Path(client.get_run(before[rowless][0]).info.artifact_uri) / "cell.json").unlink()
    swept()
    assert "3 finished cells are trained again: their students or rows are gone from MLflow" in caplog.text
    after = finished(client)
    assert {name for name in before if before[name] == after[name]} == {whole}
    assert {name: run_id for name, (run_id, _) in after.items()} == {
        name: run_id for name, (run_id, _) in before.items()
    }
    caplog.clear()
    swept()
    assert "trained again" not in caplog.text
    assert finished(client) == after


def test_a_run_that_is_deleted_while_its_cell_trains_causes_no_traceback(workplace, data):
    tracker, cell = connect(), Cell()
    claims = Claims(tracker, "sweep", "1")
    with claims.below(claims.open_parent("grid", {})):
        recorder = Recorder(claims, data, Spool(workplace / ".spool"), {cell: "key"}, {})
        assert recorder.claim([cell]) == [cell]
        tracker.client.delete_run(recorder.open_runs["key"].id)
        assert recorder.upload("key", {}) is None
        assert recorder.claim([cell]) == [cell]  # in a run of its own
        tracker.client.delete_experiment(tracker.experiment_id)
        with pytest.raises(WorkError, match="deleted from MLflow meanwhile"):
            retry_tracking(lambda: claims.parent_run.set_tags({"a": "b"}))


@pytest.mark.system
def test_a_sweep_whose_students_were_all_deleted_is_trained_again(swept, run):
    client = MlflowClient()
    [parent] = client.search_runs([experiment(client)], "tags.role = 'sweep'")
    for model in client.search_logged_models([experiment(client)]):
        client.delete_logged_model(model.model_id)
    [cell, *_] = cells(client)
    for command in (
        ("predict", "--run", f"runs:/{cell.info.run_id}", "volcano"),
        ("evaluate", "--vectors", SHIPPED),
        ("report", "--sweep-id", parent.data.tags["sweep_id"], "--vectors", SHIPPED),
    ):
        assert "its student is gone from MLflow; the same sweep again trains it again" in refused(run, *command)
    swept()
    finished(client)
    assert [one.info.run_id for one in client.search_runs([experiment(client)], "tags.role = 'sweep'")] == [
        parent.info.run_id
    ]
    code, _, err = run("predict", "--run", f"runs:/{parent.info.run_id}", "volcano", "--output", "out.npy")
    assert code == 0, err


@pytest.mark.system
def test_a_sweep_whose_artifacts_were_all_removed_is_trained_again(swept, run, caplog):
    client = MlflowClient()
    [parent] = client.search_runs([experiment(client)], "tags.role = 'sweep'")
    shutil.rmtree("mlruns")
    line = refused(run, "report", "--sweep-id", parent.data.tags["sweep_id"], "--vectors", SHIPPED)
    assert "has no results file" in line
    swept()
    assert "4 finished cells are trained again" in caplog.text
    finished(client)
    code, _, err = run("report", "--sweep-id", parent.data.tags["sweep_id"], "--vectors", SHIPPED)
    assert code == 0, err


def test_cells_whose_parent_was_deleted_are_below_the_run_that_goes_on_with_the_sweep(swept):
    client = MlflowClient()
    [parent] = client.search_runs([experiment(client)], "tags.role = 'sweep'")
    before = finished(client)
    client.delete_run(parent.info.run_id)
    swept()
    assert finished(client) == before
    [again] = client.search_runs([experiment(client)], "tags.role = 'sweep'")
    assert {cell.data.tags["mlflow.parentRunId"] for cell in cells(client)} == {again.info.run_id}
