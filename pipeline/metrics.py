"""Metrics of predicted vectors: pure functions; ``N`` is the number of held-out concepts.

Predictions and truths are *centred*: the mean vector of the training concepts, mu, is subtracted from both. The
residual stream has a large constant part, so without centring a constant prediction scores a cosine near 1.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

GROUPS_AT_ONCE = 256  # groups whose bootstrap samples are held in memory: 4 MB per seed
MIN_LENGTH = 1e-8  # shorter vectors have no direction
NUMBERS = 1 << 24  # held at once, so that memory does not grow with N squared
ROWS = 1 << 13  # concepts in float64 at once
Counts = tuple[NDArray[np.int64], NDArray[np.int64]]
NAMES = ("cosine", "cosine_raw", "r2", "retrieval_at_1", "retrieval_at_5")


def cosines(predicted: Tensor, truth: Tensor) -> Tensor:
    """Cosine of each pair of vectors, ``[..., N, d_model]`` to ``[..., N]``; 0 where either has no length."""
    # It has a gradient with respect to `predicted` only.
    cosine: Tensor = _Cosines.apply(predicted, truth)  # type: ignore[no-untyped-call]
    return cosine


class _Cosines(torch.autograd.Function):
    """Gradient in closed form, (truth / |truth| - cosine predicted / |predicted|) / |predicted|: fewer passes."""

    @staticmethod
    def forward(ctx: Any, predicted: Tensor, truth: Tensor) -> Tensor:
        lengths = [torch.linalg.vector_norm(values, dim=-1).clamp_min(MIN_LENGTH) for values in (predicted, truth)]
        cosine: Tensor = torch.linalg.vecdot(predicted, truth) / (lengths[0] * lengths[1])
        ctx.save_for_backward(predicted, truth, *lengths, cosine)
        return cosine

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        predicted, truth, length, true_length, cosine = ctx.saved_tensors
        scaled = gradients[0] / length  # [..., N]
        along_truth = truth * (scaled / true_length)[..., None]
        return torch.addcmul(along_truth, predicted, (scaled * cosine / length)[..., None], value=-1), None


def r2(predicted: Tensor, truth: Tensor) -> Tensor:
    """Share of the variance around mu that is explained, ``[..., N, d_model]`` to ``[...]``; 1 - FVU."""
    # Predicting mu gives 0. Where the truth does not vary, 1 for a perfect prediction, else 0, as in scikit-learn.
    unexplained = (predicted - truth).square().sum((-1, -2))
    total = truth.square().sum((-1, -2))
    return torch.where(total > 0, 1 - unexplained / total.where(total > 0, 1.0), (unexplained == 0).to(truth.dtype))


def ranks(predicted: Tensor, truth: Tensor, rows: Tensor | None = None) -> Tensor:
    """Rank (from 0) of true vectors among all N by cosine with their predictions.

    Args:
        predicted: ``[N, d_model]``.
        truth: ``[N, d_model]``.
        rows: those that are ranked, ``[n]``; by default all.

    Returns:
        ``[n]``. A tie counts against the student, so a constant prediction retrieves nothing.
    """
    rows = torch.arange(len(predicted)) if rows is None else rows
    directions, found = F.normalize(truth, dim=-1).mT, torch.empty(len(rows), dtype=torch.int64)
    step = max(1, NUMBERS // max(1, len(truth)))
    for start in range(0, len(rows), step):
        own = rows[start : start + step]
        similarity = F.normalize(predicted[own], dim=-1) @ directions  # [step, N]
        found[start : start + step] = (similarity >= similarity.gather(1, own[:, None])).sum(-1) - 1
    return found


def faithfulness(predicted: Tensor, truth: Tensor, mean: Tensor) -> dict[str, float]:
    """All of `NAMES` for one student: centred predictions and truths, ``[N, d_model]``, and their mu, ``[d_model]``."""
    rank = ranks(predicted, truth)
    return {
        "cosine": cosines(predicted, truth).mean().item(),
        "cosine_raw": cosines(predicted + mean, truth + mean).mean().item(),
        "r2": r2(predicted, truth).item(),
        "retrieval_at_1": (rank < 1).float().mean().item(),
        "retrieval_at_5": (rank < 5).float().mean().item(),
    }


def by_category(values: Sequence[float], categories: Sequence[str]) -> dict[str, float]:
    """Mean of each category's values; one value and one category per concept."""
    groups: dict[str, list[float]] = {}
    for category, value in zip(categories, values, strict=True):
        groups.setdefault(category, []).append(value)
    return {category: sum(group) / len(group) for category, group in sorted(groups.items())}


