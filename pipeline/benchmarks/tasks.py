"""What a benchmark asks of vectors, and how the answers are scored.

A task turns the vectors of its phrases into one answer per item, and scores answers with weights of the items, for
several bootstrap samples at once: a sample is a count of each item. ``score`` is the figure of the literature;
``skill`` is 0 for answers by chance and 1 for the best.

``S`` samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pipeline.data.stems import stem_groups

FOLDS = 5
STRENGTHS = np.logspace(-2, 5, 15)  # of the probes' ridge regression, on standardised vectors
RESTARTS = 10  # of k-means
PERMUTATIONS = 20  # of labels, for the purity of chance
MIN_POSITIVES = 10  # phrases with an attribute, for a probe to be fitted
MIN_SPREAD = 1e-12

Floats = NDArray[np.floating[Any]]
Rows = NDArray[np.int64]


class Task(Protocol):
    """A benchmark's phrases, and its items, each about some of the phrases."""

    @property
    def phrases(self) -> tuple[str, ...]:
        """What is to be encoded."""

    @property
    def item_phrases(self) -> Rows:
        """The phrases of each item, ``[items, phrases per item]``."""

    def answers(self, vectors: Floats) -> Floats:
        """Answer each item by centred vectors ``[phrases, width]``: ``[items, ...]``."""

    def score(self, answers: Floats, weights: Floats) -> Floats:
        """Score answers with weights ``[S, items]``: ``[S]``."""

    def skill(self, answers: Floats, weights: Floats) -> Floats:
        """The same, with 0 for answers by chance and 1 for the best."""

    def without(self, items: Rows) -> Task:
        """The task without some of its items."""


def weighted_correlation(x: Floats, y: Floats, weights: Floats) -> Floats:
    """Pearson correlation of columns ``[n, k]`` with weights ``[S, n]``: ``[S, k]``; 0 where a column is constant."""
    share = weights / weights.sum(1, keepdims=True)
    mean_x, mean_y = share @ x, share @ y
    across = share @ (x * y) - mean_x * mean_y
    own = (share @ (x * x) - mean_x**2) * (share @ (y * y) - mean_y**2)
    found: Floats = np.where(own > MIN_SPREAD, across / np.sqrt(np.maximum(own, MIN_SPREAD)), 0.0)
    return found


def ranked(values: Floats) -> Floats:
    """Ranks of each column, ``[n, k]``, ties averaged, from -0.5 to 0.5; their correlation is Spearman's."""
    return np.asarray((pd.DataFrame(values).rank().to_numpy() - (len(values) + 1) / 2) / len(values))


