"""What a student reads and what it must answer: concepts as numbers, for one training subset."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.concepts import balanced_order, by_categories
from pipeline.errors import InputError, choices
from pipeline.options import Cell
from pipeline.vectors import Vectors

NGRAM_SIZES = (2, 3, 4)  # characters, with < and > around a word (Bojanowski et al., 2017)
NGRAM_BUCKETS = 2048
WHITENING = 1.0  # shrinkage, in mean eigenvalues of the embeddings' covariance
BLOCK = "block"
VARIANTS = 8  # of each training concept, where augmentation changes what is read
# By name: the token table that is pooled, and how.
POOLED = {
    "embeddings": ("token_embeddings", ("mean", "last")),
    "embeddings-first": ("token_embeddings", ("mean", "last", "first")),
    "embeddings-whitened": ("token_embeddings", ("mean", "last")),
    "activations": ("token_activations", ("mean", "last")),
}
STREAMS = ("embeddings", "embeddings-first", "activations")  # parts in the coordinates of the residual stream
INPUTS = (*POOLED, "ngrams", "bag")
POOLS = {"mean": lambda tokens: tokens.mean(0), "last": lambda tokens: tokens[-1], "first": lambda tokens: tokens[0]}
TARGETS = ("first", "mean", "all")
SPLITS = ("concepts", "categories")


def pooled(table: Tensor, types: Sequence[Tensor], pools: Sequence[str]) -> Tensor:
    """Each concept's tokens as one vector, ``[concepts, pools * d_model]``.

    Args:
        table: ``[types, d_model]``.
        types: for each concept the rows of its tokens, in order.
        pools: of `POOLS`.
    """
    return torch.stack([torch.cat([POOLS[pool](table[rows]) for pool in pools]) for rows in types])


def ngrams(texts: Sequence[str]) -> Tensor:
    """Counts of hashed character n-grams, each row of length 1, ``[concepts, NGRAM_BUCKETS]``."""
    counts = torch.zeros(len(texts), NGRAM_BUCKETS)
    for row, text in enumerate(texts):
        for word in text.casefold().split():
            whole = f"<{word}>"
            grams = [whole[a : a + size] for size in NGRAM_SIZES for a in range(len(whole) - size + 1)]
            for gram in grams:
                counts[row, zlib.crc32(gram.encode()) % NGRAM_BUCKETS] += 1
    return F.normalize(counts, dim=-1)


def sequences(table: Tensor, types: Sequence[Tensor], longest: int) -> Tensor:
    """Each concept's last ``longest`` tokens end to end, the last at the end, ``[concepts, longest * d_model]``."""
    rows = torch.zeros(len(types), longest, table.shape[1])
    for row, tokens in enumerate(types):
        kept = tokens[-longest:]
        rows[row, longest - len(kept) :] = table[kept]
    return rows.flatten(1)


def width_of(name: str, d_model: int, types: int, longest: int) -> int:
    """Features of one part of what is read, of so many token types and at most so many tokens a concept."""
    widths = {"ngrams": NGRAM_BUCKETS, "bag": types, "sequence": d_model * longest}
    return d_model * len(POOLED[name][1]) if name in POOLED else widths.get(name, d_model)


def bags(types: Sequence[Tensor], size: int) -> Tensor:
    """The share of each token type among a concept's tokens, ``[concepts, types]``: a linear map learns embeddings."""
    rows = torch.zeros(len(types), size)
    for row, tokens in enumerate(types):
        rows[row].index_add_(0, tokens, torch.full((len(tokens),), 1 / len(tokens)))
    return rows