def linear_cka(predicted: Tensor, truth: Tensor) -> float:
    """Linear centred kernel alignment of two sets of vectors, ``[N, d_model]`` each, from 0 to 1."""
    # Kornblith et al. (2019), "Similarity of neural network representations revisited"; 0 where either does not vary.
    means = [values.mean(0, dtype=torch.float64) for values in (predicted, truth)]
    across, own_x, own_y = (predicted.new_zeros((predicted.shape[1],) * 2, dtype=torch.float64) for _ in range(3))
    for start in range(0, len(truth), ROWS):
        parts = (values[start : start + ROWS].double() for values in (predicted, truth))
        x, y = (part - mean for part, mean in zip(parts, means, strict=True))
        across, own_x, own_y = across + x.mT @ y, own_x + x.mT @ x, own_y + y.mT @ y
    size_x, size_y = own_x.norm(), own_y.norm()
    return (across.norm().square() / (size_x * size_y)).item() if size_x > 0 and size_y > 0 else 0.0


def norm_error(predicted: Tensor, truth: Tensor) -> Tensor:
    """Relative error of each prediction's length, ``[N, d_model]``, not centred, to ``[N]``."""
    true = truth.norm(dim=-1)  # where it is 0, the error is the length of the prediction
    return (predicted.norm(dim=-1) - true).abs() / true.where(true > 0, 1.0)  # type: ignore[no-any-return]


def _bootstrap_counts(seeds: int, concepts: int, samples: int) -> Iterator[Counts]:
    """Count of each seed and of each concept in some of the bootstrap samples, ``[k, seeds]`` and ``[k, concepts]``."""
    draw, step = np.random.default_rng(0), max(1, NUMBERS // concepts)
    rows = draw.multinomial(seeds, np.full(seeds, 1 / seeds), samples)
    for start in range(0, samples, step):
        own = rows[start : start + step]
        yield own, draw.multinomial(concepts, np.full(concepts, 1 / concepts), len(own))


@functools.lru_cache(maxsize=4)
def _cached_counts(seeds: int, concepts: int, samples: int) -> list[Counts]:
    return list(_bootstrap_counts(seeds, concepts, samples))


def interval(values: NDArray[np.floating[Any]], level: float = 0.95, samples: int = 2000) -> tuple[float, float]:
    """The interval of one group of values; see `intervals`."""
    [found] = intervals([values], level, samples)
    return found


def intervals(
    groups: Sequence[NDArray[np.floating[Any]]], level: float = 0.95, samples: int = 2000
) -> list[tuple[float, float]]:
    """Percentile bootstrap interval of the mean (Efron and Tibshirani, 1993, chapter 13) of each group of values.

    Args:
        groups: each ``[seeds, N]``; both are resampled, the concepts in the same way for all seeds.
        level: coverage.
        samples: number of bootstrap samples.

    Returns:
        Lower and upper bound of each group.
    """
    shapes: dict[tuple[int, ...], list[int]] = {}
    for place, values in enumerate(groups):
        shapes.setdefault(values.shape, []).append(place)
    found: dict[int, tuple[float, float]] = {}
    for (seeds, concepts), places in shapes.items():
        draw = _cached_counts if concepts * samples <= NUMBERS else _bootstrap_counts
        for start in range(0, len(places), GROUPS_AT_ONCE):
            some = places[start : start + GROUPS_AT_ONCE]
            values = np.stack([groups[place] for place in some]).astype(np.float64)  # [groups, seeds, N]
            # One matrix product for all groups, [groups, seeds, N] by [N, samples].
            sums = [
                np.einsum("gsk,ks->gk", values @ columns.T.astype(np.float64), rows)
                for rows, columns in draw(seeds, concepts, samples)
            ]
            means = np.concatenate(sums, axis=1) / (seeds * concepts)  # [groups, samples]
            ends = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=1).T.tolist()
            found |= {place: (low, high) for place, (low, high) in zip(some, ends, strict=True)}
    return [found[place] for place in range(len(groups))]
