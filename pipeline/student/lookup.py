"""A student's inputs, in training and after it: rows of tables that are looked up by token and pooled, in NumPy."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.student.tokenizer import IntArray, RaggedArray, casefolded

FloatArray = NDArray[np.float32]

NGRAM_SIZES = (2, 3, 4)  # characters, with < and > around a word (Bojanowski et al., 2017)
NGRAM_BUCKETS = 2048
BLOCK = "block"  # begins the names of inputs that are an early block's vectors: block4
# Inputs by name: the token table that is pooled, and how.
POOLED_INPUTS = {
    "embeddings": ("token_embeddings", ("mean", "last")),
    "embeddings-first": ("token_embeddings", ("mean", "last", "first")),
    "embeddings-whitened": ("token_embeddings", ("mean", "last")),
    "activations": ("token_activations", ("mean", "last")),
}
RESIDUAL_TABLES = ("token_embeddings", "token_activations")  # in the coordinates of the residual stream
INT8_MAX = 127
TABLE_ROWS = 1 << 14  # of a table converted at once
SHORT_TEXT = 8  # tokens that NumPy's sums add one after another


@dataclass(frozen=True)
class Table:
    """Rows of numbers: floating point, or int8 with one scale per row."""

    values: NDArray[Any]  # [rows, width], int8, float16 or float32
    scale: FloatArray | None = None  # [rows], for int8 values

    def __getitem__(self, rows: IntArray | slice) -> FloatArray:
        found = self.values[rows].astype(np.float32, copy=False)
        if self.scale is not None:
            found *= self.scale[rows, None]
        return found

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return int(self.values.shape[1])

    def to_int8(self) -> Table:
        """Round the values to 8 bits; the largest of each row stays exact."""
        rounded, scale = np.empty(self.values.shape, np.int8), np.empty(len(self.values), np.float32)
        for chunk in self._chunks:
            values = self[chunk]
            scale[chunk] = largest = np.abs(values).max(1, initial=0) / INT8_MAX
            rounded[chunk] = np.rint(values / np.where(largest > 0, largest, 1)[:, None])
        return Table(rounded, scale)

    def mapped(self, weight: FloatArray) -> Table:
        """Multiply each row by a linear map ``[width, columns]``."""
        made = np.empty((len(self.values), weight.shape[1]), np.float32)
        for chunk in self._chunks:
            made[chunk] = self[chunk] @ weight
        return Table(made)

    @property
    def _chunks(self) -> list[slice]:
        return [slice(start, start + TABLE_ROWS) for start in range(0, len(self.values), TABLE_ROWS)]


def pool_mean(table: Table, tokens: RaggedArray) -> FloatArray:
    """Average each text's rows, ``[n, width]``."""
    starts, lengths = tokens.offsets[:-1], tokens.lengths
    # Sums of short texts a position at a time: the same, in the same order, as `reduceat` has them, in a sixth of the
    # time.
    sums, others = table[tokens.values[starts]], np.zeros((len(tokens), table.width), np.float32)
    for position in range(1, min(lengths.max(initial=0), SHORT_TEXT)):
        longer = np.flatnonzero((lengths > position) & (lengths <= SHORT_TEXT))
        others[longer] += table[tokens.values[starts[longer] + position]]
    sums += others
    if len(long := np.flatnonzero(lengths > SHORT_TEXT)):
        own = tokens.take(long)
        sums[long] = np.add.reduceat(table[own.values], own.offsets[:-1], axis=0)
    sums /= lengths[:, None].astype(np.float32)
    return sums


# From a table and each text's tokens to one row a text, [n, width].
POOLING: dict[str, Callable[[Table, RaggedArray], FloatArray]] = {
    "mean": pool_mean,
    "last": lambda table, tokens: table[tokens.values[tokens.offsets[1:] - 1]],
    "first": lambda table, tokens: table[tokens.values[tokens.offsets[:-1]]],
}


def pool_sequence(table: Table, tokens: RaggedArray, max_tokens: int) -> FloatArray:
    """Join the rows of each text's last ``max_tokens`` tokens, zeros first, ``[n, max_tokens * width]``."""
    from_end = np.arange(max_tokens)[::-1]  # [max_tokens]
    position = tokens.offsets[1:, None] - 1 - from_end  # [n, max_tokens]
    is_token = from_end < tokens.lengths[:, None]
    rows = table[tokens.values[np.where(is_token, position, 0)].reshape(-1)] * is_token.reshape(-1, 1)
    return rows.reshape(len(tokens), -1)


def pool_ngrams(table: Table, texts: Sequence[str]) -> FloatArray:
    """Sum the rows of each text's hashed character n-grams, with weights of length 1 by count, ``[n, width]``."""
    sums = np.empty((len(texts), table.width), np.float32)
    for number, text in enumerate(texts):
        words = [f"<{word}>" for word in casefolded(text).split()]
        grams = [word[at : at + size] for word in words for size in NGRAM_SIZES for at in range(len(word) - size + 1)]
        buckets = Counter(zlib.crc32(gram.encode()) % NGRAM_BUCKETS for gram in grams)
        weights = np.array(list(buckets.values()), np.float32)
        weights /= np.linalg.norm(weights)
        sums[number] = (table[np.array(list(buckets))] * weights[:, None]).sum(0)
    return sums


