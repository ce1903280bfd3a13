"""The vectors file: activation vectors with all that training needs, in one safetensors file.

The header's ``sha256`` covers the tensors and ``header_sha256`` the rest of the header, so no changed byte goes
unseen. Nothing in the file can run code; a ``.pt`` file of older work is read with ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from pipeline.data.concepts import SPLITS, Catalogue, Source, split
from pipeline.data.legacy import read_table
from pipeline.errors import InputError
from pipeline.storage import write_atomically
from pipeline.student.tokenizer import RaggedArray

FORMAT = "activation-vectors-3"  # version of the file
# Version of the computation: raised by hand (activation-vectors-3.1, ...) when a request gives other vectors.
EXTRACTION_VERSION = "activation-vectors-3"
PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # as torch and pickle begin their files
# In the order of the file.
TENSORS = ("token_ids", "token_offsets", "token_vocab", "token_embeddings", "token_activations", "vectors")
LISTS = ("concepts", "categories", "splits", "layers", "templates", "token_block", "depth")
STRINGS = ("teacher", "revision", "pool", "dtype", "extraction_key")
CHUNK_BYTES = 1 << 24  # of a large file held at once
HEADER_DEFAULTS = {"language": "en", "tokenizer": "", "judge": ""}  # which a header omits, as older files do


@dataclass(frozen=True)
class Vectors:
    """Activation vectors of a teacher for a catalogue of concepts."""

    # [concepts, templates, layers, d_model], residual stream as read, not centred; float16 or float32.
    vectors: NDArray[np.floating[Any]]
    token_ids: NDArray[np.int64]  # [tokens], of the concepts in the first template's prompt, end to end
    token_offsets: NDArray[np.int64]  # [concepts + 1], where each concept's tokens begin in token_ids
    token_vocab: NDArray[np.int64]  # [types], the distinct token ids, ascending
    token_embeddings: NDArray[np.floating[Any]]  # [types, d_model], the teacher's input embeddings of token_vocab
    # [types, d_model], residual stream after token_block for each token of token_vocab alone after the first template's
    # beginning; [0, d_model] where it was not read.
    token_activations: NDArray[np.floating[Any]]
    concepts: tuple[str, ...]
    categories: tuple[str, ...]
    splits: tuple[str, ...]
    layers: tuple[int, ...]  # blocks after which the vectors were read (0 is the embedding output)
    templates: tuple[str, ...]  # prompts, each with {concept}
    token_block: int | None  # an early block; None where it was not read
    depth: int  # blocks of the teacher
    teacher: str
    revision: str  # the exact weights
    pool: str  # "last" (last token of the prompt) or "mean" (over the concept's tokens)
    dtype: str  # the precision that the teacher computed in
    extraction_key: str  # hash of all that decides the vectors: weights, concepts, templates, layers, pool and dtype
    language: str = "en"  # of the concepts, whose stems the splits keep on one side
    tokenizer: str = ""  # hash of the teacher's tokenizer files; "" where the revision covers them, and in older files
    sources: tuple[Source, ...] = ()  # of the concepts, in the order of rows; none where there is one alone
    judge: str = ""  # the first source, where it alone is split and all other concepts are for training

    @property
    def catalogue(self) -> Catalogue:
        """The concepts, with what their order and split depend on."""
        return Catalogue(self.concepts, self.categories, self.language, self.sources, self.judge)

    @property
    def d_model(self) -> int:
        """Width of the teacher's residual stream."""
        return int(self.vectors.shape[-1])

    @cached_property
    def sha256(self) -> str:
        """Hash of the tensors: names, types, shapes and bytes."""
        digest = hashlib.sha256()
        for name in TENSORS:
            tensor = np.ascontiguousarray(getattr(self, name))
            digest.update(_tensor_header(name, tensor.dtype, tensor.shape))
            digest.update(tensor.data)
        return digest.hexdigest()

    @property
    def header(self) -> dict[str, str]:
        """The file's header, without its own checksum."""
        header = {name: json.dumps(getattr(self, name), ensure_ascii=False) for name in LISTS}
        header |= {name: getattr(self, name) for name in STRINGS}
        header |= {name: getattr(self, name) for name, usual in HEADER_DEFAULTS.items() if getattr(self, name) != usual}
        header |= {"sources": json.dumps(self.sources, ensure_ascii=False)} if self.sources else {}
        return header | {"format": FORMAT, "sha256": self.sha256}

    @cached_property
    def identity(self) -> str:
        """Hash of everything: tensors, concepts, splits, and where they come from."""
        return _header_sha256(self.header)

    def layer_index(self, layer: int | None) -> int:
        """Position of block ``layer`` on the layers axis; raises `InputError` where the file has none."""
        if layer not in self.layers:
            raise InputError(f"--layer {layer}: not in the vectors file; available: {', '.join(map(str, self.layers))}")
        return self.layers.index(layer)

    @property
    def middle_layer(self) -> int:
        """The block of the file that is nearest to the teacher's middle, the default."""
        return min(self.layers, key=lambda layer: abs(layer - self.depth // 2))

    @cached_property
    def token_rows(self) -> RaggedArray:
        """Rows of the token tables for each concept's tokens, in order."""
        return RaggedArray(np.searchsorted(self.token_vocab, self.token_ids).astype(np.int64), self.token_offsets)


def write_vectors(vectors: Vectors, path: Path) -> None:
    """Write the file, whole or not at all; a name that ends in ``.pt`` gives older work's ``{"concepts", "vectors"}``.

    Raises:
        InputError: the folder cannot be written, or a ``.pt`` is asked for with several templates or layers.
    """
    if path.suffix == ".pt":
        if vectors.vectors.shape[1:3] != (1, 1):
            raise InputError(f"--output {path}: a .pt file holds one layer and one template; write .safetensors")
        table = {"concepts": list(vectors.concepts), "vectors": torch.from_numpy(vectors.vectors[:, 0, 0].copy())}
        write_atomically(path, lambda part: torch.save(table, part))
        return
    tensors = [stream_array(name, getattr(vectors, name)) for name in TENSORS]
    write_atomically(path, lambda part: write_streamed(part, vectors.header, tensors))


class StreamedTensor(NamedTuple):
    """A tensor that is written in chunks along its first axis, so that it need not fit in memory."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[NDArray[Any]]]


def stream_array(name: str, array: NDArray[Any]) -> StreamedTensor:
    """Wrap an array that is in memory."""
    return StreamedTensor(name, array.dtype, array.shape, lambda: [array])


def write_streamed(path: Path, header: dict[str, str], tensors: Sequence[StreamedTensor]) -> None:
    """Write a vectors file from a header, whose checksums it replaces, and its tensors in the order of `TENSORS`.

    The checksums are known when all is written: zeros of the same length reserve their places in the header. The
    header is sorted, so the same content gives the same bytes.
    """
    entries: dict[str, Any] = {}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.dtype.itemsize * math.prod(tensor.shape)
        kind = {"i": "I", "f": "F"}[tensor.dtype.kind] + str(8 * tensor.dtype.itemsize)
        entries[tensor.name] = {"dtype": kind, "shape": tensor.shape, "data_offsets": [begin, end]}

    def encode(sha256: str) -> bytes:
        complete = header | {"sha256": sha256}
        complete["header_sha256"] = _header_sha256(complete)
        text = json.dumps({"__metadata__": complete, **entries}, sort_keys=True, ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # the tensors stay aligned
        return len(text).to_bytes(8, "little") + text

    digest = hashlib.sha256()
    with path.open("wb") as file:
        file.write(encode("0" * 64))
        for tensor in tensors:
            digest.update(_tensor_header(tensor.name, tensor.dtype, tensor.shape))
            for chunk in tensor.chunks():
                data = np.ascontiguousarray(chunk, tensor.dtype).data
                digest.update(data)
                file.write(data)
        file.seek(0)
        file.write(encode(digest.hexdigest()))


def _tensor_header(name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    return f"{name} {dtype} {tuple(shape)}\n".encode()


def _header_sha256(header: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def read_vectors(path: Path) -> Vectors:
    """Read and check a vectors file, ``.safetensors`` or older ``.pt``.

    Returns:
        Its content; the tensors of a ``.safetensors`` file are mapped, and read from disk where they are used.

    Raises:
        InputError: missing, truncated or changed, of another format, an ambiguous ``.pt`` file, or with values that
            are not finite.
    """
    if not path.is_file():
        raise InputError(f"vectors file {path}: not found; make it with 'extract', or name another with --vectors")
    found = _read_pt(path) if path.suffix == ".pt" else _read_safetensors(path)
    size = max(1, CHUNK_BYTES // max(1, found.vectors[:1].nbytes))
    chunks = (found.vectors[start : start + size] for start in range(0, len(found.vectors), size))
    is_finite = np.concatenate([np.isfinite(chunk).all(axis=(1, 2, 3)) for chunk in chunks])
    if not is_finite.all():
        rows = np.flatnonzero(~is_finite)
        which = f"{len(rows)} concepts have values that are not finite, first {found.concepts[rows[0]]!r}"
        raise InputError(f"vectors file {path}: {which}; extract them again")
    if not (np.isfinite(found.token_embeddings).all() and np.isfinite(found.token_activations).all()):
        raise InputError(f"vectors file {path}: token embeddings or activations that are not finite; extract again")
    return found


def _read_safetensors(path: Path) -> Vectors:
    try:
        with safe_open(path, framework="pt") as file:  # whose tensors are views of the mapped file
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        with path.open("rb") as file:
            if file.read(2) in PICKLES:
                raise InputError(f"vectors file {path}: a pickle, which could run code; expected safetensors") from None
        raise InputError(f"vectors file {path}: damaged or not safetensors ({error})") from error
    if header.get("format") != FORMAT:
        raise InputError(f"vectors file {path}: format {header.get('format')!r}, expected {FORMAT!r}; extract again")
    claimed = header.pop("header_sha256", None)
    if claimed != _header_sha256(header) or set(tensors) != set(TENSORS):
        raise InputError(f"vectors file {path}: damaged (the header does not match its checksum)")
    values = {name: json.loads(header[name]) for name in LISTS}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    values |= {name: header[name] for name in STRINGS}
    values |= {name: header.get(name, default) for name, default in HEADER_DEFAULTS.items()}
    values["sources"] = tuple(Source(*one) for one in json.loads(header.get("sources", "[]")))
    found = Vectors(**tensors, **values)
    if found.sha256 != header["sha256"]:
        raise InputError(f"vectors file {path}: damaged (the tensors do not match their checksum)")
    rows = len(found.concepts)
    shapes_fit = (
        found.vectors.shape == (rows, len(found.templates), len(found.layers), found.d_model)
        and found.token_offsets.shape == (rows + 1,)
        and found.token_embeddings.shape[:1] == found.token_vocab.shape
        and len(found.token_activations) == (0 if found.token_block is None else len(found.token_vocab))
        and len(found.categories) == len(found.splits) == rows
        and set(found.splits) <= set(SPLITS)
    )
    if not shapes_fit:
        raise InputError(f"vectors file {path}: shapes that do not fit together")
    return found


def parse_header(beginning: bytes) -> dict[str, str]:
    """Parse the header in the first bytes of a vectors file; empty for another file."""
    try:
        size = int.from_bytes(beginning[:8], "little")
        found = json.loads(beginning[8 : 8 + size]).get("__metadata__")
    except (ValueError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}


def read_unverified_header(path: Path) -> dict[str, str]:
    """Read the header of a vectors file without checks; empty for another file."""
    try:
        with safe_open(path, framework="np") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError, ValueError):
        return {}


def read_header(path: Path) -> dict[str, str]:
    """The header, after a check of the whole file in constant memory; raises `InputError` for any other file."""
    digest = hashlib.sha256()
    try:
        with safe_open(path, framework="np") as file:
            header: dict[str, str] = file.metadata() or {}
            for name in TENSORS:
                tensor = file.get_slice(name)
                rows = tensor.get_shape()[0]
                empty = tensor[:0] if rows else file.get_tensor(name)
                digest.update(_tensor_header(name, empty.dtype, tuple(tensor.get_shape())))
                step = max(1, CHUNK_BYTES // max(1, empty.dtype.itemsize * math.prod(empty.shape[1:])))
                for start in range(0, rows, step):
                    digest.update(np.ascontiguousarray(tensor[start : min(start + step, rows)]).data)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"vectors file {path}: damaged or not safetensors ({error})") from error
    claimed = header.pop("header_sha256", None)
    if header.get("format") != FORMAT or claimed != _header_sha256(header) or header["sha256"] != digest.hexdigest():
        raise InputError(f"vectors file {path}: damaged, or another format than {FORMAT!r}; extract again")
    return header


def _read_pt(path: Path) -> Vectors:
    """Read an older file, in which only concepts and vectors are known."""
    concepts, table = read_table(path)
    no_tokens, no_rows = np.zeros(0, np.int64), table[:0]
    tensors = (table[:, None, None], no_tokens, np.zeros(len(concepts) + 1, np.int64), no_tokens, no_rows, no_rows)
    categories = ("unknown",) * len(concepts)
    splits = tuple(split(Catalogue(concepts, categories)))
    strings = ("unknown", "unknown", "unknown", "float32", "unknown")  # in the order of `STRINGS`
    return Vectors(*tensors, concepts, categories, splits, (0,), ("{concept}",), None, 0, *strings)


def stored_dtype(peak: float) -> np.dtype[Any]:
    """float16 where its range holds values up to ``peak`` (its rounding costs 1e-7 of a cosine), else float32."""
    return np.dtype(np.float16 if peak < np.finfo(np.float16).max else np.float32)
