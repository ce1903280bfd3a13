"""An earlier sweep found again: its results file, its best students and its vectors, on disk or in MLflow."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.analysis.results import Section, parse_results, read_results, sections
from pipeline.analysis.rows import cell_of
from pipeline.data.vectors import Vectors, read_vectors
from pipeline.errors import InputError
from pipeline.settings import SHIPPED
from pipeline.student.student import Student
from pipeline.sweep.grid import read_grid
from pipeline.tracking import connect, fetch


def load_sweep(
    results: str | None, sweep_id: str | None, folder: Path = Path("results")
) -> tuple[str, dict[str, Any], list[Student]]:
    """Load a sweep from its results file, from MLflow, or from the newest results file of a folder.

    Args:
        results: path of a results file.
        sweep_id: a sweep in MLflow; its results file and its best students are downloaded.
        folder: searched when neither is given.

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
        found = parse_results(text, stem)
        return stem, found, [tracker.student_of(part.results["best"]["run_id"]) for part in sections(found)]
    path = fetch(results) if results else newest_results(folder)
    found = read_results(path)
    return path.stem, found, [_student_of(part, path) for part in sections(found)]


def _student_of(section: Section, path: Path) -> Student:
    """The student of a section's best cell: from the folder beside the results file if it is the same, or MLflow."""
    best, folder = section.results["best"], path.with_name(f"{path.stem}{section.suffix}_student")
    if folder.is_dir() and (student := Student.load(folder)).config["cell"] == asdict(cell_of(best)):
        return student
    return connect().student_of(best["run_id"])


def newest_results(folder: Path) -> Path:
    """The newest results file of a folder, by the time in its name."""
    found = sorted(folder.glob("*_results_*Z.json"), key=lambda path: path.stem.rpartition("_")[2])
    if not found:
        raise InputError(f"no results file in {folder}; run a sweep first, or name one with --results")
    return found[-1]


def vectors_for(grid: str, named: str | None, recorded: str | None = None) -> Vectors:
    """Read the vectors file of a sweep.

    Args:
        grid: the sweep's grid, whose vectors are the default.
        named: the place that the user names.
        recorded: the place that the results record, used if a file is still there.

    Returns:
        The vectors.
    """
    if named is None and recorded is not None and (":" in recorded or Path(recorded).is_file()):
        named = recorded
    try:
        place = named or read_grid(grid).vectors
    except InputError:  # a grid that does not come with the program
        place = SHIPPED
    return read_vectors(fetch(place))
