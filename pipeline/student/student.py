"""A trained student as a thing of its own: a folder from whose text comes a vector, with NumPy and nothing else.

A student without a tokenizer answers for the concepts of its vectors file: that is how a sweep keeps its cells.

    from pipeline import Student
    Student.load("my-student").encode(["volcano", "slow cooking"])  # [2, d_model]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from tokenizers import Tokenizer

from pipeline.errors import InputError, WorkError
from pipeline.storage import fetch
from pipeline.student.folder import TOKENIZER, Folder, pack, read_folder, unpack, write_folder
from pipeline.student.forward import FORWARD, first_map
from pipeline.student.lookup import NGRAM_BUCKETS, FloatArray, Part, Table, TokenFeatures, TokenizedTexts
from pipeline.student.tokenizer import RaggedArray, Tokenization, nfc, normalise_texts

CHUNK = 1024  # texts read at once, so that they stay in the cache
BULK = 20_000  # texts for which loading torch pays
BULK_CHUNK = 2048
THREADS = min(4, os.cpu_count() or 1)
BULK_THREADS = min(8, os.cpu_count() or 1)  # each on one core: a tokenizer and small sums leave the others idle


@dataclass(frozen=True, eq=False)
class Student:
    """A student with all that turns text into a vector. It may be used by many threads at once.

    Attributes:
        config: what it is and where it comes from (plain JSON values).
        parameters: its weights.
        mean: mu of its training vectors, ``[d_model]``, which is added to its answer.
        reading: how it reads.
        concepts: of the vectors file that it was trained on.
        token_rows: of each of these its rows in the token tables; None where it has the teacher's tokenizer.
        tokenization: how any text becomes rows of the token tables; None where it knows its concepts only.
        catalogue: true vectors of the first concepts, centred, ``[.., d_model]``; None where it has none.
        card: the text of its README.
    """

    config: dict[str, Any]
    parameters: dict[str, FloatArray]
    mean: FloatArray
    features: TokenFeatures
    concepts: tuple[str, ...]
    token_rows: RaggedArray | None = None
    tokenization: Tokenization | None = None
    catalogue: Table | None = None
    card: str = ""

    @property
    def d_model(self) -> int:
        """Width of its vectors."""
        return len(self.mean)

    @property
    def summary(self) -> str:
        """What it answers for and what its small size costs, in a few words."""
        if self.tokenization is None:
            return f"answers for the {len(self.concepts):,} concepts of its vectors file"
        metrics = self.config["metrics"]
        return (
            f"answers for any text; test cosine {metrics['test_cosine']:.3f}, "
            f"{metrics['test_cosine_lost_to_size']:.4f} lost to 8 bits and low rank"
        )

    @cached_property
    def _places(self) -> dict[str, int]:
        return {nfc(concept): place for place, concept in enumerate(self.concepts)}

    @cached_property
    def _directions(self) -> FloatArray:
        """The catalogue with rows of length 1, ``[.., d_model]``."""
        assert self.catalogue is not None
        return _unit(self.catalogue[np.arange(len(self.catalogue.values))])

    def encode(
        self,
        sentences: str | Sequence[str],
        batch_size: int = CHUNK,
        show_progress_bar: bool = False,
        normalize_embeddings: bool = False,
    ) -> FloatArray:
        """The predicted activation vectors of texts, not centred.

        The arguments are named as those of sentence-transformers. A text's vector is the same alone and among others,
        up to the rounding of float32 (1e-6 of its length). `BULK` texts and more go through torch where it is
        installed, which takes less time for the same sums.

        Args:
            sentences: texts, or one.
            batch_size: texts at once.
            show_progress_bar: show how far it is.
            normalize_embeddings: centre the vectors and give them length 1, so that a product is a cosine.

        Returns:
            ``[n, d_model]``, or ``[d_model]`` of one text.

        Raises:
            InputError: something that is no text, an empty one, one too long, or one that the student does not know.
        """
        if isinstance(sentences, str):
            answer: FloatArray = self.encode([sentences], normalize_embeddings=normalize_embeddings)[0]
            return answer
        if batch_size < 1:
            raise InputError(f"batch_size {batch_size}: expected at least 1")
        texts = normalise_texts(sentences)
        answers = np.empty((len(texts), self.d_model), np.float32)
        shift = np.zeros_like(self.mean) if normalize_embeddings else self.mean
        bulk = self._bulk if len(texts) >= BULK else None
        compute, threads = bulk or self._compute, BULK_THREADS if bulk else THREADS
        if bulk:
            batch_size = BULK_CHUNK
        # Reading is Python's: beside it, products that are short would wait for it after each.
        ready = self._texts(texts) if bulk else None

        def work(start: int) -> None:
            stop = min(start + batch_size, len(texts))
            asked = self._texts(texts[start:stop]) if ready is None else ready.part(start, stop)
            compute(asked, shift, answers[start:stop])

        with _progress(len(texts), show_progress_bar) as advance:
            for start in _side_by_side(work, range(0, len(texts), batch_size), threads):
                advance(min(batch_size, len(texts) - start))
        return _unit(answers) if normalize_embeddings else answers

    def _compute(self, texts: TokenizedTexts, shift: FloatArray, out: FloatArray) -> None:
        """Write centred vectors plus a shift ``[d_model]`` to ``out``, ``[n, d_model]``."""
        np.add(FORWARD[self.config["student"]](self.parameters, self.features(texts)), shift, out=out)

    @cached_property
    def _bulk(self) -> Callable[[TokenizedTexts, FloatArray, FloatArray], None] | None:
        """The same for very many texts, where torch is installed and the student is of a kind that it speeds up."""
        try:
            from pipeline.student.bulk import bulk_of
        except ImportError:  # where a student stands alone
            return None
        return bulk_of(self.config["student"], self.features, self.parameters)

    def _texts(self, texts: Sequence[str]) -> TokenizedTexts:
        if self.tokenization is not None:
            return TokenizedTexts(texts, self.tokenization(texts))
        assert self.token_rows is not None
        for text in texts:
            if text not in self._places:
                raise InputError(
                    f"text {text[:60]!r}: this student answers for the {len(self.concepts):,} concepts of its vectors "
                    "file only; the one that a sweep leaves in its results answers for any text"
                )
        places = np.array([self._places[text] for text in texts], np.int64)
        return TokenizedTexts(texts, self.token_rows.take(places), places)

    def nearest(self, vectors: FloatArray, count: int) -> list[list[tuple[str, float]]]:
        """Of each vector the concepts whose true vectors have the highest centred cosine with it, best first.

        Args:
            vectors: not centred, ``[n, d_model]``.
            count: how many concepts.

        Raises:
            InputError: the student carries no catalogue.
        """
        if self.catalogue is None:
            raise InputError("this student carries no catalogue of concepts; the one that a sweep leaves does")
        found = []
        for start in range(0, len(vectors), CHUNK):
            similarity = _unit(vectors[start : start + CHUNK] - self.mean) @ self._directions.T  # [CHUNK, catalogue]
            for row, places in zip(similarity, np.argsort(-similarity, axis=1)[:, :count], strict=True):
                found.append([(self.concepts[place], float(row[place])) for place in places])
        return found

    def save(self, folder: Path) -> None:
        """Write the folder's files, each whole or not at all.

        Raises:
            WorkError: it could not be loaded again; nothing was written.
        """
        try:
            contents = self.files()
        except InputError as error:
            raise WorkError(f"student {folder}: would not load again ({error}); not written") from error
        write_folder(folder, contents)

    def files(self) -> dict[str, bytes]:
        """The folder's files by name, which are known to make a student again.

        Raises:
            InputError: it does not fit together.
        """
        tensors: dict[str, NDArray[Any]] = {"mean": self.mean}
        tensors |= {f"parameters.{name}": value for name, value in self.parameters.items()}
        tensors |= {"reading.offset": self.features.offset, "reading.scale": self.features.scale}
        for name, table in self._tables().items():
            tensors[f"{name}.values"] = table.values
            if table.scale is not None:
                tensors[f"{name}.scale"] = table.scale
        if self.token_rows is not None:
            tensors |= {"token_rows": self.token_rows.values, "token_offsets": self.token_rows.offsets}
        config = self.config | {
            "concepts": list(self.concepts),
            "reading": {
                "parts": [[part.table, part.pool] for part in self.features.parts],
                "longest": self.features.max_tokens,
                "is_folded": self.features.is_folded,
            },
        }
        tokenizer = None
        if self.tokenization is not None:
            tokenizer = self.tokenization.tokenizer
            config["tokenization"] = {name: getattr(self.tokenization, name) for name in ("prompt", "whole", "by_word")}
        contents = pack(Folder(config, tensors, tokenizer, self.card))
        with _refused():
            if self.tokenization is None:
                _check(self)  # of these a sweep keeps thousands, and reading one takes longer than writing it
            else:
                _assembled(unpack(contents.__getitem__, self.card))
        return contents

    def _tables(self) -> dict[str, Table]:
        tables = {f"tables.{name}": table for name, table in self.features.tables.items()}
        return tables if self.catalogue is None else tables | {"catalogue": self.catalogue}

    @classmethod
    def load(cls, folder: str | Path) -> Student:
        """Read a student folder: a local one, ``s3://bucket/key``, or ``hf://owner/name`` of the Hugging Face hub.

        Raises:
            InputError: not a student folder, a damaged one, one of another format, or one that does not fit together.
        """
        place = str(folder)
        if place.startswith("hf://"):
            from pipeline.hub import fetch as fetch_from_hub

            path = fetch_from_hub(place)
        else:
            path = fetch(place)
        try:
            with _refused():
                return _assembled(read_folder(path))
        except InputError as error:
            raise InputError(f"student {place}: {error}") from error


@contextmanager
def _refused() -> Iterator[None]:
    """Turn whatever files of another kind lead to into an `InputError`."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError, SafetensorError) as error:
        raise InputError(f"not a student folder, or damaged ({error})") from error


