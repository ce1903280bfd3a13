"""How texts become what a student reads: their tokens, and tables that are looked up by token and pooled.

NumPy alone, in training and afterwards: a trained student reads without torch.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pipeline.errors import InputError

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

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
LONGEST_TEXT = 10_000  # characters
KNOWN_WORDS = 200_000  # whose tokens are remembered
LETTERS = re.compile(r"[^\W\d_]+(?: [^\W\d_]+)*")
LINES_OF_LETTERS = re.compile(r"[^\W\d_]+(?:[ \n][^\W\d_]+)*")


@dataclass(frozen=True)
class Ragged:
    """Lists of whole numbers of different lengths, end to end.

    Attributes:
        values: ``[total]``.
        offsets: ``[n + 1]``, where each list begins.
    """

    values: Integers
    offsets: Integers

    @classmethod
    def of(cls, lists: Sequence[Sequence[int] | Integers]) -> Ragged:
        """Join lists."""
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        values = np.fromiter(chain.from_iterable(lists), np.int64, int(lengths.sum()))
        return cls(values, np.concatenate([[0], lengths.cumsum()]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, place: int) -> Integers:
        return self.values[self.offsets[place] : self.offsets[place + 1]]

    @property
    def lengths(self) -> Integers:
        """Of each list, ``[n]``."""
        return np.diff(self.offsets)

    def take(self, places: Sequence[int]) -> Ragged:
        """Some of the lists."""
        return Ragged.of([self[place] for place in places])


@dataclass(frozen=True)
class Table:
    """Rows of numbers, in 8 bits with one scale a row or as they are.

    Attributes:
        values: ``[rows, width]``, int8, float16 or float32.
        scale: ``[rows]`` float32, of int8 values; else None.
    """

    values: NDArray[Any]
    scale: Floats | None = None

    def __getitem__(self, rows: Integers) -> Floats:
        found = self.values[rows].astype(np.float32, copy=False)
        if self.scale is not None:
            found *= self.scale[rows, None]
        return found

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return int(self.values.shape[1])

    @classmethod
    def in_8_bits(cls, values: NDArray[Any], rows: int = 1 << 14) -> Table:
        """The values rounded to 8 bits; the largest of each row is exact. ``rows`` are converted at once."""
        short, scale = np.empty(values.shape, np.int8), np.empty(len(values), np.float32)
        for start in range(0, len(values), rows):
            part = values[start : start + rows].astype(np.float32)
            own = np.abs(part).max(1, initial=0) / LARGEST
            scale[start : start + rows] = own
            short[start : start + rows] = np.rint(part / np.where(own > 0, own, 1)[:, None])
        return cls(short, scale)


def pool_mean(table: Table, tokens: Ragged) -> Floats:
    """The mean of each text's rows, ``[n, width]``."""
    sums = np.add.reduceat(table[tokens.values], tokens.offsets[:-1], axis=0)
    sums /= tokens.lengths[:, None].astype(np.float32)
    return sums


def pool_last(table: Table, tokens: Ragged) -> Floats:
    """The row of each text's last token, ``[n, width]``."""
    return table[tokens.values[tokens.offsets[1:] - 1]]


def pool_first(table: Table, tokens: Ragged) -> Floats:
    """The row of each text's first token, ``[n, width]``."""
    return table[tokens.values[tokens.offsets[:-1]]]


def sequences(table: Table, tokens: Ragged, longest: int) -> Floats:
    """Each text's last ``longest`` tokens end to end, the last at the end, ``[n, longest * width]``; zeros before."""
    back = np.arange(longest)[::-1]  # how far each place is from the end
    place = tokens.offsets[1:, None] - 1 - back  # [n, longest]
    there = back < tokens.lengths[:, None]
    rows = table[tokens.values[np.where(there, place, 0)].reshape(-1)] * there.reshape(-1, 1)
    return rows.reshape(len(tokens), -1)


def ngrams(texts: Sequence[str]) -> tuple[Ragged, Floats]:
    """Hashed character n-grams of each text, and how much each counts: its share of a row of length 1."""
    buckets, weights = [], []
    for text in texts:
        grams: dict[int, int] = {}
        for word in text.casefold().split():
            whole = f"<{word}>"
            for size in NGRAM_SIZES:
                for start in range(len(whole) - size + 1):
                    bucket = zlib.crc32(whole[start : start + size].encode()) % NGRAM_BUCKETS
                    grams[bucket] = grams.get(bucket, 0) + 1
        counts = np.array(list(grams.values()), np.float32)
        buckets.append(list(grams))
        weights.append(counts / np.linalg.norm(counts))
    return Ragged.of(buckets), np.concatenate(weights)


