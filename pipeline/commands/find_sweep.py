"""An earlier sweep found again: its results file, its best students and its vectors, on disk or in MLflow."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.analysis.results import Section, sections
from pipeline.analysis.rows import cell_of
from pipeline.commands.results_file import add_cosines, cosines_file, needs_cosines, parse_results, read_results
from pipeline.data.vectors import Vectors, read_vectors
from pipeline.errors import InputError
from pipeline.settings import SHIPPED
from pipeline.student.student import Student
from pipeline.sweep.grid import read_grid
from pipeline.tracking import connect, fetch


def load_sweep(results: str | None, sweep_id: str | None) -> tuple[str, dict[str, Any], list[Student]]:
    """Load a sweep from its results file, from MLflow by its id, or from the newest results file in ``results/``.

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
        if needs_cosines(found):
            add_cosines(found, fetch(f"runs:/{run.info.run_id}/{cosines_file(stem)}"))
        return stem, found, [tracker.student_of(part.results["best"]["run_id"]) for part in sections(found)]
    path = fetch(results) if results else newest_results()
    found = read_results(path)
    if needs_cosines(found):
        folder, _, name = (results or str(path)).rpartition("/")
        beside = cosines_file(name.removesuffix(".json"))
        add_cosines(found, fetch(f"{folder}/{beside}" if folder else beside))
    return path.stem, found, [_student_of(part, path) for part in sections(found)]


def _student_of(section: Section, path: Path) -> Student:
    """The student of a section's best cell: from the folder beside the results file if it is the same, or MLflow."""
    best, folder = section.results["best"], path.with_name(f"{path.stem}{section.suffix}_student")
    if folder.is_dir() and (student := Student.load(folder)).config["cell"] == asdict(cell_of(best)):
        return student
    return connect().student_of(best["run_id"])


def newest_results() -> Path:
    """The newest file of ``results/``, by the time in its name; `InputError` where there is none."""
    found = Path("results").glob("*_results_*Z.json")
    newest = max(found, key=lambda path: path.stem.rpartition("_")[2], default=None)
    if newest is None:
        raise InputError("no results file in results; run a sweep first, or name one with --results")
    return newest


def vectors_for(grid: str, named: str | None, recorded: str | None = None) -> Vectors:
    """Read a sweep's vectors: those that the user names, else the recorded ones if still there, else its grid's."""
    if named is None and recorded is not None and (":" in recorded or Path(recorded).is_file()):
        named = recorded
    try:
        place = named or read_grid(grid).vectors
    except InputError:  # a grid that does not come with the program
        place = SHIPPED
    return read_vectors(fetch(place))
