"""Workers that are killed, start twice, or lose their tracking server: no result is lost or counted twice."""

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, SHIPPED, free_port, fresh_database, mlflow_server
from forked import Command
from mlflow import MlflowClient
from processes import PATIENCE, wait_until

from pipeline.settings import Cell
from pipeline.student.student import Student
from pipeline.sweep.recorder import Recorder
from pipeline.sweep.spool import Spool
from pipeline.tracking import connect
from pipeline.tracking.claims import Claims, worker_name
from pipeline.training.export import checkpoint
from pipeline.training.trainer import Checkpointing, train_stack

EPOCHS = 12
GRID = f"""
fixed: {{epochs: {EPOCHS}, hidden_dim: 192, precision: float32}}
axes: {{layers: [0, 1, 2], concepts: [150, 300]}}
include:
  - {{student: ridge, concepts: 150}}
"""
CELLS = 7
CPU = torch.device("cpu")


@pytest.fixture
def grid(workplace):
    Path("grid.yaml").write_text(GRID)
    return workplace


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The folder of an undisturbed sweep: its results, its database and its artifacts."""
    home = tmp_path_factory.mktemp("whole")
    (home / "grid.yaml").write_text(GRID)
    finish(sweep(uri=fresh_database(home / "mlflow.db"), folder=home))
    return home


@pytest.fixture(scope="module")
def whole(home):
    """The results of an undisturbed sweep."""
    return results(home / "results")


def database(name="mlflow"):
    """A database in the current folder, by its absolute path: MLflow keeps one connection to each address."""
    return fresh_database(Path.cwd() / f"{name}.db")


OPTIONS = ("--grid", "grid.yaml", "--vectors", str(SHIPPED), "--no-report")


def sweep(*arguments, uri=None, folder=None, **environment):
    """Start a sweep in its own process, in the current folder or another, without a report unless asked for."""
    variables = {"MLFLOW_TRACKING_URI": uri or database(), **environment}
    if "PYTHONPATH" not in environment:
        return Command("sweep", *OPTIONS, *arguments, environment=variables, folder=folder)
    return subprocess.Popen(  # the program from elsewhere
        [sys.executable, "-m", "pipeline", "sweep", *OPTIONS, *arguments], cwd=folder, env={**os.environ, **variables},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    return out


@pytest.fixture
def sweep_here(run):
    """Run a sweep in this process, which has loaded the libraries: ``out = sweep_here("--shard", "1/3")``."""

    def call(*arguments):
        code, out, err = run("sweep", *OPTIONS, *arguments)
        assert code == 0, err
        return out

    return call


def tracked(uri=None):
    """The runs in MLflow: the parents and the cells."""
    client = MlflowClient(uri or database())
    experiment = client.get_experiment_by_name("activation-distillation")
    found = client.search_runs([experiment.experiment_id]) if experiment else []
    return [[run for run in found if run.data.tags.get("role") == role] for role in ("sweep", "cell")]


def check_runs(uri=None):
    """One parent, every cell once, all finished, every epoch logged once."""
    [parent], children = tracked(uri)
    assert parent.info.status == "FINISHED"
    assert Counter(run.info.status for run in children) == {"FINISHED": CELLS}
    assert set(Counter(run.data.tags["cell_key"] for run in children).values()) == {1}
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert not [tag for tag in parent.data.tags if tag.startswith("worker.")]
    client = MlflowClient(uri or database())
    for run in children:
        assert run.outputs.model_outputs
        if run.data.params["student"] == "mlp":
            losses = client.get_metric_history(run.info.run_id, "train_loss")
            assert sorted(entry.step for entry in losses) == list(range(1, EPOCHS + 1))


def results(folder="results"):
    """The metrics and curves of a sweep's cells, without fields that differ from run to run."""
    [path] = Path(folder).glob("*_results_*.json")
    cells = json.loads(path.read_text())["cells"]
    return {
        cell["name"]: {key: cell[key] for key in ("val_cosine", "test_cosine", "test_r2", "curves")} for cell in cells
    }


def equal(one, other):
    assert list(one) == list(other)
    for name, cell in one.items():
        for key in ("val_cosine", "test_cosine", "test_r2"):
            assert cell[key] == pytest.approx(other[name][key], abs=1e-4), name
        for curve, values in cell["curves"].items():
            np.testing.assert_allclose(values, other[name]["curves"][curve], atol=1e-4)


AWAY_SECONDS = float(os.environ.get("TEST_AWAY_SECONDS", "5"))


