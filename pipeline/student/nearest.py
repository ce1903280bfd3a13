"""The nearest of very many vectors by cosine, in memory that does not grow with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.student.lookup import FloatArray
from pipeline.student.tokenizer import IntArray

CHUNK_BYTES = 1 << 24  # of candidates that are compared at once, in float32
QUERIES = 256  # compared with them at once
POSITION_BITS = 32
LAST_POSITION = (1 << POSITION_BITS) - 1
NO_KEY = np.iinfo(np.int64).min  # below the key of every cosine


@dataclass(frozen=True, eq=False)
class Candidates:
    """Named vectors among which the nearest are searched; each search reads them in chunks."""

    names: Sequence[str]
    directions: Callable[[int, int], FloatArray]  # of rows from start to before stop: centred, of length 1

    def nearest(self, queries: FloatArray, count: int) -> list[list[tuple[str, float]]]:
        """Find the candidates with the highest cosine with each query.

        A pass over all candidates keeps the best of each query. Among equal cosines the first in order comes first.

        Args:
            queries: centred, ``[n, d_model]``.
            count: how many candidates, or all where there are fewer.

        Returns:
            For each query the names with their cosines, best first.
        """
        total = len(self.names)
        rows = max(1, CHUNK_BYTES // (4 * queries.shape[1]))
        best = np.full((len(queries), min(count, total)), NO_KEY)  # keys, ascending
        for start in range(0, total if len(queries) else 0, rows):
            directions = self.directions(start, min(start + rows, total))
            for first in range(0, len(queries), QUERIES):
                own = slice(first, first + QUERIES)
                _keep_best(best[own], unit(queries[own]) @ directions.T, start)
        places, cosines = _decode(best[:, ::-1])
        found = zip(places.tolist(), cosines.tolist(), strict=True)
        return [[(self.names[place], cosine) for place, cosine in zip(*pair, strict=True)] for pair in found]


def unit(values: FloatArray) -> FloatArray:
    """Vectors of length 1 in the same directions, ``[n, d_model]``."""
    directions: FloatArray = values / np.linalg.norm(values, axis=1, keepdims=True).clip(1e-12)
    return directions


def _keep_best(best: IntArray, cosines: FloatArray, start: int) -> None:
    """Update each query's best keys ``[n, k]`` by its cosines ``[n, chunk]`` with the candidates from ``start`` on."""
    # Later candidates lose ties, so only a larger cosine counts. After the first chunks few queries have one.
    better = np.flatnonzero(_ordered(cosines.max(1)) > best[:, 0] >> POSITION_BITS)
    if not len(better):
        return
    keys = _ordered(cosines[better])
    keys <<= POSITION_BITS
    keys |= LAST_POSITION - np.arange(start, start + cosines.shape[1])
    if (surplus := keys.shape[1] - best.shape[1]) > 0:
        keys.partition(surplus, axis=1)
        keys = keys[:, surplus:]
    joined = np.concatenate([best[better], keys], axis=1)
    joined.sort(axis=1)
    best[better] = joined[:, -best.shape[1] :]


def _ordered(cosines: FloatArray) -> IntArray:
    """Integers of 32 bits in the order of float32 numbers: a key is one of these and, in its low bits, a position."""
    # Positions count down, so the largest of equal cosines' keys, which all differ, is that of the first candidate.
    return _flipped((cosines + np.float32(0)).view(np.int32)).astype(np.int64)  # + 0: -0 equals 0


def _decode(keys: IntArray) -> tuple[IntArray, FloatArray]:
    """Positions and cosines of keys."""
    bits = _flipped((keys >> POSITION_BITS).astype(np.int32))
    return LAST_POSITION - (keys & LAST_POSITION), bits.view(np.float32)


def _flipped(bits: NDArray[np.int32]) -> NDArray[np.int32]:
    """Bits of float32 numbers to integers in the same order, and back: those of negative numbers count down."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
