"""A student's inputs and targets: the concepts of a vectors file as numbers, for one training subset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.concepts import balanced_order, split_by_category
from pipeline.data.stems import stem_groups
from pipeline.data.vectors import Vectors
from pipeline.errors import InputError, choices
from pipeline.settings import Cell
from pipeline.student.lookup import (
    BLOCK,
    NGRAM_BUCKETS,
    POOLED_INPUTS,
    FloatArray,
    Table,
    TokenFeatures,
    TokenizedTexts,
    parse_inputs,
)
from pipeline.student.tokenizer import RaggedArray

WHITENING = 1.0  # shrinkage, in mean eigenvalues of the embeddings' covariance
VARIANTS = 8  # of each training concept, with token dropout
ONE_HOT_INPUTS = ("ngrams", "bag")
INPUTS = (*POOLED_INPUTS, *ONE_HOT_INPUTS)
TARGETS = ("first", "mean", "all")
SPLITS = ("concepts", "categories")
MIN_SCALE = 1e-12  # of what does not vary

TokenTables = Mapping[str, NDArray[Any]]  # by name, [vocabulary, d_model]


@dataclass(frozen=True)
class Examples:
    """One side of a split, ready for a student."""

    rows: list[int]  # N concepts' rows in the vectors file
    inputs: Tensor  # [N, features], standardised
    targets: Tensor  # [N, d_model], activation vectors minus mu


@dataclass(frozen=True, eq=False)
class Subset:
    """A training subset with the held-out concepts; all statistics are those of the training concepts."""

    train: Examples
    val: Examples
    test: Examples
    mean: Tensor  # [d_model], mu of the training vectors
    scale: float  # root mean square of the centred training targets
    features: TokenFeatures
    concepts: tuple[str, ...]  # all of the vectors file, by row
    language: str
    variants: int  # of each training concept in `augmented`, one after another
    augmented: Examples  # for gradient descent, with other targets or dropped tokens; else `train`

    @cached_property
    def gram(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues ``[N]`` and eigenvectors ``[N, N]`` of the inputs' Gram matrix, float64, for all linear maps."""
        inputs = self.train.inputs.double()
        values, vectors = torch.linalg.eigh(inputs @ inputs.mT)
        return values.clamp(min=0), vectors


def student_inputs(cell: Cell) -> str:
    """The inputs of the cell's student, joined by ``+``."""
    if cell.student == "transformer":
        return "sequence"
    return f"{BLOCK}{cell.blocks}+{cell.inputs}" if cell.student == "truncated" else cell.inputs


