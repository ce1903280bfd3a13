"""The content of a results file: the rows of cells and baselines, and the best and the fit of each section."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.analysis import scaling
from pipeline.analysis.baselines import BASELINES
from pipeline.analysis.rows import (
    BASELINE_FIELDS,
    SECTION_FIELDS,
    Row,
    cell_of,
    ridge_baseline,
    section_names,
    section_of,
)
from pipeline.data.dataset import Dataset
from pipeline.metrics import cosines, faithfulness
from pipeline.settings import Cell
from pipeline.training.trainer import TrainedStudent, train_stack

CURVE_POINTS = 200  # epochs of a curve at the most; MLflow has all
SECTION_KEYS = (*SECTION_FIELDS, "best", "fit")  # what the file holds of each section


@dataclass(frozen=True)
class Section:
    """The cells of a sweep that may be compared: of one block and one split."""

    title: str  # what distinguishes it from the other sections, in words; empty where it is the only one
    suffix: str  # the same in names of files, metrics and tags, such as ``_layer6``
    results: dict[str, Any]  # the content of the results file with only its cells and their baselines, best and fit


def results_of(name: str, data: Dataset, rows: list[Row], sweep_id: str) -> dict[str, Any]:
    """Build the content of a grid's results file: rows, their baselines, and the best cell and fit of each section."""
    rows = [row | {"curves": _thinned(row["curves"], row["best_epoch"])} for row in rows]
    ridge_cells = dict.fromkeys(ridge_baseline(cell_of(row)) for row in rows)
    baselines = [row for cell in ridge_cells for row in baseline_rows(cell, data)]
    results = {
        "grid": name,
        "sweep_id": sweep_id,
        "teacher": data.vectors.teacher,
        "vectors_sha256": data.vectors.sha256,
        "cells": rows,
        # One row of the constant mean for cells that differ in inputs or targets only: it depends on neither.
        "baselines": list({(row["student"], *map(row.get, BASELINE_FIELDS)): row for row in baselines}.values()),
    }
    parts = [{key: section.results[key] for key in SECTION_KEYS} for section in sections(results)]
    # Cells of several blocks or splits are not ranked: then the whole has no best cell and no fit.
    layers, only = {part["layer"] for part in parts}, parts[0] if len(parts) == 1 else {}
    whole = {"layer": layers.pop() if len(layers) == 1 else None, "best": only.get("best"), "fit": only.get("fit")}
    return results | whole | {"sections": parts}


def sections(results: dict[str, Any]) -> list[Section]:
    """The content of a results file divided into sections, by block and split."""
    made = []
    for key, (title, suffix) in section_names(results["cells"]).items():
        cells, baselines = ([row for row in results[rows] if section_of(row) == key] for rows in ("cells", "baselines"))
        family = scaling.largest_family(cells)
        fit = scaling.law_of(family).values if family else None
        own = {"cells": cells, "baselines": baselines, "best": best_of(cells), "fit": fit}
        made.append(Section(title, suffix, results | dict(zip(SECTION_FIELDS, key, strict=True)) | own))
    return made


def best_of(rows: Sequence[Row]) -> Row:
    """The row with the highest validation cosine."""
    return max(rows, key=lambda row: row["val_cosine"])


def baseline_rows(cell: Cell, data: Dataset) -> list[Row]:
    """The rows of the mean, the nearest training concept and a ridge regression on the subset of its cell."""
    subset, ridge = data.subset(cell), train_alone(cell, data)
    rows: list[Row] = []
    for student, baseline in BASELINES.items():
        known = BASELINE_FIELDS if student != "mean" else ("concepts", *SECTION_FIELDS)  # all that the mean depends on
        row: Row = {"student": student, **{name: getattr(cell, name) for name in known}}
        for side_name, side in (("val", subset.val), ("test", subset.test)):
            answer = baseline(subset, side)
            measured = faithfulness(answer, side.targets, subset.mean)
            row |= {f"{side_name}_{metric}": value for metric, value in measured.items()}
        rows.append(row | {"test_cosines": rounded(cosines(answer, side.targets).tolist())})  # of the last side, test
    row = {"student": "ridge", **{name: getattr(cell, name) for name in BASELINE_FIELDS}}
    own = {"parameters": ridge.number_of_parameters, "test_cosines": rounded(ridge.test_cosines)}
    return [*rows, row | own | ridge.metrics]


def train_alone(cell: Cell, data: Dataset) -> TrainedStudent:
    """Train one cell on the CPU."""
    [trained] = train_stack([cell], [data.subset(cell)], torch.device("cpu"))
    return trained


def rounded(values: Sequence[float]) -> list[float]:
    """Round cosines for a results file: a concept's cosine is not known to more than four digits."""
    return [round(value, 4) for value in values]


def _thinned(curves: dict[str, list[Any]], best_epoch: int) -> dict[str, list[Any]]:
    """Curves at `CURVE_POINTS` epochs at the most: evenly spaced ones, the first, the last and the best."""
    if (epochs := len(curves["epoch"])) <= CURVE_POINTS:
        return curves
    kept = {*np.linspace(0, epochs - 1, CURVE_POINTS - 1).astype(int).tolist(), curves["epoch"].index(best_epoch)}
    return {name: [values[place] for place in sorted(kept)] for name, values in curves.items()}
