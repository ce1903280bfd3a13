"""The student that a sweep exports: the best on validation that needs no teacher, a baseline where that is the best."""

from __future__ import annotations

from typing import Any, NamedTuple

from pipeline.analysis.results import best_of, train_alone
from pipeline.analysis.rows import BASELINE_FIELDS, BASELINE_NAMES, Row, cell_of
from pipeline.data.dataset import Dataset
from pipeline.settings import Cell
from pipeline.student.student import Student
from pipeline.training.export import checkpoint, needs_teacher
from pipeline.training.kinds import KINDS


class ExportChoice(NamedTuple):
    """The student that a section exports."""

    row: Row  # of a cell, which has a ``run_id``, or of a baseline
    reason: str  # what it is, and which students it was preferred to


def best_exportable(results: dict[str, Any], baselines: bool = True) -> ExportChoice:
    """The best student of a section on validation that needs no teacher, ``baselines`` included; else the best cell."""
    others = results["baselines"] if baselines else []
    candidates = [row for row in results["cells"] if not needs_teacher(cell_of(row))]
    candidates += [row for row in others if row["student"] in KINDS and not needs_teacher(baseline_cell(row))]
    best = best_of(candidates or results["cells"])
    reason = f"{_describe(best)}, validation cosine {best['val_cosine']:.3f}"
    if rivals := [row for row in candidates if row["student"] != best["student"]]:
        rival = best_of(rivals)
        kind = "trained student" if KINDS[rival["student"]].closed_form is None else "student of another kind"
        reason += f"; the best {kind}, {_describe(rival)}, has {rival['val_cosine']:.3f}"
    highest = best_of([*results["cells"], *others])
    if highest["val_cosine"] > best["val_cosine"]:
        why = "runs blocks of the teacher" if highest["student"] in KINDS else "is no student"
        reason += f"; {_describe(highest)} has {highest['val_cosine']:.3f}, but {why}"
    return ExportChoice(best, reason)


def _describe(row: Row) -> str:
    kind = BASELINE_NAMES.get(row["student"], row["student"])
    return f"{kind} {row['name']}" if "name" in row else f"{kind} on {row['concepts']} concepts"


def baseline_cell(row: Row) -> Cell:
    """The cell of a baseline that is a student."""
    return Cell(student=row["student"], **{name: row[name] for name in BASELINE_FIELDS})


def baseline_student(row: Row, data: Dataset) -> Student:
    """Fit the student that a baseline is, for the concepts of the vectors file."""
    cell = baseline_cell(row)
    fitted = train_alone(cell, data)
    return checkpoint(cell, fitted.parameters, data.subset(cell), data, fitted.metrics)
