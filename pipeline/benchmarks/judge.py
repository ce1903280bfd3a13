"""Students beside their teacher, the tables that they read and what costs no training, on benchmarks."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.analysis.baselines import nearest
from pipeline.analysis.results import train_alone
from pipeline.analysis.rows import Row, grouped, ridge_baseline
from pipeline.benchmarks.catalogue import BENCHMARKS, cache_folder, load
from pipeline.benchmarks.retention import measure
from pipeline.benchmarks.tasks import Floats, Rows, Task
from pipeline.benchmarks.transfer import Sides, category_transfer, rating_transfer, retrieval
from pipeline.data.dataset import Dataset, student_inputs
from pipeline.data.examples import Examples
from pipeline.data.stems import stems
from pipeline.data.vectors import Vectors
from pipeline.devices import TeacherAccess
from pipeline.errors import InputError
from pipeline.extraction.phrases import extract_phrases
from pipeline.extraction.vocabulary import Bar
from pipeline.settings import Cell
from pipeline.student.lookup import BLOCK, Table, TokenizedTexts, pool_mean
from pipeline.student.student import Student
from pipeline.training.export import checkpoint, for_rows

REFERENCES = {"token_activations": "untrained table", "token_embeddings": "input embeddings"}
Encoder = Callable[[Sequence[str]], Floats]  # from phrases to [n, width]


@dataclass(frozen=True)
class Judge:
    """Tasks, and the teacher's vectors and tokens of all their phrases."""

    data: Dataset
    tasks: Mapping[str, Task]  # by the name of the benchmark
    phrases: Vectors  # of all tasks, each once
    overlap: Mapping[str, int]  # items with a word whose stem a training concept has
    items: Mapping[str, int]  # of each task

    def steps(self, students: int) -> int:
        """The steps of measuring so many students: to read a student's vectors is one, each benchmark another."""
        return students * (1 + len(self.tasks))

    def rows(
        self,
        students: Mapping[str, Sequence[Student]],
        others: Mapping[str, Encoder] | None = None,
        advance: Callable[[float], None] = lambda steps: None,
    ) -> list[Row]:
        """Measure students with what they are compared with, block by block.

        Args:
            students: checkpoints of the data or exported students; the seeds of each configuration, by its name.
            others: further encoders, by name, such as static vectors of the same teacher.
            advance: called with the number of steps that are done, of `steps`.

        Returns:
            One row per name, in parentheses those that are no students of the sweep: the teacher, the tables of single
            tokens that students read, the mean over a phrase's tokens, the baselines, and the others.
        """
        found: list[Row] = []
        cells = {name: Cell(**seeds[0].config["cell"]) for name, seeds in students.items()}
        for layer, names in grouped(cells, lambda name: cells[name].layer).items():
            largest = max((cells[name] for name in names), key=lambda cell: cell.concepts)
            subset = self.data.subset(largest)
            place, mean = self.phrases.layer_index(layer), subset.mean.numpy()
            teacher = self.phrases.vectors[:, 0, place].astype(np.float32) - mean
            # Of each name: what its row says of it, and the vectors of its seeds.
            subjects: dict[str, tuple[Row, list[Floats]]] = {"(teacher)": ({}, [teacher])}
            rows = np.array(subset.train.rows)
            for table, title in REFERENCES.items():
                if (own := self._pooled(table, rows)) is not None:
                    subjects[f"({title})"] = ({}, [own])
            for name, encode in (others or {}).items():
                shift = encode([self.data.vectors.concepts[row] for row in rows]).mean(0)
                subjects[f"({name})"] = ({}, [encode(self.phrases.concepts) - shift])
            for baseline in dict.fromkeys(ridge_baseline(cells[name]) for name in names):
                subjects |= self._baselines(baseline)
            for name in names:
                vectors = [self.vectors_of(student) for student in students[name]]
                subjects[name] = ({"concepts": cells[name].concepts, "split": cells[name].split}, vectors)
                advance(len(students[name]))
            measured: dict[str, Row] = {name: {} for name in subjects}
            for benchmark, task in self.tasks.items():
                chosen = self._places(task)
                of_task = {name: [one[chosen] for one in seeds] for name, (_, seeds) in subjects.items()}
                for name, values in measure(task, teacher[chosen], of_task).items():
                    measured[name] |= values.row(benchmark)
                advance(sum(len(students[name]) for name in names))
            found += [
                {"student": name, "layer": layer, "seeds": len(seeds)} | about | measured[name]
                for name, (about, seeds) in subjects.items()
            ]
        return found

    def transfer(
        self,
        students: Mapping[str, Sequence[Student]],
        rows: Sequence[Row],
        advance: Callable[[float], None] = lambda students: None,
    ) -> None:
        """Add to the rows of students what probes and searches make of their vectors, mean over seeds."""
        for row in rows:
            if row["student"] not in students:
                continue
            measured = []
            for student in students[row["student"]]:
                measured.append(self._transfer_of(student))
                advance(1)
            row |= {name: float(np.mean([one[name] for one in measured])) for name in measured[0]}

    def _transfer_of(self, student: Student) -> dict[str, float]:
        cell = Cell(**student.config["cell"])
        subset, vectors = self.data.subset(cell), self.data.vectors
        sides, labels = [], []
        for rows in (subset.train.rows, subset.test.rows):
            truth = vectors.vectors[rows, 0, vectors.layer_index(cell.layer)].astype(np.float32) - student.mean
            own = for_rows(student, self.data, rows).encode([vectors.concepts[row] for row in rows]) - student.mean
            sides.append((truth, own))
            labels.append([vectors.categories[row] for row in rows])
        teacher, answers = (Sides(*(side[place] for side in sides)) for place in range(2))
        place = self.phrases.layer_index(cell.layer)
        truth, own = self.phrases.vectors[:, 0, place].astype(np.float32) - student.mean, self.vectors_of(student)
        found = category_transfer(teacher, answers, *labels) | retrieval(truth, own)
        for name, task in self.tasks.items():
            chosen = self._places(task)
            found |= rating_transfer(name, task, truth[chosen], own[chosen])
        return found

    def vectors_of(self, student: Student) -> Floats:
        """A student's centred vectors of all phrases, ``[phrases, d_model]``."""
        if student.tokenization is None:  # a checkpoint reads the teacher's tables
            cell = Cell(**student.config["cell"])
            student = replace(
                student, features=self._features(cell), concepts=self.phrases.concepts,
                token_rows=self.phrases.token_rows,
            )  # fmt: skip
        return student.encode(self.phrases.concepts) - student.mean

    def _features(self, cell: Cell) -> Any:
        """The cell's features with tables for the tokens and the blocks of the phrases."""
        vectors = self.phrases
        tables = {name: getattr(vectors, name) for name in REFERENCES}
        features = self.data.vocabulary_features(cell, tables)
        changed = dict(features.tables)
        for part in features.parts:
            if part.pool == "place":
                block = vectors.layer_index(int(part.table.removeprefix(BLOCK)))
                changed[part.table] = Table(vectors.vectors[:, 0, block])
            elif part.table == "bag":
                changed["bag"] = Table((vectors.token_vocab[:, None] == self.data.vectors.token_vocab).astype(np.int8))
        return replace(features, tables=changed)

    def _places(self, task: Task) -> Rows:
        places = {phrase: row for row, phrase in enumerate(self.phrases.concepts)}
        return np.array([places[phrase] for phrase in task.phrases], np.int64)

    def _pooled(self, table: str, rows: Rows) -> Floats | None:
        """Means of a token table over each phrase's tokens, minus that of training concepts; None without the table."""
        if not len(values := getattr(self.phrases, table)):
            return None
        own = pool_mean(Table(getattr(self.data.vectors, table)), self.data.vectors.token_rows.take(rows))
        pooled: Floats = pool_mean(Table(values), self.phrases.token_rows) - own.mean(0)
        return pooled

    def _baselines(self, cell: Cell) -> dict[str, tuple[Row, list[Floats]]]:
        """What needs no training on the concepts of a cell."""
        subset, number = self.data.subset(cell), len(self.phrases.concepts)
        about = {"concepts": cell.concepts, "split": cell.split}
        texts = TokenizedTexts(self.phrases.concepts, self.phrases.token_rows, np.arange(number))
        inputs = torch.from_numpy(self._features(cell)(texts))
        targets = torch.zeros(number, subset.train.targets.shape[1])
        trained = train_alone(cell, self.data)
        ridge = checkpoint(cell, trained.parameters, subset, self.data, trained.metrics)
        own = f"{cell.concepts} concepts, {cell.inputs}" + ("" if cell.targets == "first" else f", {cell.targets}")
        return {
            f"(mean, {cell.concepts} concepts)": (about, [targets.numpy()]),
            f"(nearest, {own})": (about, [nearest(subset, Examples(list(range(number)), inputs, targets)).numpy()]),
            f"(ridge, {own})": (about, [self.vectors_of(ridge)]),
        }


