"""What a student reads and what it must answer: concepts as numbers, for one training subset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.concepts import balanced_order, split_by_category, stem_groups
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
VARIANTS = 8  # of each training concept, where augmentation changes what is read
ONE_HOT_INPUTS = ("ngrams", "bag")
INPUTS = (*POOLED_INPUTS, *ONE_HOT_INPUTS)
TARGETS = ("first", "mean", "all")
SPLITS = ("concepts", "categories")


def width_of(name: str, d_model: int, token_rows: int, max_tokens: int) -> int:
    """Features of one part of what is read, of so many token types and at most so many tokens a concept."""
    widths = {"ngrams": NGRAM_BUCKETS, "bag": token_rows, "sequence": d_model * max_tokens}
    return d_model * len(POOLED_INPUTS[name][1]) if name in POOLED_INPUTS else widths.get(name, d_model)


@dataclass(frozen=True)
class Examples:
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
    centred targets (``scale``), and the features' standardisation (``features``).

    Attributes:
        train, val, test: the sides.
        mean, scale, reading: see above.
        concepts: all of the vectors file, by row.
        language: of the concepts.
        variants: how often each training concept stands in ``augmented``, one after another.
        augmented: the training side as descent sees it: other targets, dropped tokens; ``train`` where there is none.
    """

    train: Examples
    val: Examples
    test: Examples
    mean: Tensor
    scale: float
    features: TokenFeatures
    concepts: tuple[str, ...]
    language: str
    variants: int
    augmented: Examples

    @cached_property
    def gram(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues ``[N]`` and eigenvectors ``[N, N]`` of the inputs' Gram matrix, float64.

        One factorisation serves every regularised linear map on this subset.
        """
        inputs = self.train.inputs.double()
        values, vectors = torch.linalg.eigh(inputs @ inputs.mT)
        return values.clamp(min=0), vectors


def student_inputs(cell: Cell) -> str:
    """What the cell's student reads."""
    if cell.student == "transformer":
        return "sequence"
    return f"{BLOCK}{cell.blocks}+{cell.inputs}" if cell.student == "truncated" else cell.inputs


@dataclass
class Dataset:
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
                raise InputError(f"the vectors file has no {side} concepts: {self._why_none()}")

    def _why_none(self) -> str:
        number, language = len(self.vectors.concepts), self.vectors.language
        if number < 10:
            return f"of {number} none is held out; extract more (10 at the least)"
        largest = max(map(len, stem_groups(self.vectors.concepts, language)))
        return f"concepts that share words stay together, and {largest:,} of {number:,} do; extract others besides"

    @cached_property
    def token_rows(self) -> RaggedArray:
        """Of each concept the rows of its tokens in the token tables."""
        rows = np.searchsorted(self.vectors.token_vocab, self.vectors.token_ids)
        return RaggedArray(rows.astype(np.int64), self.vectors.token_offsets)

    def rows(self, side: str, split: str = "concepts") -> list[int]:
        """Rows of one side of a split, in the order in which training subsets are taken."""
        sides = self.vectors.splits if split == "concepts" else self._categories_apart
        return [row for row in self._order if sides[row] == side]

    @cached_property
    def _order(self) -> list[int]:
        return balanced_order(self.vectors.concepts, self.vectors.categories)

    @cached_property
    def _categories_apart(self) -> list[str]:
        return split_by_category(self.vectors.concepts, self.vectors.categories, self.vectors.language)

    def subset(self, cell: Cell) -> Subset:
        """The cell's training concepts, the first so many, and the held-out ones, with its block as target.

        Raises:
            InputError: what `check` raises.
        """
        cell_key = (cell.concepts, cell.layer, student_inputs(cell), cell.targets, cell.split, cell.token_dropout)
        if cell_key not in self._subsets:
            self._subsets[cell_key] = self._cut(cell)
        return self._subsets[cell_key]

    def omit_default(self, cell: Cell) -> Cell:
        """The cell as its name is told: the file's middle block is the default, which names leave out."""
        return replace(cell, layer=None) if cell.layer == self.vectors.middle_layer else cell

    def feature_count(self, cell: Cell) -> int:
        """How many features the cell's student reads."""
        return sum(self._width(name) for name in student_inputs(cell).split("+"))

    @property
    def max_tokens(self) -> int:
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
        for name in student_inputs(cell).split("+"):
            if name.startswith(BLOCK):
                early = [str(layer) for layer in vectors.layers if layer < (cell.layer or 0)]
                if name.removeprefix(BLOCK) not in early:
                    wrong = f"--inputs {cell.inputs}" if name in cell.inputs.split("+") else f"--blocks {cell.blocks}"
                    raise InputError(f"{wrong}: the vectors file has of the early blocks {', '.join(early) or 'none'}")
            elif name not in (*INPUTS, "sequence"):
                raise choices("inputs", name, [*INPUTS, "several joined by +"])
            if name == "activations" and vectors.token_block is None:
                raise InputError(
                    "--inputs activations: the vectors file has none; extract it again with --token-block 1, or read "
                    "--inputs embeddings"
                )
        if cell.concepts > (available := len(self.rows("train", cell.split))):
            left = self._categories_apart.count("none") if cell.split == "categories" else 0
            why = f" ({left:,} share a word with those held out)" if left else ""
            raise InputError(
                f"--concepts {cell.concepts}: the vectors file has {available} training concepts{why}; ask for no more"
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
        features, everything = self._read(cell, rows)
        sides = {side: Examples(own, everything[own], residual[own, 0] - mean) for side, own in chosen.items()}
        if cell.targets == "mean":
            sides["train"] = Examples(rows, sides["train"].inputs, residual[rows].mean(1) - mean)
        variants, augmented = self._augment(cell, features, sides["train"], residual[rows] - mean)
        return Subset(
            **sides,
            mean=mean,
            scale=scale,
            features=features,
            concepts=self.vectors.concepts,
            language=self.vectors.language,
            variants=variants,
            augmented=augmented,
        )

    def _read(self, cell: Cell, rows: list[int]) -> tuple[TokenFeatures, Tensor]:
        """The cell's reading, fitted on training rows, and the features of all concepts."""
        inputs, zero, one = student_inputs(cell), np.zeros(1, np.float32), np.ones(1, np.float32)
        features = TokenFeatures(parse_inputs(inputs), self._tables(inputs, rows), zero, one, self.max_tokens)
        raw = features.pooled(TokenizedTexts(self.vectors.concepts, self.token_rows, np.arange(len(self.token_rows))))
        if inputs == "sequence":  # the table itself is standardised, and zeros stand where no token is
            return features, torch.from_numpy(raw[0])
        offset = np.concatenate([values[rows].mean(0) for values in raw])
        scale, everything = np.empty_like(offset), np.concatenate(raw, 1)
        start = 0
        for name in inputs.split("+"):  # one scale for all columns of an input: which vary more than others tells much
            here = slice(start, start := start + self._width(name))
            spread = np.square(everything[rows, here] - offset[here]).mean()
            scale[here] = max(float(np.sqrt(spread)), 1e-12)
        return replace(features, offset=offset, scale=scale), torch.from_numpy((everything - offset) / scale)

    def _width(self, name: str) -> int:
        return width_of(name, self.vectors.d_model, len(self.vectors.token_vocab), self.max_tokens)

    def _tables(
        self, inputs: str, rows: list[int], vocabulary: Mapping[str, NDArray[Any]] | None = None
    ) -> dict[str, Table]:
        """The tables that inputs look up, for the tokens of the concepts or of a whole vocabulary.

        Args:
            inputs: parts joined by ``+``.
            rows: the training concepts, on whose tokens tables are fitted.
            vocabulary: tables of all tokens, by name; those of the vectors file by default.
        """
        vectors = self.vectors
        own = np.unique(self.token_rows.take(np.array(rows)).values)  # of the training concepts
        tables = {}
        for name in inputs.split("+"):
            if name.startswith(BLOCK):
                tables[name] = Table(vectors.vectors[:, 0, vectors.layer_index(int(name.removeprefix(BLOCK)))])
            elif name in ONE_HOT_INPUTS:  # each n-gram and each token type is a column of its own
                tables[name] = Table(np.eye(self._width(name), dtype=np.int8))
            else:
                source = self.table_of(name)
                known = getattr(vectors, source)
                table = known if vocabulary is None else vocabulary[source]
                if name in PREPARED:
                    tables[name] = Table(PREPARED[name](table, known[own]))
                else:
                    tables[source] = Table(table)
        return tables

    def table_of(self, name: str) -> str:
        """The token table that an input reads."""
        if name == "sequence":
            return "token_embeddings" if self.vectors.token_block is None else "token_activations"
        return POOLED_INPUTS[name][0]

    def vocabulary_features(self, cell: Cell, vocabulary: Mapping[str, NDArray[Any]]) -> TokenFeatures:
        """The cell's reading with tables of a whole vocabulary, each row a token id."""
        subset = self.subset(cell)
        return replace(subset.features, tables=self._tables(student_inputs(cell), subset.train.rows, vocabulary))

    def _augment(self, cell: Cell, features: TokenFeatures, train: Examples, targets: Tensor) -> tuple[int, Examples]:
        """The training side as descent sees it.

        Args:
            cell: names the targets and the share of tokens to drop.
            features: the cell's.
            train: the plain side.
            targets: centred, ``[N, templates, d_model]``.
        """
        templates = targets.shape[1] if cell.targets == "all" else 1
        variants = VARIANTS if cell.token_dropout else templates
        if variants == 1:
            return 1, train
        draw = np.random.default_rng(0)
        inputs = [train.inputs]
        texts = [self.vectors.concepts[row] for row in train.rows]
        for _ in range(1, variants):
            token_rows = [_drop(self.token_rows[row], cell.token_dropout, draw) for row in train.rows]
            asked = TokenizedTexts(texts, RaggedArray.from_lists(token_rows), np.array(train.rows))
            inputs.append(torch.from_numpy(features(asked)) if cell.token_dropout else train.inputs)
        if templates > 1:
            answers = [targets[:, number % templates] for number in range(variants)]
        else:
            answers = [train.targets] * variants
        # A concept's variants stand next to each other.
        flat = [torch.stack(parts, 1).flatten(0, 1) for parts in (inputs, answers)]
        return variants, Examples(train.rows, *flat)


def _drop(token_rows: NDArray[np.int64], share: float, draw: np.random.Generator) -> NDArray[np.int64]:
    """A concept's tokens without some of them; one stays at the least."""
    kept = np.flatnonzero(draw.random(len(token_rows)) >= share)
    return token_rows[kept if len(kept) else [int(draw.integers(len(token_rows)))]]


def _whitened(table: NDArray[Any], fitted: NDArray[Any]) -> FloatArray:
    """Token embeddings without the correlations that those of the training concepts have, shrunk.

    Turned back into the embeddings' own axes: eigenvectors, of which those of equal values may be any, differ from
    processor to processor.
    """
    own = fitted.astype(np.float64)
    offset = own.mean(0)
    values, vectors = np.linalg.eigh((own - offset).T @ (own - offset) / len(own))
    scale = np.sqrt(values.clip(min=0) + WHITENING * values.mean())
    whitened: FloatArray = ((table.astype(np.float64) - offset) @ (vectors / scale @ vectors.T)).astype(np.float32)
    return whitened


def _standardised(table: NDArray[Any], fitted: NDArray[Any]) -> FloatArray:
    """Rows as a transformer reads them: centred, and of one scale."""
    own = fitted.astype(np.float32)
    offset = own.mean(0)
    standardised: FloatArray = (table.astype(np.float32) - offset) / np.sqrt(np.square(own - offset).mean())
    return standardised


# Tables that are made from the teacher's, given the rows of the training concepts' tokens.
PREPARED = {"embeddings-whitened": _whitened, "sequence": _standardised}