@dataclass
class Dataset:
    """The training subsets of a vectors file, which must have tokens (an older ``.pt`` has none) and every side."""

    vectors: Vectors
    _subsets: dict[tuple[object, ...], Subset] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self.vectors.token_ids):
            raise InputError("the vectors file carries no token embeddings, which students read; extract it again")
        for side in ("val", "test"):
            if not self.rows(side):
                raise InputError(f"the vectors file has no {side} concepts: {self._why_none()}")

    def _why_none(self) -> str:
        number, language = len(self.vectors.concepts), self.vectors.language
        if number < 10:
            return f"of {number} none is held out; extract more (10 at the least)"
        largest = max(map(len, stem_groups(self.vectors.concepts, language)))
        return f"concepts that share words stay together, and {largest:,} of {number:,} do; extract others besides"

    def rows(self, side: str, split: str = "concepts") -> list[int]:
        """Select the rows of one side of a split, in the order in which training subsets are taken."""
        sides = self.vectors.splits if split == "concepts" else self._categories_apart
        return [row for row in self._order if sides[row] == side]

    @cached_property
    def _order(self) -> list[int]:
        return balanced_order(self.vectors.concepts, self.vectors.categories)

    @cached_property
    def _categories_apart(self) -> list[str]:
        return split_by_category(self.vectors.concepts, self.vectors.categories, self.vectors.language)

    def subset(self, cell: Cell) -> Subset:
        """The cell's first training concepts and all held-out ones, cached; raises what `check` raises."""
        key = (cell.concepts, cell.layer, student_inputs(cell), cell.targets, cell.split, cell.token_dropout)
        if key not in self._subsets:
            self.check(cell)
            self._subsets[key] = self._make_subset(cell)
        return self._subsets[key]

    def omit_default(self, cell: Cell) -> Cell:
        """Replace the cell's layer by None where it is the file's middle block, which names of cells leave out."""
        return replace(cell, layer=None) if cell.layer == self.vectors.middle_layer else cell

    def feature_count(self, cell: Cell) -> int:
        """Number of features of the cell's student."""
        return sum(self._width(name) for name in student_inputs(cell).split("+"))

    def _width(self, name: str) -> int:
        """Features of one input."""
        one_hot = {"ngrams": NGRAM_BUCKETS, "bag": len(self.vectors.token_vocab)}
        rows = {"sequence": self.max_tokens} | {one: len(pools) for one, (_, pools) in POOLED_INPUTS.items()}
        return one_hot.get(name, rows.get(name, 1) * self.vectors.d_model)

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest concept."""
        return int(self.vectors.token_rows.lengths.max())

    def check(self, cell: Cell) -> None:
        """Check that the cell's subset can be made, without its work.

        Raises:
            InputError: more concepts than there are for training, a block that the file lacks, or unknown inputs,
                targets or split.
        """
        vectors = self.vectors
        vectors.layer_index(cell.layer)
        for kind, asked, known in (("split", cell.split, SPLITS), ("targets", cell.targets, TARGETS)):
            if asked not in known:
                raise choices(kind, asked, known)
        if cell.targets != "first" and len(vectors.templates) < 2:
            raise InputError(f"--targets {cell.targets}: the vectors file has one template; extract several")
        for name in student_inputs(cell).split("+"):
            if name.startswith(BLOCK):
                early = [str(layer) for layer in vectors.layers if layer < (cell.layer or 0)]
                if name.removeprefix(BLOCK) not in early:
                    wrong = f"--inputs {cell.inputs}" if name in cell.inputs.split("+") else f"--blocks {cell.blocks}"
                    raise InputError(f"{wrong}: the vectors file has of the early blocks {', '.join(early) or 'none'}")
            elif name not in (*INPUTS, "sequence"):
                raise choices("inputs", name, [*INPUTS, "several joined by +"])
            if name == "activations" and vectors.token_block is None:
                how = "extract it again with --token-block 1, or read --inputs embeddings"
                raise InputError(f"--inputs activations: the vectors file has none; {how}")
        if cell.concepts > (available := len(self.rows("train", cell.split))):
            left_out = self._categories_apart.count("none") if cell.split == "categories" else 0
            why = f" ({left_out:,} share a word with those held out)" if left_out else ""
            found = f"the vectors file has {available} training concepts{why}"
            raise InputError(f"--concepts {cell.concepts}: {found}; ask for no more")

    def _make_subset(self, cell: Cell) -> Subset:
        rows_of = {side: self.rows(side, cell.split) for side in ("train", "val", "test")}
        train = rows_of["train"] = rows_of["train"][: cell.concepts]
        layer = self.vectors.layer_index(cell.layer)
        templates = self.vectors.vectors[:, : 1 if cell.targets == "first" else None, layer]
        residual = torch.from_numpy(templates.astype(np.float32))  # [concepts, templates, d_model]
        residual -= residual[train].mean(0) - residual[train, 0].mean(0)  # every template around the first one's mean
        mean = residual[train, 0].mean(0)
        scale = (residual[train, 0] - mean).square().mean().sqrt().clamp(min=MIN_SCALE).item()
        features, inputs = self._fit_features(cell, train)
        sides = {side: Examples(rows, inputs[rows], residual[rows, 0] - mean) for side, rows in rows_of.items()}
        if cell.targets == "mean":
            sides["train"] = replace(sides["train"], targets=residual[train].mean(1) - mean)
        variants, augmented = self._augment(cell, features, sides["train"], residual[train] - mean)
        about = (features, self.vectors.concepts, self.vectors.language)
        return Subset(sides["train"], sides["val"], sides["test"], mean, scale, *about, variants, augmented)

    def _fit_features(self, cell: Cell, rows: list[int]) -> tuple[TokenFeatures, Tensor]:
        """Fit the cell's features on training rows; with the inputs of all concepts, ``[concepts, features]``."""
        inputs, zero, one = student_inputs(cell), np.zeros(1, np.float32), np.ones(1, np.float32)
        features = TokenFeatures(parse_inputs(inputs), self._tables(inputs, rows), zero, one, self.max_tokens)
        concepts = self.vectors.concepts
        pooled = features.pooled(TokenizedTexts(concepts, self.vectors.token_rows, np.arange(len(concepts))))
        if inputs == "sequence":  # the table itself is standardised, and zeros stand where no token is
            return features, torch.from_numpy(pooled[0])
        offset = np.concatenate([values[rows].mean(0) for values in pooled])
        scale, joined = np.empty_like(offset), np.concatenate(pooled, 1)
        start = 0
        for name in inputs.split("+"):  # one scale for all columns of an input: how they differ in spread matters
            columns = slice(start, start := start + self._width(name))
            spread = np.square(joined[rows, columns] - offset[columns]).mean()
            scale[columns] = max(float(np.sqrt(spread)), MIN_SCALE)
        return replace(features, offset=offset, scale=scale), torch.from_numpy((joined - offset) / scale)

    def _tables(self, inputs: str, rows: list[int], vocabulary: TokenTables | None = None) -> dict[str, Table]:
        """Make the tables of inputs, fitted on training rows; for the tokens of the vectors file or of a vocabulary."""
        vectors = self.vectors
        train_types = np.unique(vectors.token_rows.take(np.array(rows)).values)
        tables = {}
        for name in inputs.split("+"):
            if name.startswith(BLOCK):
                tables[name] = Table(vectors.vectors[:, 0, vectors.layer_index(int(name.removeprefix(BLOCK)))])
            elif name in ONE_HOT_INPUTS:  # each n-gram and each token type is a column of its own
                tables[name] = Table(np.eye(self._width(name), dtype=np.int8))
            else:
                sequence = "token_embeddings" if vectors.token_block is None else "token_activations"
                source = sequence if name == "sequence" else POOLED_INPUTS[name][0]
                known = getattr(vectors, source)
                table = known if vocabulary is None else vocabulary[source]
                fit = FITTED_TABLES.get(name)
                tables[name if fit else source] = Table(fit(table, known[train_types]) if fit else table)
        return tables

    def vocabulary_features(self, cell: Cell, vocabulary: TokenTables) -> TokenFeatures:
        """Extend the cell's features to all token ids of a vocabulary."""
        subset = self.subset(cell)
        return replace(subset.features, tables=self._tables(student_inputs(cell), subset.train.rows, vocabulary))

    def _augment(self, cell: Cell, features: TokenFeatures, train: Examples, targets: Tensor) -> tuple[int, Examples]:
        """Make variants of the training side from centred targets ``[N, templates, d_model]``; their number first."""
        templates = targets.unbind(1) if cell.targets == "all" else (train.targets,)
        variants = VARIANTS if cell.token_dropout else len(templates)
        if variants == 1:
            return 1, train
        outputs = [templates[number % len(templates)] for number in range(variants)]
        inputs = [train.inputs] * variants
        if cell.token_dropout:
            draw, texts = np.random.default_rng(0), [self.vectors.concepts[row] for row in train.rows]
            for number in range(1, variants):
                kept = [_drop_tokens(self.vectors.token_rows[row], cell.token_dropout, draw) for row in train.rows]
                tokenized = TokenizedTexts(texts, RaggedArray.from_lists(kept), np.array(train.rows))
                inputs[number] = torch.from_numpy(features(tokenized))
        # A concept's variants stand next to each other.
        flat = [torch.stack(parts, 1).flatten(0, 1) for parts in (inputs, outputs)]
        return variants, Examples(train.rows, *flat)


