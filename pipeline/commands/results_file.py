"""The results file of a sweep, and beside it, compressed, the cosine of every test concept.

In memory each row of cells and baselines holds these cosines. Files of an older version have them in the JSON.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.analysis.results import sections
from pipeline.analysis.rows import CELL_FIELDS
from pipeline.data import lists
from pipeline.data.dataset import Dataset
from pipeline.errors import InputError
from pipeline.storage import write_atomically

REQUIRED_CELL_FIELDS = {*CELL_FIELDS, "name", "curves"}  # what a report needs of each cell
REQUIRED_BASELINE_FIELDS = {"student", "concepts", "layer", "split"}
COSINES = "test_cosines"  # of each concept, in a row; and the end of the name of the file that holds them
ROWS = ("cells", "baselines")


def cosines_file(stem: str) -> str:
    """The name of the file beside the results file of a stem, with the cosine of every test concept."""
    return f"{stem}_{COSINES}.npz"


def write_results(path: Path, results: dict[str, Any], data: Dataset) -> list[Path]:
    """Write a results file and, beside it, the cosine of every test concept; returns the two paths."""
    # For each section, with its suffix: concepts [N], and the cosines of cells and baselines [rows, N].
    arrays: dict[str, NDArray[Any]] = {}
    for section in sections(results):
        names = [data.vectors.concepts[row] for row in data.rows("test", section.results["split"])]
        arrays[f"concepts{section.suffix}"] = np.array(names)
        for rows in ROWS:
            values = [row[COSINES] for row in section.results[rows]]
            arrays[f"{rows}{section.suffix}"] = np.array(values, np.float32)  # [rows, N]
    beside = path.with_name(cosines_file(path.stem))
    # First, so that a results file never lacks it.
    write_atomically(beside, lambda part: _save_arrays(part, arrays))
    text = _as_json(results)
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))
    return [path, beside]


def _save_arrays(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def _as_json(results: dict[str, Any]) -> str:
    """Results without the cosines of concepts, one line a row."""

    def slim(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: slim(item) for key, item in value.items() if key != COSINES}
        return [slim(item) for item in value] if isinstance(value, list) else value

    def lines(value: Any) -> str:
        many = isinstance(value, list) and value
        return "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]" if many else json.dumps(value)

    return "{\n" + ",\n".join(f" {json.dumps(key)}: {lines(slim(value))}" for key, value in results.items()) + "\n}\n"


def needs_cosines(results: dict[str, Any]) -> bool:
    """Whether the cosines of concepts stand beside the results file; those of an older version hold them."""
    return not all(COSINES in row for rows in ROWS for row in results[rows])


def add_cosines(results: dict[str, Any], path: Path) -> None:
    """Add the cosines of every test concept from the file that `write_results` left beside a results file."""
    try:
        with np.load(path) as arrays:
            for section in sections(results):
                for rows in ROWS:
                    values = np.round(arrays[f"{rows}{section.suffix}"].astype(float), 4).tolist()
                    for row, own in zip(section.results[rows], values, strict=True):
                        row[COSINES] = own
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        expected = "expected the file that the sweep wrote beside its results file"
        raise InputError(f"test cosines {path}: cannot be read ({error}); {expected}") from error


def read_results(path: Path) -> dict[str, Any]:
    """Read and check a results file, without the cosines of concepts where they stand beside it."""
    return parse_results(lists.whole(path, f"results file {path}"), path)


def parse_results(text: str, name: object) -> dict[str, Any]:
    """Parse and check the content of a results file; errors name it."""
    try:
        results = json.loads(text)
    except ValueError as error:
        raise InputError(f"results file {name}: cannot be read ({error})") from error
    if not isinstance(results, dict) or not {"grid", "cells", "baselines", "best"} <= set(results):
        raise InputError(f"results file {name}: not the results of a sweep")
    is_known = all(set(row) >= REQUIRED_CELL_FIELDS for row in results["cells"])
    if not is_known or not all(set(row) >= REQUIRED_BASELINE_FIELDS for row in results["baselines"]):
        problem = "of an older version, without fields that a report needs; run its sweep again"
        raise InputError(f"results file {name}: {problem}")
    return results