def _side_by_side(work: Any, starts: Sequence[int], workers: int) -> Iterator[int]:
    """Do the work in threads; NumPy and the tokenizer let others run meanwhile."""
    if workers < 2 or len(starts) < 2:
        for start in starts:
            work(start)
            yield start
        return
    with ThreadPoolExecutor(workers) as threads:
        for start, done in zip(starts, threads.map(work, starts), strict=True):
            assert done is None
            yield start


class _progress:  # noqa: N801 (used like a function)
    """A progress bar in texts, where one is wanted."""

    def __init__(self, total: int, shown: bool) -> None:
        self.bar: Any = None
        if shown:
            from tqdm import tqdm

            self.bar = tqdm(total=total, unit="text", unit_scale=True)

    def __enter__(self) -> Any:
        return self.bar.update if self.bar is not None else lambda number: None

    def __exit__(self, *_error: object) -> None:
        if self.bar is not None:
            self.bar.close()


def _unit(values: FloatArray) -> FloatArray:
    unit: FloatArray = values / np.linalg.norm(values, axis=1, keepdims=True).clip(1e-12)
    return unit


def _assembled(found: Folder) -> Student:
    """A student from what its folder holds, all of whose shapes fit together.

    Raises:
        InputError: they do not.
    """
    config, tensors = found.config, found.tensors
    if config["student"] not in FORWARD:
        raise InputError(f"a student of an unknown kind, {config['student']!r}")

    def table(name: str) -> Table:
        values, scale = tensors[f"{name}.values"], tensors.get(f"{name}.scale")
        if values.ndim != 2 or (scale is not None and scale.shape != values.shape[:1]):
            raise InputError(f"table {name}: shapes that do not fit together")
        return Table(values, scale)

    told = config.pop("reading")
    parts = tuple(Part(str(name), str(pool)) for name, pool in told["parts"])
    features = TokenFeatures(
        parts,
        {part.table: table(f"tables.{part.table}") for part in parts},
        tensors["reading.offset"],
        tensors["reading.scale"],
        int(told["longest"]),
        bool(told["is_folded"]),
    )
    prefix = "parameters."
    parameters = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    names = config.pop("concepts")
    if not all(isinstance(name, str) for name in names):
        raise InputError("concepts that are no texts")
    token_rows = RaggedArray(tensors["token_rows"], tensors["token_offsets"]) if "token_rows" in tensors else None
    how = config.pop("tokenization", None)
    student = Student(
        config,
        parameters,
        tensors["mean"],
        features,
        tuple(names),
        token_rows,
        None if how is None else _tokenization(found.tokenizer, how, _token_rows(features)),
        table("catalogue") if "catalogue.values" in tensors else None,
        found.card,
    )
    _check(student)
    return student