def pool_ngrams(table: Table, texts: Sequence[str], at_once: int = 256) -> Floats:
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
class Texts:
    """Texts as they are looked up.

    Attributes:
        texts: what was written.
        tokens: of each its rows in the token tables.
        places: of each its place among the concepts of the vectors file; none for other texts.
    """

    texts: Sequence[str]
    tokens: Ragged
    places: Integers | None = None


@dataclass(frozen=True)
class Reading:
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
    offset: Floats
    scale: Floats
    longest: int
    is_folded: bool = False

    def raw(self, asked: Texts) -> list[Floats]:
        """Each part before standardisation, ``[n, width]``."""
        return [self._pool(part, asked) for part in self.parts]

    def _pool(self, part: Part, asked: Texts) -> Floats:
        table = self.tables[part.table]
        if part.pool == "sequence":
            return sequences(table, asked.tokens, self.longest)
        if part.pool == "ngrams":
            return pool_ngrams(table, asked.texts)
        if part.pool == "place":
            assert asked.places is not None
            return table[asked.places]
        return POOLS[part.pool](table, asked.tokens)

    def __call__(self, asked: Texts) -> Floats:
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
    def streams(self) -> list[slice]:
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
            self.tables[part.table].width * (self.longest if part.pool == "sequence" else 1) for part in self.parts
        ]
        stops = np.cumsum(widths).tolist()
        return [slice(stop - width, stop) for width, stop in zip(widths, stops, strict=True)]

    def folded(self, weight: Floats) -> Reading:
        """The reading with the linear map behind it in its tables.

        Args:
            weight: the map, ``[features, width]``; for sequences it maps each token, ``[token width, width]``.
        """
        if self.parts[0].pool == "sequence":
            [table] = self.tables.values()
            made = {"0": Table(_mapped(table, weight))}
            return Reading((Part("0", "sequence"),), made, np.zeros(1, np.float32), self.scale, self.longest, True)
        standard = weight / np.broadcast_to(self.scale, len(weight))[:, None]
        tables, parts = {}, []
        for number, (part, columns) in enumerate(zip(self.parts, self.columns, strict=True)):
            tables[str(number)] = Table(_mapped(self.tables[part.table], standard[columns]))
            parts.append(Part(str(number), part.pool))
        offset = (self.offset @ standard).astype(np.float32)
        return Reading(tuple(parts), tables, offset, np.ones(1, np.float32), self.longest, True)

    def in_8_bits(self) -> Reading:
        """The reading with its tables rounded to 8 bits."""
        tables = {name: Table.in_8_bits(table.values) for name, table in self.tables.items()}
        return Reading(self.parts, tables, self.offset, self.scale, self.longest, self.is_folded)


def _mapped(table: Table, weight: Floats, rows: int = 1 << 14) -> Floats:
    """What a map ``[width, columns]`` makes of each row."""
    made = np.empty((len(table.values), weight.shape[1]), np.float32)
    for start in range(0, len(made), rows):
        made[start : start + rows] = table[np.arange(start, min(start + rows, len(made)))] @ weight
    return made


