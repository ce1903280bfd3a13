"""Ctrl-C and SIGTERM in each phase: the process is gone soon, and what is finished is kept."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import CATALOGUE, ROOT, SHIPPED
from mlflow import MlflowClient

pytestmark = pytest.mark.timeout(600)
# It is two seconds on a quiet machine; here other tests run beside it, and what is interrupted takes far longer.
GONE_SECONDS = 15


WITHOUT_FORK = "import os, sys; del os.fork; sys.argv[0] = 'pipeline'; from pipeline.cli import main; main()"


@contextlib.contextmanager
def running(*arguments, fork=True):
    """The command as a process of its own; the lines of its standard error, as they come."""
    program = ["-m", "pipeline"] if fork else ["-c", WITHOUT_FORK]
    process = subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
    )  # fmt: skip
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(iter(process.stderr.readline, "")))
    reader.start()
    try:
        yield process, lines
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join()


def wait_until(condition, process, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "ended before it was interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def interrupt(process, lines, number):
    """Send the signal, and check that the process and all that it has forked are gone soon, with one line."""
    begin = time.monotonic()
    process.send_signal(number)
    process.wait(timeout=60)
    took = time.monotonic() - begin
    assert process.returncode == 130, lines
    assert took < GONE_SECONDS, lines
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    time.sleep(0.2)
    assert lines[-1].startswith("interrupted: what is finished is kept"), lines
    assert not any("Traceback" in line for line in lines)


def found_runs(role):
    client = MlflowClient()
    experiment = client.get_experiment_by_name("activation-distillation")
    return client.search_runs([experiment.experiment_id], f"tags.role = '{role}'") if experiment else []


@pytest.fixture(scope="session")
def many(tiny_folder, tmp_path_factory):
    """Vectors of so many concepts that ridge regression on all of them takes minutes in one call."""
    folder = tmp_path_factory.mktemp("many")
    path = folder / "many.safetensors"
    command = [
        sys.executable, "-m", "pipeline", "extract", "--teacher", tiny_folder("gpt2"), "--concepts",
        "wordfreq:en:14000", "--output", path,
    ]  # fmt: skip
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    subprocess.run(list(map(str, command)), check=True, env=variables, capture_output=True, cwd=folder)
    return path


@pytest.mark.parametrize(
    ("student", "number", "fork"),
    [
        ("ridge", signal.SIGINT, True),
        ("ridge", signal.SIGTERM, False),
        ("mlp", signal.SIGINT, False),
        ("mlp", signal.SIGTERM, True),
    ],
)
def test_a_closed_form_of_minutes_is_interrupted(workplace, many, student, number, fork):
    """Of a ridge cell in a process or thread of its own; after an mlp the ridge baseline, in the main thread itself."""
    options = ("--concepts", 12000, "--student", student, "--epochs", 1, "--hidden-dim", 8, "--no-report")
    with running("train", "--vectors", many, *options, "--output", "mine", fork=fork) as (process, lines):
        if student == "mlp":
            wait_until(lambda: [run for run in found_runs("cell") if run.info.status == "FINISHED"], process)
        else:
            wait_until(lambda: found_runs("cell"), process)
        time.sleep(3)
        interrupt(process, lines, number)
    [parent], [cell] = found_runs("sweep"), found_runs("cell")
    assert parent.info.status == "KILLED"
    assert cell.info.status == ("FINISHED" if student == "mlp" else "KILLED")
    assert not list(Path().rglob("*.part"))


def test_descent_is_interrupted_and_goes_on(workplace):
    Path("grid.yaml").write_text("fixed: {epochs: 20000, concepts: 700}\naxes: {layers: [0, 2]}\n")
    command = ("sweep", "--grid", "grid.yaml", "--vectors", SHIPPED)
    with running(*command) as (process, lines):
        wait_until(lambda: found_runs("cell"), process)
        time.sleep(2)
        interrupt(process, lines, signal.SIGINT)
    assert {run.info.status for run in (*found_runs("sweep"), *found_runs("cell"))} == {"KILLED"}


def test_loading_and_extraction_are_interrupted_and_go_on(workplace):
    command = ("extract", "--teacher", "smollm2-135m", "--concepts", CATALOGUE, "--layers", "29", "--output",
               "out.safetensors", "--template", "Tell me about {concept}", "--template", "What is {concept}",
               "--no-vocabulary")  # fmt: skip
    with running(*command) as (process, lines):
        wait_until(lambda: any("loading smollm2" in line for line in lines), process)
        interrupt(process, lines, signal.SIGTERM)
    with running(*command) as (process, lines):
        wait_until(lambda: list(Path().glob("*.parts-*/*.safetensors")), process)
        interrupt(process, lines, signal.SIGINT)
    assert not Path("out.safetensors").exists()
    assert {run.info.status for run in found_runs("extract")} == {"KILLED"}
    with running(*command) as (process, lines):
        assert process.wait(timeout=300) == 0, lines
    assert any("parts were extracted before" in line for line in lines)


def test_report_evaluation_and_prediction_are_interrupted(workplace, run, small_grid):
    common = ("--vectors", SHIPPED)
    code, _, err = run("sweep", "--grid", small_grid, *common, "--seeds", 5, "--no-report")
    assert code == 0, err
    before = {path: path.stat().st_mtime_ns for path in Path("results").rglob("*")}
    with running("report", *common) as (process, lines):
        wait_until(lambda: list(Path("results").glob("*.png")) or process.poll() is not None, process)
        interrupt(process, lines, signal.SIGINT)
    with running("evaluate", *common, "--teacher", "smollm2-135m") as (process, lines):
        wait_until(lambda: any("loading smollm2" in line for line in lines), process)
        time.sleep(4)
        interrupt(process, lines, signal.SIGTERM)
    assert not list(Path("results").glob("*evaluation*"))
    Path("words.txt").write_text("".join(f"word {number}\n" for number in range(3_000_000)))
    with running("predict", "--file", "words.txt", "--output", "vectors.npy") as (process, lines):
        wait_until(lambda: list(Path().glob(".vectors.npy*")), process)
        time.sleep(2)
        interrupt(process, lines, signal.SIGINT)
    assert not Path("vectors.npy").exists()
    assert not list(Path().glob(".vectors.npy*"))
    assert all(path.stat().st_mtime_ns == when for path, when in before.items() if path.is_file())
