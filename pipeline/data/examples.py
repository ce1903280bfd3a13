"""Examples for a student: inputs and targets of held-out concepts as matrices, of training concepts read in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CHUNK_BYTES = 1 << 25  # of inputs and targets, in float32, that are read at once
MAX_CHUNK = 4096  # rows

RowReader = Callable[[NDArray[np.int64]], NDArray[np.float32]]  # row numbers [n] to rows [n, columns]


@dataclass(frozen=True)
class Examples:
    """One side of a split, ready for a student."""

    rows: list[int]  # N concepts' rows in the vectors file
    inputs: Tensor  # [N, features], standardised
    targets: Tensor  # [N, d_model], activation vectors minus mu


@dataclass(frozen=True)
class LazyMatrix:
    """A matrix whose rows are computed whenever they are read, so that it need not fit in memory."""

    shape: tuple[int, int]
    read: RowReader

    @classmethod
    def of(cls, rows: NDArray[np.int64], read: RowReader) -> LazyMatrix:
        """The matrix of what ``read`` gives for rows of a larger one, ``[len(rows), columns]``."""
        return cls((len(rows), read(rows[:1]).shape[1]), lambda chosen: read(rows[chosen]))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        numbers = np.arange(len(self))[rows] if isinstance(rows, slice) else rows.numpy()
        return torch.from_numpy(self.read(numbers))


@dataclass(frozen=True)
class LazyExamples:
    """Examples of which only the rows that are read are in memory."""

    rows: list[int]  # of the concepts in the vectors file
    inputs: LazyMatrix  # [N, features], standardised
    targets: LazyMatrix  # [N, d_model], activation vectors minus mu

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Read all inputs and targets in order, some rows at a time, ``[n, features]`` and ``[n, d_model]``."""
        for rows in row_slices(self.inputs, self.targets):
            yield self.inputs[rows], self.targets[rows]


def row_slices(*matrices: LazyMatrix) -> Iterator[slice]:
    """Cut the rows of matrices of one length into slices that are small enough to be read at once."""
    columns = sum(matrix.shape[1] for matrix in matrices)
    size = max(1, min(MAX_CHUNK, CHUNK_BYTES // (4 * columns)))
    return (slice(start, start + size) for start in range(0, len(matrices[0]), size))


def moments(matrix: LazyMatrix) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The mean and the variance of each column, ``[columns]`` each, summed in float64."""
    total, squares = np.zeros(matrix.shape[1]), np.zeros(matrix.shape[1])
    for rows in row_slices(matrix):
        values = matrix[rows].numpy().astype(np.float64)
        total += values.sum(0)
        squares += np.square(values).sum(0)
    mean = total / len(matrix)
    return mean, (squares / len(matrix) - np.square(mean)).clip(min=0)
