"""Reading of ``.pt`` files: concepts and their vectors, in any unambiguous form.

Nothing in the file can run code: torch reads it with ``weights_only=True``, and the classes below rebuild its NumPy
arrays, of numbers and text only.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import InputError

EXPECTED = (
    'expected {concept: vector}, {"concepts": [...], "vectors": [concepts, d_model]}, or a list of the concepts beside '
    "one of their vectors, all of one length"
)
ALLOWED_KINDS = "fiuU"  # of NumPy types: numbers and text


class _StoredType:
    """A pickled NumPy type: its code, then its byte order."""

    def __init__(self, code: str, *_options: object) -> None:
        self.numpy = np.dtype(code)
        if self.numpy.kind not in ALLOWED_KINDS:
            raise ValueError(f"an array of {self.numpy}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.numpy = self.numpy.newbyteorder(state[1] if state[1] in ("<", ">") else "=")


class _StoredArray:
    """A pickled NumPy array: created empty, then filled."""

    values: NDArray[Any]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, kind, is_fortran, content = state
        self.values = np.frombuffer(content, kind.numpy).reshape(shape, order="F" if is_fortran else "C")


def _reconstruct(*_arguments: object) -> _StoredArray:
    return _StoredArray()


def _scalar(kind: _StoredType, content: bytes) -> Any:
    return np.frombuffer(content, kind.numpy)[0].item()


CORES = ("numpy.core.multiarray", "numpy._core.multiarray")  # of NumPy 1 and 2
STAND_INS: list[Any] = [
    (_StoredType, "numpy.dtype"),
    (_StoredArray, "numpy.ndarray"),
    *((_reconstruct, f"{core}._reconstruct") for core in CORES),
    *((_scalar, f"{core}.scalar") for core in CORES),
]


def read_table(path: Path) -> tuple[tuple[str, ...], NDArray[np.float32]]:
    """Read a ``.pt`` file.

    Returns:
        The concepts and their vectors, ``[concepts, d_model]``.

    Raises:
        InputError: damaged, of a kind that could run code, or ambiguous.
    """
    try:
        with torch.serialization.safe_globals(STAND_INS), warnings.catch_warnings(action="ignore"):
            table = _plain(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch has no error of its own for bytes that make no sense
        raise InputError(f"vectors file {path}: not a table of tensors, or one that could run code") from error
    try:
        concepts, vectors = _concepts_and_values(table)
        return tuple(concepts), _stacked(concepts, vectors)
    except InputError as error:
        raise InputError(f"vectors file {path}: {error}; {EXPECTED}") from None


def _plain(value: Any) -> Any:
    """Convert to dicts, lists, texts and tensors."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, _StoredArray):
        values = value.values
        native = values.astype(values.dtype.newbyteorder("="))
        return native.tolist() if native.dtype.kind == "U" else torch.from_numpy(native)
    return value.detach() if isinstance(value, torch.Tensor) else value


def _concepts_and_values(table: Any) -> tuple[list[str], Sequence[Any]]:
    """Separate the concepts from as many values, which should be their vectors."""
    if isinstance(table, dict) and isinstance(table.get("concepts"), list):
        concepts, values = table["concepts"], table.get("vectors")
    elif isinstance(table, dict):
        concepts, values = list(table), list(table.values())
    elif isinstance(table, list) and len(table) == 2 and any(map(_are_texts, table)):
        concepts, values = table if _are_texts(table[0]) else table[::-1]
    elif isinstance(table, list) and table and all(_is_pair(row) for row in table):
        concepts, values = [name for name, _ in table], [vector for _, vector in table]
    elif isinstance(table, list):
        raise InputError(f"a list of {len(table)} values without their concepts")
    else:
        raise InputError(f"{_described(table)} without concepts")
    if not concepts or not all(isinstance(name, (str, int)) for name in concepts):
        raise InputError("concepts that are not all texts" if concepts else "no concepts")
    if not isinstance(values, (list, torch.Tensor)) or (isinstance(values, torch.Tensor) and values.ndim == 0):
        raise InputError(f"{_described(values)} for vectors")
    if len(concepts) != len(values):
        raise InputError(f"{len(concepts)} concepts and {len(values)} vectors")
    return list(map(str, concepts)), list(values)


def _stacked(concepts: Sequence[str], vectors: Sequence[Any]) -> NDArray[np.float32]:
    """Stack vectors of one length, ``[concepts, d_model]``."""
    [(repeated, count)] = Counter(concepts).most_common(1)
    if count > 1:
        raise InputError(f"the concept {repeated!r} twice")
    rows = [_row(concept, vector) for concept, vector in zip(concepts, vectors, strict=True)]
    for concept, row in zip(concepts, rows, strict=True):
        if len(row) != len(rows[0]):
            expected = f"{concepts[0]!r} one of {len(rows[0])}"
            raise InputError(f"{concept!r} has a vector of {len(row)} numbers, and {expected}")
    return torch.stack(rows).numpy()


def _row(concept: str, vector: Any) -> torch.Tensor:
    """Convert a concept's vector to float32, ``[d_model]``, without axes of length 1."""
    try:
        tensor = torch.as_tensor(vector).to_dense()
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{concept!r} has {_described(vector)}") from None
    if tensor.is_complex() or tensor.ndim == 0 or tensor.numel() == 0 or tensor.numel() != max(tensor.shape):
        raise InputError(f"{concept!r} has {_described(tensor)}")
    return tensor.flatten().to(torch.float32)


def _are_texts(value: Any) -> bool:
    """Whether it is a list of texts, at least one."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def _is_pair(value: Any) -> bool:
    """Whether it is a concept beside its vector."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"a value of type {type(value).__name__}"
