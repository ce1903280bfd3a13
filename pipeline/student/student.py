"""A trained student: a folder whose files turn text into vectors, with NumPy and a tokenizer.

A student without a tokenizer answers for the concepts of its vectors file only: a sweep keeps its cells in that form.

    from pipeline import Student
    Student.load("my-student").encode(["volcano", "slow cooking"])  # [2, d_model]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from pipeline.student.forward import FORWARD
from pipeline.student.lookup import FeaturePart, FloatArray, Table, TokenFeatures, TokenizedTexts
from pipeline.student.nearest import Candidates, unit
from pipeline.student.stored import stored_candidates
from pipeline.student.tokenizer import RaggedArray, Tokenization, nfc, normalise_texts
from pipeline.student.validation import TOKEN_POOLS, validate

CHUNK = 1024  # texts encoded at once, so that they stay in the cache
BULK = 20_000  # texts for which loading torch pays
BULK_CHUNK = 2048
THREADS = min(4, os.cpu_count() or 1)
BULK_THREADS = min(8, os.cpu_count() or 1)  # each on one core: a tokenizer and small sums leave the others idle


@dataclass(frozen=True, eq=False)
class Student:
    """A student with all that turns text into a vector. Several threads may use it at once."""

    config: dict[str, Any]  # its kind and its origin (plain JSON values)
    parameters: dict[str, FloatArray]
    mean: FloatArray  # [d_model], mu of its training vectors, which is added to its output
    features: TokenFeatures
    concepts: tuple[str, ...]  # of its vectors file: for which it answers without a tokenizer, or of the catalogue
    token_rows: RaggedArray | None = None  # each concept's rows in the token tables, where there is no tokenizer
    tokenization: Tokenization | None = None  # for any text; None where the student knows its concepts only
    catalogue: Table | None = None  # [.., d_model], centred true vectors of the first concepts
    card: str = ""  # the text of its README

    @property
    def d_model(self) -> int:
        """Width of its vectors."""
        return len(self.mean)

    @property
    def summary(self) -> str:
        """Which texts it answers for and what its small size costs, in a few words."""
        if self.tokenization is None:
            return f"answers for {len(self.concepts):,} concepts of its vectors file"
        metrics = self.config["metrics"]
        return (
            f"answers for any text; test cosine {metrics['test_cosine']:.3f}, "
            f"{metrics['test_cosine_lost_to_size']:.4f} lost to 8 bits and low rank"
        )

    @cached_property
    def _row_of_concept(self) -> dict[str, int]:
        return {nfc(concept): row for row, concept in enumerate(self.concepts)}

    @cached_property
    def _directions(self) -> FloatArray:
        """The catalogue with rows of length 1, ``[.., d_model]``."""
        assert self.catalogue is not None
        return unit(self.catalogue[:])

    def encode(
        self,
        sentences: str | Sequence[str],
        batch_size: int = CHUNK,
        show_progress_bar: bool = False,
        normalize_embeddings: bool = False,
    ) -> FloatArray:
        """Predict the activation vectors of texts, not centred.

        The arguments are named as those of sentence-transformers. A text's vector is the same alone and among others,
        up to the rounding of float32 (1e-6 of its length). `BULK` texts and more go through torch where it is
        installed, which takes less time for the same sums.

        Args:
            sentences: texts, or one.
            batch_size: texts at once.
            show_progress_bar: show a progress bar in texts.
            normalize_embeddings: centre the vectors and give them length 1, so that a product is a cosine.

        Returns:
            ``[n, d_model]`` float32, or ``[d_model]`` for one text.

        Raises:
            InputError: a value that is no text, an empty or too long text, or one that the student does not know.
        """
        if isinstance(sentences, str):
            vector: FloatArray = self.encode([sentences], normalize_embeddings=normalize_embeddings)[0]
            return vector
        if batch_size < 1:
            raise InputError(f"batch_size {batch_size}: expected at least 1")
        texts = normalise_texts(sentences)
        vectors = np.empty((len(texts), self.d_model), np.float32)
        shift = np.zeros_like(self.mean) if normalize_embeddings else self.mean
        bulk = self._bulk if len(texts) >= BULK else None
        compute, threads = bulk or self._compute, BULK_THREADS if bulk else THREADS
        if bulk:
            batch_size = BULK_CHUNK
        # Tokenization holds the interpreter's lock: short products beside it would wait for it after each.
        tokenized = self._tokenize(texts) if bulk else None

        def encode_from(start: int) -> None:
            stop = min(start + batch_size, len(texts))
            chunk = self._tokenize(texts[start:stop]) if tokenized is None else tokenized.part(start, stop)
            compute(chunk, shift, vectors[start:stop])

        starts = range(0, len(texts), batch_size)
        with ThreadPoolExecutor(threads) as pool:  # NumPy and the tokenizer release the lock
            done: Iterable[None] = (pool.map if len(starts) > 1 else map)(encode_from, starts)
            if show_progress_bar:
                from tqdm import tqdm

                done = tqdm(done, total=len(starts), unit="text", unit_scale=batch_size)
            list(done)  # waits, and raises what a chunk raised
        return unit(vectors) if normalize_embeddings else vectors

    def _compute(self, texts: TokenizedTexts, shift: FloatArray, out: FloatArray) -> None:
        """Write centred vectors plus a shift ``[d_model]`` to ``out``, ``[n, d_model]``."""
        np.add(FORWARD[self.config["student"]](self.parameters, self.features(texts)), shift, out=out)

    @cached_property
    def _bulk(self) -> Callable[[TokenizedTexts, FloatArray, FloatArray], None] | None:
        """The same in torch, where it is installed and speeds up this kind of student."""
        try:
            from pipeline.student.bulk import bulk_of
        except ImportError:  # a student outside the program
            return None
        return bulk_of(self.config["student"], self.features, self.parameters)

    def _tokenize(self, texts: Sequence[str]) -> TokenizedTexts:
        if self.tokenization is not None:
            return TokenizedTexts(texts, self.tokenization(texts))
        assert self.token_rows is not None
        try:
            rows = np.array([self._row_of_concept[text] for text in texts], np.int64)
        except KeyError as error:
            hint = f"this student {self.summary} only; the one that a sweep leaves in its results answers for any text"
            raise InputError(f"text {error.args[0][:60]!r}: {hint}") from None
        return TokenizedTexts(texts, self.token_rows.take(rows), rows)

    def nearest(
        self,
        queries: str | Sequence[str] | FloatArray,
        count: int,
        among: Candidates | str | Path | Sequence[str] | None = None,
    ) -> list[list[tuple[str, float]]]:
        """Find the concepts or phrases whose vectors have the highest centred cosine with each query.

        Memory does not grow with the number of vectors that are searched; among equal cosines the first comes first.

        Args:
            queries: texts, or vectors ``[n, d_model]``, not centred.
            count: how many.
            among: where to search, as `candidates` takes it, or what that has made; by default, the catalogue.

        Returns:
            For each query the concepts with their cosines, best first.

        Raises:
            InputError: what `encode` and `candidates` raise.
        """
        found = among if isinstance(among, Candidates) else self.candidates(among)
        if not isinstance(queries, np.ndarray):
            queries = self.encode([queries] if isinstance(queries, str) else queries)
        return found.nearest(queries - self.mean, count)

    def candidates(self, among: str | Path | Sequence[str] | None = None) -> Candidates:
        """Prepare what `nearest` searches, for several searches.

        Args:
            among: the path or ``s3://`` address of a vectors file, whose true vectors are searched; or phrases, which
                the student encodes in each search; or None for the true vectors of the catalogue that it carries.

        Returns:
            The candidates.

        Raises:
            InputError: not a vectors file, or one of another block or width; a phrase that is no text; or the student
                carries no catalogue.
        """
        if isinstance(among, str | Path):
            return stored_candidates(fetch(str(among)), self.config, self.mean)
        if among is not None:
            texts = normalise_texts(among)
            return Candidates(texts, lambda start, stop: self.encode(texts[start:stop], normalize_embeddings=True))
        if self.catalogue is None:
            raise InputError("this student carries no catalogue of concepts; the one that a sweep leaves does")
        names = self.concepts[: len(self.catalogue.values)]
        return Candidates(names, lambda start, stop: self._directions[start:stop])

    def save(self, folder: Path) -> None:
        """Write the folder's files, each whole or not at all.

        Raises:
            WorkError: the student could not be loaded again; nothing was written.
        """
        try:
            contents = self.files()
        except InputError as error:
            raise WorkError(f"student {folder}: would not load again ({error}); not written") from error
        write_folder(folder, contents)

    def files(self) -> dict[str, bytes]:
        """Make the folder's files, after a check that they can be loaded again.

        Returns:
            Contents by file name.

        Raises:
            InputError: tensors that do not fit together.
        """
        features = self.features
        tensors: dict[str, NDArray[Any]] = {"mean": self.mean}
        tensors |= {f"parameters.{name}": value for name, value in self.parameters.items()}
        tensors |= {"reading.offset": features.offset, "reading.scale": features.scale}
        tables = {f"tables.{name}": table for name, table in features.tables.items()}
        for name, table in (tables if self.catalogue is None else tables | {"catalogue": self.catalogue}).items():
            tensors[f"{name}.values"] = table.values
            if table.scale is not None:
                tensors[f"{name}.scale"] = table.scale
        if self.token_rows is not None:
            tensors |= {"token_rows": self.token_rows.values, "token_offsets": self.token_rows.offsets}
        config = self.config | {
            "concepts": list(self.concepts),
            "reading": {"parts": features.parts, "longest": features.max_tokens, "is_folded": features.is_folded},
        }
        tokenizer = None
        if self.tokenization is not None:
            tokenizer = self.tokenization.tokenizer
            config["tokenization"] = {name: getattr(self.tokenization, name) for name in ("prompt", "whole", "by_word")}
        contents = pack(Folder(config, tensors, tokenizer, self.card))
        with _input_errors():
            if self.tokenization is None:
                validate(self)  # a sweep keeps thousands of these, and reading one takes longer than writing it
            else:
                _from_folder(unpack(contents.__getitem__, self.card))
        return contents

    @classmethod
    def load(cls, folder: str | Path) -> Student:
        """Load a student folder.

        Args:
            folder: a local path, ``s3://bucket/key``, or ``hf://owner/name`` of the Hugging Face hub.

        Returns:
            The student.

        Raises:
            InputError: not a student folder, or one that is damaged, of another format, or inconsistent.
        """
        place = str(folder)
        if place.startswith("hf://"):
            from pipeline.hub import fetch as fetch_from_hub

            path = fetch_from_hub(place)
        else:
            path = fetch(place)
        try:
            with _input_errors():
                return _from_folder(read_folder(path))
        except InputError as error:
            raise InputError(f"student {place}: {error}") from error


@contextmanager
def _input_errors() -> Iterator[None]:
    """Turn the errors that files of another kind cause into an `InputError`."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError, SafetensorError) as error:
        raise InputError(f"not a student folder, or damaged ({error})") from error