def _token_rows(features: TokenFeatures) -> int:
    """How many tokens have a row in all tables of tokens."""
    found = [len(features.tables[part.table].values) for part in features.parts if part.pool in TOKENS]
    return min(found, default=sys.maxsize)


def _tokenization(tokenizer: Tokenizer | None, how: Mapping[str, Any], rows: int) -> Tokenization:
    prompt = str(how["prompt"])
    if tokenizer is None:
        raise InputError(f"no {TOKENIZER}")
    if prompt.count("{concept}") != 1:
        raise InputError(f"the prompt {prompt[:60]!r} should have {{concept}} once")
    return Tokenization(tokenizer, prompt, bool(how["whole"]), bool(how["by_word"]), rows)


def _check(student: Student) -> None:
    """Try the student: whatever does not fit together shows here and not later.

    Raises:
        InputError: shapes that do not fit together, or tokens without a row.
    """
    rows = [_rows_of(student, part) for part in student.features.parts]
    needed = _needed(student)
    if any(own < needed for part, own in zip(student.features.parts, rows, strict=True) if part.pool in TOKENS):
        raise InputError(f"{needed:,} tokens, and tables of {min(rows):,}")
    if student.catalogue is not None and (
        student.catalogue.width != student.d_model or len(student.catalogue.values) > len(student.concepts)
    ):
        raise InputError("a catalogue that does not fit its concepts and vectors")
    try:
        read = student.features(TokenizedTexts(["a"], RaggedArray.of([[0]]), np.zeros(1, np.int64)))
        answer = FORWARD[student.config["student"]](student.parameters, read)
        fits = answer.shape == (1, student.d_model) and student.mean.ndim == 1
    except (ValueError, IndexError, KeyError, AssertionError, ZeroDivisionError) as error:
        raise InputError(f"tensors that do not fit together ({error})") from error
    if not fits or (student.features.is_folded and first_map(student.parameters) is not None):
        raise InputError("tensors that do not fit together")


