"""Scaling laws: how far a student stays from the teacher against training concepts and parameters.

``1 - cosine = E + A N^-alpha + B P^-beta`` for N concepts and P parameters: the form of Hoffmann et al. (2022),
"Training compute-optimal large language models", equation 2, fitted as there: a Huber loss on the logarithms, L-BFGS
from a grid of starts. Intervals come from a bootstrap over the cells.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize  # type: ignore[import-untyped]

from pipeline.errors import InputError
from pipeline.options import Cell

HUBER = 0.01  # log residuals beyond this (1 % of the error) count linearly
BOOTSTRAPS = 100
LEVEL = 0.9  # of every interval
NAMES = ("E", "A", "alpha", "B", "beta")
STARTS = [
    np.array(start)  # log E, log A, alpha, log B, beta
    for start in itertools.product((-3.0, -1.0), (0.0, 2.0), (0.1, 0.5, 1.0), (-1.0, 2.0), (0.1, 0.6))
]
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
    found = sorted((_descend(start, logs, errors, free) for start in STARTS), key=lambda pair: pair[0])
    best = found[0][1]
    # A bootstrap's optimum is near one of the good ones.
    starts = [parameters for _, parameters in found[:2]]
    draw = np.random.default_rng(seed)
    samples = []
    for _ in range(BOOTSTRAPS):
        rows = draw.integers(len(errors), size=len(errors))
        tried = [_descend(start, logs[:, rows], errors[rows], free) for start in starts]
        samples.append(min(tried, key=lambda pair: pair[0])[1])
    return Law(best, np.array(samples), errors - _log_error(best, logs), free)


def _logs(concepts: Sequence[float], sizes: Sequence[float]) -> Array:
    return np.log(np.array([concepts, sizes], np.float64))  # [2, cells]


def _terms(parameters: Array, logs: Array) -> Array:
    """Logarithms of the three terms, ``[3, cells]``."""
    e, a, alpha, b, beta = parameters
    return np.stack([np.full(logs.shape[1], e), a - alpha * logs[0], b - beta * logs[1]])


def _log_error(parameters: Array, logs: Array) -> Array:
    return np.asarray(np.logaddexp.reduce(_terms(parameters, logs)))


def _descend(start: Array, logs: Array, errors: Array, free: tuple[bool, ...]) -> tuple[float, Array]:
    """L-BFGS from one start: the loss reached, and the parameters."""
    mask = np.array(free)
    base = np.where(mask, start, [ABSENT, ABSENT, 0.0, ABSENT, 0.0])

    def loss(values: Array) -> tuple[float, Array]:
        parameters = base.copy()
        parameters[mask] = values
        terms = _terms(parameters, logs)
        total = np.logaddexp.reduce(terms)
        off = total - errors
        far = np.abs(off) > HUBER
        value = np.where(far, HUBER * (np.abs(off) - HUBER / 2), off**2 / 2).mean()
        slope = np.where(far, HUBER * np.sign(off), off) * np.exp(terms - total) / len(errors)  # [3, cells]
        gradient = np.array(
            [slope[0].sum(), slope[1].sum(), -(slope[1] * logs[0]).sum(), slope[2].sum(), -(slope[2] * logs[1]).sum()]
        )
        return float(value), gradient[mask]

    bounds = np.array([(-12, 1), (-12, 12), (0, 3), (-12, 30), (0, 3)])[mask]
    options = {"maxiter": 500, "ftol": 1e-14, "gtol": 1e-10}
    done = minimize(loss, base[mask], jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    parameters = base.copy()
    parameters[mask] = done.x
    return float(done.fun), parameters


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
    return fit(*([cell[name] for cell in cells] for name in ("concepts", "parameters", "test_cosine")))


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
