"""The results of a sweep: what its file holds, with the baselines, and where it is found again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pipeline import scaling
from pipeline.engine import rounded
from pipeline.errors import InputError
from pipeline.export import needs_teacher
from pipeline.features import Catalogued
from pipeline.grid import vectors_of
from pipeline.metrics import cosines, faithfulness
from pipeline.options import SHIPPED, Cell
from pipeline.student import Student
from pipeline.students.baselines import BASELINES
from pipeline.tracking import connect, fetch
from pipeline.training import train_stack
from pipeline.vectors import Vectors, read_vectors

Row = dict[str, Any]
RIVAL = ("concepts", "layer", "inputs", "split")  # what a cell shares with its baselines
NEEDED = {*Cell.__dataclass_fields__, "name", "test_cosines", "curves"}  # of each cell, to tell about a sweep


def results_of(name: str, data: Catalogued, rows: list[dict[str, Any]], identity: str) -> dict[str, Any]:
    """The content of the results file, with the baselines; the best cell has the highest validation cosine."""
    rivals = dict.fromkeys(baseline_of(row) for row in rows)
    best = max(rows, key=lambda row: row["val_cosine"])
    return {
        "grid": name,
        "sweep_id": identity,
        "teacher": data.vectors.teacher,
        "layer": best["layer"],
        "vectors_sha256": data.vectors.sha256,
        "cells": rows,
        "baselines": [row for cell in rivals for row in baseline_rows(cell, data)],
        "best": best,
        "fit": scaling_fit(rows),
    }


def best_alone(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The best cell whose student needs no teacher; the best of all where every one does."""
    alone = [row for row in rows if not needs_teacher(cell_of(row))]
    return max(alone or rows, key=lambda row: row["val_cosine"])


def cell_of(row: Mapping[str, Any]) -> Cell:
    """The cell of a row."""
    return Cell(**{name: row[name] for name in Cell.__dataclass_fields__})


def scaling_fit(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The constants of the scaling law of the largest family of cells that descend, with intervals."""
    cells = scaling.largest_family(rows)
    return scaling.law_of(cells).values if cells else None


def baseline_of(row: Mapping[str, Any]) -> Cell:
    """The ridge regression on the same concepts, block and inputs as a cell's row: what it should beat."""
    read = row["inputs"] if row["student"] in ("mlp", "ridge", "kernel") else Cell().inputs
    return Cell(student="ridge", concepts=row["concepts"], layer=row["layer"], inputs=read, split=row["split"])


def baseline_rows(cell: Cell, data: Catalogued) -> list[dict[str, Any]]:
    """The floor for one training subset: the constant mean, the nearest training concept, and ridge regression."""
    subset = data.subset(cell)
    [fitted] = train_stack([cell], [subset], torch.device("cpu"))
    rows = []
    for student in (*BASELINES, "ridge"):
        row: dict[str, Any] = {"student": student, **{name: getattr(cell, name) for name in RIVAL}}
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
    if not all(set(row) >= NEEDED for row in results["cells"]):
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


def vectors_for(grid: str, named: str | None) -> Vectors:
    """The vectors file of a sweep: the one that is named, or the one that its grid is made for."""
    try:
        path = named or vectors_of(grid)
    except InputError:  # a grid that does not come with the program
        path = SHIPPED
    return read_vectors(fetch(path))


def load_sweep(
    results: str | None, sweep_id: str | None, folder: Path = Path("results")
) -> tuple[str, dict[str, Any], Student]:
    """A sweep from its results file, from MLflow, or the newest in a folder.

    Args:
        results: path of a results file.
        sweep_id: a sweep in MLflow; its results file and its best student are downloaded.
        folder: where to look when neither is given.

    Returns:
        The beginning of the report's file names, the results, and the best student.

    Raises:
        InputError: there is no such sweep, or its student is gone.
    """
    if sweep_id is not None:
        tracker = connect()
        if (run := tracker.find_sweep(sweep_id)) is None:
            raise InputError(f"--sweep-id {sweep_id}: MLflow knows no such sweep")
        stem, text = tracker.newest_artifact(run.info.run_id, "_results_")
        found = _checked(text, stem)
        return stem, found, tracker.student_of(found["best"]["run_id"])
    path = fetch(results) if results else newest_results(folder)
    found, beside = read_results(path), path.with_name(f"{path.stem}_student")
    if beside.is_dir() and (student := Student.load(beside)).config["cell"] == asdict(cell_of(found["best"])):
        return path.stem, found, student
    return path.stem, found, connect().student_of(found["best"]["run_id"])
