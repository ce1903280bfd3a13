"""From training to students that stand alone: a cell's checkpoint, and a folder that answers for any text."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.concepts import balanced_order
from pipeline.data.dataset import ONE_HOT_INPUTS, Dataset, Examples, Subset, student_inputs
from pipeline.errors import InputError
from pipeline.extraction.vocabulary import Vocabulary, tokenization_of
from pipeline.metrics import interval
from pipeline.settings import Cell
from pipeline.student.forward import first_map, low_rank_versions, without_first_map
from pipeline.student.lookup import BLOCK, Table, TokenFeatures
from pipeline.student.student import Student
from pipeline.teachers.families import licence_of
from pipeline.training.card import student_card

MOST_CATALOGUE = 5000  # concepts whose true vectors go with a student
log = logging.getLogger(__name__)
COMPRESSED = 1e-3  # of the validation cosine may be lost to maps of lower rank: a third of what seeds differ by
RANKS = 32  # the step from one rank to the next that is tried
WIDER = 2  # how many times the size of the tables it replaces a folded table may have


def checkpoint(
    cell: Cell, parameters: dict[str, Tensor], subset: Subset, data: Dataset, metrics: dict[str, float]
) -> Student:
    """A cell's student, exactly as it was trained, for the concepts of its vectors file.

    Args:
        cell: its configuration.
        parameters: its weights with a member axis of 1, in units of the subset's scale.
        subset: what it was trained on.
        data: where that was cut from.
        metrics: of the kept checkpoint.
    """
    vectors = data.vectors
    config = {
        "student": cell.student,
        "cell": asdict(cell),
        "teacher": vectors.teacher,
        "revision": vectors.revision,
        "tokenizer": vectors.tokenizer,
        "layer": cell.layer,
        "template": vectors.templates[0],
        "pool": vectors.pool,
        "dtype": vectors.dtype,
        "extraction_key": vectors.extraction_key,
        "vectors_sha256": vectors.sha256,
        "metrics": metrics,
    }
    held = {name: value.detach().float().cpu().numpy()[0].copy() for name, value in parameters.items()}
    return Student(config, held, subset.mean.numpy(), subset.features, vectors.concepts, vectors.token_rows)


def needs_teacher(cell: Cell) -> bool:
    """Whether the cell's student runs blocks of the teacher: it cannot stand alone."""
    return any(name.startswith(BLOCK) for name in student_inputs(cell).split("+"))


def export_or_fallback(trained: Student, data: Dataset, vocabulary: Vocabulary | None) -> Student:
    """The student for any text; as it is, with a warning, where the teacher's vocabulary is out of reach.

    Args:
        trained: a cell's checkpoint, whose student does not need the teacher.
        data: the vectors that it was trained on.
        vocabulary: of their teacher, where `pipeline.extraction.vocabulary.find` found it.
    """
    if vocabulary is None:
        log.warning("warning: the student will answer for the concepts of its vectors file only")
        return trained
    try:
        student = export(trained, data, vocabulary)
        student.files()  # what cannot be loaded again is not left
        return student
    except InputError as error:
        log.warning("warning: the student will answer for the concepts of its vectors file only (%s)", error)
        return trained


def export(trained: Student, data: Dataset, vocabulary: Vocabulary) -> Student:
    """A student for any text: the whole vocabulary, the first map folded in, in 8 bits, low rank, with a card.

    Args:
        trained: a cell's checkpoint, whose student does not need the teacher.
        data: the vectors that it was trained on.
        vocabulary: of their teacher.

    Raises:
        InputError: the vocabulary's tokenizer gives other tokens than the vectors file has.
    """
    cell = Cell(**trained.config["cell"])
    subset = data.subset(cell)
    features, parameters = _with_vocabulary(trained, data, cell, vocabulary)
    order = balanced_order(data.vectors.concepts, data.vectors.categories)[:MOST_CATALOGUE]
    first = [*order, *sorted(set(range(len(data.vectors.concepts))) - set(order))]
    place = data.vectors.layer_index(cell.layer)
    catalogue = data.vectors.vectors[order, 0, place].astype(np.float32) - trained.mean
    student = replace(
        trained,
        config=trained.config | {"teacher_licence": licence_of(trained.config["teacher"])},
        parameters=parameters,
        features=features.to_int8(),
        concepts=tuple(data.vectors.concepts[row] for row in first),
        token_rows=None,
        tokenization=tokenization_of(vocabulary, data.vectors),
        catalogue=Table(catalogue).to_int8(),
    )
    student = _of_lower_rank(student, data, subset.val)
    before, after = (_faithfulness(one, data, subset.test) for one in (trained, student))
    low, high = interval(after[None])
    measured = {"test_cosine": float(after.mean()), "test_cosine_low": low, "test_cosine_high": high}
    lost = float(before.mean() - after.mean())
    config = student.config | {"metrics": trained.config["metrics"] | measured | {"test_cosine_lost_to_size": lost}}
    return replace(student, config=config, card=student_card(config, len(subset.train.rows)))


def _with_vocabulary(
    trained: Student, data: Dataset, cell: Cell, vocabulary: Vocabulary
) -> tuple[TokenFeatures, dict[str, NDArray[np.float32]]]:
    """The student's reading with all tokens, folded where that is not much larger, and the parameters behind it."""
    weight = first_map(trained.parameters)
    inputs = student_inputs(cell).split("+")
    if "bag" in inputs and weight is None:
        raise InputError("a kernel of learned embeddings has no table of all tokens")
    features = data.vocabulary_features(cell, vocabulary.tables)
    plain = sum(table.width for table in features.tables.values())
    if weight is None or (
        weight.shape[1] * len(features.parts) > WIDER * plain and not any(name in ONE_HOT_INPUTS for name in inputs)
    ):
        return features, trained.parameters
    folded = features.folded(weight)
    tables = dict(folded.tables)
    for before, after in zip(features.parts, folded.parts, strict=True):
        if before.table == "bag":  # tokens that no concept has count for nothing
            everything = np.zeros((len(vocabulary.tables["token_embeddings"]), weight.shape[1]), np.float32)
            everything[data.vectors.token_vocab] = tables[after.table].values
            tables[after.table] = Table(everything)
    return replace(folded, tables=tables), without_first_map(trained.parameters)


def _of_lower_rank(student: Student, data: Dataset, val: Examples) -> Student:
    """The student with the blocks of the least rank that costs next to nothing of its validation cosine.

    It answers in less time and takes less space; where no rank under half the width will do it stays as it is.
    """
    if student.config["student"] != "mlp":
        return student
    whole, width = _faithfulness(student, data, val).mean(), student.config["cell"]["hidden_dim"]
    # From half the width on two thin products cost more than one.
    for parameters in low_rank_versions(student.parameters, range(RANKS, width // 2, RANKS)):
        thin = replace(student, parameters=parameters)
        if whole - _faithfulness(thin, data, val).mean() <= COMPRESSED:
            return thin
    return student


def _faithfulness(student: Student, data: Dataset, side: Examples) -> NDArray[np.float32]:
    """The centred cosine of each concept of a side, ``[n]``."""
    predicted, truth = student.encode([data.vectors.concepts[row] for row in side.rows]), side.targets.numpy()
    predicted -= student.mean
    lengths = np.linalg.norm(predicted, axis=1) * np.linalg.norm(truth, axis=1)
    cosines: NDArray[np.float32] = (predicted * truth).sum(1) / np.where(lengths > 0, lengths, 1)
    return cosines
