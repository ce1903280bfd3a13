"""Scaling laws: how far a student stays from the teacher against training concepts and parameters.

``1 - cosine = E + A N^-alpha + B P^-beta`` for N concepts and P parameters: the form of Hoffmann et al. (2022),
"Training compute-optimal large language models", equation 2, fitted as there with a Huber loss on the logarithms, from
the best of a grid of starts. Intervals come from a bootstrap over the cells; those of predictions also know how far
such laws went astray when they were asked for cells beyond the ones that they were fitted on.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from pipeline.analysis.rows import CELL_FIELDS, Row, cell_of
from pipeline.errors import InputError
from pipeline.settings import Cell

HUBER = 0.01  # log residuals beyond this (1 % of the error) count linearly
BOOTSTRAPS = 100
LEVEL = 0.9  # of every interval
NORMAL = np.array([NormalDist().inv_cdf((step + 0.5) / 40) for step in range(40)])  # as evenly likely points
NAMES = ("E", "A", "alpha", "B", "beta")
EXPONENTS = np.linspace(0.05, 1.5, 16)
STARTS = 3  # of the grid's best
LEAST = 1e-6  # a constant that least squares leaves out starts here
ABSENT = -30.0  # the logarithm of a term that is left out
VARY = ("concepts", "hidden_dim", "layers", "seed")  # within a family of cells
BOUNDS = np.array([(-20, 1), (-20, 30), (0, 3), (-20, 60), (0, 3)], float).T  # of the parameters, ``[2, 5]``
MOST_STEPS = 400
TOLERANCE = 1e-9  # a step that lowers the loss by a smaller share is idle
IDLE_STEPS = 12  # so many one after another end the descent
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Law:
    """A fitted scaling law.

    Attributes:
        parameters: log E, log A, alpha, log B, beta.
        samples: the same of each bootstrap, ``[bootstraps, 5]``.
        residuals: log error minus its fit, of each cell.
        span: log concepts of the smallest and of the largest cell.
        bend: the curvature that the law lacks, see `curvature_error`; None where that is not known.
        free: which of the parameters were fitted; a term whose variable does not vary is left out.
    """

    parameters: Array
    samples: Array
    residuals: Array
    span: tuple[float, float]
    bend: float | None
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
        """Where a new cell's cosine should lie: the bootstrap's laws, each with every residual of the fit.

        Beyond the largest number of concepts there is a normal error for what the law lacks, the farther the larger.
        """
        logs = _logs([concepts], [size])
        expected = np.array([_log_error(sample, logs)[0] for sample in self.samples])
        lacking = (self.bend or 0.0) * _off_line(*self.span, logs[0, 0]) if logs[0, 0] > self.span[1] else 0.0
        spread = (expected[:, None, None] + (self.residuals * _inflation(self))[:, None] + lacking * NORMAL).ravel()
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
    best = _fit(logs, errors, free)
    draw = np.random.default_rng(seed)
    rows = draw.integers(len(errors), size=(BOOTSTRAPS, len(errors)))
    counts = (rows[:, :, None] == np.arange(len(errors))).sum(1).astype(float)  # [bootstraps, cells]
    _, samples = _descend(np.tile(best, (BOOTSTRAPS, 1)), logs, errors, free, counts)
    residuals, span = errors - _log_error(best, logs), (float(logs[0].min()), float(logs[0].max()))
    return Law(best, samples, residuals, span, curvature_error(logs, errors, free), free)


_fitted = functools.lru_cache(maxsize=4)(fit)  # the results file and the report ask for the same one


def _fit(logs: Array, errors: Array, free: tuple[bool, ...]) -> Array:
    reached, tried = _descend(_starts(logs, errors, free), logs, errors, free)
    best: Array = tried[reached.argmin()]
    return best


def curvature_error(logs: Array, errors: Array, free: tuple[bool, ...]) -> float | None:
    """How much curvature the law lacks: the coefficient of the square of log concepts in the log error.

    No law of this form is true, and residuals within the fit do not tell. So the law is asked for what is known: fitted
    on the cells of the fewest concepts, three numbers of them at the least, it predicts the rest, for every such cut
    (rolling origin: Tashman, 2000, "Out-of-sample tests of forecasting accuracy"). Its errors are compared with those
    of a straight line where the truth is a parabola; both as root mean squares.

    Args:
        logs: log concepts and log parameters, ``[2, cells]``.
        errors: log (1 - cosine), ``[cells]``.
        free: as in `Law`.

    Returns:
        None where there are too few numbers of concepts to cut.
    """
    wrong, unit = [], []
    for most in np.unique(logs[0])[2:-1]:
        seen = logs[0] <= most
        if seen.sum() > sum(free):
            law = _fit(logs[:, seen], errors[seen], free)
            wrong.append(errors[~seen] - _log_error(law, logs[:, ~seen]))
            unit.append(_off_line(logs[0].min(), most, logs[0, ~seen]))
    return float(np.linalg.norm(np.concatenate(wrong)) / np.linalg.norm(np.concatenate(unit))) if wrong else None


def _off_line(first: float, last: float, places: Any) -> Any:
    """How far a square is at places beyond ``last`` from the line that fits it best between ``first`` and ``last``."""
    span, beyond = last - first, places - last
    return beyond**2 + beyond * span + span**2 / 6


def _logs(concepts: Sequence[float], sizes: Sequence[float]) -> Array:
    return np.log(np.array([concepts, sizes], np.float64))  # [2, cells]


def _terms(parameters: Array, logs: Array) -> Array:
    """Logarithms of the three terms, ``[3, ..., cells]``, for parameters ``[..., 5]``."""
    e, a, alpha, b, beta = np.moveaxis(parameters, -1, 0)[..., None]
    return np.stack(np.broadcast_arrays(e, a - alpha * logs[0], b - beta * logs[1]))


def _log_error(parameters: Array, logs: Array) -> Array:
    return np.asarray(np.logaddexp.reduce(_terms(parameters, logs)))


def _starts(logs: Array, errors: Array, free: tuple[bool, ...]) -> Array:
    """The best of a grid of exponents, each with its constants by least squares on relative errors, ``[STARTS, 5]``."""
    grid = np.array(list(itertools.product(EXPONENTS, EXPONENTS)))  # [grid, 2]
    terms = np.exp([np.zeros((len(grid), len(errors))), *(-grid.T[..., None] * logs[:, None])]) / np.exp(errors)
    terms[2] *= free[3]
    solved = [nnls(part, np.ones(len(errors))) for part in terms.transpose(1, 2, 0)]  # no constant is negative
    e, a, b = np.log(np.maximum([constants for constants, _ in solved], LEAST)).T
    best = np.argsort([distance for _, distance in solved], kind="stable")[:STARTS]
    return np.stack([e, a, grid[:, 0], b, grid[:, 1]], 1)[best]


def _descend(
    starts: Array, logs: Array, errors: Array, free: tuple[bool, ...], counts: Array | float = 1.0
) -> tuple[Array, Array]:
    """Least squares with a Huber loss, all problems at once: Levenberg and Marquardt's method within `BOUNDS`.

    The Huber loss is met by weights that follow from the residuals (Holland and Welsch, 1977, "Robust regression using
    iteratively reweighted least-squares"); no step is taken that does not lower the loss.

    Args:
        starts: parameters to begin with, ``[problems, 5]``.
        logs: log concepts and log parameters, ``[2, cells]``.
        errors: log (1 - cosine), ``[cells]``.
        free: as in `Law`.
        counts: how often each cell counts, ``[problems, cells]``.

    Returns:
        The loss that each problem reached, ``[problems]``, and its parameters, ``[problems, 5]``.
    """
    mask = np.array(free)
    low, high = BOUNDS[:, mask]
    whole = np.where(mask, starts, [ABSENT, ABSENT, 0.0, ABSENT, 0.0])

    def put(values: Array) -> Array:
        whole[:, mask] = values
        return whole

    def losses(values: Array) -> Array:
        sizes = np.abs(_log_error(put(values), logs) - errors) / HUBER
        lost: Array = (counts * np.where(sizes <= 1, np.square(sizes), 2 * sizes - 1)).sum(-1)
        return lost

    values = np.clip(whole[:, mask], low, high)
    reached, damping = losses(values), np.full(len(values), 1e-3)
    idle = np.zeros(len(values), int)
    for _ in range(MOST_STEPS):
        terms = _terms(put(values), logs)
        total = np.logaddexp.reduce(terms)
        share, residuals = np.exp(terms - total), total - errors  # [3, problems, cells], [problems, cells]
        columns = [share[0], share[1], -share[1] * logs[0], share[2], -share[2] * logs[1]]
        jacobian = np.stack(columns, -1)[..., mask]  # [problems, cells, parameters]
        weighted = jacobian * (counts / np.maximum(1, np.abs(residuals) / HUBER))[..., None]
        slope = np.einsum("dnp,dn->dp", weighted, residuals)
        squares = np.einsum("dnp,dnq->dpq", weighted, jacobian)
        moves = ~((values <= low) & (slope > 0) | (values >= high) & (slope < 0))  # others stay at their bound
        squares *= moves[:, :, None] * moves[:, None, :]
        diagonal = np.maximum(np.einsum("dpp->dp", squares), 1e-12) * damping[:, None]
        step = np.linalg.solve(squares + diagonal[:, :, None] * np.eye(mask.sum()), -(slope * moves)[..., None])[..., 0]
        tried = np.clip(values + step, low, high)
        lost = losses(tried)
        better = lost < reached
        idle = np.where(better & (reached - lost > TOLERANCE * reached), 0, idle + 1)
        values, reached = np.where(better[:, None], tried, values), np.where(better, lost, reached)
        damping = np.clip(np.where(better, damping / 4, damping * 3), 1e-9, 1e9)
        if (idle >= IDLE_STEPS).all():
            break
    return reached, put(values).copy()


def families(cells: Sequence[Row]) -> dict[Cell, list[Row]]:
    """Cells that differ in concepts, size and seed only, where they are enough for a law; by what they share."""
    found: dict[Cell, list[Row]] = {}
    for cell in cells:
        found.setdefault(shared_by(cell), []).append(cell)
    return {shared: own for shared, own in found.items() if len({c["concepts"] for c in own}) >= 3 and len(own) > 5}


def largest_family(rows: Sequence[Row]) -> list[Row]:
    """The most cells for one law among those that descend; none where they are too few."""
    return max(families([row for row in rows if len(row["curves"]["epoch"]) > 1]).values(), key=len, default=[])


def shared_by(cell: Row) -> Cell:
    """What a cell shares with its family: the cell with all of `VARY` at the defaults."""
    return Cell(**{name: cell[name] for name in CELL_FIELDS if name not in VARY})


def law_of(cells: Sequence[Row]) -> Law:
    """The law of one family of cells, in test cosine."""
    names = ("concepts", "parameters", "test_cosine")
    return _fitted(*(tuple(cell[name] for cell in cells) for name in names))


def predict(cells: Sequence[Row], larger: Sequence[Row], most: int) -> dict[str, Any]:
    """Predict larger cells from a law that is fitted on cells of at most ``most`` concepts.

    Args:
        cells: finished cells of one family.
        larger: cells of the same family with ``name`` and ``parameters``, trained or not.
        most: the limit; the results of cells beyond it are not used.
    """
    law = law_of([cell for cell in cells if cell["concepts"] <= most])
    expected = [
        {name: cell[name] for name in ("name", "parameters", *CELL_FIELDS)}
        | {
            "cosine": law.cosine(cell["concepts"], cell["parameters"]),
            "interval": list(law.interval(cell["concepts"], cell["parameters"])),
        }
        for cell in larger
        if cell["concepts"] > most
    ]
    return {"most": most, "level": LEVEL, "law": law.values, "bend": law.bend, "cells": expected}


def check(predictions: dict[str, Any], cells: Sequence[Row]) -> dict[str, Any] | None:
    """Coverage of the intervals of `predict`, with the largest and the mean error; None where no cell is trained."""
    measured = {cell_of(cell): cell["test_cosine"] for cell in cells}
    known = [cell for cell in predictions["cells"] if set(cell) >= set(CELL_FIELDS)]  # older files have names only
    pairs = [(cell, measured[cell_of(cell)]) for cell in known if cell_of(cell) in measured]
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


def describe(law: Law) -> str:
    """The constants of a law with their intervals, as a sentence."""
    constants = [
        f"{name} = {value['value']:.3g} ({value['low']:.3g} to {value['high']:.3g})"
        for name, value in law.values.items()
        if value is not None
    ]
    return f"Scaling law 1 - cosine = E + A N^-alpha + B P^-beta: {', '.join(constants)} (90 % bootstrap intervals)."


def describe_check(file: str, predictions: dict[str, Any], results: dict[str, Any]) -> str | None:
    """The result of `check` as a sentence; None for predictions of other vectors or of cells that are not trained."""
    checked = check(predictions, results["cells"])
    if checked is None or predictions["vectors_sha256"] != results["vectors_sha256"]:
        return None
    return (
        f"Predicted from cells of at most {predictions['most']} concepts ({file}): {checked['cells']} larger "
        f"cells, mean error {checked['mean']:.3f}, largest {checked['most']:.3f}; the {predictions['level']:.0%} "
        f"intervals cover {checked['coverage']:.0%}."
    )
