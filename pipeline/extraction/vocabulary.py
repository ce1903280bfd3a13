"""A teacher's whole vocabulary as students read it: what makes them answer for any text.

The file beside a vectors file, ``<vectors>.vocabulary.safetensors``, which ``extract`` leaves. Where it is absent and
the teacher is at hand, it is made when a student is saved.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pipeline.data.vectors import Vectors, stored_dtype
from pipeline.errors import InputError, WorkError
from pipeline.storage import fetch, is_remote, write_atomically
from pipeline.student.tokenizer import RaggedArray, Tokenization

if TYPE_CHECKING:
    from pipeline.extraction.request import Request
    from pipeline.teachers.find import Teacher

FORMAT = "teacher-vocabulary-1"
SUFFIX = ".vocabulary.safetensors"
ALIKE = 0.05  # how far a row may be from the vectors file's own, in units of its norm: the rounding of 16 bits
Bar = Callable[[int], AbstractContextManager[Callable[[float], None]]]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Vocabulary:
    """All tokens of a teacher.

    Attributes:
        tables: ``token_embeddings`` and, where an early block was read, ``token_activations``;
            ``[vocabulary, d_model]`` each, a row a token id.
        tokenizer: in the tokenizers library's JSON.
        key: of what the tables follow from.
    """

    tables: dict[str, NDArray[Any]] = field(repr=False)
    tokenizer: str = field(repr=False)
    key: str


def key_of(of: Vectors | Request) -> str:
    """Hash of what decides a vocabulary's numbers, for that which belongs to vectors or to what is asked for."""
    beginning = of.templates[0][: of.templates[0].index("{concept}")].rstrip()
    content = [FORMAT, of.revision, beginning, of.token_block, of.dtype]
    if of.tokenizer:
        content.append(of.tokenizer)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read_from(teacher: Teacher, of: Vectors | Request, bar: Bar) -> Vocabulary:
    """Read a teacher's vocabulary.

    Args:
        teacher: the model.
        of: vectors or what is asked for: the first prompt, whose beginning stands before each token, and the early
            block to read; without one the embeddings alone.
        bar: given a number of tokens, a progress bar that is advanced by tokens.
    """
    from pipeline.extraction.reader import (
        read_vocabulary,  # only where a teacher is read: transformers takes seconds to load
    )

    tables = {"token_embeddings": teacher.embedding_table.float().cpu().numpy()}
    if of.token_block is not None:
        with bar(len(tables["token_embeddings"])) as advance:
            tables["token_activations"] = read_vocabulary(teacher, of.templates[0], of.token_block, progress=advance)
    short = {name: table.astype(stored_dtype(float(np.abs(table).max()))) for name, table in tables.items()}
    backend: Any = teacher.tokenizer
    return Vocabulary(short, backend.backend_tokenizer.to_str(), key_of(of))


def beside(vectors: str) -> str:
    """The place of the vocabulary that belongs to the vectors file at a place."""
    return vectors.removesuffix(".safetensors") + SUFFIX


def write(vocabulary: Vocabulary, path: Path) -> None:
    """Write the file, whole or not at all."""
    tokenizer = np.frombuffer(vocabulary.tokenizer.encode(), np.uint8)
    tensors = vocabulary.tables | {"tokenizer": tokenizer}
    header = {"format": FORMAT, "key": vocabulary.key}
    write_atomically(path, lambda part: save_file(tensors, part, header))


def read(path: Path) -> Vocabulary:
    """Read the file.

    Raises:
        InputError: missing, damaged or of another format.
    """
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
    place: str,
    device: torch.device | str,
    bar: Bar,
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> Vocabulary | None:
    """The vocabulary that belongs to vectors: beside their file, or read from the teacher where that is at hand.

    Args:
        vectors: the vectors.
        place: where their file is; what is read is kept beside it where that is a folder that can be written.
        device: where the teacher computes.
        bar: a progress bar for reading it.
        device_map: spread the teacher over several devices instead.
        trust_remote_code: run model code that comes with its weights.

    Returns:
        None where there is neither file nor teacher.
    """
    wanted, path = key_of(vectors), beside(place)
    if found := _beside(path, wanted):
        return found
    from pipeline.teachers.find import find_teacher
    from pipeline.teachers.load import load_teacher

    try:
        source = find_teacher(vectors.teacher, vectors.dtype, device, trust_remote_code)
        if source.revision != vectors.revision:
            raise InputError(f"{vectors.teacher}: other weights than the vectors' ({vectors.revision})")
        if vectors.tokenizer and source.tokenizer != vectors.tokenizer:
            raise InputError(f"{vectors.teacher}: another tokenizer than the vectors' ({vectors.tokenizer})")
        log.info("reading the vocabulary of %s, so that the student answers for any text", source.name)
        teacher = load_teacher(source, device, device_map)
        made = read_from(teacher, vectors, bar)
    except InputError as error:
        log.warning("warning: no %s and no teacher (%s)", path, error)
        return None
    if not _agrees(made, vectors):
        log.warning("warning: %s reads its tokens otherwise than when the vectors were made", source.name)
        return None
    if ":" not in place:
        try:
            write(made, Path(path))
        except (InputError, WorkError) as error:
            log.debug("not kept: %s", error)
    return made


def _beside(place: str, wanted: str) -> Vocabulary | None:
    if ":" in place and not is_remote(place):
        return None
    try:
        found = read(fetch(place))
    except InputError:
        return None
    return found if found.key == wanted else None


def _agrees(vocabulary: Vocabulary, vectors: Vectors) -> bool:
    """Whether the rows are those that the vectors file has for its own tokens."""
    for name, table in vocabulary.tables.items():
        own = getattr(vectors, name).astype(np.float32)
        error = np.linalg.norm(table[vectors.token_vocab].astype(np.float32) - own, axis=1)
        if (error > ALIKE * np.linalg.norm(own, axis=1) + 1e-3).any():
            return False
    return True


def tokenization_of(vocabulary: Vocabulary, vectors: Vectors) -> Tokenization:
    """The quickest way to the tokens that the vectors file has: less of the prompt, word by word, where they agree.

    Raises:
        InputError: the tokenizer gives other tokens in any way.
    """
    from tokenizers import Tokenizer

    expected = RaggedArray(vectors.token_ids, vectors.token_offsets)
    template = vectors.templates[0]
    short = " {concept}" if template[: template.index("{concept}")].endswith((" ", "\n")) else "{concept}"
    tokenizer = Tokenizer.from_str(vocabulary.tokenizer)
    rows = len(vocabulary.tables["token_embeddings"])
    tokenizer.no_padding()
    tokenizer.no_truncation()
    for prompt, whole, by_word in (
        (short, True, short.startswith(" ")),
        (short, True, False),
        (template, False, False),
    ):
        way = Tokenization(tokenizer, prompt, whole, by_word, rows)
        try:
            found = way(vectors.concepts)
        except InputError:
            continue
        if np.array_equal(found.offsets, expected.offsets) and np.array_equal(found.values, expected.values):
            return way
    raise InputError(f"the tokenizer of {vectors.teacher} gives other tokens than the vectors file has")
