"""The sweep: cells into stacks, stacks through the trainer, every finished cell into MLflow, and one results file."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from pipeline.errors import InputError, choices
from pipeline.features import Catalogued, Subset
from pipeline.metrics import by_category, faithfulness
from pipeline.objectives import OBJECTIVES
from pipeline.options import Cell
from pipeline.schedule import shares, training_flops
from pipeline.storage import write_atomically
from pipeline.students import STUDENTS, Student, ridge
from pipeline.students.baselines import BASELINES
from pipeline.tracking import Run, Tracker, closing
from pipeline.training import PRECISIONS, Progress, Trained, predict, train_stack

# Whatever changes a number changes the key of a cell: these files are the code version in it.
CODE = ("features.py", "metrics.py", "objectives.py", "training.py", "students/mlp.py", "students/ridge.py")


@dataclass(frozen=True)
class Watcher:
    """What a sweep tells the person who waits: callbacks, silent by default."""

    start: Callable[[Sequence[Cell], Sequence[Cell]], None] = lambda todo, done: None
    progress: Callable[[Progress], None] = lambda step: None
    finished: Callable[[dict[str, Any]], None] = lambda row: None


@dataclass(frozen=True)
class Sweep:
    """A finished sweep.

    Attributes:
        results: the content of the results file.
        path: the results file.
        files: what the report wrote.
        student_folder: the best student.
        run: the parent run.
    """

    results: dict[str, Any]
    path: Path
    files: list[Path]
    student_folder: Path
    run: Run


Report = Callable[[dict[str, Any], str, Student], list[Path]]


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


def prepare(cells: Sequence[Cell], data: Catalogued) -> list[Cell]:
    """Check every cell before any work begins, and name the block of those that name none.

    Raises:
        InputError: an unknown student, objective or precision, too many concepts, or a block that the file lacks.
    """
    ready = []
    for cell in cells:
        if cell.student not in STUDENTS:
            raise choices("student", cell.student, STUDENTS)
        if cell.objective not in OBJECTIVES:
            raise choices("objective", cell.objective, OBJECTIVES)
        if cell.precision not in ("auto", *PRECISIONS):
            raise choices("precision", cell.precision, ["auto", *PRECISIONS])
        layer = data.vectors.middle_layer if cell.layer is None else cell.layer
        data.check(cell.concepts, layer)
        ready.append(replace(cell, layer=layer))
    return ready


def run_sweep(
    name: str,
    cells: Sequence[Cell],
    data: Catalogued,
    tracker: Tracker | None,
    accelerator: Accelerator,
    *,
    params: dict[str, object],
    vectors_uri: str,
    output: Path,
    student_folder: Path | None = None,
    sweep_id: str | None = None,
    resume: bool = True,
    report: Report = lambda results, stem, student: [],
    watcher: Watcher | None = None,
) -> Sweep | None:
    """Train all cells, track them, and write the results file and the best student's folder.

    Several processes share the stacks; only the main process has a tracker, writes, and returns a result.

    Args:
        name: the grid's name.
        cells: what to train, as `prepare` returns them.
        data: the vectors.
        tracker: where runs go; None in every process but the main one.
        accelerator: device, precision and processes.
        params: the command's options, for the parent run.
        vectors_uri: where the vectors came from, for the record.
        output: folder of the results file.
        student_folder: folder for the best student; beside the results file by default.
        sweep_id: a sweep to go on with; by default one that follows from the cells and the data.
        resume: take finished cells over instead of training them again.
        report: writes tables and pictures from the results, the beginning of the file names, and the best student.
        watcher: callbacks for a display.
    """
    watcher = watcher or Watcher()
    sha256 = data.vectors.sha256
    keys = {cell: cell_key(cell, data.vectors.identity) for cell in cells}
    moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    if tracker is None:
        for _ in _train(cells, keys, set(), data, accelerator, watcher, None):
            pass
        return None
    identity = sweep_id or f"{name}-{hashlib.sha256(''.join(keys.values()).encode()).hexdigest()[:8]}"
    if not resume and sweep_id is None:
        identity += f"-{moment}"
    tags = {"role": "sweep", "grid": name, "teacher": data.vectors.teacher, "vectors_sha256": sha256}
    tags["extraction_key"] = data.vectors.extraction_key
    with closing(tracker.open_sweep(identity, name, tags)) as parent:
        parent.log_params(params)
        parent.log_dataset(f"vectors {data.vectors.teacher}", sha256, vectors_uri, _profile(data), "training")
        known = tracker.finished_cells(parent.experiment_id) if resume else {}
        rows = {
            key: json.loads(tracker.artifact(known[key].info.run_id, "cell.json")) | {"run_id": known[key].info.run_id}
            for key in keys.values()
            if key in known
        }
        watcher.start([c for c in cells if keys[c] not in rows], [c for c in cells if keys[c] in rows])
        recorder = _Recorder(tracker, parent, data)
        for row in _train(cells, keys, set(rows), data, accelerator, watcher, recorder):
            rows[row["cell_key"]] = row
            watcher.finished(row)
        results = _results(name, data, [rows[keys[cell]] for cell in cells], identity)
        path = output / f"{name}_results_{moment}.json"
        write_atomically(path, lambda part: part.write_text(json.dumps(results, indent=1), encoding="utf-8"))
        best = results["best"]
        folder = student_folder or path.with_name(f"{path.stem}_student")
        student = recorder.students.get(best["run_id"]) or tracker.student_of(best["run_id"])
        student.save(folder)
        files = report(results, path.stem, student)
        for file in (path, *files):
            parent.log_artifact(file)
        parent.log_metrics({"cells": len(cells), **{f"best_{k}": best[k] for k in ("val_cosine", "test_cosine")}})
        parent.set_tags({"best_run_id": best["run_id"], "best_cell": best["name"]})
    return Sweep(results, path, files, folder, parent)


def _profile(data: Catalogued) -> str:
    return json.dumps({"concepts": len(data.vectors.concepts), "layers": list(data.vectors.layers)})


def _train(
    cells: Sequence[Cell],
    keys: dict[Cell, str],
    done: set[str],
    data: Catalogued,
    accelerator: Accelerator,
    watcher: Watcher,
    recorder: _Recorder | None,
) -> Iterator[dict[str, Any]]:
    """Train the cells that are not done, this process's share of the stacks; the main process yields all rows."""
    [done] = gather_object([done])[:1]  # what the main process knows
    todo = [cell for cell in cells if keys[cell] not in done]
    dealt = shares(todo, accelerator.num_processes, lambda cell: training_flops(cell, data))
    mine = dealt[accelerator.process_index]
    trained_elsewhere: list[Trained] = []
    for stack in mine:
        subsets = [data.subset(cell.concepts, _layer(cell)) for cell in stack]
        if recorder is None:
            trained_elsewhere += train_stack(stack, subsets, accelerator, watcher.progress)
            continue
        with recorder.running(stack, keys):
            for trained in train_stack(stack, subsets, accelerator, watcher.progress):
                yield recorder.record(trained, keys[trained.cell])
    gathered = gather_object(trained_elsewhere)
    if recorder is not None:
        for trained in gathered:
            with recorder.running([trained.cell], keys):
                yield recorder.record(trained, keys[trained.cell])


