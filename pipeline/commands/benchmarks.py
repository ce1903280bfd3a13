"""The --benchmark option of evaluate and sweep: read benchmarks, measure students on them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pipeline.analysis.rows import Row, by_configuration, cell_of, section_names, section_of
from pipeline.benchmarks.catalogue import load, parse_names
from pipeline.benchmarks.judge import describe, open_judge, static_encoder, static_name
from pipeline.benchmarks.tables import row_of
from pipeline.commands import display
from pipeline.data.dataset import Dataset
from pipeline.devices import TeacherAccess
from pipeline.errors import InputError
from pipeline.settings import Cell, EvaluateOptions, SweepOptions
from pipeline.student.student import Student
from pipeline.tracking import Tracker, retry_tracking

Judged = dict[str, Any]  # "about": a line per benchmark, "rows": one per student and per what it is compared with
log = logging.getLogger(__name__)


def check_benchmarks(options: EvaluateOptions | SweepOptions) -> None:
    """Read the files of the benchmarks that are asked for, so that a missing one is named before anything runs."""
    for name in parse_names(options.benchmark):
        load(name, options.benchmark_data)


def judge_students(
    students: Mapping[str, Sequence[Student]], data: Dataset, device: torch.device, options: EvaluateOptions
) -> Judged | None:
    """Measure the students of an evaluation on the benchmarks that are asked for; None without any."""
    if not (names := parse_names(options.benchmark)):
        return None
    cells = [Cell(**seeds[0].config["cell"]) for seeds in students.values()]
    access = TeacherAccess(device, options.device_map, options.trust_remote_code, options.teacher)
    bar = display.counting("benchmarks", "phrases")
    judge = open_judge(names, data, cells, access, bar, options.benchmark_data, options.leave_out_overlap)
    others = {static_name(folder): static_encoder(folder) for folder in options.static if folder}
    number = sum(map(len, students.values()))
    with display.counting("benchmarks", "steps")(judge.steps(number)) as advance:
        rows = judge.rows(students, others, advance)
    with display.counting("transfer", "students")(number) as advance:
        judge.transfer(students, rows, advance)
    return {"about": describe(judge), "rows": rows, "phrases": len(judge.phrases.concepts)}


def judge_sweep(
    results: dict[str, Any],
    data: Dataset,
    tracker: Tracker,
    device: torch.device,
    options: SweepOptions,
    of_grid: Sequence[str],
) -> Judged | None:
    """Measure what the cells' students retain on benchmarks, add it to their rows, and log it in their runs.

    Args:
        results: the content of a results file.
        data: the vectors that the cells were trained on.
        tracker: knows the cells' students.
        device: where the teacher runs.
        options: of the sweep; the benchmarks that it names must be at hand.
        of_grid: benchmarks that the grid names; where one is not at hand a warning says so.

    Returns:
        The measurements, or None without any.

    Raises:
        InputError: a benchmark of the options, or the teacher for it, is not to be had.
    """
    names = parse_names(options.benchmark or of_grid)
    groups: dict[str, list[Row]] = {}
    for shared, rows in by_configuration(results["cells"]).items():
        cell = data.omit_default(shared)
        groups[cell.configuration_name if len(rows) > 1 else rows[0]["name"]] = rows
    try:
        if not options.benchmark:
            names = [name for name in names if _is_at_hand(name, options.benchmark_data)]
        if not names:
            return None
        access = TeacherAccess(device, options.device_map, options.trust_remote_code)
        cells, bar = list(map(cell_of, results["cells"])), display.counting("benchmarks", "phrases")
        judge = open_judge(names, data, cells, access, bar, options.benchmark_data)
    except InputError as error:
        if options.benchmark:
            raise
        log.warning("warning: not measured on benchmarks (%s)", error)
        return None
    with display.counting("benchmarks", "steps")(judge.steps(len(results["cells"]))) as advance:
        students = {name: [tracker.student_of(row["run_id"]) for row in rows] for name, rows in groups.items()}
        judged = judge.rows(students, advance=advance)
    for row in judged:
        row["cells"] = [cell_row["name"] for cell_row in groups.get(row["student"], [])]
        for place, cell_row in enumerate(groups.get(row["student"], [])):
            values = {f"{name}_score": row[f"{name}_scores"][place] for name in names}
            shares = {f"{name}_retained": row[f"{name}_shares"][place] for name in names}
            values |= {name: share for name, share in shares.items() if share is not None}
            cell_row |= values
            retry_tracking(functools.partial(tracker.log_metrics, cell_row["run_id"], values))
    return {"about": describe(judge), "rows": judged}


def _is_at_hand(name: str, folder: str | None) -> bool:
    try:
        load(name, folder)
    except InputError as error:
        log.warning("warning: not measured on %s (%s)", name, error)
        return False
    return True


def metrics_by_section(judged: Sequence[Row], rows: Sequence[Row]) -> dict[str, float]:
    """The scores and shares of each section's best row on validation, named with the section's suffix."""
    found: dict[str, float] = {}
    for section, (_, suffix) in section_names(rows).items():
        best = max((row for row in rows if section_of(row) == section), key=lambda row: row["val_cosine"])
        own = row_of(judged, str(best.get("name", best["student"])))
        chosen = {name: value for name, value in own.items() if name.endswith(("_score", "_retained"))}
        found |= {f"{name}{suffix}": value for name, value in chosen.items() if value is not None}
    return found