def _from_folder(found: Folder) -> Student:
    """Build a student from a folder's contents and validate it."""
    config, tensors = found.config, found.tensors
    if config["student"] not in FORWARD:
        raise InputError(f"a student of an unknown kind, {config['student']!r}")

    def table(name: str) -> Table:
        values, scale = tensors[f"{name}.values"], tensors.get(f"{name}.scale")
        if values.ndim != 2 or (scale is not None and scale.shape != values.shape[:1]):
            raise InputError(f"table {name}: shapes that do not fit together")
        return Table(values, scale)

    stored = config.pop("reading")
    parts = tuple(FeaturePart(str(name), str(pool)) for name, pool in stored["parts"])
    tables = {part.table: table(f"tables.{part.table}") for part in parts}
    shift = (tensors["reading.offset"], tensors["reading.scale"])
    features = TokenFeatures(parts, tables, *shift, int(stored["longest"]), bool(stored["is_folded"]))
    prefix = "parameters."
    concepts = config.pop("concepts")
    if not all(isinstance(concept, str) for concept in concepts):
        raise InputError("concepts that are no texts")
    how = config.pop("tokenization", None)
    student = Student(
        config,
        parameters={name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)},
        mean=tensors["mean"],
        features=features,
        concepts=tuple(concepts),
        token_rows=RaggedArray(tensors["token_rows"], tensors["token_offsets"]) if "token_rows" in tensors else None,
        tokenization=None if how is None else _tokenization(found.tokenizer, how, features),
        catalogue=table("catalogue") if "catalogue.values" in tensors else None,
        card=found.card,
    )
    validate(student)
    return student


def _tokenization(tokenizer: Tokenizer | None, stored: Mapping[str, Any], features: TokenFeatures) -> Tokenization:
    prompt = str(stored["prompt"])
    if tokenizer is None:
        raise InputError(f"no {TOKENIZER}")
    if prompt.count("{concept}") != 1:
        raise InputError(f"the prompt {prompt[:60]!r} should have {{concept}} once")
    rows = [len(features.tables[part.table].values) for part in features.parts if part.pool in TOKEN_POOLS]
    limit = min(rows, default=sys.maxsize)
    return Tokenization(tokenizer, prompt, bool(stored["whole"]), bool(stored["by_word"]), limit)
