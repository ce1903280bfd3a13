"""The sweep and train commands: train cells, then write the results file, the report and the best students."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from pipeline.analysis.export_choice import baseline_student, best_exportable
from pipeline.analysis.results import Section, results_of, sections
from pipeline.commands import display
from pipeline.commands.benchmarks import check_benchmarks, judge_sweep, metrics_by_section
from pipeline.commands.results_file import write_results
from pipeline.commands.sweep_display import show_results, watch_sweep
from pipeline.data.dataset import Dataset
from pipeline.data.vectors import read_vectors
from pipeline.devices import TeacherAccess
from pipeline.errors import InputError
from pipeline.extraction.vocabulary import Vocabulary, find
from pipeline.processes import Worker, parse_shard, start
from pipeline.settings import Cell, SweepOptions, TrainOptions
from pipeline.storage import output_folder, writable
from pipeline.student.student import Student
from pipeline.sweep.cells import fill_in, prepare
from pipeline.sweep.cost import plan_table
from pipeline.sweep.estimate import expected_seconds
from pipeline.sweep.grid import Grid, canonical
from pipeline.sweep.run import Complete, Incomplete, SweepContext, run_sweep
from pipeline.tracking import Run, Tracker, connect, fetch, retry_tracking
from pipeline.training.export import export_or_fallback, needs_teacher

ALIAS = "best"  # of the newest registered version of a student


@dataclass(frozen=True)
class SavedStudent:
    """The student that a section leaves: the best on validation that needs no teacher."""

    section: Section
    folder: Path
    student: Student
    reason: str  # what it is, and which students it was preferred to
    is_new: bool  # no cell's run has it in this form


@dataclass(frozen=True)
class SweepJob:
    """A sweep as a command describes it."""

    cells: list[Cell]
    context: SweepContext
    options: TrainOptions | SweepOptions
    student_folder: Path | None = None  # beside the results file by default
    can_leave_baseline: bool = True  # where a baseline is better than all cells
    benchmarks: tuple[str, ...] = ()  # of the grid

    def run(self) -> None:
        """Train the cells, conclude the sweep if this worker completes it, and print the results or the progress."""
        with (
            watch_sweep(self.context.data) as listener,
            run_sweep(self.cells, replace(self.context, listener=listener)) as sweep,
        ):
            concluded = self._conclude(sweep) if isinstance(sweep, Complete) else None
        if concluded is not None:
            results, lines, path = concluded
            show_results(results, path)
            display.lines(*lines)
        elif isinstance(sweep, Incomplete):
            name, shard = sweep.sweep_id, self.context.shard
            report = "the shard that completes the sweep writes the report"
            if sweep.finished == sweep.cells:
                report = f"the report stands in MLflow, and `report --sweep-id {name}` draws it again"
            done = f"{sweep.finished} of {sweep.cells} cells are finished"
            display.lines(f"sweep {name}: shard {shard.index}/{shard.count} is done, {done}; {report}")

    def _conclude(self, sweep: Complete) -> tuple[dict[str, Any], list[str], Path]:
        """Write results, report and students, here and in MLflow; the results, lines that name files, and the first."""
        context, data, options = self.context, self.context.data, self.options
        results = results_of(context.name, data, sweep.rows, sweep.sweep_id) | {"vectors": context.vectors_uri}
        if isinstance(options, SweepOptions):
            judged = judge_sweep(results, data, context.tracker, context.accelerator.device, options, self.benchmarks)
            results = results if judged is None else results | {"benchmarks": judged}
        # All names follow from the rows, so workers that end together write the same files.
        path = context.output / f"{context.name}_results_{max(row['finished'] for row in sweep.rows)}.json"
        files = write_results(path, results, data)
        parts = sections(results)
        if options.report:
            from pipeline.commands.report import write_report  # only here, because the plots take seconds to load

            students = [context.tracker.student_of(part.results["best"]["run_id"]) for part in parts]
            files += write_report(results, path.stem, context.output, students, data)
        saved = self._save_students(parts, self.student_folder or path.with_name(f"{path.stem}_student"))
        scores = metrics_by_section(results["benchmarks"]["rows"], results["cells"]) if "benchmarks" in results else {}
        retry_tracking(lambda: _log(sweep.parent, context.tracker, files, saved, options.register))
        retry_tracking(lambda: sweep.parent.log_metrics({f"best_{name}": value for name, value in scores.items()}))
        titles = ["results", "", "report"] + [""] * len(files)
        lines = [f"{title:10}{file}" for title, file in zip(titles, files, strict=False)]
        for one in saved:
            lines += [f"student   {one.folder} ({one.student.summary})", f"          {one.reason}"]
        return results, [*lines, f"MLflow    {sweep.parent.address}"], path

    def _save_students(self, parts: list[Section], folder: Path) -> list[SavedStudent]:
        """Save the best student of each section, for any text where that is possible."""
        context, data, options, saved = self.context, self.context.data, self.options, []

        @functools.cache
        def find_vocabulary() -> Vocabulary | None:
            access = TeacherAccess(context.accelerator.device, options.device_map, options.trust_remote_code)
            return find(data.vectors, context.vectors_uri, access, display.counting("vocabulary", "tokens"))

        for part in parts:
            choice = best_exportable(part.results, self.can_leave_baseline)
            run_id = choice.row.get("run_id")
            trained = baseline_student(choice.row, data) if run_id is None else context.tracker.student_of(run_id)
            is_exportable = not needs_teacher(Cell(**trained.config["cell"]))
            student = export_or_fallback(trained, data, find_vocabulary()) if is_exportable else trained
            stem = folder.name.removesuffix("_student")  # names that end in "_student" keep that ending
            place = folder.parent / f"{stem}{part.suffix}{folder.name[len(stem) :]}"
            student.save(place)
            saved.append(SavedStudent(part, place, student, choice.reason, run_id is None or student is not trained))
        return saved


def train_student(options: TrainOptions) -> None:
    """Train one student, which is a sweep of one cell."""
    cell = canonical(Cell(**{item.name: getattr(options, item.name) for item in fields(Cell)}))
    with output_folder(options.output or "student") as folder:
        data = Dataset(read_vectors(fetch(options.vectors)))
        cells = prepare([cell], data)
        if options.output:
            writable(folder / "config.json")
        context = _make_context("train", data, options, folder.parent / "results")
        SweepJob(cells, context, options, folder if options.output else None, can_leave_baseline=False).run()


def train_grid(options: SweepOptions, grid: Grid) -> None:
    """Train every cell of a grid, or show how they would be trained.

    Raises:
        InputError: no cell has so few concepts, or a shard without ``--resume``.
    """
    shard = parse_shard(options.shard)
    if shard.count > 1 and not (options.resume or options.dry_run):
        raise InputError("--no-resume with --shard: shards know each other by the sweep's id; give a new --sweep-id")
    check_benchmarks(options)
    options = replace(options, vectors=options.vectors or grid.vectors)
    data = Dataset(read_vectors(fetch(str(options.vectors))))
    cells, most = list(grid.cells), options.max_concepts
    if most is not None and not (cells := [cell for cell in cells if fill_in(cell, data).concepts <= most]):
        raise InputError(f"grid {grid.name}: no cells with at most {most} concepts")
    cells = prepare(cells, data, grid.file)
    if options.dry_run:
        _show_plan(grid.name, cells, data, shard, bool(options.benchmark or grid.benchmarks))
        return
    with output_folder(options.output) as output:
        context = _make_context(grid.name, data, options, output)
        context = replace(context, sweep_id=options.sweep_id, shard=shard)
        SweepJob(cells, context, options, benchmarks=grid.benchmarks).run()


def _show_plan(name: str, cells: list[Cell], data: Dataset, shard: Worker, has_benchmarks: bool) -> None:
    accelerator = start()
    if accelerator.is_main_process:
        workers = shard.count * accelerator.num_processes
        display.table(*plan_table(cells, data, workers))
        seconds = expected_seconds(cells, data, accelerator.device, workers, has_benchmarks)
        expected = f"about {seconds:,.0f} s here with nothing else at work"
        display.lines(f"{name}: {len(cells)} cells, {expected}; nothing was trained")


def _make_context(name: str, data: Dataset, options: TrainOptions | SweepOptions, output: Path) -> SweepContext:
    """Check that results can be written and that the tracking server answers, and join the other processes."""
    writable(output / "results.json")
    tracker, accelerator = connect("sweep"), start()
    params, vectors = asdict(options), str(options.vectors)
    return SweepContext(name, data, vectors, tracker, accelerator, output, params, resume=options.resume)


def _log(parent: Run, tracker: Tracker, files: list[Path], saved: list[SavedStudent], register: str | None) -> None:
    """Log the files, the students and the best cells in the parent run."""
    tags: dict[str, str] = {}
    metrics: dict[str, float] = {"cells": sum(len(one.section.results["cells"]) for one in saved)}
    for one in saved:
        suffix, best = one.section.suffix, one.section.results["best"]
        if one.is_new:
            model_id = parent.log_student(one.folder, tracker.client.get_run(parent.id), f"student{suffix}")
            if register is not None:
                version = tracker.register(f"{register}{suffix}", model_id, ALIAS)
                tags[f"registered_model{suffix}"] = f"{register}{suffix} version {version}"
        own = {"best_run_id": best["run_id"], "best_cell": best["name"], "best_layer": str(best["layer"])}
        tags |= {f"{name}{suffix}": value for name, value in (own | {"student": one.reason}).items()}
        metrics |= {f"best_{name}{suffix}": best[name] for name in ("val_cosine", "test_cosine")}
    for file in files:
        parent.log_artifact(file)
    parent.log_metrics(metrics)
    parent.set_tags(tags)
