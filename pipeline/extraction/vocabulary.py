"""A teacher's whole vocabulary as students read it, so that they answer for any text.

``extract`` writes it beside a vectors file, as ``<vectors>.vocabulary.safetensors``. Where it is absent and the teacher
can be loaded, it is made when a student is saved.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pipeline.data.vectors import Vectors, stored_dtype
from pipeline.devices import TeacherAccess
from pipeline.errors import InputError, WorkError
from pipeline.storage import Output, fetch, is_remote, upload, write_atomically
from pipeline.student.tokenizer import Tokenization

if TYPE_CHECKING:
    from pipeline.extraction.request import Request
    from pipeline.teachers.find import Teacher, TeacherSource

FORMAT = "teacher-vocabulary-1"
SUFFIX = ".vocabulary.safetensors"
TOLERANCE = 0.05  # of a row's norm: the rounding of 16 bits
Bar = Callable[[int], AbstractContextManager[Callable[[float], None]]]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Vocabulary:
    """All tokens of a teacher: ``token_embeddings`` and, where an early block was read, ``token_activations``."""

    tables: dict[str, NDArray[Any]] = field(repr=False)  # by name: [vocabulary, d_model], a row per token id
    tokenizer: str = field(repr=False)  # in the tokenizers library's JSON
    key: str  # from `key_of`


def key_of(of: Vectors | Request) -> str:
    """Hash of all that decides the numbers of the vocabulary of vectors or of a request."""
    beginning = of.templates[0][: of.templates[0].index("{concept}")].rstrip()
    content = [FORMAT, of.revision, beginning, of.token_block, of.dtype]
    if of.tokenizer:
        content.append(of.tokenizer)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read_teacher_vocabulary(teacher: Teacher, of: Vectors | Request, bar: Bar) -> Vocabulary:
    """Read a teacher's vocabulary for the template and early block of vectors or a request; in 16 bits if they do."""
    from pipeline.extraction.reader import read_vocabulary  # transformers takes seconds to load

    tables = {"token_embeddings": teacher.embedding_table.float().cpu().numpy()}
    if of.token_block is not None:
        with bar(len(tables["token_embeddings"])) as advance:
            tables["token_activations"] = read_vocabulary(teacher, of.templates[0], of.token_block, advance)
    short = {name: table.astype(stored_dtype(float(np.abs(table).max()))) for name, table in tables.items()}
    backend: Any = teacher.tokenizer
    return Vocabulary(short, backend.backend_tokenizer.to_str(), key_of(of))


def beside(vectors: str) -> str:
    """The place of the vocabulary of a vectors file."""
    return vectors.removesuffix(".safetensors") + SUFFIX


def write_beside(output: Output, teacher: Teacher, request: Request, bar: Bar) -> str:
    """Read a teacher's vocabulary and write it beside a vectors file; returns its place."""
    place, path = beside(str(output)), Path(beside(str(output.path)))
    write(read_teacher_vocabulary(teacher, request, bar), path)
    if output.url is not None:
        upload(path, place)
    return place


def write(vocabulary: Vocabulary, path: Path) -> None:
    """Write the file, whole or not at all."""
    tokenizer = np.frombuffer(vocabulary.tokenizer.encode(), np.uint8)
    tensors = vocabulary.tables | {"tokenizer": tokenizer}
    header = {"format": FORMAT, "key": vocabulary.key}
    write_atomically(path, lambda part: save_file(tensors, part, header))


def read(path: Path) -> Vocabulary:
    """Read the file; an InputError where it is missing, damaged or of another format."""
    try:
        with safe_open(path, framework="np") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if header.get("format") != FORMAT:
            raise InputError(f"vocabulary {path}: format {header.get('format')!r}, expected {FORMAT!r}")
        tokenizer = tensors.pop("tokenizer").tobytes().decode()
        return Vocabulary(tensors, tokenizer, header["key"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise InputError(f"vocabulary {path}: damaged or not a vocabulary ({error})") from error


def find(
    vectors: Vectors,
    place: str,  # where their file is
    access: TeacherAccess,
    bar: Bar,
) -> Vocabulary | None:
    """Find the vocabulary of vectors beside their file, or read it from the teacher and keep it there; else None."""
    path = beside(place)
    if ":" not in place or is_remote(place):
        with suppress(InputError):
            kept = read(fetch(path))
            if kept.key == key_of(vectors):
                return kept
    try:
        made = _read_again(vectors, access, bar)
    except InputError as error:
        log.warning("warning: no %s and no teacher (%s)", path, error)
        return None
    if not _has_tokens_of(made, vectors):
        log.warning("warning: %s reads its tokens otherwise than when the vectors were made", vectors.teacher)
        return None
    if ":" not in place:
        try:
            write(made, Path(path))
        except (InputError, WorkError) as error:
            log.debug("not kept: %s", error)
    return made


def _read_again(vectors: Vectors, access: TeacherAccess, bar: Bar) -> Vocabulary:
    """Read the vocabulary from the teacher of vectors, if it still has their weights and tokenizer."""
    from pipeline.teachers.load import load_teacher

    source = find_teacher_of(vectors, access)
    log.info("reading the vocabulary of %s, so that the student answers for any text", source.name)
    return read_teacher_vocabulary(load_teacher(source, access.device, access.device_map), vectors, bar)


def find_teacher_of(vectors: Vectors, access: TeacherAccess) -> TeacherSource:
    """Find the teacher of vectors; raises `InputError` where its weights or its tokenizer are others by now."""
    from pipeline.teachers.find import find_teacher

    name = access.name or vectors.teacher
    source = find_teacher(name, vectors.dtype, access.device, access.trust_remote_code)
    if source.revision != vectors.revision:
        raise InputError(f"{name}: other weights than the vectors' ({vectors.revision})")
    if vectors.tokenizer and source.tokenizer != vectors.tokenizer:
        raise InputError(f"{vectors.teacher}: another tokenizer than the vectors' ({vectors.tokenizer})")
    return source


def _has_tokens_of(vocabulary: Vocabulary, vectors: Vectors) -> bool:
    """Whether the rows are those that the vectors file has for its own tokens."""
    for name, table in vocabulary.tables.items():
        own = getattr(vectors, name).astype(np.float32)
        error = np.linalg.norm(table[vectors.token_vocab].astype(np.float32) - own, axis=1)
        if (error > TOLERANCE * np.linalg.norm(own, axis=1) + 1e-3).any():
            return False
    return True


def fastest_tokenization(vocabulary: Vocabulary, vectors: Vectors) -> Tokenization:
    """The fastest way to exactly the tokens in the vectors file: word by word, without the template, or with it."""
    from tokenizers import Tokenizer

    template = vectors.templates[0]
    short = " {concept}" if template[: template.index("{concept}")].endswith((" ", "\n")) else "{concept}"
    tokenizer = Tokenizer.from_str(vocabulary.tokenizer)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    rows = len(vocabulary.tables["token_embeddings"])
    for prompt, whole, by_word in ((short, True, short[0] == " "), (short, True, False), (template, False, False)):
        tokenization = Tokenization(tokenizer, prompt, whole, by_word, rows)
        with suppress(InputError):
            found = tokenization(vectors.concepts)
            if np.array_equal(found.offsets, vectors.token_offsets) and np.array_equal(found.values, vectors.token_ids):
                return tokenization
    raise InputError(f"the tokenizer of {vectors.teacher} gives other tokens than the vectors file has")
