"""What a student reads and what it must answer: concepts as numbers, for one training subset."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pipeline.concepts import balanced_order
from pipeline.errors import InputError
from pipeline.vectors import Vectors


def token_features(token_embeddings: Tensor, types: list[Tensor]) -> Tensor:
    """The mean and the last of each concept's token embeddings, ``[concepts, 2 * d_model]``.

    Args:
        token_embeddings: ``[types, d_model]``.
        types: for each concept the rows of its tokens, in order.
    """
    pairs = [(token_embeddings[rows].mean(0), token_embeddings[rows[-1]]) for rows in types]
    return torch.stack([torch.cat(pair) for pair in pairs])


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
    centred targets (``scale``), and the features' mean and standard deviation (``[features]``).
    """

    train: Side
    val: Side
    test: Side
    mean: Tensor
    scale: float
    feature_mean: Tensor
    feature_std: Tensor

    @cached_property
    def gram(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues ``[N]`` and eigenvectors ``[N, N]`` of the inputs' Gram matrix, float64.

        One factorisation serves every regularised linear map on this subset.
        """
        inputs = self.train.inputs.double()
        values, vectors = torch.linalg.eigh(inputs @ inputs.mT)
        return values.clamp(min=0), vectors


@dataclass
class Catalogued:
    """A vectors file as features, from which training subsets are cut.

    Args:
        vectors: the file.

    Raises:
        InputError: the file carries no tokens (an older ``.pt``), or nothing is held out.
    """

    vectors: Vectors
    _subsets: dict[tuple[int, int], Subset] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self.vectors.token_ids):
            raise InputError("the vectors file carries no token embeddings, which students read; extract it again")
        for side in ("val", "test"):
            if not self.rows(side):
                raise InputError(f"the vectors file has no {side} concepts; extract more (10 at the least)")

    @cached_property
    def features(self) -> Tensor:
        """``[concepts, 2 * d_model]``, not standardised."""
        table = torch.from_numpy(self.vectors.token_embeddings.astype(np.float32))
        return token_features(table, [torch.from_numpy(rows) for rows in self.vectors.token_rows])

    def rows(self, side: str) -> list[int]:
        """Rows of one side of the split, in the order in which training subsets are taken."""
        return [row for row in self._order if self.vectors.splits[row] == side]

    @cached_property
    def _order(self) -> list[int]:
        return balanced_order(self.vectors.concepts, self.vectors.categories)

    def subset(self, concepts: int, layer: int) -> Subset:
        """The first ``concepts`` training concepts with block ``layer`` as target (first template).

        Raises:
            InputError: more concepts than there are for training, or a block that the file lacks.
        """
        key = (concepts, layer)
        if key not in self._subsets:
            self._subsets[key] = self._cut(concepts, layer)
        return self._subsets[key]

    def check(self, concepts: int, layer: int) -> None:
        """Raise what `subset` would raise, without its work."""
        self.vectors.layer_index(layer)
        if concepts > (available := len(self.rows("train"))):
            raise InputError(
                f"--concepts {concepts}: the vectors file has {available} training concepts; ask for no more"
            )

    def _cut(self, concepts: int, layer: int) -> Subset:
        self.check(concepts, layer)
        chosen = {side: self.rows(side) for side in ("train", "val", "test")}
        chosen["train"] = chosen["train"][:concepts]
        residual = torch.from_numpy(
            self.vectors.vectors[:, 0, self.vectors.layer_index(layer)].astype(np.float32)
        )  # [concepts, d_model]
        mean = residual[chosen["train"]].mean(0)
        scale = (residual[chosen["train"]] - mean).square().mean().sqrt().clamp(min=1e-12).item()
        feature_mean = self.features[chosen["train"]].mean(0)
        spread = self.features[chosen["train"]].std(0)
        # A feature that hardly varies among few training concepts must not explode on the held-out ones.
        feature_std = spread.clamp(min=max(0.01 * spread.median().item(), 1e-12))
        sides = {
            side: Side(rows, (self.features[rows] - feature_mean) / feature_std, residual[rows] - mean)
            for side, rows in chosen.items()
        }
        return Subset(**sides, mean=mean, scale=scale, feature_mean=feature_mean, feature_std=feature_std)