def _layer(cell: Cell) -> int:
    assert cell.layer is not None, "prepare names the layer"
    return cell.layer


class _Recorder:
    """Child runs: opened as their stack starts, logged and closed as each member finishes."""

    def __init__(self, tracker: Tracker, parent: Run, data: Catalogued) -> None:
        self.tracker, self.parent, self.data = tracker, parent, data
        self.open: dict[str, Run] = {}
        self.students: dict[str, Student] = {}
        self.best = -2.0

    @contextmanager
    def running(self, stack: Sequence[Cell], keys: dict[Cell, str]) -> Iterator[None]:
        """Open a run a cell; those that `record` has not closed by the end are closed as KILLED or FAILED."""
        try:
            for cell in stack:
                tags = {"role": "cell", "cell_key": keys[cell], "code_version": code_version()}
                tags["extraction_key"] = self.data.vectors.extraction_key
                run = self.open[keys[cell]] = self.tracker.open_child(self.parent, cell.name, tags)
                run.log_params(asdict(cell) | {"teacher": self.data.vectors.teacher})
            yield
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt | GeneratorExit)
            for key in list(self.open):
                self.open.pop(key).end("KILLED" if interrupted else "FAILED")
            raise

    def record(self, trained: Trained, key: str) -> dict[str, Any]:
        """Log one finished cell with its student; returns its row of the results file."""
        run, vectors = self.open[key], self.data.vectors
        subset = self.data.subset(trained.cell.concepts, _layer(trained.cell))
        student = Student.from_training(trained.cell, trained.parameters, subset, vectors, trained.metrics)
        row = {
            "name": trained.cell.name,
            **asdict(trained.cell),
            "parameters": trained.number_of_parameters,
            "dtype": trained.dtype,
            **trained.metrics,
            "best_epoch": trained.best_epoch,
            "train_seconds": trained.train_seconds,
            "run_id": run.id,
            "cell_key": key,
            "test_cosine_by_category": by_category(
                trained.test_cosines, [vectors.categories[row] for row in subset.test.rows]
            ),
            "curves": trained.curves,
        }
        sizes = {"parameters": trained.number_of_parameters, "best_epoch": trained.best_epoch}
        run.log_metrics(trained.metrics | sizes | {"train_seconds": trained.train_seconds}, trained.curves)
        run.log_student(student, vectors.d_model)
        run.set_tags({"dtype": trained.dtype})
        run.log_json("cell.json", row)
        run.end("FINISHED")
        del self.open[key]
        if trained.metrics["val_cosine"] > self.best:  # the folder of the best is all that is wanted at the end
            self.best, self.students = trained.metrics["val_cosine"], {run.id: student}
        return row


