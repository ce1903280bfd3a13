"""What a student reads of texts: tables that are looked up by token and pooled.

NumPy alone, in training and afterwards: a trained student reads without torch.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.student.tokenizer import IntArray, RaggedArray, folded

FloatArray = NDArray[np.float32]

NGRAM_SIZES = (2, 3, 4)  # characters, with < and > around a word (Bojanowski et al., 2017)
NGRAM_BUCKETS = 2048
BLOCK = "block"
# By name: the token table that is pooled, and how.
POOLED = {
    "embeddings": ("token_embeddings", ("mean", "last")),
    "embeddings-first": ("token_embeddings", ("mean", "last", "first")),
    "embeddings-whitened": ("token_embeddings", ("mean", "last")),
    "activations": ("token_activations", ("mean", "last")),
}
STREAMS = ("token_embeddings", "token_activations")  # tables in the coordinates of the residual stream
LARGEST = 127  # of 8 bits


@dataclass(frozen=True)
class Table:
    """Rows of numbers, in 8 bits with one scale a row or as they are.

    Attributes:
        values: ``[rows, width]``, int8, float16 or float32.
        scale: ``[rows]`` float32, of int8 values; else None.
    """

    values: NDArray[Any]
    scale: FloatArray | None = None

    def __getitem__(self, rows: IntArray) -> FloatArray:
        found = self.values[rows].astype(np.float32, copy=False)
        if self.scale is not None:
            found *= self.scale[rows, None]
        return found

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return int(self.values.shape[1])

    @classmethod
    def to_int8(cls, values: NDArray[Any], rows: int = 1 << 14) -> Table:
        """The values rounded to 8 bits; the largest of each row is exact. ``rows`` are converted at once."""
        short, scale = np.empty(values.shape, np.int8), np.empty(len(values), np.float32)
        for start in range(0, len(values), rows):
            part = values[start : start + rows].astype(np.float32)
            own = np.abs(part).max(1, initial=0) / LARGEST
            scale[start : start + rows] = own
            short[start : start + rows] = np.rint(part / np.where(own > 0, own, 1)[:, None])
        return cls(short, scale)


def pool_mean(table: Table, tokens: RaggedArray) -> FloatArray:
    """The mean of each text's rows, ``[n, width]``."""
    sums = np.add.reduceat(table[tokens.values], tokens.offsets[:-1], axis=0)
    sums /= tokens.lengths[:, None].astype(np.float32)
    return sums


def pool_last(table: Table, tokens: RaggedArray) -> FloatArray:
    """The row of each text's last token, ``[n, width]``."""
    return table[tokens.values[tokens.offsets[1:] - 1]]


def pool_first(table: Table, tokens: RaggedArray) -> FloatArray:
    """The row of each text's first token, ``[n, width]``."""
    return table[tokens.values[tokens.offsets[:-1]]]


def sequences(table: Table, tokens: RaggedArray, max_tokens: int) -> FloatArray:
    """Each text's last ``max_tokens`` tokens end to end, the last at the end, ``[n, max_tokens * width]``; zeros first."""
    back = np.arange(max_tokens)[::-1]  # how far each place is from the end
    place = tokens.offsets[1:, None] - 1 - back  # [n, longest]
    there = back < tokens.lengths[:, None]
    rows = table[tokens.values[np.where(there, place, 0)].reshape(-1)] * there.reshape(-1, 1)
    return rows.reshape(len(tokens), -1)


def ngrams(texts: Sequence[str]) -> tuple[RaggedArray, FloatArray]:
    """Hashed character n-grams of each text, and how much each counts: its share of a row of length 1."""
    buckets, weights = [], []
    for text in texts:
        grams: dict[int, int] = {}
        for word in folded(text).split():
            whole = f"<{word}>"
            for size in NGRAM_SIZES:
                for start in range(len(whole) - size + 1):
                    bucket = zlib.crc32(whole[start : start + size].encode()) % NGRAM_BUCKETS
                    grams[bucket] = grams.get(bucket, 0) + 1
        counts = np.array(list(grams.values()), np.float32)
        buckets.append(list(grams))
        weights.append(counts / np.linalg.norm(counts))
    return RaggedArray.of(buckets), np.concatenate(weights)


def pool_ngrams(table: Table, texts: Sequence[str], at_once: int = 256) -> FloatArray:
    """The weighted sum of each text's n-grams' rows, ``[n, width]``."""
    sums = []
    for start in range(0, len(texts), at_once):
        buckets, weights = ngrams(texts[start : start + at_once])
        sums.append(np.add.reduceat(table[buckets.values] * weights[:, None], buckets.offsets[:-1], axis=0))
    return np.concatenate(sums)


POOLS = {"mean": pool_mean, "last": pool_last, "first": pool_first}


@dataclass(frozen=True)
class Part:
    """Some columns of what is read: a table and how its rows are pooled.

    Attributes:
        table: its name.
        pool: of `POOLS`; ``sequence``; ``ngrams``; or ``place``, a row for each concept of the vectors file.
    """

    table: str
    pool: str


