"""The check that a student's parts fit together: an inconsistent folder is refused when it is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import InputError
from pipeline.student.forward import FORWARD, first_map
from pipeline.student.lookup import NGRAM_BUCKETS, FeaturePart, TokenizedTexts
from pipeline.student.tokenizer import RaggedArray

if TYPE_CHECKING:
    from pipeline.student.student import Student

TOKEN_POOLS = ("mean", "last", "first", "sequence")  # whose tables have a row for each token


def validate(student: Student) -> None:
    """Check shapes and run the student on one token.

    Raises:
        InputError: shapes that do not fit together, or tokens without a row.
    """
    rows = [_checked_rows(student, part) for part in student.features.parts]
    needed = _needed_rows(student)
    if any(own < needed for part, own in zip(student.features.parts, rows, strict=True) if part.pool in TOKEN_POOLS):
        raise InputError(f"{needed:,} tokens, and tables of {min(rows):,}")
    catalogue = student.catalogue
    if catalogue is not None and (catalogue.width != student.d_model or len(catalogue.values) > len(student.concepts)):
        raise InputError("a catalogue that does not fit its concepts and vectors")
    try:
        inputs = student.features(TokenizedTexts(["a"], RaggedArray.from_lists([[0]]), np.zeros(1, np.int64)))
        output = FORWARD[student.config["student"]](student.parameters, inputs)
        fits = output.shape == (1, student.d_model) and student.mean.ndim == 1
    except (ValueError, IndexError, KeyError, AssertionError, ZeroDivisionError) as error:
        raise InputError(f"tensors that do not fit together ({error})") from error
    if not fits or (student.features.is_folded and first_map(student.parameters) is not None):
        raise InputError("tensors that do not fit together")


def _checked_rows(student: Student, part: FeaturePart) -> int:
    """Rows of a part's table, which must suit how it is pooled."""
    rows = len(student.features.tables[part.table].values)
    expected = {"place": len(student.concepts), "ngrams": NGRAM_BUCKETS}
    if part.pool not in TOKEN_POOLS and expected.get(part.pool) != rows:
        raise InputError(f"a table of {rows:,} rows for {part.pool!r}")
    if part.pool == "place" and student.tokenization is not None:
        raise InputError("tables of concepts, and a tokenizer for any text")
    if part.pool == "sequence" and student.parameters["positions"].shape[:1] != (student.features.max_tokens,):
        raise InputError("a sequence of another length than its positions")
    return rows


def _needed_rows(student: Student) -> int:
    """Rows that each token table must have; texts with a token that was added later are refused when encoded."""
    if student.tokenization is not None:
        ids = student.tokenization.tokenizer.get_vocab(with_added_tokens=False).values()
        return max(ids, default=-1) + 1
    tokens = student.token_rows
    if tokens is None:
        raise InputError("neither a tokenizer nor the tokens of its concepts")
    is_whole = tokens.offsets.shape == (len(student.concepts) + 1,) and tokens.values.ndim == 1
    if not is_whole or tokens.offsets[0] or (tokens.lengths < 1).any() or tokens.offsets[-1] != len(tokens.values):
        raise InputError("tokens of its concepts that do not fit together")
    if tokens.values.min() < 0:
        raise InputError("a token below zero")
    return int(tokens.values.max()) + 1