class FeaturePart(NamedTuple):
    """Some columns of the features: a table and how its rows are pooled."""

    table: str
    pool: str  # a name in `POOLING`; "sequence"; "ngrams"; or "place", one row per concept of the vectors file


def parse_inputs(inputs: str) -> tuple[FeaturePart, ...]:
    """Parse inputs joined by ``+`` into parts, in the order of their columns."""
    parts = []
    for name in inputs.split("+"):
        if name in POOLED_INPUTS:
            table, pools = POOLED_INPUTS[name]
            parts += [FeaturePart(table if name != "embeddings-whitened" else name, pool) for pool in pools]
        else:
            parts.append(FeaturePart(name, "place" if name.startswith(BLOCK) else {"bag": "mean"}.get(name, name)))
    return tuple(parts)


@dataclass(frozen=True)
class TokenizedTexts:
    """Texts with the rows that they look up."""

    texts: Sequence[str]  # n
    tokens: RaggedArray  # each text's rows in the token tables
    places: IntArray | None = None  # [n], rows among the concepts of the vectors file; None for other texts

    def part(self, start: int, stop: int) -> TokenizedTexts:
        """The texts from ``start`` to before ``stop``."""
        places = None if self.places is None else self.places[start:stop]
        return TokenizedTexts(self.texts[start:stop], self.tokens.part(start, stop), places)


@dataclass(frozen=True)
class TokenFeatures:
    """A function from tokens to a student's inputs: tables looked up and pooled, side by side, each part standardised.

    Folded features contain the student's first linear map (`folded`): their parts are added up, not set side by side.
    """

    parts: tuple[FeaturePart, ...]
    tables: dict[str, Table]  # [types, width] for tokens, [concepts, d_model] for a block
    offset: FloatArray  # [features], which is subtracted; [width] where folded
    scale: FloatArray  # [features], the divisor where not folded
    max_tokens: int  # of a sequence
    is_folded: bool = False

    def pooled(self, texts: TokenizedTexts) -> list[FloatArray]:
        """Pool each part, before standardisation, ``[n, width]``."""
        return [self._pool(part, texts) for part in self.parts]

    def _pool(self, part: FeaturePart, texts: TokenizedTexts) -> FloatArray:
        table = self.tables[part.table]
        if part.pool == "sequence":
            return pool_sequence(table, texts.tokens, self.max_tokens)
        if part.pool == "ngrams":
            return pool_ngrams(table, texts.texts)
        if part.pool == "place":
            assert texts.places is not None
            return table[texts.places]
        return POOLING[part.pool](table, texts.tokens)

    def __call__(self, texts: TokenizedTexts) -> FloatArray:
        """Compute features, ``[n, features]``; where folded, the output of the first linear map, ``[n, width]``."""
        if not self.is_folded:
            features = np.concatenate(self.pooled(texts), 1)
            features -= self.offset
            features /= self.scale
            return features
        total, *others = self.pooled(texts)
        for values in others:
            total += values
        total -= self.offset
        return total

    @property
    def columns(self) -> list[slice]:
        """Columns of each part among the features."""
        widths = [
            self.tables[part.table].width * (self.max_tokens if part.pool == "sequence" else 1) for part in self.parts
        ]
        stops = np.cumsum(widths).tolist()
        return [slice(stop - width, stop) for width, stop in zip(widths, stops, strict=True)]

    @property
    def residual_columns(self) -> list[slice]:
        """Columns of the parts that are a residual stream, each ``d_model`` wide."""
        parts = zip(self.parts, self.columns, strict=True)
        return [columns for part, columns in parts if part.table in RESIDUAL_TABLES or part.pool == "place"]

    def folded(self, weight: FloatArray) -> TokenFeatures:
        """Multiply the tables by the linear map that follows.

        Args:
            weight: the map, ``[features, width]``; for sequences it maps each token, ``[token width, width]``.

        Returns:
            Folded features, whose tables are named by the number of their part.
        """
        if self.parts[0].pool == "sequence":
            [table] = self.tables.values()
            part, zero = FeaturePart("0", "sequence"), np.zeros(1, np.float32)
            return TokenFeatures((part,), {"0": table.mapped(weight)}, zero, self.scale, self.max_tokens, True)
        standard = weight / np.broadcast_to(self.scale, len(weight))[:, None]
        parts = tuple(FeaturePart(str(number), part.pool) for number, part in enumerate(self.parts))
        tables = {
            made.table: self.tables[part.table].mapped(standard[columns])
            for made, part, columns in zip(parts, self.parts, self.columns, strict=True)
        }
        offset = (self.offset @ standard).astype(np.float32)
        return TokenFeatures(parts, tables, offset, np.ones(1, np.float32), self.max_tokens, True)

    def to_int8(self) -> TokenFeatures:
        """Round the tables to 8 bits."""
        return replace(self, tables={name: table.to_int8() for name, table in self.tables.items()})
