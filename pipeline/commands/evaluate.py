"""How faithful trained students are on the test concepts: numbers with intervals, by group, and in the teacher."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor
from wordfreq import zipf_frequency

from pipeline.analysis.baselines import BASELINES
from pipeline.analysis.intervention import NextTokenDistributions, kl_recovered, recovered_interval
from pipeline.analysis.results import read_results
from pipeline.analysis.rows import baseline_of, configuration, section_names, section_of
from pipeline.analysis.tables import markdown_table
from pipeline.commands.find_sweep import newest_results, vectors_for
from pipeline.data.dataset import Dataset
from pipeline.errors import InputError
from pipeline.extraction.vocabulary import Bar
from pipeline.metrics import cosines, faithfulness, interval, linear_cka, norm_error
from pipeline.settings import Cell, EvaluateOptions
from pipeline.storage import file_name, is_remote, own_name, writable, write_atomically
from pipeline.student.student import Student
from pipeline.teachers.find import Teacher, find_teacher, warn_of_another
from pipeline.teachers.load import load_teacher
from pipeline.tracking import Run, Tracker, closing, connect, retry_tracking

FREQUENCIES = (3.0, 4.0, 5.0)  # Zipf scale: 3 is once in a million words, 5 is a hundred times that
GROUPS = ("category", "tokens", "frequency")
Row = dict[str, Any]
log = logging.getLogger(__name__)


def evaluate(
    students: Mapping[str, Sequence[Student]],
    data: Dataset,
    teacher: Teacher | None = None,
    advance: Callable[[float], None] = lambda students: None,
) -> list[Row]:
    """Measure students on the test concepts of their split, seeds of one kind together.

    Args:
        students: by a name the same student with several seeds.
        data: the vectors that they were trained on.
        teacher: where given, `kl_recovered` is measured in it.
        advance: called with the number of students that have been measured.

    Returns:
        A row a name, and before it its baselines on as many concepts: the mean, and the nearest by what it reads.

    Raises:
        InputError: a student of other vectors, or a teacher for vectors that are means over tokens.
    """
    if teacher is not None and data.vectors.pool != "last":
        raise InputError(f"--teacher: takes vectors of one position (--pool last), found {data.vectors.pool}")
    rows: list[Row] = []
    done: set[tuple[Any, ...]] = set()
    distributions: dict[tuple[Any, ...], NextTokenDistributions] = {}  # by block and split
    continued: dict[tuple[Any, ...], tuple[NextTokenDistributions, NDArray[np.float64]]] = {}
    cells = {name: _cell(seeds[0], data) for name, seeds in students.items()}
    apart = section_names(map(vars, cells.values()))
    for name, seeds in students.items():
        cell = cells[name]
        subset = data.subset(cell)
        truth, mean = subset.test.targets, subset.mean
        concepts = [data.vectors.concepts[row] for row in subset.test.rows]
        place = (cell.concepts, cell.layer, cell.split)
        if teacher is not None and place not in continued:
            if place[1:] not in distributions:
                template, layer = data.vectors.templates[0], cell.layer or 0
                distributions[place[1:]] = NextTokenDistributions(teacher, concepts, template, layer)
            said = distributions[place[1:]]
            continued[place] = said, said.kl(mean.expand(len(concepts), -1))
        groups = _groups(data, subset.test.rows)
        rival, section = baseline_of(cell), apart[section_of(vars(cell))][0]
        for baseline, answer in BASELINES.items():
            known = [rival.inputs, *([] if rival.targets == "first" else [f"targets {rival.targets}"])]
            told = [f"{cell.concepts} concepts", *(known if baseline == "nearest" else []), section]
            named = f"({', '.join([baseline, *filter(None, told)])})"
            if (named, *place) not in done:
                done.add((named, *place))
                answers = answer(data.subset(rival), subset.test)[None]
                rows.append(_row(named, cell, answers, truth, mean, groups, continued.get(place)))
        answers = torch.stack([torch.from_numpy(student.encode(concepts)) - mean for student in seeds])
        val = float(np.mean([student.config["metrics"]["val_cosine"] for student in seeds]))
        rows.append({"val_cosine": val} | _row(name, cell, answers, truth, mean, groups, continued.get(place)))
        advance(len(seeds))
    return rows


def _cell(student: Student, data: Dataset) -> Cell:
    if student.config["vectors_sha256"] != data.vectors.sha256:
        raise InputError("the student was trained on another vectors file; name that with --vectors")
    return Cell(**student.config["cell"])


def _groups(data: Dataset, rows: Sequence[int]) -> dict[str, dict[str, list[int]]]:
    """Places of the test concepts by category, by number of tokens, and by frequency of the concept."""
    groups: dict[str, dict[str, list[int]]] = {kind: {} for kind in GROUPS}
    for place, row in enumerate(rows):
        tokens = len(data.types[row])
        zipf = zipf_frequency(data.vectors.concepts[row], data.vectors.language)
        bucket = int(np.searchsorted(FREQUENCIES, zipf, side="right"))
        edges = ["rare", *(f"Zipf {edge:g} and more" for edge in FREQUENCIES)]
        for kind, value in (
            ("category", data.vectors.categories[row]),
            ("tokens", str(tokens) if tokens < 4 else "4 and more"),
            ("frequency", edges[bucket]),
        ):
            groups[kind].setdefault(value, []).append(place)
    return {kind: dict(sorted(found.items())) for kind, found in groups.items()}


def _row(
    name: str,
    cell: Cell,
    answers: Tensor,
    truth: Tensor,
    mean: Tensor,
    groups: dict[str, dict[str, list[int]]],
    continued: tuple[NextTokenDistributions, NDArray[np.float64]] | None,
) -> Row:
    """All that is measured of one student: ``answers`` is ``[seeds, N, d_model]``, centred."""
    each = cosines(answers, truth.expand_as(answers)).numpy()  # [seeds, N]
    measured = [faithfulness(answer, truth, mean) for answer in answers]
    low, high = interval(each)
    row: Row = {"student": name, "concepts": cell.concepts, "layer": cell.layer, "split": cell.split}
    row |= {"seeds": len(answers), "test_cosine_low": low, "test_cosine_high": high}
    row |= {f"test_{key}": float(np.mean([one[key] for one in measured])) for key in measured[0]}
    row["test_cka"] = float(np.mean([linear_cka(answer, truth) for answer in answers]))
    row["test_norm_error"] = float(np.mean([norm_error(answer + mean, truth + mean).mean() for answer in answers]))
    row["by"] = {kind: {value: _of(each[:, own]) for value, own in found.items()} for kind, found in groups.items()}
    if continued is not None:
        said, of_mean = continued
        kl = np.stack([said.kl(answer + mean) if answer.any() else of_mean for answer in answers])
        row["kl_recovered"] = kl_recovered(kl, of_mean)
        row["kl_recovered_low"], row["kl_recovered_high"] = recovered_interval(kl, of_mean)
    return row


def _of(each: NDArray[np.floating[Any]]) -> dict[str, float]:
    """One group's cosines ``[seeds, n]``: how many concepts, their mean and its interval."""
    low, high = interval(each)
    return {"concepts": each.shape[1], "cosine": float(each.mean()), "low": low, "high": high}


