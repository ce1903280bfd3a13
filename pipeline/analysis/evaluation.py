"""How faithful students are on the test concepts: numbers with intervals, by group, and in the teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from wordfreq import zipf_frequency

from pipeline.analysis.baselines import BASELINES
from pipeline.analysis.intervention import MAX_CONCEPTS, NextTokenDistributions, kl_recovered, recovered_interval
from pipeline.analysis.rows import Row, configuration, grouped, ridge_baseline, section_names, section_of
from pipeline.analysis.tables import Table, markdown_table
from pipeline.data.dataset import Dataset
from pipeline.errors import InputError
from pipeline.metrics import cosines, faithfulness, interval, linear_cka, norm_error
from pipeline.settings import Cell
from pipeline.student.student import Student
from pipeline.teachers.find import Teacher
from pipeline.training.export import for_rows

FREQUENCIES = (3.0, 4.0, 5.0)  # Zipf scale: 3 is once in a million words, 5 is a hundred times that
FREQUENCY_NAMES = ("rare", *(f"Zipf {edge:g} and more" for edge in FREQUENCIES))
GROUPINGS = ("category", "tokens", "frequency")
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
TERMINAL_COLUMNS = ("student", "test_cosine", "test_r2", "test_retrieval_at_1", "kl_recovered")
Groups = dict[str, dict[str, list[int]]]
MeanDivergence = tuple[NextTokenDistributions, NDArray[np.float64]]  # and the divergence that the mean vector causes


def evaluate(
    students: Mapping[str, Sequence[Student]],
    data: Dataset,
    teacher: Teacher | None = None,
    advance: Callable[[float], None] = lambda students: None,
) -> list[Row]:
    """Measure students on the test concepts of their split, seeds of one configuration together.

    Args:
        students: the seeds of each configuration, by its name.
        data: the vectors that they were trained on.
        teacher: where given, `kl_recovered` is measured in it, on at most `MAX_CONCEPTS` concepts of all categories.
        advance: called with the number of students that have been measured.

    Returns:
        One row per name; before it those of its baselines on as many concepts: the mean, and the nearest concept.

    Raises:
        InputError: a student of other vectors, or a teacher for vectors that are means over tokens.
    """
    if teacher is not None and data.vectors.pool != "last":
        raise InputError(f"--teacher: takes vectors of one position (--pool last), found {data.vectors.pool}")
    rows: dict[str, Row] = {}
    distributions: dict[tuple[Any, ...], NextTokenDistributions] = {}  # by block and split
    divergences: dict[tuple[Any, ...], MeanDivergence] = {}  # by concepts, block and split
    cells = {name: cell_of_student(seeds[0], data) for name, seeds in students.items()}
    sections = section_names(map(vars, cells.values()))
    for name, seeds in students.items():
        cell = cells[name]
        subset = data.subset(cell)
        truth, mean = subset.test.targets, subset.mean
        concepts = [data.vectors.concepts[row] for row in subset.test.rows]
        section = section_of(vars(cell))
        place = (cell.concepts, *section)
        if teacher is not None and place not in divergences:
            if section not in distributions:
                template, layer, first = data.vectors.templates[0], cell.layer or 0, concepts[:MAX_CONCEPTS]
                distributions[section] = NextTokenDistributions(teacher, first, template, layer)
            known = distributions[section]
            divergences[place] = known, known.kl(mean.expand(len(known.prompts), -1))
        common = (cell, truth, mean, group_concepts(data, subset.test.rows), divergences.get(place))
        ridge = ridge_baseline(cell)
        reads = [ridge.inputs, "" if ridge.targets == "first" else f"targets {ridge.targets}"]
        for baseline, answer in BASELINES.items():
            own = [baseline, f"{cell.concepts} concepts", *(reads * (baseline == "nearest")), sections[section][0]]
            title = f"({', '.join(filter(None, own))})"
            if title not in rows:
                rows[title] = _row(title, answer(data.subset(ridge), subset.test)[None], *common)
        asked = [for_rows(student, data, subset.test.rows) for student in seeds]
        answers = torch.stack([torch.from_numpy(student.encode(concepts)) - mean for student in asked])
        val = float(np.mean([student.config["metrics"]["val_cosine"] for student in seeds]))
        rows[name] = {"val_cosine": val} | _row(name, answers, *common)
        advance(len(seeds))
    return list(rows.values())


def cell_of_student(student: Student, data: Dataset) -> Cell:
    """The cell that a student was trained as; an error where it was trained on other vectors."""
    if student.config["vectors_sha256"] != data.vectors.sha256:
        raise InputError("the student was trained on another vectors file; name that with --vectors")
    return Cell(**student.config["cell"])


def students_by_configuration(students: Sequence[Student], data: Dataset) -> dict[str, list[Student]]:
    """The seeds of each configuration: by the name of the cell, or of the configuration where there are several."""
    named = {}
    for shared, own in grouped(students, lambda student: configuration(cell_of_student(student, data))).items():
        one = cell_of_student(own[0], data)
        named[data.omit_default(shared).configuration_name if len(own) > 1 else data.omit_default(one).name] = own
    return named


def group_concepts(data: Dataset, rows: Sequence[int]) -> Groups:
    """Positions in ``rows`` by category, by number of tokens, and by frequency of the concept."""

    def values(row: int) -> tuple[str, str, str]:
        tokens = len(data.vectors.token_rows[row])
        zipf = zipf_frequency(data.vectors.concepts[row], data.vectors.language)
        frequency = FREQUENCY_NAMES[int(np.searchsorted(FREQUENCIES, zipf, side="right"))]
        return data.vectors.categories[row], str(tokens) if tokens < 4 else "4 and more", frequency

    columns = zip(*map(values, rows), strict=True)
    return {
        kind: dict(sorted(grouped(range(len(rows)), column.__getitem__).items()))
        for kind, column in zip(GROUPINGS, columns, strict=True)
    }


def _row(
    name: str, answers: Tensor, cell: Cell, truth: Tensor, mean: Tensor, groups: Groups, of_mean: MeanDivergence | None
) -> Row:
    """All that is measured of one configuration: ``answers`` is ``[seeds, N, d_model]``, centred."""
    each = cosines(answers, truth.expand_as(answers)).numpy()  # [seeds, N]
    low, high = interval(each)
    row: Row = {"student": name, "concepts": cell.concepts, "layer": cell.layer, "split": cell.split}
    row |= {"seeds": len(answers), "test_cosine_low": low, "test_cosine_high": high}
    measured = [
        faithfulness(answer, truth, mean)
        | {"cka": linear_cka(answer, truth), "norm_error": norm_error(answer + mean, truth + mean).mean().item()}
        for answer in answers
    ]
    row |= {f"test_{key}": float(np.mean([one[key] for one in measured])) for key in measured[0]}
    row["by"] = {kind: {group: _group_row(each[:, own]) for group, own in of.items()} for kind, of in groups.items()}
    if of_mean is not None:
        distributions, divergence = of_mean
        first = answers[:, : len(divergence)]
        kl = np.stack([distributions.kl(answer + mean) if answer.any() else divergence for answer in first])
        row["kl_recovered"] = kl_recovered(kl, divergence)
        row["kl_recovered_low"], row["kl_recovered_high"] = recovered_interval(kl, divergence)
    return row


def _group_row(each: NDArray[np.floating[Any]]) -> dict[str, float]:
    """One group's cosines ``[seeds, n]``: how many concepts, their mean and its interval."""
    low, high = interval(each)
    return {"concepts": each.shape[1], "cosine": float(each.mean()), "low": low, "high": high}


