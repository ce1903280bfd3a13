"""The sweep: cells dealt out to workers, trained and tracked, and one results file when all are finished."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from pipeline.data.dataset import Dataset
from pipeline.devices import bfloat16_hint, training_precision
from pipeline.errors import InputError, WorkError, choices
from pipeline.interrupts import close_on_interrupt
from pipeline.processes import Worker
from pipeline.settings import RESULTS_VERSION, Cell
from pipeline.storage import write_atomically
from pipeline.student.student import Student
from pipeline.sweep.cost import shares, stacks_of, training_flops
from pipeline.sweep.engine import Engine, Row
from pipeline.sweep.grid import locate_error
from pipeline.sweep.pool import StackPoolError
from pipeline.sweep.recorder import Recorder, finished_rows
from pipeline.sweep.results import baseline_student, best_exportable, results_of, sections
from pipeline.sweep.spool import Spool
from pipeline.tracking import MlflowRun, Run, Tracker, TrackingError, retry_tracking
from pipeline.tracking.claims import Claims
from pipeline.training.curriculum import CURRICULA
from pipeline.training.export import needs_teacher
from pipeline.training.kinds import KINDS
from pipeline.training.objectives import parse_objective
from pipeline.training.stack import PRECISIONS, EpochResult, precision_of_cell
from pipeline.training.transformer import HEAD_DIM

CHOICES = {
    "student": tuple(KINDS),
    "precision": ("auto", *PRECISIONS),
    "curriculum": CURRICULA,
    "evaluations": ("every", "log"),
}
SPOOL = ".spool"  # in the output folder
POLL_SECONDS = 2.0  # between two looks at what other workers do
ALONE = Worker()
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Watcher:
    """What a sweep tells the person who waits: callbacks, silent by default."""

    start: Callable[[Sequence[Cell], Sequence[Cell]], None] = lambda todo, done: None
    progress: Callable[[EpochResult], None] = lambda step: None
    finished: Callable[[dict[str, Any]], None] = lambda row: None


@dataclass(frozen=True)
class Sweep:
    """A complete sweep.

    Attributes:
        results: the content of the results file.
        path: the results file.
        files: what the report wrote.
        left: the student that each section leaves.
        run: the parent run.
    """

    results: dict[str, Any]
    path: Path
    files: list[Path]
    left: list[Left]
    run: Run


@dataclass(frozen=True)
class Left:
    """A student that a sweep leaves: the best of a section on validation that stands alone.

    Attributes:
        folder: where it is.
        student: the same, from this process.
        reason: what it is and what it was chosen over, in words.
    """

    folder: Path
    student: Student
    reason: str


@dataclass(frozen=True)
class Incomplete:
    """A sweep of which this shard is done, whose results another writes or has written.

    Attributes:
        sweep_id: the sweep.
        finished: cells that are finished.
        cells: all its cells.
    """

    sweep_id: str
    finished: int
    cells: int


Value = TypeVar("Value")
Report = Callable[[dict[str, Any], str, list[Student]], list[Path]]
Export = Callable[[Student], Student]
ALIAS = "best"  # of the registered model's version that a sweep has made last


def cell_key(cell: Cell, vectors_identity: str, automatic: str) -> str:
    """Identity of a cell's work: configuration, data, precision and version of the results.

    Args:
        cell: the configuration.
        vectors_identity: of the data.
        automatic: the precision of cells that leave it open.
    """
    content = [asdict(cell), precision_of_cell(cell, automatic), vectors_identity, RESULTS_VERSION]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def work_key(cells: Sequence[Cell], vectors_identity: str) -> str:
    """Identity of a sweep's work whatever the results version: options with their default may be unknown to another."""
    defaults = {name: field.default for name, field in Cell.__dataclass_fields__.items()}
    chosen = [{name: value for name, value in asdict(cell).items() if value != defaults[name]} for cell in cells]
    content = json.dumps([sorted(json.dumps(cell, sort_keys=True) for cell in chosen), vectors_identity])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def prepare(cells: Sequence[Cell], data: Dataset, grid: str | None = None) -> list[Cell]:
    """Check every cell before any work begins, and name the block of those that name none.

    Args:
        cells: the cells.
        data: the vectors.
        grid: where the cells were read from, for errors that point at the line.

    Raises:
        InputError: a word that no option knows, too many concepts, or a block that the file lacks.
    """
    ready = []
    for cell in cells:
        layer = data.vectors.middle_layer if cell.layer is None else cell.layer
        ready.append(replace(cell, layer=layer))
        try:
            _check(ready[-1], data)
        except InputError as error:
            raise (error if grid is None else locate_error(error, cell, grid)) from None
    return list(dict.fromkeys(ready))  # a grid may ask for the middle block by its number and by default