COLUMNS = {
    "student": "student",
    "seeds": "seeds",
    "test_cosine": "test cosine",
    "test_cosine_raw": "raw",
    "test_r2": "R2",
    "test_retrieval_at_1": "retrieval@1",
    "test_retrieval_at_5": "@5",
    "test_cka": "CKA",
    "test_norm_error": "norm error",
    "kl_recovered": "KL recovered",
}


BRIEF = ("student", "test_cosine", "test_r2", "test_retrieval_at_1", "kl_recovered")  # fits a terminal


def evaluation_table(rows: Sequence[Row], brief: bool = False) -> tuple[list[str], list[list[str]]]:
    """The rows as text, with 95 % intervals where they were measured; briefly, few columns and half the width."""
    columns = [key for key in (BRIEF if brief else COLUMNS) if key in rows[0]]

    def text(row: Row, key: str) -> str:
        if key == "student":
            return f"{row[key]}"
        if not isinstance(row[key], float):
            return str(row[key])
        if f"{key}_low" not in row:
            return f"{row[key]:.3f}"
        low, high = row[f"{key}_low"], row[f"{key}_high"]
        return f"{row[key]:.3f} ± {(high - low) / 2:.3f}" if brief else f"{row[key]:.3f} ({low:.3f} to {high:.3f})"

    return [COLUMNS[key] for key in columns], [[text(row, key) for key in columns] for row in rows]