@pytest.mark.parametrize("kills", [pytest.param(2, marks=pytest.mark.short), 20])
def test_a_sweep_that_is_killed_at_random_moments_ends_as_if_it_were_not(grid, whole, kills):
    draw, finished = random.Random(0), {}
    moments = [3 * (number + draw.random()) / kills for number in range(kills)]  # one in each part of three seconds
    for moment in draw.sample(moments, kills):
        process = sweep()
        time.sleep(moment)
        process.kill()
        process.wait()
        _, children = tracked()
        done = {run.data.tags["cell_key"]: run for run in children if run.info.status == "FINISHED"}
        for key, run in finished.items():  # finished cells do not change
            assert done[key].info.run_id == run.info.run_id
            assert done[key].info.end_time == run.info.end_time
        finished = done
    finish(sweep())
    check_runs()
    equal(results(), whole)
    assert not Path("results/.spool").exists()


def test_what_a_worker_has_left_of_cells_that_mlflow_has_is_cleared_away(home, grid, sweep_here):
    for name in ("mlflow.db", "results"):
        (shutil.copytree if (home / name).is_dir() else shutil.copy)(home / name, name)
    [path] = Path("results").glob("*_results_*.json")
    [key, *_] = [cell["cell_key"] for cell in json.loads(path.read_text())["cells"]]
    for name in (f"{key}.0/cell.json", f"{key}.stack", f".{key}.stack.0.part"):
        Path("results/.spool", name).parent.mkdir(parents=True, exist_ok=True)
        Path("results/.spool", name).touch()
    host, pid, _, place = worker_name().rsplit("/", 3)
    [parent], _ = tracked()
    MlflowClient(database()).set_tag(parent.info.run_id, f"worker.{host}/{pid}/1/{place}", "0")  # never started
    sweep_here()
    check_runs()
    assert not Path("results/.spool").exists()


def test_workers_that_start_at_once_agree_on_one_parent_and_train_every_cell_once(grid):
    uri = f"sqlite:///{Path.cwd()}/new.db"  # neither has created it
    workers = [sweep("--sweep-id", "same", "--output", f"out{number}", uri=uri) for number in range(2)]
    outputs = [finish(worker) for worker in workers]
    check_runs(uri)
    equal(results("out0"), results("out1"))
    assert len({line for out in outputs for line in out.splitlines() if line.startswith("MLflow")}) == 1
    assert not list(Path().glob("out*/.spool"))