def _results(name: str, data: Catalogued, rows: list[dict[str, Any]], identity: str) -> dict[str, Any]:
    """The content of the results file. The best cell is the one with the highest validation cosine."""
    if not rows:
        raise InputError(f"grid {name}: no cells")
    subsets = dict.fromkeys((row["concepts"], row["layer"]) for row in rows)
    best = max(rows, key=lambda row: row["val_cosine"])
    return {
        "grid": name,
        "sweep_id": identity,
        "teacher": data.vectors.teacher,
        "layer": best["layer"],
        "vectors_sha256": data.vectors.sha256,
        "cells": rows,
        "baselines": [row for key in subsets for row in baseline_rows(data.subset(*key), *key)],
        "best": best,
        "fit": None,
    }


def baseline_rows(subset: Subset, concepts: int, layer: int) -> list[dict[str, Any]]:
    """The floor for one training subset: the constant mean, the nearest training concept, and ridge regression."""
    parameters, strength, _ = ridge.fit(subset)
    parameters["weight"] *= subset.scale
    rows = []
    for student in (*BASELINES, "ridge"):
        row: dict[str, Any] = {"student": student, "concepts": concepts, "layer": layer}
        if student == "ridge":
            row |= {"strength": strength, "parameters": parameters["weight"].numel()}
        for side_name, side in (("val", subset.val), ("test", subset.test)):
            answer = BASELINES[student](subset, side) if student in BASELINES else predict("ridge", parameters, side)
            measured = faithfulness(answer, side.targets, subset.mean)
            row |= {f"{side_name}_{metric}": value for metric, value in measured.items()}
        rows.append(row)
    return rows