def group_table(rows: Sequence[Row], kind: str) -> tuple[list[str], list[list[str]]]:
    """Test cosine of every student (columns) on the concepts of each group (rows), with 95 % intervals."""
    groups = {value: own["concepts"] for row in rows for value, own in row["by"][kind].items()}

    def text(row: Row, value: str) -> str:
        own = row["by"][kind].get(value)
        return f"{own['cosine']:.3f} ({own['low']:.3f} to {own['high']:.3f})" if own else ""

    head = [kind, "concepts", *(row["student"] for row in rows)]
    return head, [[value, str(size), *(text(row, value) for row in rows)] for value, size in groups.items()]


def markdown(rows: Sequence[Row]) -> str:
    """All tables as a Markdown page."""
    parts = ["# Test concepts", "", markdown_table(*evaluation_table(rows))]
    for kind in GROUPS:
        parts += [f"## Test cosine by {kind}", "", markdown_table(*group_table(rows, kind))]
    return "\n".join(parts)


def run_evaluate(
    options: EvaluateOptions, accelerator: Accelerator, bar: Bar
) -> tuple[list[str], list[list[str]], list[Path]]:
    """Measure students and log what was found.

    Args:
        options: what the user asked for.
        accelerator: where the teacher runs.
        bar: given a number of students, a progress bar that is advanced by students.

    Returns:
        The table's head and rows, and the files written.

    Raises:
        InputError: no such run, students of other vectors, or an unknown teacher.
    """
    folder = writable(Path(options.output) / "evaluation.json").parent
    tracker = connect("evaluate")
    name, grid, recorded, found = _find_students(options.run, tracker)
    data = Dataset(vectors_for(grid, options.vectors, recorded))
    students = _by_configuration(found, data)
    teacher = None
    if options.teacher is not None:
        dtype = options.dtype or data.vectors.dtype
        source = find_teacher(options.teacher, dtype, accelerator.device, options.trust_remote_code)
        warn_of_another(source, data.vectors.revision, data.vectors.tokenizer)
        teacher = load_teacher(source, accelerator.device, options.device_map)
    with bar(sum(len(seeds) for seeds in students.values())) as advance:
        rows = evaluate(students, data, teacher, advance)
    stem = folder / f"{file_name(name)}_evaluation_{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    contents = {".json": json.dumps(rows, indent=1), ".md": markdown(rows)}
    written = []
    for suffix, text in contents.items():
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
    own = [row for row in rows if "val_cosine" in row]
    for key, (_, suffix) in section_names(own).items():
        best = max((row for row in own if section_of(row) == key), key=lambda row: row["val_cosine"])
        run.set_tags({f"best_student{suffix}": best["student"]})
        run.log_metrics({f"{key}{suffix}": value for key, value in best.items() if isinstance(value, float)})


def _find_students(run: str | None, tracker: Tracker) -> tuple[str, str, str | None, list[Student]]:
    """A name, the grid, the place of the vectors where it is recorded, and the students."""
    if run is not None and (is_remote(run) or Path(run).is_dir()):
        return own_name(Path(run)), "", None, [Student.load(run)]
    recorded = None
    if run is None:
        results = read_results(newest_results(Path("results")))
        found = [row["run_id"] for row in results["cells"]]
        name = grid = results["grid"]
        recorded = results.get("vectors")
    else:
        name, grid, found = tracker.students_below(run.removeprefix("runs:/").split("/")[0])
    return name, grid, recorded, [tracker.student_of(run_id) for run_id in found]


def _by_configuration(students: Sequence[Student], data: Dataset) -> dict[str, list[Student]]:
    """The seeds of each configuration: by the name of the cell, or of what several seeds share."""
    groups: dict[Cell, list[Student]] = {}
    for student in students:
        groups.setdefault(configuration(_cell(student, data)), []).append(student)
    named = {}
    for shared, own in groups.items():
        cell = data.as_named(shared if len(own) > 1 else _cell(own[0], data))
        named[cell.configuration_name if len(own) > 1 else cell.name] = own
    return named
