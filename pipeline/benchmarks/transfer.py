"""Whether what works with the teacher's vectors works with a student's: probes in both directions, and retrieval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.analysis.rows import Row
from pipeline.benchmarks.tasks import Floats, Ratings, Task, fit_probe
from pipeline.metrics import ranks

QUERIES = 5000  # phrases that are searched for: their share is within 0.014 of that of all (95 %)
NOTE = (
    "Category: accuracy on the test concepts of a linear probe, fitted on the training concepts' vectors of the "
    f"teacher, or of the student, and is applied to the other's. Found: the share of phrases, of at most {QUERIES:,}, "
    "whose nearest vector of the other among {:,} is their own."
)
COLUMNS = {
    "category_of_teacher": "category: teacher",
    "category_to_student": "teacher to student",
    "category_to_teacher": "student to teacher",
    "retrieval_to_teacher": "finds teacher's",
    "retrieval_to_student": "found by teacher's",
}


@dataclass(frozen=True)
class Sides:
    """Training and test concepts with their categories, as one encoder has them, centred."""

    train: Floats  # [N, d_model]
    test: Floats  # [n, d_model]


def category_transfer(
    teacher: Sides, student: Sides, train_labels: Sequence[str], test_labels: Sequence[str]
) -> dict[str, float]:
    """Accuracy on test concepts of a linear probe of the category, fitted on training concepts.

    Args:
        teacher: the teacher's vectors.
        student: a student's vectors of the same concepts.
        train_labels: N categories.
        test_labels: n categories.

    Returns:
        Accuracies of the teacher's probe on the teacher's vectors and on the student's, and of the student's probe on
        the teacher's.
    """
    names = sorted(set(train_labels))
    truths = np.array([[label == name for name in names] for label in train_labels], np.float64)
    probes = {"teacher": fit_probe(teacher.train, truths), "student": fit_probe(student.train, truths)}

    def accuracy(probe: str, vectors: Floats) -> float:
        said = probes[probe](vectors).argmax(1)
        return float(np.mean([names[place] == label for place, label in zip(said, test_labels, strict=True)]))

    return {
        "category_of_teacher": accuracy("teacher", teacher.test),
        "category_to_student": accuracy("teacher", student.test),
        "category_to_teacher": accuracy("student", teacher.test),
    }


def rating_transfer(name: str, task: Task, teacher: Floats, student: Floats) -> dict[str, float]:
    """Scores of a probe of ratings by people that was fitted on one encoder's vectors, on the other's.

    Args:
        name: of the benchmark.
        task: others than `Ratings` have no probe to transfer.
        teacher: the teacher's vectors of the task's phrases, ``[phrases, d_model]``.
        student: a student's.

    Returns:
        The scores by ``<name>_to_student`` and ``<name>_to_teacher``.
    """
    if not isinstance(task, Ratings):
        return {}
    ones = np.ones((1, len(task.item_phrases)))

    def score(fitted: Floats, asked: Floats) -> float:
        return float(task.score(task.transferred(fitted, asked), ones)[0])

    return {f"{name}_to_student": score(teacher, student), f"{name}_to_teacher": score(student, teacher)}


def retrieval(teacher: Floats, student: Floats) -> dict[str, float]:
    """Share of phrases whose nearest vector of the other encoder is their own.

    Args:
        teacher: ``[phrases, d_model]``.
        student: ``[phrases, d_model]``.

    Returns:
        The shares in both directions, of at most `QUERIES` phrases, each searched among all.
    """
    one, other = (torch.from_numpy(np.ascontiguousarray(vectors, np.float32)) for vectors in (teacher, student))
    asked = torch.linspace(0, len(one) - 1, min(QUERIES, len(one)), dtype=torch.float64).long()
    return {
        "retrieval_to_teacher": (ranks(other, one, asked) < 1).float().mean().item(),
        "retrieval_to_student": (ranks(one, other, asked) < 1).float().mean().item(),
    }


def transfer_table(rows: Sequence[Row], tasks: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
    """The rows that have these measurements, as text; ``tasks`` gives the titles of benchmarks by name."""
    columns = dict(COLUMNS)
    for name, title in tasks.items():
        if any(f"{name}_to_student" in row for row in rows):
            columns |= {f"{name}_to_student": f"{title}: to student", f"{name}_to_teacher": "to teacher"}
    shown = [row for row in rows if "retrieval_to_teacher" in row]
    return ["student", *columns.values()], [[row["student"], *(f"{row[key]:.3f}" for key in columns)] for row in shown]