@pytest.fixture
def other_code(tmp_path_factory):
    """A copy of the program with another results version: its PYTHONPATH."""
    folder = tmp_path_factory.mktemp("other")
    shutil.copytree(ROOT / "pipeline", folder / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / "pipeline" / "settings.py"
    path.write_text(re.sub(r"^RESULTS_VERSION = .*$", "RESULTS_VERSION = 1000", path.read_text(), flags=re.MULTILINE))
    return f"{folder}{os.pathsep}{os.environ['PYTHONPATH']}"


LONG_GRID = "fixed: {epochs: 100000, hidden_dim: 64}\naxes: {layers: [1, 2], concepts: [150, 300]}\n"


def check_refusal(worker):
    """The last line of a refused worker names both versions and what to do."""
    out, err = worker.communicate(timeout=PATIENCE)
    assert worker.returncode == 2, err
    assert "Traceback" not in out + err
    [versions] = re.findall(
        r"results version (\w+), and this worker has (\w+); .*pin the image's tag", err.splitlines()[-1]
    )
    assert len(set(versions)) == 2
    return versions


def is_running(run):
    return run.info.status == "RUNNING"


def test_a_worker_of_another_results_version_is_refused_while_others_are_at_work(grid, other_code):
    Path("grid.yaml").write_text(LONG_GRID)
    first = other = sweep()
    try:
        wait_until(lambda: tracked()[1])
        _, before = tracked()
        other = sweep("--shard", "1/2", PYTHONPATH=other_code)
        assert check_refusal(other)[0] == before[0].data.tags["results_version"]
        parents, after = tracked()
        assert len(parents) == 1
        assert {run.data.tags["results_version"] for run in after} == {before[0].data.tags["results_version"]}
        assert first.poll() is None
        first.kill()  # a dead worker is no reason to refuse
        other = sweep(PYTHONPATH=other_code)
        old = before[0].data.tags["results_version"]
        wait_until(lambda: [run for run in tracked()[1] if is_running(run) and run.data.tags["results_version"] != old])
    finally:
        for worker in (first, other):
            worker.kill()
            worker.communicate()


@pytest.mark.parametrize("name", [("--sweep-id", "same"), ()], ids=["same id", "own ids"])
def test_of_two_results_versions_that_start_at_once_no_two_train_the_same(grid, other_code, name):
    Path("grid.yaml").write_text(LONG_GRID)
    workers = [sweep(*name, "--output", "own"), sweep(*name, "--output", "others", PYTHONPATH=other_code)]
    try:
        wait_until(lambda: any(worker.poll() is not None for worker in workers))
        for worker in workers:
            if worker.poll() is not None:
                check_refusal(worker)
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def test_a_worker_elsewhere_whose_beat_stands_still_is_dead_whatever_its_version(workplace, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database())
    monkeypatch.setattr("pipeline.tracking.claims.SILENCE_SECONDS", 3.0)
    tracker = connect()
    old, new = Claims(tracker, "old", "1"), Claims(tracker, "new", "2")
    parent = old.open_parent("grid", {"work_key": "same work"})
    tracker.client.set_tag(parent.id, "worker.elsewhere/1/2/3", "7 1")
    assert new.find_other_version("other work") is None
    begin = time.monotonic()
    assert new.find_other_version("same work") is None
    assert time.monotonic() - begin > 3
    assert new.find_other_version("same work") is None  # it is remembered
    assert time.monotonic() - begin < 6
    beating = threading.Timer(1.5, tracker.client.set_tag, (parent.id, "worker.elsewhere/1/2/4", "2 1"))
    tracker.client.set_tag(parent.id, "worker.elsewhere/1/2/4", "1 1")
    beating.start()
    assert new.find_other_version("same work") == ("old", "elsewhere", "1")
    assert Claims(tracker, "third", "1").find_other_version("same work") is None


def test_shards_make_up_the_whole_sweep_and_the_last_one_reports(grid, whole, sweep_here):
    for shard, finished in (("1/3", False), ("0/3", False), ("2/3", True)):
        out = sweep_here("--shard", shard, "--sweep-id", "parts", "--report")
        assert ("the shard that completes the sweep writes the report" in out) != finished
        assert bool(list(Path("results").glob("*.png"))) == finished
        assert tracked()[0][0].info.status == ("FINISHED" if finished else "SCHEDULED")
    check_runs()
    equal(results(), whole)
    shutil.rmtree("results")
    out = sweep_here("--shard", "1/3", "--sweep-id", "parts")
    assert "7 of 7 cells are finished; the report stands in MLflow" in out
    assert not list(Path("results").glob("*"))  # the report is not written again
    check_runs()


def test_a_worker_takes_over_what_a_dead_one_has_left(grid):
    left = sweep("--sweep-id", "left")
    wait_until(lambda: tracked()[1])
    other = sweep("--sweep-id", "left", "--output", "other")
    time.sleep(4)
    left.kill()
    left.communicate()
    finish(other)
    check_runs()


def training_process_of(process):
    """The process that has trained the one cell of a sweep for half a second, if there is one."""
    command = process.cmdline()
    for child in process.children():
        with contextlib.suppress(psutil.NoSuchProcess):  # a copy that has become another program does not count
            if child.cmdline() == command and time.time() - child.create_time() > 0.5:
                return child
    return None


def test_a_training_process_that_is_killed_is_one_line_and_the_same_command_goes_on(workplace, sweep_here):
    Path("grid.yaml").write_text("fixed: {epochs: 600, hidden_dim: 256, concepts: 300, precision: float32}")
    process = sweep()
    wait_until(lambda: training_process_of(psutil.Process(process.pid)), process).kill()
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "Traceback" not in err
    assert "a process was killed by SIGKILL, perhaps for want of memory" in err.splitlines()[-1]
    assert [run.info.status for runs in tracked() for run in runs] == ["FAILED", "FAILED"]
    sweep_here()
    assert [run.info.status for runs in tracked() for run in runs] == ["FINISHED", "FINISHED"]


@pytest.fixture
def port():
    return free_port()


def test_a_tracking_server_that_goes_away_for_a_while_costs_nothing_but_the_wait(grid, port):
    uri = f"http://127.0.0.1:{port}"
    with mlflow_server(port):
        process = sweep(uri=uri)
        wait_until(lambda: tracked(uri)[1])
    time.sleep(AWAY_SECONDS)
    with mlflow_server(port):
        finish(process)
        check_runs(uri)


def test_a_tracking_server_that_stays_away_loses_nothing(grid, port, sweep_here, monkeypatch):
    uri = f"http://127.0.0.1:{port}"
    with mlflow_server(port):
        process = sweep(uri=uri, TRACKING_PATIENCE_SECONDS="8")
        wait_until(lambda: tracked(uri)[1])
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "Traceback" not in err
    assert f"{uri}: has not answered for 8 s" in err.splitlines()[-1]
    spooled = {path.name.split(".")[0]: json.loads(path.joinpath("cell.json").read_text())
               for path in Path("results/.spool").iterdir() if path.is_dir()}  # fmt: skip
    assert spooled
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with mlflow_server(port):
        sweep_here()
        check_runs(uri)
    [path] = Path("results").glob("*_results_*.json")
    rows = {cell["cell_key"]: cell for cell in json.loads(path.read_text())["cells"]}
    for key, row in spooled.items():
        assert rows[key]["train_seconds"] == row["train_seconds"]  # uploaded, not trained again
    assert not Path("results/.spool").exists()


def test_another_worker_may_remove_what_is_finished_while_it_is_being_written(data, tmp_path):
    cell = Cell(concepts=20, hidden_dim=64, layers=1, epochs=2, layer=15)
    subset = data.subset(cell)
    [trained] = train_stack([cell], [subset], CPU)
    student = checkpoint(cell, trained.parameters, subset, data, trained.metrics)
    own, other = Spool(tmp_path / "spool"), Spool(tmp_path / "spool")
    begin = time.perf_counter()
    own.save_cell("key", {}, student)
    takes = time.perf_counter() - begin
    draw = random.Random(0)
    for _ in range(40):
        remover = threading.Timer(draw.random() * takes, other.clear, [["key"]])
        remover.start()
        own.save_cell("key", {}, student)
        remover.join()
    own.save_cell("key", {}, student)
    assert Student.load(own.folder_of("key") / "student").concepts == student.concepts


def test_a_worker_whose_cell_was_taken_over_leaves_what_the_other_has_of_it(data, workplace, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database())
    cell = Cell(concepts=20, hidden_dim=64, layers=1, epochs=2, layer=15)
    subset = data.subset(cell)
    [trained] = train_stack([cell], [subset], CPU)
    student = checkpoint(cell, trained.parameters, subset, data, trained.metrics)
    own, other = Spool(workplace / "spool"), Spool(workplace / "spool")
    tracker = connect()
    claims = Claims(tracker, "same", "1")
    with claims.below(claims.open_parent("grid", {})):
        recorder = Recorder(claims, data, own, {cell: "key"}, {})
        assert recorder.claim([cell]) == [cell]
        own.save_cell("key", {}, student)
        run = recorder.open_runs["key"]
        tracker.client.set_tag(run.id, "owner", "elsewhere/1/2/3")  # who thought this one dead
        other.save_cell("key", {"train_seconds": 1.0}, student)
        assert recorder.upload("key", {}) is None
        assert other.row("key") == {"train_seconds": 1.0}
        assert tracker.client.get_run(run.id).info.status == "RUNNING"


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_stack_that_is_stopped_goes_on_from_its_state(data, tmp_path, dropout):
    base = Cell(concepts=100, hidden_dim=32, layers=1, epochs=8, batch_size=48, layer=15, dropout=dropout)
    cells = [base, Cell(**{**vars(base), "concepts": 200, "seed": 1}), Cell(**{**vars(base), "epochs": 3})]
    subsets = [data.subset(cell) for cell in cells]
    whole = {trained.cell: trained for trained in train_stack(cells, subsets, CPU)}
    spool, keys = Spool(tmp_path / "spool"), {cell: f"key{number}" for number, cell in enumerate(cells)}
    steps = iter(range(1000))
    stop = Checkpointing(None, lambda state: spool.save_snapshot(state, keys, "key0"), lambda: next(steps) == 14)
    early = [trained.cell for trained in train_stack(cells, subsets, CPU, checkpointing=stop)]
    assert early == [cells[2]]
    [(left, state)] = spool.load_snapshots(keys, cells[:2])
    assert set(left) == set(cells[:2])
    assert state.step == 14
    told = []
    again = train_stack(left, [data.subset(cell) for cell in left], CPU, told.append, Checkpointing(start=state))
    for trained in again:
        assert trained.curves == whole[trained.cell].curves
        assert trained.best_epoch == whole[trained.cell].best_epoch
        for name, value in trained.parameters.items():
            torch.testing.assert_close(value, whole[trained.cell].parameters[name], rtol=1e-6, atol=1e-8)
    assert {step.epoch for step in told if step.cell == cells[0]} == set(range(1, 9))
    spool.remove_snapshots({"key0", "key1", "key2"})
    assert not (tmp_path / "spool").exists()


def test_a_state_that_is_damaged_is_passed_over(tmp_path):
    spool = Spool(tmp_path)
    (tmp_path / "key0.stack").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00nonsense")
    assert spool.load_snapshots({Cell(): "key0"}, [Cell()]) == []


def test_a_finished_cell_that_another_worker_on_this_disk_has_removed_is_left_to_it(workplace, data):
    tracker, cell = connect(), Cell()
    claims = Claims(tracker, "sweep", "1")
    with claims.below(claims.open_parent("grid", {})):
        recorder = Recorder(claims, data, Spool(workplace / ".spool"), {cell: "key"}, {})
        assert recorder.claim([cell]) == [cell]
        assert recorder.upload("key", {}) is None
        assert recorder.claim([cell]) == [cell]  # and where that one has not finished it, it is trained again
        claims.close_unfinished("KILLED")
