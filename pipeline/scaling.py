"""Scaling laws: how far a student stays from the teacher against training concepts and parameters.

``1 - cosine = E + A N^-alpha + B P^-beta`` for N concepts and P parameters: the form of Hoffmann et al. (2022),
"Training compute-optimal large language models", equation 2, fitted as there with a Huber loss on the logarithms, from
the best of a grid of starts. Intervals come from a bootstrap over the cells.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls  # type: ignore[import-untyped]

from pipeline.errors import InputError
from pipeline.options import Cell

HUBER = 0.01  # log residuals beyond this (1 % of the error) count linearly
BOOTSTRAPS = 100
LEVEL = 0.9  # of every interval
NAMES = ("E", "A", "alpha", "B", "beta")
EXPONENTS = np.linspace(0.05, 1.5, 16)
STARTS = 3  # of the grid's best
LEAST = 1e-6  # a constant that least squares leaves out starts here
ABSENT = -30.0  # the logarithm of a term that is left out
VARY = ("concepts", "hidden_dim", "layers", "seed")  # within a family of cells
Array = NDArray[np.float64]
Row = dict[str, Any]


@dataclass(frozen=True)
class Law:
    """A fitted scaling law.

    Attributes:
        parameters: log E, log A, alpha, log B, beta.
        samples: the same of each bootstrap, ``[bootstraps, 5]``.
        residuals: log error minus its fit, of each cell.
        free: which of the parameters were fitted; a term whose variable does not vary is left out.
    """

    parameters: Array
    samples: Array
    residuals: Array
    free: tuple[bool, ...] = field(default=(True,) * 5)

    @property
    def values(self) -> dict[str, dict[str, float] | None]:
        """Each constant by its usual name with its interval; None for a term that is left out."""

        def natural(rows: Array) -> Array:
            return np.where([True, True, False, True, False], np.exp(rows), rows)

        low, high = np.quantile(natural(self.samples), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
        best = natural(self.parameters)
        return {
            name: {"value": float(best[i]), "low": float(low[i]), "high": float(high[i])} if self.free[i] else None
            for i, name in enumerate(NAMES)
        }

    def cosine(self, concepts: float, size: float) -> float:
        """The cosine that the law expects for so many concepts and parameters."""
        return 1 - float(np.exp(_log_error(self.parameters, _logs([concepts], [size]))[0]))

    def interval(self, concepts: float, size: float) -> tuple[float, float]:
        """Where a new cell's cosine should lie: the bootstrap's laws, each with every residual of the fit."""
        logs = _logs([concepts], [size])
        expected = np.array([_log_error(sample, logs)[0] for sample in self.samples])
        spread = (expected[:, None] + self.residuals * _inflation(self)).ravel()
        high, low = 1 - np.exp(np.quantile(spread, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
        return float(low), float(high)


def _inflation(law: Law) -> float:
    """Residuals of a fit are smaller than the noise by the freedom that the fit used up."""
    cells = len(law.residuals)
    return math.sqrt(cells / max(1, cells - sum(law.free)))


def fit(concepts: Sequence[float], sizes: Sequence[float], cosines: Sequence[float], seed: int = 0) -> Law:
    """Fit the law to cells.

    Args:
        concepts: N of each cell.
        sizes: P of each cell.
        cosines: centred cosine of each cell, below 1.
        seed: of the bootstrap.

    Raises:
        InputError: fewer cells than the law has constants, or only one number of concepts.
    """
    logs, errors = _logs(concepts, sizes), np.log(np.clip(1 - np.asarray(cosines, np.float64), 1e-9, None))
    free = (True, True, True, *(2 * [len(set(sizes)) > 1]))
    if len(set(concepts)) < 3 or len(errors) < sum(free) + 1:
        raise InputError(
            f"a scaling law needs 3 numbers of concepts and {sum(free) + 1} cells at the least, found "
            f"{len(set(concepts))} and {len(errors)}"
        )
    tried = [_descend(start, logs, errors, free) for start in _starts(logs, errors)]
    best = min(tried, key=lambda pair: pair[0])[1]
    draw = np.random.default_rng(seed)
    samples = []
    for _ in range(BOOTSTRAPS):
        rows = draw.integers(len(errors), size=len(errors))
        samples.append(_descend(best, logs[:, rows], errors[rows], free)[1])
    return Law(best, np.array(samples), errors - _log_error(best, logs), free)


def _logs(concepts: Sequence[float], sizes: Sequence[float]) -> Array:
    return np.log(np.array([concepts, sizes], np.float64))  # [2, cells]


def _terms(parameters: Array, logs: Array) -> Array:
    """Logarithms of the three terms, ``[3, cells]``."""
    e, a, alpha, b, beta = parameters
    return np.stack([np.full(logs.shape[1], e), a - alpha * logs[0], b - beta * logs[1]])


def _log_error(parameters: Array, logs: Array) -> Array:
    return np.asarray(np.logaddexp.reduce(_terms(parameters, logs)))


def _starts(logs: Array, errors: Array) -> list[Array]:
    """The best of a grid of exponents, each with its constants by least squares on relative errors."""
    found = []
    for alpha, beta in itertools.product(EXPONENTS, EXPONENTS):
        terms = np.exp([np.zeros(len(errors)), -alpha * logs[0], -beta * logs[1]]) / np.exp(errors)  # [3, cells]
        constants, _ = nnls(terms.T, np.ones(len(errors)))
        e, a, b = np.log(np.maximum(constants, LEAST))
        found.append((float(np.square(constants @ terms - 1).sum()), np.array([e, a, alpha, b, beta])))
    return [start for _, start in sorted(found, key=lambda pair: pair[0])[:STARTS]]


def _descend(start: Array, logs: Array, errors: Array, free: tuple[bool, ...]) -> tuple[float, Array]:
    """Trust-region least squares with a Huber loss from one start: the loss reached, and the parameters."""
    mask = np.array(free)
    parameters = np.where(mask, start, [ABSENT, ABSENT, 0.0, ABSENT, 0.0])

    def put(values: Array) -> Array:
        parameters[mask] = values
        return parameters

    def residuals(values: Array) -> Array:
        return _log_error(put(values), logs) - errors

    def jacobian(values: Array) -> Array:
        terms = _terms(put(values), logs)
        share = np.exp(terms - np.logaddexp.reduce(terms))  # [3, cells]
        columns = [share[0], share[1], -share[1] * logs[0], share[2], -share[2] * logs[1]]
        return np.stack(columns, 1)[:, mask]

    low, high = np.array([(-20, 1), (-20, 30), (0, 3), (-20, 60), (0, 3)]).T[:, mask]
    begin = np.clip(parameters[mask], low + 1e-6, high - 1e-6)
    done = least_squares(residuals, begin, jacobian, (low, high), loss="huber", f_scale=HUBER, x_scale="jac")
    return float(done.cost), put(done.x).copy()


def families(cells: Sequence[Row]) -> dict[str, list[Row]]:
    """Cells that differ in concepts, size and seed only, where they are enough for a law; by what they share."""
    found: dict[str, list[Row]] = {}
    for cell in cells:
        found.setdefault(shared_by(cell), []).append(cell)
    return {shared: own for shared, own in found.items() if len({c["concepts"] for c in own}) >= 3 and len(own) > 5}


def shared_by(cell: Row) -> str:
    """What a cell shares with its family, as text."""
    return " ".join(f"{name}={cell[name]}" for name in Cell.__dataclass_fields__ if name not in VARY)


def law_of(cells: Sequence[Row]) -> Law:
    """The law of one family of cells, in test cosine."""
    concepts, sizes, cosines = ([cell[name] for cell in cells] for name in ("concepts", "parameters", "test_cosine"))
    return fit(concepts, sizes, cosines)


def predict(cells: Sequence[Row], larger: Sequence[Row], most: int) -> dict[str, Any]:
    """A receipt: what a law that saw only cells of at most ``most`` concepts expects of larger ones.

    Args:
        cells: finished cells of one family.
        larger: cells of the same family with ``name``, ``concepts`` and ``parameters``, trained or not.
        most: the limit; no cell beyond it is looked at.
    """
    law = law_of([cell for cell in cells if cell["concepts"] <= most])
    expected = [
        {name: cell[name] for name in ("name", "concepts", "parameters")}
        | {
            "cosine": law.cosine(cell["concepts"], cell["parameters"]),
            "interval": list(law.interval(cell["concepts"], cell["parameters"])),
        }
        for cell in larger
        if cell["concepts"] > most
    ]
    return {"most": most, "level": LEVEL, "law": law.values, "cells": expected}


def check(receipt: dict[str, Any], cells: Sequence[Row]) -> dict[str, Any] | None:
    """How a receipt's intervals fared: coverage, and the largest and the mean error; None before there is any cell."""
    measured = {cell["name"]: cell["test_cosine"] for cell in cells}
    pairs = [(cell, measured[cell["name"]]) for cell in receipt["cells"] if cell["name"] in measured]
    if not pairs:
        return None
    errors = [abs(cell["cosine"] - truth) for cell, truth in pairs]
    inside = [cell["interval"][0] <= truth <= cell["interval"][1] for cell, truth in pairs]
    return {
        "cells": len(pairs),
        "coverage": sum(inside) / len(pairs),
        "mean": float(np.mean(errors)),
        "most": max(errors),
    }
