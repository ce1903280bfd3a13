"""The evaluate command: find students, measure them on the test concepts, write tables and log them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from accelerate import Accelerator

from pipeline.analysis.evaluation import evaluate, evaluation_markdown, evaluation_table, students_by_configuration
from pipeline.analysis.results import read_results
from pipeline.analysis.rows import Row, grouped, section_names, section_of
from pipeline.commands.find_sweep import newest_results, vectors_for
from pipeline.data.dataset import Dataset
from pipeline.extraction.vocabulary import Bar
from pipeline.settings import EvaluateOptions
from pipeline.storage import base_name, file_name, is_remote, writable, write_atomically
from pipeline.student.student import Student
from pipeline.teachers.find import find_teacher, warn_if_different
from pipeline.teachers.load import load_teacher
from pipeline.tracking import Run, Tracker, closing, connect, retry_tracking


def run_evaluate(
    options: EvaluateOptions, accelerator: Accelerator, bar: Bar
) -> tuple[list[str], list[list[str]], list[Path]]:
    """Measure students, and write and log what was measured.

    Args:
        options: what the user asked for.
        accelerator: where the teacher runs.
        bar: makes a progress bar over so many students.

    Returns:
        The table's head and rows, and the files written.

    Raises:
        InputError: no such run, students of other vectors, or an unknown teacher.
    """
    folder = writable(Path(options.output) / "evaluation.json").parent
    tracker = connect("evaluate")
    name, grid, recorded, found = _find_students(options.run, tracker)
    data = Dataset(vectors_for(grid, options.vectors, recorded))
    students = students_by_configuration(found, data)
    teacher = None
    if options.teacher is not None:
        dtype = options.dtype or data.vectors.dtype
        source = find_teacher(options.teacher, dtype, accelerator.device, options.trust_remote_code)
        warn_if_different(source, data.vectors.revision, data.vectors.tokenizer)
        teacher = load_teacher(source, accelerator.device, options.device_map)
    with bar(len(found)) as advance:
        rows = evaluate(students, data, teacher, advance)
    stem = folder / f"{file_name(name)}_evaluation_{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    written = []
    for suffix, text in ((".json", json.dumps(rows, indent=1)), (".md", evaluation_markdown(rows))):
        path = stem.with_name(stem.name + suffix)
        write_atomically(path, lambda part, text=text: part.write_text(text, encoding="utf-8"))  # type: ignore[misc]
        written.append(path)
    tags = {"role": "evaluate", "teacher": data.vectors.teacher}
    with closing(retry_tracking(lambda: tracker.open_run(f"evaluate {name}", tags))) as run:
        retry_tracking(lambda: _log(run, asdict(options), rows, written))
    return *evaluation_table(rows, brief=True), written


def _log(run: Run, params: Mapping[str, object], rows: Sequence[Row], written: Sequence[Path]) -> None:
    run.log_params(params)
    for path in written:
        run.log_artifact(path)
    students = [row for row in rows if "val_cosine" in row]
    names = section_names(students)
    for section, own in grouped(students, section_of).items():
        best, (_, suffix) = max(own, key=lambda row: row["val_cosine"]), names[section]
        run.set_tags({f"best_student{suffix}": best["student"]})
        run.log_metrics({f"{key}{suffix}": value for key, value in best.items() if isinstance(value, float)})


def _find_students(run: str | None, tracker: Tracker) -> tuple[str, str, str | None, list[Student]]:
    """A name, the grid, the place of the vectors where it is recorded, and the students."""
    if run is not None and (is_remote(run) or Path(run).is_dir()):
        return base_name(Path(run)), "", None, [Student.load(run)]
    recorded = None
    if run is None:
        results = read_results(newest_results(Path("results")))
        found = [row["run_id"] for row in results["cells"]]
        name = grid = results["grid"]
        recorded = results.get("vectors")
    else:
        name, grid, found = tracker.students_below(run.removeprefix("runs:/").split("/")[0])
    return name, grid, recorded, [tracker.student_of(run_id) for run_id in found]
