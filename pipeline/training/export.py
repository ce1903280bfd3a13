"""Trained students as files: the checkpoint of a cell, and the exported student, which answers for any text."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from pipeline.data.dataset import ONE_HOT_INPUTS, Dataset, Subset, student_inputs
from pipeline.data.examples import Examples
from pipeline.errors import InputError
from pipeline.extraction.vocabulary import Vocabulary, fastest_tokenization
from pipeline.metrics import cosines, interval
from pipeline.settings import Cell
from pipeline.student.forward import first_map, low_rank_versions, without_first_map
from pipeline.student.lookup import BLOCK, FloatArray, Table, TokenFeatures
from pipeline.student.student import Student
from pipeline.teachers.families import licence_of
from pipeline.training.card import student_card

CATALOGUE_SIZE = 5000  # concepts whose true vectors are stored with a student
STORED_CONCEPTS = 20_000  # for which a checkpoint answers
STORED_CHARACTERS = 1 << 20  # of all concepts of a student, whose config.json has 8 MB at the most
MAX_RANK_LOSS = 1e-3  # of the validation cosine, by maps of lower rank: a third of the difference between seeds
RANK_STEP = 32  # between the ranks that are tried
MAX_FOLDED_SIZE = 2  # size of a folded table, in units of the tables that it replaces
log = logging.getLogger(__name__)


def checkpoint(
    cell: Cell, parameters: dict[str, Tensor], subset: Subset, data: Dataset, metrics: dict[str, float]
) -> Student:
    """A cell's student, exactly as trained (parameters with a member axis of 1), for the concepts of its file."""
    vectors = data.vectors
    config = {
        "student": cell.student, "cell": asdict(cell), "teacher": vectors.teacher, "revision": vectors.revision,
        "tokenizer": vectors.tokenizer, "layer": cell.layer, "template": vectors.templates[0], "pool": vectors.pool,
        "dtype": vectors.dtype, "extraction_key": vectors.extraction_key, "vectors_sha256": vectors.sha256,
        "metrics": metrics,
    }  # fmt: skip
    weights = {name: value.detach().float().cpu().numpy()[0].copy() for name, value in parameters.items()}
    whole = Student(config, weights, subset.mean.numpy(), subset.features, vectors.concepts, vectors.token_rows)
    # Of a large file the held-out concepts, those it was trained on, then others: a sweep keeps thousands of students.
    order = chain(subset.test.rows, subset.val.rows, subset.train.rows, range(len(vectors.concepts)))
    rows = _stored_rows(order, vectors.concepts, STORED_CONCEPTS)
    return whole if len(rows) == len(vectors.concepts) else for_rows(whole, data, sorted(rows))


def for_rows(student: Student, data: Dataset, rows: Sequence[int]) -> Student:
    """A checkpoint for the concepts of some rows of its vectors file; an exported student unchanged."""
    if student.tokenization is not None:
        return student
    vectors, chosen, tables = data.vectors, np.array(rows), dict(student.features.tables)
    for part in student.features.parts:
        if part.pool == "place":
            block = vectors.layer_index(int(part.table.removeprefix(BLOCK)))
            tables[part.table] = Table(vectors.vectors[chosen, 0, block])
    concepts, features = tuple(vectors.concepts[row] for row in rows), replace(student.features, tables=tables)
    return replace(student, features=features, concepts=concepts, token_rows=vectors.token_rows.take(chosen))


def _stored_rows(rows: Iterable[int], concepts: Sequence[str], count: int) -> list[int]:
    """The first of the rows, each once, whose concepts a student's folder holds: so many, and none too long."""
    found: dict[int, None] = {}
    characters = 0
    for row in rows:
        if row not in found:
            characters += len(concepts[row])
            if len(found) == count or characters > STORED_CHARACTERS:
                break
            found[row] = None
    return list(found)


def needs_teacher(cell: Cell) -> bool:
    """Whether the cell's student runs blocks of the teacher, so that it cannot be exported."""
    return any(name.startswith(BLOCK) for name in student_inputs(cell).split("+"))


