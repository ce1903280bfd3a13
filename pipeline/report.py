"""The report of a sweep: a table in Markdown, and pictures, from the results file and the best student."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from pipeline import plots
from pipeline.errors import InputError
from pipeline.storage import write_atomically
from pipeline.students import Student
from pipeline.tracking import connect
from pipeline.vectors import Vectors

Row = dict[str, Any]
FORMATS = {
    "student": "{}",
    "concepts": "{}",
    "hidden_dim": "{}",
    "layers": "{}",
    "seed": "{}",
    "parameters": "{:,}",
    "val_cosine": "{:.3f}",
    "test_cosine": "{:.3f}",
    "test_cosine_raw": "{:.3f}",
    "test_r2": "{:.3f}",
    "test_retrieval_at_1": "{:.3f}",
    "test_retrieval_at_5": "{:.3f}",
    "train_seconds": "{:.1f}",
}
SHORT = ("student", "concepts", "hidden_dim", "layers", "parameters", "val_cosine", "test_cosine", "test_r2")


def read_results(path: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        InputError: missing, or not the results of a sweep.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"results file {path}: cannot be read ({error})") from error
    if not isinstance(results, dict) or not {"grid", "cells", "baselines", "best"} <= set(results):
        raise InputError(f"results file {path}: not the results of a sweep")
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
        found = json.loads(text)
        return stem, found, tracker.student_of(found["best"]["run_id"])
    path = Path(results) if results else newest_results(folder)
    found, beside = read_results(path), path.with_name(f"{path.stem}_student")
    student = Student.load(beside) if beside.is_dir() else connect().student_of(found["best"]["run_id"])
    return path.stem, found, student


def table_rows(results: dict[str, Any], columns: Sequence[str] = tuple(FORMATS)) -> tuple[list[str], list[list[str]]]:
    """The table as text: its head, then the baselines (in parentheses) and the cells by concepts and test cosine."""
    floor = [row | {"student": f"({row['student']})"} for row in results["baselines"]]
    rows = sorted(results["cells"] + floor, key=lambda row: (row["concepts"], row["test_cosine"]))
    return list(columns), [
        [FORMATS[name].format(row[name]) if _applies(row, name) else "" for name in columns] for row in rows
    ]


def _applies(row: Row, column: str) -> bool:
    return column in row and not (row["student"] == "ridge" and column in ("hidden_dim", "layers"))


def verdict(results: dict[str, Any]) -> str:
    """How the best cell (chosen on validation) stands to the baselines, and to ridge at every number of concepts."""
    best = results["best"]
    floor = {(row["student"], row["concepts"], row["layer"]): row["test_cosine"] for row in results["baselines"]}
    same = (best["concepts"], best["layer"])
    ridge = floor["ridge", *same]
    configuration = ("concepts", "layer", "student", "hidden_dim", "layers", "objective")
    seeds = [c["test_cosine"] for c in results["cells"] if all(c[name] == best[name] for name in configuration)]
    mean = float(np.mean(seeds))
    known = f"mean of {len(seeds)} seeds, {min(seeds):.3f} to {max(seeds):.3f}" if len(seeds) > 1 else "one seed"
    lines = [
        f"Best by validation: {best['name']}, test cosine {mean:.3f} ({known}). "
        f"It {'beats' if mean > ridge else 'does not beat'} ridge regression on the same {best['concepts']} concepts "
        f"({ridge:.3f}, {mean - ridge:+.3f}); nearest training concept {floor['nearest', *same]:.3f}, "
        "constant mean 0 by definition."
    ]
    margins = []
    for concepts in sorted({row["concepts"] for row in results["cells"]}):
        rival = max((c for c in results["cells"] if c["concepts"] == concepts), key=lambda c: c["val_cosine"])
        margins.append(f"{rival['test_cosine'] - floor['ridge', concepts, rival['layer']]:+.3f} at {concepts}")
    if len(margins) > 1:
        lines.append(f"Against ridge, the best by validation at each number of concepts: {', '.join(margins)}.")
    return " ".join(lines)


def markdown(results: dict[str, Any]) -> str:
    """The table and the verdict as a Markdown page."""
    head, rows = table_rows(results)
    lines = [
        f"# Sweep {results['grid']}: {results['teacher']}, block {results['layer']}",
        "",
        verdict(results),
        "",
        "Students in parentheses are the baselines. Cosines are centred on the mean training vector, except `_raw`.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]
    return "\n".join(lines)


def write_report(results: dict[str, Any], stem: str, output: Path, student: Student, vectors: Vectors) -> list[Path]:
    """Write the table and the pictures as ``<output>/<stem>_<what>``.

    Args:
        results: the content of a results file.
        stem: beginning of every file name.
        output: folder.
        student: the best student.
        vectors: the file that it was trained on.

    Returns:
        The files written.

    Raises:
        InputError: the vectors are others than those of the sweep, or the folder cannot be written.
    """
    if vectors.sha256 != results["vectors_sha256"]:
        raise InputError("the vectors file is not the one that the sweep was trained on; name that with --vectors")
    best = results["best"]
    rows = [row for row, side in enumerate(vectors.splits) if side == "test"]
    truth = vectors.vectors[rows, 0, vectors.layer_index(best["layer"])].astype(np.float32)
    predicted = student.encode([vectors.concepts[row] for row in rows])
    mean = student.mean.numpy()
    figures = {
        "scaling": plots.scaling(results["cells"], results["baselines"]),
        "heatmap": plots.heat_map(results["cells"]),
        "curves": plots.curves(results["cells"]),
        "alignment": plots.alignment(
            truth - mean,
            predicted - mean,
            [vectors.categories[row] for row in rows],
            f"{best['name']} on {len(rows)} test concepts, {results['teacher']} block {best['layer']}, "
            f"test cosine {best['test_cosine']:.3f}",
        ),
    }
    table = output / f"{stem}_table.md"
    write_atomically(table, lambda part: part.write_text(markdown(results), encoding="utf-8"))
    written = [table]
    for name, figure in figures.items():
        path = output / f"{stem}_{name}.png"
        write_atomically(path, lambda part, figure=figure: figure.savefig(part, dpi=130, format="png"))  # type: ignore[misc]
        plt.close(figure)
        written.append(path)
    return written