@dataclass(frozen=True)
class Reading:
    """How a student reads concepts: fitted on its training concepts, kept with it.

    Attributes:
        inputs: parts joined by ``+``: names of `INPUTS`, ``sequence`` (the transformer's), and ``block<k>``, the
            teacher's own residual stream after an early block.
        tables: what it looks up, by name: ``[types, d_model]`` for tokens, ``[concepts, d_model]`` for a block.
        offset, scale: ``[features]``, taken off and divided by.
    """

    inputs: str
    tables: dict[str, Tensor]
    offset: Tensor
    scale: Tensor

    def __call__(self, texts: Sequence[str], types: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
        """Features, ``[concepts, features]``.

        Args:
            texts: the concepts.
            types: of each its token rows in the tables.
            rows: of each its place among the concepts of the vectors file.
        """
        raw = raw_features(self.inputs, self.tables, texts, types, rows)
        return (raw - self.offset) / self.scale

    def streams(self, d_model: int) -> list[slice]:
        """The columns that are the residual stream of a token, each ``d_model`` wide."""
        found, start = [], 0
        for name in self.inputs.split("+"):
            width = width_of(name, d_model, int(self.tables["types"]), int(self.tables["longest"]))
            if name.startswith(BLOCK) or name in STREAMS:
                found += [slice(place, place + d_model) for place in range(start, start + width, d_model)]
            start += width
        return found


def raw_features(
    inputs: str, tables: dict[str, Tensor], texts: Sequence[str], types: Sequence[Tensor], rows: Sequence[int]
) -> Tensor:
    """Features before standardisation, ``[concepts, features]``."""
    parts = []
    for name in inputs.split("+"):
        if name.startswith(BLOCK):
            parts.append(tables[name][list(rows)].float())
        elif name == "sequence":
            parts.append(sequences(tables[name].float(), types, int(tables["longest"])))
        elif name == "ngrams":
            parts.append(ngrams(texts))
        elif name == "bag":
            parts.append(bags(types, int(tables["types"])))
        else:
            parts.append(pooled(tables[name].float(), types, POOLED[name][1]))
    return torch.cat(parts, 1)


@dataclass(frozen=True)
class Side:
    """One side of a split, ready for a student.

    Attributes:
        rows: the concepts' rows in the vectors file, ``[N]``.
        inputs: standardised features, ``[N, features]``.
        targets: activation vectors minus mu, ``[N, d_model]``.
    """

    rows: list[int]
    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True, eq=False)