def export_or_fallback(trained: Student, data: Dataset, vocabulary: Vocabulary | None) -> Student:
    """The exported student, or with a warning the checkpoint, where the teacher's vocabulary is missing or unusable."""
    reason = ""
    if vocabulary is not None:
        try:
            student = export(trained, data, vocabulary)
            student.files()  # fails where the student could not be loaded again
            return student
        except InputError as error:
            reason = f" ({error})"
    log.warning("warning: the student will answer for the concepts of its vectors file only%s", reason)
    return trained


def export(trained: Student, data: Dataset, vocabulary: Vocabulary) -> Student:
    """A checkpoint's student for any text: tables of the whole vocabulary in 8 bits, blocks of low rank, and a card."""
    cell = Cell(**trained.config["cell"])
    subset = data.subset(cell)
    features, parameters = _with_vocabulary(trained, data, cell, vocabulary)
    order = data.vectors.catalogue.order()
    rows = _stored_rows(order, data.vectors.concepts, CATALOGUE_SIZE)
    place = data.vectors.layer_index(cell.layer)
    catalogue = data.vectors.vectors[rows, 0, place].astype(np.float32) - trained.mean
    student = replace(
        trained,
        config=trained.config | {"teacher_licence": licence_of(trained.config["teacher"])},
        parameters=parameters,
        features=features.to_int8(),
        concepts=tuple(data.vectors.concepts[row] for row in rows),
        token_rows=None,
        tokenization=fastest_tokenization(vocabulary, data.vectors),
        catalogue=Table(catalogue).to_int8(),
    )
    student = _of_lower_rank(student, data, subset.val)
    before, after = (_cosines_of(one, data, subset.test) for one in (trained, student))
    low, high = interval(after[None].numpy())
    measured = {"test_cosine": float(after.mean()), "test_cosine_low": low, "test_cosine_high": high}
    lost = float(before.mean() - after.mean())
    config = student.config | {"metrics": trained.config["metrics"] | measured | {"test_cosine_lost_to_size": lost}}
    return replace(student, config=config, card=student_card(config, len(subset.train.rows)))


def _with_vocabulary(
    trained: Student, data: Dataset, cell: Cell, vocabulary: Vocabulary
) -> tuple[TokenFeatures, dict[str, FloatArray]]:
    """Token features of all tokens and the parameters; the first map is folded into tables that stay small."""
    weight = first_map(trained.parameters)
    inputs = student_inputs(cell).split("+")
    if "bag" in inputs and weight is None:
        raise InputError("a kernel of learned embeddings has no table of all tokens")
    features = data.vocabulary_features(cell, vocabulary.tables)
    plain = sum(table.width for table in features.tables.values())
    has_one_hot = any(name in ONE_HOT_INPUTS for name in inputs)
    if weight is None or (weight.shape[1] * len(features.parts) > MAX_FOLDED_SIZE * plain and not has_one_hot):
        return features, trained.parameters
    folded = features.folded(weight)
    tables = dict(folded.tables)
    for before, after in zip(features.parts, folded.parts, strict=True):
        if before.table == "bag":  # tokens of no concept have zeros
            everything = np.zeros((len(vocabulary.tables["token_embeddings"]), weight.shape[1]), np.float32)
            everything[data.vectors.token_vocab] = tables[after.table].values
            tables[after.table] = Table(everything)
    return replace(folded, tables=tables), without_first_map(trained.parameters)


def _of_lower_rank(student: Student, data: Dataset, val: Examples) -> Student:
    """The student with blocks of the least rank that loses at most `MAX_RANK_LOSS`, for speed and size."""
    # Unchanged where that takes half the width or more: two thin products then cost more than one.
    if student.config["student"] != "mlp":
        return student
    full, width = _cosines_of(student, data, val).mean(), student.config["cell"]["hidden_dim"]
    for parameters in low_rank_versions(student.parameters, range(RANK_STEP, width // 2, RANK_STEP)):
        thin = replace(student, parameters=parameters)
        if full - _cosines_of(thin, data, val).mean() <= MAX_RANK_LOSS:
            return thin
    return student


def _cosines_of(student: Student, data: Dataset, examples: Examples) -> Tensor:
    """Centred cosine of each concept of a part of the split, ``[n]``."""
    asked = for_rows(student, data, examples.rows)
    predicted = asked.encode([data.vectors.concepts[row] for row in examples.rows]) - student.mean
    return cosines(torch.from_numpy(predicted), examples.targets)