def _drop_tokens(rows: NDArray[np.int64], share: float, draw: np.random.Generator) -> NDArray[np.int64]:
    """Remove a share of a concept's tokens, but not all."""
    kept = np.flatnonzero(draw.random(len(rows)) >= share)
    return rows[kept if len(kept) else [int(draw.integers(len(rows)))]]


def _whitened(table: NDArray[Any], fitted: NDArray[Any]) -> FloatArray:
    """Remove the correlations that the training tokens' embeddings have, with shrinkage."""
    own = fitted.astype(np.float64)
    offset = own.mean(0)
    values, vectors = np.linalg.eigh((own - offset).T @ (own - offset) / len(own))
    scale = np.sqrt(values.clip(min=0) + WHITENING * values.mean())
    # Rotated back into the embeddings' own axes: eigenvectors of equal values differ from processor to processor.
    return np.asarray((table.astype(np.float64) - offset) @ (vectors / scale @ vectors.T), np.float32)


def _standardised(table: NDArray[Any], fitted: NDArray[Any]) -> FloatArray:
    """Centre rows and give them one scale, as a transformer needs them."""
    own = fitted.astype(np.float32)
    offset = own.mean(0)
    return np.asarray((table.astype(np.float32) - offset) / np.sqrt(np.square(own - offset).mean()), np.float32)


# Tables that are fitted on the rows of the training concepts' tokens.
FITTED_TABLES = {"embeddings-whitened": _whitened, "sequence": _standardised}