def unit(vectors: Floats) -> Floats:
    """Rows of length 1; rows of zeros stay."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > MIN_SPREAD))


@dataclass(frozen=True)
class Similarity:
    """Pairs of words with a rating by people: Spearman correlation of the ratings with the cosines."""

    phrases: tuple[str, ...]
    pairs: Rows  # [items, 2]
    ratings: Floats  # [items]

    @property
    def item_phrases(self) -> Rows:
        """The two words of each pair."""
        return self.pairs

    @cached_property
    def _truth(self) -> Floats:
        return ranked(self.ratings[:, None].astype(np.float64))

    def answers(self, vectors: Floats) -> Floats:
        """Ranks of the cosines, ``[items, 1]``; in a bootstrap sample the pairs keep them."""
        directions = unit(vectors.astype(np.float64))
        left, right = directions[self.pairs[:, 0]], directions[self.pairs[:, 1]]
        return ranked((left * right).sum(1, keepdims=True))

    def score(self, answers: Floats, weights: Floats) -> Floats:
        """Spearman correlation."""
        return weighted_correlation(answers, self._truth, weights)[:, 0]

    skill = score

    def without(self, items: Rows) -> Similarity:
        """The task without some of its pairs."""
        return Similarity(self.phrases, np.delete(self.pairs, items, 0), np.delete(self.ratings, items))


@dataclass(frozen=True)
class Analogies:
    """Questions "a is to b as c is to ?": the share for which b - a + c is nearest to the answer (3CosAdd)."""

    # Mikolov, Yih and Zweig (2013), "Linguistic regularities in continuous space word representations": the three
    # words of a question are no answers to it.
    phrases: tuple[str, ...]
    questions: Rows  # [items, 4]: a, b, c and the answer

    @property
    def item_phrases(self) -> Rows:
        """The four words of each question."""
        return self.questions

    def answers(self, vectors: Floats) -> Floats:
        """1 where the answer is right, else 0, ``[items, 1]``."""
        directions = unit(vectors.astype(np.float32))
        right = np.zeros((len(self.questions), 1))
        for start in range(0, len(self.questions), 1024):
            asked = self.questions[start : start + 1024]
            a, b, c = (directions[asked[:, place]] for place in range(3))
            similarity = (b - a + c) @ directions.T  # [n, phrases]
            np.put_along_axis(similarity, asked[:, :3], -np.inf, axis=1)
            own = np.take_along_axis(similarity, asked[:, 3:], axis=1)  # [n, 1]
            similarity[np.arange(len(asked)), asked[:, 3]] = -np.inf
            right[start : start + 1024] = own > similarity.max(1, keepdims=True)  # a tie is not right
        return right

    def score(self, answers: Floats, weights: Floats) -> Floats:
        """Share of right answers."""
        return np.asarray(weights @ answers[:, 0] / weights.sum(1))

    skill = score

    def without(self, items: Rows) -> Analogies:
        """The task without some of its questions."""
        return Analogies(self.phrases, np.delete(self.questions, items, 0))


@dataclass(frozen=True)
class Categories:
    """Words with a category each: the purity of as many clusters by k-means; ``skill`` corrects it for chance."""

    phrases: tuple[str, ...]
    labels: Rows  # [phrases], numbers of categories

    @property
    def item_phrases(self) -> Rows:
        """Each word by itself."""
        return np.arange(len(self.phrases))[:, None]

    def answers(self, vectors: Floats) -> Floats:
        """The number of each word's cluster, ``[items, 1]``."""
        from sklearn.cluster import KMeans  # takes seconds to load

        directions = unit(vectors.astype(np.float64))
        if len(np.unique(directions, axis=0)) <= self.labels.max():
            return np.zeros((len(directions), 1))
        clusters = KMeans(int(self.labels.max()) + 1, n_init=RESTARTS, random_state=0).fit_predict(directions)
        return np.asarray(clusters[:, None], np.float64)

    def score(self, answers: Floats, weights: Floats) -> Floats:
        """Purity: the share of words whose category is the largest of their cluster."""
        return np.array([self._purity(answers, one, self.labels) for one in weights])

    def skill(self, answers: Floats, weights: Floats) -> Floats:
        """Purity above that of categories dealt out by chance, as a share of what is left above it."""
        score = self.score(answers, weights)
        draw = np.random.default_rng(0)
        dealt = [draw.permutation(self.labels) for _ in range(PERMUTATIONS)]
        chance = np.array([np.mean([self._purity(answers, one, labels) for labels in dealt]) for one in weights])
        return np.asarray((score - chance) / (1 - chance))

    def _purity(self, answers: Floats, weights: Floats, labels: Rows) -> float:
        number = int(self.labels.max()) + 1
        cells = np.bincount(answers[:, 0].astype(np.int64) * number + labels, weights, number * number)
        return float(cells.reshape(number, number).max(1).sum() / weights.sum())

    def without(self, items: Rows) -> Categories:
        """The task without some of its words; categories that lose all words go too."""
        kept = np.delete(np.arange(len(self.phrases)), items)
        labels = np.unique(self.labels[kept], return_inverse=True)[1]
        return Categories(tuple(self.phrases[row] for row in kept), labels)


@dataclass(frozen=True)
class Ratings:
    """Phrases with ratings by people, read off the vectors by a ridge probe: Spearman correlation, mean over scales.

    The probe answers for phrases that it was not fitted on: those of another fold, where phrases that share a stem are
    in one fold, or, where some are for fitting only, all others.
    """

    phrases: tuple[str, ...]
    ratings: Floats  # [phrases, scales]
    only_fitted: int = 0  # the first phrases, on which the probe is fitted and which are no items

    @property
    def item_phrases(self) -> Rows:
        """Each phrase that is an item, by itself."""
        return np.arange(self.only_fitted, len(self.phrases))[:, None]

    @cached_property
    def _truth(self) -> Floats:
        return ranked(self.ratings[self.only_fitted :].astype(np.float64))

    @cached_property
    def folds(self) -> Rows:
        """The fold of each phrase."""
        return folds_of(self.phrases)

    def answers(self, vectors: Floats) -> Floats:
        """Ranks of the probe's ratings, ``[items, scales]``; equal where the vectors do not vary."""
        return self.transferred(vectors, vectors)

    def transferred(self, fitted: Floats, asked: Floats) -> Floats:
        """The answers of a probe that was fitted on other vectors of the same phrases, ``[items, scales]``."""
        if self.only_fitted:
            probe = fit_probe(fitted[: self.only_fitted], self.ratings[: self.only_fitted])
            return ranked(probe(asked[self.only_fitted :]))
        return ranked(across_folds(fitted, asked, self.ratings, self.folds))

    def score(self, answers: Floats, weights: Floats) -> Floats:
        """Spearman correlation, mean over scales."""
        return np.asarray(weighted_correlation(answers, self._truth, weights).mean(1))

    skill = score

    def without(self, items: Rows) -> Ratings:
        """The task without some of its phrases."""
        kept = np.delete(np.arange(len(self.phrases)), self.only_fitted + items)
        return Ratings(tuple(self.phrases[row] for row in kept), self.ratings[kept], self.only_fitted)