def _check(cell: Cell, data: Dataset) -> None:
    parse_objective(cell.objective)
    for option, known in CHOICES.items():
        if (word := getattr(cell, option)) not in known:
            raise choices(option, word, known)
    if cell.student == "transformer" and cell.hidden_dim % HEAD_DIM:
        raise InputError(f"--hidden-dim {cell.hidden_dim}: a transformer's is a multiple of {HEAD_DIM}")
    data.check(cell)


def run_sweep(
    name: str,
    cells: Sequence[Cell],
    data: Dataset,
    tracker: Tracker,
    accelerator: Accelerator,
    *,
    params: dict[str, object],
    vectors_uri: str,
    output: Path,
    student_folder: Path | None = None,
    sweep_id: str | None = None,
    resume: bool = True,
    shard: Worker = ALONE,
    report: Report = lambda results, stem, students: [],
    export: Export | None = None,
    baselines: bool = True,
    register: str | None = None,
    watcher: Watcher | None = None,
) -> Sweep | Incomplete | None:
    """Train a shard's cells and track them; once the sweep is complete, write the results file and the best student.

    Any number of workers may be at one sweep: processes of ``accelerate launch``, shards, or the same command twice.

    Args:
        name: the grid's name.
        cells: all cells of the sweep, as `prepare` returns them.
        data: the vectors.
        tracker: where runs go.
        accelerator: device and processes.
        params: the command's options, for the parent run.
        vectors_uri: where the vectors came from, for the record.
        output: folder of the results file.
        student_folder: folder for the student that is left; beside the results file by default.
        sweep_id: a sweep to go on with; by default one that follows from the cells and the data.
        resume: take finished cells over instead of training them again.
        shard: the part of the cells that this command trains.
        report: writes tables and pictures from the results, the beginning of the file names, and the student of each
            section's best cell.
        export: makes a student for any text of a trained one; it is logged below the parent run.
        baselines: leave a baseline where it is the best on validation.
        register: the registered model whose newest version that student becomes.
        watcher: callbacks for a display.

    Returns:
        What has become of the sweep, from the main process.

    Raises:
        InputError: other workers are at the same cells and data with another version of the results.
        WorkError: MLflow stayed away, and what is finished lies in the spool; or a worker on another kind of device
            began the sweep at the same moment.
    """
    if not cells:
        raise InputError(f"grid {name}: no cells")
    watcher = watcher or Watcher()
    # The sweep is the same whatever kind of device its workers have.
    asked = [cell_key(cell, data.vectors.identity, "auto") for cell in cells]
    identity = _identity(name, sweep_id, asked, resume)
    automatic = _agreed(retry_tracking(lambda: _precision(tracker, identity, accelerator.device)))
    keys = {cell: cell_key(cell, data.vectors.identity, automatic) for cell in cells}
    rows, gone = _finished(tracker, set(keys.values()), accelerator) if resume else ({}, [])
    if shard.index and _agreed(
        len(rows) == len(cells) and retry_tracking(lambda: tracker.has_results(identity, len(cells)))
    ):  # of many shards that find all done, the first is enough
        return Incomplete(identity, len(cells), len(cells)) if accelerator.is_main_process else None
    version, work = str(RESULTS_VERSION), work_key(cells, data.vectors.identity)
    spool, claims = Spool(output / SPOOL), Claims(tracker, identity, version, gone)
    check_version = functools.partial(_check_version, claims, work, accelerator, resume and len(rows) < len(cells))
    check_version()
    price = functools.partial(training_flops, data=data)
    mine = [cell for stack in shares(cells, shard.count, price)[shard.index] for cell in stack]
    todo = [cell for cell in mine if keys[cell] not in rows]
    watcher.start(todo, [cell for cell in cells if keys[cell] in rows])
    tags = {"teacher": data.vectors.teacher, "extraction_key": data.vectors.extraction_key, "results_version": version}
    recorder = Recorder(claims, data, spool, keys, dict(tags))
    is_open = any(precision_of_cell(cell, "auto") == "auto" for cell in cells)
    if is_open and todo and (advice := bfloat16_hint("precision: bfloat16", automatic, accelerator.device)):
        log.info(advice)

    def progress(step: EpochResult) -> None:
        recorder.progress(step)
        watcher.progress(step)

    with Engine(data, accelerator.device, keys, spool, progress, automatic) as engine:
        engine.add(shares(todo, accelerator.num_processes, price)[accelerator.process_index], resume)
        engine.begin()  # while it is being found out who else is there
        tags |= {"grid": name, "vectors_sha256": data.vectors.sha256, "work_key": work, "precision": automatic}
        parent = _open_parent(claims, accelerator, name, tags)
        with _closing(claims.below(parent), recorder, engine), claims:
            recorded = _agreed(retry_tracking(lambda: parent.tags.get("precision", automatic)))
            if is_open and recorded != automatic:
                raise WorkError(
                    f"sweep {identity}: a worker on another kind of device began it at the same moment, and recorded "
                    f"the precision {recorded}; start this worker again, and it will keep to that"
                )
            check_version()  # again, now that others see us: of workers that begin at once none saw the others before
            if accelerator.is_main_process:
                retry_tracking(lambda: parent.log_params(params))
                uses = (f"vectors {data.vectors.teacher}", data.vectors.sha256, vectors_uri, _profile(data), "training")
                retry_tracking(lambda: parent.log_dataset(*uses))
            _train(engine, recorder, todo, rows, watcher, resume)
            if not accelerator.is_main_process:
                return None
            rows |= recorder.finished_elsewhere([cell for cell in cells if keys[cell] not in rows])
            if len(rows) < len(keys):
                if not claims.has_live_peers():
                    parent.mark_scheduled()
                return Incomplete(identity, len(rows), len(cells))
            results = results_of(name, data, [rows[keys[cell]] for cell in cells], identity) | {"vectors": vectors_uri}
            leave = functools.partial(_leave, data=data, tracker=tracker, export=export, baselines=baselines)
            sweep = _conclude(results, parent, tracker, output, student_folder, report, leave, register)
            parent.end("FINISHED")
            spool.clear(keys.values())
            return sweep