class Subset:
    """A training subset with the held-out concepts as a student of that subset sees them.

    Everything is measured on the training concepts alone: mu (``mean``, ``[d_model]``), the root mean square of the
    centred targets (``scale``), and the features' standardisation (``reading``).

    Attributes:
        train, val, test: the sides.
        mean, scale, reading: see above.
        concepts: all of the vectors file, by row.
        variants: how often each training concept stands in ``augmented``, one after another.
        augmented: the training side as descent sees it: other targets, dropped tokens; ``train`` where there is none.
    """

    train: Side
    val: Side
    test: Side
    mean: Tensor
    scale: float
    reading: Reading
    concepts: tuple[str, ...]
    variants: int
    augmented: Side

    @cached_property
    def gram(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues ``[N]`` and eigenvectors ``[N, N]`` of the inputs' Gram matrix, float64.

        One factorisation serves every regularised linear map on this subset.
        """
        inputs = self.train.inputs.double()
        values, vectors = torch.linalg.eigh(inputs @ inputs.mT)
        return values.clamp(min=0), vectors


def reading_of(cell: Cell) -> str:
    """What the cell's student reads."""
    if cell.student == "transformer":
        return "sequence"
    return f"{BLOCK}{cell.blocks}+{cell.inputs}" if cell.student == "truncated" else cell.inputs


@dataclass
class Catalogued:
    """A vectors file as features, from which training subsets are cut.

    Args:
        vectors: the file.

    Raises:
        InputError: the file carries no tokens (an older ``.pt``), or nothing is held out.
    """

    vectors: Vectors
    _subsets: dict[tuple[object, ...], Subset] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self.vectors.token_ids):
            raise InputError("the vectors file carries no token embeddings, which students read; extract it again")
        for side in ("val", "test"):
            if not self.rows(side):
                raise InputError(f"the vectors file has no {side} concepts; extract more (10 at the least)")

    @cached_property
    def types(self) -> list[Tensor]:
        """Of each concept the rows of its tokens in the token tables."""
        return [torch.from_numpy(rows) for rows in self.vectors.token_rows]

    def rows(self, side: str, split: str = "concepts") -> list[int]:
        """Rows of one side of a split, in the order in which training subsets are taken."""
        sides = self.vectors.splits if split == "concepts" else self._categories_apart
        return [row for row in self._order if sides[row] == side]

    @cached_property
    def _order(self) -> list[int]:
        return balanced_order(self.vectors.concepts, self.vectors.categories)

    @cached_property
    def _categories_apart(self) -> list[str]:
        return by_categories(self.vectors.concepts, self.vectors.categories)

    def subset(self, cell: Cell) -> Subset:
        """The cell's training concepts, the first so many, and the held-out ones, with its block as target.

        Raises:
            InputError: what `check` raises.
        """
        cell_key = (cell.concepts, cell.layer, reading_of(cell), cell.targets, cell.split, cell.token_dropout)
        if cell_key not in self._subsets:
            self._subsets[cell_key] = self._cut(cell)
        return self._subsets[cell_key]

    def features(self, cell: Cell) -> int:
        """How many features the cell's student reads."""
        return sum(self._width(name) for name in reading_of(cell).split("+"))

    @property
    def longest(self) -> int:
        """Tokens of the longest concept."""
        return int(np.diff(self.vectors.token_offsets).max())

    def check(self, cell: Cell) -> None:
        """Raise what `subset` would raise, without its work.

        Raises:
            InputError: more concepts than there are for training, a block that the file lacks, or unknown inputs,
                targets or split.
        """
        vectors = self.vectors
        vectors.layer_index(cell.layer)
        if cell.split not in SPLITS:
            raise choices("split", cell.split, SPLITS)
        if cell.targets not in TARGETS:
            raise choices("targets", cell.targets, TARGETS)
        if cell.targets != "first" and len(vectors.templates) < 2:
            raise InputError(f"--targets {cell.targets}: the vectors file has one template; extract several")
        for name in reading_of(cell).split("+"):
            if name.startswith(BLOCK):
                early = [str(layer) for layer in vectors.layers if layer < (cell.layer or 0)]
                if name.removeprefix(BLOCK) not in early:
                    raise choices("early block", name.removeprefix(BLOCK), early)
            elif name not in (*INPUTS, "sequence"):
                raise choices("inputs", name, [*INPUTS, "several joined by +"])
            if name == "activations" and vectors.token_block is None:
                raise InputError(
                    "--inputs activations: the vectors file has none; extract it again with --token-block 1, or read "
                    "--inputs embeddings"
                )
        if cell.concepts > (available := len(self.rows("train", cell.split))):
            raise InputError(
                f"--concepts {cell.concepts}: the vectors file has {available} training concepts; ask for no more"
            )

    def _cut(self, cell: Cell) -> Subset:
        self.check(cell)
        chosen = {side: self.rows(side, cell.split) for side in ("train", "val", "test")}
        rows = chosen["train"] = chosen["train"][: cell.concepts]
        place = self.vectors.layer_index(cell.layer)
        templates = self.vectors.vectors[:, : 1 if cell.targets == "first" else None, place]
        residual = torch.from_numpy(templates.astype(np.float32))  # [concepts, templates, d_model]
        residual -= residual[rows].mean(0) - residual[rows, 0].mean(0)  # every template around the first one's mean
        mean = residual[rows, 0].mean(0)
        scale = (residual[rows, 0] - mean).square().mean().sqrt().clamp(min=1e-12).item()
        reading, everything = self._read(cell, rows)
        sides = {side: Side(own, everything[own], residual[own, 0] - mean) for side, own in chosen.items()}
        if cell.targets == "mean":
            sides["train"] = Side(rows, sides["train"].inputs, residual[rows].mean(1) - mean)
        variants, augmented = self._augment(cell, reading, sides["train"], residual[rows] - mean)
        return Subset(
            **sides,
            mean=mean,
            scale=scale,
            reading=reading,
            concepts=self.vectors.concepts,
            variants=variants,
            augmented=augmented,
        )

    def _read(self, cell: Cell, rows: list[int]) -> tuple[Reading, Tensor]:
        """The cell's reading, fitted on training rows, and the features of all concepts."""
        inputs, places = reading_of(cell), range(len(self.types))
        tables = self._tables(inputs, rows)
        raw = raw_features(inputs, tables, self.vectors.concepts, self.types, places)
        if inputs == "sequence":  # the table itself is standardised, and zeros stand where no token is
            return Reading(inputs, tables, torch.zeros(1), torch.ones(1)), raw
        offset, spread = raw[rows].mean(0), torch.empty(raw.shape[1])
        start = 0
        for name in inputs.split("+"):  # one scale for all columns of a part: which vary more than others tells much
            part = slice(start, start := start + self._width(name))
            spread[part] = (raw[rows][:, part] - offset[part]).square().mean().sqrt().clamp(min=1e-12)
        reading = Reading(inputs, tables, offset, spread)
        return reading, (raw - offset) / spread

    def _width(self, name: str) -> int:
        return width_of(name, self.vectors.d_model, len(self.vectors.token_vocab), self.longest)

    def _tables(self, inputs: str, rows: list[int]) -> dict[str, Tensor]:
        vectors = self.vectors
        sizes = {"types": torch.tensor(len(vectors.token_vocab)), "longest": torch.tensor(self.longest)}
        own = torch.from_numpy(np.unique(np.concatenate([self.types[row] for row in rows])))  # of the training concepts
        if inputs == "sequence":
            name = "token_embeddings" if vectors.token_block is None else "token_activations"
            table = torch.from_numpy(getattr(vectors, name).astype(np.float32))
            centred = table - table[own].mean(0)
            return sizes | {inputs: centred / centred[own].square().mean().sqrt()}
        tables = sizes
        for name in inputs.split("+"):
            if name.startswith(BLOCK):
                place = vectors.layer_index(int(name.removeprefix(BLOCK)))
                tables[name] = torch.from_numpy(vectors.vectors[:, 0, place].copy())
            if name in POOLED:
                tables[name] = torch.from_numpy(getattr(vectors, POOLED[name][0]).copy())
            if name == "embeddings-whitened":
                tables[name] = _whitened(tables[name].float(), own)
        return tables

    def _augment(self, cell: Cell, reading: Reading, train: Side, targets: Tensor) -> tuple[int, Side]:
        """The training side as descent sees it.

        Args:
            cell: names the targets and the share of tokens to drop.
            reading: the cell's.
            train: the plain side.
            targets: centred, ``[N, templates, d_model]``.
        """
        templates = targets.shape[1] if cell.targets == "all" else 1
        variants = VARIANTS if cell.token_dropout else templates
        if variants == 1:
            return 1, train
        draw = np.random.default_rng(0)
        inputs = [train.inputs]
        for _ in range(1, variants):
            types = [_drop(self.types[row], cell.token_dropout, draw) for row in train.rows]
            texts = [self.vectors.concepts[row] for row in train.rows]
            inputs.append(reading(texts, types, train.rows) if cell.token_dropout else train.inputs)
        if templates > 1:
            answers = [targets[:, number % templates] for number in range(variants)]
        else:
            answers = [train.targets] * variants
        # A concept's variants stand next to each other.
        flat = [torch.stack(parts, 1).flatten(0, 1) for parts in (inputs, answers)]
        return variants, Side(train.rows, *flat)


def _drop(types: Tensor, share: float, draw: np.random.Generator) -> Tensor:
    """A concept's tokens without some of them; one stays at the least."""
    kept = np.flatnonzero(draw.random(len(types)) >= share)
    return types[kept if len(kept) else [int(draw.integers(len(types)))]]


def _whitened(table: Tensor, own: Tensor) -> Tensor:
    """Token embeddings without the correlations that those of the training concepts have, shrunk."""
    centred = table.double() - table[own].double().mean(0)
    values, vectors = torch.linalg.eigh(centred[own].mT @ centred[own] / len(own))
    whitened: Tensor = centred @ vectors / (values.clamp(min=0) + WHITENING * values.mean()).sqrt()
    return whitened.float()