@dataclass(frozen=True)
class Attributes:
    """Phrases that have or lack attributes, read off the vectors by a linear probe: F1, mean over attributes."""

    phrases: tuple[str, ...]
    has: NDArray[np.bool_]  # [phrases, attributes]

    @property
    def item_phrases(self) -> Rows:
        """Each phrase by itself."""
        return np.arange(len(self.phrases))[:, None]

    @cached_property
    def folds(self) -> Rows:
        """The fold of each phrase."""
        return folds_of(self.phrases)

    def answers(self, vectors: Floats) -> Floats:
        """1 where the probe says that the phrase has the attribute, ``[items, attributes]``; none if nothing varies."""
        values = across_folds(vectors, vectors, self.has.astype(np.float64), self.folds)
        found = np.zeros(values.shape)
        for fold in np.unique(self.folds):  # as many of a fold as have the attribute among all
            own, share = self.folds == fold, self.has.mean(0)
            if (spread := np.ptp(values[own], axis=0)).any():
                edges = np.array([np.quantile(values[own, one], 1 - part) for one, part in enumerate(share)])
                found[own] = (values[own] >= edges) & (spread > 0)
        return found

    def score(self, answers: Floats, weights: Floats) -> Floats:
        """F1, mean over attributes."""
        both, said, true = (weights @ values for values in (answers * self.has, answers, self.has.astype(np.float64)))
        return np.asarray((2 * both / np.maximum(said + true, MIN_SPREAD)).mean(1))

    def skill(self, answers: Floats, weights: Floats) -> Floats:
        """F1 above that of as many answers by chance, as a share of what is left above it; 0 without answers."""
        total = weights.sum(1, keepdims=True)
        said, true = weights @ answers / total, weights @ self.has / total
        chance = (2 * said * true / np.maximum(said + true, MIN_SPREAD)).mean(1)
        return np.asarray((self.score(answers, weights) - chance) / (1 - chance) * answers.any())

    def without(self, items: Rows) -> Attributes:
        """The task without some of its phrases, and without attributes that too few of the others have."""
        kept = np.delete(np.arange(len(self.phrases)), items)
        has = self.has[kept]
        return Attributes(tuple(self.phrases[row] for row in kept), has[:, has.sum(0) >= MIN_POSITIVES])


def folds_of(phrases: tuple[str, ...]) -> Rows:
    """Deal phrases out to folds of similar size; phrases that share a stem are in one fold."""
    sizes, folds = np.zeros(FOLDS, np.int64), np.zeros(len(phrases), np.int64)
    groups = stem_groups(phrases)
    for place in np.random.default_rng(0).permutation(len(groups)):
        fold = int(sizes.argmin())
        folds[groups[place]] = fold
        sizes[fold] += len(groups[place])
    return folds


class Probe:
    """A ridge regression on standardised vectors; its strength is chosen by leave-one-out errors."""

    # By the eigenvectors of the Gram matrix: scikit-learn's `RidgeCV` decomposes the vectors themselves, which takes
    # five times as long for tens of thousands of phrases.
    def __init__(self, vectors: Floats, truths: Floats) -> None:
        self.mean, self.scale = vectors.mean(0), vectors.std(0)
        self.scale[self.scale < MIN_SPREAD] = 1.0
        self.truth = truths.mean(0)
        inputs, targets = (vectors - self.mean) / self.scale, truths - self.truth
        values, directions = np.linalg.eigh(inputs.T @ inputs)
        values = np.maximum(values, 0)
        along = inputs @ directions  # [n, width]
        products, squares = along.T @ targets, along**2
        errors = []
        for strength in STRENGTHS:
            leverage = 1 / len(inputs) + squares @ (1 / (values + strength))  # with that of the mean
            left_out = (targets - along @ (products / (values + strength)[:, None])) / (1 - leverage)[:, None]
            errors.append((left_out**2).mean())
        best = STRENGTHS[int(np.argmin(errors))]
        self.weights = directions @ (products / (values + best)[:, None])

    def __call__(self, vectors: Floats) -> Floats:
        """Predict, ``[n, width]`` to ``[n, columns]``; the mean truth where the fitted vectors did not vary."""
        found: Floats = (vectors - self.mean) / self.scale @ self.weights + self.truth
        return found


def fit_probe(vectors: Floats, truths: Floats) -> Probe:
    """Fit a probe on vectors ``[n, width]`` and truths ``[n, columns]``, in float64."""
    return Probe(vectors.astype(np.float64), truths.astype(np.float64))


def across_folds(fitted: Floats, asked: Floats, truths: Floats, folds: Rows) -> Floats:
    """How far from the mean truth ``[n, columns]`` are the answers of a probe for each fold, fitted on the others.

    Args:
        fitted: vectors on which the probes are fitted, ``[n, width]``.
        asked: vectors of the same phrases that they are asked about, ``[n, width]``.
        truths: ``[n, columns]``.
        folds: the fold of each phrase.

    Returns:
        ``[n, columns]``.
    """
    # Not the answers themselves: the mean of the other folds is high where that of a fold is low.
    answers = np.zeros(truths.shape)
    for fold in np.unique(folds):
        own = folds == fold
        answers[own] = fit_probe(fitted[~own], truths[~own])(asked[own]) - truths[~own].mean(0)
    return answers