def parts_of(inputs: str) -> list[Part]:
    """The parts of inputs joined by ``+``, in the order of their columns."""
    parts = []
    for name in inputs.split("+"):
        if name in POOLED:
            table, pools = POOLED[name]
            parts += [Part(table if name != "embeddings-whitened" else name, pool) for pool in pools]
        elif name.startswith(BLOCK):
            parts.append(Part(name, "place"))
        else:
            parts.append(Part(name, {"bag": "mean"}.get(name, name)))
    return parts


@dataclass(frozen=True)
class TokenizedTexts:
    """Texts as they are looked up.

    Attributes:
        texts: what was written.
        tokens: of each its rows in the token tables.
        places: of each its place among the concepts of the vectors file; none for other texts.
    """

    texts: Sequence[str]
    tokens: RaggedArray
    places: IntArray | None = None

    def part(self, start: int, stop: int) -> TokenizedTexts:
        """Those from one to before another."""
        places = None if self.places is None else self.places[start:stop]
        return TokenizedTexts(self.texts[start:stop], self.tokens.part(start, stop), places)


@dataclass(frozen=True)
class TokenFeatures:
    """What a student reads of texts: tables looked up and pooled, side by side, each part standardised.

    A folded reading has a linear map in it already (`folded`): its parts are added up and not set side by side.

    Attributes:
        parts: tables and how they are pooled.
        tables: by name; ``[types, width]`` for tokens, ``[concepts, d_model]`` for a block.
        offset, scale: ``[features]``, taken off and divided by; of a folded reading the offset alone, ``[width]``.
        longest: tokens of a sequence.
        is_folded: whether its parts are added up.
    """

    parts: tuple[Part, ...]
    tables: dict[str, Table]
    offset: FloatArray
    scale: FloatArray
    max_tokens: int
    is_folded: bool = False

    def raw(self, asked: TokenizedTexts) -> list[FloatArray]:
        """Each part before standardisation, ``[n, width]``."""
        return [self._pool(part, asked) for part in self.parts]

    def _pool(self, part: Part, asked: TokenizedTexts) -> FloatArray:
        table = self.tables[part.table]
        if part.pool == "sequence":
            return sequences(table, asked.tokens, self.max_tokens)
        if part.pool == "ngrams":
            return pool_ngrams(table, asked.texts)
        if part.pool == "place":
            assert asked.places is not None
            return table[asked.places]
        return POOLS[part.pool](table, asked.tokens)

    def __call__(self, asked: TokenizedTexts) -> FloatArray:
        """Features, ``[n, features]``; of a folded reading what its map makes of them, ``[n, width]``."""
        if self.is_folded:
            first, *rest = self.raw(asked)
            for values in rest:
                first += values
            first -= self.offset
            return first
        read = np.concatenate(self.raw(asked), 1)
        return (read - self.offset) / self.scale

    @property
    def residual_columns(self) -> list[slice]:
        """The columns that are the residual stream of a token, each d_model wide."""
        return [
            columns
            for part, columns in zip(self.parts, self.columns, strict=True)
            if part.table in STREAMS or part.pool == "place"
        ]

    @property
    def columns(self) -> list[slice]:
        """Of each part its columns among the features."""
        widths = [
            self.tables[part.table].width * (self.max_tokens if part.pool == "sequence" else 1) for part in self.parts
        ]
        stops = np.cumsum(widths).tolist()
        return [slice(stop - width, stop) for width, stop in zip(widths, stops, strict=True)]

    def folded(self, weight: FloatArray) -> TokenFeatures:
        """The reading with the linear map behind it in its tables.

        Args:
            weight: the map, ``[features, width]``; for sequences it maps each token, ``[token width, width]``.
        """
        if self.parts[0].pool == "sequence":
            [table] = self.tables.values()
            made = {"0": Table(_mapped(table, weight))}
            return TokenFeatures(
                (Part("0", "sequence"),), made, np.zeros(1, np.float32), self.scale, self.max_tokens, True
            )
        standard = weight / np.broadcast_to(self.scale, len(weight))[:, None]
        tables, parts = {}, []
        for number, (part, columns) in enumerate(zip(self.parts, self.columns, strict=True)):
            tables[str(number)] = Table(_mapped(self.tables[part.table], standard[columns]))
            parts.append(Part(str(number), part.pool))
        offset = (self.offset @ standard).astype(np.float32)
        return TokenFeatures(tuple(parts), tables, offset, np.ones(1, np.float32), self.max_tokens, True)

    def to_int8(self) -> TokenFeatures:
        """The reading with its tables rounded to 8 bits."""
        tables = {name: Table.to_int8(table.values) for name, table in self.tables.items()}
        return TokenFeatures(self.parts, tables, self.offset, self.scale, self.max_tokens, self.is_folded)


def _mapped(table: Table, weight: FloatArray, rows: int = 1 << 14) -> FloatArray:
    """What a map ``[width, columns]`` makes of each row."""
    made = np.empty((len(table.values), weight.shape[1]), np.float32)
    for start in range(0, len(made), rows):
        made[start : start + rows] = table[np.arange(start, min(start + rows, len(made)))] @ weight
    return made
