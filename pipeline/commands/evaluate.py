"""The evaluate command: find students, measure them on the test concepts, write tables and log them."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from pipeline.analysis.evaluation import evaluate, evaluation_markdown, evaluation_table, students_by_configuration
from pipeline.analysis.rows import Row, grouped, section_names, section_of
from pipeline.analysis.tables import markdown_table
from pipeline.benchmarks import tables, transfer
from pipeline.benchmarks.catalogue import BENCHMARKS
from pipeline.commands import display
from pipeline.commands.benchmarks import Judged, check_benchmarks, judge_students, metrics_by_section
from pipeline.commands.find_sweep import newest_results, vectors_for
from pipeline.commands.results_file import read_results
from pipeline.data.dataset import Dataset
from pipeline.processes import start
from pipeline.settings import EvaluateOptions
from pipeline.storage import base_name, file_name, is_remote, output_folder, writable, write_atomically
from pipeline.student.student import Student
from pipeline.teachers.find import find_teacher, warn_if_different
from pipeline.teachers.load import load_teacher
from pipeline.tracking import Run, Tracker, closing, connect, retry_tracking


def run_evaluate(options: EvaluateOptions) -> None:
    """Measure students, write and log the measurements, and print the table and the files."""
    with output_folder(options.output) as folder:
        rows, judged, written = _evaluate(options, folder)
    display.table(*evaluation_table(rows, brief=True))
    if judged is not None:
        display.table(*tables.benchmark_table(judged["rows"], brief=True))
        display.table(*transfer.transfer_table(judged["rows"], {name: one.title for name, one in BENCHMARKS.items()}))
    display.lines(*map(str, written))


def _evaluate(options: EvaluateOptions, folder: Path) -> tuple[list[Row], Judged | None, list[Path]]:
    check_benchmarks(options)
    writable(folder / "evaluation.json")
    tracker = connect("evaluate")
    name, grid, recorded, found = _find_students(options.run, tracker)
    data = Dataset(vectors_for(grid, options.vectors, recorded))
    students = students_by_configuration(found, data)
    teacher = None
    if options.teacher is not None:
        device = start().device
        source = find_teacher(options.teacher, options.dtype or data.vectors.dtype, device, options.trust_remote_code)
        warn_if_different(source, data.vectors.revision, data.vectors.tokenizer)
        teacher = load_teacher(source, device, options.device_map)
    with display.counting("evaluate", "students")(len(found)) as advance:
        rows = evaluate(students, data, teacher, advance)
    stem = f"{file_name(name)}_evaluation_{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    judged = judge_students(students, data, start().device, options)
    page = evaluation_markdown(rows)
    texts = {folder / f"{stem}.json": json.dumps(rows, indent=1)}
    if judged is not None:
        shown = transfer.transfer_table(judged["rows"], {name: one.title for name, one in BENCHMARKS.items()})
        texts[folder / f"{stem}_benchmarks.json"] = json.dumps(judged, indent=1)
        page += f"\n## Benchmarks\n\n{tables.NOTE}\n\n{markdown_table(*tables.benchmark_table(judged['rows']))}\n"
        page += "\n".join(f"- {line}" for line in judged["about"])
        page += f"\n\n## Transfer\n\n{transfer.NOTE.format(judged['phrases'])}\n\n{markdown_table(*shown)}\n"
    texts[folder / f"{stem}.md"] = page
    for path, text in texts.items():
        write_atomically(path, functools.partial(Path.write_text, data=text, encoding="utf-8"))
    written = list(texts)
    tags = {"role": "evaluate", "teacher": data.vectors.teacher}
    with closing(retry_tracking(lambda: tracker.open_run(f"evaluate {name}", tags))) as run:
        retry_tracking(lambda: _log(run, asdict(options), rows, written))
        if judged is not None:
            scores = metrics_by_section(judged["rows"], [row for row in rows if "val_cosine" in row])
            retry_tracking(lambda: run.log_metrics(scores))
    return rows, judged, written


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
    if run is None:
        results = read_results(newest_results())
        found, recorded = [row["run_id"] for row in results["cells"]], results.get("vectors")
        name = grid = results["grid"]
    else:
        name, grid, found = tracker.students_below(run.removeprefix("runs:/").split("/")[0])
        recorded = None
    return name, grid, recorded, [tracker.student_of(run_id) for run_id in found]