@dataclass(frozen=True)
class Tokenization:
    """Texts as the teacher's tokens, as they stand in its prompt.

    Attributes:
        tokenizer: the teacher's.
        prompt: what stands around ``{concept}``: the template, or as much of it as tells how a text's tokens fall.
        whole: whether all tokens of the prompt are the text's own, but for a blank before it.
        by_word: whether the words of a text are tokens of their own each, so that words can be remembered.
    """

    tokenizer: Tokenizer
    prompt: str
    whole: bool
    by_word: bool
    _known: list[dict[str, list[int]]] = field(default_factory=lambda: [{}], compare=False)

    def __call__(self, texts: Sequence[str]) -> Ragged:
        """Token ids of each text.

        Raises:
            InputError: a text without any token.
        """
        found = self._all_words(texts) if self.by_word else None
        if found is None:
            found = Ragged.of(self._by_word(texts) if self.by_word else self._encode(texts))
        found = self._without_blank(found)
        if not found.lengths.all():
            place = int(np.flatnonzero(found.lengths == 0)[0])
            raise InputError(f"text {texts[place][:60]!r}: the teacher's tokenizer gives it no token")
        return found

    @cached_property
    def _blank(self) -> int | None:
        """The token of a blank before a text that does not become one with the text's first token."""
        if not (self.whole and self.prompt.startswith(" ")):
            return None
        ids = self.tokenizer.encode(" ", add_special_tokens=False).ids
        return int(ids[0]) if len(ids) == 1 else None

    def _without_blank(self, found: Ragged) -> Ragged:
        """The tokens of texts without that of the blank before them."""
        if self._blank is None or not len(found.values):
            return found
        starts = np.minimum(found.offsets[:-1], len(found.values) - 1)
        is_blank = (found.values[starts] == self._blank) & (found.lengths > 0)
        if not is_blank.any():
            return found
        lengths = found.lengths - is_blank
        return Ragged(np.delete(found.values, starts[is_blank]), np.concatenate([[0], lengths.cumsum()]))

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        prompts = [self.prompt.replace("{concept}", text) for text in texts]
        if self.whole:
            encoded = self.tokenizer.encode_batch_fast(prompts, add_special_tokens=False)
            return [list(one.ids) for one in encoded]
        start = self.prompt.index("{concept}")
        return [
            [
                number
                for number, (left, right) in zip(one.ids, one.offsets, strict=True)
                if left < start + len(text) and right > start
            ]
            for one, text in zip(self.tokenizer.encode_batch(prompts), texts, strict=True)
        ]

    def _by_word(self, texts: Sequence[str]) -> list[list[int]]:
        known = self._known[0]
        if len(known) > KNOWN_WORDS:
            known = self._known[0] = {}  # others go on with the one they have
        words = [text.split(" ") if LETTERS.fullmatch(text) else None for text in texts]
        self._learn({word for own in words if own for word in own}, known)
        others = iter(self._encode([text for text, own in zip(texts, words, strict=True) if own is None]))
        return [
            next(others) if own is None else list(chain.from_iterable(map(known.__getitem__, own))) for own in words
        ]

    def _all_words(self, texts: Sequence[str]) -> Ragged | None:
        """Tokens of texts that are words and blanks alone, with nothing done for each text by itself; else None."""
        lines = "\n".join(texts)
        if not LINES_OF_LETTERS.fullmatch(lines):
            return None
        words = lines.replace("\n", " ").split(" ")
        known = self._known[0]
        if len(known) > KNOWN_WORDS:
            known = self._known[0] = {}
        self._learn(set(words), known)
        tokens = Ragged.of(list(map(known.__getitem__, words)))
        numbers = np.fromiter((text.count(" ") for text in texts), np.int64, len(texts)) + 1  # words of each text
        if numbers.sum() != len(words):  # a line break inside a text
            return None
        return Ragged(tokens.values, tokens.offsets[np.concatenate([[0], numbers.cumsum()])])

    def _learn(self, words: set[str], known: dict[str, list[int]]) -> None:
        """Know the tokens of words."""
        if new := list(words - known.keys()):
            known.update(zip(new, self._encode(new), strict=True))


def checked(texts: Iterable[object], first: int = 0) -> list[str]:
    """Texts without the blanks around them.

    Args:
        texts: whatever came.
        first: the number by which an error names the first of them.

    Raises:
        InputError: something that is no text, an empty one, one with a null byte, or one too long.
    """
    texts = list(texts)
    try:
        bare = list(map(str.strip, texts))  # type: ignore[arg-type]
        whole = "\n".join(bare)
        whole.encode()
        if "\0" not in whole and all(bare) and max(map(len, bare), default=0) <= LONGEST_TEXT:
            return bare
    except (TypeError, UnicodeEncodeError):
        pass
    return [_checked(text, place) for place, text in enumerate(texts, first)]  # which it is, and what is wrong with it


def _checked(text: object, place: int) -> str:
    if not isinstance(text, str):
        raise InputError(f"text {place}: expected text, found {type(text).__name__}")
    bare = text.strip()
    if not bare:
        raise InputError(f"text {place}: empty")
    if len(bare) > LONGEST_TEXT:
        raise InputError(f"text {place}: {len(bare):,} characters; expected {LONGEST_TEXT:,} at the most")
    try:
        bare.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can carry
        raise InputError(f"text {place}: half a character in it") from None
    if "\0" in bare:
        raise InputError(f"text {place}: a null byte in it")
    return str(bare)