def _rows_of(student: Student, part: Part) -> int:
    """Rows of a part's table, once they and its kind are known to be right."""
    own = len(student.features.tables[part.table].values)
    expected = {"place": len(student.concepts), "ngrams": NGRAM_BUCKETS}
    if part.pool not in TOKENS and expected.get(part.pool) != own:
        raise InputError(f"a table of {own:,} rows for {part.pool!r}")
    if part.pool == "place" and student.tokenization is not None:
        raise InputError("tables of concepts, and a tokenizer for any text")
    if part.pool == "sequence" and student.parameters["positions"].shape[:1] != (student.features.max_tokens,):
        raise InputError("a sequence of another length than its positions")
    return own


def _needed(student: Student) -> int:
    """How many tokens the student's tables must have a row for; texts with a later one that was added are refused."""
    if student.tokenization is not None:
        own = student.tokenization.tokenizer.get_vocab(with_added_tokens=False)
        return max(own.values(), default=-1) + 1
    ragged = student.token_rows
    if ragged is None:
        raise InputError("neither a tokenizer nor the tokens of its concepts")
    whole = ragged.offsets.shape == (len(student.concepts) + 1,) and ragged.values.ndim == 1
    if not whole or ragged.offsets[0] or (ragged.lengths < 1).any() or ragged.offsets[-1] != len(ragged.values):
        raise InputError("tokens of its concepts that do not fit together")
    if ragged.values.min() < 0:
        raise InputError("a token below zero")
    return int(ragged.values.max()) + 1


TOKENS = ("mean", "last", "first", "sequence")
