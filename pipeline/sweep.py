"""The sweep: cells dealt out to workers, trained and tracked, and one results file when all are finished."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from pipeline.claims import Claims
from pipeline.curriculum import CURRICULA
from pipeline.engine import Engine, Row
from pipeline.errors import InputError, WorkError, choices
from pipeline.export import needs_teacher
from pipeline.features import Catalogued
from pipeline.grid import pointing
from pipeline.lanes import LaneError
from pipeline.objectives import terms
from pipeline.options import Cell
from pipeline.processes import Worker
from pipeline.recorder import Recorder, read_row
from pipeline.results import baseline_student, best_exportable, results_of, sections
from pipeline.schedule import shares, stacks_of, training_flops
from pipeline.spool import Spool
from pipeline.stack import PRECISIONS, Progress
from pipeline.storage import write_atomically
from pipeline.student import Student
from pipeline.students import KINDS
from pipeline.students.transformer import HEAD_DIM
from pipeline.tracking import Run, Tracker, TrackingError, patiently

# Whatever changes a number changes the key of a cell: these files are the code version in it.
CODE = (
    "tokenization.py", "reading.py", "features.py", "metrics.py", "objectives.py", "curriculum.py", "noise.py",
    "stack.py", "training.py", "students/kinds.py", "students/mlp.py", "students/transformer.py", "students/ridge.py",
    "students/kernel.py",
)  # fmt: skip


WORDS = {
    "student": tuple(KINDS),
    "precision": ("auto", *PRECISIONS),
    "curriculum": CURRICULA,
    "evaluations": ("every", "log"),
}
SPOOL = ".spool"  # in the output folder
POLL_SECONDS = 2.0  # between two looks at what other workers do
ALONE = Worker()


@dataclass(frozen=True)
class Watcher:
    """What a sweep tells the person who waits: callbacks, silent by default."""

    start: Callable[[Sequence[Cell], Sequence[Cell]], None] = lambda todo, done: None
    progress: Callable[[Progress], None] = lambda step: None
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


@functools.cache
def code_version() -> str:
    """Hash of the code that determines a student."""
    digest = hashlib.sha256()
    for name in CODE:
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()[:16]


def cell_key(cell: Cell, vectors_identity: str) -> str:
    """Identity of a cell's work: configuration, data and code version."""
    content = json.dumps([asdict(cell), vectors_identity, code_version()], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def prepare(cells: Sequence[Cell], data: Catalogued, grid: str | None = None) -> list[Cell]:
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
            raise (error if grid is None else pointing(error, cell, grid)) from None
    return list(dict.fromkeys(ready))  # a grid may ask for the middle block by its number and by default


def _check(cell: Cell, data: Catalogued) -> None:
    terms(cell.objective)
    for option, known in WORDS.items():
        if (word := getattr(cell, option)) not in known:
            raise choices(option, word, known)
    if cell.student == "transformer" and cell.hidden_dim % HEAD_DIM:
        raise InputError(f"--hidden-dim {cell.hidden_dim}: a transformer's is a multiple of {HEAD_DIM}")
    data.check(cell)


def run_sweep(
    name: str,
    cells: Sequence[Cell],
    data: Catalogued,
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
        WorkError: MLflow stayed away; what is finished lies in the spool.
    """
    if not cells:
        raise InputError(f"grid {name}: no cells")
    watcher = watcher or Watcher()
    keys = {cell: cell_key(cell, data.vectors.identity) for cell in cells}
    identity = _identity(name, sweep_id, list(keys.values()), resume)
    finished = tracker.finished_cells() if resume else {}
    rows = {key: read_row(tracker, finished[key]) for key in keys.values() if key in finished}
    if shard.index and _agreed(
        len(rows) == len(cells) and patiently(lambda: tracker.is_concluded(identity, len(cells)))
    ):  # of many shards that find all done, the first is enough
        return Incomplete(identity, len(cells), len(cells)) if accelerator.is_main_process else None
    price = functools.partial(training_flops, data=data)
    mine = [cell for stack in shares(cells, shard.count, price)[shard.index] for cell in stack]
    todo = [cell for cell in mine if keys[cell] not in rows]
    watcher.start(todo, [cell for cell in cells if keys[cell] in rows])
    spool, claims = Spool(output / SPOOL), Claims(tracker, identity)
    tags = {"teacher": data.vectors.teacher, "extraction_key": data.vectors.extraction_key}
    recorder = Recorder(claims, data, spool, keys, tags | {"code_version": code_version()})

    def progress(step: Progress) -> None:
        recorder.progress(step)
        watcher.progress(step)

    with Engine(data, accelerator.device, keys, spool, progress) as engine:
        engine.add(shares(todo, accelerator.num_processes, price)[accelerator.process_index], resume)
        engine.begin()  # while it is being found out who else is there
        tags |= {"grid": name, "vectors_sha256": data.vectors.sha256}
        parent = _open_parent(claims, accelerator, name, tags)
        with claims.join(parent), _closing(claims, recorder, engine):
            if accelerator.is_main_process:
                patiently(lambda: parent.log_params(params))
                uses = (f"vectors {data.vectors.teacher}", data.vectors.sha256, vectors_uri, _profile(data), "training")
                patiently(lambda: parent.log_dataset(*uses))
            _train(engine, recorder, todo, rows, watcher, resume)
            if not accelerator.is_main_process:
                return None
            rows |= recorder.finished_elsewhere([cell for cell in cells if keys[cell] not in rows])
            if len(rows) < len(keys):
                if not claims.others_at_work():
                    parent.leave()
                return Incomplete(identity, len(rows), len(cells))
            results = results_of(name, data, [rows[keys[cell]] for cell in cells], identity)
            leave = functools.partial(_leave, data=data, tracker=tracker, export=export, baselines=baselines)
            sweep = _conclude(results, parent, tracker, output, student_folder, report, leave, register)
            parent.end("FINISHED")
            spool.clear(keys.values())
            return sweep


def _identity(name: str, sweep_id: str | None, keys: Sequence[str], resume: bool) -> str:
    """The sweep's id, the same in all processes; one that repeats finished work is a new sweep."""
    identity = sweep_id or f"{name}-{hashlib.sha256(''.join(keys).encode()).hexdigest()[:8]}"
    if not resume:
        identity += f"-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    return _agreed(identity)


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


@contextlib.contextmanager
def _closing(claims: Claims, recorder: Recorder, engine: Engine) -> Iterator[None]:
    """Close the runs when work is cut short: KILLED on an interruption, FAILED on any other error."""
    try:
        yield
    except BaseException as error:
        engine.lanes.stop()  # first of all, so that the state of the stacks is safe
        if isinstance(error, WorkError) and not isinstance(error, LaneError):
            raise  # MLflow is away; the next to come finds that nobody is at the runs
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        recorder.abandon(status)
        with contextlib.suppress(*TrackingError):
            if not claims.others_at_work():
                recorder.claims.parent_run.end(status)
        raise


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
    files = report(results, path.stem, patiently(lambda: [tracker.student_of(row["run_id"]) for row in best]))
    folder = student_folder or path.with_name(f"{path.stem}_student")
    made = [leave(part.results, folder.with_name(_inserted(folder.name, part.suffix))) for part in parts]

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

    patiently(log)
    return Sweep(results, path, files, [left for left, _ in made], parent)


def _inserted(name: str, suffix: str) -> str:
    """The name of a section's student folder: names that end in ``_student`` go on doing so."""
    stem = name.removesuffix("_student")
    return f"{stem}{suffix}{name[len(stem) :]}"


def _leave(
    results: dict[str, Any], folder: Path, data: Catalogued, tracker: Tracker, export: Export | None, baselines: bool
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
    trained = baseline_student(choice.row, data) if run_id is None else patiently(lambda: tracker.student_of(run_id))
    can_stand_alone = not needs_teacher(Cell(**trained.config["cell"]))
    student = export(trained) if export is not None and can_stand_alone else trained
    student.save(folder)
    return Left(folder, student, choice.reason), run_id is None or student is not trained


def _profile(data: Catalogued) -> str:
    return json.dumps({"concepts": len(data.vectors.concepts), "layers": list(data.vectors.layers)})