def _finished(tracker: Tracker, keys: set[str], accelerator: Accelerator) -> tuple[dict[str, Row], list[MlflowRun]]:
    """The rows of cells that are finished, by key, and the runs of those of which MLflow has not all that was there."""
    rows, gone = retry_tracking(lambda: finished_rows(tracker, keys))
    again = {run.data.tags["cell_key"] for run in gone} - set(rows)
    if again and accelerator.is_main_process:
        log.warning("%d finished cells are trained again: their students or rows are gone from MLflow", len(again))
    return rows, gone


def _identity(name: str, sweep_id: str | None, keys: Sequence[str], resume: bool) -> str:
    """The sweep's id, the same in all processes; one that repeats finished work is a new sweep."""
    plain = re.sub(r"[^\w.-]+", "-", name)  # which stands in queries
    identity = sweep_id or f"{plain}-{hashlib.sha256(''.join(keys).encode()).hexdigest()[:8]}"
    if not resume:
        identity += f"-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    return _agreed(identity)


def _precision(tracker: Tracker, identity: str, device: torch.device) -> str:
    """The precision of cells that leave it open: as the sweep's first worker recorded it, or that of the device."""
    own = training_precision(device)
    parent = tracker.find_sweep(identity)
    recorded = own if parent is None else str(parent.data.tags.get("precision", own))
    if recorded != own:
        log.info("sweep %s: precision %s, as its first worker recorded it", identity, recorded)
    return recorded


def _agreed(here: Value) -> Value:
    """What the main process has, in all processes."""
    agreed: list[Value] = broadcast_object_list([here])
    return agreed[0]


def _train(
    engine: Engine, recorder: Recorder, todo: list[Cell], rows: dict[str, Row], watcher: Watcher, resume: bool
) -> None:
    """Train until all of a shard's cells are finished, here or by another worker; ``rows`` takes their rows."""
    keys = recorder.keys
    while todo:
        for row in engine.rows(recorder.take, recorder.flush):
            if done := recorder.finish(row["cell_key"], row):
                rows[done["cell_key"]] = done
                watcher.finished(done)
        # What is left is other workers': theirs until they finish it, ours if they die.
        found = recorder.finished_elsewhere([cell for cell in todo if keys[cell] not in rows])
        rows |= found
        for row in found.values():
            watcher.finished(row)
        todo = [cell for cell in todo if keys[cell] not in rows]
        if todo and not found:
            time.sleep(POLL_SECONDS)
        engine.add(stacks_of(todo), resume)


def _open_parent(claims: Claims, accelerator: Accelerator, name: str, tags: dict[str, str]) -> Run:
    """The parent run, found or made by the main process, the same for all."""
    found = claims.open_parent(name, tags) if accelerator.is_main_process else None
    run_id = _agreed(found.id if found else "")
    return found or Run(claims.tracker.client, run_id, claims.tracker.experiment_id)


