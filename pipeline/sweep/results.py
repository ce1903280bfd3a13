"""The results of a sweep: what its file holds, with the baselines, and where it is found again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.analysis import scaling
from pipeline.analysis.baselines import BASELINES
from pipeline.analysis.rows import (
    BASELINE_FIELDS,
    BASELINE_NAMES,
    CELL_FIELDS,
    SECTION_FIELDS,
    Row,
    cell_of,
    ridge_baseline,
    section_names,
    section_of,
)
from pipeline.data.dataset import Dataset
from pipeline.data.vectors import Vectors, read_vectors
from pipeline.errors import InputError
from pipeline.metrics import cosines, faithfulness
from pipeline.settings import SHIPPED, Cell
from pipeline.student.student import Student
from pipeline.sweep.engine import rounded
from pipeline.sweep.grid import vectors_of
from pipeline.tracking import connect, fetch
from pipeline.training.export import checkpoint, needs_teacher
from pipeline.training.kinds import KINDS
from pipeline.training.trainer import TrainedStudent, train_stack

NEEDED = {*CELL_FIELDS, "name", "test_cosines", "curves"}  # of each cell, to tell about a sweep
NEEDED_OF_BASELINES = {"student", "concepts", "layer", "split", "test_cosines"}
OF_SECTION = (*SECTION_FIELDS, "best", "fit")  # what the file says of each section


@dataclass(frozen=True)
class Section:
    """The cells of a sweep that may be compared: of one block and one split.

    Attributes:
        title: what sets it apart from the other sections, in words; empty where there is no other.
        suffix: the same in names of files, metrics and tags, such as ``_layer6``.
        results: the content of the results file with these cells and their baselines only, ``best`` and ``fit`` theirs.
    """

    title: str
    suffix: str
    results: dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """The student that a section leaves.

    Attributes:
        row: the row of a cell (it has a ``run_id``) or of a baseline.
        reason: what it is and what it was chosen over, in words.
    """

    row: Row
    reason: str


def results_of(name: str, data: Dataset, rows: list[Row], identity: str) -> dict[str, Any]:
    """The content of the results file, with the baselines.

    The best cell of a section has the highest validation cosine. Where there are several sections, each has its own
    best and fit in ``sections``, and ``best`` and ``fit`` of the whole are None: other blocks or splits are not ranked.
    """
    rivals = dict.fromkeys(ridge_baseline(cell_of(row)) for row in rows)
    floor = [row for cell in rivals for row in baseline_rows(cell, data)]
    results = {
        "grid": name,
        "sweep_id": identity,
        "teacher": data.vectors.teacher,
        "vectors_sha256": data.vectors.sha256,
        "cells": rows,
        # One row of the constant mean for all that differ in inputs or targets only: it knows neither.
        "baselines": list({(row["student"], *map(row.get, BASELINE_FIELDS)): row for row in floor}.values()),
    }
    parts = [section.results for section in sections(results)]
    layers, only = {part["layer"] for part in parts}, parts[0] if len(parts) == 1 else {}
    return results | {
        "layer": parts[0]["layer"] if len(layers) == 1 else None,
        "best": only.get("best"),
        "fit": only.get("fit"),
        "sections": [{key: part[key] for key in OF_SECTION} for part in parts],
    }


def sections(results: dict[str, Any]) -> list[Section]:
    """The content of a results file, one section for each block and split, in their order."""
    made = []
    for key, (title, suffix) in section_names(results["cells"]).items():
        told = dict(zip(SECTION_FIELDS, key, strict=True))
        cells, baselines = ([row for row in results[rows] if section_of(row) == key] for rows in ("cells", "baselines"))
        own = told | {"cells": cells, "baselines": baselines, "best": best_of(cells), "fit": scaling_fit(cells)}
        made.append(Section(title, suffix, results | own))
    return made


def best_of(rows: Sequence[Row]) -> Row:
    """The row with the highest validation cosine."""
    return max(rows, key=lambda row: row["val_cosine"])


def best_exportable(results: dict[str, Any], baselines: bool = True) -> Choice:
    """The best of a section on validation that stands alone, whatever its kind; the best cell where none does.

    Args:
        results: of one section.
        baselines: choose among the baselines too.
    """
    fitted = [row for row in results["baselines"] if row["student"] in KINDS] if baselines else []
    alone = [row for row in results["cells"] if not needs_teacher(cell_of(row))]
    alone += [row for row in fitted if not needs_teacher(baseline_cell(row))]
    best = best_of(alone or results["cells"])
    reason = f"{_described(best)}, validation cosine {best['val_cosine']:.3f}"
    if others := [row for row in alone if row["student"] != best["student"]]:
        rival = best_of(others)
        kind = "trained student" if KINDS[rival["student"]].solve is None else "student of another kind"
        reason += f"; the best {kind}, {_described(rival)}, has {rival['val_cosine']:.3f}"
    highest = best_of([*results["cells"], *(results["baselines"] if baselines else [])])
    if highest["val_cosine"] > best["val_cosine"]:
        why = "runs blocks of the teacher" if highest["student"] in KINDS else "is no student"
        reason += f"; {_described(highest)} has {highest['val_cosine']:.3f}, but {why}"
    return Choice(best, reason)


def _described(row: Row) -> str:
    kind = BASELINE_NAMES.get(row["student"], row["student"])
    return f"{kind} {row['name']}" if "name" in row else f"{kind} on {row['concepts']} concepts"


def scaling_fit(rows: Sequence[Row]) -> dict[str, Any] | None:
    """The constants of the scaling law of the largest family of cells that descend, with intervals."""
    cells = scaling.largest_family(rows)
    return scaling.law_of(cells).values if cells else None


def baseline_cell(row: Row) -> Cell:
    """The cell of a baseline that is a student."""
    return Cell(student=row["student"], **{name: row[name] for name in BASELINE_FIELDS})


def baseline_rows(cell: Cell, data: Dataset) -> list[Row]:
    """The floor for one training subset: the constant mean, the nearest training concept, and ridge regression.

    Args:
        cell: the ridge regression.
        data: the vectors.
    """
    subset, fitted = data.subset(cell), _fitted(cell, data)
    rows: list[Row] = []
    for student in (*BASELINES, "ridge"):
        known = BASELINE_FIELDS if student != "mean" else ("concepts", *SECTION_FIELDS)  # all that the mean depends on
        row: Row = {"student": student, **{name: getattr(cell, name) for name in known}}
        if student == "ridge":
            own = {"parameters": fitted.number_of_parameters, "test_cosines": rounded(fitted.test_cosines)}
            rows.append(row | own | fitted.metrics)
            continue
        for side_name, side in (("val", subset.val), ("test", subset.test)):
            answer = BASELINES[student](subset, side)
            measured = faithfulness(answer, side.targets, subset.mean)
            row |= {f"{side_name}_{metric}": value for metric, value in measured.items()}
        rows.append(row | {"test_cosines": rounded(cosines(answer, side.targets).tolist())})
    return rows


def baseline_student(row: Row, data: Dataset) -> Student:
    """The student that a baseline is, for the concepts of the vectors file."""
    cell = baseline_cell(row)
    fitted = _fitted(cell, data)
    return checkpoint(cell, fitted.parameters, data.subset(cell), data, fitted.metrics)


def _fitted(cell: Cell, data: Dataset) -> TrainedStudent:
    [fitted] = train_stack([cell], [data.subset(cell)], torch.device("cpu"))
    return fitted


def read_results(path: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        InputError: missing, not the results of a sweep, or those of an older version.
    """
    try:
        return _checked(path.read_text(encoding="utf-8"), path)
    except OSError as error:
        raise InputError(f"results file {path}: cannot be read ({error})") from error


