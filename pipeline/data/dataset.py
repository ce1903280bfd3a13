"""A student's inputs and targets: the concepts of a vectors file as numbers, for one training subset."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.concepts import split_by_category
from pipeline.data.examples import Examples, LazyExamples, LazyMatrix, moments
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
from pipeline.student.tokenizer import IntArray, RaggedArray

WHITENING = 1.0  # shrinkage, in mean eigenvalues of the embeddings' covariance
VARIANTS = 8  # of each training concept, with token dropout
ONE_HOT_INPUTS = ("ngrams", "bag")
INPUTS = (*POOLED_INPUTS, *ONE_HOT_INPUTS)
TARGETS = ("first", "mean", "all")
SPLITS = ("concepts", "categories")
MIN_SCALE = 1e-12  # of what does not vary

TokenTables = Mapping[str, NDArray[Any]]  # by name, [vocabulary, d_model]


@dataclass(frozen=True, eq=False)
class Subset:
    """A training subset with the held-out concepts; all statistics are those of the training concepts."""

    train: LazyExamples
    val: Examples
    test: Examples
    mean: Tensor  # [d_model], mu of the training vectors
    scale: float  # root mean square of the centred training targets
    features: TokenFeatures
    concepts: tuple[str, ...]  # all of the vectors file, by row
    language: str
    variants: int  # of each training concept in `augmented`, one after another
    augmented: LazyExamples  # for gradient descent, with other targets or dropped tokens; else `train`


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
    _rows: dict[tuple[str, str], list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self.vectors.token_ids):
            raise InputError("the vectors file carries no token embeddings, which students read; extract it again")
        for side in ("val", "test"):
            if not self.rows(side):
                raise InputError(f"the vectors file has no {side} concepts: {self._why_none()}")

    def _why_none(self) -> str:
        judged = self.vectors.catalogue.judged
        if (number := len(judged)) < 10:
            return f"of {number} none is held out; extract more (10 at the least)"
        largest = max(map(len, stem_groups(judged.concepts, judged.language)))
        return f"concepts that share words stay together, and {largest:,} of {number:,} do; extract others besides"

    def rows(self, side: str, split: str = "concepts") -> list[int]:
        """Select the rows of one side of a split, in the order in which training subsets are taken."""
        if (side, split) not in self._rows:
            sides = self.vectors.splits if split == "concepts" else self._categories_apart
            self._rows[side, split] = [row for row in self._order if sides[row] == side]
        return self._rows[side, split]

    @cached_property
    def _order(self) -> list[int]:
        return self.vectors.catalogue.order()

    @cached_property
    def _categories_apart(self) -> list[str]:
        return split_by_category(self.vectors.catalogue)

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

    @cached_property
    def max_tokens(self) -> int:
        """Tokens of the longest concept."""
        return int(self.vectors.token_rows.lengths.max())

    def check(self, cell: Cell) -> None:
        """Check that the cell's subset can be made, without its work.

        Raises:
            InputError: more concepts than there are for training, a block that the file lacks, or unknown inputs,
                targets or split.
        """  # noqa: DOC501 (`choices` makes an InputError)
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
            cure = f"ask for no more (a sweep: --max-concepts {available})"
            raise InputError(f"--concepts {cell.concepts}: {found}; {cure}")

    def _make_subset(self, cell: Cell) -> Subset:
        train = np.array(self.rows("train", cell.split)[: cell.concepts])
        block = self.vectors.layer_index(cell.layer)

        def residual(rows: IntArray, template: int) -> FloatArray:
            return np.asarray(self.vectors.vectors[rows, template, block], np.float32)

        templates = 1 if cell.targets == "first" else len(self.vectors.templates)
        statistics = [moments(LazyMatrix.of(train, partial(residual, template=number))) for number in range(templates)]
        offset = np.array([mean for mean, _ in statistics], np.float32)  # [templates, d_model]
        scale = max(float(np.sqrt(statistics[0][1].mean())), MIN_SCALE)

        def centred(rows: IntArray, template: int = 0) -> FloatArray:
            return np.asarray(residual(rows, template) - offset[template])

        def averaged(rows: IntArray) -> FloatArray:
            return np.asarray(np.mean([centred(rows, template) for template in range(templates)], 0))

        features = self._fit_features(cell, train)

        def inputs(rows: IntArray) -> FloatArray:
            return features(self._texts(rows))

        def held_out(side: str) -> Examples:
            rows = self.rows(side, cell.split)
            return Examples(rows, *(torch.from_numpy(read(np.array(rows))) for read in (inputs, centred)))

        target = averaged if cell.targets == "mean" else centred
        examples = LazyExamples(train.tolist(), LazyMatrix.of(train, inputs), LazyMatrix.of(train, target))
        variants = VARIANTS if cell.token_dropout else templates if cell.targets == "all" else 1
        augmented = self._augment(cell, variants, features, train, target) if variants > 1 else examples
        about = (features, self.vectors.concepts, self.vectors.language, variants, augmented)
        return Subset(examples, held_out("val"), held_out("test"), torch.from_numpy(offset[0]), scale, *about)

    def _augment(
        self, cell: Cell, variants: int, features: TokenFeatures, train: IntArray, target: Callable[..., FloatArray]
    ) -> LazyExamples:
        """Make variants of each training concept, next to each other: with dropped tokens, or one template each."""
        rows = np.repeat(train, variants)  # [N variants]
        tokens = self.vectors.token_rows.take(rows)
        if cell.token_dropout:
            draw, whole = np.random.default_rng(0), [self.vectors.token_rows[row] for row in train]
            kept = [[_drop_tokens(row, cell.token_dropout, draw) for row in whole] for _ in range(1, variants)]
            order = np.arange(len(rows)).reshape(variants, -1).T.flatten()  # of the concepts' variants in the lists
            tokens = RaggedArray.from_lists([row for lists in (whole, *kept) for row in lists]).take(order)
        templates = len(self.vectors.templates) if cell.targets == "all" else 1

        def inputs(numbers: IntArray) -> FloatArray:
            return features(replace(self._texts(rows[numbers]), tokens=tokens.take(numbers)))

        def targets(numbers: IntArray) -> FloatArray:
            return target(rows[numbers], numbers % variants % templates) if templates > 1 else target(rows[numbers])

        numbers = np.arange(len(rows))
        return LazyExamples(rows.tolist(), LazyMatrix.of(numbers, inputs), LazyMatrix.of(numbers, targets))

    def _texts(self, rows: IntArray) -> TokenizedTexts:
        """The concepts of some rows, ready to be looked up."""
        concepts = self.vectors.concepts
        return TokenizedTexts([concepts[row] for row in rows], self.vectors.token_rows.take(rows), rows)

    def _fit_features(self, cell: Cell, rows: IntArray) -> TokenFeatures:
        """Fit the cell's features on training rows."""
        inputs, zero, one = student_inputs(cell), np.zeros(1, np.float32), np.ones(1, np.float32)
        features = TokenFeatures(parse_inputs(inputs), self._tables(inputs, rows), zero, one, self.max_tokens)
        if inputs == "sequence":  # the table itself is standardised, and zeros stand where no token is
            return features
        mean, variance = moments(LazyMatrix.of(rows, lambda rows: features(self._texts(rows))))
        scale = np.empty(len(mean), np.float32)
        start = 0
        for name in inputs.split("+"):  # one scale for all columns of an input: how they differ in spread matters
            columns = slice(start, start := start + self._width(name))
            scale[columns] = max(float(np.sqrt(variance[columns].mean())), MIN_SCALE)
        return replace(features, offset=mean.astype(np.float32), scale=scale)

    def _tables(self, inputs: str, rows: IntArray, vocabulary: TokenTables | None = None) -> dict[str, Table]:
        """Make the tables of inputs, fitted on training rows; for the tokens of the vectors file or of a vocabulary."""
        vectors = self.vectors
        train_types = np.unique(vectors.token_rows.take(rows).values)
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
        rows = np.array(subset.train.rows)
        return replace(subset.features, tables=self._tables(student_inputs(cell), rows, vocabulary))


def _drop_tokens(rows: IntArray, share: float, draw: np.random.Generator) -> IntArray:
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
