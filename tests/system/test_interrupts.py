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
from conftest import CATALOGUE, ELSEWHERE, SHIPPED, fresh_database
from forked import Command
from mlflow import MlflowClient
from processes import wait_until

pytestmark = pytest.mark.timeout(600)
GONE_SECONDS = 8  # the process ends itself 6 s after the signal at the latest; here other tests run beside it


@contextlib.contextmanager
def running(*arguments, fork=True, program=None):
    """The command, or another program, as a process of its own; the lines of its standard error, as they come."""
    if fork and program is None:
        process = Command(*arguments, new_session=True)
    else:
        process = subprocess.Popen(
            [sys.executable, *(program or ("-m", "pipeline")), *map(str, arguments)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            start_new_session=True, env={**os.environ} if fork else {**os.environ, "PYTHONPATH": ELSEWHERE},
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


def interrupt(process, lines, number):
    """Send the signal, and check that the process and all that it has forked are gone soon, with one line."""
    begin = time.monotonic()
    process.send_signal(number)
    process.wait(timeout=60)
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < begin + 60:
            os.killpg(process.pid, 0)
            time.sleep(0.01)
    took = time.monotonic() - begin
    assert process.returncode == 130, lines
    assert took < GONE_SECONDS, lines
    time.sleep(0.2)
    assert lines[-1].startswith("interrupted: what is finished is kept"), lines
    assert sum("interrupted" in line for line in lines) == 1
    assert not any("Traceback" in line for line in lines)


def found_runs(role):
    client = MlflowClient()
    experiment = client.get_experiment_by_name("activation-distillation")
    return client.search_runs([experiment.experiment_id], f"tags.role = '{role}'") if experiment else []


@pytest.fixture(scope="session")
def many(tiny_folder, tmp_path_factory):
    """Vectors of so many concepts that closed forms on all of them take seconds."""
    folder = tmp_path_factory.mktemp("many")
    path = folder / "many.safetensors"
    command = ("extract", "--teacher", tiny_folder("gpt2"), "--concepts", "wordfreq:en:14000", "--output", path)
    variables = {"MLFLOW_TRACKING_URI": fresh_database(folder / "mlflow.db")}
    Command(*command, environment=variables, folder=folder).finish()
    return path


@pytest.mark.parametrize(
    ("student", "number", "fork"),
    [
        ("kernel", signal.SIGINT, True),
        ("kernel", signal.SIGTERM, False),
        ("mlp", signal.SIGINT, False),
        ("mlp", signal.SIGTERM, True),
    ],
)
def test_a_long_closed_form_is_interrupted(workplace, many, student, number, fork):
    """Of a kernel cell in a process or thread of its own, or of an mlp's baseline, with features that take their time.

    The baseline is solved in the main thread itself.
    """
    inputs = "ngrams" if student == "mlp" else "activations"
    options = ("--concepts", 12000, "--inputs", inputs, "--student", student, "--epochs", 1, "--hidden-dim", 8,
               "--no-report")  # fmt: skip
    with running("train", "--vectors", many, *options, "--output", "mine", fork=fork) as (process, lines):
        if student == "mlp":
            wait_until(lambda: [run for run in found_runs("cell") if run.info.status == "FINISHED"], process)
        else:
            wait_until(lambda: found_runs("cell"), process)
        time.sleep(1)
        interrupt(process, lines, number)
    [parent], [cell] = found_runs("sweep"), found_runs("cell")
    assert parent.info.status == "KILLED"
    assert cell.info.status == ("FINISHED" if student == "mlp" else "KILLED")
    assert not [tag for tag in parent.data.tags if tag.startswith("worker.")]
    assert not list(Path().rglob("*.part"))


LONG_GRID = "fixed: {epochs: 20000, concepts: 700}\naxes: {layers: [0, 2]}\n"


def test_a_sweep_is_interrupted_while_its_workers_look_for_each_other(workplace):
    Path("grid.yaml").write_text(LONG_GRID)
    with running("sweep", "--grid", "grid.yaml", "--vectors", SHIPPED) as (process, lines):
        wait_until(lambda: found_runs("candidate"), process)
        interrupt(process, lines, signal.SIGINT)
    found = [run for role in ("candidate", "sweep", "cell") for run in found_runs(role)]
    assert {run.info.status for run in found} == {"KILLED"}


@pytest.mark.parametrize(("number", "fork"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_descent_is_interrupted_and_goes_on(workplace, number, fork):
    Path("grid.yaml").write_text(LONG_GRID)
    command = ("sweep", "--grid", "grid.yaml", "--vectors", SHIPPED)
    with running(*command, fork=fork) as (process, lines):
        wait_until(lambda: list(Path("results/.spool").glob("*.stack")), process)
        interrupt(process, lines, number)
    [parent], cells = found_runs("sweep"), found_runs("cell")
    assert {run.info.status for run in (parent, *cells)} == {"KILLED"}
    assert not [tag for tag in parent.data.tags if tag.startswith("worker.")]
    assert {path.suffix for path in Path("results/.spool").iterdir()} == {".stack"}


def test_loading_and_extraction_are_interrupted(workplace):
    command = ("extract", "--teacher", "smollm2-135m", "--concepts", CATALOGUE, "--layers", "29", "--output",
               "out.safetensors")  # fmt: skip
    for number, later in ((signal.SIGTERM, 0), (signal.SIGINT, 4)):
        with running(*command) as (process, lines):
            wait_until(lambda lines=lines: any("loading smollm2" in line for line in lines), process)
            time.sleep(later)
            interrupt(process, lines, number)
    assert not Path("out.safetensors").exists()
    assert not list(Path().rglob("*.part"))
    assert [run.info.status for run in found_runs("extract")] == ["KILLED"] * 2


def test_an_interrupted_extraction_goes_on(workplace, tiny_folder):
    templates = [part for verb in ("see", "hear", "know", "want") for part in ("--template", f"I {verb} {{concept}}")]
    command = ("extract", "--teacher", tiny_folder("gpt2"), "--concepts", "wordfreq:en:14000", *templates, "--output",
               "out.safetensors")  # fmt: skip
    with running(*command) as (process, lines):
        wait_until(lambda: list(Path().glob("*.parts-*/*.safetensors")), process)
        interrupt(process, lines, signal.SIGINT)
    parts = {path: path.stat().st_mtime_ns for path in Path().glob("*.parts-*/*.safetensors")}
    with running(*command) as (process, lines):
        wait_until(lambda: any("parts were extracted before" in line for line in lines), process)
        interrupt(process, lines, signal.SIGTERM)
    assert parts
    assert all(path.stat().st_mtime_ns == when for path, when in parts.items())
    assert not list(Path().rglob("*.part"))
    assert [run.info.status for run in found_runs("extract")] == ["KILLED"] * 2


def test_report_evaluation_and_prediction_are_interrupted(workplace, run, small_grid):
    common = ("--vectors", SHIPPED)
    code, _, err = run("sweep", "--grid", small_grid, *common, "--seeds", 2, "--no-report")
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


# What the main thread does while it is interrupted, as a program: `work`, and `close` of what is open.
PROGRAM = """
import sys, time
from pathlib import Path
from pipeline import interrupts

interrupts.END_SECONDS, interrupts.LAST_SECONDS = float(sys.argv[1]), float(sys.argv[4])
Path("half").touch()

def close():
    time.sleep(float(sys.argv[2]))
    Path("closed").touch()

def work():
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt as error:
            if sys.argv[3] == "translate":
                raise ImportError("a library that could not load") from error
            if sys.argv[3] != "swallow":
                raise

try:
    with interrupts.handle_signals():
        if float(sys.argv[2]):
            with interrupts.undo_on_exit(Path("half").unlink), interrupts.close_on_interrupt(close):
                Path("ready").touch()
                work()
        Path("ready").touch()
        work()
except KeyboardInterrupt:
    interrupts.exit_interrupted()
"""


@contextlib.contextmanager
def interrupted_program(end, close, work="raise", last=None):
    with running(end, close, work, end if last is None else last, program=("-c", PROGRAM)) as (process, lines):
        wait_until(Path("ready").exists, process)
        process.send_signal(signal.SIGINT)
        yield process
        assert process.wait(timeout=60) == 130
    assert [line.partition(":")[0] for line in lines] == ["interrupted"]


@pytest.mark.parametrize("work", ["raise", "translate"])
def test_what_is_open_is_closed_whatever_becomes_of_the_interruption(workplace, work):
    with interrupted_program(20, 0.1, work):
        pass
    assert Path("closed").exists()


def test_an_interruption_that_a_library_swallows_ends_the_process(workplace):
    with interrupted_program(1.5, 0.1, "swallow"):
        pass
    assert Path("closed").exists()


def test_an_interruption_that_a_library_swallows_while_nothing_is_open_ends_the_process_soon(workplace):
    with interrupted_program(60, 0, "swallow") as process:
        assert process.wait(timeout=GONE_SECONDS) == 130


@pytest.mark.parametrize("work", ["raise", "swallow"])
def test_closing_that_takes_longer_than_usual_is_waited_for(workplace, work):
    with interrupted_program(0.6, 3, work, last=60):
        pass
    assert Path("closed").exists()


def test_closing_that_takes_too_long_is_not_waited_for(workplace):
    with interrupted_program(1.5, 60):
        pass
    assert not Path("closed").exists()
    assert not Path("half").exists()


def test_a_second_signal_ends_the_process_at_once_and_the_first_handed_on_by_a_launcher_does_not(workplace):
    with interrupted_program(60, 3) as process:
        process.send_signal(signal.SIGINT)  # as of a launcher
        process.send_signal(signal.SIGTERM)
    assert Path("closed").exists()
    for name in ("closed", "ready"):
        Path(name).unlink()
    with interrupted_program(60, 40) as process:
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        process.wait(timeout=60)
        assert time.monotonic() - begin < GONE_SECONDS
