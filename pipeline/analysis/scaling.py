"""Scaling laws: a student's distance from the teacher as a function of training concepts and parameters.

``1 - cosine = E + A N^-alpha + B P^-beta`` for N concepts and P parameters: the form of Hoffmann et al. (2022),
"Training compute-optimal large language models", equation 2, fitted as there with a Huber loss on the logarithms, from
the best of a grid of starts. Intervals come from a bootstrap over the cells; those of predictions also include the
error of such laws on cells beyond those that they were fitted on.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.analysis.rows import CELL_FIELDS, Row, cell_of, grouped
from pipeline.errors import InputError
from pipeline.settings import Cell

HUBER = 0.01  # log residuals beyond this (1 % of the error) count linearly
BOOTSTRAPS = 100
LEVEL = 0.9  # of every interval
NORMAL_QUANTILES = np.array([NormalDist().inv_cdf((step + 0.5) / 40) for step in range(40)])  # equally likely
CONSTANT_NAMES = ("E", "A", "alpha", "B", "beta")
EXPONENTS = np.linspace(0.05, 1.5, 16)
STARTS = 3  # of the grid's best
SMALLEST_CONSTANT = 1e-6  # start of a constant that least squares sets to 0
ABSENT = -30.0  # the logarithm of a term that is left out
FAMILY_FIELDS = ("concepts", "hidden_dim", "layers", "seed")  # within a family of cells
BOUNDS = np.array([(-20, 1), (-20, 30), (0, 3), (-20, 60), (0, 3)], float).T  # of the parameters, ``[2, 5]``
MAX_STEPS = 400
TOLERANCE = 1e-9  # a step that lowers the loss by a smaller share is idle
IDLE_STEPS = 12  # in a row end the descent
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Law:
    """A fitted scaling law."""

    parameters: Array  # log E, log A, alpha, log B, beta
    samples: Array  # the same of each bootstrap, [bootstraps, 5]
    residuals: Array  # log error minus its fit, of each cell
    span: tuple[float, float]  # log concepts of the smallest and of the largest cell
    curvature_error: float | None  # the curvature that the law lacks; None where it is not known
    free: tuple[bool, ...]  # which parameters were fitted; a term whose variable does not vary is left out

    @property
    def values(self) -> dict[str, dict[str, float] | None]:
        """Each constant by its usual name with its interval; None for a term that is left out."""
        rows = np.vstack([self.parameters, self.samples])
        rows = np.where([True, True, False, True, False], np.exp(rows), rows)
        low, high = np.quantile(rows[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0).tolist()
        columns = zip(rows[0].tolist(), low, high, strict=True)
        found = [dict(zip(("value", "low", "high"), column, strict=True)) for column in columns]
        return {name: found[i] if self.free[i] else None for i, name in enumerate(CONSTANT_NAMES)}

    def cosine(self, concepts: float, size: float) -> float:
        """The cosine that the law predicts for numbers of concepts and parameters."""
        return 1 - float(np.exp(_log_error(self.parameters, _logs([concepts], [size]))[0]))

    def interval(self, concepts: float, size: float) -> tuple[float, float]:
        """An interval for a new cell's cosine, at `LEVEL`, from the bootstrap's laws, each with every residual."""
        logs = _logs([concepts], [size])
        expected = np.array([_log_error(sample, logs)[0] for sample in self.samples])
        # Beyond the largest cell a normal error for the missing curvature is added, which grows with the distance.
        lacking = (self.curvature_error or 0.0) * _off_line(*self.span, logs[0, 0]) * (logs[0, 0] > self.span[1])
        cells = len(self.residuals)
        noise = self.residuals * math.sqrt(cells / max(1, cells - sum(self.free)))  # for the fit's degrees of freedom
        spread = (expected[:, None, None] + noise[:, None] + lacking * NORMAL_QUANTILES).ravel()
        high, low = 1 - np.exp(np.quantile(spread, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
        return float(low), float(high)


def fit(concepts: Sequence[float], sizes: Sequence[float], cosines: Sequence[float], seed: int = 0) -> Law:
    """Fit the law to cells.

    Args:
        concepts: N of each cell.
        sizes: P of each cell.
        cosines: centred cosine of each cell, below 1.
        seed: of the bootstrap.

    Returns:
        The law with bootstrap samples of its constants.

    Raises:
        InputError: fewer cells than the law has constants, or only one number of concepts.
    """
    logs, errors = _logs(concepts, sizes), np.log(np.clip(1 - np.asarray(cosines, np.float64), 1e-9, None))
    free = (True, True, True, *(2 * [len(set(sizes)) > 1]))
    different, least = len(set(concepts)), sum(free) + 1
    if different < 3 or len(errors) < least:
        needs = f"3 numbers of concepts and {least} cells at the least"
        raise InputError(f"a scaling law needs {needs}, found {different} and {len(errors)}")
    best = _fit(logs, errors, free)
    rows = np.random.default_rng(seed).integers(len(errors), size=(BOOTSTRAPS, len(errors)))
    counts = np.stack([np.bincount(row, minlength=len(errors)) for row in rows]).astype(float)  # [bootstraps, cells]
    _, samples = _descend(np.tile(best, (BOOTSTRAPS, 1)), logs, errors, free, counts)
    residuals, span = errors - _log_error(best, logs), (float(logs[0].min()), float(logs[0].max()))
    return Law(best, samples, residuals, span, curvature_error(logs, errors, free), free)


_cached_fit = functools.lru_cache(maxsize=4)(fit)  # the results file and the report need the same one


def _fit(logs: Array, errors: Array, free: tuple[bool, ...]) -> Array:
    reached, tried = _descend(_starts(logs, errors, free), logs, errors, free)
    return np.asarray(tried[reached.argmin()])


def curvature_error(logs: Array, errors: Array, free: tuple[bool, ...]) -> float | None:
    """The curvature that the law lacks: the coefficient of the square of log concepts in the log error.

    Residuals within the fit do not show it. So laws are fitted on the cells with the fewest concepts, at least three
    numbers of them, and predict the rest, for every such cut (rolling origin: Tashman, 2000, "Out-of-sample tests of
    forecasting accuracy"). Their errors are divided by those of a straight line for a parabola, as root mean squares.

    Args:
        logs: log concepts and log parameters, ``[2, cells]``.
        errors: log (1 - cosine), ``[cells]``.
        free: as in `Law`.

    Returns:
        The coefficient; None where there are too few numbers of concepts to cut.
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
    """Error at places beyond ``last`` of the line that fits a square best between ``first`` and ``last``."""
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
    from scipy.optimize import nnls  # only here, because it takes a second to load

    grid = np.array(list(itertools.product(EXPONENTS, EXPONENTS)))  # [grid, 2]
    terms = np.exp([np.zeros((len(grid), len(errors))), *(-grid.T[..., None] * logs[:, None])]) / np.exp(errors)
    terms[2] *= free[3]  # without B where there is one number of parameters
    solved = [nnls(part, np.ones(len(errors))) for part in terms.transpose(1, 2, 0)]  # no constant is negative
    e, a, b = np.log(np.maximum([constants for constants, _ in solved], SMALLEST_CONSTANT)).T
    best = np.argsort([distance for _, distance in solved], kind="stable")[:STARTS]
    return np.stack([e, a, grid[:, 0], b, grid[:, 1]], 1)[best]


def _descend(
    starts: Array, logs: Array, errors: Array, free: tuple[bool, ...], counts: Array | float = 1.0
) -> tuple[Array, Array]:
    """Minimise the Huber loss of many problems at once: Levenberg and Marquardt's method within `BOUNDS`.

    Weights that follow from the residuals turn squares into the Huber loss (Holland and Welsch, 1977, "Robust
    regression using iteratively reweighted least-squares"); only steps that lower the loss are taken.

    Returns:
        The loss that each problem reached, ``[problems]``, and its parameters, ``[problems, 5]``.
    """
    low, high = np.where(free, BOUNDS, [ABSENT, ABSENT, 0.0, ABSENT, 0.0])

    def losses(values: Array) -> Array:
        sizes = np.abs(_log_error(values, logs) - errors) / HUBER
        return np.asarray((counts * np.where(sizes <= 1, np.square(sizes), 2 * sizes - 1)).sum(-1))

    values = np.clip(starts, low, high)
    reached, damping = losses(values), np.full(len(values), 1e-3)
    idle = np.zeros(len(values), int)
    for _ in range(MAX_STEPS):
        terms = _terms(values, logs)
        total = np.logaddexp.reduce(terms)
        share, residuals = np.exp(terms - total), total - errors  # [3, problems, cells], [problems, cells]
        columns = [share[0], share[1], -share[1] * logs[0], share[2], -share[2] * logs[1]]
        jacobian = np.stack(columns, -1)  # [problems, cells, 5]
        weighted = jacobian * (counts / np.maximum(1, np.abs(residuals) / HUBER))[..., None]
        slope = np.einsum("dnp,dn->dp", weighted, residuals)
        squares = np.einsum("dnp,dnq->dpq", weighted, jacobian)
        moves = ~((values <= low) & (slope > 0) | (values >= high) & (slope < 0))  # others stay at a bound
        squares *= moves[:, :, None] * moves[:, None, :]
        diagonal = np.maximum(np.einsum("dpp->dp", squares), 1e-12) * damping[:, None]
        step = np.linalg.solve(squares + diagonal[:, :, None] * np.eye(len(low)), -(slope * moves)[..., None])[..., 0]
        tried = np.clip(values + step, low, high)
        lost = losses(tried)
        better = lost < reached
        idle = np.where(better & (reached - lost > TOLERANCE * reached), 0, idle + 1)
        values, reached = np.where(better[:, None], tried, values), np.where(better, lost, reached)
        damping = np.clip(np.where(better, damping / 4, damping * 3), 1e-9, 1e9)
        if (idle >= IDLE_STEPS).all():
            break
    return reached, values


def families(cells: Sequence[Row]) -> dict[Cell, list[Row]]:
    """Cells that differ in concepts, size and seed only, by `shared_by`; only groups large enough for a law."""
    found = grouped(cells, shared_by)
    return {shared: own for shared, own in found.items() if len({c["concepts"] for c in own}) >= 3 and len(own) > 5}


def largest_family(rows: Sequence[Row]) -> list[Row]:
    """The largest family among cells trained by gradient descent; empty where there is none."""
    return max(families([row for row in rows if len(row["curves"]["epoch"]) > 1]).values(), key=len, default=[])


def shared_by(cell: Row) -> Cell:
    """A cell with the fields in `FAMILY_FIELDS` at their defaults: the same for a whole family."""
    return Cell(**{name: cell[name] for name in CELL_FIELDS if name not in FAMILY_FIELDS})


def law_of(cells: Sequence[Row]) -> Law:
    """The law of one family of cells, in test cosine."""
    names = ("concepts", "parameters", "test_cosine")
    return _cached_fit(*(tuple(cell[name] for cell in cells) for name in names))


def predict(cells: Sequence[Row], larger: Sequence[Row], most: int) -> dict[str, Any]:
    """Predict larger cells from a law that is fitted on cells of at most ``most`` concepts.

    Args:
        cells: finished cells of one family; those of more concepts are not used.
        larger: cells of the same family with ``name`` and ``parameters``, trained or not.
        most: the limit.

    Returns:
        The law, and for each cell beyond the limit its fields, the expected cosine and its interval.
    """
    law = law_of([cell for cell in cells if cell["concepts"] <= most])
    expected = []
    for cell in [cell for cell in larger if cell["concepts"] > most]:
        place = cell["concepts"], cell["parameters"]
        known = {name: cell[name] for name in ("name", "parameters", *CELL_FIELDS)}
        expected.append(known | {"cosine": law.cosine(*place), "interval": list(law.interval(*place))})
    return {"most": most, "level": LEVEL, "law": law.values, "bend": law.curvature_error, "cells": expected}


def check(predictions: dict[str, Any], cells: Sequence[Row]) -> dict[str, Any] | None:
    """Coverage of the intervals of `predict`, with the largest and the mean error; None where no cell is trained."""
    measured = {cell_of(cell): cell["test_cosine"] for cell in cells}
    known = [cell for cell in predictions["cells"] if set(cell) >= set(CELL_FIELDS)]  # older files lack new fields
    pairs = [(cell, measured[cell_of(cell)]) for cell in known if cell_of(cell) in measured]
    if not pairs:
        return None
    errors = [abs(cell["cosine"] - truth) for cell, truth in pairs]
    inside = [cell["interval"][0] <= truth <= cell["interval"][1] for cell, truth in pairs]
    coverage = sum(inside) / len(pairs)
    return {"cells": len(pairs), "coverage": coverage, "mean": float(np.mean(errors)), "most": max(errors)}


def describe(law: Law) -> str:
    """The constants of a law with their intervals, as a sentence."""
    fitted = {name: value for name, value in law.values.items() if value is not None}
    constants = [f"{name} = {v['value']:.3g} ({v['low']:.3g} to {v['high']:.3g})" for name, v in fitted.items()]
    return f"Scaling law 1 - cosine = E + A N^-alpha + B P^-beta: {', '.join(constants)} (90 % bootstrap intervals)."


def describe_check(file: str, predictions: dict[str, Any], results: dict[str, Any]) -> str | None:
    """The result of `check` as a sentence; None for predictions of other vectors or of cells that are not trained."""
    checked = check(predictions, results["cells"])
    if checked is None or predictions["vectors_sha256"] != results["vectors_sha256"]:
        return None
    errors = f"mean error {checked['mean']:.3f}, largest {checked['most']:.3f}"
    covered = f"the {predictions['level']:.0%} intervals cover {checked['coverage']:.0%}"
    source = f"cells of at most {predictions['most']} concepts ({file})"
    return f"Predicted from {source}: {checked['cells']} larger cells, {errors}; {covered}."