def _checked(text: str, place: object) -> dict[str, Any]:
    try:
        results = json.loads(text)
    except ValueError as error:
        raise InputError(f"results file {place}: cannot be read ({error})") from error
    if not isinstance(results, dict) or not {"grid", "cells", "baselines", "best"} <= set(results):
        raise InputError(f"results file {place}: not the results of a sweep")
    known = all(set(row) >= NEEDED for row in results["cells"])
    if not known or not all(set(row) >= NEEDED_OF_BASELINES for row in results["baselines"]):
        raise InputError(
            f"results file {place}: of an older version, without some of what is told; run its sweep again"
        )
    return results


def newest_results(folder: Path) -> Path:
    """The newest results file of a folder, by the time in its name.

    Raises:
        InputError: there is none.
    """
    found = sorted(folder.glob("*_results_*Z.json"), key=lambda path: path.stem.rpartition("_")[2])
    if not found:
        raise InputError(f"no results file in {folder}; run a sweep first, or name one with --results")
    return found[-1]


def vectors_for(grid: str, named: str | None, recorded: str | None = None) -> Vectors:
    """The vectors file of a sweep.

    Args:
        grid: the sweep's grid, whose vectors are taken where nothing else is known.
        named: the place that the user names.
        recorded: the place that the results name, if something is still there.
    """
    if named is None and recorded is not None and (":" in recorded or Path(recorded).is_file()):
        named = recorded
    try:
        path = named or vectors_of(grid)
    except InputError:  # a grid that does not come with the program
        path = SHIPPED
    return read_vectors(fetch(path))


def load_sweep(
    results: str | None, sweep_id: str | None, folder: Path = Path("results")
) -> tuple[str, dict[str, Any], list[Student]]:
    """A sweep from its results file, from MLflow, or the newest in a folder.

    Args:
        results: path of a results file.
        sweep_id: a sweep in MLflow; its results file and its best students are downloaded.
        folder: where to look when neither is given.

    Returns:
        The beginning of the report's file names, the results, and the student of each section's best cell.

    Raises:
        InputError: there is no such sweep, or its student is gone.
    """
    if sweep_id is not None:
        tracker = connect()
        if (run := tracker.find_sweep(sweep_id)) is None:
            raise InputError(f"--sweep-id {sweep_id}: MLflow knows no such sweep")
        stem, text = tracker.newest_artifact(run, "_results_")
        found = _checked(text, stem)
        return stem, found, [tracker.student_of(part.results["best"]["run_id"]) for part in sections(found)]
    path = fetch(results) if results else newest_results(folder)
    found = read_results(path)
    return path.stem, found, [_student_beside(path, part) for part in sections(found)]


def _student_beside(path: Path, section: Section) -> Student:
    """The student of a section's best cell: from the folder beside the results file, if that is it, or from MLflow."""
    best, beside = section.results["best"], path.with_name(f"{path.stem}{section.suffix}_student")
    if beside.is_dir() and (student := Student.load(beside)).config["cell"] == asdict(cell_of(best)):
        return student
    return connect().student_of(best["run_id"])
