"""A sweep into a real MLflow database: what is there afterwards, resumed, interrupted, or shared by processes."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import mlflow
import numpy as np
import pytest
from conftest import SHIPPED, SMALL_GRID, move_to
from mlflow import MlflowClient
from processes import wait_until

from pipeline import cli
from pipeline.settings import Cell
from pipeline.student.student import Student


@pytest.fixture(scope="module")
def first_sweep(tmp_path_factory):
    """A sweep that several tests look at and none changes: its folder, and what it printed."""
    home, printed = tmp_path_factory.mktemp("swept"), io.StringIO()
    (home / "small.yaml").write_text(SMALL_GRID)
    with pytest.MonkeyPatch.context() as patch:
        move_to(home, patch)
        patch.setattr(sys, "argv", ["pipeline", "sweep", "--grid", "small.yaml", "--vectors", str(SHIPPED)])
        with redirect_stdout(printed), redirect_stderr(printed):
            cli.main()
    return home, printed.getvalue()


@pytest.fixture
def swept(first_sweep, monkeypatch):
    home, printed = first_sweep
    move_to(home, monkeypatch)
    return printed


def runs(status=None):
    client = MlflowClient()
    experiment = client.get_experiment_by_name("activation-distillation")
    found = client.search_runs([experiment.experiment_id])
    parents = [run for run in found if run.data.tags.get("role") == "sweep"]
    children = [run for run in found if run.data.tags.get("role") == "cell"]
    if status:
        assert {run.info.status for run in parents + children} == {status}
    return parents, children


def results(folder="results"):
    return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*_results_*.json"))]


def test_a_sweep_leaves_one_parent_and_a_finished_child_a_cell(swept, vectors):
    [parent], children = runs("FINISHED")
    assert sorted(run.info.run_name for run in children) == [
        "c20-h16-l2-e3-b16-s0", "c20-h8-l2-e3-b16-s0", "c40-h16-l2-e3-b16-s0", "c40-h8-l2-e3-b16-s0",
    ]  # fmt: skip
    client = MlflowClient()
    for child in children:
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.data.params["concepts"] in ("20", "40")
        assert child.data.params["epochs"] == "3"
        # Nothing that a machine decides: parameters cannot change, and another machine may take a cell over.
        assert set(child.data.params) <= {*Cell.__dataclass_fields__, "teacher"}
        assert child.data.tags["dtype"] in ("float32", "bfloat16")
        assert child.data.tags["extraction_key"] == vectors.extraction_key
        assert {"val_cosine", "test_cosine", "test_r2", "test_retrieval_at_5"} <= set(child.data.metrics)
        history = client.get_metric_history(child.info.run_id, "val_cosine")
        assert {entry.step for entry in history} == {1, 2, 3}
        # The last entry is the kept checkpoint's, measured in float32; the epochs have the training's precision.
        kept = child.data.metrics["val_cosine"]
        assert kept == pytest.approx(max(entry.value for entry in history), abs=2e-3)
        assert kept == max(history, key=lambda entry: entry.timestamp).value
    assert parent.data.params["vectors"] == str(SHIPPED)
    assert parent.data.tags["sweep_id"].startswith("small-")
    artifacts = {item.path for item in client.list_artifacts(parent.info.run_id)}
    for part in (
        "_results_",
        "_report.html",
        "_table.md",
        "_scaling.png",
        "_heatmap.png",
        "_curves.png",
        "_alignment.png",
    ):
        assert any(part in path for path in artifacts)
    assert parent.inputs.dataset_inputs[0].dataset.name == "vectors smollm2-135m"


def test_a_logged_model_loads_again_and_predicts_the_same(swept, vectors):
    [parent], children = runs()
    [content] = results()
    best = next(run for run in children if run.info.run_id == content["best"]["run_id"])
    for run in (best, parent):  # a cell has its checkpoint; the parent has what the sweep leaves, loaded last
        model = mlflow.pyfunc.load_model(f"models:/{run.outputs.model_outputs[0].model_id}")
        assert np.isfinite(model.predict(["volcano"])).all()
    [folder] = Path("results").glob("*_student")
    assert Student.load(folder).config["extraction_key"] == vectors.extraction_key
    concepts = list(vectors.concepts[:20])
    served = np.array(model.predict(concepts))
    alone = Student.load(folder)
    assert served.shape == (len(concepts), 576)
    centred = [values - alone.mean for values in (served, alone.encode(concepts))]
    lengths = np.prod([np.linalg.norm(values, axis=1) for values in centred], 0)
    assert ((centred[0] * centred[1]).sum(1) / lengths).min() > 0.999  # 8 bits instead of 32


def test_the_results_file_has_every_cell_and_the_baselines(swept):
    [content] = results()
    assert (content["grid"], content["teacher"], content["layer"]) == ("small", "smollm2-135m", 15)
    keys = {"concepts", "hidden_dim", "layers", "student", "objective", "seed", "parameters", "val_cosine",
            "test_cosine", "train_seconds", "run_id"}  # fmt: skip
    assert len(content["cells"]) == 4
    assert all(keys <= set(cell) for cell in content["cells"])
    baselines = {(row["student"], row["concepts"]) for row in content["baselines"]}
    assert baselines == {(name, n) for name in ("mean", "nearest", "ridge") for n in (20, 40)}
    assert all(row["test_cosine"] == 0 for row in content["baselines"] if row["student"] == "mean")
    assert content["best"]["val_cosine"] == max(cell["val_cosine"] for cell in content["cells"])
    assert "ridge regression" in swept
    assert "(nearest)" in swept.replace("\n", "")


@pytest.mark.system
def test_a_repeated_sweep_trains_nothing_again(workplace, run, small_grid):
    for before in ("", "4 of 4 cells were finished before"):
        code, _, err = run("sweep", "--grid", small_grid, "--vectors", SHIPPED, "--no-report")
        assert code == 0, err
        assert before in err
    parents, children = runs("FINISHED")
    assert (len(parents), len(children)) == (1, 4)
    time.sleep(1)  # names of results files have seconds
    code, _, err = run("sweep", "--grid", small_grid, "--vectors", SHIPPED, "--no-report", "--no-resume")
    assert code == 0, err
    parents, children = runs("FINISHED")
    assert (len(parents), len(children)) == (2, 8)
    assert not list(Path("results").glob("*.png"))
    first, *_, last = results()
    for before, after in zip(first["cells"], last["cells"], strict=True):
        assert before["run_id"] != after["run_id"]
        assert before["val_cosine"] == pytest.approx(after["val_cosine"], abs=1e-5)


@pytest.mark.system
def test_a_report_can_be_drawn_again_from_the_file_and_from_mlflow(swept, run):
    [content] = results()
    code, _, err = run("report", "--vectors", SHIPPED, "--output", "again")
    assert code == 0, err
    assert len(list(Path("again").glob("*.png"))) == 6
    code, _, err = run("report", "--sweep-id", content["sweep_id"], "--vectors", SHIPPED, "--output", "remote")
    assert code == 0, err
    table = next(Path("remote").glob("*_table.md")).read_text()
    assert table == next(Path("results").glob("*_table.md")).read_text()
    assert table.count("| mlp |") == 2 * 4  # of configurations and of cells
    assert table.count("| (ridge) |") == 2 * 2
    assert run("report", "--sweep-id", "no-such", "--vectors", SHIPPED)[0] == 2


@pytest.mark.system
def test_train_is_a_sweep_of_one_cell(workplace, run):
    arguments = ("train", "--vectors", SHIPPED, "--concepts", 30, "--hidden-dim", 8, "--epochs", 2, "--output", "mine")
    code, _, err = run(*arguments)
    assert code == 0, err
    _, [child] = runs("FINISHED")
    assert child.info.run_name == "c30-h8-l2-e2-s0"
    assert Student.load("mine").config["metrics"]["test_cosine"] == pytest.approx(
        child.data.metrics["test_cosine"], abs=1e-3
    )
    code, _, err = run("train", "--vectors", SHIPPED, "--student", "ridge", "--concepts", 50, "--no-report", "--output",
                       "linear")  # fmt: skip
    assert code == 0, err
    assert Student.load("linear").config["student"] == "ridge"


@pytest.mark.system
def test_a_name_with_dots_and_quotes_is_whole_in_all_that_is_left_and_hides_nothing(workplace, run, monkeypatch):
    grid = Path(".it's 0.1.v2.yaml")
    grid.write_text("fixed: {student: ridge, concepts: 30}")
    code, _, err = run("sweep", "--grid", grid, "--vectors", SHIPPED, "--no-report", "--output", "out.v1")
    assert code == 0, err
    [path] = Path("out.v1").glob("*.json")
    assert path.name.startswith("_.it's 0.1.v2_results_")
    student = f"{path.name.removesuffix('.json')}_student"
    cosines = f"{path.name.removesuffix('.json')}_test_cosines.npz"
    assert {left.name for left in Path("out.v1").iterdir()} == {path.name, cosines, student}
    code, _, err = run("report", "--sweep-id", json.loads(path.read_text())["sweep_id"], "--vectors", SHIPPED)
    assert code == 0, err
    monkeypatch.chdir(Path("out.v1", student))
    code, _, err = run("evaluate", "--run", ".", "--vectors", SHIPPED, "--output", "../../told")
    assert code == 0, err
    assert {left.name.partition("_evaluation_")[0] for left in (workplace / "told").iterdir()} == {student}


def test_a_student_may_be_left_in_the_current_folder(workplace, run):
    code, _, err = run("train", "--vectors", SHIPPED, "--student", "ridge", "--concepts", 30, "--no-report", "--output",
                       ".")  # fmt: skip
    assert code == 0, err
    assert Student.load(".").config["student"] == "ridge"


GRID_OF_MANY = """
fixed: {concepts: 300, epochs: 20, hidden_dim: 512}
axes: {layers: [0, 1, 2, 3, 4, 5]}
"""


def environment(workplace):
    return {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{workplace}/mlflow.db"}


def cpu_seconds(pid):
    """What a process has used of the cores so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.system