def _check_version(claims: Claims, work: str, accelerator: Accelerator, is_needed: bool) -> None:
    """Refuse to train what others train at this moment with another results version."""
    if found := _agreed(claims.find_other_version(work) if is_needed and accelerator.is_main_process else None):
        sweep_id, host, version = found
        raise InputError(
            f"sweep {sweep_id}: {host} is at the same cells and data with results version {version}, and this worker "
            f"has {claims.version}; give all workers one image or checkout (in Kubernetes pin the image's tag), or "
            "wait until that sweep has ended"
        )


@contextlib.contextmanager
def _closing(claims: Claims, recorder: Recorder, engine: Engine) -> Iterator[None]:
    """Close the runs when work is cut short: KILLED on an interruption, FAILED on any other error."""

    def close(status: str) -> None:
        engine.pool.ask_to_stop()  # while they keep their state, the runs are closed
        claims.withdraw()  # before the others are looked for: of workers that leave together, the last finds nobody
        recorder.abandon(status)
        with contextlib.suppress(*TrackingError):
            if not claims.has_live_peers():
                claims.parent_run.end(status)
        engine.pool.stop()

    try:
        with close_on_interrupt(functools.partial(close, "KILLED")):
            yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if isinstance(error, StackPoolError) or not isinstance(error, WorkError):
            close("FAILED")
        raise  # without more after a WorkError: MLflow is away, and the next to come finds that nobody is at the runs


def _conclude(
    results: dict[str, Any],
    parent: Run,
    tracker: Tracker,
    output: Path,
    student_folder: Path | None,
    report: Report,
    leave: Callable[[dict[str, Any], Path], tuple[Left, bool]],
    register: str | None,
) -> Sweep:
    """Write the results file, the report and the students that are left, here and in MLflow.

    All names follow from the results, so workers that end together write the same files.
    """
    path = output / f"{results['grid']}_results_{max(row['finished'] for row in results['cells'])}.json"
    write_atomically(path, lambda part: part.write_text(json.dumps(results, indent=1), encoding="utf-8"))
    parts = sections(results)
    best = [part.results["best"] for part in parts]
    files = report(results, path.stem, [tracker.student_of(row["run_id"]) for row in best])
    folder = student_folder or path.with_name(f"{path.stem}_student")
    made = [leave(part.results, folder.parent / _inserted(folder.name, part.suffix)) for part in parts]

    def log() -> None:
        tags: dict[str, str] = {}
        metrics: dict[str, float] = {"cells": len(results["cells"])}
        for part, row, (left, is_new) in zip(parts, best, made, strict=True):
            if is_new:
                there = tracker.client.get_run(parent.id)
                model_id = parent.log_student(left.folder, there, f"student{part.suffix}")
                if register is not None:
                    version = tracker.register(f"{register}{part.suffix}", model_id, ALIAS)
                    tags[f"registered_model{part.suffix}"] = f"{register}{part.suffix} version {version}"
            metrics |= {f"best_{name}{part.suffix}": row[name] for name in ("val_cosine", "test_cosine")}
            told = {"best_run_id": row["run_id"], "best_cell": row["name"], "best_layer": str(row["layer"])}
            tags |= {f"{name}{part.suffix}": value for name, value in (told | {"student": left.reason}).items()}
        for file in (path, *files):
            parent.log_artifact(file)
        parent.log_metrics(metrics)
        parent.set_tags(tags)

    retry_tracking(log)
    return Sweep(results, path, files, [left for left, _ in made], parent)


def _inserted(name: str, suffix: str) -> str:
    """The name of a section's student folder: names that end in ``_student`` go on doing so."""
    stem = name.removesuffix("_student")
    return f"{stem}{suffix}{name[len(stem) :]}"


def _leave(
    results: dict[str, Any], folder: Path, data: Dataset, tracker: Tracker, export: Export | None, baselines: bool
) -> tuple[Left, bool]:
    """Write the student that a section leaves; and whether no cell's run has it as it is.

    Args:
        results: of the section.
        folder: where to.
        data: the vectors.
        tracker: where the cells' students are.
        export: as in `run_sweep`.
        baselines: as in `run_sweep`.
    """
    choice = best_exportable(results, baselines)
    run_id = choice.row.get("run_id")
    trained = baseline_student(choice.row, data) if run_id is None else tracker.student_of(run_id)
    can_stand_alone = not needs_teacher(Cell(**trained.config["cell"]))
    student = export(trained) if export is not None and can_stand_alone else trained
    student.save(folder)
    return Left(folder, student, choice.reason), run_id is None or student is not trained


def _profile(data: Dataset) -> str:
    return json.dumps({"concepts": len(data.vectors.concepts), "layers": list(data.vectors.layers)})