def evaluation_table(rows: Sequence[Row], brief: bool = False) -> Table:
    """The rows as text with 95 % intervals where they were measured; ``brief``: as it fits a terminal."""
    columns = [key for key in (TERMINAL_COLUMNS if brief else COLUMNS) if key in rows[0]]

    def text(row: Row, key: str) -> str:
        value = f"{row[key]:.3f}" if isinstance(row[key], float) else str(row[key])
        if f"{key}_low" not in row:
            return value
        low, high = row[f"{key}_low"], row[f"{key}_high"]
        return f"{value} ± {(high - low) / 2:.3f}" if brief else f"{value} ({low:.3f} to {high:.3f})"

    return [COLUMNS[key] for key in columns], [[text(row, key) for key in columns] for row in rows]


def group_table(rows: Sequence[Row], kind: str) -> Table:
    """Test cosine of every student (columns) on the concepts of each group (rows), with 95 % intervals."""
    sizes = {value: own["concepts"] for row in rows for value, own in row["by"][kind].items()}

    def text(row: Row, value: str) -> str:
        own = row["by"][kind].get(value)
        return f"{own['cosine']:.3f} ({own['low']:.3f} to {own['high']:.3f})" if own else ""

    head = [kind, "concepts", *(row["student"] for row in rows)]
    return head, [[value, str(size), *(text(row, value) for row in rows)] for value, size in sizes.items()]


def evaluation_markdown(rows: Sequence[Row]) -> str:
    """All tables as a Markdown page."""
    parts = ["# Test concepts", "", markdown_table(*evaluation_table(rows))]
    for kind in GROUPINGS:
        parts += [f"## Test cosine by {kind}", "", markdown_table(*group_table(rows, kind))]
    return "\n".join(parts)