def test_an_interrupted_sweep_keeps_finished_cells_and_is_marked_killed(workplace, run):
    Path("many.yaml").write_text(GRID_OF_MANY)
    MlflowClient().search_experiments()  # makes the database
    common = ["--grid", "many.yaml", "--no-report", "--vectors", str(SHIPPED)]
    command = [sys.executable, "-m", "pipeline", "sweep", *common]
    finished = 0
    for stop in (signal.SIGINT, signal.SIGTERM):
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        ended = used.ru_utime + used.ru_stime  # by processes before this one
        process = subprocess.Popen(command, env=environment(workplace), stderr=subprocess.PIPE, text=True)
        wait_until(lambda known=finished: finished_children() > known, process, step=0.2)
        before = cpu_seconds(process.pid)
        process.send_signal(stop)
        error = process.communicate(timeout=30)[1]  # what Kubernetes gives
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert used.ru_utime + used.ru_stime - ended - before < 10  # of a core: other tests take their share of time
        assert process.returncode == 130, error
        assert "Traceback" not in error
        [parent], children = runs()
        # RUNNING where other tests take so much of the cores that the runs cannot be closed in the time that there is.
        assert parent.info.status in ("KILLED", "RUNNING")
        assert {run.info.status for run in children} <= {"FINISHED", "KILLED", "RUNNING"}
        assert finished < finished_children() < 6
        finished = finished_children()
        assert not list(Path("results").glob("*.json"))
    code, _, err = run("sweep", *common)
    assert code == 0, err
    assert f"{finished} of 6 cells were finished before" in err
    [parent], _ = runs()
    assert parent.info.status == "FINISHED"
    assert finished_children() == 6


def finished_children():
    if MlflowClient().get_experiment_by_name("activation-distillation") is None:
        return 0
    return sum(run.info.status == "FINISHED" for run in runs()[1])


@pytest.mark.system
def test_several_processes_share_the_cells_and_log_one_run(workplace, small_grid):
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines",
        "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "pipeline",
        "sweep", "--grid", str(small_grid), "--vectors", str(SHIPPED), "--no-report",
    ]  # fmt: skip
    variables = environment(workplace) | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    parents, children = runs("FINISHED")
    assert (len(parents), len(children)) == (1, 4)
    [content] = results()
    assert len({cell["run_id"] for cell in content["cells"]}) == 4