def open_judge(
    names: Sequence[str],
    data: Dataset,
    cells: Sequence[Cell],
    access: TeacherAccess,
    bar: Bar,
    folder: str | None = None,
    leave_out_overlap: bool = False,
) -> Judge:
    """Read benchmarks, and the teacher's vectors of their phrases.

    Args:
        names: in `BENCHMARKS`.
        data: what the students were trained on.
        cells: of the students, whose blocks are read.
        access: where the teacher runs.
        bar: shows the teacher's progress.
        folder: of the benchmarks' files.
        leave_out_overlap: leave out the items with a word whose stem a training concept has.

    Returns:
        What measures students.

    Raises:
        InputError: a benchmark's file or the teacher is not to be had.
        WorkError: out of memory.
    """
    tasks = {name: load(name, folder) for name in names}
    trained = max(cells, key=lambda cell: cell.concepts)
    language, concepts = data.vectors.language, data.vectors.concepts
    known = set().union(
        *(stems(concepts[row], language) for row in data.rows("train", trained.split)[: trained.concepts])
    )
    items, overlap = {}, {}
    for name, task in tasks.items():
        shares = np.array([bool(known & stems(phrase, "en")) for phrase in task.phrases])
        among = np.flatnonzero(shares[task.item_phrases].any(1))
        overlap[name] = len(among)
        if leave_out_overlap:
            tasks[name] = task.without(among)
        items[name] = len(tasks[name].item_phrases)
    phrases = dict.fromkeys(phrase for task in tasks.values() for phrase in task.phrases)
    read = {name for cell in cells for name in student_inputs(cell).split("+") if name.startswith(BLOCK)}
    layers = sorted({int(name.removeprefix(BLOCK)) for name in read} | {int(cell.layer or 0) for cell in cells})
    vectors = extract_phrases(data.vectors, list(phrases), layers, cache_folder(), access, bar)
    return Judge(data, tasks, vectors, overlap, items)


def static_encoder(folder: str) -> Encoder:
    """The encoder of a folder of static vectors in model2vec's format; its package must be installed."""
    try:
        library = importlib.import_module("model2vec")
    except ImportError as error:
        raise InputError("--static: needs the package model2vec (pip install model2vec)") from error
    model = library.StaticModel.from_pretrained(folder)
    return lambda phrases: np.asarray(model.encode(list(phrases)), np.float32)


def describe(judge: Judge) -> list[str]:
    """A line per benchmark: its items, the overlap with training concepts, what is measured and whom to cite."""
    lines = []
    for name in judge.tasks:
        about = BENCHMARKS[name]
        shared = f"{judge.overlap[name]:,} share a word's stem with a training concept"
        lines.append(f"{about.title}: {judge.items[name]:,} items ({shared}); {about.measures}. {about.citation}.")
    return lines


def static_name(folder: str) -> str:
    """The name of static vectors in tables."""
    return f"static, {Path(folder).name}"
